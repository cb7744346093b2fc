/** The worker's part of a tab that is a node: it stays in the cluster, whatever happens to the connection. */
import type { Node } from "./engine.js";
import type { JoinCall, Membership } from "./guest.js";
import { identity } from "./keys.js";
import { WeirError } from "./types.js";

/** Between two tries, first and at most; and while a person is asked. */
const PAUSE_MS = 500;
const PAUSE_MAX_MS = 30_000;
const ASKING_MS = 2_000;
/** What a later try may change. */
const PASSING = new Set(["full", "other"]);

/** Where a scheduler is, and the certificate that it shows there. */
interface Place {
  urls: string[];
  certificate_sha256: string;
}

const CODE = /\b[2-9A-Z]{4}-[2-9A-Z]{4}\b/;

/** Joins, and joins again when the connection is lost, until `stop` or a refusal that stays. */
export async function stay(node: Node, call: JoinCall, tell: (state: Membership) => void, stop: AbortSignal): Promise<void> {
  const { key, sign } = await identity();
  let pause = PAUSE_MS;
  let turn = 0;
  while (!stop.aborted) {
    tell({ state: "connecting" });
    let lost: string;
    try {
      const place = await find(call.gateway);
      const urls = addresses(place, call.gateway);
      const url = urls[turn++ % urls.length]!;
      const welcome = () => {
        pause = PAUSE_MS;
        turn -= 1;
        tell({ state: "in" });
      };
      const ended = await node.serve(url, bytes(place.certificate_sha256), key, sign, call.token, welcome);
      const { message, refused } = JSON.parse(ended) as { message: string; refused: string | null };
      if (refused === "confirm") {
        turn -= 1;
        tell({ state: "asking", code: CODE.exec(message)?.[0] ?? "", message });
        await sleep(ASKING_MS, stop);
        continue;
      }
      if (refused !== null && !PASSING.has(refused)) return tell({ state: "refused", message });
      lost = message;
    } catch (error) {
      lost = error instanceof Error ? error.message : String(error);
    }
    if (stop.aborted) break;
    tell({ state: "lost", message: lost });
    await sleep(pause, stop);
    pause = Math.min(2 * pause, PAUSE_MAX_MS);
  }
  tell({ state: "left" });
}

/** The gateway's word for where the scheduler is; the hash may be another tomorrow. */
async function find(gateway: string): Promise<Place> {
  const response = await fetch(new URL("/weir/v1/webtransport", gateway), { cache: "no-store" });
  const answer = (await response.json().catch(() => ({}))) as Partial<Place> & { error?: { message?: string } };
  if (!response.ok || !answer.urls || !answer.certificate_sha256) {
    throw new WeirError("unreachable", answer.error?.message ?? `${gateway}: HTTP ${response.status}`);
  }
  return { urls: answer.urls, certificate_sha256: answer.certificate_sha256 };
}

/** The way by which the page came is the likeliest; then those that the scheduler knows of itself. */
function addresses({ urls }: Place, gateway: string): string[] {
  const own = urls.map((url) => {
    const address = new URL(url);
    address.hostname = new URL(gateway).hostname;
    return address.href;
  });
  return [...new Set([...own, ...urls])];
}

function bytes(hex: string): Uint8Array {
  return Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

function sleep(ms: number, stop: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const over = () => (clearTimeout(timer), resolve());
    const timer = setTimeout(over, ms);
    stop.addEventListener("abort", over, { once: true });
  });
}
