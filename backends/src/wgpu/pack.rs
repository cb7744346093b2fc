//! How matrices lie in GPU memory: repacked at load, without loss, so that neighbouring lanes read neighbouring words.
//!
//! A row is a sequence of blocks: 32 columns of a quantised matrix, 8 of a floating one. Codes, the codes' high bits,
//! scales and the super-blocks' scales are four streams, each with all rows of the matrix behind each other. Rows are
//! padded with zeros to whole blocks of 32 columns.
use crate::gguf::GgmlType;
use crate::quant::{self, IQ4_STEPS};

/// Columns that a row is padded to, and columns in a block of quantised activations.
pub const BLOCK: usize = 32;

/// How a block's codes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    F32,
    F16,
    BF16,
    /// Byte `k` has column `k` below and `16 + k` above.
    N4,
    /// `N4`, and a word whose byte `i` has, as bit `j`, bit 4 of column `4j + i`.
    N5,
    /// `N4`, and two words; byte `i` of word `m` has, as bits `2j, 2j + 1`, bits 4 and 5 of column `16m + 4j + i`.
    N6,
    /// Byte `k` is column `k`, signed.
    N8,
}

/// How codes become values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scales {
    /// They are values.
    None,
    /// An f16 a block; with a minimum, a word of two.
    Half,
    /// A word of two f16 (scale, minimum) for eight blocks, and two signed bytes (scale, minimum) a block.
    Byte32,
    /// The same with a byte for each half block; with minima, four bytes (two scales, two minima).
    Byte16,
}

/// A packed number format: `value = scale * (code - zero) + minimum`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    pub codes: Codes,
    pub scales: Scales,
    pub zero: i32,
    pub min: bool,
}

/// Words of one row in each stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowWords {
    pub codes: usize,
    pub high: usize,
    pub scales: usize,
    pub supers: usize,
}

impl Format {
    /// The format that holds `ty`; none for an unknown one.
    pub fn of(ty: GgmlType) -> Option<Format> {
        let format = |codes, scales, zero, min| Some(Format { codes, scales, zero, min });
        match ty {
            GgmlType::F32 => format(Codes::F32, Scales::None, 0, false),
            GgmlType::F16 => format(Codes::F16, Scales::None, 0, false),
            GgmlType::BF16 => format(Codes::BF16, Scales::None, 0, false),
            GgmlType::Q4_0 => format(Codes::N4, Scales::Half, 8, false),
            GgmlType::Q4_1 => format(Codes::N4, Scales::Half, 0, true),
            GgmlType::Q5_0 => format(Codes::N5, Scales::Half, 16, false),
            GgmlType::Q5_1 => format(Codes::N5, Scales::Half, 0, true),
            GgmlType::Q8_0 | GgmlType::IQ4_NL => format(Codes::N8, Scales::Half, 0, false),
            GgmlType::Q2_K => format(Codes::N4, Scales::Byte16, 0, true),
            GgmlType::Q3_K => format(Codes::N4, Scales::Byte16, 4, false),
            GgmlType::Q4_K => format(Codes::N4, Scales::Byte32, 0, true),
            GgmlType::Q5_K => format(Codes::N5, Scales::Byte32, 0, true),
            GgmlType::Q6_K => format(Codes::N6, Scales::Byte16, 32, false),
            GgmlType::IQ4_XS => format(Codes::N8, Scales::Byte16, 0, false),
            GgmlType::Unknown(_) => None,
        }
    }

    /// Values as they are.
    pub const F32: Format = Format { codes: Codes::F32, scales: Scales::None, zero: 0, min: false };

    /// Whether activations stay in f32.
    pub fn floating(self) -> bool {
        self.scales == Scales::None
    }

    /// Columns of a block.
    pub fn block(self) -> usize {
        if self.floating() { 8 } else { BLOCK }
    }

    /// Words of one row of `cols` columns, a multiple of [`BLOCK`].
    pub fn row_words(self, cols: usize) -> RowWords {
        let blocks = cols / self.block();
        let codes = match self.codes {
            Codes::F32 | Codes::N8 => 8,
            Codes::F16 | Codes::BF16 | Codes::N4 | Codes::N5 | Codes::N6 => 4,
        };
        let high = match self.codes {
            Codes::N5 => 1,
            Codes::N6 => 2,
            _ => 0,
        };
        let scales = match (self.scales, self.min) {
            (Scales::None, _) => 0,
            (Scales::Half, true) | (Scales::Byte16, true) => blocks,
            _ => blocks.div_ceil(2),
        };
        let supers = match self.scales {
            Scales::Byte16 | Scales::Byte32 => blocks / 8,
            _ => 0,
        };
        RowWords { codes: codes * blocks, high: high * blocks, scales, supers }
    }
}

impl RowWords {
    /// Of all streams.
    pub fn sum(self) -> usize {
        self.codes + self.high + self.scales + self.supers
    }
}

/// Where one packed row goes: a slice a stream, in bytes.
pub struct Row<'a> {
    pub codes: &'a mut [u8],
    pub high: &'a mut [u8],
    pub scales: &'a mut [u8],
    pub supers: &'a mut [u8],
}

/// Packs one row of `cols` values; what lies beyond in `out` must be zero.
pub fn pack_row(ty: GgmlType, format: Format, bytes: &[u8], cols: usize, out: &mut Row<'_>) {
    match format.codes {
        Codes::F32 if ty != GgmlType::F32 => {
            let mut values = vec![0f32; cols];
            quant::dequantize(ty, bytes, &mut values);
            for (to, value) in out.codes.chunks_exact_mut(4).zip(values) {
                to.copy_from_slice(&value.to_le_bytes());
            }
        }
        Codes::F32 | Codes::F16 | Codes::BF16 => out.codes[..bytes.len()].copy_from_slice(bytes),
        _ => {
            let per = ty.block_values() / BLOCK;
            for (i, source) in bytes.chunks_exact(ty.block_bytes()).enumerate() {
                for j in 0..per {
                    put(format, &block(ty, source, j), per * i + j, out);
                }
            }
        }
    }
}

/// 32 columns of any quantised type.
struct Block {
    codes: [u8; 32],
    /// Bits of the f16 scale and minimum, the minimum to be added.
    d: u16,
    m: u16,
    /// Bytes that multiply the scale, and the minimum, for each half.
    s: [u8; 2],
    n: [u8; 2],
}

fn word16(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn nibbles(q: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| if i < 16 { q[i] & 15 } else { q[i - 16] >> 4 })
}

/// Sub-block `j` of 32 columns of a block; the layouts are [`quant`]'s.
fn block(ty: GgmlType, b: &[u8], j: usize) -> Block {
    const NEGATE: u16 = 0x8000;
    let plain = |codes, m| Block { codes, d: word16(b, 0), m, s: [1; 2], n: [1; 2] };
    let with_bits = |q: [u8; 32], h: &[u8]| std::array::from_fn(|i| q[i] | (h[i / 8] >> (i % 8) & 1) << 4);
    // Two-bit and four-bit codes that lie interleaved in the K types.
    let pair = |q: &[u8], i: usize| q[j / 4 * 32 + i] >> (j % 4 * 2) & 3;
    let four = |q: &[u8], i: usize| q[j / 2 * 32 + i] >> (j % 2 * 4) & 15;
    match ty {
        GgmlType::Q4_0 => plain(nibbles(&b[2..]), 0),
        GgmlType::Q4_1 => plain(nibbles(&b[4..]), word16(b, 2)),
        GgmlType::Q5_0 => plain(with_bits(nibbles(&b[6..]), &b[2..6]), 0),
        GgmlType::Q5_1 => plain(with_bits(nibbles(&b[8..]), &b[4..8]), word16(b, 2)),
        GgmlType::Q8_0 => plain(std::array::from_fn(|i| b[2 + i]), 0),
        GgmlType::IQ4_NL => plain(nibbles(&b[2..]).map(|q| IQ4_STEPS[usize::from(q)] as u8), 0),
        GgmlType::Q2_K => Block {
            codes: std::array::from_fn(|i| pair(&b[16..80], i)),
            d: word16(b, 80),
            m: word16(b, 82) ^ NEGATE,
            s: [b[2 * j] & 15, b[2 * j + 1] & 15],
            n: [b[2 * j] >> 4, b[2 * j + 1] >> 4],
        },
        GgmlType::Q3_K => {
            let scale = |j: usize| {
                let low = if j < 8 { b[96 + j] & 15 } else { b[88 + j] >> 4 };
                (low | (b[104 + j % 4] >> (j / 4 * 2) & 3) << 4).wrapping_sub(32)
            };
            Block {
                codes: std::array::from_fn(|i| pair(&b[32..96], i) | (b[i] >> j & 1) << 2),
                d: word16(b, 108),
                m: 0,
                s: [scale(2 * j), scale(2 * j + 1)],
                n: [0; 2],
            }
        }
        GgmlType::Q4_K | GgmlType::Q5_K => {
            let s = &b[4..16];
            let (scale, min) = if j < 4 {
                (s[j] & 63, s[j + 4] & 63)
            } else {
                (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4)
            };
            let codes = if ty == GgmlType::Q4_K {
                std::array::from_fn(|i| four(&b[16..144], i))
            } else {
                std::array::from_fn(|i| four(&b[48..176], i) | (b[16 + i] >> j & 1) << 4)
            };
            Block { codes, d: word16(b, 0), m: word16(b, 2) ^ NEGATE, s: [scale, min], n: [0; 2] }
        }
        GgmlType::Q6_K => {
            let code = |i: usize| {
                let at = 32 * j + i;
                let low = b[at / 128 * 64 + at % 64] >> (at % 128 / 64 * 4) & 15;
                low | (b[128 + at / 128 * 32 + at % 32] >> (at % 128 / 32 * 2) & 3) << 4
            };
            let s = [b[192 + 2 * j], b[193 + 2 * j]];
            Block { codes: std::array::from_fn(code), d: word16(b, 208), m: 0, s, n: [0; 2] }
        }
        GgmlType::IQ4_XS => {
            let scale = b[4 + j / 2] >> (j % 2 * 4) & 15 | (b[2 + j / 4] >> (j % 4 * 2) & 3) << 4;
            let codes = nibbles(&b[8 + 16 * j..]).map(|q| IQ4_STEPS[usize::from(q)] as u8);
            Block { codes, d: word16(b, 0), m: 0, s: [scale.wrapping_sub(32); 2], n: [0; 2] }
        }
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 | GgmlType::Unknown(_) => {
            unreachable!("{ty} has no codes")
        }
    }
}

/// Writes block `b` of a row.
fn put(format: Format, block: &Block, b: usize, out: &mut Row<'_>) {
    let q = &block.codes;
    if format.codes == Codes::N8 {
        out.codes[32 * b..][..32].copy_from_slice(q);
    } else {
        (0..16).for_each(|k| out.codes[16 * b + k] = q[k] & 15 | q[k + 16] << 4);
    }
    let bits = |of: &dyn Fn(usize) -> u8| (0..4).map(of).fold(0, |byte, bits| byte | bits);
    match format.codes {
        Codes::N5 => (0..4).for_each(|i| {
            let high = |j: usize| (q[4 * j + i] >> 4 & 1) << j;
            out.high[4 * b + i] = bits(&high) | bits(&|j| high(j + 4));
        }),
        Codes::N6 => (0..8).for_each(|at| {
            let (m, i) = (at / 4, at % 4);
            out.high[8 * b + at] = bits(&|j| (q[16 * m + 4 * j + i] >> 4 & 3) << (2 * j));
        }),
        _ => {}
    }
    let mut scales = |at: usize, bytes: &[u8]| out.scales[at..at + bytes.len()].copy_from_slice(bytes);
    match (format.scales, format.min) {
        (Scales::None, _) => {}
        (Scales::Half, false) => scales(2 * b, &block.d.to_le_bytes()),
        (Scales::Half, true) => {
            scales(4 * b, &block.d.to_le_bytes());
            scales(4 * b + 2, &block.m.to_le_bytes());
        }
        (Scales::Byte16, true) => {
            scales(4 * b, &block.s);
            scales(4 * b + 2, &block.n);
        }
        (Scales::Byte16 | Scales::Byte32, _) => scales(2 * b, &block.s),
    }
    if matches!(format.scales, Scales::Byte16 | Scales::Byte32) {
        out.supers[b / 8 * 4..][..2].copy_from_slice(&block.d.to_le_bytes());
        out.supers[b / 8 * 4 + 2..][..2].copy_from_slice(&block.m.to_le_bytes());
    }
}
