/** A screen that nobody sees, and what is on it. */
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { deflateSync } from "node:zlib";

/** Starts Xvfb; `display` is its name, `shoot()` gives a PNG. */
export async function screen() {
  const folder = mkdtempSync(join(tmpdir(), "weir-screen-"));
  const server = spawn("Xvfb", ["-displayfd", "3", "-screen", "0", "1024x768x24", "-fbdir", folder, "-nolisten", "tcp"], { stdio: ["ignore", "ignore", "ignore", "pipe"] });
  const number = await new Promise((resolve, reject) => {
    server.once("error", reject);
    server.once("exit", (code) => reject(new Error(`Xvfb ended with ${code}`)));
    server.stdio[3].once("data", (data) => resolve(String(data).trim()));
  });
  const close = () => new Promise((resolve) => {
    server.removeAllListeners("exit");
    server.once("exit", () => (rmSync(folder, { recursive: true, force: true }), resolve()));
    server.kill();
  });
  return { display: `:${number}`, shoot: () => png(readFileSync(join(folder, "Xvfb_screen0"))), close };
}

/** How many colours a picture of the screen has, up to `most`: one with nothing on it has one. */
export function colours({ pixels }, most = 64) {
  const seen = new Set();
  for (let i = 0; i < pixels.length && seen.size < most; i += 3) seen.add(pixels.readUIntBE(i, 3));
  return seen.size;
}

/** Xvfb's picture is in X's window dump format: a header of big-endian words, colours, then rows of blue, green, red and nothing. */
function png(dump) {
  const word = (i) => dump.readUInt32BE(4 * i);
  const [header, width, height, row, entries] = [word(0), word(4), word(5), word(12), word(19)];
  const start = header + 12 * entries;
  const pixels = Buffer.alloc(3 * width * height);
  const lines = Buffer.alloc((3 * width + 1) * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [from, to] = [start + y * row + 4 * x, 3 * (y * width + x)];
      pixels[to] = dump[from + 2];
      pixels[to + 1] = dump[from + 1];
      pixels[to + 2] = dump[from];
    }
    pixels.copy(lines, y * (3 * width + 1) + 1, 3 * y * width, 3 * (y + 1) * width);
  }
  const about = Buffer.alloc(13);
  about.writeUInt32BE(width, 0);
  about.writeUInt32BE(height, 4);
  about.set([8, 2, 0, 0, 0], 8);
  const file = Buffer.concat([Buffer.from("\x89PNG\r\n\x1a\n", "latin1"), chunk("IHDR", about), chunk("IDAT", deflateSync(lines)), chunk("IEND", Buffer.alloc(0))]);
  return { file, pixels };
}

function chunk(kind, data) {
  const named = Buffer.concat([Buffer.from(kind, "latin1"), data]);
  const whole = Buffer.alloc(named.length + 8);
  whole.writeUInt32BE(data.length, 0);
  named.copy(whole, 4);
  whole.writeUInt32BE(crc(named), named.length + 4);
  return whole;
}

function crc(bytes) {
  let sum = ~0;
  for (const byte of bytes) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return ~sum >>> 0;
}
