//! OpenAI's dialect: chat completions and completions, streamed.
use crate::ask::{Api, Ask, ENVELOPE};
use crate::catalog::{LengthField, Prefill, Provider};
use crate::told::{Fault, Finish, Piece, Told, Usage};
use serde_json::{Map, Value, json};

/// A field of a piece: embeddings, as OpenAI's `data`.
pub const EMBEDDINGS: &str = "embeddings";

/// The path of a request below the version, and its body.
pub(crate) fn request(
    provider: &Provider,
    prefill: Prefill,
    ask: &Ask<'_>,
) -> (&'static str, Map<String, Value>) {
    let left_out =
        |name: &str| ENVELOPE.contains(&name) || provider.refuses.iter().any(|refused| refused == name);
    let kept = ask.fields.iter().filter(|(name, _)| !left_out(name));
    let mut body: Map<String, Value> = kept.map(|(name, value)| (name.clone(), value.clone())).collect();
    body.insert("model".into(), ask.model.into());
    if ask.api == Api::Embedding {
        return ("embeddings", body);
    }
    body.insert("stream".into(), true.into());
    if provider.stream_options {
        body.insert("stream_options".into(), json!({ "include_usage": true }));
    }
    let chat = ask.api == Api::Chat;
    let length = match provider.length_field {
        LengthField::MaxCompletionTokens if chat => "max_completion_tokens",
        _ => "max_tokens",
    };
    body.insert(length.into(), ask.max_tokens.into());
    if let Some(seed) = ask.seed.filter(|_| !left_out("seed")) {
        // JSON numbers beyond this lose digits in many a parser.
        body.insert("seed".into(), (seed & 0x7fff_ffff).into());
    }
    match (ask.so_far, chat) {
        ("", _) => {}
        (text, false) => {
            let prompt = body.get("prompt").and_then(Value::as_str).unwrap_or_default().to_owned() + text;
            body.insert("prompt".into(), prompt.into());
        }
        (text, true) => begin_with(&mut body, prefill, text),
    }
    (if chat { "chat/completions" } else { "completions" }, body)
}

/// Lets the answer begin with a text.
fn begin_with(body: &mut Map<String, Value>, prefill: Prefill, text: &str) {
    let mut message = json!({ "role": "assistant", "content": text });
    match prefill {
        Prefill::Prefix => message["prefix"] = true.into(),
        Prefill::Continue => {
            body.insert("continue_final_message".into(), true.into());
            body.insert("add_generation_prompt".into(), false.into());
        }
        Prefill::Plain | Prefill::None => {}
    }
    if let Some(Value::Array(messages)) = body.get_mut("messages") {
        messages.push(message);
    }
}

/// Reads the chunks of an answer.
#[derive(Debug, Default)]
pub(crate) struct Reader;

impl Reader {
    pub fn take(&mut self, data: &str, told: &mut Told) -> Result<(), Fault> {
        let data = data.trim();
        if told.done || data.is_empty() {
            return Ok(());
        }
        if data == "[DONE]" {
            return match told.finish {
                Some(_) => {
                    told.done = true;
                    Ok(())
                }
                None => Err(Fault::Nonsense("an end without a reason".into())),
            };
        }
        let value = serde_json::from_str(data);
        self.take_value(
            value.map_err(|error| Fault::Nonsense(format!("an event that is no JSON ({error})")))?,
            told,
        )
    }

    /// The whole of an answer with embeddings.
    pub fn take_embeddings(value: Value, told: &mut Told) -> Result<(), Fault> {
        let Value::Object(mut answer) = value else {
            return Err(Fault::Nonsense("an answer that is no object".into()));
        };
        if let Some(error) = answer.remove("error").filter(|error| !error.is_null()) {
            return Err(said(&error));
        }
        let data = answer.remove("data").filter(Value::is_array);
        let data = data.ok_or_else(|| Fault::Nonsense("an answer without embeddings".into()))?;
        told.usage = answer.get("usage").and_then(Value::as_object).map(read_usage);
        let rest = Map::from_iter([(EMBEDDINGS.to_owned(), data)]);
        told.pieces.push_back(Piece { rest, ..Piece::default() });
        told.finish = Some(Finish::Stop);
        Ok(())
    }

    /// A chunk, or the whole of an answer that isn't streamed.
    pub fn take_value(&mut self, value: Value, told: &mut Told) -> Result<(), Fault> {
        let Value::Object(mut chunk) = value else {
            return Err(Fault::Nonsense("an event that is no object".into()));
        };
        if let Some(error) = chunk.remove("error").filter(|error| !error.is_null()) {
            return Err(said(&error));
        }
        if let Some(usage) = chunk.get("usage").and_then(Value::as_object) {
            told.usage = Some(read_usage(usage));
            told.usd = usage.get("cost").and_then(Value::as_f64).filter(|usd| usd.is_finite() && *usd >= 0.0);
        }
        let choices = chunk.remove("choices").unwrap_or(Value::Null);
        let choice = match choices {
            Value::Array(choices) => choices.into_iter().next(),
            Value::Null if chunk.contains_key("usage") || chunk.contains_key("object") => None,
            _ => return Err(Fault::Nonsense("an event without choices".into())),
        };
        let Some(Value::Object(choice)) = choice else { return Ok(()) };
        take_choice(choice, told);
        Ok(())
    }
}

fn take_choice(mut choice: Map<String, Value>, told: &mut Told) {
    let mut piece =
        Piece { logprobs: choice.remove("logprobs").filter(|l| !l.is_null()), ..Piece::default() };
    if let Some(Value::String(text)) = choice.remove("text") {
        piece.text = text;
    }
    if let Some(Value::Object(delta)) = choice.remove("delta").or_else(|| choice.remove("message")) {
        for (name, value) in delta {
            match (name.as_str(), value) {
                ("role", _) | (_, Value::Null) => {}
                ("content", Value::String(text)) => piece.text.push_str(&text),
                (_, Value::Array(list)) if list.is_empty() => {}
                (_, value) => _ = piece.rest.insert(name, value),
            }
        }
    }
    // Nothing is taken from an answer that has ended but its usage.
    if told.finish.is_none() && !piece.is_empty() {
        told.pieces.push_back(piece);
    }
    if let Some(Value::String(reason)) = choice.remove("finish_reason") {
        told.finish = Some(match reason.as_str() {
            "stop" | "eos" => Finish::Stop,
            "length" => Finish::Length,
            _ => Finish::Other(reason),
        });
    }
}

/// What an error object says; some are bare strings.
pub(crate) fn said(error: &Value) -> Fault {
    let text = |name: &str| match error.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        _ => String::new(),
    };
    let message = match error {
        Value::String(message) => message.clone(),
        other => Some(text("message")).filter(|m| !m.is_empty()).unwrap_or_else(|| other.to_string()),
    };
    Fault::Said { kind: format!("{} {}", text("type"), text("code")), message }
}

fn read_usage(usage: &Map<String, Value>) -> Usage {
    let count = |value: Option<&Value>| {
        value.and_then(Value::as_u64).map_or(0, |n| u32::try_from(n).unwrap_or(u32::MAX))
    };
    let cached = usage.get("prompt_tokens_details").and_then(|details| details.get("cached_tokens"));
    Usage {
        prompt_tokens: count(usage.get("prompt_tokens")),
        // DeepSeek has a name of its own for it.
        cached_tokens: count(cached.or(usage.get("prompt_cache_hit_tokens"))),
        cache_write_tokens: 0,
        output_tokens: count(usage.get("completion_tokens")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{Catalog, Entry};

    fn read(events: &[&str]) -> (Told, bool) {
        let (mut reader, mut told) = (Reader, Told::default());
        let good = events.iter().all(|event| reader.take(event, &mut told).is_ok());
        (told, good)
    }

    #[test]
    fn chunks_become_pieces() {
        let (told, good) = read(&[
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"Hi"}}],"usage":null}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"a","function":{"name":"f","arguments":""}}]}}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"tool_calls"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}}"#,
            "[DONE]",
        ]);
        assert!(good && told.done);
        assert_eq!(told.pieces.len(), 2);
        assert_eq!(told.pieces[0].text, "Hi");
        assert_eq!(told.pieces[1].rest["tool_calls"][0]["function"]["name"], "f");
        assert_eq!(told.finish, Some(Finish::Other("tool_calls".into())));
        let usage = Usage { prompt_tokens: 7, cached_tokens: 2, cache_write_tokens: 0, output_tokens: 3 };
        assert_eq!(told.usage, Some(usage));
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        for bad in [
            "x",
            "[]",
            "{}",
            r#"{"choices":3}"#,
            r#"{"error":{"message":"no"}}"#,
            r#"{"error":"no"}"#,
            "[DONE]",
        ] {
            assert!(!read(&[bad]).1, "{bad}");
        }
        for odd in [r#"{"choices":[]}"#, r#"{"choices":[7]}"#, r#"{"object":"chat.completion.chunk"}"#, ""] {
            assert!(read(&[odd]).1, "{odd}");
        }
    }

    fn check_request(entry: &str, so_far: &str, expected: Value) {
        let catalog = Catalog::built_in().unwrap();
        let entry: Entry = toml::from_str(entry).unwrap();
        let provider = catalog.resolve(&entry).unwrap();
        let fields = json!({
            "model": "theirs", "messages": [{ "role": "user", "content": "hi" }], "stream": false, "n": 3, "top_k": 4,
            "weir": { "tags": {} }, "max_tokens": 99, "temperature": 0.5, "unknown": [1],
        });
        let Value::Object(fields) = fields else { panic!() };
        let api = Api::Chat;
        let ask = Ask {
            api,
            fields: &fields,
            native: None,
            model: "m",
            max_tokens: 5,
            so_far,
            seed: None,
            first_by: None,
            traceparent: None,
        };
        let (path, body) = request(&provider, provider.prefill, &ask);
        assert_eq!((path, Value::Object(body)), ("chat/completions", expected));
    }

    #[test]
    fn fields_pass_through_but_for_the_envelope() {
        check_request(
            "name = 'openai'",
            "",
            json!({
                "messages": [{ "role": "user", "content": "hi" }], "temperature": 0.5, "unknown": [1], "model": "m",
                "stream": true, "stream_options": { "include_usage": true }, "max_completion_tokens": 5,
            }),
        );
        check_request(
            "name = 'vllm'\nurl = 'http://h'",
            "So",
            json!({
                "messages": [{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "So" }],
                "top_k": 4, "temperature": 0.5, "unknown": [1], "model": "m", "stream": true,
                "stream_options": { "include_usage": true }, "max_tokens": 5, "continue_final_message": true,
                "add_generation_prompt": false,
            }),
        );
        check_request(
            "name = 'mistral'",
            "So",
            json!({
                "messages": [
                    { "role": "user", "content": "hi" }, { "role": "assistant", "content": "So", "prefix": true },
                ],
                "temperature": 0.5, "unknown": [1], "model": "m", "stream": true, "max_tokens": 5,
            }),
        );
    }
}
