/** The examples, as people would run them: each loads a model in its page and answers. */
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { launch } from "./browser.mjs";
import { serve } from "./server.mjs";

const MODEL = join(process.env.WEIR_TEST_MODELS ?? "", "smollm2.gguf");
const skip = existsSync(MODEL) ? false : "smollm2.gguf isn't there; set WEIR_TEST_MODELS to the folder that has it";
if (skip && process.env.CI) throw new Error(skip);
const REACT = fileURLToPath(new URL("../examples/react", import.meta.url));

let server;
let browser;
before(async () => {
  server = await serve({ "smollm2.gguf": MODEL });
  // Without a GPU: these are about the pages.
  browser = await launch({ gpu: false });
});
after(async () => {
  await browser?.close();
  server?.close();
});

/** Opens the page, waits until its model is there, and asks; `answer` selects where the answer comes. */
async function check(path, answer) {
  const page = await browser.newPage();
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  await page.goto(`${server.url}${path}?model=/models/smollm2.gguf`);
  const field = page.getByLabel("Your message");
  await page.waitForFunction(() => document.querySelector("input")?.disabled === false, null, { timeout: 120_000 });
  await field.fill("Say hello.");
  await page.getByRole("button", { name: "Send" }).click();
  await page.waitForFunction((answer) => (document.querySelector(answer)?.textContent ?? "").length > 20, answer, { timeout: 60_000 });
  // It may have ended by itself.
  await page.evaluate(() => [...document.querySelectorAll("button")].find(({ textContent }) => textContent === "Stop")?.click());
  await page.waitForFunction(() => document.querySelector("input")?.disabled === false, null, { timeout: 30_000 });
  assert.deepEqual(errors, []);
  await page.close();
}

test("the plain page answers", { skip, timeout: 240_000 }, () => check("/examples/chat.html", "#said"));

test("the React example type-checks, builds and answers", { skip, timeout: 400_000 }, async () => {
  const npm = (...words) => execFileSync("npm", words, { cwd: REACT, stdio: ["ignore", "ignore", "inherit"] });
  npm("install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--silent");
  npm("run", "--silent", "build", "--", "--base=./", "--logLevel=error");
  await check("/examples/react/dist/index.html", "ol li:last-child");
});
