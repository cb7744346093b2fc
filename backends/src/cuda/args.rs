//! What kernels are given, laid out as in the `.cu` files that are named. Fields that end nowhere else are addresses in
//! GPU memory; 0 is none.

/// `Matrix` of `gemm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Matrix {
    pub q: u64,
    pub high: u64,
    pub s: u64,
    pub supers: u64,
    pub bias: u64,
}

/// `Acts` of `common.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Acts {
    pub q: u64,
    pub d: u64,
    pub totals: u64,
    pub h: u64,
    pub hd: u64,
    pub sums: u64,
    pub squares: u64,
    pub prompt: u64,
}

impl Acts {
    /// From row `first` on, of vectors of `pairs` pairs and `blocks` blocks. What is for prompts counts its own rows.
    pub fn at_row(self, first: usize, pairs: usize, blocks: usize) -> Acts {
        let pairs = (first * pairs) as u64;
        Acts {
            q: self.q + pairs * 64,
            d: self.d + pairs * 8,
            totals: self.totals + pairs * 8,
            h: self.h + pairs * 128,
            hd: self.hd + pairs * 8,
            sums: self.sums + pairs * 8,
            squares: self.squares + (first * blocks * 4) as u64,
            prompt: self.prompt,
        }
    }
}

/// `GemmArgs` of `gemm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct GemmArgs {
    pub matrix: [Matrix; 3],
    pub input: Acts,
    pub map: u64,
    pub columns: i32,
    pub out: u64,
    pub gain: u64,
    pub next: Acts,
    pub partial: u64,
    pub arrived: u64,
    pub trace: u64,
}

/// `CacheArgs` of `attend.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheArgs {
    pub qkv: u64,
    pub q_norm: u64,
    pub k_norm: u64,
    pub angles: u64,
    pub keys: u64,
    pub values: u64,
    pub key_scales: u64,
    pub value_scales: u64,
    pub position: u64,
    pub table: u64,
    pub blocks: u64,
    pub trace: u64,
}

/// `AttendArgs` of `attend.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AttendArgs {
    pub cache: CacheArgs,
    pub tile_row: u64,
    pub tile_rows: u64,
    pub partial: u64,
    pub partial_at: u64,
    pub arrived: u64,
    pub next: Acts,
}

/// `SettleArgs` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SettleArgs {
    pub x: u64,
    pub y: u64,
    pub post: u64,
    pub post_bias: u64,
    pub gain: u64,
    pub bias: u64,
    pub next: Acts,
    pub trace: u64,
}

/// `EnterArgs` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct EnterArgs {
    pub table: Matrix,
    pub ids: u64,
    pub slots: u64,
    pub last: u64,
    pub positions: u64,
    pub x: u64,
    pub angles: u64,
    pub frequencies: u64,
    pub magnitudes: u64,
    pub gain: u64,
    pub next: Acts,
    pub trace: u64,
}

/// `SampleArgs` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SampleArgs {
    pub logits: u64,
    pub choices: u64,
    pub most: u64,
    pub best: u64,
    pub cut: u64,
    pub arrived: u64,
    pub last: u64,
    pub out: u64,
    pub flag: u64,
    pub step: u64,
    pub rows_done: u64,
    pub trace: u64,
    pub rows: i32,
}

/// `FinishArgs`, beside the kernel in `kernels.rs`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FinishArgs {
    pub flag: u64,
    pub step: u64,
}

/// `PackArgs` of `pack.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PackArgs {
    pub raw: u64,
    pub row0: i32,
    pub rows: i32,
    pub cols: i32,
    pub ty: i32,
    pub half: i32,
    pub tile0: i32,
    pub pairs: i32,
    pub q: u64,
    pub high: u64,
    pub s: u64,
    pub supers: u64,
}
