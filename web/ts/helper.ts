/** A thread of the processor: a worker that shares the engine's memory, and computes for it until it is ended. */
import init, { broke, enlist, serve } from "./threads/engine.js";

/** What the engine's worker sends. */
export interface Help {
  module: WebAssembly.Module;
  memory: WebAssembly.Memory;
}

self.onmessage = async ({ data: { module, memory } }: MessageEvent<Help>) => {
  await init({ module_or_path: module, memory });
  enlist();
  (self as unknown as { postMessage(here: true): void }).postMessage(true);
  try {
    serve();
  } catch (error) {
    broke();
    throw error;
  }
};
