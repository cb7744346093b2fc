/** A model in this page: an engine in a worker of its own. */
import { Port } from "./port.js";
import { type Endpoint, type LocalSpec, type Piece, type Progress, type Request, WeirError } from "./types.js";
import type { End } from "./types.js";

/** What a loaded model is; see `Model::about`. */
export interface About {
  device: string;
  description: string;
  numerics: string;
  bytes: number;
  context: number;
  vocabulary: number;
}

/** What the worker is asked to load. */
export type LoadCall = Pick<LocalSpec, "device" | "context" | "slots"> & {
  parts: { source: string | File; sha256?: string }[];
};

/** What comes while an answer is made. */
export type Said = { text: string } | { end: { reason: "stop" | "length"; text: string } & End["usage"] };

export class Local implements Endpoint {
  readonly #port: Port;
  readonly about: About;

  private constructor(port: Port, about: About) {
    this.#port = port;
    this.about = about;
  }

  /** Fetches what isn't in the store yet, and loads it. */
  static async load(spec: LocalSpec): Promise<Local> {
    const sources = Array.isArray(spec.model) ? spec.model : [spec.model];
    const digests = typeof spec.sha256 === "string" ? [spec.sha256] : (spec.sha256 ?? []);
    if (digests.length > 0 && digests.length !== sources.length) {
      throw new WeirError("invalid", `there are ${sources.length} parts and ${digests.length} digests`);
    }
    const call: LoadCall = {
      parts: sources.map((source, i) => ({
        source: typeof source === "string" ? new URL(source, location.href).href : source,
        ...(digests[i] === undefined ? {} : { sha256: digests[i] }),
      })),
      device: spec.device ?? "auto",
      ...(spec.context === undefined ? {} : { context: spec.context }),
      ...(spec.slots === undefined ? {} : { slots: spec.slots }),
    };
    // Asked for on behalf of the page: what was fetched isn't thrown away when space runs short.
    void navigator.storage?.persist?.();
    const port = new Port();
    try {
      const about = await port.call("load", call, (event) => spec.onProgress?.(event as Progress)).result;
      return new Local(port, about as About);
    } catch (error) {
      port.close();
      throw error;
    }
  }

  describe(): string {
    return this.about.description;
  }

  close(): void {
    this.#port.close();
  }

  async *answer({ input, options }: Request): AsyncGenerator<Piece> {
    const { signal, endpoint: _, ...rest } = options;
    if (signal?.aborted) throw new WeirError("cancelled", "cancelled");
    const said: Said[] = [];
    let wake: () => void = () => {};
    const { id, result } = this.#port.call("answer", { input, options: rest }, (event) => {
      said.push(event as Said);
      wake();
    });
    let over = false;
    let failed: unknown;
    result.then(
      () => (over = true),
      (error: unknown) => ((over = true), (failed = error)),
    ).finally(() => wake());
    const cancel = () => void this.#port.call("cancel", id).result.catch(() => undefined);
    signal?.addEventListener("abort", cancel);
    try {
      for (;;) {
        for (let event = said.shift(); event; event = said.shift()) yield* pieces(event);
        if (failed !== undefined) throw failed;
        if (over) return;
        await new Promise<void>((resolve) => {
          wake = resolve;
          if (said.length > 0 || over) resolve();
        });
      }
    } finally {
      signal?.removeEventListener("abort", cancel);
      if (!over) cancel();
    }
  }
}

function* pieces(said: Said): Generator<Piece> {
  if ("text" in said) {
    yield said;
    return;
  }
  const { reason, text, ...usage } = said.end;
  if (text !== "") yield { text };
  yield { end: { reason, usage } };
}
