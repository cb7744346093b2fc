//! How weights lie in memory: repacked at load, bit-exactly, so that sixteen rows are computed at once.
//!
//! A matrix is cut into panels of 16 rows; lane `l` of every vector belongs to row `l` of the panel, so no product needs
//! a horizontal sum, and a panel is read as one forward stream. Along the columns a panel is a sequence of units: one
//! block of 32 columns, or, for the K-quants, eight of them with a shared scale. A block holds the codes
//! of 16 rows x 32 columns in groups of four columns (a lane's four bytes meet four activations in one
//! instruction), followed by its scales.
use super::simd::LANES;
use crate::gguf::GgmlType;
use half::{bf16, f16};

/// Columns in a block, and in one block of quantised activations.
pub const BLOCK: usize = 32;

/// How a block's codes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// 4 bits: byte `[k][lane][i]` has column `4k+i` below and `16+4k+i` above. 256 bytes.
    N4,
    /// `N4`, then byte `[lane][i]` whose bit `j` is bit 4 of column `4j+i`. 320 bytes.
    N5,
    /// `N4`, then byte `[m][lane][i]` whose bits `2j, 2j+1` are bits 4 and 5 of column `16m+4j+i`. 384 bytes.
    N6,
    /// Byte `[j][lane][i]` is column `4j+i`. 512 bytes.
    N8,
}

impl Codes {
    /// Bytes of one block.
    pub const fn bytes(self) -> usize {
        match self {
            Codes::N4 => 256,
            Codes::N5 => 320,
            Codes::N6 => 384,
            Codes::N8 => 512,
        }
    }

    /// Writes one row of a block: byte `i` of word `j` is the code of column `4j+i`.
    fn put(self, block: &mut [u8], lane: usize, words: &[u32; 8]) {
        let mut word = |at: usize, w: u32| block[at + 4 * lane..][..4].copy_from_slice(&w.to_le_bytes());
        if self == Codes::N8 {
            return (0..8).for_each(|j| word(64 * j, words[j]));
        }
        const LOW: u32 = 0x0f0f_0f0f;
        (0..4).for_each(|k| word(64 * k, (words[k] & LOW) | ((words[k + 4] & LOW) << 4)));
        match self {
            Codes::N5 => word(256, (0..8).fold(0, |h, j| h | (((words[j] >> 4) & 0x0101_0101) << j))),
            Codes::N6 => (0..2).for_each(|m| {
                let bits = |h, j: usize| h | (((words[4 * m + j] >> 4) & 0x0303_0303) << (2 * j));
                word(256 + 64 * m, (0..4).fold(0, bits));
            }),
            Codes::N4 | Codes::N8 => {}
        }
    }

    /// The code of one column of one row.
    fn get(self, block: &[u8], lane: usize, col: usize) -> u8 {
        let (j, i) = (col / 4, col % 4);
        let at = |k: usize| block[64 * k + 4 * lane + i];
        let low = || (at(j % 4) >> (4 * (j / 4))) & 15;
        match self {
            Codes::N8 => at(j),
            Codes::N4 => low(),
            Codes::N5 => low() | (((at(4) >> j) & 1) << 4),
            Codes::N6 => low() | (((at(4 + j / 4) >> (2 * (j % 4))) & 3) << 4),
        }
    }
}

/// How a block's codes become values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// One f16 per row behind each block, and one f16 minimum where there are minima.
    Half,
    /// A unit of eight blocks: an f16 a row in front (and one for minima), one byte a row behind each block (and one for
    /// the minimum).
    Byte32,
    /// As `Byte32` with a byte for each half block.
    Byte16,
}

/// A packed number format. `value = scale * (lut(code) - zero) - min`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Of the codes.
    pub codes: Codes,
    /// Of the scales.
    pub scales: Scales,
    /// Added to codes to make them unsigned. 128: the code is any byte, see [`super::simd::Simd::dot8`].
    pub zero: i32,
    /// Whether minima are stored.
    pub min: bool,
    /// Codes index [`IQ4`].
    pub lut: bool,
}

/// The values of the IQ4 types, 128 added.
pub const IQ4: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

impl Layout {
    /// Blocks in a unit.
    pub const fn blocks(&self) -> usize {
        if matches!(self.scales, Scales::Half) { 1 } else { 8 }
    }
    /// Bytes of the f16 scales (and minima) in front of a unit.
    pub const fn front(&self) -> usize {
        if matches!(self.scales, Scales::Half) { 0 } else { self.with_min(2 * LANES) }
    }
    /// Bytes of one block with the scales behind it.
    pub const fn block_bytes(&self) -> usize {
        let scales = match self.scales {
            Scales::Half | Scales::Byte16 => 2 * LANES,
            Scales::Byte32 => LANES,
        };
        self.codes.bytes() + self.with_min(scales)
    }
    /// Bytes of a unit.
    pub const fn unit_bytes(&self) -> usize {
        self.front() + self.blocks() * self.block_bytes()
    }
    const fn with_min(&self, bytes: usize) -> usize {
        if self.min { 2 * bytes } else { bytes }
    }
}

/// What a panel holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Kind {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    F16,
    Bf16,
    F32,
}

impl Kind {
    /// How a type of the file is held here. Q3_K is held as Q6_K, whose codes and scales contain its own.
    pub fn of(ty: GgmlType) -> Option<Kind> {
        Some(match ty {
            GgmlType::F32 => Kind::F32,
            GgmlType::F16 => Kind::F16,
            GgmlType::BF16 => Kind::Bf16,
            GgmlType::Q4_0 => Kind::Q4_0,
            GgmlType::Q4_1 => Kind::Q4_1,
            GgmlType::Q5_0 => Kind::Q5_0,
            GgmlType::Q5_1 => Kind::Q5_1,
            GgmlType::Q8_0 => Kind::Q8_0,
            GgmlType::Q2_K => Kind::Q2K,
            GgmlType::Q3_K | GgmlType::Q6_K => Kind::Q6K,
            GgmlType::Q4_K => Kind::Q4K,
            GgmlType::Q5_K => Kind::Q5K,
            GgmlType::IQ4_NL => Kind::Iq4Nl,
            GgmlType::IQ4_XS => Kind::Iq4Xs,
            _ => return None,
        })
    }

    /// The layout; none for floats, whose panels are `[col][lane]`.
    pub const fn layout(self) -> Option<Layout> {
        const fn l(codes: Codes, scales: Scales, zero: i32, min: bool, lut: bool) -> Option<Layout> {
            Some(Layout { codes, scales, zero, min, lut })
        }
        match self {
            Kind::Q4_0 => l(Codes::N4, Scales::Half, 8, false, false),
            Kind::Q4_1 => l(Codes::N4, Scales::Half, 0, true, false),
            Kind::Q5_0 => l(Codes::N5, Scales::Half, 16, false, false),
            Kind::Q5_1 => l(Codes::N5, Scales::Half, 0, true, false),
            Kind::Q8_0 => l(Codes::N8, Scales::Half, 128, false, false),
            Kind::Q2K => l(Codes::N4, Scales::Byte16, 0, true, false),
            Kind::Q4K => l(Codes::N4, Scales::Byte32, 0, true, false),
            Kind::Q5K => l(Codes::N5, Scales::Byte32, 0, true, false),
            Kind::Q6K => l(Codes::N6, Scales::Byte16, 32, false, false),
            Kind::Iq4Nl => l(Codes::N4, Scales::Half, 128, false, true),
            Kind::Iq4Xs => l(Codes::N4, Scales::Byte32, 128, false, true),
            Kind::F16 | Kind::Bf16 | Kind::F32 => None,
        }
    }

    /// Bytes of a panel of `cols` columns.
    pub fn panel_bytes(self, cols: usize) -> usize {
        match (self.layout(), self) {
            (Some(l), _) => cols / (BLOCK * l.blocks()) * l.unit_bytes(),
            (None, Kind::F32) => 4 * LANES * cols,
            (None, _) => 2 * LANES * cols,
        }
    }
}

/// One row of one unit, taken apart. Only what the type has is filled.
#[derive(Default)]
struct Unit {
    words: [[u32; 8]; 8],
    d: [u8; 2],
    min: [u8; 2],
    /// Index `2 * block + half` for types with a scale a half block, `block` otherwise.
    scale: [u8; 16],
    mins: [u8; 16],
}

fn word(b: &[u8], j: usize) -> u32 {
    u32::from_le_bytes([b[4 * j], b[4 * j + 1], b[4 * j + 2], b[4 * j + 3]])
}

const LOW4: u32 = 0x0f0f_0f0f;

fn nibbles(qs: &[u8]) -> [u32; 8] {
    std::array::from_fn(|j| (word(qs, j % 4) >> (4 * (j / 4))) & LOW4)
}

/// Adds bit `c` of `high` as bit 4 of column `c`.
fn with_fifth_bit(mut words: [u32; 8], high: u32) -> [u32; 8] {
    for (j, w) in words.iter_mut().enumerate() {
        let four = (high >> (4 * j)) & 15;
        // spread bits 0..4 to bit 4 of bytes 0..4
        *w |= ((four * 0x0020_4081) & 0x0101_0101) << 4;
    }
    words
}

/// The eight 6-bit scales and minima of Q4_K and Q5_K (ggml's get_scale_min_k4).
fn scales_k4(s: &[u8], u: &mut Unit) {
    for j in 0..4 {
        u.scale[j] = s[j] & 63;
        u.mins[j] = s[j + 4] & 63;
        u.scale[j + 4] = (s[j + 8] & 15) | ((s[j] >> 6) << 4);
        u.mins[j + 4] = (s[j + 8] >> 4) | ((s[j + 4] >> 6) << 4);
    }
}

fn two(b: &[u8]) -> [u8; 2] {
    [b[0], b[1]]
}

/// Takes one unit of one row apart; `b` is one ggml block of `ty`. Layouts as in ggml-quants.
fn take_apart(ty: GgmlType, b: &[u8], u: &mut Unit) {
    match ty {
        GgmlType::Q4_0 | GgmlType::IQ4_NL => (u.d, u.words[0]) = (two(b), nibbles(&b[2..])),
        GgmlType::Q4_1 => (u.d, u.min, u.words[0]) = (two(b), two(&b[2..]), nibbles(&b[4..])),
        GgmlType::Q5_0 => (u.d, u.words[0]) = (two(b), with_fifth_bit(nibbles(&b[6..]), word(&b[2..], 0))),
        GgmlType::Q5_1 => {
            (u.d, u.min) = (two(b), two(&b[2..]));
            u.words[0] = with_fifth_bit(nibbles(&b[8..]), word(&b[4..], 0));
        }
        GgmlType::Q8_0 => {
            u.d = two(b);
            u.words[0] = std::array::from_fn(|j| word(&b[2..], j) ^ 0x8080_8080);
        }
        GgmlType::Q4_K | GgmlType::Q5_K => {
            (u.d, u.min) = (two(b), two(&b[2..]));
            scales_k4(&b[4..16], u);
            let (high, qs) =
                if ty == GgmlType::Q5_K { (Some(&b[16..48]), &b[48..]) } else { (None, &b[16..]) };
            for s in 0..8 {
                let q = &qs[32 * (s / 2)..];
                u.words[s] = std::array::from_fn(|j| {
                    let fifth = high.map_or(0, |h| ((word(h, j) >> s) & 0x0101_0101) << 4);
                    ((word(q, j) >> (4 * (s % 2))) & LOW4) | fifth
                });
            }
        }
        GgmlType::Q6_K => {
            u.d = two(&b[208..]);
            u.scale.copy_from_slice(&b[192..208]);
            for s in 0..8 {
                let (half, s4) = (s / 4, s % 4);
                let (ql, qh) = (&b[64 * half + 32 * (s4 % 2)..], &b[128 + 32 * half..]);
                u.words[s] = std::array::from_fn(|j| {
                    let low = (word(ql, j) >> (4 * (s4 / 2))) & LOW4;
                    low | (((word(qh, j) >> (2 * s4)) & 0x0303_0303) << 4)
                });
            }
        }
        GgmlType::Q3_K => take_apart_q3k(b, u),
        GgmlType::Q2_K => {
            (u.d, u.min) = (two(&b[80..]), two(&b[82..]));
            for (i, s) in b[..16].iter().enumerate() {
                (u.scale[i], u.mins[i]) = (s & 15, s >> 4);
            }
            for s in 0..8 {
                let q = &b[16 + 32 * (s / 4)..];
                u.words[s] = std::array::from_fn(|j| (word(q, j) >> (2 * (s % 4))) & 0x0303_0303);
            }
        }
        GgmlType::IQ4_XS => {
            u.d = two(b);
            let high = u16::from_le_bytes(two(&b[2..]));
            for s in 0..8 {
                let low = (b[4 + s / 2] >> (4 * (s % 2))) & 15;
                let six = low | ((((high >> (2 * s)) & 3) as u8) << 4);
                u.scale[s] = six.wrapping_sub(32);
                u.words[s] = nibbles(&b[8 + 16 * s..]);
            }
        }
        _ => unreachable!("floats are not taken apart"),
    }
}

/// Q3_K: two low bits in `qs`, the third (inverted: its absence subtracts 4) in `hmask`, 6-bit scales less 32.
fn take_apart_q3k(b: &[u8], u: &mut Unit) {
    let (mask, qs, sc) = (&b[..32], &b[32..96], &b[96..108]);
    u.d = two(&b[108..]);
    for i in 0..16 {
        let low = (sc[i % 8] >> (4 * (i / 8))) & 15;
        let high = (sc[8 + i % 4] >> (2 * (i / 4))) & 3;
        u.scale[i] = (low | (high << 4)).wrapping_sub(32);
    }
    for s in 0..8 {
        let q = &qs[32 * (s / 4)..];
        u.words[s] = std::array::from_fn(|j| {
            let low = (word(q, j) >> (2 * (s % 4))) & 0x0303_0303;
            let third = (word(mask, j) >> s) & 0x0101_0101;
            // value + 32 = low + 4 * third - 4 + 32
            low + 4 * third + 0x1c1c_1c1c
        });
    }
}

/// Packs 16 rows: `rows` holds `n <= 16` rows of the file one after the other, `out` is a panel. Rows that are not there
/// become zeros.
pub fn pack_panel(ty: GgmlType, cols: usize, rows: &[u8], out: &mut [u8]) {
    let Some(kind) = Kind::of(ty) else { unreachable!("checked when the matrix was planned") };
    let row_bytes = cols / ty.block_values() * ty.block_bytes();
    let n = rows.len() / row_bytes;
    out.fill(0);
    let Some(l) = kind.layout() else {
        let size = ty.block_bytes();
        for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
            for (c, v) in row.chunks_exact(size).enumerate() {
                out[(c * LANES + lane) * size..][..size].copy_from_slice(v);
            }
        }
        return;
    };
    let mut u = Unit::default();
    for (i, unit) in out.chunks_exact_mut(l.unit_bytes()).enumerate() {
        for lane in 0..n {
            take_apart(ty, &rows[lane * row_bytes + i * ty.block_bytes()..][..ty.block_bytes()], &mut u);
            put_unit(&l, unit, lane, &u);
        }
    }
}

fn put_unit(l: &Layout, unit: &mut [u8], lane: usize, u: &Unit) {
    let codes = l.codes.bytes();
    let halves = |unit: &mut [u8], at: usize| {
        unit[at + 2 * lane..][..2].copy_from_slice(&u.d);
        if l.min {
            unit[at + 2 * LANES + 2 * lane..][..2].copy_from_slice(&u.min);
        }
    };
    halves(unit, if l.scales == Scales::Half { codes } else { 0 });
    for b in 0..l.blocks() {
        let block = &mut unit[l.front() + b * l.block_bytes()..][..l.block_bytes()];
        l.codes.put(block, lane, &u.words[b]);
        let per = match l.scales {
            Scales::Half => continue,
            Scales::Byte32 => 1,
            Scales::Byte16 => 2,
        };
        for h in 0..per {
            block[codes + h * LANES + lane] = u.scale[per * b + h];
            if l.min {
                block[codes + (per + h) * LANES + lane] = u.mins[per * b + h];
            }
        }
    }
}

/// The values of one row of a panel: `out` has `cols` elements. The inverse of packing, for embeddings and tests.
pub fn unpack_row(kind: Kind, panel: &[u8], lane: usize, out: &mut [f32]) {
    let half_at = |b: &[u8], at: usize| f16::from_le_bytes(two(&b[at + 2 * lane..])).to_f32();
    let Some(l) = kind.layout() else {
        for (c, v) in out.iter_mut().enumerate() {
            let i = c * LANES + lane;
            *v = match kind {
                Kind::F16 => f16::from_le_bytes(two(&panel[2 * i..])).to_f32(),
                Kind::Bf16 => bf16::from_le_bytes(two(&panel[2 * i..])).to_f32(),
                _ => f32::from_bits(word(panel, i)),
            };
        }
        return;
    };
    let codes = l.codes.bytes();
    let blocks = panel.chunks_exact(l.unit_bytes()).flat_map(|unit| (0..l.blocks()).map(move |b| (unit, b)));
    for ((unit, b), out) in blocks.zip(out.chunks_exact_mut(BLOCK)) {
        let block = &unit[l.front() + b * l.block_bytes()..][..l.block_bytes()];
        for (c, v) in out.iter_mut().enumerate() {
            let code = l.codes.get(block, lane, c);
            let q = i32::from(if l.lut { IQ4[usize::from(code)] } else { code }) - l.zero;
            let per = if l.scales == Scales::Byte16 { 2 } else { 1 };
            let byte = |k: usize| block[codes + k * LANES + lane];
            let h = per * c / BLOCK;
            let (scale, min) = if l.scales == Scales::Half {
                (half_at(block, codes), if l.min { -half_at(block, codes + 2 * LANES) } else { 0.0 })
            } else {
                let s = half_at(unit, 0)
                    * if l.min { f32::from(byte(h)) } else { f32::from(byte(h).cast_signed()) };
                (s, if l.min { half_at(unit, 2 * LANES) * f32::from(byte(per + h)) } else { 0.0 })
            };
            *v = scale * q as f32 - min;
        }
    }
}
