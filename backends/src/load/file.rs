//! A file on this machine, and an engine on a thread of its own.
use super::{LoadError, LoadOptions, kv_layout};
use crate::engine::{Engine, EngineConfig, EngineHandle};
use crate::gguf::ModelFile;
use crate::models;
use crate::program::{Device, DeviceInfo};
use crate::text::{ChatTemplate, Tokenizer};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use weir_scheduler::ModelId;

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
    let engine = Engine::spawn(program?, tokenizer.clone(), config);
    Ok(Loaded { engine, tokenizer, template, device: info, weight_bytes: model.total_bytes() })
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
