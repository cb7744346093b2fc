//! From a model file to a running engine.
use crate::engine::{Engine, EngineConfig, EngineHandle};
use crate::gguf::{GgufError, ModelFile};
use crate::models::{self, ModelError};
use crate::plan::Plan;
use crate::program::{Device, DeviceError, DeviceInfo, KvLayout};
use crate::text::{ChatTemplate, TextError, Tokenizer};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use weir_scheduler::{BLOCK_TOKENS, KvType, ModelId};

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
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions { context: None, slots: 16, kv: KvType::F16, memory: None, prefill_chunk: 256 }
    }
}

/// A model ready to run.
pub struct Loaded {
    /// Runs it.
    pub engine: EngineHandle,
    /// Of the file.
    pub tokenizer: Arc<Tokenizer>,
    /// Of the file; the plain one where it has none.
    pub template: Arc<ChatTemplate>,
    /// What it runs on.
    pub device: DeviceInfo,
    /// Bytes of all tensors in the file.
    pub weight_bytes: u64,
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
    /// The parts loaded at the same time can't be put together.
    #[error("loading was interrupted: {0}")]
    Interrupted(&'static str),
}

/// Loads the model in `file` (the first, if it is split) onto a device and starts its engine. `id` is the file's
/// SHA-256; without it the file is read whole once more. Weights, tokenizer and digest are made at the same time.
pub fn load(
    file: &Path,
    id: Option<ModelId>,
    device: &dyn Device,
    options: LoadOptions,
) -> Result<Loaded, LoadError> {
    let model = ModelFile::open(file)?;
    let plan = models::plan(&model)?;
    let info = device.describe();
    let (layout, context) = kv_layout(&model, &plan, options, info.memory_free);
    let (program, text, id) = std::thread::scope(|scope| {
        let text = scope.spawn(|| text(&model));
        let id = scope.spawn(|| id.map_or_else(|| digest(file), Ok));
        let program = device.compile(&model, &plan, 0..plan.layers.len(), layout);
        (program, text.join(), id.join())
    });
    let (tokenizer, template) = text.map_err(|_| LoadError::Interrupted("the tokenizer's thread died"))??;
    let id = id.map_err(|_| LoadError::Interrupted("the digest's thread died"))??;
    if tokenizer.len() < plan.vocab {
        tracing::debug!(tokens = tokenizer.len(), vocab = plan.vocab, "the model has more rows than tokens");
    } else if tokenizer.len() > plan.vocab {
        return Err(LoadError::Vocabulary { tokens: tokenizer.len(), vocab: plan.vocab });
    }
    let config = EngineConfig { model: id, layout, context, prefill_chunk: options.prefill_chunk.max(1) };
    let engine = Engine::spawn(program?, tokenizer.clone(), config);
    Ok(Loaded { engine, tokenizer, template, device: info, weight_bytes: model.total_bytes() })
}

fn text(model: &ModelFile) -> Result<(Arc<Tokenizer>, Arc<ChatTemplate>), TextError> {
    let tokenizer = Tokenizer::from_gguf(model)?;
    let template = ChatTemplate::from_gguf(model, &tokenizer)?;
    let template = template.unwrap_or_else(|| ChatTemplate::fallback(&tokenizer));
    Ok((Arc::new(tokenizer), Arc::new(template)))
}

fn digest(path: &Path) -> Result<ModelId, LoadError> {
    let failed = |error| LoadError::Digest { path: path.into(), error };
    let mut file = File::open(path).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(ModelId(hash.finalize().into())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// How large the KV cache is on a device with so many bytes free, and the context that it leaves: enough for two of the
/// longest sequences, and for 1,024 tokens a slot, as far as memory goes; the context yields when one sequence of
/// it doesn't fit.
pub fn kv_layout(model: &ModelFile, plan: &Plan, options: LoadOptions, free: u64) -> (KvLayout, u32) {
    let own = u32::try_from(plan.context).unwrap_or(u32::MAX);
    let context = options.context.unwrap_or(CONTEXT).min(own).max(1);
    let slots = options.slots.max(1);
    let block_bytes = (plan.kv_bytes_per_token(0..plan.layers.len(), options.kv) * BLOCK_TOKENS) as u64;
    // Weights grow a little when they are repacked; the rest is for activations and everybody else.
    let room = options.memory.unwrap_or(u64::MAX).min(free).saturating_sub(model.total_bytes() / 8 * 9);
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
