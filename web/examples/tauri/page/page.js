/** The page: a model from a file of this machine, which the program hands out, or a cluster; the calls are the same. */
import { Weir } from "./dist/index.js";

const { invoke, convertFileSrc } = window.__TAURI__.core;
const $ = (id) => document.getElementById(id);
const weir = new Weir();
const messages = [];
const failed = (error) => invoke("failed", { message: error?.message ?? String(error) });
addEventListener("error", (event) => failed(event.message));
addEventListener("unhandledrejection", ({ reason }) => failed(reason));

async function answer(question) {
  messages.push({ role: "user", content: question });
  $("said").append(`\n${question}\n\n`);
  $("text").value = "";
  $("send").disabled = true;
  const began = performance.now();
  let [text, first, tokens] = ["", 0, 0];
  for await (const piece of weir.chat(messages, { maxTokens: 128 })) {
    first ||= performance.now();
    text += piece;
    tokens += 1;
    $("said").append(piece);
  }
  const rate = ((tokens - 1) / (performance.now() - first)) * 1e3;
  $("state").textContent = `First token after ${(first - began).toFixed(0)} ms, then ${rate.toFixed(1)} tokens a second.`;
  messages.push({ role: "assistant", content: text });
  $("said").append("\n");
  $("send").disabled = false;
  return text;
}

$("form").onsubmit = async (event) => {
  event.preventDefault();
  await answer($("text").value).catch(failed);
};

const [file, cluster, key, question] = await invoke("wishes");
const remote = { kind: "cluster", url: cluster, ...(key ? { key } : {}) };
const local = {
  kind: "local",
  model: convertFileSrc("model.gguf", "model"),
  onProgress: ({ stage, done, total }) => {
    $("state").textContent = { fetch: "Fetching", verify: "Checking", load: "Loading" }[stage];
    $("progress").value = done / total;
  },
};
try {
  await weir.add("chat", file ? local : remote);
  $("state").textContent = weir.endpoints()[0].about;
  $("progress").hidden = true;
  $("text").disabled = $("send").disabled = false;
  $("text").focus();
  await invoke("ready", { about: `${weir.endpoints()[0].about}${crossOriginIsolated ? ", isolated" : ""}` });
  if (question) await invoke("answered", { text: await answer(question) });
} catch (error) {
  $("state").textContent = error.message;
  failed(error);
}
