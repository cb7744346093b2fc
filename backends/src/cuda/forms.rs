//! How matrices lie in GPU memory: tiles of 16 rows by 64 columns, each the operand of a tensor core. The kernels that
//! read and write them are `gemm.cu` and `pack.cu`.
use crate::gguf::GgmlType;

/// Columns of a tile.
pub const PAIR: usize = 64;
/// Rows of a tile.
pub const TILE: usize = 16;
/// Tile rows of a thread block that takes many columns, `TILES` of `wide.cu`.
pub const WIDE_TILES: usize = 8;
/// Its threads.
pub const WIDE_THREADS: usize = 512;
/// Columns that it takes, `WIDE`.
pub const WIDE: usize = 128;
/// Floats of a segment's sums in such a thread block.
pub const WIDE_SUMS: usize = WIDE_TILES * TILE * WIDE;
/// Most columns that each kernel for few columns takes.
pub const WIDTHS: [usize; 4] = [1, 8, 16, 32];
/// Columns of a thread block of each kernel for prompts.
pub const PROMPT_WIDTHS: [usize; 2] = [32, 128];
/// Its threads: eight warps that multiply, one that fetches inputs, two that find the columns' factors.
pub const PROMPT_THREADS: usize = 352;
/// Rows of a prompt whose inputs lie together.
pub const PROMPT_ROWS: usize = 128;
/// `AS_PROMPT` of `common.cu`.
pub const AS_PROMPT: u32 = 32;

/// Shared memory of a kernel for prompts of `columns` columns, `prompt_room` of `prompt.cu`.
pub fn prompt_shared(columns: usize) -> usize {
    let stages = if columns > 64 { 6 } else { 8 };
    (stages * columns * 128).max(WIDE_TILES * columns * 20 * 4) + 1024 + 128
}

/// What generated kernels are fitted to.
#[derive(Clone, Copy, Debug)]
pub struct Chip {
    /// Bytes of shared memory that a thread block can have.
    pub shared: usize,
    /// Multiprocessors.
    pub processors: usize,
}

impl Chip {
    /// Bytes for the stages of a product of many columns, `WIDE_ROOM`; some is left for what is declared in place.
    pub fn wide_room(self) -> usize {
        self.shared - 2048
    }
}

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

    /// Whether prompts can be multiplied in bf16, no coarser than the weights or the inputs of decoding.
    pub fn widens(self) -> bool {
        !matches!(self, Form::F16 | Form::F32)
    }

    /// Which forms of its input a product reads: `AS_BYTES` and its like of `common.cu`.
    pub fn input(self) -> u32 {
        match self {
            Form::F16 => 4,
            Form::BF16 | Form::F32 => 2,
            Form::Q4K | Form::Q5K => 1 | 16,
            Form::Q4_0 | Form::Q4_1 | Form::Q5_0 | Form::Q5_1 => 1 | 8,
            Form::Q8_0 | Form::Q6K | Form::Q8K16 => 1,
        }
    }

    /// Bytes of a pair of a tile row in shared memory, `Piece` of `gemm.cu`.
    fn piece(self) -> usize {
        self.bytes(1, 1).iter().sum()
    }

    /// Bytes of a stage of a product of many columns, `Stage` of `wide.cu`.
    fn stage(self) -> usize {
        let column = match self {
            Form::F16 => 136,
            Form::BF16 | Form::F32 => 128,
            Form::Q8_0 | Form::Q6K | Form::Q8K16 => 72,
            _ => 80,
        };
        WIDE_TILES * self.piece() + WIDE * column
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
    /// For `tiles` tile rows in all, `pairs` wide.
    pub fn new(tiles: usize, pairs: usize, mt: usize) -> Split {
        // warps that keep a large GPU's memory busy
        const WARPS: usize = 132 * 32;
        let wanted = 1 << (WARPS / tiles.max(1)).max(1).ilog2();
        let seg = pairs.div_ceil(wanted.clamp(2, 32 / mt).min(pairs));
        Split { mt, segs: pairs.div_ceil(seg), seg }
    }

    /// Segments that a warp takes, one after another, of the kernel for up to `columns` columns.
    pub fn rounds(&self, columns: usize) -> usize {
        if columns > 8 && self.mt * self.segs > 16 { 2 } else { 1 }
    }

    /// Threads of that kernel.
    pub fn threads(&self, columns: usize) -> usize {
        self.mt * self.segs.div_ceil(self.rounds(columns)) * 32
    }

    /// Shared memory of the kernel for up to `columns` columns.
    pub fn shared(&self, columns: usize) -> usize {
        self.mt * self.segs * TILE * columns * 4
    }

    /// Thread blocks that fit a multiprocessor, when each thread has 64 registers, or 128 for more than eight columns.
    pub fn fit(&self, columns: usize) -> usize {
        (if columns <= 8 { 1024 } else { 512 } / self.threads(columns)).max(1)
    }

    /// Thread blocks for a matrix of `rows` rows: with few columns, with many.
    pub fn units(&self, rows: usize) -> [usize; 2] {
        [rows.div_ceil(TILE * self.mt), rows.div_ceil(TILE * WIDE_TILES)]
    }
}

/// Shared memory of a product of many columns: all of it where sums of segments lie there; its stages and what is unpacked
/// of two, or its sums, whichever is more, where not.
pub fn wide_shared(forms: &[Form], chip: Chip) -> usize {
    if chip.wide_room() >= 150_000 {
        return chip.wide_room();
    }
    let stages = forms.iter().map(|f| {
        let unpacked = if f.words() == 1 { 2 * WIDE_TILES * 1280 } else { 0 };
        ((chip.wide_room() - unpacked) / f.stage()).clamp(1, 4) * f.stage() + unpacked
    });
    stages.max().unwrap_or(0).max(WIDE_TILES * WIDE * 20 * 4)
}
