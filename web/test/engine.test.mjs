/** The engine in Chromium: right on the processor, and on a GPU that SwiftShader imitates. */
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { open } from "./browser.mjs";
import { divergence, parse } from "./golden.mjs";
import { serve } from "./server.mjs";

const MODEL = join(process.env.WEIR_TEST_MODELS ?? "", "smollm2.gguf");
const skip = existsSync(MODEL) ? false : "smollm2.gguf isn't there; set WEIR_TEST_MODELS to the folder that has it";
if (skip && process.env.CI) throw new Error(skip);
const GOLDEN = fileURLToPath(new URL("../../backends/tests/golden/smollm2.logits", import.meta.url));
const QUESTION = [{ role: "user", content: "Why is the sky blue?" }];

let server;
let browser;
before(async () => {
  server = await serve({ "smollm2.gguf": MODEL });
  browser = await open(server.url);
});
after(async () => {
  await browser?.close();
  server?.close();
});

/** Mean divergence from llama.cpp's F32 logits over the first positions, and llama.cpp's own. */
async function mean(device, positions, chunk, threads) {
  const golden = parse(readFileSync(GOLDEN));
  let sum = 0;
  for (let at = 0; at < positions; at += chunk) {
    const ids = golden.tokens.slice(at, Math.min(at + chunk, positions));
    const logits = await browser.page.evaluate(
      async ({ ids, device, threads, first }) => {
        globalThis.port ??= {};
        port[device] ??= new (await import("/dist/port.js")).Port();
        const load = { parts: [{ source: `${location.origin}/models/smollm2.gguf` }], device, threads, context: 512 };
        const { logits } = await port[device].call("score", { ids, ...(first ? { load } : {}) }).result;
        const bytes = new Uint8Array(logits.buffer, logits.byteOffset, logits.byteLength);
        let text = "";
        for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
        return btoa(text);
      },
      { ids, device, threads, first: at === 0 },
    );
    const bytes = Buffer.from(logits, "base64");
    const all = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
    ids.forEach((_, i) => {
      sum += divergence(golden.rows[at + i], all.subarray(i * golden.vocabulary, (i + 1) * golden.vocabulary));
    });
  }
  await browser.page.evaluate((device) => (port[device].close(), delete port[device]), device);
  return { kl: sum / positions, peer: golden.peer };
}

async function check(device, positions, chunk, threads = 1) {
  const { kl, peer } = await mean(device, positions, chunk, threads);
  console.log(`${device}, ${threads} threads: mean KL ${kl.toExponential(3)}, llama.cpp ${peer.toExponential(3)}, ${positions} positions`);
  assert.ok(kl <= 1.25 * peer, `${device}: mean KL ${kl}, llama.cpp's own is ${peer}`);
}

/** What a device answers, and how long that took. */
async function ask(device, options, threads = 1) {
  return browser.page.evaluate(
    async ({ device, options, threads, messages }) => {
      const client = new weir.Weir();
      const began = performance.now();
      await client.add("edge", { kind: "local", model: "/models/smollm2.gguf", device, threads, context: 512 });
      const loaded = performance.now();
      const answer = client.chat(messages, options);
      let [text, first] = ["", 0];
      for await (const piece of answer) {
        first ||= performance.now();
        text += piece;
      }
      const over = performance.now();
      const about = client.endpoints()[0].about;
      client.remove("edge");
      const n = answer.end.usage.outputTokens;
      const rate = n > 1 ? ((n - 1) / (over - first)) * 1e3 : 0;
      return { text, end: answer.end, about, load_ms: loaded - began, first_ms: first - loaded, rate };
    },
    { device, options, threads, messages: QUESTION },
  );
}

const show = ({ about, load_ms, first_ms, rate }) =>
  console.log(`${about}: loaded in ${load_ms.toFixed(0)} ms, first token ${first_ms.toFixed(0)} ms, ${rate.toFixed(1)} tok/s`);

test("the processor is as near as llama.cpp", { skip, timeout: 300e3 }, () => check("cpu", 128, 32));

test("the processor's threads compute what one computes", { skip, timeout: 300e3 }, async () => {
  assert.ok(await browser.page.evaluate(() => crossOriginIsolated));
  const one = await ask("cpu", { maxTokens: 64 }, 1);
  // More than some machines have processors: they take turns.
  for (const threads of [2, 3]) {
    const several = await ask("cpu", { maxTokens: 64 }, threads);
    [one, several].forEach(show);
    assert.match(several.about, new RegExp(`${threads} threads`));
    assert.equal(several.text, one.text);
  }
  await check("cpu", 128, 32, 2);
});

test("a page that isn't isolated computes with one thread", { skip, timeout: 120e3 }, async () => {
  const plain = await serve({ "smollm2.gguf": MODEL }, { isolated: false });
  const other = await open(plain.url, { gpu: false });
  const about = await other.page.evaluate(async () => {
    const client = new weir.Weir();
    await client.add("edge", { kind: "local", model: "/models/smollm2.gguf", context: 512 });
    return client.endpoints()[0].about;
  });
  await other.close();
  plain.close();
  assert.match(about, /, 1 thread, WebAssembly/);
});

// SwiftShader takes some seconds for each position; fewer of them have means of their own.
test("the GPU is as near as llama.cpp", { skip, timeout: 1800e3 }, () => check("gpu", 128, 32));

test("both give the same answer", { skip, timeout: 600e3 }, async () => {
  // Few tokens: at a near tie, of which a longer answer has some, the two may part.
  const cpu = await ask("cpu", { maxTokens: 8 });
  const gpu = await ask("gpu", { maxTokens: 8 });
  [cpu, gpu].forEach(show);
  assert.equal(cpu.text, gpu.text);
  assert.equal(cpu.end.reason, "length");
  assert.deepEqual(cpu.end.usage, gpu.end.usage);
  const long = await ask("cpu", { maxTokens: 64 });
  show(long);
  assert.ok(long.text.startsWith(cpu.text));
});

test("where a program imitates the GPU, the processor computes", { skip, timeout: 60e3 }, async () => {
  const { about } = await ask("auto", { maxTokens: 1 });
  assert.match(about, /WebAssembly/);
});

test("an answer can be cancelled, and the next one comes", { skip, timeout: 60e3 }, async () => {
  const result = await browser.page.evaluate(async (messages) => {
    const client = new weir.Weir();
    await client.add("edge", { kind: "local", model: "/models/smollm2.gguf", device: "cpu", context: 512 });
    const stop = new AbortController();
    let kind = "";
    let pieces = 0;
    try {
      for await (const _ of client.chat(messages, { signal: stop.signal, maxTokens: 400, ignoreEos: true })) {
        if (++pieces === 3) stop.abort();
      }
    } catch (error) {
      kind = error.kind;
    }
    // Left in the middle, which cancels too.
    for await (const _ of client.chat(messages, { maxTokens: 400, ignoreEos: true })) break;
    const next = await client.complete("The capital of France is", { maxTokens: 4 }).text();
    const refused = await client.chat(messages, { topP: 7 }).text().catch((error) => error);
    client.remove("edge");
    return { kind, pieces, next, refused: [refused.kind, refused.message] };
  }, QUESTION);
  assert.equal(result.kind, "cancelled");
  assert.ok(result.pieces < 100, `${result.pieces} pieces came`);
  assert.match(result.next, /Paris/);
  assert.equal(result.refused[0], "invalid");
  assert.match(result.refused[1], /topP is 7/);
});
