//! What is timed: the same three workloads on every side.
use anyhow::Result;

/// Tokens of prompt before output is timed.
pub const PROMPT: u32 = 16;
/// Tokens of output of one stream, timed in [`Workload::Decode`].
pub const OUTPUT: u32 = 128;
/// Tokens of the prompt timed in [`Workload::Prefill`].
pub const PREFILL: u32 = 512;
/// Sequences of [`Workload::Streams`].
pub const STREAMS: u32 = 8;
/// Tokens of output of each of them.
pub const STREAM_OUTPUT: u32 = 64;

/// One thing to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Workload {
    /// [`OUTPUT`] tokens, one by one, after a prompt of [`PROMPT`].
    Decode,
    /// A prompt of [`PREFILL`] tokens in one batch.
    Prefill,
    /// [`STREAMS`] sequences of [`STREAM_OUTPUT`] tokens in step, after prompts of [`PROMPT`].
    Streams,
}

impl Workload {
    /// All of them, in the order of the table.
    pub const ALL: [Workload; 3] = [Workload::Decode, Workload::Prefill, Workload::Streams];

    /// As in the table.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Decode => "decode 128",
            Workload::Prefill => "prefill 512",
            Workload::Streams => "8 streams",
        }
    }
}

/// Somebody who runs workloads on one loaded model.
pub trait Side {
    /// Tokens a second of one repetition, timed without its preparation.
    fn run(&mut self, workload: Workload) -> Result<f64>;
}

/// Some token of a vocabulary of `vocab`: speed doesn't depend on which.
pub fn token(index: u32, vocab: usize) -> u32 {
    (index.wrapping_mul(7919) + 1000) % (vocab as u32).min(30_000)
}
