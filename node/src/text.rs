//! A model's tokenizer and chat template as bytes, so that a scheduler without the model can write prompts for it.
use sha2::{Digest, Sha256};
use std::sync::Arc;
use weir_backends::gguf::write::Writer;
use weir_backends::gguf::{GgufError, ModelFile};
use weir_backends::text::{ChatTemplate, TextError, Tokenizer};
use weir_scheduler::TextId;

/// Most bytes of a model's text: several times the largest known.
pub const TEXT_MAX: usize = 64 << 20;

/// The tokenizer and chat template of a model: a GGUF file of its `tokenizer.*` metadata and nothing else.
#[derive(Clone)]
pub struct ModelText {
    id: TextId,
    bytes: Arc<[u8]>,
}

/// Why what came as a model's text is none.
#[derive(Debug, thiserror::Error)]
pub enum ReadTextError {
    /// The bytes are others than those asked for.
    #[error("the text of the model came damaged")]
    Damaged,
    /// Not GGUF.
    #[error(transparent)]
    File(#[from] GgufError),
    /// No tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
}

impl ModelText {
    /// Of a model file.
    pub fn of(model: &ModelFile) -> ModelText {
        let mut writer = Writer::new(model.str("general.architecture").unwrap_or_default());
        for (key, value) in model.metadata().filter(|(key, _)| key.starts_with("tokenizer.")) {
            writer.set(key, value.clone());
        }
        let mut bytes = Vec::new();
        writer.write(&mut bytes, |_| Vec::new()).expect("writing to memory does not fail");
        ModelText { id: TextId(Sha256::digest(&bytes).into()), bytes: bytes.into() }
    }

    /// By content.
    pub fn id(&self) -> TextId {
        self.id
    }

    /// What is handed out.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes apart what a node has handed out for `id`; the plain template where it has none.
    pub fn read(id: TextId, bytes: Vec<u8>) -> Result<(Tokenizer, ChatTemplate), ReadTextError> {
        if TextId(Sha256::digest(&bytes).into()) != id {
            return Err(ReadTextError::Damaged);
        }
        let file = ModelFile::from_bytes(bytes)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let template = ChatTemplate::from_gguf(&file, &tokenizer)?;
        let template = template.unwrap_or_else(|| ChatTemplate::fallback(&tokenizer));
        Ok((tokenizer, template))
    }
}
