/** The page that makes this tab a node. */
import { Guest, type Membership, whyNot } from "../guest.js";
import { Away, onMains } from "./limits.js";
import { at, element, keep, key, progress, remembered, shared, type Shared, show, size, text, words } from "./page.js";

const PULSE_MS = 1000;
const REST_MS = 3000;

let guest: Guest | undefined;
let membership: Membership = { state: "connecting" };
let models: Shared[] = [];
let since: number | undefined;
/** Somebody pressed Pause. */
let paused = false;
/** What the limits say against working now. */
let hindrance: string | undefined;
let tokens = { count: 0, at: 0, rate: 0 };

const form = at<HTMLFormElement>("form");
const value = (id: string) => at<HTMLInputElement>(id).value.trim();

/** From a link as `weir link` prints it, or a token alone. */
function token(): string | undefined {
  const link = value("link") || location.hash.slice(1);
  const found = /([0-9a-f]{32})\/?$/i.exec(link);
  return found?.[1];
}

function tone(dot: "" | "good" | "warn" | "bad" | "busy", state: string, detail = ""): void {
  at("dot").dataset["tone"] = dot;
  at("status").dataset["state"] = guest ? membership.state : "out";
  text("state", state);
  text("detail", detail);
}

function draw(): void {
  show("asking", membership.state === "asking");
  const ready = guest?.offered !== undefined;
  show("figures", ready && membership.state === "in");
  switch (membership.state) {
    case "connecting":
      return tone("busy", "Connecting to the scheduler");
    case "asking":
      text("code", membership.code);
      text("admit", `weir admit ${membership.code}`);
      return tone("warn", "Waiting to be let in");
    case "in":
      if (!ready) return tone("busy", "In the cluster, getting its model ready");
      if (paused) return tone("warn", "Paused", "Nothing new comes; what others can't take is finished here.");
      if (hindrance !== undefined) return tone("warn", "Resting", hindrance);
      return tone("good", "In the cluster", "Requests may come at any time.");
    case "lost":
      return tone("warn", "The scheduler can't be reached; trying again", membership.message);
    case "refused":
      return tone("bad", "The scheduler doesn't take this tab", membership.message);
    case "left":
      return tone("", "Not in the cluster any more");
  }
}

async function start(): Promise<void> {
  const model = models.find(({ sha256 }) => sha256 === value("model"));
  if (!model) return;
  for (const id of ["name", "slots", "device"]) localStorage.setItem(`weir-join-${id}`, value(id));
  show("form", false);
  show("status", true);
  show("leave", true);
  membership = { state: "connecting" };
  since = undefined;
  draw();
  const invitation = token();
  const known = key();
  try {
    guest = await Guest.join({
      model,
      name: value("name") || "tab",
      device: value("device") as "auto" | "gpu" | "cpu",
      slots: Number(value("slots")) || 2,
      ...(invitation === undefined ? {} : { token: invitation }),
      ...(known === undefined ? {} : { key: known }),
      onState: (state) => {
        membership = state;
        if (state.state === "in") since ??= Date.now();
        draw();
      },
      onProgress: (event) => {
        const { words, share } = progress(event);
        show("progress", true);
        at<HTMLProgressElement>("progress").value = share;
        text("about", share < 1 ? words : "Finding out how fast it runs here");
      },
    });
    const { about, rates } = guest.offered!;
    text("about", `${model.name} on ${about.description}; measured: ${rates.prefill_tokens_per_s.toFixed(0)} tokens of prompt a second, ${(1e3 / rates.token_ms).toFixed(1)} of output.`);
    await limit();
  } catch (error) {
    guest = undefined;
    show("form", true);
    show("leave", false);
    show("pause", false);
    show("asking", false);
    tone("bad", "This tab is no node", words(error));
    return;
  } finally {
    show("progress", false);
  }
  show("pause", true);
  tokens = { count: 0, at: performance.now(), rate: 0 };
  draw();
}

async function leave(): Promise<void> {
  const leaving = guest;
  if (!leaving) return;
  tone("warn", "Leaving", "What runs here goes to others, or is finished first.");
  guest = undefined;
  await leaving.leave().catch(() => undefined);
  membership = { state: "left" };
  show("leave", false);
  show("pause", false);
  show("form", true);
  text("about", "");
  draw();
  show("figures", false);
}

async function pulse(): Promise<void> {
  const asked = guest;
  if (!asked?.offered) return;
  const figures = await asked.figures();
  if (guest !== asked) return;
  const now = performance.now();
  if (now > tokens.at) tokens.rate = (0.5 * tokens.rate) + (0.5 * Math.max(0, figures.tokens - tokens.count) * 1e3) / (now - tokens.at);
  tokens = { count: figures.tokens, at: now, rate: tokens.rate };
  text("running", `${figures.running}`);
  text("rate", tokens.rate < 0.05 ? "0" : tokens.rate.toFixed(1));
  text("tokens", figures.tokens.toLocaleString("en"));
  if (since !== undefined) text("time", span(Date.now() - since));
  if (figures.trouble !== null) await again(asked, figures.trouble);
}

/** The engine can't go on: its device was lost, most likely. Another one is made. */
async function again(lost: Guest, why: string): Promise<void> {
  guest = undefined;
  lost.cut();
  tone("warn", "The device was lost; loading the model again", why);
  await new Promise((resolve) => setTimeout(resolve, REST_MS));
  await start();
}

function span(ms: number): string {
  const minutes = Math.floor(ms / 60_000);
  if (minutes < 1) return `${Math.floor(ms / 1000)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const away = new Away();
const mains = onMains();

/** Rests or works, as the limits and the button say. */
async function limit(): Promise<void> {
  const wants = (id: string) => at<HTMLInputElement>(id).checked;
  const used = wants("idle") && !away.isAway ? "Somebody uses this machine; it works when they are away." : undefined;
  const battery = wants("power") && !mains.is ? "This machine runs on its battery." : undefined;
  hindrance = used ?? battery;
  const rests = paused || hindrance !== undefined;
  text("pause", paused ? "Go on" : "Pause");
  if (guest?.offered && guest.paused !== rests) await guest.pause(rests);
  draw();
}

function setUp(): void {
  const missing = whyNot();
  if (missing !== undefined) {
    const home = `http://127.0.0.1:${location.port || "8484"}/join`;
    at("blocked").append(
      element("h2", { textContent: "This page can't make the tab a node" }),
      element("p", { textContent: `${missing[0]!.toUpperCase()}${missing.slice(1)}.` }),
      ...(isSecureContext ? [] : [element("p", {}, "On the scheduler's own machine: ", element("code", { textContent: home }), ". Elsewhere: start it with a key and without ", element("code", { textContent: "--insecure-http" }), ", so that it speaks HTTPS, and have this machine trust it: ", element("code", { textContent: "weir trust" }), ".")]),
    );
    show("blocked", true);
    for (const control of form.querySelectorAll<HTMLInputElement>("input, select, button")) control.disabled = true;
    at<HTMLFieldSetElement>("limits").disabled = true;
  }
  for (const id of ["name", "slots", "device"]) {
    const known = localStorage.getItem(`weir-join-${id}`);
    if (known) at<HTMLInputElement>(id).value = known;
  }
  if (value("name") === "") at<HTMLInputElement>("name").value = `tab-${Math.random().toString(36).slice(2, 6)}`;
  if (location.hash.length > 1) at<HTMLInputElement>("link").value = location.hash.slice(1);
  text("power-note", mains.note);
  at<HTMLInputElement>("power").disabled = !mains.known;
  text("idle-note", away.note);
  for (const id of ["idle", "power"]) {
    const box = at<HTMLInputElement>(id);
    box.checked = !box.disabled && localStorage.getItem(`weir-join-${id}`) === "yes";
    box.onchange = async () => {
      localStorage.setItem(`weir-join-${id}`, box.checked ? "yes" : "no");
      if (id === "idle" && box.checked) await away.watch();
      text("idle-note", away.note);
      await limit();
    };
  }
  if (at<HTMLInputElement>("idle").checked) void away.watch();
}

async function list(): Promise<void> {
  const invitation = token();
  const headers = new Headers(invitation === undefined ? [] : [["authorization", `Bearer ${invitation}`]]);
  const invited = await fetch("/weir/v1/files", { headers, cache: "no-store" }).catch(() => undefined);
  if (invited?.ok) {
    const { files } = (await invited.json()) as { files: Omit<Shared, "url">[] };
    models = files.map((file) => ({ ...file, url: new URL(`/weir/v1/files/${file.sha256}`, location.origin).href }));
  } else {
    models = isSecureContext ? await shared() : remembered();
  }
  const select = at<HTMLSelectElement>("model");
  select.replaceChildren(...models.map(({ name, sha256, size: bytes }) => element("option", { value: sha256, textContent: `${name} (${size(bytes)})` })));
  if (models.length === 0) select.append(element("option", { value: "", textContent: "the server shares none (weir serve --share MODEL)" }));
  at<HTMLButtonElement>("start").disabled = models.length === 0 || whyNot() !== undefined;
}

keep();
setUp();
form.onsubmit = (event) => {
  event.preventDefault();
  paused = false;
  void start();
};
at("pause").onclick = () => {
  paused = !paused;
  void limit();
};
at("leave").onclick = () => void leave();
at("link").onchange = () => void list();
addEventListener("pagehide", () => guest?.cut());
away.changed = mains.changed = () => void limit();
setInterval(() => void pulse().catch(() => undefined), PULSE_MS);
void list();
