#!/usr/bin/env python3
"""Writes backends/src/text/categories.rs: where Unicode's general categories change, for the pre-tokenizers.

Needs the Unicode database of version 15.1, which is the one that the llama.cpp of our goldens was made with:
    pip install unicodedata2==15.1.0
    python3 backends/tests/golden/categories.py > backends/src/text/categories.rs && rustfmt backends/src/text/categories.rs
"""
import unicodedata2

assert unicodedata2.unidata_version == "15.1.0", unicodedata2.unidata_version
WHITE_SPACE = {0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000, 0x20, *range(9, 14), *range(0x2000, 0x200B)}
CODES = {"L": 1, "N": 2, "M": 3, "P": 4, "S": 5}


def code(point):
    if point in WHITE_SPACE:
        return 6
    return CODES.get(unicodedata2.category(chr(point))[0], 0)


starts, last = [], None
for point in range(0x110000):
    if code(point) != last:
        last = code(point)
        starts.append(point << 3 | last)

print("//! Where Unicode's general categories change (Unicode 15.1). Written by tests/golden/categories.py.")
print()
print("/// `first code point << 3 | class`, ascending: a class holds up to the next entry. Classes: 0 other, 1 letter, 2 number,")
print("/// 3 mark, 4 punctuation, 5 symbol, 6 white space.")
print("pub(super) const CHANGES: [u32; %d] = [" % len(starts))
for i in range(0, len(starts), 12):
    print("    " + " ".join("%d," % s for s in starts[i : i + 12]))
print("];")
