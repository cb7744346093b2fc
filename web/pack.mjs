/** Puts the pages together: `node pack.mjs`, after the engine and the scripts were built. What it makes is in `site/`. */
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { dirname, extname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

const WEB = dirname(fileURLToPath(import.meta.url));
const SITE = join(WEB, "site");
const PAGES = [
  { name: "chat", file: "index.html", path: "/", title: "chat", link: "Chat" },
  { name: "cluster", file: "cluster.html", path: "/cluster", title: "cluster", link: "Cluster" },
  { name: "bench", file: "bench.html", path: "/bench", title: "benchmark", link: "Benchmark" },
  { name: "join", file: "join.html", path: "/join", title: "join", link: "Join" },
];
/** The peer of the benchmark page, fetched by nobody who doesn't measure it. */
const PEER = { from: "node_modules/@wllama/wllama/esm", to: "peers/wllama", files: ["index.min.js", "wasm/wllama.wasm"] };
/** For the processor's threads: fetched, and then kept, where those compute. */
const LATER = "/dist/threads/";
/** What a first visit may cost, packed. */
const FIRST_MAX = 1.5 * 2 ** 20;

const read = (...path) => readFileSync(join(WEB, ...path), "utf8");

function write(path, content, { plain = true } = {}) {
  const file = join(SITE, path);
  mkdirSync(dirname(file), { recursive: true });
  if (plain) writeFileSync(file, content);
  if ([".js", ".wasm", ".css", ".html", ".svg"].includes(extname(path))) writeFileSync(`${file}.gz`, gzipSync(content, { level: 9 }));
}

function all(folder, within = "") {
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    const path = `${within}/${entry.name}`;
    return entry.isDirectory() ? all(join(folder, entry.name), path) : [path];
  });
}

for (const name of readdirSync(SITE)) if (name !== ".gitignore") rmSync(join(SITE, name), { recursive: true });
const frame = read("console", "frame.html");
for (const { name, file, title } of PAGES) {
  const nav = PAGES.map((page) => `<a href="${page.path}"${page.name === name ? ' aria-current="page"' : ""}>${page.link}</a>`).join("");
  const values = { name, title, nav, body: read("console", `${name}.html`).trimEnd() };
  write(file, frame.replace(/\{\{(\w+)\}\}/g, (_, key) => values[key]));
}
for (const file of ["style.css", "icon.svg", "manifest.webmanifest"]) write(file, read("console", file));
for (const path of all(join(WEB, "dist"))) {
  if (/\.(js|wasm)$/.test(path)) write(`dist${path}`, readFileSync(join(WEB, "dist", path)));
}

const whole = all(SITE).filter((path) => !path.endsWith(".gz") && !path.startsWith("/."));
const [files, later] = [whole.filter((path) => !path.startsWith(LATER)), whole.filter((path) => path.startsWith(LATER))];
const version = createHash("sha256");
for (const path of whole) version.update(path).update(readFileSync(join(SITE, path)));
const values = { version: version.digest("hex").slice(0, 16), files: JSON.stringify(files), later: JSON.stringify(later) };
write("sw.js", read("console", "sw.js").replace(/\{\{(\w+)\}\}/g, (_, key) => values[key]));
const first = files.reduce((sum, path) => sum + statSync(existsSync(join(SITE, `${path}.gz`)) ? join(SITE, `${path}.gz`) : join(SITE, path)).size, 0);
console.log(`${(first / 1024).toFixed(0)} KiB packed at a first visit, pages and engine`);
if (first > FIRST_MAX) throw new Error(`a first visit must not cost more than ${FIRST_MAX / 1024} KiB`);

for (const file of PEER.files) {
  const from = join(WEB, PEER.from, file);
  // Large, so packed only.
  if (existsSync(from)) write(join(PEER.to, file), readFileSync(from), { plain: false });
}
