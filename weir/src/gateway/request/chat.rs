//! What a chat says.
use super::wishes::wishes;
use super::{Prompt, missing};
use crate::gateway::error::ApiError;
use crate::gateway::fields::{Fields, wrong_type};
use serde_json::Value;

/// What would change the answer and can't be done is refused; what is unknown is ignored.
pub(super) fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    if let Some(modalities) = fields.take("modalities")
        && modalities != serde_json::json!(["text"])
    {
        return Err(ApiError::unsupported(
            "modalities",
            "Only the modality \"text\" is supported by this server.",
        ));
    }
    Ok(())
}

pub(super) fn prompt(fields: &mut Fields) -> Result<Prompt, ApiError> {
    let messages = fields.array("messages")?.ok_or_else(|| missing("messages"))?;
    if messages.is_empty() {
        return Err(ApiError::field(
            "messages",
            "empty_array",
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
        ));
    }
    let messages =
        messages.into_iter().enumerate().map(|(i, m)| message(i, m)).collect::<Result<Vec<_>, _>>()?;
    let (wishes, tools) = wishes(fields)?;
    Ok(Prompt::Messages { messages, tools, wishes: Box::new(wishes) })
}

/// A message as templates expect it: text parts joined, no content as empty, `developer` as `system`, without earlier
/// thoughts.
fn message(index: usize, value: Value) -> Result<Value, ApiError> {
    let Value::Object(mut map) = value else {
        return Err(wrong_type(format!("messages[{index}]"), "an object", &value));
    };
    let role = match map.get("role").and_then(Value::as_str) {
        Some("developer") => "system".to_owned(),
        Some(role @ ("system" | "user" | "assistant" | "tool" | "function")) => role.to_owned(),
        _ => {
            return Err(ApiError::field(
                format!("messages[{index}].role"),
                "invalid_value",
                format!(
                    "Invalid 'messages[{index}].role': expected one of 'system', 'developer', 'user', 'assistant', 'tool', 'function'."
                ),
            ));
        }
    };
    map.retain(|field, _| field != "reasoning_content" && field != "reasoning");
    let content = match map.remove("content") {
        Some(Value::String(text)) => Value::String(text),
        Some(Value::Array(parts)) => Value::String(joined_parts(index, parts)?),
        None | Some(Value::Null) if role == "assistant" => Value::String(String::new()),
        Some(other) => {
            return Err(wrong_type(format!("messages[{index}].content"), "a string or an array", &other));
        }
        None => return Err(missing(format!("messages[{index}].content"))),
    };
    map.insert("role".into(), Value::String(role));
    map.insert("content".into(), content);
    Ok(Value::Object(map))
}

fn joined_parts(index: usize, parts: Vec<Value>) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for part in &parts {
        let text = match part.get("type").and_then(Value::as_str) {
            Some("text") => part.get("text").and_then(Value::as_str),
            Some("refusal") => part.get("refusal").and_then(Value::as_str),
            _ => None,
        };
        texts.push(text.ok_or_else(|| {
            ApiError::field(
                format!("messages[{index}].content"),
                "unsupported_content",
                "This model only reads text: parts of other types, such as images, aren't supported.",
            )
        })?);
    }
    Ok(texts.join("\n"))
}
