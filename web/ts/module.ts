/**
 * The engine's module, in one of its two builds: the one that knows GPUs and has one thread, or the one whose threads share
 * memory, which pages may do that are isolated from other origins (`crossOriginIsolated`).
 */
import type * as plain from "./engine.js";
import { isReal } from "./gpu.js";
import type { Help } from "./helper.js";
import type { LocalSpec } from "./types.js";

export type Engine = Pick<typeof plain, "Digest" | "Model" | "Node" | "Scorer">;
export type Wish = Pick<LocalSpec, "device" | "threads">;

/** More than these rarely help, and a phone's slow cores hold up its fast ones. */
const THREADS_MAX = 8;

const loaded = new Map<number, Promise<Engine>>();

/** The module for what is to be computed, when it is first needed. */
export async function engine(wish: Wish): Promise<Engine> {
  const threads = await threadsOf(wish);
  let found = loaded.get(Math.min(threads, 2));
  if (!found) {
    found = threads > 1 ? withThreads(threads).catch(alone) : alone();
    loaded.set(Math.min(threads, 2), found);
  }
  return found;
}

/** Threads for the processor; 1, too, where a GPU is to compute. */
async function threadsOf({ device, threads }: Wish): Promise<number> {
  if (!crossOriginIsolated || device === "gpu") return 1;
  const wanted = threads ?? threadsHere();
  if (wanted <= 1 || (device !== "cpu" && (await isReal()))) return 1;
  return Math.min(wanted, 4 * THREADS_MAX);
}

/** Threads for the processor, where nobody says how many. */
export function threadsHere(): number {
  const processors = navigator.hardwareConcurrency;
  return processors <= 4 ? processors : Math.min(Math.max(4, processors >> 1), THREADS_MAX);
}

async function alone(why?: unknown): Promise<Engine> {
  if (why !== undefined) console.warn("computing with one thread:", why);
  const { default: init, ...engine } = await import("./engine.js");
  await init({ module_or_path: new URL("./engine_bg.wasm", import.meta.url) });
  return engine;
}

async function withThreads(threads: number): Promise<Engine> {
  const { default: init, ...engine } = await import("./threads/engine.js");
  const module = await compiled(new URL("./threads/engine_bg.wasm", import.meta.url));
  const { memory } = await init({ module_or_path: module });
  await Promise.all(Array.from({ length: threads - 1 }, () => helper({ module, memory })));
  return engine;
}

async function compiled(url: URL): Promise<WebAssembly.Module> {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url.href}: HTTP ${response.status}`);
  return WebAssembly.compile(await response.arrayBuffer());
}

/** A worker that lends its thread; without it, there is one thread less. */
function helper(help: Help): Promise<void> {
  return new Promise((resolve) => {
    const worker = new Worker(new URL("./helper.js", import.meta.url), { type: "module" });
    worker.onmessage = () => resolve();
    worker.onerror = (event) => {
      console.error(`a thread failed: ${event.message || "it could not be started"}`);
      resolve();
    };
    worker.postMessage(help);
  });
}
