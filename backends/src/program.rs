//! The seam between the engine and a device: a [`Device`] compiles a [`Plan`] into a [`Program`], and the engine
//! submits batches to it.
//!
//! A program covers a range of layers. In go token ids (if it starts at layer 0) or hidden rows; out come sampled ids,
//! logits (if it ends with the last layer) or hidden rows. Two halves in one process give the bits of the whole.
use crate::plan::Plan;
use std::ops::Range;
use std::sync::Arc;
use weir_scheduler::{KvType, Sampling};

/// Where a program's KV blocks live and how many there are. Block ids are the engine's; a program only stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Blocks of [`weir_scheduler::BLOCK_TOKENS`] tokens.
    pub blocks: u32,
    /// How values are stored.
    pub kv: KvType,
    /// Sequences that may be in a batch at once; slots are `0..slots`.
    pub slots: u32,
    /// Most rows (tokens) in one batch.
    pub rows: u32,
}

/// Ids that a batch may have sampled, or one for each slot where that is more.
pub const SAMPLED_MAX: usize = 64;

/// What a device is.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// `cpu`, `wgpu:0`, `cuda:0`, ...
    pub name: String,
    /// For a person: `AMD EPYC, 2 threads, AVX-512 VNNI`.
    pub description: String,
    /// Programs with equal numerics ids give equal tokens from equal seeds.
    pub numerics: String,
    /// Bytes that weights and KV cache may take now.
    pub memory_free: u64,
}

/// A machine's processor that can run programs.
pub trait Device: Send + Sync {
    /// What it is, and how much memory is free now.
    fn describe(&self) -> DeviceInfo;
    /// Generates kernels for exactly this model, loads the weights of `layers`, and allocates the KV cache.
    /// The embedding is loaded if `layers` starts at 0, the head if it ends with the last layer.
    fn compile(
        &self,
        model: &crate::gguf::ModelFile,
        plan: &Plan,
        layers: Range<usize>,
        kv: KvLayout,
    ) -> Result<Box<dyn Program>, DeviceError>;
}

/// One compiled range of layers. Driven by one thread.
pub trait Program: Send {
    /// Enqueues one step and returns at once. Batches complete in order. The caller guarantees that block tables hold
    /// every position the batch touches, that a slot occurs once in a batch, and at most `KvLayout::rows` rows.
    fn submit(&mut self, batch: Batch) -> Result<(), DeviceError>;
    /// The oldest finished step, if any. A device without its own clock (the CPU) computes here.
    fn poll(&mut self) -> Option<Result<StepOutput, DeviceError>>;
    /// Steps that may usefully be in flight: 1 where `poll` computes.
    fn depth(&self) -> usize;
    /// Whether a prompt's rows have other bits than an answer's: then what was an answer's isn't reused as a prompt.
    fn prompts_apart(&self) -> bool {
        false
    }
    /// Time spent so far in each kind of fused step; empty where the device doesn't measure it.
    fn profile(&self) -> Vec<StepTime> {
        Vec::new()
    }
}

/// Time spent in one kind of fused step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepTime {
    /// As in [`crate::plan::Step`], in snake case.
    pub name: &'static str,
    /// Times that it ran.
    pub count: u64,
    /// In all, nanoseconds.
    pub nanos: u64,
    /// Bytes of weights read, in all.
    pub bytes: u64,
}

/// Rows of several sequences, computed together in one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Disjoint sequences.
    pub segments: Vec<Segment>,
}

/// Refuses a range of layers that the plan doesn't have.
pub(crate) fn check_layers(plan: &Plan, layers: &Range<usize>) -> Result<(), DeviceError> {
    if layers.start > layers.end || layers.end > plan.layers.len() {
        return Err(DeviceError::Unsupported(format!(
            "layers {layers:?} of a model of {}",
            plan.layers.len()
        )));
    }
    Ok(())
}

/// What a program has room for and can take: the terms of [`Batch::check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// As compiled.
    pub kv: KvLayout,
    /// Token ids are below it.
    pub vocab: usize,
    /// Values in a row of the residual stream.
    pub hidden: usize,
    /// Whether it has the embedding, and so takes ids; otherwise hidden rows.
    pub embeds: bool,
    /// Whether it has the head, and so gives ids and logits; otherwise hidden rows.
    pub heads: bool,
}

impl Batch {
    /// Refuses what would reach beyond a program's buffers, or what it can't take or answer: a caller's bug must not
    /// become memory corruption.
    pub fn check(&self, terms: &Terms) -> Result<(), DeviceError> {
        let bug = |what: &str| Err(DeviceError::Unsupported(format!("batch refused: {what}")));
        let Terms { kv, vocab, hidden, embeds, heads } = *terms;
        let (mut rows, mut sampled) = (0, 0);
        let mut seen = vec![false; kv.slots as usize];
        for s in &self.segments {
            match seen.get_mut(s.slot as usize) {
                None => return bug("an unknown slot"),
                Some(true) => return bug("a slot that is there twice"),
                Some(seen) => *seen = true,
            }
            match &s.input {
                Input::Ids(_) if !embeds => return bug("ids for a program without the embedding"),
                Input::Ids(ids) if ids.iter().any(|&id| id as usize >= vocab) => {
                    return bug("a token id beyond the vocabulary");
                }
                Input::LastSampled if !embeds || !heads => {
                    return bug("the last id for a program that doesn't sample and embed");
                }
                Input::Hidden(_) if embeds => return bug("hidden rows for the first layers"),
                Input::Hidden(x) if !x.len().is_multiple_of(hidden) => return bug("part of a hidden row"),
                _ => {}
            }
            let n = s.input.rows(hidden);
            if n == 0 {
                return bug("an empty segment");
            }
            rows += n;
            sampled += if matches!(s.want, Want::Sample(_)) { s.want.rows() } else { 0 };
            let end = s.start as usize + n;
            if s.blocks.len().min(kv.blocks as usize) * weir_scheduler::BLOCK_TOKENS < end
                || s.blocks.iter().any(|&b| b >= kv.blocks)
            {
                return bug("positions without KV blocks");
            }
            match s.want {
                Want::Logits(wanted) if wanted as usize > n => {
                    return bug("logits of more rows than there are");
                }
                Want::Sample(ref specs) if specs.is_empty() || specs.len() > n => {
                    return bug("ids that follow more rows than there are, or none");
                }
                Want::Sample(_) | Want::Logits(_) if !heads => {
                    return bug("logits of a program without the head");
                }
                Want::Hidden if heads => return bug("hidden rows of the last layers"),
                _ => {}
            }
        }
        if rows > kv.rows as usize {
            return bug("more rows than the program has room for");
        }
        if sampled > SAMPLED_MAX.max(kv.slots as usize) {
            return bug("more ids to sample than a step may have");
        }
        Ok(())
    }
}

impl Input {
    /// How many, where a row of the residual stream has `hidden` values.
    pub fn rows(&self, hidden: usize) -> usize {
        match self {
            Input::Ids(ids) => ids.len(),
            Input::LastSampled => 1,
            Input::Hidden(x) => x.len() / hidden,
        }
    }
}

/// Consecutive positions of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// The sequence's place in the program, stable while it runs: the program remembers its last sampled id.
    pub slot: u32,
    /// Position of the first row.
    pub start: u32,
    /// The rows are a prompt's rather than an answer's. Where [`Program::prompts_apart`], the two have arithmetics of their own.
    pub prompt: bool,
    /// What goes in, one row a position.
    pub input: Input,
    /// KV blocks of the sequence from position 0 on, enough for all rows of this segment.
    pub blocks: Arc<[u32]>,
    /// What comes out.
    pub want: Want,
}

/// Rows of a segment.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Token ids.
    Ids(Vec<u32>),
    /// The id this slot sampled last, perhaps in a step still in flight: one row. Not after a step that sampled
    /// several for it.
    LastSampled,
    /// `[rows, hidden]` of the residual stream, from the program of the layers before.
    Hidden(Vec<f32>),
}

/// What a segment is computed for.
#[derive(Clone, Debug, PartialEq)]
pub enum Want {
    /// Only the KV cache.
    Nothing,
    /// The ids that follow each of the last rows, as many as there are specifications: what would be chosen there if the
    /// ids that went in are the right ones.
    Sample(Vec<SampleSpec>),
    /// Logits of the last `n` rows.
    Logits(u32),
    /// All rows of the residual stream.
    Hidden,
}

impl Want {
    /// Of how many rows logits are computed: the segment's last ones.
    pub fn rows(&self) -> usize {
        match self {
            Want::Nothing | Want::Hidden => 0,
            Want::Sample(specs) => specs.len(),
            Want::Logits(n) => *n as usize,
        }
    }
}

/// What the sampling rule ([`crate::sampling`]) needs for one token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleSpec {
    /// The request's.
    pub sampling: Arc<Sampling>,
    /// Position, in the sequence, of the token to be chosen: counts prompt and output.
    pub position: u32,
    /// Tokens that penalties look at, each once.
    pub counts: Vec<TokenCount>,
    /// Bit `id % 32` of word `id / 32`: may be chosen. All may where none.
    pub mask: Option<Arc<[u32]>>,
}

/// How often a token has occurred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenCount {
    /// Token id.
    pub id: u32,
    /// Times in the output; 0 if only the prompt has it.
    pub in_output: u32,
}

/// The results of one batch, in the order of its segments.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// One a segment.
    pub segments: Vec<SegmentOutput>,
}

/// The result of a segment.
#[derive(Clone, Debug, PartialEq)]
pub enum SegmentOutput {
    /// [`Want::Nothing`].
    Nothing,
    /// [`Want::Sample`]: one a specification.
    Sampled(Vec<Sampled>),
    /// [`Want::Logits`]: `[n, vocab]`.
    Logits(Vec<f32>),
    /// [`Want::Hidden`]: `[rows, hidden]`.
    Hidden(Vec<f32>),
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub id: u32,
    /// Natural log-probability of it and of the likeliest candidates, where asked for.
    pub logprobs: Option<(f32, Vec<(u32, f32)>)>,
}

/// Why a device could not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeviceError {
    /// Weights and KV cache don't fit.
    #[error(
        "weights need {weights_mib} MiB and the KV cache {kv_mib} MiB, {device} has {free_mib} MiB free; try a smaller quantisation, or fewer tokens of context"
    )]
    Memory {
        /// MiB of weights.
        weights_mib: u64,
        /// MiB of KV cache.
        kv_mib: u64,
        /// MiB that were free.
        free_mib: u64,
        /// Which device.
        device: String,
    },
    /// The model's file lacks something or has something that this device can't compute.
    #[error("{0}")]
    Unsupported(String),
    /// The file could not be read.
    #[error("{0}")]
    File(String),
    /// The device is gone; programs on it are dead.
    #[error("device lost: {0}")]
    Lost(String),
}
