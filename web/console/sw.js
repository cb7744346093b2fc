/**
 * Keeps these pages for when there is no network. The constants are filled in when the site is put together: a change of
 * any file makes another version, which is fetched whole before it takes the old one's place.
 */
const VERSION = "{{version}}";
const FILES = {{files}};
/** What not every visit needs: kept once it was fetched. */
const LATER = {{later}};
const PAGES = { "/cluster": "/cluster.html", "/bench": "/bench.html", "/join": "/join.html", "/": "/index.html" };

self.addEventListener("install", (event) => {
  const all = async () => {
    const cache = await caches.open(VERSION);
    await cache.addAll(FILES.map((file) => new Request(file, { cache: "no-cache" })));
    await self.skipWaiting();
  };
  event.waitUntil(all());
});

self.addEventListener("activate", (event) => {
  const others = async () => {
    const names = await caches.keys();
    await Promise.all(names.filter((name) => name !== VERSION).map((name) => caches.delete(name)));
    await self.clients.claim();
  };
  event.waitUntil(others());
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const { origin, pathname } = new URL(request.url);
  const file = PAGES[pathname] ?? pathname;
  if (request.method !== "GET" || origin !== self.location.origin || ![...FILES, ...LATER].includes(file)) return;
  event.respondWith(kept(request, file));
});

async function kept(request, file) {
  const cache = await caches.open(VERSION);
  const known = await cache.match(file);
  if (known) return known;
  const response = await fetch(request);
  if (response.ok && LATER.includes(file)) await cache.put(file, response.clone());
  return response;
}
