/** The cluster page: who is in it, what runs where, and how fast. */
import { at, ask, element, keep, text, words } from "./page.js";

const HISTORY = 120;
const RETRY_MS = 2000;
const LOG_MAX = 50;

interface Model {
  name: string;
  alive: boolean;
  running: number;
  slots: number;
  tokens: number;
  token_ms: number;
  kv_blocks_free: number;
  kv_blocks: number;
}

interface Member {
  id: string | null;
  name: string;
  guest: boolean;
  state: "connected" | "draining" | "away" | "revoked" | "asking";
  code?: string;
  devices?: string[];
  silent_ms?: number;
  loading?: string[];
  models: Model[];
}

interface Pulse {
  nodes: Member[];
  requests: {
    waiting: { interactive: number; normal: number; background: number };
    running: number;
    tokens: number;
    ttft_ms: { p50: number | null; p99: number | null };
  };
}

const rates: number[] = [];
let before: { tokens: number; at: number } | undefined;
const made = new Map<string, { tokens: number; at: number; rate: number }>();

function ms(time: number | null): string {
  if (time === null) return "–";
  return time < 1000 ? `${time.toFixed(0)} ms` : `${(time / 1000).toFixed(1)} s`;
}

function rate(value: number): string {
  return value >= 100 ? value.toFixed(0) : value.toFixed(1);
}

function pulse({ nodes, requests }: Pulse): void {
  const now = performance.now();
  if (before) rates.push(Math.max(0, ((requests.tokens - before.tokens) * 1e3) / Math.max(1, now - before.at)));
  before = { tokens: requests.tokens, at: now };
  if (rates.length > HISTORY) rates.shift();
  const here = nodes.filter(({ state }) => state === "connected" || state === "draining");
  const { interactive, normal, background } = requests.waiting;
  const absent = nodes.length - here.length;
  text("live", absent > 0 ? `Live; ${absent} more known and not here.` : "Live.");
  text("nodes", `${here.length}`);
  text("rate", rates.length > 0 ? rate(rates.at(-1)!) : "–");
  text("running", `${requests.running}`);
  text("waiting", `${interactive + normal + background}`);
  text("ttft", ms(requests.ttft_ms.p50));
  text("ttft99", ms(requests.ttft_ms.p99));
  plot();
  const order = { connected: 0, draining: 1, asking: 2, away: 3, revoked: 4 };
  const sorted = [...nodes].sort((a, b) => order[a.state] - order[b.state] || a.name.localeCompare(b.name));
  const none = element("li", { className: "soft", textContent: "No node yet." });
  at("list").replaceChildren(...(sorted.length > 0 ? sorted.map((node) => card(node, now)) : [none]));
}

const TONES = { connected: "good", draining: "warn", asking: "warn", away: "", revoked: "bad" };

function card(node: Member, now: number): HTMLLIElement {
  const badges = element("span", {}, element("span", { className: `badge ${TONES[node.state]}`, textContent: node.state }));
  if (node.guest) badges.append(" ", element("span", { className: "badge", textContent: "guest" }));
  const line = element("li", {}, element("h3", {}, element("span", { textContent: node.name }), badges));
  const about = [...(node.devices ?? []), ...(node.id ? [node.id] : [])].join("; ");
  if (about !== "") line.append(element("div", { className: "small soft", textContent: about }));
  if (node.code) line.append(element("p", {}, "Let it in with ", element("code", { textContent: `weir admit ${node.code}` })));
  const list = element("ul");
  for (const model of node.models) {
    const speed = paced(`${node.id ?? node.name}/${model.name}`, model.tokens, now);
    const slots = element("span", { className: "slots", role: "img" });
    slots.ariaLabel = `${model.running} of ${model.slots} slots are busy`;
    for (let i = 0; i < Math.min(model.slots, 32); i++) slots.append(element("i", { className: i < model.running ? "busy" : "" }));
    const figures = `${model.running}/${model.slots} running, ${rate(speed)} tokens/s, ${model.token_ms.toFixed(1)} ms a token, ${Math.round((100 * model.kv_blocks_free) / Math.max(1, model.kv_blocks))}% of the cache free`;
    list.append(element("li", {}, model.name, ...(model.alive ? [] : [" ", element("span", { className: "badge bad", textContent: "out of order" })]), element("div", { className: "small soft", textContent: figures }), slots));
  }
  for (const model of node.loading ?? []) list.append(element("li", { className: "soft", textContent: `loading ${model.slice(0, 10)}` }));
  if (list.childElementCount > 0) line.append(list);
  return line;
}

/** Tokens a second since the last pulse. */
function paced(name: string, tokens: number, now: number): number {
  const last = made.get(name);
  const speed = last && now > last.at ? Math.max(0, ((tokens - last.tokens) * 1e3) / (now - last.at)) : 0;
  made.set(name, { tokens, at: now, rate: speed });
  return speed;
}

function plot(): void {
  const most = Math.max(1, ...rates);
  const step = 600 / (HISTORY - 1);
  const points = rates.map((value, i) => `${((HISTORY - rates.length + i) * step).toFixed(1)},${(86 - (value / most) * 80).toFixed(1)}`);
  const svg = at("plot");
  const draw = (name: string, attributes: Record<string, string>) => {
    const drawn = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) drawn.setAttribute(key, value);
    return drawn;
  };
  if (points.length < 2) return;
  const start = ((HISTORY - rates.length) * step).toFixed(1);
  svg.replaceChildren(
    draw("polygon", { class: "fill", points: `${start},86 ${points.join(" ")} 600,86` }),
    draw("polyline", { class: "stroke", points: points.join(" ") }),
  );
  svg.setAttribute("aria-label", `Tokens a second: now ${rate(rates.at(-1)!)}, at most ${rate(Math.max(...rates))}`);
  text("peak", `At most ${rate(Math.max(...rates))}.`);
}

function note(what: string): void {
  const log = at("log");
  if (log.querySelector(".soft")) log.replaceChildren();
  const time = element("time", { textContent: new Date().toLocaleTimeString() });
  log.prepend(element("li", {}, time, what));
  while (log.childElementCount > LOG_MAX) log.lastElementChild?.remove();
}

function happened(kind: string, data: string): void {
  const event = JSON.parse(data) as Pulse & { name: string; reason?: string; on?: boolean };
  if (kind === "nodes") pulse(event);
  else if (kind === "joined") note(`${event.name} joined`);
  else if (kind === "left") note(`${event.name} left: ${event.reason ?? ""}`);
  else if (kind === "drained") note(event.on ? `${event.name} gets nothing new` : `${event.name} is used again`);
}

/** The gateway's events, for as long as they come. */
async function watch(): Promise<void> {
  const response = await ask("/weir/v1/events");
  if (!response.ok || !response.body) throw new Error(`the server says ${response.status}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server has stopped");
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop() ?? "";
    for (const event of events) {
      const field = (name: string) => event.split("\n").find((line) => line.startsWith(name))?.slice(name.length).trim();
      const [kind, data] = [field("event:"), field("data:")];
      if (kind !== undefined && data !== undefined) happened(kind, data);
    }
  }
}

keep();
for (;;) {
  try {
    await watch();
  } catch (error) {
    before = undefined;
    text("live", `Not connected: ${words(error)}. Trying again.`);
  }
  await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
}
