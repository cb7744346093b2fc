//! What a plain completion goes on with.
use super::{Prompt, missing};
use crate::gateway::error::ApiError;
use crate::gateway::fields::{Fields, wrong_type};
use serde_json::Value;

/// What would change the answer and can't be done is refused; what is unknown is ignored.
pub(super) fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    if fields.take("suffix").is_some() {
        return Err(ApiError::unsupported("suffix", "'suffix' isn't supported by this server."));
    }
    if fields.integer("best_of", 1..=20)?.unwrap_or(1) > 1 {
        return Err(ApiError::unsupported(
            "best_of",
            "'best_of' above 1 isn't supported by this server: use 'n'.",
        ));
    }
    Ok(())
}

pub(super) fn prompts(fields: &mut Fields) -> Result<Vec<Prompt>, ApiError> {
    let value = fields.take("prompt").ok_or_else(|| missing("prompt"))?;
    let kind = "a string, an array of strings, an array of token ids, or an array of those";
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    let one = |v: Value| match v {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) if !ids.is_empty() => match ids.iter().map(id).collect() {
            Some(ids) => Ok(Prompt::Ids(ids)),
            None => Err(wrong_type("prompt", kind, &Value::Array(ids))),
        },
        other => Err(wrong_type("prompt", kind, &other)),
    };
    match value {
        Value::Array(items) if items.is_empty() => {
            Err(ApiError::field("prompt", "empty_array", "Invalid 'prompt': empty array."))
        }
        Value::Array(items) if items.iter().any(Value::is_number) => Ok(vec![one(Value::Array(items))?]),
        Value::Array(items) => items.into_iter().map(one).collect(),
        single => Ok(vec![one(single)?]),
    }
}
