import { defineConfig } from "vite";

// The engine's worker loads its module from beside itself: both are left as they are.
export default defineConfig({
  optimizeDeps: { exclude: ["weir"] },
  worker: { format: "es" },
  server: { headers: { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" } },
});
