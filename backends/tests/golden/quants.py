#!/usr/bin/env python3
"""Writes quants.bin: random blocks of every storage type and their values by the PyPI package `gguf` (numpy).

Needs `pip install gguf==0.19.0 numpy`. For each type: its id, the number of bytes, the bytes, the number of values, the
values; ids and numbers as u32, values as f32, all little-endian.
"""
import pathlib
import struct

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type
from gguf.quants import dequantize

# Where the half-precision scales of a block are, so that they can be made finite and of ordinary size.
SCALES_AT = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
    Type.IQ4_NL: [0], Type.IQ4_XS: [0], Type.BF16: [],
}

random = numpy.random.default_rng(20)
out = bytearray()
for kind, scales_at in SCALES_AT.items():
    values, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (max(2, 64 // values), size), dtype=numpy.uint8)
    for at in scales_at:
        scales = random.uniform(-0.1, 0.1, len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = scales.view(numpy.uint8).reshape(-1, 2)
    if kind == Type.BF16:
        blocks[:, 1] &= 0xBF  # no infinities
    expected = dequantize(blocks, kind).astype("<f4").flatten()
    assert numpy.isfinite(expected).all()
    out += struct.pack("<II", kind, blocks.size) + blocks.tobytes()
    out += struct.pack("<I", expected.size) + expected.tobytes()
pathlib.Path(__file__).with_name("quants.bin").write_bytes(out)
