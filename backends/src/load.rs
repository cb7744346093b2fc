//! From a model file to a running engine.
#[cfg(not(target_family = "wasm"))]
mod draft;
#[cfg(not(target_family = "wasm"))]
mod file;

use crate::engine::Speculation;
use crate::gguf::{GgufError, ModelFile};
use crate::models::ModelError;
use crate::plan::Plan;
use crate::program::{DeviceError, KvLayout};
use crate::text::{ChatTemplate, TextError, Tokenizer};
#[cfg(not(target_family = "wasm"))]
pub use file::{Loaded, load, load_with_draft};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use weir_scheduler::{BLOCK_TOKENS, KvType};

/// Longest context unless told otherwise.
const CONTEXT: u32 = 8192;
/// Tokens of KV cache that each slot has on average, unless a longest sequence or two need more.
const TOKENS_A_SLOT: u64 = 1024;
/// Least context worth having.
const CONTEXT_MIN: u32 = 256;

/// How a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadOptions {
    /// Longest sequence in tokens; the model's own, but no more than 8192, where none.
    pub context: Option<u32>,
    /// Sequences that run at once, at least 1.
    pub slots: u32,
    /// How keys and values are stored.
    pub kv: KvType,
    /// Bytes that weights and KV cache may take; what the device has free, where none.
    pub memory: Option<u64>,
    /// Rows of prompts in one step, at least 1: others decode a token only after so many.
    pub prefill_chunk: u32,
    /// Whether the next tokens are guessed.
    pub speculation: Speculation,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            context: None,
            slots: 16,
            kv: KvType::F16,
            memory: None,
            prefill_chunk: 256,
            speculation: Speculation::Auto,
        }
    }
}

/// Why a model was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file can't be read, or is no model file.
    #[error(transparent)]
    File(#[from] GgufError),
    /// The digest that names the model can't be made.
    #[error("{path}: {error}")]
    Digest {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// No plan.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// No tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The device can't.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The file and its tokenizer don't agree.
    #[error("the tokenizer has {tokens} tokens, the model computes {vocab}; convert the model again")]
    Vocabulary {
        /// Of the tokenizer.
        tokens: usize,
        /// Of the model.
        vocab: usize,
    },
    /// The draft model wasn't loaded.
    #[error("the draft model {path}: {error}")]
    Draft {
        /// Its file.
        path: PathBuf,
        /// Why.
        error: Box<LoadError>,
    },
    /// The draft model has another tokenizer.
    #[error("the draft model {path} has another tokenizer: {why}; take a smaller model of the same family")]
    DraftTokens {
        /// Its file.
        path: PathBuf,
        /// What is different.
        why: String,
    },
    /// The parts loaded at the same time can't be put together.
    #[error("loading was interrupted: {0}")]
    Interrupted(&'static str),
}

/// The file's tokenizer, which must be no larger than the model, and its chat template, or the plain one where it has
/// none.
pub fn text(model: &ModelFile, plan: &Plan) -> Result<(Arc<Tokenizer>, Arc<ChatTemplate>), LoadError> {
    let tokenizer = Tokenizer::from_gguf(model)?;
    if tokenizer.len() < plan.vocab {
        tracing::debug!(tokens = tokenizer.len(), vocab = plan.vocab, "the model has more rows than tokens");
    } else if tokenizer.len() > plan.vocab {
        return Err(LoadError::Vocabulary { tokens: tokenizer.len(), vocab: plan.vocab });
    }
    let template = ChatTemplate::from_gguf(model, &tokenizer)?;
    let template = template.unwrap_or_else(|| ChatTemplate::fallback(&tokenizer));
    Ok((Arc::new(tokenizer), Arc::new(template)))
}

/// How large the KV cache is on a device with so many bytes free, and the context that it leaves: enough for two of the
/// longest sequences, and for 1,024 tokens a slot, as far as memory goes; the context yields when one sequence of
/// it doesn't fit.
pub fn kv_layout(model: &ModelFile, plan: &Plan, options: LoadOptions, free: u64) -> (KvLayout, u32) {
    kv_layout_beside((model, plan), None, options, free)
}

/// The same where a draft model has as many blocks of its own.
pub fn kv_layout_beside(
    (model, plan): (&ModelFile, &Plan),
    draft: Option<(&ModelFile, &Plan)>,
    options: LoadOptions,
    free: u64,
) -> (KvLayout, u32) {
    let own = u32::try_from(plan.context).unwrap_or(u32::MAX);
    let context = options.context.unwrap_or(CONTEXT).min(own).max(1);
    let slots = options.slots.max(1);
    let block_bytes = |plan: &Plan| kv_bytes_per_token(plan, options.kv) * BLOCK_TOKENS as u64;
    let weights = model.total_bytes() + draft.map_or(0, |(file, _)| file.total_bytes());
    let block_bytes = block_bytes(plan) + draft.map_or(0, |(_, plan)| block_bytes(plan));
    // Weights grow a little when they are repacked; the rest is for activations and everybody else.
    let room = options.memory.unwrap_or(u64::MAX).min(free).saturating_sub(weights / 8 * 9);
    let affordable = room / 8 * 7 / block_bytes.max(1);
    let blocks_of = |tokens: u64| tokens.div_ceil(BLOCK_TOKENS as u64) + 1;
    let wanted = (2 * blocks_of(context.into())).max(u64::from(slots) * blocks_of(TOKENS_A_SLOT));
    let wanted = wanted.min(u64::from(slots) * blocks_of(context.into()));
    let blocks = wanted.min(affordable.max(blocks_of(CONTEXT_MIN.into())));
    let context = u64::from(context).min((blocks - 1) * BLOCK_TOKENS as u64) as u32;
    let rows = options.prefill_chunk.max(1) + slots;
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
    (KvLayout { blocks, kv: options.kv, slots, rows }, context)
}

fn kv_bytes_per_token(plan: &Plan, kv: KvType) -> u64 {
    plan.kv_bytes_per_token(0..plan.layers.len(), kv) as u64
}
