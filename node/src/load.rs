//! What a node holds.
use crate::meter;
use std::path::Path;
use std::sync::Arc;
use weir_backends::engine::EngineHandle;
use weir_backends::load::{self, LoadError, LoadOptions};
use weir_backends::program::Device;
use weir_backends::text::{ChatTemplate, Tokenizer};
use weir_scheduler::{Held, KvType, ModelId, Rates};

/// A model ready to run.
pub struct Loaded {
    /// Runs it.
    pub engine: EngineHandle,
    /// Of the file.
    pub tokenizer: Arc<Tokenizer>,
    /// Of the file; the plain one where it has none.
    pub template: Arc<ChatTemplate>,
    /// What a node says of it.
    pub held: Held,
    /// The device, for a person.
    pub device: String,
    /// Bytes of all tensors in the file.
    pub weight_bytes: u64,
}

/// Loads a model ([`load::load`]) that a node is to hold.
pub fn load(
    file: &Path,
    id: Option<ModelId>,
    device: &dyn Device,
    options: LoadOptions,
) -> Result<Loaded, LoadError> {
    let load::Loaded { engine, tokenizer, template, device, weight_bytes } =
        load::load(file, id, device, options)?;
    let held = held(&engine, &device.numerics, meter::guess(weight_bytes));
    Ok(Loaded { engine, tokenizer, template, held, device: device.description, weight_bytes })
}

/// What a node says of an engine.
pub(crate) fn held(engine: &EngineHandle, numerics: &str, rates: Rates) -> Held {
    let config = engine.config();
    let kv = match config.layout.kv {
        KvType::F16 => "f16",
        KvType::Q8_0 => "q8_0",
    };
    Held {
        model: config.model,
        context: config.context,
        numerics: format!("{numerics}/kv-{kv}"),
        kv: config.layout.kv,
        kv_blocks: config.layout.blocks,
        slots: config.layout.slots,
        rates,
    }
}
