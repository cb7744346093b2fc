/** Pictures of the gateway's pages, for eyes: `node test/screenshots.mjs FOLDER`, with the environment of the tests. */
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { launch } from "./browser.mjs";
import { chat, missing, MODEL, serve, until } from "./gateway.mjs";

if (missing) throw new Error(missing);
const folder = process.argv[2] ?? "screenshots";
mkdirSync(folder, { recursive: true });
const SIZES = { desktop: { width: 1280, height: 800 }, phone: { width: 390, height: 844 } };

const gateway = await serve(["--model", `${MODEL}`, "--model", "null:step_us=20000", "--share", MODEL]);
const browser = await launch({ gpu: false });

async function open(path, size, colorScheme) {
  const page = await browser.newPage();
  await page.setViewportSize(SIZES[size]);
  await page.emulateMedia({ colorScheme });
  await page.goto(`${gateway.url}${path}`);
  return page;
}

async function shoot(page, name) {
  await page.screenshot({ path: join(folder, `${name}.png`), fullPage: true });
  await page.close();
}

async function answered(page) {
  await page.selectOption("#where", "cluster");
  await page.selectOption("#model", "smollm2");
  await page.click("#start");
  await page.locator("#text:enabled").waitFor();
  await page.fill("#text", "Write a haiku about rain, then list three kinds of rain and a line of Python.");
  await page.press("#text", "Enter");
  const line = page.locator(".said .assistant").first();
  await until("an answer came", async () => (await line.getAttribute("aria-busy")) === "false", { ms: 120_000 });
}

async function measured(page) {
  await page.selectOption("#model", { index: 0 });
  await page.fill("#output", "16");
  await page.fill("#runs", "1");
  for (const name of ["Weir", "Weir, GPU"]) await page.locator(`#engines input[value="${name}"]`).uncheck();
  await page.click("#measure");
  await until("it is done", async () => /Medians of/.test(await page.textContent("#state")), { ms: 300_000 });
}

const busy = (tokens) => chat(gateway.url, { model: "null", messages: [{ role: "user", content: "Hi" }], max_tokens: tokens });
try {
  for (const [size, scheme] of [["desktop", "light"], ["desktop", "dark"], ["phone", "light"], ["phone", "dark"]]) {
    const name = (page) => `${page}-${size}-${scheme}`;
    await shoot(await open("/", size, scheme), name("chat-first"));
    const spoken = await open("/", size, scheme);
    await answered(spoken);
    await shoot(spoken, name("chat"));
    const running = [busy(400), busy(400)];
    const cluster = await open("/cluster", size, scheme);
    await until("its curve is drawn", async () => (await cluster.locator("#plot polyline").count()) > 0);
    await shoot(cluster, name("cluster"));
    await Promise.all(running);
    await shoot(await open("/join", size, scheme), name("join"));
    const bench = await open("/bench", size, scheme);
    if (scheme === "light") await measured(bench);
    await shoot(bench, name("bench"));
  }
} finally {
  await browser.close();
  await gateway.close();
}
