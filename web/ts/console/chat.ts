/** The chat page: a model in this browser, or one of the cluster's. */
import { Weir, WeirError } from "../index.js";
import { type Stored, Store } from "../library.js";
import type { EndpointSpec, LocalSpec, Message } from "../types.js";
import { at, element, keep, key, progress, remembered, shared, type Shared, show, size, text, words } from "./page.js";

const CHOICE = "weir-chat-choice";
const MAX_TOKENS = 1024;

interface Choice {
  where: "local" | "cluster" | "auto";
  /** A file's address; none where it was a file of this machine. */
  url?: string;
  name: string;
  device: "auto" | "gpu" | "cpu";
}

const weir = new Weir();
const store = new Store();
const messages: Message[] = [];
let models: Shared[] = [];
let cluster: string[] = [];
let stop: AbortController | undefined;
let ready = false;
/** The model that somebody has picked; the list may change under it. */
let chosen = "";

const value = (id: string) => at<HTMLInputElement>(id).value;
const input = at<HTMLTextAreaElement>("text");

/** What can be chosen, wherever it shall run. */
async function options(): Promise<void> {
  const select = at<HTMLSelectElement>("model");
  const here = value("where") !== "cluster";
  const all: HTMLOptionElement[] = [];
  const add = (value: string, textContent: string) => all.push(element("option", { value, textContent }));
  if (here) {
    const known = new Set(models.map(({ url }) => url));
    for (const { url, name, size: bytes } of models) add(url, `${name} (${size(bytes)})`);
    for (const { url, size: bytes } of await stored()) if (!known.has(url)) add(url, `${called(url)} (${size(bytes)})`);
    add("file", "A file on this machine…");
    add("url", "A file from elsewhere…");
  } else {
    for (const name of cluster) add(name, name);
    if (cluster.length === 0) add("", "the cluster has no model now");
  }
  select.replaceChildren(...all);
  if (all.some((option) => option.value === chosen)) select.value = chosen;
  fields();
}

function fields(): void {
  const here = value("where") !== "cluster";
  show("device-field", here);
  show("url-field", here && value("model") === "url");
  show("file-field", here && value("model") === "file");
  text("start", here ? "Load" : "Use");
}

async function stored(): Promise<Stored[]> {
  return (await store.list().catch(() => [])).filter(({ size: bytes, here }) => bytes === here);
}

/** What a person calls the file at this address. */
function called(url: string): string {
  const known = [...models, ...remembered()].find((model) => model.url === url);
  return known?.name ?? decodeURIComponent(new URL(url).pathname.split("/").pop() ?? url).replace(/\.gguf$/i, "");
}

async function shelf(): Promise<void> {
  const all = await store.list().catch(() => []);
  const line = ({ url, size: bytes, here }: Stored) => {
    const remove = element("button", { type: "button", textContent: "Remove" });
    remove.ariaLabel = `Remove ${called(url)}`;
    remove.onclick = async () => {
      await store.remove(url);
      await shelf();
      await options();
    };
    const much = here === bytes ? size(bytes) : `${size(here)} of ${size(bytes)}`;
    return element("li", {}, element("span", {}, called(url), " ", element("span", { className: "soft small", textContent: much })), remove);
  };
  at("stored").replaceChildren(...(all.length > 0 ? all.map(line) : [element("li", { className: "soft", textContent: "No model yet." })]));
  const { used, quota } = await store.space();
  text("space", `${size(used)} of the ${size(quota)} that this browser grants.`);
}

function trouble(message: string | undefined): void {
  show("trouble", message !== undefined);
  text("trouble", message ?? "");
}

function local(choice: Choice, model: LocalSpec["model"]): LocalSpec {
  const sha256 = models.find(({ url }) => url === model)?.sha256;
  const known = key();
  const own = typeof model === "string" && new URL(model).origin === location.origin;
  return {
    kind: "local",
    model,
    device: choice.device,
    ...(sha256 === undefined ? {} : { sha256 }),
    ...(own && known !== undefined ? { key: known } : {}),
    onProgress: (event) => {
      const { words, share } = progress(event);
      show("loading", true);
      text("stage", words);
      at<HTMLProgressElement>("progress").value = share;
    },
    onLost: (why) => trouble(`The GPU was lost and the model is being loaded again (${why}).`),
  };
}

async function use(choice: Choice, files?: File[]): Promise<void> {
  trouble(undefined);
  ready = false;
  enable();
  const known = key();
  const there: EndpointSpec = { kind: "cluster", url: location.origin, ...(known === undefined ? {} : { key: known }) };
  at<HTMLButtonElement>("start").disabled = true;
  try {
    let about: string;
    if (choice.where === "cluster") {
      await weir.add("chat", { ...there, model: choice.name });
      about = `${choice.name}, on the cluster`;
    } else {
      const model = files ?? choice.url;
      if (model === undefined) return;
      const name = choice.where === "auto" ? "here" : "chat";
      await weir.add(name, local(choice, model));
      about = `${choice.name}, in this browser: ${weir.endpoints().find((endpoint) => endpoint.name === name)?.about}`;
      if (choice.where === "auto") {
        await weir.add("there", there);
        await weir.add("chat", { kind: "auto", endpoints: ["here", "there"] });
        about += ", else on the cluster";
      }
    }
    if (!files && choice.where !== "cluster") localStorage.setItem(CHOICE, JSON.stringify(choice));
    text("summary", about);
    at<HTMLDetailsElement>("setup").open = false;
    ready = true;
  } catch (error) {
    trouble(words(error));
    at<HTMLDetailsElement>("setup").open = true;
  } finally {
    at<HTMLButtonElement>("start").disabled = false;
    show("loading", false);
    enable();
    await shelf();
  }
  if (ready) input.focus();
}

function enable(): void {
  input.disabled = !ready;
  input.placeholder = ready ? "Write a message" : "Load a model first";
  at<HTMLButtonElement>("send").disabled = !ready || stop !== undefined;
  show("send", stop === undefined);
  show("stop", stop !== undefined);
}

function say(role: string, content: string): HTMLLIElement {
  show("empty", false);
  show("said", true);
  const line = element("li", { className: role, textContent: content });
  at("said").append(line);
  line.scrollIntoView({ block: "end" });
  return line;
}

async function send(): Promise<void> {
  const content = input.value.trim();
  if (content === "" || !ready || stop) return;
  input.value = "";
  trouble(undefined);
  say("user", content);
  messages.push({ role: "user", content });
  const line = say("assistant", "");
  line.ariaBusy = "true";
  stop = new AbortController();
  enable();
  const began = performance.now();
  const answer = weir.chat(messages, { endpoint: "chat", maxTokens: MAX_TOKENS, signal: stop.signal, priority: "interactive" });
  let [all, first, last, count] = ["", 0, 0, 0];
  try {
    for await (const piece of answer) {
      last = performance.now();
      first ||= last;
      count += 1;
      all += piece;
      line.append(piece);
      line.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    const cancelled = error instanceof WeirError && error.kind === "cancelled";
    if (all === "") line.remove();
    if (!cancelled) say("failed", words(error));
  } finally {
    line.ariaBusy = "false";
    stop = undefined;
    enable();
  }
  if (all !== "") messages.push({ role: "assistant", content: all });
  else messages.pop();
  const made = answer.end?.usage.outputTokens ?? count;
  if (made > 1 && last > first) {
    const rate = ((made - 1) / (last - first)) * 1e3;
    text("figures", `First token after ${(first - began).toFixed(0)} ms, then ${rate.toFixed(1)} tokens a second.`);
  }
  input.focus();
}

function setUp(): void {
  at("load").onsubmit = (event) => {
    event.preventDefault();
    const model = value("model");
    const files = [...(at<HTMLInputElement>("file").files ?? [])].sort((a, b) => a.name.localeCompare(b.name));
    const choice: Choice = { where: value("where") as Choice["where"], name: "", device: value("device") as Choice["device"] };
    if (choice.where === "cluster") void use({ ...choice, name: model });
    else if (model === "file") files.length > 0 ? void use({ ...choice, name: files[0]!.name }, files) : trouble("Choose a file first.");
    else {
      const url = model === "url" ? value("url") : model;
      if (URL.canParse(url)) void use({ ...choice, name: called(url), url });
      else trouble("Give the address of a .gguf file first.");
    }
  };
  at("where").onchange = () => void options();
  at("model").onchange = () => {
    chosen = value("model");
    fields();
  };
  at("clear").onclick = () => {
    messages.length = 0;
    at("said").replaceChildren();
    show("said", false);
    show("empty", true);
    text("figures", "");
  };
  at("composer").onsubmit = (event) => {
    event.preventDefault();
    void send();
  };
  input.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      void send();
    }
  };
  at("stop").onclick = () => stop?.abort();
}

/** What was used last in this browser, if it is all here. */
async function resume(): Promise<boolean> {
  let choice: Choice;
  try {
    choice = JSON.parse(localStorage.getItem(CHOICE) ?? "null") as Choice;
  } catch {
    return false;
  }
  if (!choice?.url) return false;
  if (!(await stored()).some(({ url }) => url === choice.url)) return false;
  at<HTMLSelectElement>("where").value = choice.where;
  at<HTMLSelectElement>("device").value = choice.device;
  chosen = choice.url;
  await options();
  await use(choice);
  return true;
}

keep();
setUp();
models = remembered();
await Promise.all([options(), shelf()]);
const resumed = resume();
models = await shared();
const known = key();
const headers = new Headers(known === undefined ? [] : [["authorization", `Bearer ${known}`]]);
const listed = await fetch("/v1/models", { headers }).catch(() => undefined);
if (listed?.ok) cluster = ((await listed.json()) as { data: { id: string }[] }).data.map(({ id }) => id);
await options();
if (!(await resumed) && !ready) at<HTMLDetailsElement>("setup").open = true;
