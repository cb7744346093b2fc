//! WGSL for exactly one model: dimensions, formats and places are constants of the text.
mod attend;
mod blocks;
mod norm;
mod probe;
mod product;
mod text;
mod tokens;

use super::pack::Format;
use crate::plan::NormKind;
pub use attend::Attention;
pub use norm::Prologue;
pub use probe::probe;
#[cfg(not(target_family = "wasm"))]
pub use probe::read;
pub use product::{Epilogue, Part, Product};
pub use tokens::{embed, sample};

/// What the generated text may rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// Lanes that shuffle among each other: a power of two up to 32; 1 where there are no subgroups.
    pub lanes: u32,
    /// Whether the text needs `enable subgroups;`, as browsers do.
    pub browser: bool,
    /// Bytes of memory of a workgroup.
    pub shared_bytes: u32,
}

/// A kernel's text and whether each of its buffers is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    pub text: String,
    pub entry: &'static str,
    pub writes: Vec<bool>,
}

/// A matrix in its step's region: where its streams begin, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    pub format: Format,
    pub rows: usize,
    /// Padded.
    pub cols: usize,
    pub codes: usize,
    pub high: usize,
    pub scales: usize,
    pub supers: usize,
    /// Word of the bias.
    pub bias: Option<usize>,
}

/// A norm's vectors in its step's region, in words.
#[derive(Clone, Debug, PartialEq)]
pub struct NormAt {
    pub kind: NormKind,
    pub weight: usize,
    pub bias: Option<usize>,
    pub eps: f32,
}
