//! What a gateway sends, as far as we read it. Servers differ: all but the skeleton is optional.
use crate::answer::Usage;
use serde::Deserialize;
use serde_json::Value;

/// `GET /v1/models`.
#[derive(Deserialize)]
pub(super) struct ModelList {
    pub(super) data: Vec<Model>,
}

#[derive(Deserialize)]
pub(super) struct Model {
    pub(super) id: String,
}

/// One event of a streamed answer.
#[derive(Deserialize)]
pub(super) struct Chunk {
    pub(super) model: Option<String>,
    pub(super) choices: Vec<Choice>,
    pub(super) usage: Option<ChunkUsage>,
    pub(super) weir: Option<Weir>,
}

/// What Weir's gateways add to the last one.
#[derive(Deserialize)]
pub(super) struct Weir {
    #[serde(default)]
    pub(super) nodes: Vec<String>,
}

#[derive(Deserialize)]
pub(super) struct Choice {
    pub(super) delta: Option<Delta>,
    pub(super) text: Option<String>,
    pub(super) finish_reason: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Delta {
    pub(super) content: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct ChunkUsage {
    #[serde(default)]
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u32>,
}

impl From<ChunkUsage> for Usage {
    fn from(u: ChunkUsage) -> Usage {
        Usage {
            prompt_tokens: u.prompt_tokens,
            cached_tokens: u.prompt_tokens_details.and_then(|d| d.cached_tokens).unwrap_or(0),
            output_tokens: u.completion_tokens,
        }
    }
}

/// A refusal, or a failure in the middle of a stream.
#[derive(Deserialize)]
pub(super) struct ErrorBody {
    pub(super) error: ErrorObject,
}

/// OpenAI's servers send an object, others a bare string.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum ErrorObject {
    Object { message: String },
    Text(String),
    Other(Value),
}

impl ErrorObject {
    /// Some servers say that there is no error.
    pub(super) fn is_null(&self) -> bool {
        matches!(self, ErrorObject::Other(Value::Null))
    }

    pub(super) fn message(self) -> String {
        match self {
            ErrorObject::Object { message } | ErrorObject::Text(message) => message,
            ErrorObject::Other(value) => value.to_string(),
        }
    }
}
