//! What an upstream is asked.
use serde_json::{Map, Value};
use std::time::Instant;

/// In which of OpenAI's forms a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/chat/completions`: `messages`.
    Chat,
    /// `/v1/completions`: `prompt`.
    Completion,
    /// `/v1/embeddings`: `input`. The answer is one piece with [`crate::EMBEDDINGS`].
    Embedding,
}

/// A request to one model of an upstream.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// In which form.
    pub api: Api,
    /// The request's fields as its client sent them. Those that say how it is answered (`model`, `stream`, `n`, limits,
    /// `weir`) don't count: what follows says it.
    pub fields: &'a Map<String, Value>,
    /// The same in Anthropic's form, where it came in that.
    pub native: Option<&'a Map<String, Value>>,
    /// The provider's own name of the model.
    pub model: &'a str,
    /// Most tokens of output, those of `so_far` not counted.
    pub max_tokens: u32,
    /// The answer's text so far: the upstream goes on after it and doesn't send it again.
    pub so_far: &'a str,
    /// In place of the client's own.
    pub seed: Option<u64>,
    /// What would be begun after this is of no use: nothing is tried again then.
    pub first_by: Option<Instant>,
    /// W3C's `traceparent`, so that what it does belongs to our trace.
    pub traceparent: Option<&'a str>,
}

/// Fields that say how a request is answered: ours say it anew.
pub(crate) const ENVELOPE: [&str; 8] =
    ["model", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "weir", "best_of"];

/// Bytes of text that are a token, on average; and tokens of an image, of a message's frame.
const TOKEN_BYTES: usize = 4;
const IMAGE_TOKENS: usize = 1000;
const FRAME_TOKENS: usize = 4;

/// About how many tokens a request's prompt has, where no tokenizer is at hand; at least 1.
pub fn estimate_tokens(fields: &Map<String, Value>) -> u32 {
    let mut tokens = 1;
    for message in fields.get("messages").and_then(Value::as_array).into_iter().flatten() {
        tokens += FRAME_TOKENS;
        match message.get("content") {
            Some(Value::Array(parts)) => tokens += parts.iter().map(of_part).sum::<usize>(),
            content => tokens += content.map_or(0, of_value),
        }
        tokens += message.get("tool_calls").map_or(0, of_value);
    }
    tokens += fields.get("prompt").map_or(0, of_value);
    tokens += fields.get("input").map_or(0, of_value);
    tokens += fields.get("tools").map_or(0, of_value);
    tokens += fields.get("response_format").map_or(0, of_value);
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

/// About how many tokens a text has.
pub(crate) fn estimate_text(text: &str) -> u32 {
    u32::try_from(text.len().div_ceil(TOKEN_BYTES)).unwrap_or(u32::MAX)
}

fn of_part(part: &Value) -> usize {
    match part.get("text").and_then(Value::as_str) {
        Some(text) => text.len().div_ceil(TOKEN_BYTES),
        None => IMAGE_TOKENS,
    }
}

fn of_value(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len().div_ceil(TOKEN_BYTES),
        // Token ids.
        Value::Number(_) => 1,
        Value::Array(all) => all.iter().map(of_value).sum(),
        Value::Object(map) => {
            map.iter().map(|(name, value)| name.len().div_ceil(TOKEN_BYTES) + of_value(value)).sum()
        }
        Value::Null | Value::Bool(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_estimated() {
        let check = |json: &str, expected: std::ops::RangeInclusive<u32>| {
            let Value::Object(fields) = serde_json::from_str(json).unwrap() else { panic!() };
            assert!(expected.contains(&estimate_tokens(&fields)), "{json}: {}", estimate_tokens(&fields));
        };
        check("{}", 1..=1);
        check(r#"{"messages":[{"role":"user","content":"Why is the sky blue?"}]}"#, 8..=12);
        check(r#"{"prompt":[1,2,3]}"#, 4..=4);
        let image =
            r#"{"messages":[{"content":[{"type":"text","text":"hi"},{"type":"image_url","image_url":{}}]}]}"#;
        check(image, 1000..=1020);
    }
}
