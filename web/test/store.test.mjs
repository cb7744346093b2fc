/** The store: fetches go on where they were cut, damage is found and mended by piece, what is kept needs no network. */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createHash, randomBytes } from "node:crypto";
import { after, before, test } from "node:test";
import { open } from "./browser.mjs";
import { serve } from "./server.mjs";

const PIECE = 4 << 20;
const SIZE = 5 * PIECE + 12345;
const folder = mkdtempSync(join(tmpdir(), "weir-web-"));
const bytes = randomBytes(SIZE);
const sha256 = createHash("sha256").update(bytes).digest("hex");

let server;
let browser;
before(async () => {
  writeFileSync(join(folder, "file"), bytes);
  server = await serve({ file: join(folder, "file"), other: join(folder, "file") });
  browser = await open(server.url, { gpu: false });
});
after(async () => {
  await browser?.close();
  server?.close();
  rmSync(folder, { recursive: true });
});

/** Calls a method of a fresh store. */
async function store(name, ...values) {
  return browser.page.evaluate(
    async ({ name, values }) => {
      const store = new weir.Store();
      try {
        const result = await store[name](...values);
        return { result };
      } catch (error) {
        return { kind: error.kind, message: error.message };
      } finally {
        store.close();
      }
    },
    { name, values },
  );
}

test("a fetch that was cut goes on where it was", { timeout: 60e3 }, async () => {
  server.faults.after = 0.5 * SIZE;
  const cut = await store("fetch", "/models/file");
  assert.equal(cut.kind, "unreachable");
  const [kept] = (await store("list")).result;
  assert.ok(kept.here >= PIECE && kept.here < SIZE, `${kept.here} bytes are here`);
  server.faults.after = Infinity;
  server.sent = 0;
  assert.equal((await store("fetch", "/models/file", { sha256 })).kind, undefined);
  assert.ok(server.sent <= SIZE - kept.here + 2, `${server.sent} bytes were sent again of ${SIZE - kept.here}`);
});

test("what is kept needs no network", { timeout: 60e3 }, async () => {
  server.requests = 0;
  assert.equal((await store("fetch", "/models/file", { sha256 })).kind, undefined);
  assert.equal(server.requests, 0);
});

test("damage is found, and only it is fetched again", { timeout: 60e3 }, async () => {
  await browser.page.evaluate(async (at) => {
    const root = await (await navigator.storage.getDirectory()).getDirectoryHandle("weir-models");
    for await (const [name, handle] of root.entries()) {
      if (name.endsWith(".json")) continue;
      const writer = await handle.createWritable({ keepExistingData: true });
      await writer.write({ type: "write", position: at, data: new Uint8Array([1, 2, 3, 4, 5, 6, 7, 8]) });
      await writer.close();
    }
  }, 2 * PIECE + 77);
  server.sent = 0;
  assert.deepEqual(await store("repair", "/models/file"), { result: PIECE });
  assert.ok(server.sent <= PIECE + 1, `${server.sent} bytes were sent`);
  assert.deepEqual(await store("repair", "/models/file"), { result: 0 });
});

test("a file with another digest is not kept", { timeout: 60e3 }, async () => {
  const wrong = await store("fetch", "/models/other", { sha256: "0".repeat(64) });
  assert.equal(wrong.kind, "damaged");
  assert.match(wrong.message, new RegExp(sha256));
  assert.equal((await store("list")).result.length, 1);
});

test("servers that send only all of a file will do", { timeout: 60e3 }, async () => {
  server.faults.ranges = false;
  assert.equal((await store("fetch", "/models/other", { sha256 })).kind, undefined);
  server.faults.ranges = true;
  assert.equal((await store("list")).result.length, 2);
});

test("files are removed", { timeout: 60e3 }, async () => {
  await store("remove", "/models/file");
  await store("remove", "/models/other");
  await store("remove", "/models/never");
  assert.deepEqual((await store("list")).result, []);
});

test("what doesn't fit is refused with what to do", { timeout: 60e3 }, async () => {
  const session = await browser.page.context().newCDPSession(browser.page);
  await session.send("Storage.overrideQuotaForOrigin", { origin: server.url, quotaSize: 8 << 20 });
  const refused = await store("fetch", "/models/file");
  await session.send("Storage.overrideQuotaForOrigin", { origin: server.url });
  assert.equal(refused.kind, "quota", refused.message);
  assert.match(refused.message, /MiB are to be fetched and the browser has room for/);
});
