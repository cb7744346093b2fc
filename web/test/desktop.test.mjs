/** The desktop examples: Tauri's answers in a window of its own, Electron's type-checks (its program is no npm package). */
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { existsSync, mkdtempSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { colours, screen } from "./display.mjs";
import { missing, serve as gateway } from "./gateway.mjs";

const MODEL = join(process.env.WEIR_TEST_MODELS ?? "", "smollm2.gguf");
const skip = existsSync(MODEL) ? false : "smollm2.gguf isn't there; set WEIR_TEST_MODELS to the folder that has it";
if (skip && process.env.CI) throw new Error(skip);
const example = (name) => fileURLToPath(new URL(`../examples/${name}`, import.meta.url));
const TAURI = example("tauri");
const PICTURES = fileURLToPath(new URL("../../target/screenshots", import.meta.url));

/** Runs the program on a screen of its own, and waits for its answer. */
async function answer(words, picture) {
  const home = mkdtempSync(join(tmpdir(), "weir-tauri-"));
  const { display, shoot, close } = await screen();
  const env = { ...process.env, DISPLAY: display, HOME: home, XDG_DATA_HOME: home, XDG_CACHE_HOME: home, GDK_BACKEND: "x11" };
  const child = spawn(join(TAURI, "target", "debug", "weir-tauri-example"), words, { env, stdio: ["ignore", "pipe", "pipe"] });
  let errors = "";
  child.stderr.on("data", (data) => (errors += data));
  const ended = new Promise((resolve) => child.once("exit", resolve));
  const said = {};
  try {
    for await (const line of createInterface({ input: child.stdout })) {
      const [, kind, text] = /^(\w+): (.*)$/.exec(line) ?? [];
      if (kind) said[kind] = text;
      if (kind === "answer") break;
    }
    assert.ok(said.answer, `it ended without an answer: ${errors}`);
    // What was printed is drawn a moment later; how many colours there are says that something is.
    for (let tries = 0; tries < 100 && colours(shoot()) < 16; tries++) await new Promise((resolve) => setTimeout(resolve, 100));
    await new Promise((resolve) => setTimeout(resolve, 500));
    const seen = shoot();
    mkdirSync(PICTURES, { recursive: true });
    writeFileSync(join(PICTURES, picture), seen.file);
    assert.ok(colours(seen) >= 16, "the window shows nothing");
    return said;
  } finally {
    child.kill();
    await ended;
    await close();
    rmSync(home, { recursive: true, force: true });
  }
}

test("the Tauri example builds, and answers with a file of this machine", { skip, timeout: 1800e3 }, async () => {
  execFileSync("cargo", ["build", "--quiet", "--locked"], { cwd: TAURI, stdio: ["ignore", "ignore", "inherit"] });
  const said = await answer(["--model", MODEL, "--ask", "Why is the sky blue?"], "tauri-file.png");
  console.log(`${said.ready}: ${said.answer}`);
  assert.match(said.ready, /WebAssembly/);
  assert.match(said.answer, /light/);
});

test("the same with a model on a cluster", { skip: skip || missing, timeout: 300e3 }, async (t) => {
  const cluster = await gateway(["--model", MODEL], { config: 'allowed_origins = ["tauri://localhost"]\n' });
  t.after(() => cluster.close());
  const said = await answer(["--cluster", cluster.url, "--ask", "Why is the sky blue?"], "tauri-cluster.png");
  assert.match(said.answer, /light/);
});

test("the Electron example type-checks", { timeout: 300e3 }, () => {
  const npm = (...words) => execFileSync("npm", words, { cwd: example("electron"), stdio: ["ignore", "ignore", "inherit"] });
  npm("install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--silent");
  npm("run", "--silent", "check");
});
