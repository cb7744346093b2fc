/** What all pages do: find their elements, ask the gateway, work without a network. */
import type { Progress } from "../types.js";

/** The element with this id, which the page has. */
export function at<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no ${id}`);
  return found as T;
}

export function element<K extends keyof HTMLElementTagNameMap>(
  name: K,
  properties: Partial<HTMLElementTagNameMap[K]> = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function text(id: string, words: string): void {
  const found = at(id);
  if (found.textContent !== words) found.textContent = words;
}

export function show(id: string, shown: boolean): void {
  at(id).hidden = !shown;
}

/** What went wrong, for a person. */
export function words(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

export function size(bytes: number): string {
  return bytes < 1e9 ? `${Math.ceil(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

const STAGES = { fetch: "Fetching the model", verify: "Checking the model", load: "Loading the model" };

export function progress({ stage, done, total }: Progress): { words: string; share: number } {
  return { words: `${STAGES[stage]}: ${size(done)} of ${size(total)}`, share: total > 0 ? done / total : 0 };
}

const KEY = "weir-key";

/** The gateway's key, if this browser was told one. */
export function key(): string | undefined {
  return localStorage.getItem(KEY) ?? undefined;
}

/** Asks the gateway; for its key, where it wants one. */
export async function ask(path: string, init: RequestInit = {}): Promise<Response> {
  for (let tried = false; ; tried = true) {
    const headers = new Headers(init.headers);
    const known = key();
    if (known !== undefined) headers.set("authorization", `Bearer ${known}`);
    const response = await fetch(path, { ...init, headers, cache: "no-store" });
    if (response.status !== 401 || (tried && known === undefined) || !(await askKey())) return response;
  }
}

async function askKey(): Promise<boolean> {
  const dialog = at<HTMLDialogElement>("key-dialog");
  const value = at<HTMLInputElement>("key-value");
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "ok" || value.value === "") return false;
  localStorage.setItem(KEY, value.value);
  return true;
}

/** A model file that the gateway hands to pages. */
export interface Shared {
  name: string;
  sha256: string;
  size: number;
  url: string;
}

const SHARED = "weir-shared";

/** What the gateway shares; what it shared when it was last reached, where it can't be. */
export async function shared(quiet = false): Promise<Shared[]> {
  try {
    const response = quiet ? await fetch("/weir/v1/files", { cache: "no-store" }) : await ask("/weir/v1/files");
    if (!response.ok) return quiet ? remembered() : [];
    const { files } = (await response.json()) as { files: Omit<Shared, "url">[] };
    const found = files.map((file) => ({ ...file, url: fileUrl(file.sha256) }));
    localStorage.setItem(SHARED, JSON.stringify(found));
    return found;
  } catch {
    return remembered();
  }
}

export function fileUrl(sha256: string): string {
  return new URL(`/weir/v1/files/${sha256}`, location.origin).href;
}

/** Without asking anybody. */
export function remembered(): Shared[] {
  try {
    return JSON.parse(localStorage.getItem(SHARED) ?? "[]") as Shared[];
  } catch {
    return [];
  }
}

/** From now on these pages are there without a network. */
export function keep(): void {
  if (isSecureContext && "serviceWorker" in navigator) {
    navigator.serviceWorker.register("/sw.js").catch((error: unknown) => console.warn(`these pages can't be kept: ${words(error)}`));
  }
}
