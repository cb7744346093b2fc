/**
 * A model in a window: this process hands the page its files and the model, under one origin of its own, with the headers
 * that let the page use WebGPU, the store and threads. Start it with `npm start -- MODEL.gguf`.
 */
import { app, BrowserWindow, net, protocol } from "electron";
import { open, stat } from "node:fs/promises";
import { extname, join, resolve, sep } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const HOME = fileURLToPath(new URL("..", import.meta.url));
const SDK = join(HOME, "node_modules", "weir", "dist");
const TYPES: Record<string, string> = { ".html": "text/html", ".js": "text/javascript", ".wasm": "application/wasm" };
const ISOLATED = { "cross-origin-opener-policy": "same-origin", "cross-origin-embedder-policy": "require-corp" };
/** No answer to the page is larger: it asks for pieces. */
const MOST = 64 << 20;

// A scheme that is as good as https: without it there is no WebGPU, no store and no worker.
protocol.registerSchemesAsPrivileged([{ scheme: "weir", privileges: { standard: true, secure: true, supportFetchAPI: true, stream: true } }]);

/** The file for a path of the page's origin; nothing outside of the two folders. */
function place(path: string): string | undefined {
  const [folder, rest] = path.startsWith("/dist/") ? [SDK, path.slice(6)] : path === "/page.js" ? [join(HOME, "build", "page"), path.slice(1)] : [join(HOME, "page"), path === "/" ? "index.html" : path.slice(1)];
  const file = resolve(folder, decodeURIComponent(rest));
  return file.startsWith(folder + sep) ? file : undefined;
}

/** A range of the model, or all of it. */
async function model(path: string, range: string | null): Promise<Response> {
  const { size } = await stat(path);
  const asked = /^bytes=(\d+)-(\d*)$/.exec(range ?? "");
  if (!asked) return net.fetch(pathToFileURL(path).href);
  const from = Number(asked[1]);
  const to = Math.min(asked[2] ? Number(asked[2]) + 1 : size, size, from + MOST);
  if (from >= to) return new Response(null, { status: 416 });
  const file = await open(path);
  try {
    const { buffer, bytesRead } = await file.read(new Uint8Array(to - from), 0, to - from, from);
    return new Response(buffer.subarray(0, bytesRead), { status: 206, headers: { "content-range": `bytes ${from}-${from + bytesRead - 1}/${size}` } });
  } finally {
    await file.close();
  }
}

async function answer(request: Request, gguf: string | undefined): Promise<Response> {
  const path = new URL(request.url).pathname;
  if (path === "/model.gguf" && gguf !== undefined) return model(gguf, request.headers.get("range"));
  const file = place(path);
  if (file === undefined) return new Response("there is no such file", { status: 404 });
  const found = await net.fetch(pathToFileURL(file).href).catch(() => undefined);
  if (!found?.ok) return new Response("there is no such file", { status: 404 });
  return new Response(found.body, { headers: { ...ISOLATED, "content-type": TYPES[extname(file)] ?? "application/octet-stream" } });
}

app.on("window-all-closed", () => app.quit());
await app.whenReady();
const gguf = process.argv.find((word) => word.endsWith(".gguf"));
protocol.handle("weir", (request) => answer(request, gguf === undefined ? undefined : resolve(gguf)));
const window = new BrowserWindow({ width: 900, height: 640, title: "A model in a window" });
await window.loadURL("weir://app/");
