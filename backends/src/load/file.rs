//! A file on this machine, and an engine on a thread of its own.
use super::draft::same_tokens;
use super::{LoadError, LoadOptions, kv_bytes_per_token, kv_layout_beside};
use crate::engine::{Draft, Engine, EngineConfig, EngineHandle};
use crate::gguf::ModelFile;
use crate::models;
use crate::plan::Plan;
use crate::program::{Device, DeviceInfo};
use crate::text::{ChatTemplate, Tokenizer};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use weir_scheduler::{BLOCK_TOKENS, ModelId};

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
    /// What the draft model takes beside it, KV cache and all; 0 where there is none.
    pub draft_bytes: u64,
}

/// A draft model's file, before it is loaded.
struct Opened<'a> {
    path: &'a Path,
    file: ModelFile,
    plan: Plan,
    vocab: u32,
}

/// Loads the model in `file` (the first, if it is split) onto a device and starts its engine. `id` is the file's
/// SHA-256; without it the file is read whole once more. Weights, tokenizer and digest are made at the same time.
pub fn load(
    file: &Path,
    id: Option<ModelId>,
    device: &dyn Device,
    options: LoadOptions,
) -> Result<Loaded, LoadError> {
    load_with_draft(file, id, None, device, options)
}

/// The same with a smaller model of the same tokenizer beside it, whose guesses are checked where that is seen to pay.
pub fn load_with_draft(
    file: &Path,
    id: Option<ModelId>,
    draft: Option<&Path>,
    device: &dyn Device,
    options: LoadOptions,
) -> Result<Loaded, LoadError> {
    let model = ModelFile::open(file)?;
    let plan = models::plan(&model)?;
    let draft = draft.map(|path| Opened::new(path, &model)).transpose()?;
    let info = device.describe();
    let beside = draft.as_ref().map(|draft| (&draft.file, &draft.plan));
    let (layout, context) = kv_layout_beside((&model, &plan), beside, options, info.memory_free);
    let (program, text, id) = std::thread::scope(|scope| {
        let text = scope.spawn(|| super::text(&model, &plan));
        let id = scope.spawn(|| id.map_or_else(|| digest(file), Ok));
        let program = device.compile(&model, &plan, 0..plan.layers.len(), layout);
        (program, text.join(), id.join())
    });
    let (tokenizer, template) = text.map_err(|_| LoadError::Interrupted("the tokenizer's thread died"))??;
    let id = id.map_err(|_| LoadError::Interrupted("the digest's thread died"))??;
    let LoadOptions { prefill_chunk, speculation, .. } = options;
    let config =
        EngineConfig { model: id, layout, context, prefill_chunk: prefill_chunk.max(1), speculation };
    let mut engine = Engine::new(program?, tokenizer.clone().into(), config);
    let (weight_bytes, mut draft_bytes) = (model.total_bytes(), 0);
    if let Some(draft) = draft {
        let tokens = u64::from(layout.blocks) * BLOCK_TOKENS as u64;
        draft_bytes = draft.file.total_bytes() / 8 * 9 + tokens * kv_bytes_per_token(&draft.plan, layout.kv);
        let program = device.compile(&draft.file, &draft.plan, 0..draft.plan.layers.len(), layout);
        let program = program.map_err(|error| draft.failed(error.into()))?;
        engine = engine.with_draft(Draft {
            program,
            layout,
            context: u32::try_from(draft.plan.context).unwrap_or(u32::MAX),
            vocab: draft.vocab,
            cost: draft.file.total_bytes() as f32 / weight_bytes.max(1) as f32,
        });
    }
    Ok(Loaded { engine: engine.start(), tokenizer, template, device: info, weight_bytes, draft_bytes })
}

impl<'a> Opened<'a> {
    fn new(path: &'a Path, model: &ModelFile) -> Result<Opened<'a>, LoadError> {
        let failed = |error: LoadError| LoadError::Draft { path: path.into(), error: Box::new(error) };
        let file = ModelFile::open(path).map_err(|error| failed(error.into()))?;
        let plan = models::plan(&file).map_err(|error| failed(error.into()))?;
        let vocab = same_tokens(model, &file, path)?.min(u32::try_from(plan.vocab).unwrap_or(u32::MAX));
        Ok(Opened { path, file, plan, vocab })
    }

    fn failed(&self, error: LoadError) -> LoadError {
        LoadError::Draft { path: self.path.into(), error: Box::new(error) }
    }
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
