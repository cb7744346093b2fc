#!/usr/bin/env python3
"""Packs llama.cpp's token ids of the corpus: a line a string.

    cargo build --release -p weir-benches --features peers --bin golden --target-dir target/peers    # or `cargo xtask golden` once
    target/peers/release/golden tokens --model smollm2.gguf --corpus backends/tests/golden/corpus.json --out rows.json
    python3 backends/tests/golden/tokens.py rows.json > backends/tests/golden/smollm2.tokens.json

A line is the list of ids with control tokens recognised in the text, and where they differ, a list of that and of the
ids with control tokens taken as text.
"""
import json
import sys

lines = []
for row in json.load(open(sys.argv[1])):
    special, plain = row["special"], row["plain"]
    lines.append(json.dumps(special if special == plain else [special, plain], separators=(",", ":")))
print("[\n" + ",\n".join(lines) + "\n]")
