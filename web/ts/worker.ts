/** The worker: the engine, and the store of models. */
import type { Model, Node, Scorer } from "./engine.js";
import { withSubgroups } from "./gpu.js";
import type { JoinCall, Membership, OfferCall, Rates } from "./guest.js";
import type { LoadCall, Said } from "./local.js";
import { stay } from "./membership.js";
import { engine, type Wish } from "./module.js";
import { serve } from "./port.js";
import * as store from "./store.js";
import { type FailureKind, type Request, WeirError } from "./types.js";

/** Bytes that are read at once for a digest. */
const READ = 4 << 20;

let subgroups: Promise<boolean> | undefined;
let model: Model | undefined;
let scorer: Scorer | undefined;
let node: Node | undefined;
const leaving = new AbortController();

/** Lets messages in: a message to ourselves comes after those that wait. */
const channel = new MessageChannel();
const breathing: (() => void)[] = [];
channel.port1.onmessage = () => breathing.shift()?.();
const host = {
  breathe: () =>
    new Promise<void>((resolve) => {
      breathing.push(resolve);
      channel.port2.postMessage(0);
    }),
};

const digestBy = (wish: Wish): store.Digest => async (read, size) => {
  const { Digest } = await engine(wish);
  const hash = new Digest();
  const buffer = new Uint8Array(READ);
  for (let at = 0; at < size; at += READ) {
    const some = buffer.subarray(0, Math.min(READ, size - at));
    if (read(at, some) !== some.length) throw new WeirError("damaged", "a file of the store is cut short");
    hash.update(some);
    await host.breathe();
  }
  return hash.finish();
};

/** What is to be loaded, ready to be read; and the engine's options. */
async function prepare(call: LoadCall, tell: store.Tell, offered?: string): Promise<{ parts: store.Part[]; options: string }> {
  const parts: store.Part[] = [];
  const digest = digestBy(call);
  for (const { source, sha256 } of call.parts) {
    if (typeof source === "string" && store.keeps()) {
      await store.fetchAll(source, sha256, digest, tell);
      parts.push(await store.stored(source));
    } else {
      const part = typeof source === "string" ? await store.borrow(source, tell) : store.readable(source);
      if (sha256 !== undefined && (await digest(part.read, part.size)) !== sha256.toLowerCase()) {
        const name = typeof source === "string" ? source : source.name;
        throw new WeirError("damaged", `${name} has another SHA-256 than ${sha256}`);
      }
      parts.push(part);
    }
  }
  subgroups ??= call.device === "cpu" ? Promise.resolve(false) : withSubgroups();
  const { device, context, slots } = call;
  return { parts, options: JSON.stringify({ device, context, slots, subgroups: await subgroups, sha256: offered }) };
}

/** The same parts, which say how far they were read. */
function told(parts: store.Part[], tell: store.Tell): store.Part[] {
  const total = parts.reduce((sum, part) => sum + part.size, 0);
  let done = 0;
  return parts.map((part) => ({
    size: part.size,
    close: part.close,
    read(offset, into) {
      done += into.length;
      tell({ stage: "load", done: Math.min(done, total), total });
      return part.read(offset, into);
    },
  }));
}

const KINDS: Record<string, FailureKind> = { Invalid: "invalid", Busy: "busy", Cancelled: "cancelled" };

function answer({ input, options }: Request, say: (said: Said) => void, id: number): Promise<void> {
  const loaded = model;
  if (!loaded) throw new WeirError("failed", "no model is loaded");
  const prompt = "messages" in input ? loaded.prompt(JSON.stringify(input.messages), undefined) : loaded.tokens(input.prompt);
  return new Promise((resolve, reject) => {
    const tell = (kind: string, text: string, detail: string) => {
      if (kind === "token") say({ text });
      else if (kind === "end") {
        say({ end: { ...(JSON.parse(detail) as Extract<Said, { end: unknown }>["end"]), text } });
        resolve();
      } else reject(new WeirError(KINDS[detail] ?? "failed", text));
    };
    try {
      loaded.generate(id, prompt, JSON.stringify(options), tell);
    } catch (error) {
      throw new WeirError("invalid", error instanceof Error ? error.message : String(error));
    }
  });
}

/** Loads a model, finds out how fast it is here, and offers it to the cluster that was joined. */
async function offer({ load, name, bearer }: OfferCall, tell: store.Tell): Promise<unknown> {
  if (bearer) store.authorise(bearer.origin, bearer.secret);
  const { parts, options } = await prepare(load, tell, load.parts[0]?.sha256);
  const { Model } = await engine(load);
  model = await Model.load(told(parts, tell), options, host as never);
  if (!node) throw new WeirError("failed", "no cluster was joined");
  const rates = JSON.parse(await node.hold(model, name)) as Rates;
  return { about: JSON.parse(model.about()) as unknown, rates };
}

async function join(call: JoinCall, tell: (state: Membership) => void): Promise<void> {
  const { Node } = await engine(call.wish);
  node = new Node(call.name, call.device, call.memory);
  return stay(node, call, tell, leaving.signal);
}

serve(async (name, argument: never, event, id) => {
  const tell = event as store.Tell;
  switch (name) {
    case "load": {
      const { parts, options } = await prepare(argument, tell);
      const { Model } = await engine(argument);
      model = await Model.load(told(parts, tell), options, host as never);
      return JSON.parse(model.about()) as unknown;
    }
    case "answer":
      return answer(argument, event as (said: Said) => void, id);
    case "cancel":
      return model?.cancel(argument);
    case "trouble":
      return model?.trouble();
    case "fail":
      // For tests: as if the device were lost.
      return model?.fail(argument);
    case "join":
      return join(argument, event as (state: Membership) => void);
    case "offer":
      return offer(argument, tell);
    case "figures":
      return node && (JSON.parse(node.figures()) as unknown);
    case "drain":
      return node?.drain(argument);
    case "leave":
      node?.drain(true);
      leaving.abort();
      return node?.close(argument);
    case "score": {
      // For comparisons: the logits of a text, a piece at a time.
      const { load, ids } = argument as { load?: LoadCall; ids: number[] };
      if (load) {
        const { parts, options } = await prepare(load, tell);
        const { Scorer } = await engine(load);
        scorer = await Scorer.load(parts, options);
      }
      return scorer && { about: scorer.about(), logits: await scorer.logits(Uint32Array.from(ids)) };
    }
    case "authorise": {
      const { origin, secret } = argument as { origin: string; secret: string };
      return store.authorise(origin, secret);
    }
    case "fetch": {
      const { url, sha256 } = argument as { url: string; sha256?: string };
      return store.fetchAll(url, sha256, digestBy({ threads: 1 }), tell);
    }
    case "repair":
      return store.repair((argument as { url: string }).url, tell);
    case "list":
      return store.list();
    case "remove":
      return store.remove((argument as { url: string }).url);
    default:
      throw new WeirError("invalid", `the worker has no ${name}`);
  }
});
