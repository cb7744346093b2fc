/** By what a cluster knows this tab: an Ed25519 key that no script can read, kept by the browser. */
import { WeirError } from "./types.js";

export interface Identity {
  /** The public half, 32 bytes. */
  key: Uint8Array;
  sign: (bytes: Uint8Array<ArrayBuffer>) => Promise<Uint8Array>;
}

/** Tabs at once, at most. */
const TABS_MAX = 64;

/** The first key that no other tab of this origin uses; it is this worker's for as long as it lives. */
export async function identity(): Promise<Identity> {
  for (let tab = 0; tab < TABS_MAX; tab++) {
    if (await taken(`weir-node-${tab}`)) return of(await kept(`node-${tab}`));
  }
  throw new WeirError("busy", `${TABS_MAX} tabs of this browser are nodes already`);
}

function taken(name: string): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const hold = (lock: Lock | null) => {
      resolve(lock !== null);
      return lock ? new Promise<void>(() => {}) : undefined;
    };
    navigator.locks.request(name, { ifAvailable: true }, hold).catch(reject);
  });
}

async function of({ publicKey, privateKey }: CryptoKeyPair): Promise<Identity> {
  const key = new Uint8Array(await crypto.subtle.exportKey("raw", publicKey));
  return { key, sign: async (bytes) => new Uint8Array(await crypto.subtle.sign("Ed25519", privateKey, bytes)) };
}

async function kept(name: string): Promise<CryptoKeyPair> {
  const database = await done<IDBDatabase>(opened());
  try {
    const store = () => database.transaction("keys", "readwrite").objectStore("keys");
    const known = await done<CryptoKeyPair | undefined>(store().get(name));
    if (known) return known;
    const made = (await crypto.subtle.generateKey("Ed25519", false, ["sign", "verify"])) as CryptoKeyPair;
    await done(store().put(made, name));
    return made;
  } finally {
    database.close();
  }
}

function opened(): IDBOpenDBRequest {
  const request = indexedDB.open("weir", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("keys");
  return request;
}

function done<T>(request: IDBRequest): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result as T);
    request.onerror = () => reject(new WeirError("failed", `the browser keeps no keys: ${request.error?.message ?? "unknown"}`));
  });
}
