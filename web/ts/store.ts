/**
 * Files of this origin's private file system, in a worker: fetched in pieces, several at a time, each noted with its
 * digest when it is there. So a fetch that was cut goes on where it was, and damage is found and mended by piece.
 */
import type { Stored } from "./library.js";
import { type Progress, WeirError } from "./types.js";

const FOLDER = "weir-models";
const PIECE = 4 << 20;
/** Requests at once. */
const LANES = 4;
/** Tries of one piece, with pauses that double between them. */
const TRIES = 5;
const PAUSE_MS = 250;
/** Room that other things of this origin are left. */
const SPARE = 16 << 20;

/** What is known of a file. Kept beside it. */
interface Note {
  url: string;
  size: number;
  /** What the server calls this version of it, where it does. */
  etag: string;
  piece: number;
  /** SHA-256 of each piece that is here, in hexadecimal; empty for others. */
  pieces: string[];
  /** Its own digest was asked for, and was right. */
  checked: string;
}

export type Tell = (progress: Progress) => void;
/** SHA-256 of a file that is read from start to end. */
export type Digest = (read: (offset: number, into: Uint8Array) => number, size: number) => Promise<string>;

/** Something that can be read at once. */
export interface Part {
  size: number;
  read(offset: number, into: Uint8Array): number;
  close(): void;
}

/** Fetches what is missing of a file. Other tabs that want the same one wait. */
export async function fetchAll(url: string, sha256: string | undefined, digest: Digest, tell: Tell): Promise<void> {
  await alone(url, async (folder, name) => {
    let note = await readNote(folder, name);
    if (note && complete(note) && (sha256 === undefined || note.checked === sha256.toLowerCase())) return;
    if (!note || !complete(note)) {
      const head = await ask(url);
      if (note && (note.size !== head.size || note.etag !== head.etag)) note = undefined;
      note ??= { url, size: head.size, etag: head.etag, piece: PIECE, pieces: Array<string>(Math.ceil(head.size / PIECE)).fill(""), checked: "" };
      await makeRoom(note);
      await fill(folder, name, note, head.ranges, tell);
    }
    if (sha256 !== undefined) await check(folder, name, note, sha256.toLowerCase(), digest, tell);
  });
}

/** Reads all pieces again and fetches those that aren't what they were; says how many bytes. */
export async function repair(url: string, tell: Tell): Promise<number> {
  return alone(url, async (folder, name) => {
    const note = await readNote(folder, name);
    if (!note) throw new WeirError("invalid", `${url} isn't in the store`);
    const part = await open(folder, name);
    let damaged = 0;
    try {
      const buffer = new Uint8Array(note.piece);
      for (const [i, known] of note.pieces.entries()) {
        const { from, to } = extent(note, i);
        const piece = buffer.subarray(0, to - from);
        const right = known !== "" && part.read(from, piece) === piece.length && (await sha(piece)) === known;
        if (!right) {
          note.pieces[i] = "";
          damaged += to - from;
        }
        tell({ stage: "verify", done: to, total: note.size });
      }
    } finally {
      part.close();
    }
    if (damaged > 0) {
      note.checked = "";
      await writeNote(folder, name, note);
      const head = await ask(url);
      if (head.size !== note.size || head.etag !== note.etag) {
        throw new WeirError("damaged", `${url} has changed since it was fetched; remove it and fetch it again`);
      }
      await fill(folder, name, note, head.ranges, tell);
    }
    return damaged;
  });
}

/** What is in the store. */
export async function list(): Promise<Stored[]> {
  const folder = await root();
  const all: Stored[] = [];
  for await (const name of folder.keys()) {
    const note = name.endsWith(".json") ? await readNote(folder, name.slice(0, -5)) : undefined;
    if (!note) continue;
    const here = note.pieces.reduce((sum, piece, i) => sum + (piece === "" ? 0 : extent(note, i).to - extent(note, i).from), 0);
    all.push({ url: note.url, size: note.size, here });
  }
  return all;
}

/** Removes a file. */
export async function remove(url: string): Promise<void> {
  await alone(url, async (folder, name) => {
    for (const file of [`${name}.json`, name]) await folder.removeEntry(file).catch(absent);
  });
}

/** A file that is here. */
export async function stored(url: string): Promise<Part> {
  return open(await root(), await nameOf(url));
}

/** A file that a person chose, or one that the store keeps but can't lock: any number of tabs may read it. */
export function readable(file: Blob): Part {
  const reader = new FileReaderSync();
  return {
    size: file.size,
    read(offset, into) {
      const bytes = new Uint8Array(reader.readAsArrayBuffer(file.slice(offset, offset + into.length)));
      into.set(bytes);
      return bytes.length;
    },
    close() {},
  };
}

/** Whether this page may keep files: it must come over https or from localhost, and some web views have no place for them. */
export function keeps(): boolean {
  return typeof navigator.storage?.getDirectory === "function";
}

/** A file where none can be kept: it is there until nobody reads it any more. */
export async function borrow(url: string, tell: Tell): Promise<Part> {
  const { size, etag, ranges } = await ask(url);
  if (!ranges) return readable(await (await get(url, {})).blob());
  const note: Note = { url, size, etag, piece: PIECE, pieces: Array<string>(Math.ceil(size / PIECE)).fill(""), checked: "" };
  const pieces: Blob[] = [];
  for (const i of note.pieces.keys()) {
    pieces.push(new Blob([await onePiece(note, i, new AbortController().signal)]));
    tell({ stage: "fetch", done: extent(note, i).to, total: size });
  }
  return readable(new Blob(pieces));
}

async function root(): Promise<FileSystemDirectoryHandle> {
  if (!keeps()) {
    throw new WeirError("failed", "this page may not keep files; it must come over https, or from localhost");
  }
  return (await navigator.storage.getDirectory()).getDirectoryHandle(FOLDER, { create: true });
}

async function nameOf(url: string): Promise<string> {
  return (await sha(new TextEncoder().encode(url))).slice(0, 40);
}

async function sha(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Only one tab at a time changes a file. */
async function alone<T>(url: string, work: (folder: FileSystemDirectoryHandle, name: string) => Promise<T>): Promise<T> {
  const name = await nameOf(url);
  return navigator.locks.request(`weir-model-${name}`, async () => work(await root(), name));
}

function absent(error: unknown): undefined {
  if (error instanceof DOMException && error.name === "NotFoundError") return undefined;
  throw error;
}

async function readNote(folder: FileSystemDirectoryHandle, name: string): Promise<Note | undefined> {
  const handle = await folder.getFileHandle(`${name}.json`).catch(absent);
  if (!handle) return undefined;
  try {
    const note = JSON.parse(await (await handle.getFile()).text()) as Note;
    const right = note.pieces.length === Math.ceil(note.size / note.piece) && note.piece > 0 && note.piece <= 64 << 20;
    return right ? note : undefined;
  } catch {
    return undefined; // written half: the file is fetched again
  }
}

async function writeNote(folder: FileSystemDirectoryHandle, name: string, note: Note): Promise<void> {
  const handle = await folder.getFileHandle(`${name}.json`, { create: true });
  const access = await handle.createSyncAccessHandle();
  try {
    const bytes = new TextEncoder().encode(JSON.stringify(note));
    access.truncate(0);
    access.write(bytes, { at: 0 });
    access.flush();
  } finally {
    access.close();
  }
}

function complete(note: Note): boolean {
  return note.pieces.every((piece) => piece !== "");
}

function extent(note: Note, piece: number): { from: number; to: number } {
  return { from: piece * note.piece, to: Math.min((piece + 1) * note.piece, note.size) };
}

/** How large the file is, and whether the server sends parts of it. */
async function ask(url: string): Promise<{ size: number; etag: string; ranges: boolean }> {
  const response = await get(url, { headers: { range: "bytes=0-0" } });
  await response.body?.cancel();
  const etag = response.headers.get("etag") ?? response.headers.get("last-modified") ?? "";
  const range = /\/(\d+)$/.exec(response.headers.get("content-range") ?? "");
  if (response.status === 206 && range) return { size: Number(range[1]), etag, ranges: true };
  const size = Number(response.headers.get("content-length") ?? NaN);
  if (!(size > 0)) throw new WeirError("unreachable", `${url}: the server doesn't say how large it is`);
  return { size, etag, ranges: false };
}

/** What servers must be sent, by origin. */
const secrets = new Map<string, string>();

/** Requests to this origin carry this from now on. */
export function authorise(origin: string, secret: string): void {
  secrets.set(origin, secret);
}

async function get(url: string, init: RequestInit): Promise<Response> {
  let response: Response;
  const headers = new Headers(init.headers);
  const secret = secrets.get(new URL(url).origin);
  if (secret !== undefined) headers.set("authorization", `Bearer ${secret}`);
  try {
    // The store is the cache.
    response = await fetch(url, { ...init, headers, cache: "no-store" });
  } catch (error) {
    throw new WeirError("unreachable", `${url} can't be reached (${String(error)})`);
  }
  if (!response.ok) throw new WeirError("unreachable", `${url}: HTTP ${response.status}`);
  return response;
}

async function makeRoom(note: Note): Promise<void> {
  const { usage = 0, quota = Infinity } = await navigator.storage.estimate();
  const missing = note.pieces.reduce((sum, piece, i) => sum + (piece === "" ? extent(note, i).to - extent(note, i).from : 0), 0);
  if (missing + SPARE > quota - usage) throw full(missing, quota - usage);
}

function full(missing: number, free: number): WeirError {
  const mib = (bytes: number) => `${Math.max(0, Math.ceil(bytes / 1048576))} MiB`;
  return new WeirError("quota", `${mib(missing)} are to be fetched and the browser has room for ${mib(free)}; remove a model from the store, or free space on the disk`);
}

/** Fetches the missing pieces. */
async function fill(folder: FileSystemDirectoryHandle, name: string, note: Note, ranges: boolean, tell: Tell): Promise<void> {
  const handle = await folder.getFileHandle(name, { create: true });
  const access = await handle.createSyncAccessHandle();
  let here = note.pieces.reduce((sum, piece, i) => sum + (piece === "" ? 0 : extent(note, i).to - extent(note, i).from), 0);
  const keep = async (piece: number, bytes: Uint8Array<ArrayBuffer>) => {
    const digest = await sha(bytes);
    let fits = false;
    try {
      fits = access.write(bytes, { at: extent(note, piece).from }) === bytes.length;
      access.flush();
    } catch (error) {
      if (!(error instanceof DOMException && error.name === "QuotaExceededError")) throw error;
      fits = false;
    }
    if (!fits) {
      const { usage = 0, quota = 0 } = await navigator.storage.estimate();
      throw full(note.size - here, Math.min(quota - usage, note.size - here - 1));
    }
    note.pieces[piece] = digest;
    here += bytes.length;
    await writeNote(folder, name, note);
    tell({ stage: "fetch", done: here, total: note.size });
  };
  try {
    if (access.getSize() > note.size) access.truncate(note.size);
    tell({ stage: "fetch", done: here, total: note.size });
    if (ranges) await inPieces(note, keep);
    else await inOne(note, keep);
  } finally {
    access.close();
  }
}

/** Several pieces at a time. The first failure ends them all. */
async function inPieces(note: Note, keep: (piece: number, bytes: Uint8Array<ArrayBuffer>) => Promise<void>): Promise<void> {
  const missing = note.pieces.flatMap((piece, i) => (piece === "" ? [i] : []));
  const stop = new AbortController();
  // Pieces are kept one after the other: the note is one file.
  let last: Promise<void> = Promise.resolve();
  const lane = async () => {
    for (let piece = missing.shift(); piece !== undefined && !stop.signal.aborted; piece = missing.shift()) {
      const bytes = await onePiece(note, piece, stop.signal);
      const number = piece;
      last = last.then(() => keep(number, bytes));
      await last;
    }
  };
  try {
    await Promise.all(Array.from({ length: LANES }, lane));
  } catch (error) {
    stop.abort();
    await last.catch(() => undefined);
    throw error;
  }
}

async function onePiece(note: Note, piece: number, signal: AbortSignal): Promise<Uint8Array<ArrayBuffer>> {
  const { from, to } = extent(note, piece);
  for (let attempt = 1; ; attempt++) {
    try {
      const response = await get(note.url, { headers: { range: `bytes=${from}-${to - 1}` }, signal });
      const etag = response.headers.get("etag") ?? response.headers.get("last-modified") ?? "";
      if (etag !== note.etag) throw new WeirError("damaged", `${note.url} changed while it was fetched; fetch it again`);
      const bytes = new Uint8Array(await response.arrayBuffer());
      if (response.status !== 206 || bytes.length !== to - from) throw new WeirError("unreachable", `${note.url}: ${bytes.length} bytes came, not ${to - from}`);
      return bytes;
    } catch (error) {
      if (attempt >= TRIES || signal.aborted || (error instanceof WeirError && error.kind === "damaged")) throw error;
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS << attempt));
    }
  }
}

/** From a server that sends only all of it. */
async function inOne(note: Note, keep: (piece: number, bytes: Uint8Array<ArrayBuffer>) => Promise<void>): Promise<void> {
  const reader = (await get(note.url, {})).body?.getReader();
  if (!reader) throw new WeirError("unreachable", `${note.url} sent nothing`);
  let piece = 0;
  let buffer = new Uint8Array(extent(note, 0).to);
  let filled = 0;
  for (;;) {
    const { value, done } = await reader.read();
    for (let rest = value ?? new Uint8Array(); rest.length > 0; ) {
      if (piece >= note.pieces.length) throw new WeirError("unreachable", `${note.url} is longer than the server said`);
      const some = rest.subarray(0, buffer.length - filled);
      buffer.set(some, filled);
      filled += some.length;
      rest = rest.subarray(some.length);
      if (filled === buffer.length) {
        if (note.pieces[piece] === "") await keep(piece, buffer);
        piece += 1;
        const { from, to } = extent(note, Math.min(piece, note.pieces.length - 1));
        buffer = new Uint8Array(to - from);
        filled = 0;
      }
    }
    if (done) break;
  }
  if (piece < note.pieces.length) throw new WeirError("unreachable", `${note.url} ended early`);
}

async function check(folder: FileSystemDirectoryHandle, name: string, note: Note, sha256: string, digest: Digest, tell: Tell): Promise<void> {
  const part = await open(folder, name);
  let found: string;
  try {
    const read = (offset: number, into: Uint8Array) => {
      tell({ stage: "verify", done: offset, total: note.size });
      return part.read(offset, into);
    };
    found = await digest(read, note.size);
  } finally {
    part.close();
  }
  if (found !== sha256) {
    for (const file of [`${name}.json`, name]) await folder.removeEntry(file).catch(absent);
    throw new WeirError("damaged", `${note.url} has SHA-256 ${found}, not ${sha256}; it was removed`);
  }
  note.checked = sha256;
  await writeNote(folder, name, note);
}

async function open(folder: FileSystemDirectoryHandle, name: string): Promise<Part> {
  const handle = await folder.getFileHandle(name);
  return readable(await handle.getFile());
}
