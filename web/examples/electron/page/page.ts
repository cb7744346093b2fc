/** The page: a model that the program hands out; for one on a cluster, another endpoint is all that changes. */
import { type Message, Weir } from "weir";

const at = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const weir = new Weir();
const messages: Message[] = [];

async function answer(content: string): Promise<void> {
  messages.push({ role: "user", content });
  at("said").append(`\n${content}\n\n`);
  at<HTMLButtonElement>("send").disabled = true;
  let text = "";
  for await (const piece of weir.chat(messages, { maxTokens: 512 })) {
    text += piece;
    at("said").append(piece);
  }
  messages.push({ role: "assistant", content: text });
  at("said").append("\n");
  at<HTMLButtonElement>("send").disabled = false;
}

const show = (error: unknown) => (at("state").textContent = error instanceof Error ? error.message : String(error));

at<HTMLFormElement>("form").onsubmit = (event) => {
  event.preventDefault();
  const field = at<HTMLInputElement>("text");
  void answer(field.value).catch(show);
  field.value = "";
};

try {
  await weir.add("here", {
    kind: "local",
    model: "/model.gguf",
    onProgress: ({ stage, done, total }) => (at("state").textContent = `${stage}: ${((100 * done) / total).toFixed(0)}%`),
  });
  at("state").textContent = weir.endpoints()[0]!.about;
  at<HTMLInputElement>("text").disabled = at<HTMLButtonElement>("send").disabled = false;
} catch (error) {
  show(error);
}
