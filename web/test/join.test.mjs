/** Tabs as nodes, in Chromium, against the real program. */
import assert from "node:assert/strict";
import { createHash, X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { launch } from "./browser.mjs";
import { chat, missing, MODEL, serve, until } from "./gateway.mjs";

const skip = missing;
const STORY = [{ role: "user", content: "Tell me a long story about a river." }];

let gateway;
let browser;
before(async () => {
  if (skip) return;
  gateway = await serve(["--no-node", "--share", MODEL]);
  browser = await launch();
});
after(async () => {
  await browser?.close();
  await gateway?.close();
});

const token = () => gateway.run("link", "--guest", "--uses", "1").split("/").pop();

/** A tab that has joined and offers the model. */
async function tab(context, url, invitation, name) {
  const page = await context.newPage();
  page.on("pageerror", (error) => console.error(`browser: ${error}`));
  await page.goto(`${url}/join#${invitation}`);
  await page.fill("#name", name);
  await page.locator("#start:enabled").click();
  await working(page);
  // The scheduler fetches the model's tokenizer from the first tab that has it.
  if (url === gateway.url) await until(`${name} is connected`, async () => (await connected()).some((node) => node.name === name && node.models.length > 0));
  return page;
}

const working = (page) => page.locator("#state", { hasText: /^In the cluster$/ }).waitFor({ timeout: 120_000 });
const tokens = async (page) => Number((await page.textContent("#tokens")).replaceAll(",", ""));
const nodes = async () => (await (await fetch(`${gateway.url}/weir/v1/nodes`)).json()).nodes;
const connected = async () => (await nodes()).filter(({ state }) => state === "connected");

test("a tab joins, gets a request and streams it back", { skip, timeout: 240e3 }, async (t) => {
  const page = await tab(browser, gateway.url, token(), "one");
  t.after(() => page.close());
  const [node] = await connected();
  assert.deepEqual([node.name, node.guest, node.models[0].name], ["one", true, "smollm2"]);
  assert.ok(node.models[0].token_ms > 0.5, "its rates were measured");
  const answer = await chat(gateway.url, { messages: [{ role: "user", content: "Why is the sky blue?" }], max_tokens: 32 });
  assert.equal(answer.status, 200, JSON.stringify(answer.error));
  assert.equal(answer.usage.completion_tokens, 32);
  console.log(`from a tab: ${JSON.stringify(answer.text.slice(0, 80))}, ${JSON.stringify(answer.weir)}`);
  await until("the page says what it made", async () => (await tokens(page)) >= 32);

  // A reader who leaves ends it in the tab, too.
  const stop = new AbortController();
  const left = fetch(`${gateway.url}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: "smollm2", messages: STORY, max_tokens: 2000, stream: true }),
    signal: stop.signal,
  });
  const reader = (await left).body.getReader();
  await reader.read();
  stop.abort();
  await until("nothing runs there", async () => (await page.textContent("#running")) === "0" && (await connected())[0].models[0].running === 0);

  // A private request never reaches it.
  const made = (await connected())[0].models[0].tokens;
  const refused = await Promise.race([
    chat(gateway.url, { messages: STORY, max_tokens: 4, weir: { tags: { private: "yes" } } }),
    new Promise((resolve) => setTimeout(() => resolve({ status: "waits" }), 5_000)),
  ]);
  assert.ok(refused.status !== 200 || refused.error, `it was answered: ${JSON.stringify(refused)}`);
  assert.equal((await connected())[0].models[0].tokens, made);
});

test("paused it gets nothing, and leaving it drains", { skip, timeout: 240e3 }, async (t) => {
  const page = await tab(browser, gateway.url, token(), "resting");
  t.after(() => page.close());
  await page.click("#pause");
  await page.locator("#state", { hasText: "Paused" }).waitFor();
  await until("the scheduler knows", async () => (await nodes()).some(({ name, state }) => name === "resting" && state === "draining"));
  await page.click("#pause");
  await working(page);
  await until("it is used again", async () => (await connected()).some(({ name }) => name === "resting"));
  const answer = chat(gateway.url, { messages: STORY, max_tokens: 40, ignore_eos: true });
  await until("it runs", async () => (await connected()).some(({ models }) => models[0]?.running > 0));
  await page.click("#leave");
  await page.locator("#state", { hasText: "Not in the cluster" }).waitFor({ timeout: 60_000 });
  assert.equal((await answer).usage.completion_tokens, 40, "what ran was finished");
  await until("it is away", async () => (await nodes()).some(({ name, state }) => name === "resting" && state === "away"));
});

test("two tabs share load, and a stream survives the one that it runs on", { skip, timeout: 480e3 }, async (t) => {
  const pages = {};
  for (const name of ["left", "right"]) pages[name] = await tab(browser, gateway.url, token(), name);
  t.after(() => Promise.all(Object.values(pages).map((page) => page.close())));
  assert.equal((await connected()).length, 2);
  const ask = (i) => chat(gateway.url, { messages: [{ role: "user", content: `Count from ${i}.` }], max_tokens: 24, ignore_eos: true });
  const answers = await Promise.all([1, 2, 3, 4].map(ask));
  for (const answer of answers) assert.equal(answer.usage?.completion_tokens, 24, JSON.stringify(answer));
  for (const node of await connected()) assert.ok(node.models[0].tokens >= 24, `${node.name} did nothing`);

  const body = { messages: STORY, max_tokens: 120, ignore_eos: true };
  const undisturbed = await chat(gateway.url, body);
  assert.equal(undisturbed.usage.completion_tokens, 120);
  let killed;
  const survivor = await chat(gateway.url, body, async (pieces) => {
    if (pieces !== 10) return;
    killed = (await connected()).find(({ models }) => models[0].running > 0).name;
    await pages[killed].close();
  });
  assert.ok(killed, "it ran nowhere");
  console.log(`${killed} was closed in the middle: ${JSON.stringify(survivor.weir)}`);
  assert.equal(survivor.status, 200, JSON.stringify(survivor.error));
  assert.equal(survivor.usage?.completion_tokens, 120, JSON.stringify(survivor));
  assert.equal(survivor.text, undisturbed.text, "the same arithmetic: the same text");
});

test("without a link the owner lets it in by a code", { skip, timeout: 240e3 }, async (t) => {
  const page = await browser.newPage();
  t.after(() => page.close());
  await page.goto(`${gateway.url}/join`);
  await page.fill("#name", "stranger");
  // The keys of tabs that were let in before are known; this one is of a browser of its own.
  const other = await browser.browser().newContext();
  t.after(() => other.close());
  const fresh = await other.newPage();
  await fresh.goto(`${gateway.url}/join`);
  await fresh.fill("#name", "stranger");
  await fresh.locator("#start:enabled").click();
  await fresh.locator("#asking").waitFor({ timeout: 60_000 });
  const code = await fresh.textContent("#code");
  assert.match(code, /^[2-9A-Z]{4}-[2-9A-Z]{4}$/);
  gateway.run("admit", code);
  await working(fresh);
  assert.ok((await connected()).some(({ name, guest }) => name === "stranger" && guest));
});

test("by a name that isn't loopback's, with the gateway's TLS; and without it the page says what to do", { skip, timeout: 480e3 }, async (t) => {
  const about = { at: "0.0.0.0", environment: { WEIR_API_KEY: "secret" }, config: 'allowed_hosts = ["weir.lan"]' };
  const far = await serve(["--no-node", "--share", MODEL], about);
  t.after(() => far.close());
  // What `weir trust` installs: trusted here by the key of the certificate that it vouches for.
  const { connect } = await import("node:tls");
  const certificate = await new Promise((resolve, reject) => {
    const socket = connect({ host: "127.0.0.1", port: far.http, servername: "weir.lan", ca: readFileSync(join(far.state, "authority.pem")) }, () => {
      resolve(socket.getPeerCertificate(true).raw);
      socket.end();
    });
    socket.on("error", reject);
  });
  const spki = new X509Certificate(certificate).publicKey.export({ type: "spki", format: "der" });
  const pin = createHash("sha256").update(spki).digest("base64");
  const flags = [`--ignore-certificate-errors-spki-list=${pin}`, "--host-resolver-rules=MAP weir.lan 127.0.0.1"];
  const named = await launch({ flags });
  t.after(() => named.close());
  const invitation = far.run("link", "--guest").split("/").pop();
  const page = await tab(named, `https://weir.lan:${far.http}`, invitation, "far");
  const answer = await page.evaluate(async () => {
    const body = { model: "smollm2", messages: [{ role: "user", content: "Hi" }], max_tokens: 5 };
    const headers = { authorization: "Bearer secret", "content-type": "application/json" };
    for (let tries = 0; ; tries++) {
      const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body) });
      // The scheduler is still fetching the model's tokenizer from the tab.
      if (response.status !== 404 || tries > 100) return response.json();
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
  });
  assert.ok(answer.choices?.[0]?.message?.content, JSON.stringify(answer));
  console.log(`by another name: ${JSON.stringify(answer.weir)}`);

  const open = await serve(["--no-node", "--share", MODEL, "--insecure-http"], about);
  t.after(() => open.close());
  const plain = await named.newPage();
  await plain.goto(`http://weir.lan:${open.http}/join`);
  assert.match(await plain.textContent("#blocked"), /not opened in a secure way[^]*weir trust/);
  assert.ok(await plain.locator("#start").isDisabled());
});
