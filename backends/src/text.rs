//! Text in and out of a model: tokens ([`Tokenizer`]), a stream's text ([`TextStream`]) and prompts ([`ChatTemplate`]).
//!
//! All three are made from a model file's metadata. Token ids equal llama.cpp's, which is the reading of
//! `tokenizer.ggml.*` that files are made for; `tests/golden` holds it to that.

mod bpe;
mod categories;
mod clock;
mod dialect;
mod guard;
mod index;
mod json;
mod listener;
mod merge;
mod nesting;
mod sentencepiece;
mod special;
mod split;
mod stream;
mod template;
mod tokenizer;
mod vocabulary;
mod wishes;

pub use dialect::{Calls, Dialect};
pub use listener::{Heard, Listener};
pub use stream::{Pushed, TextStream};
pub use template::ChatTemplate;
pub use tokenizer::{Special, Tokenizer};
pub use wishes::{Choice, Form, Thoughts, Tool, Wishes};

/// Why a tokenizer or chat template can't be made from a model file, or a prompt can't be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// The metadata lacks a key, or has it with another type.
    #[error("the model file has no {wanted} under {key}; convert the model again with its tokenizer")]
    Missing {
        /// Metadata key.
        key: String,
        /// What should be there.
        wanted: &'static str,
    },
    /// `tokenizer.ggml.model` names a kind of tokenizer that we don't have.
    #[error(
        "tokenizers of kind {0:?} are not supported; gpt2 (byte-level BPE) and llama (SentencePiece BPE) are"
    )]
    UnknownModel(String),
    /// `tokenizer.ggml.pre` names a pre-tokenizer that we don't have.
    #[error(
        "the pre-tokenizer {0:?} is not supported; smollm, qwen2, llama-bpe, gpt-2, default and their relatives are"
    )]
    UnknownPreTokenizer(String),
    /// Lists that belong together differ in length, or an id or a token is out of range.
    #[error("the tokenizer's vocabulary is damaged: {0}")]
    BadVocabulary(String),
    /// The chat template has a syntax error.
    #[error("the model's chat template can't be read: {0}")]
    BadTemplate(String),
    /// The chat template refused these messages or failed on them.
    #[error("the model's chat template can't render these messages: {0}")]
    Render(String),
    /// The chat template ran for too long, or its output or its intermediate text grew too large.
    #[error("the model's chat template was stopped: {0}")]
    TemplateLimit(String),
}
