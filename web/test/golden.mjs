/** Golden logits: the format of backends/tests/golden/logits.rs, and how far logits are from them. */
const MAGIC = "weirgold1\n";
const UNIT = 65536;
const TOP = 64;

export function parse(bytes) {
  let at = MAGIC.length;
  if (new TextDecoder().decode(bytes.subarray(0, at)) !== MAGIC) throw new Error("not a file of golden logits");
  const number = () => {
    let value = 0;
    for (let unit = 1; ; unit *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * unit;
      if (byte < 128) return value;
    }
  };
  const about = number(); // how it was made
  at += about;
  at += 32; // the model's digest
  const vocabulary = number();
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const peer = view.getFloat64(at, true);
  at += 16;
  const tokens = Array.from({ length: number() }, number);
  const rows = tokens.map(() => {
    let below = 0;
    const top = Array.from({ length: TOP }, () => {
      const id = number();
      below += number();
      return [id, -below / UNIT];
    });
    return { top, tail: -number() / UNIT };
  });
  return { vocabulary, peer, tokens, rows };
}

/** KL(golden || softmax(logits)) over the kept tokens and all others as one. */
export function divergence(row, logits) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const total = most + Math.log(logits.reduce((sum, x) => sum + Math.exp(x - most), 0));
  const mass = Math.log(row.top.reduce((sum, [, p]) => sum + Math.exp(p), Math.exp(row.tail)));
  let kl = 0;
  let kept = 0;
  for (const [id, p] of row.top) {
    const q = logits[id] - total;
    kept += Math.exp(q);
    kl += Math.exp(p - mass) * (p - mass - q);
  }
  const q = Math.log(Math.max(1 - kept, Math.exp(-200)));
  return kl + Math.exp(row.tail - mass) * (row.tail - mass - q);
}
