//! What the output of a request must look like: grammars, and the masks of tokens that they allow next.
//!
//! A grammar is text in llguidance's dialect of Lark, with JSON schemas in it as `%json {...}`. It may come from anybody, so
//! everything about it is bounded: its bytes and nesting ([`check`]), what compiling it may cost, and what each mask may
//! (`masks.rs`; a mask that would cost more fails its request). It is compiled off the engine's thread; masks, which
//! take some 50 us and at worst a few milliseconds, are computed on it.
//!
//! A mask is a function of the grammar and the output's tokens alone, and tokens are drawn under it by the sampling rule, so a
//! stream that moves goes on with the tokens that it would have had: whoever goes on replays the output.
//!
//! Masks reach the device with the request for a token ([`crate::program::SampleSpec::mask`]). The CPU device and the null
//! one apply them where they sample; wgpu and CUDA read such rows' logits back and sample on the host.
//!
//! Not in browsers: llguidance wants a clock that they don't have. A node there doesn't take such requests.
#[cfg(not(target_family = "wasm"))]
mod masks;

#[cfg(not(target_family = "wasm"))]
pub use masks::{Grammars, Masks, check};

#[cfg(target_family = "wasm")]
mod absent;
#[cfg(target_family = "wasm")]
pub use absent::{Grammars, Masks};

/// Whether requests with grammars can be served here.
pub const KNOWN: bool = cfg!(not(target_family = "wasm"));

/// Why a grammar can't be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It can't be read, contradicts itself, or is too large.
    #[error("{0}")]
    Bad(String),
    /// The tokens so far don't follow it.
    #[error("the output so far does not follow the request's grammar")]
    Strayed,
    /// What may come next can't be found out within bounds.
    #[error("what may come next is too hard to compute: {0}; try a simpler schema")]
    Mask(String),
    /// This program was built without.
    #[error("this node can't follow grammars")]
    Absent,
}
