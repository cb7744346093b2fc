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
export type LoadCall = Pick<LocalSpec, "device" | "threads" | "context" | "slots"> & {
  parts: { source: string | File; sha256?: string }[];
};

/** What comes while an answer is made. */
export type Said = { text: string } | { end: { reason: "stop" | "length"; text: string } & End["usage"] };

export class Local implements Endpoint {
  readonly #spec: LocalSpec;
  readonly #call: LoadCall;
  #port: Port;
  #about: About;
  /** The device is lost; another is being found. */
  #again: Promise<void> | undefined;
  #closed = false;

  private constructor(spec: LocalSpec, call: LoadCall, port: Port, about: About) {
    this.#spec = spec;
    this.#call = call;
    this.#port = port;
    this.#about = about;
  }

  get about(): About {
    return this.#about;
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
      ...(spec.threads === undefined ? {} : { threads: spec.threads }),
      ...(spec.context === undefined ? {} : { context: spec.context }),
      ...(spec.slots === undefined ? {} : { slots: spec.slots }),
    };
    // Asked for on behalf of the page: what was fetched isn't thrown away when space runs short.
    void navigator.storage?.persist?.();
    return new Local(spec, call, ...(await loaded(spec, call)));
  }

  describe(): string {
    return this.about.description;
  }

  close(): void {
    this.#closed = true;
    this.#port.close();
  }

  /** Whoever asks next waits for it, and hears of it if it fails. */
  #mend(): void {
    this.#again ??= this.#recover().finally(() => (this.#again = undefined));
    this.#again.catch(() => undefined);
  }

  /** Loads the model anew, in another worker, if its device can't go on: what was lost with the old one comes from the store. */
  async #recover(): Promise<void> {
    const why = (await this.#port.call("trouble", undefined).result.catch(() => "the worker ended")) as string | undefined;
    if (why === undefined || this.#closed) return;
    this.#spec.onLost?.(why);
    this.#port.close();
    const [port, about] = await loaded(this.#spec, this.#call);
    if (this.#closed) return port.close();
    this.#port = port;
    this.#about = about;
  }

  async *answer({ input, options }: Request): AsyncGenerator<Piece> {
    const { signal, endpoint: _, ...rest } = options;
    if (signal?.aborted) throw new WeirError("cancelled", "cancelled");
    await this.#again;
    const port = this.#port;
    const said: Said[] = [];
    let wake: () => void = () => {};
    const { id, result } = port.call("answer", { input, options: rest }, (event) => {
      said.push(event as Said);
      wake();
    });
    let over = false;
    let failed: unknown;
    result.then(
      () => (over = true),
      (error: unknown) => ((over = true), (failed = error)),
    ).finally(() => wake());
    const cancel = () => void port.call("cancel", id).result.catch(() => undefined);
    signal?.addEventListener("abort", cancel);
    try {
      for (;;) {
        for (let event = said.shift(); event; event = said.shift()) yield* pieces(event);
        if (failed !== undefined) {
          const broken = !(failed instanceof WeirError) || failed.kind === "failed";
          if (broken && port === this.#port) this.#mend();
          throw failed;
        }
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

/** A worker with the model in it. */
async function loaded(spec: LocalSpec, call: LoadCall): Promise<[Port, About]> {
  const port = new Port();
  try {
    if (spec.key !== undefined) {
      const origins = call.parts.flatMap(({ source }) => (typeof source === "string" ? [new URL(source).origin] : []));
      for (const origin of new Set(origins)) await port.call("authorise", { origin, secret: spec.key }).result;
    }
    const about = await port.call("load", call, (event) => spec.onProgress?.(event as Progress)).result;
    return [port, about as About];
  } catch (error) {
    port.close();
    throw error;
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
