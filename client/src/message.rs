//! What is said to a model, and how it shall answer.
use crate::ClientError;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use weir_scheduler::Priority;

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Whose turn it was.
    pub role: Role,
    /// What was said.
    pub content: String,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever built the conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Message {
    /// Sets the scene.
    pub fn system(content: impl Into<String>) -> Message {
        Message { role: Role::System, content: content.into() }
    }

    /// Asks.
    pub fn user(content: impl Into<String>) -> Message {
        Message { role: Role::User, content: content.into() }
    }

    /// Answered.
    pub fn assistant(content: impl Into<String>) -> Message {
        Message { role: Role::Assistant, content: content.into() }
    }
}

/// How to answer. What is left out is up to the endpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Which endpoint; the first one added where none.
    pub endpoint: Option<String>,
    /// Which model; the endpoint's first one where none.
    pub model: Option<String>,
    /// Most tokens of output.
    pub max_tokens: Option<u32>,
    /// 0 always takes the likeliest token.
    pub temperature: Option<f32>,
    /// Only the likeliest tokens that together have this probability; in (0, 1].
    pub top_p: Option<f32>,
    /// Same seed, same answer, where the endpoint can.
    pub seed: Option<u64>,
    /// Ends the answer before the first of these.
    pub stop: Vec<String>,
    /// Who goes first where there is not room for all. Only Weir's gateways know it, and the two that follow; to others
    /// leave them out.
    pub priority: Option<Priority>,
    /// Without a token after so long the answer is given up.
    pub ttft: Option<Duration>,
    /// For policies.
    pub tags: Vec<(String, String)>,
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), ClientError> {
        let wrong = |what: &str| Err(ClientError::Invalid(what.into()));
        if self.temperature.is_some_and(|t| !(0.0..=100.0).contains(&t)) {
            return wrong("temperature must be in 0..=100");
        }
        if self.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
            return wrong("top_p must be above 0 and at most 1");
        }
        if self.max_tokens == Some(0) {
            return wrong("max_tokens must be at least 1");
        }
        Ok(())
    }
}
