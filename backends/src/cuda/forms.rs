//! How matrices lie in GPU memory: tiles of 16 rows by 64 columns, each the operand of a tensor core. The kernels that
//! read and write them are `gemm.cu` and `pack.cu`.
use crate::gguf::GgmlType;

/// Columns of a tile.
pub const PAIR: usize = 64;
/// Rows of a tile.
pub const TILE: usize = 16;
/// Tile rows of a thread block that takes many columns, `WARPS` of `gemm.cu`.
pub const WIDE_TILES: usize = 8;
/// Columns that it takes, `WIDE`.
pub const WIDE: usize = 64;
/// Its shared memory: the sums, or four stages of inputs, whichever is more.
pub const WIDE_SHARED: usize = WIDE_TILES * WIDE * 20 * 4;

/// A tile's storage; the numbers are those of `gemm.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    Q4_0 = 0,
    Q4_1 = 1,
    Q5_0 = 2,
    Q5_1 = 3,
    Q8_0 = 4,
    Q4K = 5,
    Q5K = 6,
    Q6K = 7,
    /// Bytes, a small scale for 16 of them and a half for 256.
    Q8K16 = 8,
    BF16 = 9,
    F16 = 10,
    /// Three bf16 that add up to an f32.
    F32 = 11,
}

impl Form {
    #[cfg(test)]
    pub const ALL: [Form; 12] = [
        Form::Q4_0,
        Form::Q4_1,
        Form::Q5_0,
        Form::Q5_1,
        Form::Q8_0,
        Form::Q4K,
        Form::Q5K,
        Form::Q6K,
        Form::Q8K16,
        Form::BF16,
        Form::F16,
        Form::F32,
    ];

    /// The form that holds a type without loss. Types without one of their own become f32.
    pub fn of(ty: GgmlType) -> Form {
        match ty {
            GgmlType::Q4_0 => Form::Q4_0,
            GgmlType::Q4_1 => Form::Q4_1,
            GgmlType::Q5_0 => Form::Q5_0,
            GgmlType::Q5_1 => Form::Q5_1,
            GgmlType::Q8_0 | GgmlType::IQ4_NL => Form::Q8_0,
            GgmlType::Q4_K => Form::Q4K,
            GgmlType::Q5_K => Form::Q5K,
            GgmlType::Q6_K | GgmlType::Q3_K => Form::Q6K,
            GgmlType::IQ4_XS => Form::Q8K16,
            GgmlType::BF16 => Form::BF16,
            GgmlType::F16 => Form::F16,
            _ => Form::F32,
        }
    }

    /// Whether `pack.cu` reads the type itself; others reach it as f32.
    pub fn packs(self, ty: GgmlType) -> bool {
        self != Form::F32 || ty == GgmlType::F32
    }

    pub fn is_half(self) -> bool {
        matches!(self, Form::BF16 | Form::F16 | Form::F32)
    }

    /// Which form of its input a product reads: `AS_BYTES`, `AS_BF16`, `AS_F16` of `common.cu`.
    pub fn input(self) -> u32 {
        match self {
            Form::F16 => 4,
            Form::BF16 | Form::F32 => 2,
            _ => 1,
        }
    }

    /// Words of 16 bytes that a lane reads of a tile.
    fn words(self) -> usize {
        match self {
            Form::F32 => 12,
            Form::BF16 | Form::F16 => 4,
            Form::Q8_0 | Form::Q8K16 => 2,
            _ => 1,
        }
    }

    /// Bytes of a matrix in each of its four arrays.
    pub fn bytes(self, tiles: usize, pairs: usize) -> [usize; 4] {
        let n = tiles * pairs;
        let high = match self {
            Form::Q5_0 | Form::Q5_1 | Form::Q5K => 1,
            Form::Q6K => 2,
            _ => 0,
        };
        let scales = match self {
            _ if self.is_half() => 0,
            Form::Q4_1 | Form::Q5_1 => 16,
            _ => 8,
        };
        let supers = match self {
            Form::Q4K | Form::Q5K => 8,
            Form::Q6K | Form::Q8K16 => 4,
            _ => 0,
        };
        [n * self.words() * 512, n * high * 128, n * scales * 8, tiles * pairs.div_ceil(4) * supers * 8]
    }
}

/// How a product is dealt out: `mt` tile rows a thread block, the columns in `segs` segments of `seg` pairs. Depends on
/// the matrices alone, since it is the order of their sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Split {
    pub mt: usize,
    pub segs: usize,
    pub seg: usize,
}

impl Split {
    /// For `tiles` tile rows in all.
    pub fn new(tiles: usize, pairs: usize, mt: usize) -> Split {
        // warps that keep a large GPU's memory busy
        const WARPS: usize = 132 * 32;
        let wanted = 1 << (WARPS / tiles.max(1)).max(1).ilog2();
        let seg = pairs.div_ceil(wanted.clamp(2, 32 / mt).min(pairs));
        Split { mt, segs: pairs.div_ceil(seg), seg }
    }

    pub fn threads(&self) -> usize {
        self.mt * self.segs * 32
    }

    /// Shared memory for `nt` tiles of eight columns.
    pub fn shared(&self, nt: usize) -> usize {
        self.mt * self.segs * TILE * nt * 8 * 4
    }

    /// Thread blocks for a matrix of `rows` rows: with few columns, with many.
    pub fn units(&self, rows: usize) -> [usize; 2] {
        [rows.div_ceil(TILE * self.mt), rows.div_ceil(TILE * WIDE_TILES)]
    }
}
