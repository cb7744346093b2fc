/** An answer while it comes. */
import type { End, Piece } from "./types.js";

/**
 * Pieces of text, in order. Iterate over it once, or await `text()`; leaving the loop early cancels the request.
 * `end` is known afterwards.
 */
export class Answer implements AsyncIterable<string> {
  readonly #pieces: AsyncIterable<Piece>;
  readonly #endpoint: () => string;
  /** How it ended; undefined until then. */
  end: End | undefined;

  constructor(pieces: AsyncIterable<Piece>, endpoint: () => string) {
    this.#pieces = pieces;
    this.#endpoint = endpoint;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<string> {
    for await (const piece of this.#pieces) {
      if ("end" in piece) this.end = { ...piece.end, endpoint: this.#endpoint() };
      else if (piece.text !== "") yield piece.text;
    }
  }

  /** All of it. */
  async text(): Promise<string> {
    let all = "";
    for await (const piece of this) all += piece;
    return all;
  }
}
