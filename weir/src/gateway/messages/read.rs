//! From Anthropic's request to the chat that it is: what all models can be asked, in OpenAI's form.
use crate::gateway::error::ApiError;
use crate::gateway::fields::{Fields, wrong_type};
use crate::gateway::request::{OURS, Translated, missing};
use serde_json::{Map, Value, json};

/// Fields that mean the same in both APIs.
const SAME: [&str; 5] = ["model", "temperature", "top_p", "top_k", "stream"];
/// Stop sequences that are taken.
const STOPS_MAX: usize = 16;

/// A request in OpenAI's form, and as it came. A request that only has its tokens counted needs no `max_tokens`.
pub(in crate::gateway) fn read(mut fields: Fields, counts: bool) -> Result<Translated, ApiError> {
    let mut native = fields.copy();
    let mut chat = Map::new();
    for name in SAME.into_iter().chain(OURS) {
        chat.extend(fields.take(name).map(|value| (name.to_owned(), value)));
    }
    if let Some(temperature) = chat.get("temperature") {
        let hot = temperature.as_f64().is_some_and(|t| t > 1.0);
        if hot {
            return Err(invalid("temperature", "it must be between 0 and 1"));
        }
    }
    match fields.integer("max_tokens", 1..=i64::from(u32::MAX))? {
        Some(most) => _ = chat.insert("max_tokens".into(), most.into()),
        None if counts => {}
        None => return Err(missing("max_tokens")),
    }
    if let Some(stops) = stop_sequences(&mut fields)? {
        chat.insert("stop".into(), stops.into());
    }
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        messages.push(json!({ "role": "system", "content": system_content(system)? }));
    }
    let turns = fields.array("messages")?.ok_or_else(|| missing("messages"))?;
    if turns.is_empty() {
        return Err(invalid("messages", "at least one message is required"));
    }
    let begun = begun(&turns)?;
    let said = if begun.is_some() { &turns[..turns.len() - 1] } else { &turns[..] };
    for (number, turn) in said.iter().enumerate() {
        turn_messages(&format!("messages[{number}]"), turn, &mut messages)?;
    }
    if begun.is_some()
        && let Some(Value::Array(turns)) = native.get_mut("messages")
    {
        turns.pop();
    }
    chat.insert("messages".into(), messages.into());
    tools(&mut fields, &mut chat)?;
    format(&mut fields, &mut chat)?;
    thinking(&mut fields)?;
    if let Some(mut about) = fields.object("metadata")?
        && let Some(user) = about.string("user_id")?
    {
        chat.insert("user".into(), user.into());
    }
    for name in ["mcp_servers", "container"] {
        let there = fields.take(name).is_some_and(|value| value.as_array().is_none_or(|all| !all.is_empty()));
        if there {
            return Err(ApiError::unsupported(name, format!("'{name}' isn't supported by this server.")));
        }
    }
    // What only we know, Anthropic refuses.
    OURS.iter().for_each(|name| _ = native.remove(*name));
    Ok(Translated {
        native: Some(native),
        begun: begun.unwrap_or_default(),
        ..Translated::of(Fields::of(chat))
    })
}

fn invalid(name: impl Into<String>, what: &str) -> ApiError {
    let name = name.into();
    let message = format!("Invalid '{name}': {what}.");
    ApiError::field(name, "invalid_value", message)
}

fn stop_sequences(fields: &mut Fields) -> Result<Option<Vec<Value>>, ApiError> {
    let Some(stops) = fields.array("stop_sequences")? else { return Ok(None) };
    match &stops {
        stops if stops.len() > STOPS_MAX => {
            Err(invalid("stop_sequences", &format!("at most {STOPS_MAX} are taken")))
        }
        stops
            if stops
                .iter()
                .any(|stop| stop.as_str().is_none_or(|stop| stop.is_empty() || stop.len() > 1024)) =>
        {
            Err(invalid("stop_sequences", "each must be a string of 1 to 1024 bytes"))
        }
        _ => Ok((!stops.is_empty()).then_some(stops)),
    }
}

fn system_content(system: Value) -> Result<Value, ApiError> {
    match system {
        Value::String(_) => Ok(system),
        Value::Array(blocks) => {
            let parts = blocks.iter().enumerate().map(|(number, block)| {
                let name = format!("system[{number}]");
                match kind(&name, block)? {
                    "text" => text(&name, block),
                    _ => Err(invalid(name, "only blocks of the type 'text' are allowed here")),
                }
            });
            Ok(parts.collect::<Result<Vec<_>, _>>()?.into())
        }
        other => Err(wrong_type("system", "a string or an array of blocks", &other)),
    }
}

/// What the answer begins with: the text of a last message that is the assistant's, and all text.
fn begun(turns: &[Value]) -> Result<Option<String>, ApiError> {
    let Some(last) = turns.last().filter(|last| last["role"] == "assistant") else { return Ok(None) };
    let text = match &last["content"] {
        Value::String(text) => text.clone(),
        Value::Array(blocks) if blocks.iter().all(|block| block["type"] == "text") => {
            blocks.iter().filter_map(|block| block["text"].as_str()).collect()
        }
        _ => {
            let what = "a last message of the assistant's can only have text, with which the answer begins";
            return Err(invalid(format!("messages[{}].content", turns.len() - 1), what));
        }
    };
    if text.ends_with(char::is_whitespace) {
        let what = "a last message of the assistant's can't end in white space";
        return Err(invalid(format!("messages[{}].content", turns.len() - 1), what));
    }
    Ok(Some(text))
}

/// The messages of one turn: what tools said stands in messages of its own.
fn turn_messages(name: &str, turn: &Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let Value::Object(map) = turn else { return Err(wrong_type(name, "an object", turn)) };
    let is_user = match map.get("role").and_then(Value::as_str) {
        Some("user") => true,
        Some("assistant") => false,
        _ => {
            let what = "expected 'user' or 'assistant'; what 'system' says has a field of its own";
            return Err(invalid(format!("{name}.role"), what));
        }
    };
    let blocks = match map.get("content") {
        Some(Value::String(text)) => {
            let role = if is_user { "user" } else { "assistant" };
            messages.push(json!({ "role": role, "content": text }));
            return Ok(());
        }
        Some(Value::Array(blocks)) if !blocks.is_empty() => blocks,
        Some(Value::Array(_)) => return Err(invalid(format!("{name}.content"), "it is empty")),
        None => return Err(missing(format!("{name}.content"))),
        Some(other) => {
            return Err(wrong_type(format!("{name}.content"), "a string or an array of blocks", other));
        }
    };
    if is_user { user(name, blocks, messages) } else { assistant(name, blocks, messages) }
}

fn user(name: &str, blocks: &[Value], messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut parts = Vec::new();
    for (number, block) in blocks.iter().enumerate() {
        let name = format!("{name}.content[{number}]");
        if kind(&name, block)? == "tool_result" {
            let id = string(&name, block, "tool_use_id")?;
            let content = match &block["content"] {
                Value::Null => Value::from(""),
                Value::String(text) => text.as_str().into(),
                Value::Array(blocks) => {
                    let parts = blocks
                        .iter()
                        .enumerate()
                        .map(|(i, block)| part(&format!("{name}.content[{i}]"), block));
                    parts.collect::<Result<Vec<_>, _>>()?.into()
                }
                other => {
                    return Err(wrong_type(
                        format!("{name}.content"),
                        "a string or an array of blocks",
                        other,
                    ));
                }
            };
            messages.push(json!({ "role": "tool", "tool_call_id": id, "content": content }));
        } else {
            parts.push(part(&name, block)?);
        }
    }
    if !parts.is_empty() {
        messages.push(json!({ "role": "user", "content": parts }));
    }
    Ok(())
}

fn assistant(name: &str, blocks: &[Value], messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let (mut said, mut thought, mut calls) = (String::new(), String::new(), Vec::new());
    for (number, block) in blocks.iter().enumerate() {
        let name = format!("{name}.content[{number}]");
        match kind(&name, block)? {
            "text" => said.push_str(string(&name, block, "text")?),
            "thinking" => thought.push_str(string(&name, block, "thinking")?),
            "redacted_thinking" => {}
            "tool_use" => {
                let (id, called) = (string(&name, block, "id")?, string(&name, block, "name")?);
                let input = block.get("input").filter(|input| input.is_object());
                let input = input.ok_or_else(|| invalid(format!("{name}.input"), "expected an object"))?;
                let function = json!({ "name": called, "arguments": input.to_string() });
                calls.push(json!({ "id": id, "type": "function", "function": function }));
            }
            other => return Err(unknown(&name, other)),
        }
    }
    let mut message = json!({ "role": "assistant", "content": said });
    if !thought.is_empty() {
        message["reasoning_content"] = thought.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    messages.push(message);
    Ok(())
}

/// A block of a person's message, as a part of OpenAI's.
fn part(name: &str, block: &Value) -> Result<Value, ApiError> {
    match kind(name, block)? {
        "text" => text(name, block),
        "image" => {
            let source = &block["source"];
            let url = match kind(&format!("{name}.source"), source)? {
                "url" => string(&format!("{name}.source"), source, "url")?.to_owned(),
                "base64" => data_url(&format!("{name}.source"), source)?,
                _ => return Err(invalid(format!("{name}.source.type"), "expected 'base64' or 'url'")),
            };
            Ok(json!({ "type": "image_url", "image_url": { "url": url } }))
        }
        "document" => {
            let source = &block["source"];
            match kind(&format!("{name}.source"), source)? {
                "text" => {
                    Ok(json!({ "type": "text", "text": string(&format!("{name}.source"), source, "data")? }))
                }
                "base64" => {
                    let title = block["title"].as_str().unwrap_or("document.pdf");
                    let file = json!({ "filename": title, "file_data": data_url(&format!("{name}.source"), source)? });
                    Ok(json!({ "type": "file", "file": file }))
                }
                _ => Err(invalid(format!("{name}.source.type"), "expected 'text' or 'base64'")),
            }
        }
        other => Err(unknown(name, other)),
    }
}

fn data_url(name: &str, source: &Value) -> Result<String, ApiError> {
    let (kind, data) = (string(name, source, "media_type")?, string(name, source, "data")?);
    Ok(format!("data:{kind};base64,{data}"))
}

fn text(name: &str, block: &Value) -> Result<Value, ApiError> {
    Ok(json!({ "type": "text", "text": string(name, block, "text")? }))
}

fn kind<'a>(name: &str, block: &'a Value) -> Result<&'a str, ApiError> {
    string(name, block, "type")
}

fn string<'a>(name: &str, block: &'a Value, field: &str) -> Result<&'a str, ApiError> {
    match block.get(field) {
        Some(Value::String(text)) => Ok(text),
        None | Some(Value::Null) => Err(missing(format!("{name}.{field}"))),
        Some(other) => Err(wrong_type(format!("{name}.{field}"), "a string", other)),
    }
}

fn unknown(name: &str, kind: &str) -> ApiError {
    let kind: String = kind.chars().take(64).collect();
    ApiError::unsupported(
        format!("{name}.type"),
        format!("Blocks of the type '{kind}' aren't supported by this server ('{name}')."),
    )
}

/// Tools that the client runs; those that Anthropic runs, nobody here can.
fn tools(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let mut tools = Vec::new();
    for (number, tool) in fields.array("tools")?.unwrap_or_default().into_iter().enumerate() {
        let name = format!("tools[{number}]");
        if !tool.is_object() {
            return Err(wrong_type(name, "an object", &tool));
        }
        match tool.get("type").and_then(Value::as_str) {
            None | Some("custom") => {}
            Some(other) => {
                let other: String = other.chars().take(64).collect();
                let message = format!(
                    "Tools of the type '{other}' aren't supported by this server: only the client's own are."
                );
                return Err(ApiError::unsupported(format!("{name}.type"), message));
            }
        }
        let mut function = Map::new();
        function.insert("name".into(), string(&name, &tool, "name")?.into());
        function.extend(
            tool.get("description").filter(|d| d.is_string()).map(|d| ("description".to_owned(), d.clone())),
        );
        let schema = tool.get("input_schema").filter(|schema| schema.is_object());
        let schema =
            schema.ok_or_else(|| invalid(format!("{name}.input_schema"), "expected a JSON schema"))?;
        function.insert("parameters".into(), schema.clone());
        function
            .extend(tool.get("strict").filter(|s| s.is_boolean()).map(|s| ("strict".to_owned(), s.clone())));
        tools.push(json!({ "type": "function", "function": function }));
    }
    if tools.is_empty() {
        return Ok(());
    }
    chat.insert("tools".into(), tools.into());
    let Some(mut choice) = fields.object("tool_choice")? else { return Ok(()) };
    let within = |error: ApiError| error.within("tool_choice");
    if choice.boolean("disable_parallel_tool_use").map_err(within)? == Some(true) {
        chat.insert("parallel_tool_calls".into(), false.into());
    }
    let name = choice.string("name").map_err(within)?;
    let choice = match (choice.string("type").map_err(within)?.as_deref(), name) {
        (Some("auto"), _) => "auto".into(),
        (Some("any"), _) => "required".into(),
        (Some("none"), _) => "none".into(),
        (Some("tool"), Some(name)) => json!({ "type": "function", "function": { "name": name } }),
        (Some("tool"), None) => return Err(missing("tool_choice.name")),
        _ => return Err(invalid("tool_choice.type", "expected 'auto', 'any', 'tool' or 'none'")),
    };
    chat.insert("tool_choice".into(), choice);
    Ok(())
}

/// An answer in JSON of a schema.
fn format(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let old = fields.take("output_format");
    let mut format = fields.object("output_config")?.and_then(|mut config| config.take("format")).or(old);
    let Some(format) = format.take().filter(|f| !f.is_null()) else { return Ok(()) };
    if format["type"] != "json_schema" || !format["schema"].is_object() {
        return Err(invalid(
            "output_config.format",
            "expected {\"type\": \"json_schema\", \"schema\": {...}}",
        ));
    }
    let schema = json!({ "name": "answer", "schema": format["schema"], "strict": true });
    chat.insert("response_format".into(), json!({ "type": "json_schema", "json_schema": schema }));
    Ok(())
}

/// Whether the model may think first: whoever speaks Anthropic's API is told, and models of our own decide by themselves.
fn thinking(fields: &mut Fields) -> Result<(), ApiError> {
    let Some(mut thinking) = fields.object("thinking")? else { return Ok(()) };
    match thinking.string("type").map_err(|error| error.within("thinking"))?.as_deref() {
        Some("enabled" | "adaptive" | "disabled") => Ok(()),
        _ => Err(invalid("thinking.type", "expected 'enabled', 'adaptive' or 'disabled'")),
    }
}
