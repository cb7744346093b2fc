/**
 * One way to ask a language model, wherever it runs.
 *
 *     const weir = new Weir();
 *     await weir.add("edge", { kind: "local", model: "/models/smollm2.gguf" });
 *     for await (const text of weir.chat([{ role: "user", content: "Why is the sky blue?" }])) show(text);
 *
 * To ask another model elsewhere, add another endpoint; nothing else changes.
 */
import { Answer } from "./answer.js";
import { Local } from "./local.js";
import { Remote } from "./remote.js";
import { type AutoSpec, type Endpoint, type EndpointSpec, type Message, type Options } from "./types.js";
import { type Piece, type Request, WeirError } from "./types.js";

export { Answer } from "./answer.js";
export { type Figures, Guest, type GuestSpec, type Membership, type Rates, whyNot } from "./guest.js";
export { Store, type Stored } from "./library.js";
export * from "./types.js";

/** The endpoints that a program knows, by name. */
export class Weir {
  readonly #endpoints = new Map<string, Endpoint | AutoSpec>();

  /**
   * Adds an endpoint, or puts it in the place of the one that has this name, and says its name. A local model is
   * fetched and loaded first; nothing is asked of others yet.
   */
  async add(name: string, spec: EndpointSpec): Promise<string> {
    const endpoint = await open(spec);
    this.remove(name);
    this.#endpoints.set(name, endpoint);
    return name;
  }

  /** Forgets an endpoint; a local model's memory is free again. */
  remove(name: string): void {
    const known = this.#endpoints.get(name);
    if (known && !("kind" in known)) known.close();
    this.#endpoints.delete(name);
  }

  /** Names, in the order in which they were added, and what they are. */
  endpoints(): { name: string; about: string }[] {
    return [...this.#endpoints].map(([name, endpoint]) => ({
      name,
      about: "kind" in endpoint ? `auto: ${endpoint.endpoints.join(", ")}` : endpoint.describe(),
    }));
  }

  /** The model's next turn in a conversation. */
  chat(messages: Message[], options: Options = {}): Answer {
    return this.#ask({ input: { messages }, options });
  }

  /** How a text goes on. */
  complete(prompt: string, options: Options = {}): Answer {
    return this.#ask({ input: { prompt }, options });
  }

  #ask(request: Request): Answer {
    const name = request.options.endpoint ?? this.#endpoints.keys().next().value;
    if (name === undefined) throw new WeirError("invalid", "no endpoint was added yet");
    let answering = name;
    const pieces = this.#pieces(name, request, (endpoint) => (answering = endpoint));
    return new Answer(pieces, () => answering);
  }

  async *#pieces(name: string, request: Request, answering: (name: string) => void): AsyncGenerator<Piece> {
    const endpoint = this.#endpoints.get(name);
    if (!endpoint) throw new WeirError("invalid", `there is no endpoint ${name}`);
    if (!("kind" in endpoint)) {
      answering(name);
      yield* endpoint.answer(request);
      return;
    }
    const first = endpoint.rule?.(request);
    const rest = endpoint.endpoints.filter((other) => other !== first);
    const order = first === undefined ? rest : [first, ...rest];
    for (const [i, other] of order.entries()) {
      let begun = false;
      try {
        for await (const piece of this.#pieces(other, request, answering)) {
          begun = true;
          yield piece;
        }
        return;
      } catch (error) {
        // What has been said can't be taken back, and what is wrong with the request is wrong everywhere.
        const final = error instanceof WeirError && (error.kind === "cancelled" || error.kind === "invalid");
        if (begun || final || i + 1 === order.length) throw error;
      }
    }
    throw new WeirError("invalid", `the endpoint ${name} has no endpoints to choose from`);
  }
}

async function open(spec: EndpointSpec): Promise<Endpoint | AutoSpec> {
  switch (spec.kind) {
    case "local":
      return Local.load(spec);
    case "cluster":
    case "provider":
      return new Remote(spec);
    case "auto":
      return spec;
  }
}
