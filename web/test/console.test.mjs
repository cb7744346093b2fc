/** The gateway's pages, in Chromium, served by the real program. */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { launch } from "./browser.mjs";
import { chat, missing, MODEL, serve, until } from "./gateway.mjs";

const skip = missing;

let gateway;
let browser;
let profile;
before(async () => {
  if (skip) return;
  gateway = await serve(["--model", "null:step_us=20000", "--share", MODEL]);
  profile = mkdtempSync(join(tmpdir(), "weir-profile-"));
  browser = await launch({ profile });
});
after(async () => {
  await browser?.close();
  await gateway?.close();
  if (profile) rmSync(profile, { recursive: true, force: true });
});

async function open(path) {
  const page = await browser.newPage();
  page.on("pageerror", (error) => console.error(`browser: ${error}`));
  page.on("console", (message) => message.type() === "error" && console.error(`browser: ${message.text()}`));
  await page.goto(`${gateway.url}${path}`);
  return page;
}

async function say(page, words) {
  const before = await page.locator(".said .assistant").count();
  await page.fill("#text", words);
  await page.press("#text", "Enter");
  const line = page.locator(".said .assistant").nth(before);
  await until("an answer came", async () => (await line.getAttribute("aria-busy")) === "false", { ms: 120_000 });
  return line.textContent();
}

test("the cluster page shows what runs where", { skip, timeout: 120e3 }, async (t) => {
  const page = await open("/cluster");
  t.after(() => page.close());
  await page.locator("#list h3", { hasText: "local" }).waitFor();
  const running = chat(gateway.url, { model: "null", messages: [{ role: "user", content: "Hi" }], max_tokens: 200 });
  await until("its slots are seen to be busy", async () => (await page.locator(".slots .busy").count()) > 0);
  await until("tokens are counted", async () => Number(await page.textContent("#rate")) > 5);
  assert.equal(await page.textContent("#running"), "1");
  await running;
});

test("chat runs in the browser, and without a network after the first load", { skip, timeout: 300e3 }, async (t) => {
  const page = await open("/");
  t.after(() => page.close());
  await page.selectOption("#model", { label: "smollm2 (99 MB)" });
  await page.selectOption("#device", "cpu");
  await page.click("#start");
  await page.locator("#text:enabled").waitFor({ timeout: 120_000 });
  const first = await say(page, "Say hello.");
  assert.ok(first.length > 2, first);
  assert.match(await page.textContent("#figures"), /First token after \d+ ms, then [\d.]+ tokens a second/);
  // The same model on the cluster, by another choice and nothing else.
  await page.click("#summary");
  await page.selectOption("#where", "cluster");
  await page.selectOption("#model", "null");
  await page.click("#start");
  await page.locator("#summary", { hasText: "on the cluster" }).waitFor();
  const there = say(page, "Say hello.");
  await page.locator("#stop").click();
  await there;

  await page.evaluate(async () => (await navigator.serviceWorker.ready).active.state);
  await browser.setOffline(true);
  t.after(() => browser.setOffline(false));
  await page.reload();
  await page.locator("#text:enabled").waitFor({ timeout: 60_000 });
  assert.ok((await say(page, "Say hello.")).length > 2);
  for (const path of ["/cluster", "/bench", "/join"]) {
    await page.goto(`${gateway.url}${path}`);
    assert.ok((await page.textContent("h1")).length > 3, path);
  }
});

test("the benchmark measures", { skip, timeout: 600e3 }, async (t) => {
  const page = await open("/bench");
  t.after(() => page.close());
  assert.ok(await page.evaluate(() => crossOriginIsolated));
  await page.selectOption("#model", { index: 0 });
  await page.fill("#output", "8");
  await page.fill("#runs", "1");
  for (const name of ["Weir", "Weir, GPU"]) await page.locator(`#engines input[value="${name}"]`).uncheck();
  await page.click("#measure");
  await until("it is done", async () => /Medians of/.test(await page.textContent("#state")), { ms: 300_000 });
  const rows = await page.locator("#table tbody tr").allTextContents();
  console.log(rows.join("\n"), "\n", await page.textContent("#state"));
  assert.ok(rows.some((row) => row.startsWith("Weir, processor")));
  const report = await page.evaluate(async () => (await fetch(document.getElementById("json").href)).json());
  assert.ok(report.results[0].tokens_per_s > 1 && report.runs === 1);
  assert.ok(report.results.some(({ engine }) => engine === "wllama"), "wllama is a peer of this build");
});

test("a lost device is reported, and the next question answered", { skip, timeout: 180e3 }, async (t) => {
  const page = await open("/cluster");
  t.after(() => page.close());
  const result = await page.evaluate(async () => {
    const { Weir } = await import("/dist/index.js");
    const workers = [];
    const Original = Worker;
    globalThis.Worker = class extends Original {
      constructor(...words) {
        super(...words);
        workers.push(this);
      }
    };
    const { files } = await (await fetch("/weir/v1/files")).json();
    const weir = new Weir();
    const lost = [];
    const model = `/weir/v1/files/${files[0].sha256}`;
    await weir.add("edge", { kind: "local", model, device: "cpu", context: 512, onLost: (why) => lost.push(why) });
    let pieces = 0;
    const failed = await (async () => {
      for await (const _ of weir.complete("One, two,", { maxTokens: 300, ignoreEos: true })) {
        if (++pieces === 3) workers.at(-1).postMessage({ id: 1e6, name: "fail", with: "the GPU was reset" });
      }
    })().catch((error) => error.message);
    const next = await weir.complete("The capital of France is", { maxTokens: 4 }).text();
    weir.remove("edge");
    return { lost, failed, next, workers: workers.length };
  });
  assert.deepEqual(result.lost, ["the GPU was reset"]);
  assert.match(result.failed, /the GPU was reset/);
  assert.match(result.next, /Paris/);
  assert.equal(result.workers, 2);
});

test("pages can be used by the keyboard, and name what they show", { skip, timeout: 120e3 }, async () => {
  for (const path of ["/", "/cluster", "/bench", "/join"]) {
    const page = await open(path);
    const unnamed = await page.evaluate(() => {
      const controls = document.querySelectorAll("input, select, textarea, button, progress, svg[role=img]");
      const named = (control) => control.labels?.length > 0 || control.textContent.trim() || control.ariaLabel || control.getAttribute("aria-labelledby");
      return [...controls].filter((control) => !named(control)).map((control) => control.outerHTML);
    });
    assert.deepEqual(unnamed, [], path);
    assert.equal(await page.locator("h1").count(), 1, path);
    await page.keyboard.press("Tab");
    assert.equal(await page.evaluate(() => document.activeElement.className), "skip", path);
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    assert.ok(wide <= 0, `${path} is ${wide} pixels too wide`);
    await page.setViewportSize({ width: 360, height: 740 });
    const narrow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    assert.ok(narrow <= 0, `${path} is ${narrow} pixels wider than a phone`);
    await page.close();
  }
});
