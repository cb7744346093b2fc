/** Chromium, with a GPU that SwiftShader imitates. */
import { chromium } from "playwright-core";

const FLAGS = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

/** A browser without anything in it. */
export async function launch({ profile, gpu = true, flags = [] } = {}) {
  const options = { executablePath: process.env.WEIR_TEST_BROWSER ?? "/usr/bin/chromium", args: [...FLAGS, ...(gpu ? GPU : []), ...flags] };
  options.chromiumSandbox = process.getuid?.() !== 0;
  if (profile) return chromium.launchPersistentContext(profile, options);
  const context = await (await chromium.launch(options)).newContext();
  const close = context.close.bind(context);
  context.close = async () => {
    await close();
    await context.browser()?.close();
  };
  return context;
}

/** A page of that origin with the SDK as `weir`, and what its console says on ours. */
export async function open(url, options) {
  const context = await launch(options);
  const page = await context.newPage();
  page.on("console", (message) => message.type() === "error" && console.error(`browser: ${message.text()}`));
  page.on("pageerror", (error) => console.error(`browser: ${error}`));
  await page.goto(url);
  await page.evaluate(async () => (globalThis.weir = await import("/dist/index.js")));
  return { page, close: () => context.close() };
}
