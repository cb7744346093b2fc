/** The benchmark page: measures engines on the same model and lengths, and shows what came of it. */
import { Weir } from "../dist/index.js";

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

/** One engine: `load` gives something that answers messages, calling `piece` for each token, and says how many there were. */
const ENGINES = {
  "weir, auto": (model) => weir(model, "auto"),
  "weir, GPU": (model) => weir(model, "gpu"),
  "weir, CPU": (model) => weir(model, "cpu"),
  "wllama": wllama,
};

async function weir(model, device) {
  const client = new Weir();
  await client.add("edge", { kind: "local", model, device, context: CONTEXT });
  return {
    about: client.endpoints()[0].about,
    async answer(messages, maxTokens, piece) {
      const answer = client.chat(messages, { maxTokens, ignoreEos: true });
      for await (const _ of answer) piece();
      return answer.end.usage.outputTokens;
    },
    close: () => client.remove("edge"),
  };
}

async function wllama(model) {
  const root = new URL("../node_modules/@wllama/wllama/esm/", import.meta.url);
  const { Wllama } = await import(new URL("index.js", root));
  const engine = new Wllama({ default: new URL("wasm/wllama.wasm", root).href }, { suppressNativeLog: true });
  await engine.loadModelFromUrl(new URL(model, location.href).href, { n_ctx: CONTEXT });
  return {
    about: `wllama, llama.cpp ${Wllama.getLibllamaVersion()}, ${engine.getNumThreads?.() ?? "?"} threads`,
    async answer(messages, maxTokens, piece) {
      let tokens = 0;
      const onData = (chunk) => {
        if (chunk.choices?.[0]?.delta?.content) (tokens += 1), piece();
      };
      await engine.createChatCompletion({ messages, max_tokens: maxTokens, temperature: 0, ignore_eos: true, stream: true, onData });
      return tokens;
    },
    close: () => engine.exit(),
  };
}

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

/** Time to load, to the first token, from token to token and in all, of one engine. */
export async function measure(name, { model, output, runs }, tell = () => {}) {
  tell(`${name}: loading`);
  const began = performance.now();
  const engine = await ENGINES[name](model);
  const load_ms = performance.now() - began;
  const all = [];
  try {
    for (let run = -1; run < runs; run++) {
      tell(`${name}: ${run < 0 ? "warming up" : `run ${run + 1} of ${runs}`}`);
      const content = run < 0 ? "Say something." : QUESTIONS[run % QUESTIONS.length];
      const start = performance.now();
      let first = 0;
      const tokens = await engine.answer([{ role: "user", content }], output, () => (first ||= performance.now()));
      const end = performance.now();
      if (run >= 0) all.push({ first_ms: first - start, total_ms: end - start, tokens_per_s: ((tokens - 1) / (end - first)) * 1e3 });
    }
  } finally {
    await engine.close();
  }
  const of = (key) => median(all.map((run) => run[key]));
  const figures = { load_ms, first_ms: of("first_ms"), tokens_per_s: of("tokens_per_s"), total_ms: of("total_ms") };
  return { engine: name, about: engine.about, ...figures, runs: all };
}

const $ = (id) => document.getElementById(id);

function show(results, settings) {
  const columns = { load_ms: "load, ms", first_ms: "first token, ms", tokens_per_s: "tokens/s", total_ms: "in all, ms" };
  const cell = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  const row = (tag, texts) => {
    const line = document.createElement("tr");
    line.append(...texts.map((text) => cell(tag, text)));
    return line;
  };
  const lines = results.map((result) => row("td", [`${result.engine} (${result.about})`, ...Object.keys(columns).map((key) => result[key].toFixed(1))]));
  $("table").replaceChildren(row("th", ["engine", ...Object.values(columns)]), ...lines);
  const most = Math.max(...results.map((result) => result.tokens_per_s));
  const bar = ({ engine, tokens_per_s: rate }, i) =>
    `<text x="0" y="${28 * i + 18}">${engine}</text><rect class="bar" x="110" y="${28 * i + 4}" height="20" width="${(rate / most) * 400}"/>` +
    `<text x="${116 + (rate / most) * 400}" y="${28 * i + 18}">${rate.toFixed(1)}</text>`;
  const about = results.map(({ engine, tokens_per_s: rate }) => `${engine} ${rate.toFixed(1)}`).join(", ");
  $("plot").innerHTML = `<svg viewBox="0 0 580 ${28 * results.length}" role="img" aria-label="Tokens a second: ${about}">${results.map(bar).join("")}</svg><figcaption>Tokens a second, medians</figcaption>`;
  const report = { browser: navigator.userAgent, threads: navigator.hardwareConcurrency, isolated: crossOriginIsolated, ...settings, results };
  $("json").href = URL.createObjectURL(new Blob([JSON.stringify(report, null, 2)], { type: "application/json" }));
  for (const id of ["table", "plot", "json"]) $(id).hidden = false;
}

for (const name of Object.keys(ENGINES)) {
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: name !== "weir, GPU" });
  label.append(box, ` ${name} `);
  $("engines").append(label);
}
$("form").onsubmit = async (event) => {
  event.preventDefault();
  const settings = { model: $("model").value, output: Number($("output").value), runs: Number($("runs").value), warm_ups: 1 };
  const results = [];
  for (const box of $("engines").querySelectorAll("input:checked")) {
    try {
      results.push(await measure(box.value, settings, (text) => ($("state").textContent = text)));
      show(results, settings);
    } catch (error) {
      $("state").textContent = `${box.value}: ${error.message}`;
      return;
    }
  }
  $("state").textContent = `Done: medians of ${settings.runs} runs of ${settings.output} tokens after one to warm up.`;
};
