//! Anthropic's dialect: OpenAI's chat completions become `/v1/messages`, and its events become OpenAI's.
use crate::ask::{Api, Ask, ENVELOPE};
use crate::told::{Fault, Finish, Piece, Told, Usage};
use serde_json::{Map, Value, json};

/// The version of the API that is spoken.
pub(crate) const VERSION: &str = "2023-06-01";
/// The tool by whose arguments a model writes JSON of a schema.
const JSON_TOOL: &str = "answer";
/// Fields of OpenAI's that have no counterpart, and change little enough to be left out.
const LEFT_OUT: [&str; 22] = [
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "stop",
    "user",
    "temperature",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "min_p",
    "seed",
    "store",
    "modalities",
    "ignore_eos",
    "functions",
    "function_call",
    "reasoning_effort",
];

/// A request as Anthropic wants it.
pub(crate) struct Translated {
    pub body: Map<String, Value>,
    /// JSON of a schema was asked for: the arguments of [`JSON_TOOL`] are the answer's text.
    pub json: bool,
    /// White space at the end of the text so far, which Anthropic refuses.
    pub owed: String,
}

/// A field of a piece: Anthropic's signature of what the model thought, for clients that speak its API.
pub const THINKING_SIGNATURE: &str = "thinking_signature";
/// A field of a piece: thoughts that Anthropic shows to nobody.
pub const REDACTED_THINKING: &str = "redacted_thinking";
/// A field of a piece: the stop sequence at which the answer has ended.
pub const STOP_SEQUENCE: &str = "stop_sequence";

/// A request that came in Anthropic's form goes as it came.
fn as_it_came(ask: &Ask<'_>, native: &Map<String, Value>) -> Translated {
    let mut body = native.clone();
    body.insert("model".into(), ask.model.into());
    body.insert("max_tokens".into(), ask.max_tokens.into());
    body.insert("stream".into(), true.into());
    let trimmed = ask.so_far.trim_end();
    if let Some(Value::Array(messages)) = body.get_mut("messages").filter(|_| !trimmed.is_empty()) {
        messages.push(json!({ "role": "assistant", "content": trimmed }));
    }
    Translated { body, json: false, owed: ask.so_far[trimmed.len()..].to_owned() }
}

/// The body of a request; or what can't be translated, for its sender.
pub(crate) fn request(ask: &Ask<'_>) -> Result<Translated, String> {
    if ask.api != Api::Chat {
        return Err("only chats can be asked for, not plain completions or embeddings".into());
    }
    if let Some(native) = ask.native {
        return Ok(as_it_came(ask, native));
    }
    let left_out = |name: &str| ENVELOPE.contains(&name) || LEFT_OUT.contains(&name);
    let kept = ask.fields.iter().filter(|(name, _)| !left_out(name));
    let mut body: Map<String, Value> = kept.map(|(name, value)| (name.clone(), value.clone())).collect();
    body.insert("model".into(), ask.model.into());
    body.insert("max_tokens".into(), ask.max_tokens.into());
    body.insert("stream".into(), true.into());
    let (system, mut messages) = conversation(ask.fields)?;
    let trimmed = ask.so_far.trim_end();
    if !trimmed.is_empty() {
        push(&mut messages, "assistant", vec![json!({ "type": "text", "text": trimmed })]);
    }
    if !system.is_empty() {
        body.insert("system".into(), Value::Array(system));
    }
    body.insert("messages".into(), messages.into());
    if let Some(temperature) = ask.fields.get("temperature").and_then(Value::as_f64) {
        body.insert("temperature".into(), temperature.min(1.0).into());
    }
    match ask.fields.get("stop") {
        Some(Value::String(stop)) => _ = body.insert("stop_sequences".into(), json!([stop])),
        Some(Value::Array(stops)) => _ = body.insert("stop_sequences".into(), json!(stops)),
        _ => {}
    }
    if let Some(Value::String(user)) = ask.fields.get("user") {
        body.entry("metadata").or_insert_with(|| json!({ "user_id": user }));
    }
    let json = tools(ask.fields, &mut body)?;
    if json && !ask.so_far.is_empty() {
        return Err("an answer in JSON can't be gone on with".into());
    }
    Ok(Translated { body, json, owed: ask.so_far[trimmed.len()..].to_owned() })
}

/// The system's blocks, and the messages.
fn conversation(fields: &Map<String, Value>) -> Result<(Vec<Value>, Vec<Value>), String> {
    let (mut system, mut messages) = (Vec::new(), Vec::new());
    for message in fields.get("messages").and_then(Value::as_array).into_iter().flatten() {
        let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
        match role {
            "system" | "developer" => system.extend(blocks(message.get("content"))?),
            "user" => push(&mut messages, "user", blocks(message.get("content"))?),
            "assistant" => {
                let mut all = blocks(message.get("content"))?;
                for call in message.get("tool_calls").and_then(Value::as_array).into_iter().flatten() {
                    all.push(tool_use(call)?);
                }
                push(&mut messages, "assistant", all);
            }
            "tool" => {
                let id = message.get("tool_call_id").cloned().unwrap_or(Value::Null);
                let content = blocks(message.get("content"))?;
                let result = json!({ "type": "tool_result", "tool_use_id": id, "content": content });
                push(&mut messages, "user", vec![result]);
            }
            other => return Err(format!("a message of the role `{other}` can't be sent there")),
        }
    }
    Ok((system, messages))
}

/// Adds a message; one of the same role as the last goes on with it, since roles must take turns.
fn push(messages: &mut Vec<Value>, role: &str, mut content: Vec<Value>) {
    if content.is_empty() {
        return;
    }
    if let Some(last) = messages.last_mut().filter(|last| last["role"] == role)
        && let Some(Value::Array(before)) = last.get_mut("content")
    {
        before.append(&mut content);
        return;
    }
    messages.push(json!({ "role": role, "content": content }));
}

/// A message's content as blocks; empty text is none, since Anthropic refuses it.
fn blocks(content: Option<&Value>) -> Result<Vec<Value>, String> {
    let text = |text: &str| (!text.is_empty()).then(|| json!({ "type": "text", "text": text }));
    match content {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(content)) => Ok(text(content).into_iter().collect()),
        Some(Value::Array(parts)) => {
            let mut all = Vec::with_capacity(parts.len());
            for part in parts {
                match part.get("type").and_then(Value::as_str) {
                    Some("text") if part.get("text").and_then(Value::as_str) == Some("") => {}
                    // As it is: it may carry `cache_control`.
                    Some("text") => all.push(part.clone()),
                    Some("refusal") => all.extend(part.get("refusal").and_then(Value::as_str).and_then(text)),
                    Some("image_url") => all.push(image(part)?),
                    // Anthropic's own, for those who know whom they ask.
                    Some("image" | "document" | "thinking" | "redacted_thinking") => all.push(part.clone()),
                    other => {
                        return Err(format!(
                            "a part of the type `{}` can't be sent there",
                            other.unwrap_or("?")
                        ));
                    }
                }
            }
            Ok(all)
        }
        Some(_) => Err("a message's content must be a string or a list of parts".into()),
    }
}

/// OpenAI's images are addresses, some of which contain all of the image.
fn image(part: &Value) -> Result<Value, String> {
    let url = part.pointer("/image_url/url").and_then(Value::as_str).ok_or("an image without a url")?;
    let source = match url.strip_prefix("data:") {
        None => json!({ "type": "url", "url": url }),
        Some(data) => {
            let (kind, data) = data.split_once(";base64,").ok_or("an image's data must be in base64")?;
            json!({ "type": "base64", "media_type": kind, "data": data })
        }
    };
    Ok(json!({ "type": "image", "source": source }))
}

fn tool_use(call: &Value) -> Result<Value, String> {
    let function = call.get("function").ok_or("a tool call without a function")?;
    let arguments = function.get("arguments").and_then(Value::as_str).unwrap_or_default();
    let input: Value = match arguments.trim() {
        "" => json!({}),
        text => serde_json::from_str(text).map_err(|_| "a tool call whose arguments are no JSON")?,
    };
    Ok(json!({ "type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": input }))
}

/// Tools, how they are chosen, and JSON of a schema, which a tool of ours stands for. Says whether that is so.
fn tools(fields: &Map<String, Value>, body: &mut Map<String, Value>) -> Result<bool, String> {
    let mut tools = Vec::new();
    for tool in fields.get("tools").and_then(Value::as_array).into_iter().flatten() {
        let Some(function) = tool.get("function") else {
            // Anthropic's own kinds of tools.
            tools.push(tool.clone());
            continue;
        };
        let mut translated = Map::new();
        for name in ["name", "description"] {
            translated.extend(function.get(name).map(|value| (name.to_owned(), value.clone())));
        }
        let schema = function.get("parameters").cloned().unwrap_or_else(|| json!({ "type": "object" }));
        translated.insert("input_schema".into(), schema);
        translated.extend(tool.get("cache_control").map(|value| ("cache_control".to_owned(), value.clone())));
        tools.push(Value::Object(translated));
    }
    let format = fields.get("response_format").and_then(|format| format.get("type")).and_then(Value::as_str);
    let json = matches!(format, Some("json_schema" | "json_object"));
    if json {
        if !tools.is_empty() {
            return Err("tools and an answer in JSON can't be asked for together there".into());
        }
        let schema = fields.get("response_format").and_then(|format| format.pointer("/json_schema/schema"));
        let schema = schema.cloned().unwrap_or_else(|| json!({ "type": "object" }));
        let description = "Gives the answer. Call it once, with the whole answer.";
        tools.push(json!({ "name": JSON_TOOL, "description": description, "input_schema": schema }));
        body.insert("tool_choice".into(), json!({ "type": "tool", "name": JSON_TOOL }));
    }
    if tools.is_empty() {
        return Ok(false);
    }
    body.insert("tools".into(), tools.into());
    if !json {
        let mut choice = match fields.get("tool_choice") {
            Some(Value::String(choice)) if choice == "none" => json!({ "type": "none" }),
            Some(Value::String(choice)) if choice == "required" => json!({ "type": "any" }),
            Some(choice) if choice.pointer("/function/name").is_some() => {
                json!({ "type": "tool", "name": choice.pointer("/function/name") })
            }
            _ => json!({ "type": "auto" }),
        };
        if fields.get("parallel_tool_calls") == Some(&Value::Bool(false)) && choice["type"] != "none" {
            choice["disable_parallel_tool_use"] = true.into();
        }
        body.insert("tool_choice".into(), choice);
    }
    Ok(json)
}

/// Reads the events of an answer.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// The arguments of [`JSON_TOOL`] are the answer's text.
    json: bool,
    /// Whoever asked speaks Anthropic's API: what only that has is told, too.
    native: bool,
    /// Tool calls so far.
    calls: u32,
    usage: Usage,
}

impl Reader {
    /// With `json`, the answer's text is what [`JSON_TOOL`] is given.
    pub fn new(json: bool, native: bool) -> Reader {
        Reader { json, native, ..Reader::default() }
    }

    pub fn take(&mut self, data: &str, told: &mut Told) -> Result<(), Fault> {
        if told.done || data.trim().is_empty() {
            return Ok(());
        }
        let event: Value = serde_json::from_str(data)
            .map_err(|e| Fault::Nonsense(format!("an event that is no JSON ({e})")))?;
        let kind = event.get("type").and_then(Value::as_str).unwrap_or_default();
        let piece = match kind {
            "message_start" => {
                self.count(event.pointer("/message/usage"), told);
                None
            }
            "content_block_start" => self.block(event.get("content_block")),
            "content_block_delta" => self.delta(event.get("delta")),
            "message_delta" => {
                self.count(event.get("usage"), told);
                if let Some(reason) = event.pointer("/delta/stop_reason").and_then(Value::as_str) {
                    told.finish = Some(self.finish(reason));
                }
                let sequence = event.pointer("/delta/stop_sequence").and_then(Value::as_str);
                sequence.and_then(|sequence| self.only_native(STOP_SEQUENCE, sequence))
            }
            "message_stop" if told.finish.is_none() => {
                return Err(Fault::Nonsense("an end without a reason".into()));
            }
            "message_stop" => {
                told.done = true;
                None
            }
            "error" => return Err(crate::openai::said(event.get("error").unwrap_or(&Value::Null))),
            "" => return Err(Fault::Nonsense("an event without a type".into())),
            // Pings, ends of blocks, and what is new.
            _ => None,
        };
        told.pieces.extend(piece.filter(|piece| !piece.is_empty()));
        Ok(())
    }

    fn block(&mut self, block: Option<&Value>) -> Option<Piece> {
        let block = block?;
        match block.get("type").and_then(Value::as_str)? {
            "text" => Some(text(block.get("text")?.as_str()?)),
            "tool_use" if !self.json => {
                self.calls += 1;
                let function = json!({ "name": block.get("name"), "arguments": "" });
                Some(self.call(json!({ "id": block.get("id"), "type": "function", "function": function })))
            }
            "redacted_thinking" => self.only_native(REDACTED_THINKING, block.get("data")?.as_str()?),
            _ => None,
        }
    }

    /// What only clients that speak Anthropic's API understand.
    fn only_native(&self, name: &str, value: &str) -> Option<Piece> {
        let rest = Map::from_iter([(name.to_owned(), value.into())]);
        self.native.then(|| Piece { rest, ..Piece::default() })
    }

    fn delta(&self, delta: Option<&Value>) -> Option<Piece> {
        let delta = delta?;
        let field = |name: &str| delta.get(name).and_then(Value::as_str);
        match field("type")? {
            "text_delta" => Some(text(field("text")?)),
            "input_json_delta" if self.json => Some(text(field("partial_json")?)),
            "input_json_delta" => {
                let arguments = field("partial_json").filter(|json| !json.is_empty())?;
                Some(self.call(json!({ "function": { "arguments": arguments } })))
            }
            "thinking_delta" => {
                let mut rest = Map::new();
                rest.insert("reasoning_content".into(), field("thinking")?.into());
                Some(Piece { rest, ..Piece::default() })
            }
            "signature_delta" => self.only_native(THINKING_SIGNATURE, field("signature")?),
            _ => None,
        }
    }

    /// A part of the tool call that came last.
    fn call(&self, mut call: Value) -> Piece {
        call["index"] = self.calls.saturating_sub(1).into();
        let mut rest = Map::new();
        rest.insert("tool_calls".into(), json!([call]));
        Piece { rest, ..Piece::default() }
    }

    fn finish(&self, reason: &str) -> Finish {
        match reason {
            "end_turn" | "stop_sequence" | "pause_turn" => Finish::Stop,
            "max_tokens" | "model_context_window_exceeded" => Finish::Length,
            "tool_use" if self.json => Finish::Stop,
            "tool_use" => Finish::Other("tool_calls".into()),
            "refusal" => Finish::Other("content_filter".into()),
            other => Finish::Other(other.to_owned()),
        }
    }

    /// Counts are told piece by piece, those of output in all so far; what is cached isn't part of `input_tokens`.
    fn count(&mut self, usage: Option<&Value>, told: &mut Told) {
        let Some(usage) = usage else { return };
        let count = |name: &str| {
            usage.get(name).and_then(Value::as_u64).map(|n| u32::try_from(n).unwrap_or(u32::MAX))
        };
        if let Some(input) = count("input_tokens") {
            let cached = count("cache_read_input_tokens").unwrap_or(self.usage.cached_tokens);
            let written = count("cache_creation_input_tokens").unwrap_or(self.usage.cache_write_tokens);
            self.usage.prompt_tokens = input.saturating_add(cached).saturating_add(written);
            (self.usage.cached_tokens, self.usage.cache_write_tokens) = (cached, written);
        }
        self.usage.output_tokens = count("output_tokens").unwrap_or(self.usage.output_tokens);
        told.usage = Some(self.usage);
    }
}

fn text(text: &str) -> Piece {
    Piece { text: text.to_owned(), ..Piece::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translate(fields: Value, so_far: &str) -> Result<Translated, String> {
        let Value::Object(fields) = fields else { panic!() };
        let api = Api::Chat;
        request(&Ask {
            api,
            fields: &fields,
            native: None,
            model: "claude",
            max_tokens: 9,
            so_far,
            seed: None,
            first_by: None,
            traceparent: None,
        })
    }

    #[test]
    fn conversations_are_translated() {
        let fields = json!({
            "messages": [
                { "role": "system", "content": "Be brief." },
                { "role": "user", "content": [
                    { "type": "text", "text": "What is it?" },
                    { "type": "image_url", "image_url": { "url": "data:image/png;base64,AAAA" } },
                ] },
                { "role": "assistant", "content": null, "tool_calls": [
                    { "id": "t1", "type": "function", "function": { "name": "look", "arguments": "{\"at\":1}" } },
                    { "id": "t2", "type": "function", "function": { "name": "look", "arguments": "" } },
                ] },
                { "role": "tool", "tool_call_id": "t1", "content": "a cat" },
                { "role": "tool", "tool_call_id": "t2", "content": "a dog" },
            ],
            "tools": [{ "type": "function", "function": { "name": "look", "parameters": { "type": "object" } } }],
            "tool_choice": "required", "parallel_tool_calls": false, "temperature": 1.5, "stop": "END", "top_k": 3,
            "user": "u", "thinking": { "type": "disabled" }, "seed": 1, "max_tokens": 1000, "n": 1,
        });
        let Translated { body, json, owed } = translate(fields, "It is \n").unwrap();
        assert!(!json && owed == " \n");
        let text = |text: &str| json!({ "type": "text", "text": text });
        let result = |id: &str, what: &str| json!({ "type": "tool_result", "tool_use_id": id, "content": [text(what)] });
        let expected = json!({
            "top_k": 3, "thinking": { "type": "disabled" }, "model": "claude", "max_tokens": 9, "stream": true,
            "system": [text("Be brief.")],
            "messages": [
                { "role": "user", "content": [
                    text("What is it?"),
                    { "type": "image", "source": { "type": "base64", "media_type": "image/png", "data": "AAAA" } },
                ] },
                { "role": "assistant", "content": [
                    { "type": "tool_use", "id": "t1", "name": "look", "input": { "at": 1 } },
                    { "type": "tool_use", "id": "t2", "name": "look", "input": {} },
                ] },
                { "role": "user", "content": [result("t1", "a cat"), result("t2", "a dog")] },
                { "role": "assistant", "content": [text("It is")] },
            ],
            "temperature": 1.0, "stop_sequences": ["END"], "metadata": { "user_id": "u" },
            "tools": [{ "name": "look", "input_schema": { "type": "object" } }],
            "tool_choice": { "type": "any", "disable_parallel_tool_use": true },
        });
        assert_eq!(Value::Object(body), expected);
    }

    #[test]
    fn what_has_no_counterpart_is_refused() {
        let check = |fields: Value, part: &str| match translate(fields, "") {
            Err(why) => assert!(why.contains(part), "{why}"),
            Ok(_) => panic!("{part}"),
        };
        check(
            json!({ "messages": [{ "role": "user", "content": [{ "type": "input_audio" }] }] }),
            "input_audio",
        );
        check(json!({ "messages": [{ "role": "function", "content": "x" }] }), "function");
        check(json!({ "messages": [{ "role": "user", "content": 7 }] }), "string or a list");
        let both = json!({ "messages": [], "tools": [{ "function": { "name": "f" } }], "response_format": { "type": "json_object" } });
        check(both, "together");
    }

    fn read(json: bool, events: &[Value]) -> Result<Told, ()> {
        let (mut reader, mut told) = (Reader::new(json, false), Told::default());
        events.iter().try_for_each(|event| reader.take(&event.to_string(), &mut told).map_err(|_| ()))?;
        Ok(told)
    }

    #[test]
    fn events_become_pieces() {
        let start = json!({ "type": "message_start", "message": { "usage": {
            "input_tokens": 10, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 2, "output_tokens": 1,
        } } });
        let block = |kind: Value| json!({ "type": "content_block_start", "index": 0, "content_block": kind });
        let delta = |delta: Value| json!({ "type": "content_block_delta", "index": 0, "delta": delta });
        let end = |reason: &str| json!({ "type": "message_delta", "delta": { "stop_reason": reason }, "usage": { "output_tokens": 20 } });
        let tool = || block(json!({ "type": "tool_use", "id": "t", "name": "f", "input": {} }));
        let events = [
            start,
            json!({ "type": "ping" }),
            block(json!({ "type": "thinking", "thinking": "" })),
            delta(json!({ "type": "thinking_delta", "thinking": "hm" })),
            delta(json!({ "type": "signature_delta", "signature": "x" })),
            block(json!({ "type": "text", "text": "" })),
            delta(json!({ "type": "text_delta", "text": "Hi" })),
            json!({ "type": "content_block_stop", "index": 0 }),
            tool(),
            delta(json!({ "type": "input_json_delta", "partial_json": "{}" })),
            end("tool_use"),
            json!({ "type": "message_stop" }),
        ];
        let told = read(false, &events).unwrap();
        let usage = Usage { prompt_tokens: 17, cached_tokens: 5, cache_write_tokens: 2, output_tokens: 20 };
        assert_eq!((told.usage, told.done), (Some(usage), true));
        assert_eq!(told.finish, Some(Finish::Other("tool_calls".into())));
        let pieces: Vec<_> =
            told.pieces.iter().map(|p| (p.text.as_str(), Value::Object(p.rest.clone()))).collect();
        let function = json!({ "name": "f", "arguments": "" });
        let call =
            json!({ "tool_calls": [{ "id": "t", "type": "function", "function": function, "index": 0 }] });
        let more = json!({ "tool_calls": [{ "function": { "arguments": "{}" }, "index": 0 }] });
        assert_eq!(
            pieces,
            [("", json!({ "reasoning_content": "hm" })), ("Hi", json!({})), ("", call), ("", more)]
        );
        // JSON of a schema is text.
        let told = read(true, &[tool(), events[9].clone(), end("tool_use")]).unwrap();
        assert_eq!((told.pieces[0].text.as_str(), told.finish), ("{}", Some(Finish::Stop)));
    }

    #[test]
    fn what_is_no_event_is_refused() {
        let overloaded =
            json!({ "type": "error", "error": { "type": "overloaded_error", "message": "Overloaded" } });
        for bad in [json!({}), json!([]), json!({ "type": "message_stop" }), overloaded] {
            assert!(read(false, std::slice::from_ref(&bad)).is_err(), "{bad}");
        }
    }
}
