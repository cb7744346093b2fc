//! What a node holds.
use crate::meter;
use crate::text::ModelText;
#[cfg(not(target_arch = "wasm32"))]
use std::path::Path;
use std::sync::Arc;
use weir_backends::engine::EngineHandle;
use weir_backends::gguf::ModelFile;
use weir_backends::load::LoadError;
#[cfg(not(target_arch = "wasm32"))]
use weir_backends::load::LoadOptions;
use weir_backends::models;
#[cfg(not(target_arch = "wasm32"))]
use weir_backends::program::Device;
use weir_backends::program::KvLayout;
use weir_backends::text::{ChatTemplate, Tokenizer};
#[cfg(not(target_arch = "wasm32"))]
use weir_scheduler::ModelId;
use weir_scheduler::{BLOCK_TOKENS, Held, KvType, Rates, TextId};

/// A model ready to run.
pub struct Loaded {
    /// Runs it.
    pub engine: EngineHandle,
    /// Of the file.
    pub tokenizer: Arc<Tokenizer>,
    /// Of the file; the plain one where it has none.
    pub template: Arc<ChatTemplate>,
    /// Tokenizer and template, as they are handed out.
    pub text: ModelText,
    /// What a node says of it.
    pub held: Held,
    /// The device, for a person.
    pub device: String,
    /// Bytes of all tensors in the file.
    pub weight_bytes: u64,
}

/// Loads a model ([`weir_backends::load::load_with_draft`]) that a node is to hold. It is called by its file's name until somebody
/// gives it another.
#[cfg(not(target_arch = "wasm32"))]
pub fn load(
    file: &Path,
    id: Option<ModelId>,
    draft: Option<&Path>,
    device: &dyn Device,
    options: LoadOptions,
) -> Result<Loaded, LoadError> {
    use weir_backends::load;
    let model = ModelFile::open(file)?;
    let (loaded, text) = std::thread::scope(|scope| {
        let text = scope.spawn(|| ModelText::of(&model));
        (load::load_with_draft(file, id, draft, device, options), text.join())
    });
    let text = text.map_err(|_| LoadError::Interrupted("the text's thread died"))?;
    let load::Loaded { engine, tokenizer, template, device, weight_bytes, draft_bytes } = loaded?;
    let name = file.file_stem().map_or_else(|| "model".into(), |stem| stem.to_string_lossy().into_owned());
    let mut held = describe(&model, &engine, name, text.id(), &device.numerics)?;
    held.bytes += draft_bytes;
    Ok(Loaded { engine, tokenizer, template, text, held, device: device.description, weight_bytes })
}

/// What a node says of a model of this file that `engine` runs, called `name` and computed as `numerics` says.
pub fn describe(
    model: &ModelFile,
    engine: &EngineHandle,
    name: String,
    text: TextId,
    numerics: &str,
) -> Result<Held, LoadError> {
    let weight_bytes = model.total_bytes();
    let mut held = held(engine, name, text, numerics, meter::guess(weight_bytes));
    held.weights = weight_bytes;
    held.bytes = memory_bytes(model, weight_bytes, engine.config().layout)?;
    Ok(held)
}

/// What a loaded model takes: weights grow a little when they are repacked.
fn memory_bytes(model: &ModelFile, weight_bytes: u64, kv: KvLayout) -> Result<u64, LoadError> {
    let plan = models::plan(model)?;
    let a_token = plan.kv_bytes_per_token(0..plan.layers.len(), kv.kv) as u64;
    Ok(weight_bytes / 8 * 9 + u64::from(kv.blocks) * BLOCK_TOKENS as u64 * a_token)
}

/// What a node says of an engine.
pub(crate) fn held(engine: &EngineHandle, name: String, text: TextId, numerics: &str, rates: Rates) -> Held {
    let config = engine.config();
    let kv = match config.layout.kv {
        KvType::F16 => "f16",
        KvType::Q8_0 => "q8_0",
    };
    Held {
        model: config.model,
        name,
        text: Some(text),
        context: config.context,
        numerics: format!("{numerics}/kv-{kv}"),
        kv: config.layout.kv,
        kv_blocks: config.layout.blocks,
        slots: config.layout.slots,
        rates,
        weights: 0,
        bytes: 0,
        pinned: false,
        resumes: true,
        grammars: weir_backends::grammar::KNOWN,
        prefixes: Vec::new(),
    }
}
