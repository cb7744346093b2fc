/** The benchmark page without anybody before it: `node bench/run.mjs MODEL.gguf [ENGINE]...`, from web/. */
import { open } from "../test/browser.mjs";
import { serve } from "../test/server.mjs";

const [model, ...engines] = process.argv.slice(2);
const server = await serve({ "model.gguf": model });
const { page, close } = await open(server.url);
await page.goto(`${server.url}/bench.html`);
const settings = { model: `${server.url}/models/model.gguf`, output: 48, runs: 5, warm_ups: 1 };
console.log(`medians of ${settings.runs} runs of ${settings.output} tokens after one to warm up`);
for (const engine of engines.length > 0 ? engines : ["Weir, processor", "wllama"]) {
  const measured = page.evaluate(async ([engine, settings]) => (await import("/dist/console/bench.js")).measure(engine, settings), [engine, settings]);
  const { about, load_ms, first_ms, tokens_per_s, total_ms } = await measured;
  const figures = `loads in ${load_ms.toFixed(0)} ms, first token ${first_ms.toFixed(1)} ms, ${tokens_per_s.toFixed(1)} tok/s, ${total_ms.toFixed(0)} ms in all`;
  console.log(`${engine} (${about}): ${figures}`);
}
await close();
server.close();
