//! From a request of the Responses API to the chat that it is.
use super::store::{Owner, Store};
use crate::gateway::error::ApiError;
use crate::gateway::fields::{Fields, wrong_type};
use crate::gateway::request::{OURS, Translated, missing};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Fields that mean the same in both APIs.
const SAME: [&str; 9] = [
    "model",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "stream",
    "parallel_tool_calls",
    "user",
    "tool_choice",
];
/// Fields that an answer repeats, and what they are where a request has none.
const REPEATED: [(&str, Value); 5] = [
    ("instructions", Value::Null),
    ("max_output_tokens", Value::Null),
    ("previous_response_id", Value::Null),
    ("parallel_tool_calls", Value::Bool(true)),
    ("user", Value::Null),
];
/// What only OpenAI's own servers have.
const THEIRS: [&str; 3] = ["conversation", "prompt", "background"];

/// What an answer repeats of its request, and what is kept of both.
pub(in crate::gateway) struct Asked {
    /// Fields of the response object.
    pub(super) repeated: Map<String, Value>,
    /// The items that this request adds to the conversation.
    pub(super) input: Vec<Value>,
    pub(super) previous: Option<String>,
    pub(super) owner: Owner,
    /// Where the answer is kept, if it is.
    pub(super) store: Option<Arc<Store>>,
}

/// A request in the form of a chat.
pub(in crate::gateway) fn read(
    mut fields: Fields,
    store: &Arc<Store>,
    owner: Owner,
) -> Result<Translated, ApiError> {
    refuse(&mut fields)?;
    let mut repeated = repeated(&fields);
    let mut chat = Map::new();
    for name in SAME.into_iter().chain(OURS) {
        chat.extend(fields.take(name).map(|value| (name.to_owned(), value)));
    }
    if let Some(most) = fields.integer("max_output_tokens", 1..=i64::from(u32::MAX))? {
        chat.insert("max_completion_tokens".into(), most.into());
    }
    if let Some(top) = fields.integer("top_logprobs", 0..=20)?.filter(|top| *top > 0) {
        chat.extend([("logprobs".to_owned(), true.into()), ("top_logprobs".to_owned(), top.into())]);
    }
    let keeps = fields.boolean("store")?.unwrap_or(true);
    repeated.insert("store".into(), keeps.into());
    let mut messages = Vec::new();
    if let Some(instructions) = fields.string("instructions")? {
        messages.push(json!({ "role": "system", "content": instructions }));
    }
    let input = match fields.take("input").ok_or_else(|| missing("input"))? {
        Value::String(text) => vec![json!({ "type": "message", "role": "user", "content": text })],
        Value::Array(items) if items.is_empty() => return Err(invalid("input", "it is empty")),
        Value::Array(items) => items,
        other => return Err(wrong_type("input", "a string or an array of items", &other)),
    };
    let previous = fields.string("previous_response_id")?;
    if let Some(id) = &previous {
        // They were checked when they came.
        for item in store.conversation(owner, id)? {
            message("previous_response_id", &item, &mut messages)?;
        }
    }
    for (number, item) in input.iter().enumerate() {
        message(&format!("input[{number}]"), item, &mut messages)?;
    }
    chat.insert("messages".into(), messages.into());
    tools(&mut fields, &mut chat)?;
    format(&mut fields, &mut chat)?;
    if let Some(mut reasoning) = fields.object("reasoning")?
        && let Some(effort) = reasoning.string("effort").map_err(|error| error.within("reasoning"))?
    {
        chat.insert("reasoning_effort".into(), effort.into());
    }
    let store = keeps.then(|| store.clone());
    let asked = Asked { repeated, input, previous, owner, store };
    Ok(Translated { asked: Some(Arc::new(asked)), ..Translated::of(Fields::of(chat)) })
}

fn refuse(fields: &mut Fields) -> Result<(), ApiError> {
    for name in THEIRS {
        if fields.take(name).is_some_and(|value| value != false) {
            let message = format!("'{name}' isn't supported by this server.");
            return Err(ApiError::unsupported(name, message));
        }
    }
    Ok(())
}

fn repeated(fields: &Fields) -> Map<String, Value> {
    let given = fields.copy();
    let given = |name: &str| given.get(name).filter(|value| !value.is_null()).cloned();
    let mut all: Map<String, Value> =
        REPEATED.into_iter().map(|(name, absent)| (name.to_owned(), given(name).unwrap_or(absent))).collect();
    let others = [
        ("temperature", json!(1.0)),
        ("top_p", json!(1.0)),
        ("top_logprobs", json!(0)),
        ("tools", json!([])),
        ("tool_choice", json!("auto")),
        ("truncation", json!("disabled")),
        ("metadata", json!({})),
        ("text", json!({ "format": { "type": "text" } })),
        ("reasoning", json!({ "effort": null, "summary": null })),
    ];
    all.extend(others.map(|(name, absent)| (name.to_owned(), given(name).unwrap_or(absent))));
    all
}

fn invalid(name: impl Into<String>, what: &str) -> ApiError {
    let name = name.into();
    let message = format!("Invalid '{name}': {what}.");
    ApiError::field(name, "invalid_value", message)
}

fn string<'a>(name: &str, item: &'a Value, field: &str) -> Result<&'a str, ApiError> {
    match item.get(field) {
        Some(Value::String(text)) => Ok(text),
        None | Some(Value::Null) => Err(missing(format!("{name}.{field}"))),
        Some(other) => Err(wrong_type(format!("{name}.{field}"), "a string", other)),
    }
}

/// Adds an item to the messages; what the model thought, said and called in one turn is one message.
fn message(name: &str, item: &Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    if !item.is_object() {
        return Err(wrong_type(name, "an object", item));
    }
    match item.get("type").and_then(Value::as_str) {
        None | Some("message") => {
            let role = string(name, item, "role")?;
            let role = match role {
                "developer" => "system",
                "system" | "user" | "assistant" => role,
                _ => {
                    let what = "expected 'user', 'assistant', 'system' or 'developer'";
                    return Err(invalid(format!("{name}.role"), what));
                }
            };
            let content = content(&format!("{name}.content"), item.get("content"))?;
            match open_turn(messages).filter(|turn| role == "assistant" && turn.get("content").is_none()) {
                Some(turn) => turn["content"] = content,
                None => messages.push(json!({ "role": role, "content": content })),
            }
        }
        Some("reasoning") => {
            let thoughts = item.get("content").and_then(Value::as_array).into_iter().flatten();
            let thought: String = thoughts.filter_map(|part| part["text"].as_str()).collect();
            if !thought.is_empty() {
                messages.push(json!({ "role": "assistant", "reasoning_content": thought }));
            }
        }
        Some("function_call") => {
            let (id, called) = (string(name, item, "call_id")?, string(name, item, "name")?);
            let function = json!({ "name": called, "arguments": string(name, item, "arguments")? });
            let call = json!({ "id": id, "type": "function", "function": function });
            if open_turn(messages).is_none() {
                messages.push(json!({ "role": "assistant", "content": "" }));
            }
            if let Some(turn) = open_turn(messages) {
                match turn.get_mut("tool_calls").and_then(Value::as_array_mut) {
                    Some(calls) => calls.push(call),
                    None => turn["tool_calls"] = json!([call]),
                }
            }
        }
        Some("function_call_output") => {
            let id = string(name, item, "call_id")?;
            let content = content(&format!("{name}.output"), item.get("output"))?;
            messages.push(json!({ "role": "tool", "tool_call_id": id, "content": content }));
        }
        Some("item_reference") => {
            let message = "References to items aren't supported by this server: send the items, or 'previous_response_id'.";
            return Err(ApiError::unsupported(name.to_owned(), message));
        }
        Some(other) => {
            let other: String = other.chars().take(64).collect();
            let message = format!("Items of the type '{other}' aren't supported by this server ('{name}').");
            return Err(ApiError::unsupported(format!("{name}.type"), message));
        }
    }
    Ok(())
}

/// The last message, if it is the assistant's.
fn open_turn(messages: &mut [Value]) -> Option<&mut Value> {
    messages.last_mut().filter(|last| last["role"] == "assistant")
}

fn content(name: &str, content: Option<&Value>) -> Result<Value, ApiError> {
    match content {
        Some(Value::String(text)) => Ok(text.as_str().into()),
        Some(Value::Array(parts)) => {
            let parts = parts.iter().enumerate().map(|(number, one)| part(&format!("{name}[{number}]"), one));
            Ok(parts.collect::<Result<Vec<_>, _>>()?.into())
        }
        None | Some(Value::Null) => Err(missing(name)),
        Some(other) => Err(wrong_type(name, "a string or an array of parts", other)),
    }
}

fn part(name: &str, part: &Value) -> Result<Value, ApiError> {
    match string(name, part, "type")? {
        "input_text" | "output_text" | "text" => {
            Ok(json!({ "type": "text", "text": string(name, part, "text")? }))
        }
        "refusal" => Ok(json!({ "type": "text", "text": string(name, part, "refusal")? })),
        "input_image" => {
            let mut image = json!({ "url": string(name, part, "image_url")? });
            if let Some(detail) = part.get("detail").and_then(Value::as_str) {
                image["detail"] = detail.into();
            }
            Ok(json!({ "type": "image_url", "image_url": image }))
        }
        "input_file" => {
            let file =
                json!({ "filename": part.get("filename"), "file_data": string(name, part, "file_data")? });
            Ok(json!({ "type": "file", "file": file }))
        }
        other => {
            let other: String = other.chars().take(64).collect();
            let message = format!("Parts of the type '{other}' aren't supported by this server ('{name}').");
            Err(ApiError::unsupported(format!("{name}.type"), message))
        }
    }
}

/// Functions, which the client runs; what OpenAI's servers run, nobody here can.
fn tools(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let mut tools = Vec::new();
    for (number, tool) in fields.array("tools")?.unwrap_or_default().into_iter().enumerate() {
        let name = format!("tools[{number}]");
        match string(&name, &tool, "type")? {
            "function" => {}
            other => {
                let other: String = other.chars().take(64).collect();
                let message = format!(
                    "Tools of the type '{other}' aren't supported by this server: only functions are."
                );
                return Err(ApiError::unsupported(format!("{name}.type"), message));
            }
        }
        string(&name, &tool, "name")?;
        let Value::Object(mut function) = tool else { continue };
        function.remove("type");
        function.retain(|_, value| !value.is_null());
        tools.push(json!({ "type": "function", "function": function }));
    }
    match chat.get("tool_choice") {
        Some(Value::Object(choice)) => {
            let function = match (choice.get("type").and_then(Value::as_str), choice.get("name")) {
                (Some("function"), Some(Value::String(name))) => json!({ "name": name }),
                _ => {
                    let what =
                        "expected 'auto', 'none', 'required' or {\"type\": \"function\", \"name\": \"...\"}";
                    return Err(invalid("tool_choice", what));
                }
            };
            let choice = json!({ "type": "function", "function": function });
            chat.insert("tool_choice".into(), choice);
        }
        Some(_) if tools.is_empty() => _ = chat.remove("tool_choice"),
        _ => {}
    }
    if tools.is_empty() {
        chat.remove("parallel_tool_calls");
    } else {
        chat.insert("tools".into(), tools.into());
    }
    Ok(())
}

/// An answer in JSON, perhaps of a schema.
fn format(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(mut text) = fields.object("text")? else { return Ok(()) };
    let Some(format) = text.take("format") else { return Ok(()) };
    let wanted = match string("text.format", &format, "type")? {
        "text" => return Ok(()),
        "json_object" => json!({ "type": "json_object" }),
        "json_schema" => {
            let Value::Object(mut schema) = format else { return Ok(()) };
            schema.remove("type");
            schema.retain(|_, value| !value.is_null());
            if !schema.get("schema").is_some_and(Value::is_object) {
                return Err(missing("text.format.schema"));
            }
            json!({ "type": "json_schema", "json_schema": schema })
        }
        _ => return Err(invalid("text.format.type", "expected 'text', 'json_object' or 'json_schema'")),
    };
    chat.insert("response_format".into(), wanted);
    Ok(())
}
