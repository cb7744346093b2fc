/** Serves the SDK, an empty page and files in ranges, on a port of its own; and misbehaves when told to. */
import { createReadStream, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = { ".html": "text/html", ".css": "text/css", ".svg": "image/svg+xml", ".js": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };
const WEB = fileURLToPath(new URL("..", import.meta.url));

/**
 * `files` are paths by the names under which they are served, `/models/NAME`. `faults.after` is the number of bytes of
 * models after which every further request fails; `sent` counts them. Pages are isolated from other origins unless told.
 */
export async function serve(files, { isolated = true } = {}) {
  const faults = { after: Infinity, ranges: true };
  const state = { sent: 0, requests: 0, faults };
  const server = createServer((request, response) => {
    const path = new URL(request.url, "http://x").pathname;
    if (isolated) {
      response.setHeader("cross-origin-opener-policy", "same-origin");
      response.setHeader("cross-origin-embedder-policy", "require-corp");
    }
    if (path === "/favicon.ico") return response.writeHead(204).end();
    if (path === "/") return response.setHeader("content-type", "text/html").end("<!doctype html><title>weir</title>");
    const name = path.replace(/^\/models\//, "");
    const model = path.startsWith("/models/") ? files[name] : undefined;
    const places = model ? [model] : ["", "site"].flatMap((folder) => ["", ".gz"].map((packed) => join(WEB, folder, normalize(path) + packed)));
    const file = places.find((place) => statSync(place, { throwIfNoEntry: false })?.isFile());
    if (!file) return response.writeHead(404).end();
    const { size } = statSync(file);
    if (file.endsWith(".gz")) response.setHeader("content-encoding", "gzip");
    response.setHeader("content-type", TYPES[extname(path)] ?? "application/octet-stream");
    const range = model && faults.ranges && /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "");
    const [from, to] = range ? [Number(range[1]), range[2] === "" ? size - 1 : Number(range[2])] : [0, size - 1];
    if (model) {
      state.requests += 1;
      if (state.sent + to - from > faults.after) return request.socket.destroy();
      state.sent += to - from + 1;
      response.setHeader("etag", `"${size}"`);
    }
    if (range) response.setHeader("content-range", `bytes ${from}-${to}/${size}`);
    response.setHeader("content-length", to - from + 1);
    response.writeHead(range ? 206 : 200);
    createReadStream(file, { start: from, end: to }).pipe(response);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  state.url = `http://127.0.0.1:${server.address().port}`;
  state.close = () => (server.closeAllConnections(), server.close());
  return state;
}
