/** Calls between a page and its worker: one reply each, and events before it. */
import { type FailureKind, WeirError } from "./types.js";

/** From the page. */
export interface Call {
  id: number;
  name: string;
  with: unknown;
}

/** From the worker. */
export type Reply =
  | { id: number; event: unknown }
  | { id: number; result: unknown }
  | { id: number; error: { kind: FailureKind; message: string } };

interface Waiting {
  event: (event: unknown) => void;
  resolve: (result: unknown) => void;
  reject: (error: Error) => void;
}

/** The page's end. */
export class Port {
  readonly #worker: Worker;
  readonly #waiting = new Map<number, Waiting>();
  #calls = 0;
  #dead: WeirError | undefined;

  constructor() {
    this.#worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    this.#worker.onmessage = ({ data }: MessageEvent<Reply>) => this.#take(data);
    this.#worker.onerror = (event) => this.#die(`the worker failed: ${event.message || "it could not be started"}`);
  }

  /** Calls, and says the call's number at once. */
  call(name: string, argument: unknown, event: (event: unknown) => void = () => {}): { id: number; result: Promise<unknown> } {
    const id = ++this.#calls;
    const result = new Promise<unknown>((resolve, reject) => {
      if (this.#dead) return reject(this.#dead);
      this.#waiting.set(id, { event, resolve, reject });
      this.#worker.postMessage({ id, name, with: argument } satisfies Call);
    });
    return { id, result };
  }

  /** Ends the worker, and what it was doing. */
  close(): void {
    this.#worker.terminate();
    this.#die("the endpoint was closed");
  }

  #take(reply: Reply): void {
    const waiting = this.#waiting.get(reply.id);
    if (!waiting) return;
    if ("event" in reply) return waiting.event(reply.event);
    this.#waiting.delete(reply.id);
    if ("result" in reply) waiting.resolve(reply.result);
    else waiting.reject(new WeirError(reply.error.kind, reply.error.message));
  }

  #die(why: string): void {
    this.#dead ??= new WeirError("failed", why);
    for (const { reject } of this.#waiting.values()) reject(this.#dead);
    this.#waiting.clear();
  }
}

/** The worker's end: `handle` answers calls by name. */
export function serve(handle: (name: string, argument: never, event: (event: unknown) => void, id: number) => Promise<unknown>): void {
  self.onmessage = async ({ data: { id, name, with: argument } }: MessageEvent<Call>) => {
    const post = (reply: Reply) => (self as unknown as { postMessage(reply: Reply): void }).postMessage(reply);
    try {
      post({ id, result: await handle(name, argument as never, (event) => post({ id, event }), id) });
    } catch (error) {
      const kind = error instanceof WeirError ? error.kind : "failed";
      post({ id, error: { kind, message: error instanceof Error ? error.message : String(error) } });
    }
  };
}
