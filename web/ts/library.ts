/** The models that this origin keeps, from the page's side. */
import { Port } from "./port.js";
import type { Progress } from "./types.js";

/** A file in the store. */
export interface Stored {
  /** Where it came from. */
  url: string;
  /** Bytes in all, and those that are here. */
  size: number;
  here: number;
}

/** Fetches, lists, checks and removes models without loading any. */
export class Store {
  readonly #port = new Port();

  /** What is kept. */
  async list(): Promise<Stored[]> {
    return (await this.#port.call("list", undefined).result) as Stored[];
  }

  /** Fetches what is missing of a file; nothing, where all of it is here. */
  async fetch(url: string, options: { sha256?: string; onProgress?: (progress: Progress) => void } = {}): Promise<void> {
    const { sha256, onProgress } = options;
    await this.#port.call("fetch", { url: new URL(url, location.href).href, sha256 }, (event) => onProgress?.(event as Progress)).result;
  }

  /** Reads all of a file again, fetches what was damaged, and says how many bytes that were. */
  async repair(url: string, onProgress?: (progress: Progress) => void): Promise<number> {
    const argument = { url: new URL(url, location.href).href };
    return (await this.#port.call("repair", argument, (event) => onProgress?.(event as Progress)).result) as number;
  }

  /** Removes a file, or nothing, if it isn't there. */
  async remove(url: string): Promise<void> {
    await this.#port.call("remove", { url: new URL(url, location.href).href }).result;
  }

  /** Bytes that this origin has taken, and may take. */
  async space(): Promise<{ used: number; quota: number }> {
    const { usage = 0, quota = 0 } = await navigator.storage.estimate();
    return { used: usage, quota };
  }

  close(): void {
    this.#port.close();
  }
}
