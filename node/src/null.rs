//! The null model: made-up words at a modelled pace, for load tests and for trying things out without a model.
use crate::load::{Loaded, held};
use crate::meter;
use crate::text::ModelText;
use std::sync::Arc;
use weir_backends::engine::{Engine, EngineConfig};
use weir_backends::gguf::write::Writer;
use weir_backends::gguf::{ModelFile, Strings};
use weir_backends::load::{LoadError, LoadOptions};
use weir_backends::null::{NULL_MODEL, Null};
use weir_backends::program::{Device, KvLayout};
use weir_backends::text::{ChatTemplate, Tokenizer};
use weir_scheduler::BLOCK_TOKENS;

/// Its context unless told otherwise.
const CONTEXT: u32 = 8192;

/// Starts an engine on the null device. Its tokens are bytes and words like ` t300`; the prompt is read as bytes.
pub fn null(null: &Null, options: LoadOptions) -> Result<Loaded, LoadError> {
    let null = Null { vocab: null.vocab.max(300), ..null.clone() };
    let file = file(null.vocab)?;
    let tokenizer = Arc::new(Tokenizer::from_gguf(&file)?);
    let text = ModelText::of(&file);
    let context = options.context.unwrap_or(CONTEXT).max(1);
    let slots = options.slots.max(1);
    let layout = KvLayout {
        blocks: slots.saturating_mul(context.div_ceil(BLOCK_TOKENS as u32) + 1).min(1 << 16),
        kv: options.kv,
        slots,
        rows: options.prefill_chunk.max(1) + slots,
    };
    let config = EngineConfig {
        model: NULL_MODEL,
        layout,
        context,
        prefill_chunk: options.prefill_chunk.max(1),
        speculation: options.speculation,
    };
    let engine = Engine::spawn(null.program(layout), tokenizer.clone(), config);
    let info = null.describe();
    let template = Arc::new(ChatTemplate::fallback(&tokenizer));
    let held = held(&engine, "null".into(), text.id(), &info.numerics, meter::guess(0));
    Ok(Loaded { engine, tokenizer, template, text, held, device: info.description, weight_bytes: 0 })
}

/// Token 0 ends, 1 to 256 are the bytes, the rest words.
fn file(vocab: u32) -> Result<ModelFile, LoadError> {
    let bytes = (0..=255u8).map(byte_name);
    let words = (257..vocab).map(|id| format!("\u{120}t{id}"));
    let tokens: Vec<String> = std::iter::once("<|end|>".to_owned()).chain(bytes).chain(words).collect();
    let types: Vec<i32> = (0..vocab).map(|id| if id == 0 { 3 } else { 1 }).collect();
    let mut writer = Writer::new("null");
    writer.set("tokenizer.ggml.model", "gpt2");
    writer.set("tokenizer.ggml.pre", "gpt-2");
    writer.set("tokenizer.ggml.tokens", tokens.iter().map(String::as_str).collect::<Strings>());
    writer.set("tokenizer.ggml.token_type", types);
    writer.set("tokenizer.ggml.merges", std::iter::empty::<&str>().collect::<Strings>());
    writer.set("tokenizer.ggml.eos_token_id", 0u32);
    let mut file = Vec::new();
    writer.write(&mut file, |_| Vec::new()).expect("writing to memory does not fail");
    Ok(ModelFile::from_bytes(file)?)
}

/// How byte-level BPE writes a byte: printable ones as themselves, the others shifted to U+0100 and on.
fn byte_name(byte: u8) -> String {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = match printable(byte) {
        true => u32::from(byte),
        false => 256 + (0..byte).filter(|b| !printable(*b)).count() as u32,
    };
    char::from_u32(code).unwrap_or_default().to_string()
}
