/** A running `weir serve`, as pages and clients meet it. */
import { execFileSync, spawn } from "node:child_process";
import { createSocket } from "node:dgram";
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

export const PROGRAM = process.env.WEIR_TEST_PROGRAM ?? "";
export const MODEL = join(process.env.WEIR_TEST_MODELS ?? "", "smollm2.gguf");
export const missing = !existsSync(MODEL)
  ? "smollm2.gguf isn't there; set WEIR_TEST_MODELS to the folder that has it"
  : !existsSync(PROGRAM) && "weir isn't there; set WEIR_TEST_PROGRAM to it";
if (missing && process.env.CI) throw new Error(missing);

const port = (open) => new Promise((resolve) => open((address, close) => close(() => resolve(address.port))));
const tcp = () => port((done) => { const s = createServer().listen(0, "127.0.0.1", () => done(s.address(), (f) => s.close(f))); });
const udp = () => port((done) => { const s = createSocket("udp4").bind(0, "127.0.0.1", () => done(s.address(), (f) => s.close(f))); });

/** `flags` go to `weir serve`; `at` is where it listens, for HTTP and for nodes. */
export async function serve(flags, { at = "127.0.0.1", environment = {}, config = "" } = {}) {
  const folder = mkdtempSync(join(tmpdir(), "weir-web-"));
  const [http, nodes] = [await tcp(), await udp()];
  const clean = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith("WEIR_")));
  const env = { ...clean, XDG_CONFIG_HOME: folder, WEIR_CACHE: join(folder, "cache"), ...environment };
  mkdirSync(join(folder, "weir"));
  writeFileSync(join(folder, "weir", "weir.toml"), config);
  const state = join(folder, "state");
  const run = (...words) => execFileSync(PROGRAM, [...words, "--state", state], { env, encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] }).trim();
  const listen = ["--http", `${at}:${http}`, "--listen", `${at}:${nodes}`, "--state", state, "--no-lan"];
  const child = spawn(PROGRAM, ["serve", ...listen, ...flags], { env, stdio: ["ignore", "pipe", "pipe"] });
  let errors = "";
  child.stderr.on("data", (data) => (errors += data));
  await new Promise((resolve, reject) => {
    child.stdout.once("data", resolve);
    child.once("exit", (code) => reject(new Error(`weir serve ended with ${code}: ${errors}`)));
  });
  const close = () => new Promise((resolve) => {
    child.once("exit", () => (rmSync(folder, { recursive: true, force: true }), resolve()));
    child.kill("SIGTERM");
    setTimeout(() => child.kill("SIGKILL"), 8000).unref();
  });
  return { http, nodes, state, url: `http://127.0.0.1:${http}`, run, close, errors: () => errors };
}

/** An answer, piece by piece; `each` is told how many pieces have come. */
export async function chat(url, body, each = () => {}) {
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: "smollm2", temperature: 0, stream: true, stream_options: { include_usage: true }, ...body }),
  });
  if (!response.ok) return { status: response.status, error: (await response.json()).error };
  let [text, pieces, rest, weir, reason, usage] = ["", 0, ""];
  for await (const chunk of response.body.pipeThrough(new TextDecoderStream())) {
    const events = (rest + chunk).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const message = JSON.parse(data);
      if (message.error) return { status: 200, error: message.error, text };
      weir = message.weir ?? weir;
      usage = message.usage ?? usage;
      const choice = message.choices?.[0];
      reason = choice?.finish_reason ?? reason;
      if (!choice?.delta?.content) continue;
      text += choice.delta.content;
      await each(++pieces);
    }
  }
  return { status: 200, text, weir, usage, reason };
}

export async function until(what, true_, { ms = 60_000 } = {}) {
  const end = Date.now() + ms;
  for (;;) {
    const value = await true_();
    if (value) return value;
    if (Date.now() > end) throw new Error(`after ${ms} ms still not: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}
