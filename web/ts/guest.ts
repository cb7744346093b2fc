/** This tab as a node of a cluster: it computes for others with a model of its own. */
import type { About, LoadCall } from "./local.js";
import type { Wish } from "./module.js";
import { Port } from "./port.js";
import { type Progress, WeirError } from "./types.js";

/** How it stands between a tab and a cluster. */
export type Membership =
  | { state: "connecting" | "in" | "left" }
  /** The owner of the scheduler has to let it in, by this code. */
  | { state: "asking"; code: string; message: string }
  /** It tries again by itself. */
  | { state: "lost"; message: string }
  /** Trying again is no use. */
  | { state: "refused"; message: string };

/** What a tab offers, and to whom. */
export interface GuestSpec {
  /** The gateway's origin; this page's own where not told. */
  gateway?: string;
  /** A model file of the cluster. */
  model: { url: string; name: string; sha256: string };
  /** What people call this node. */
  name?: string;
  /** From a join link; without one the scheduler's owner is asked, by a code. */
  token?: string;
  /** For fetching the model from the gateway, where that needs one. */
  key?: string;
  device?: "auto" | "gpu" | "cpu";
  /** Requests at once. */
  slots?: number;
  context?: number;
  onState?: (membership: Membership) => void;
  onProgress?: (progress: Progress) => void;
}

/** How a node is doing. */
export interface Figures {
  /** Requests at work here, and those that wait for a slot. */
  running: number;
  queued: number;
  /** Made for others so far. */
  tokens: number;
  /** Why the engine can't go on, if it can't. */
  trouble: string | null;
}

/** What was measured when the model was loaded. */
export interface Rates {
  prefill_tokens_per_s: number;
  token_ms: number;
}

export type JoinCall = { wish: Wish; gateway: string; name: string; device: string; memory: number; token?: string };
export type OfferCall = { load: LoadCall; name: string; bearer?: { origin: string; secret: string } };
export type Offered = { about: About; rates: Rates };

/** Gives the engine up so late that nobody waits for more. */
const LEAVING_MS = 20_000;

export class Guest {
  readonly #spec: GuestSpec;
  readonly #port = new Port();
  #paused = false;
  #offered: Offered | undefined;
  #state: Membership = { state: "connecting" };
  /** Resolves when it has left, or was refused. */
  readonly ended: Promise<void>;

  private constructor(spec: GuestSpec) {
    this.#spec = spec;
    const gateway = spec.gateway ?? location.origin;
    const memory = ((navigator as { deviceMemory?: number }).deviceMemory ?? 4) * 2 ** 29;
    const call: JoinCall = { wish: { device: spec.device ?? "auto" }, gateway, name: spec.name ?? "tab", device: browser(), memory };
    if (spec.token !== undefined) call.token = spec.token;
    const tell = (event: unknown) => {
      this.#state = event as Membership;
      spec.onState?.(this.#state);
    };
    this.ended = this.#port.call("join", call, tell).result.then(
      () => undefined,
      (error: unknown) => {
        // Closed by us, or it could not even begin.
        if (this.#state.state === "connecting") tell({ state: "refused", message: error instanceof Error ? error.message : String(error) });
      },
    );
  }

  /** Joins; resolves once it has a model to offer. */
  static async join(spec: GuestSpec): Promise<Guest> {
    const missing = whyNot();
    if (missing) throw new WeirError("failed", missing);
    const guest = new Guest(spec);
    try {
      await Promise.race([guest.#offer(), guest.ended.then(() => guest.#refused())]);
      return guest;
    } catch (error) {
      guest.#port.close();
      throw error;
    }
  }

  async #offer(): Promise<void> {
    const { model, device = "auto", slots = 2, context, token, key } = this.#spec;
    const url = new URL(model.url, location.href);
    const load: LoadCall = { parts: [{ source: url.href, sha256: model.sha256 }], device, slots, ...(context === undefined ? {} : { context }) };
    const call: OfferCall = { load, name: model.name };
    const secret = key ?? token;
    if (secret !== undefined) call.bearer = { origin: url.origin, secret };
    const result = this.#port.call("offer", call, (event) => this.#spec.onProgress?.(event as Progress)).result;
    this.#offered = (await result) as Offered;
  }

  #refused(): never {
    throw new WeirError("failed", "message" in this.#state ? this.#state.message : "the cluster was left");
  }

  get state(): Membership {
    return this.#state;
  }

  /** What computes, and how fast it was found to be. */
  get offered(): Offered | undefined {
    return this.#offered;
  }

  get paused(): boolean {
    return this.#paused;
  }

  async figures(): Promise<Figures> {
    return (await this.#port.call("figures", undefined).result) as Figures;
  }

  /** Takes nothing new, and lets others finish what they can; or takes work again. */
  async pause(on: boolean): Promise<void> {
    this.#paused = on;
    await this.#port.call("drain", on).result;
  }

  /** Finishes what runs here and leaves. */
  async leave(): Promise<void> {
    await this.pause(true);
    const end = Date.now() + LEAVING_MS;
    // The scheduler moves what it can; what it can't is finished here.
    do await new Promise((resolve) => setTimeout(resolve, 300));
    while ((await this.figures()).running > 0 && Date.now() < end);
    await this.#port.call("leave", "the tab has left").result;
    this.#port.close();
  }

  /** Leaves at once: what runs here goes on elsewhere. For a page that is being closed. */
  cut(): void {
    const left = this.#port.call("leave", "the tab was closed").result;
    void left.catch(() => undefined).finally(() => this.#port.close());
  }
}

/** Why this page can't be a node, if it can't. */
export function whyNot(): string | undefined {
  if (!isSecureContext) {
    return (
      "this page was not opened in a secure way, and browsers let only such pages compute for others: open it by https://, " +
      "or on the scheduler's own machine by http://127.0.0.1 (`weir trust` says how a browser comes to believe the certificate)"
    );
  }
  if (!("WebTransport" in globalThis)) return "this browser has no WebTransport; Chrome, Edge, Firefox and Safari 26.4 have";
  return undefined;
}

/** The browser, for a person. */
function browser(): string {
  const agent = navigator as { userAgentData?: { brands: { brand: string; version: string }[]; platform: string } };
  const known = agent.userAgentData?.brands.find(({ brand }) => !/not.*brand/i.test(brand));
  const name = known ? `${known.brand} ${known.version}` : (/(Firefox|Version|Chrome)\/[\d.]+/.exec(navigator.userAgent)?.[0] ?? "a browser");
  return `${name}, ${navigator.hardwareConcurrency} threads`;
}
