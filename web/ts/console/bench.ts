/** The benchmark page: measures engines on the same model and lengths, and shows what came of it. */
import { Weir } from "../index.js";
import { Store } from "../library.js";
import { threadsHere } from "../module.js";
import type { Message } from "../types.js";
import { at, element, keep, key, shared, type Shared, show, size, text, words } from "./page.js";

const QUESTIONS = [
  "Why is the sky blue?",
  "How do bees find their way home?",
  "What makes bread rise?",
  "Why do leaves change colour in autumn?",
  "How does a sailing boat move against the wind?",
  "What is the difference between weather and climate?",
  "Why does the moon show us only one side?",
  "How do submarines dive and come up again?",
];
const CONTEXT = 1024;
const LEAST_MEMORY = 32e6;

interface Settings {
  model: string;
  output: number;
  runs: number;
  warm_ups: number;
}

interface Engine {
  about: string;
  /** Calls `piece` for each token; returns how many the prompt and the output had (0 where the engine doesn't say). */
  answer(messages: Message[], maxTokens: number, piece: () => void): Promise<{ prompt: number; output: number }>;
  close(): unknown;
}

interface Run {
  first_ms: number;
  total_ms: number;
  tokens_per_s: number;
}

interface Result extends Run {
  engine: string;
  about: string;
  load_ms: number;
  prompt_tokens: number;
  /** All of this page's memory while the engine was loaded, where the browser tells. */
  memory_bytes: number | null;
  runs: Run[];
}

const ENGINES: Record<string, (model: string) => Promise<Engine>> = {
  "Weir": (model) => ours(model, "auto"),
  "Weir, GPU": (model) => ours(model, "gpu"),
  "Weir, processor": (model) => ours(model, "cpu"),
  "wllama": wllama,
};

/** Engines that can't be measured here, and why: they read other files than these, and nobody has packed such files for a build. */
const ABSENT: Record<string, string> = {
  "transformers.js": "reads ONNX, not .gguf; no package has these models as ONNX",
  "WebLLM": "reads models compiled for it, not .gguf; no package has these",
};

async function ours(model: string, device: "auto" | "gpu" | "cpu"): Promise<Engine> {
  const client = new Weir();
  const known = key();
  const own = new URL(model, location.href).origin === location.origin;
  await client.add("edge", { kind: "local", model, device, context: CONTEXT, ...(own && known !== undefined ? { key: known } : {}) });
  return {
    about: client.endpoints()[0]!.about,
    async answer(messages, maxTokens, piece) {
      const answer = client.chat(messages, { maxTokens, ignoreEos: true });
      for await (const _ of answer) piece();
      return { prompt: answer.end!.usage.promptTokens, output: answer.end!.usage.outputTokens };
    },
    close: () => client.remove("edge"),
  };
}

/** As much of wllama as is called here. */
interface Wllama {
  loadModel(files: Blob[], options: object): Promise<void>;
  createChatCompletion(options: object): Promise<unknown>;
  getNumThreads?: () => number;
  exit(): Promise<void>;
}

async function wllama(model: string): Promise<Engine> {
  const root = new URL("/peers/wllama/", location.origin);
  const { Wllama } = (await import(new URL("index.min.js", root).href)) as {
    Wllama: { new (paths: object, options: object): Wllama; getLibllamaVersion(): string };
  };
  const engine = new Wllama({ default: new URL("wasm/wllama.wasm", root).href }, { suppressNativeLog: true });
  const known = key();
  const headers = new Headers(known === undefined ? [] : [["authorization", `Bearer ${known}`]]);
  const response = await fetch(model, { headers });
  if (!response.ok) throw new Error(`${model}: HTTP ${response.status}`);
  // As many threads as ours.
  await engine.loadModel([await response.blob()], { n_ctx: CONTEXT, n_threads: crossOriginIsolated ? threadsHere() : 1 });
  return {
    about: `wllama, llama.cpp ${Wllama.getLibllamaVersion()}, threads: ${engine.getNumThreads?.() ?? "?"}`,
    async answer(messages, maxTokens, piece) {
      let output = 0;
      const onData = (chunk: { choices?: { delta?: { content?: string } }[] }) => {
        if (chunk.choices?.[0]?.delta?.content) (output += 1), piece();
      };
      await engine.createChatCompletion({ messages, max_tokens: maxTokens, temperature: 0, ignore_eos: true, stream: true, onData });
      return { prompt: 0, output };
    },
    close: () => engine.exit(),
  };
}

const median = (values: number[]) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? NaN;

/** Time to load, to the first token, from token to token and in all, of one engine. */
export async function measure(name: string, { model, output, runs }: Settings, tell: (words: string) => void = () => {}): Promise<Result> {
  tell(`${name}: loading`);
  const began = performance.now();
  const engine = await ENGINES[name]!(model);
  const load_ms = performance.now() - began;
  const all: Run[] = [];
  let prompt = 0;
  let memory_bytes: number | null = null;
  try {
    for (let run = -1; run < runs; run++) {
      tell(`${name}: ${run < 0 ? "warming up" : `run ${run + 1} of ${runs}`}`);
      const content = run < 0 ? "Say something." : QUESTIONS[run % QUESTIONS.length]!;
      const start = performance.now();
      let first = 0;
      const made = await engine.answer([{ role: "user", content }], output, () => (first ||= performance.now()));
      const end = performance.now();
      prompt = Math.max(prompt, made.prompt);
      if (run >= 0) all.push({ first_ms: first - start, total_ms: end - start, tokens_per_s: ((made.output - 1) / (end - first)) * 1e3 });
    }
    memory_bytes = await memory();
  } finally {
    await engine.close();
  }
  const of = (key: keyof Run) => median(all.map((run) => run[key]));
  const figures = { first_ms: of("first_ms"), total_ms: of("total_ms"), tokens_per_s: of("tokens_per_s") };
  return { engine: name, about: engine.about, load_ms, ...figures, prompt_tokens: prompt, memory_bytes, runs: all };
}

/** Of the page and its workers; only some browsers tell, and only pages that are isolated. It may wait for a garbage collection. */
async function memory(): Promise<number | null> {
  const ask = (performance as { measureUserAgentSpecificMemory?: () => Promise<{ bytes: number }> }).measureUserAgentSpecificMemory;
  if (!ask || !crossOriginIsolated) return null;
  const late = new Promise<null>((resolve) => setTimeout(() => resolve(null), 30_000));
  const told = await Promise.race([ask.call(performance).then(({ bytes }) => bytes), late]).catch(() => null);
  // Less than any model: the engine's worker was not counted.
  return told !== null && told > LEAST_MEMORY ? told : null;
}

const COLUMNS: [string, (result: Result) => string][] = [
  ["Load, ms", (result) => result.load_ms.toFixed(0)],
  ["First token, ms", (result) => result.first_ms.toFixed(1)],
  ["Tokens/s", (result) => result.tokens_per_s.toFixed(1)],
  ["In all, ms", (result) => result.total_ms.toFixed(0)],
  ["Memory, MB", (result) => (result.memory_bytes === null ? "–" : (result.memory_bytes / 1e6).toFixed(0))],
];

function draw(results: Result[], settings: Settings): void {
  const head = element("tr", {}, ...["Engine", ...COLUMNS.map(([name]) => name)].map((name) => element("th", { textContent: name, scope: "col" })));
  const lines = results.map((result) =>
    element(
      "tr",
      {},
      element("td", {}, result.engine, element("div", { className: "small soft", textContent: result.about })),
      ...COLUMNS.map(([, of]) => element("td", { textContent: of(result) })),
    ),
  );
  at("table").replaceChildren(element("thead", {}, head), element("tbody", {}, ...lines));
  plot(results);
  const report = { browser: navigator.userAgent, threads: navigator.hardwareConcurrency, isolated: crossOriginIsolated, ...settings, results };
  at<HTMLAnchorElement>("json").href = URL.createObjectURL(new Blob([JSON.stringify(report, null, 2)], { type: "application/json" }));
  show("results", true);
}

function plot(results: Result[]): void {
  const most = Math.max(...results.map(({ tokens_per_s }) => tokens_per_s), 1e-9);
  const draw = (name: string, attributes: Record<string, string | number>, content = "") => {
    const drawn = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) drawn.setAttribute(key, String(value));
    drawn.textContent = content;
    return drawn;
  };
  const about = results.map(({ engine, tokens_per_s }) => `${engine} ${tokens_per_s.toFixed(1)}`).join(", ");
  const svg = draw("svg", { class: "plot", viewBox: `0 0 360 ${44 * results.length}`, role: "img", "aria-label": `Tokens a second: ${about}` });
  results.forEach(({ engine, tokens_per_s: rate }, i) => {
    const width = (rate / most) * 300;
    svg.append(
      draw("text", { x: 0, y: 44 * i + 14 }, engine),
      draw("rect", { class: "bar", x: 0, y: 44 * i + 20, width, height: 16, rx: 3 }),
      draw("text", { x: width + 8, y: 44 * i + 33 }, rate.toFixed(1)),
    );
  });
  at("plot").replaceChildren(svg, element("figcaption", { textContent: "Tokens a second while an answer comes; medians." }));
}

let models: Shared[] = [];

function fields(): void {
  show("url-field", at<HTMLSelectElement>("model").value === "url");
}

async function setUp(): Promise<void> {
  const peer = (await fetch("/peers/wllama/index.min.js", { method: "HEAD" }).catch(() => undefined))?.ok === true;
  for (const name of Object.keys(ENGINES)) {
    const there = name !== "wllama" || peer;
    const box = element("input", { type: "checkbox", value: name, checked: there && name !== "Weir, GPU", disabled: !there });
    const note = there ? {} : { textContent: "not part of this build" };
    at("engines").append(element("label", { className: "check" }, box, element("span", {}, name, element("small", note))));
  }
  for (const [name, why] of Object.entries(ABSENT)) {
    const box = element("input", { type: "checkbox", value: name, disabled: true });
    at("engines").append(element("label", { className: "check" }, box, element("span", {}, name, element("small", { textContent: why }))));
  }
  models = await shared();
  const select = at<HTMLSelectElement>("model");
  const kept = await new Store().list().catch(() => []);
  const others = kept.filter(({ url }) => !models.some((model) => model.url === url));
  select.replaceChildren(
    ...models.map(({ url, name, size: bytes }) => element("option", { value: url, textContent: `${name} (${size(bytes)})` })),
    ...others.map(({ url }) => element("option", { value: url, textContent: url })),
    element("option", { value: "url", textContent: "A file from elsewhere…" }),
  );
  select.onchange = fields;
  fields();
}

at("form").onsubmit = async (event) => {
  event.preventDefault();
  const value = (id: string) => at<HTMLInputElement>(id).value;
  const model = value("model") === "url" ? value("url") : value("model");
  if (!URL.canParse(model, location.href)) return text("state", "Give the address of a .gguf file first.");
  const settings = { model, output: Number(value("output")), runs: Number(value("runs")), warm_ups: 1 };
  const chosen = [...at("engines").querySelectorAll<HTMLInputElement>("input:checked")].map((box) => box.value);
  const results: Result[] = [];
  const failures: string[] = [];
  at<HTMLButtonElement>("measure").disabled = true;
  for (const name of chosen) {
    try {
      results.push(await measure(name, settings, (words) => text("state", words)));
      draw(results, settings);
    } catch (error) {
      failures.push(`${name}: ${words(error)}`);
    }
  }
  at<HTMLButtonElement>("measure").disabled = false;
  const done = results.length > 0 ? `Medians of ${settings.runs} ${settings.runs === 1 ? "run" : "runs"} of ${settings.output} tokens, after one to warm up; prompts of about ${results[0]!.prompt_tokens} tokens. ` : "";
  text("state", done + failures.join(" "));
};

keep();
await setUp();
