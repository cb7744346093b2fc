//! Writing answers: JSON straight into the buffer that goes to the socket, no trees of values in between.
use super::parts::{Ending, Gathered, Part, Said};
use super::request::Api;
use super::running::{Running, Total};
use bytes::{BufMut, BytesMut};
use serde::Serialize;
use serde_json::{Map, Value, json};
use weir_scheduler::{Candidate, Logprob};

/// Writes the chunks of one streamed answer, or all of a whole one.
pub(super) struct Writer {
    api: Api,
    /// `{"id":..,"object":..,"created":..,"model":..,"choices":[`, with `data: ` before it in a stream.
    head: Vec<u8>,
    /// What closes the list of choices in a chunk that isn't the last.
    tail: &'static str,
    /// Characters written so far, by choice: the legacy form of log-probabilities counts them.
    offsets: Vec<usize>,
}

/// What every part of one answer says of it.
pub(super) struct Label<'a> {
    pub(super) id: &'a str,
    pub(super) model: &'a str,
    /// Seconds since 1970.
    pub(super) created: u64,
}

impl Writer {
    /// For server-sent events. With `include_usage`, all chunks but the last say that they have none.
    pub(super) fn of_stream(api: Api, label: &Label<'_>, choices: usize, include_usage: bool) -> Writer {
        let object = match api {
            Api::Completion => "text_completion",
            _ => "chat.completion.chunk",
        };
        let mut head = b"data: ".to_vec();
        head.extend_from_slice(&write_head(object, label));
        let tail = if include_usage { "],\"usage\":null}\n\n" } else { "]}\n\n" };
        Writer { api, head, tail, offsets: vec![0; choices] }
    }

    /// For one JSON object.
    pub(super) fn of_whole(api: Api, label: &Label<'_>, choices: usize) -> Writer {
        let object = match api {
            Api::Completion => "text_completion",
            _ => "chat.completion",
        };
        Writer { api, head: write_head(object, label), tail: "]", offsets: vec![0; choices] }
    }

    /// The first chunk of a chat's choice.
    pub(super) fn role(&self, out: &mut BytesMut, choice: usize) {
        self.open(out, choice);
        put(
            out,
            r#","delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}"#,
        );
        put(out, self.tail);
    }

    /// A chunk of text.
    pub(super) fn text(&mut self, out: &mut BytesMut, choice: usize, text: &str, logprob: Option<&Logprob>) {
        self.open(out, choice);
        put(out, if self.api == Api::Chat { r#","delta":{"content":"# } else { r#","text":"# });
        json(out, text);
        put(out, if self.api == Api::Chat { r#"},"logprobs":"# } else { r#","logprobs":"# });
        self.logprobs(out, choice, logprob.map(std::slice::from_ref));
        put(out, r#","finish_reason":null}"#);
        put(out, self.tail);
    }

    /// A chunk of whatever was said at once.
    pub(super) fn said(&mut self, out: &mut BytesMut, choice: usize, said: Said) {
        let plain = match said.parts.as_slice() {
            [] => Some(""),
            [Part::Text(text)] => Some(text.as_str()),
            _ => None,
        };
        match plain.filter(|_| said.rest.is_empty() && said.their_logprobs.is_none()) {
            Some(text) => self.text(out, choice, text, said.logprob.as_ref()),
            None => self.more(out, choice, said),
        }
    }

    /// A chunk of more than text.
    fn more(&mut self, out: &mut BytesMut, choice: usize, said: Said) {
        self.open(out, choice);
        if self.api == Api::Chat {
            put(out, r#","delta":"#);
            json(out, &delta(said.parts, said.rest));
        } else {
            let text = |part: &Part| if let Part::Text(text) = part { text.clone() } else { String::new() };
            put(out, r#","text":"#);
            json(out, &said.parts.iter().map(text).collect::<String>());
        }
        put(out, r#","logprobs":"#);
        match &said.their_logprobs {
            Some(theirs) => json(out, theirs),
            None => self.logprobs(out, choice, said.logprob.as_ref().map(std::slice::from_ref)),
        }
        put(out, r#","finish_reason":null}"#);
        put(out, self.tail);
    }

    /// A prompt that is echoed counts in the offsets.
    pub(super) fn skip(&mut self, choice: usize, text: &str) {
        self.offsets[choice] += text.chars().count();
    }

    /// The last chunk of a choice; where it is the last of all, `ran` says where the request ran.
    pub(super) fn finish(&self, out: &mut BytesMut, choice: usize, reason: &str, ran: Option<&Running>) {
        self.open(out, choice);
        put(out, if self.api == Api::Chat { r#","delta":{}"# } else { r#","text":"""# });
        put(out, r#","logprobs":null,"finish_reason":"#);
        json(out, reason);
        put(out, "}");
        match ran {
            None => put(out, self.tail),
            Some(running) => {
                put(out, "]");
                write_weir(out, running);
                put(out, "}\n\n");
            }
        }
    }

    /// The chunk that only has usage.
    pub(super) fn usage(&self, out: &mut BytesMut, total: &Total, running: &Running) {
        out.put_slice(&self.head);
        put(out, "]");
        write_usage(out, total);
        write_weir(out, running);
        put(out, "}\n\n");
    }

    /// A whole answer.
    pub(super) fn whole(&mut self, choices: &[Gathered], total: &Total, running: &Running) -> BytesMut {
        let mut out = BytesMut::with_capacity(1024);
        out.put_slice(&self.head);
        for (choice, gathered) in choices.iter().enumerate() {
            put(&mut out, if choice == 0 { "{\"index\":" } else { ",{\"index\":" });
            json(&mut out, &choice);
            if self.api == Api::Chat {
                put(&mut out, r#","message":"#);
                write_message(&mut out, gathered);
                put(&mut out, r#","logprobs":"#);
            } else {
                put(&mut out, r#","text":"#);
                json(&mut out, &gathered.text);
                put(&mut out, r#","logprobs":"#);
            }
            match &gathered.their_logprobs {
                Some(theirs) => json(&mut out, theirs),
                None => self.logprobs(&mut out, choice, gathered.logprobs.as_deref()),
            }
            put(&mut out, r#","finish_reason":"#);
            json(&mut out, &gathered.ending.as_ref().map(Ending::name));
            put(&mut out, "}");
        }
        put(&mut out, self.tail);
        write_usage(&mut out, total);
        write_weir(&mut out, running);
        put(&mut out, "}");
        out
    }

    fn open(&self, out: &mut BytesMut, choice: usize) {
        out.put_slice(&self.head);
        put(out, "{\"index\":");
        json(out, &choice);
    }

    fn logprobs(&mut self, out: &mut BytesMut, choice: usize, logprobs: Option<&[Logprob]>) {
        match (logprobs, self.api) {
            (None, _) => put(out, "null"),
            (Some(all), Api::Completion) => write_legacy_logprobs(out, all, &mut self.offsets[choice]),
            (Some(all), _) => write_chat_logprobs(out, all),
        }
    }
}

/// A chat's delta; fields that come several times go on.
fn delta(parts: Vec<Part>, mut delta: Map<String, Value>) -> Map<String, Value> {
    let mut calls: Vec<Value> = Vec::new();
    for part in parts {
        let (name, text) = match part {
            Part::Text(text) => ("content", text),
            Part::Reasoning(text) => ("reasoning_content", text),
            Part::Refusal(text) => ("refusal", text),
            Part::CallBegin { index, id, name, more } => {
                calls.push(call(Some(index), &id, &name, "", &more));
                continue;
            }
            Part::CallArguments { index, json: more } => {
                match calls.iter_mut().rfind(|call| call["index"] == index) {
                    Some(call) => append(&mut call["function"]["arguments"], &more),
                    None => calls.push(json!({ "index": index, "function": { "arguments": more } })),
                }
                continue;
            }
        };
        append(delta.entry(name).or_insert(Value::Null), &text);
    }
    if !calls.is_empty() {
        delta.insert("tool_calls".into(), Value::Array(calls));
    }
    delta
}

fn append(field: &mut Value, text: &str) {
    match field {
        Value::String(before) => before.push_str(text),
        other => *other = text.into(),
    }
}

fn call(index: Option<u32>, id: &str, name: &str, arguments: &str, more: &Map<String, Value>) -> Value {
    let mut call = Map::new();
    if let Some(index) = index {
        call.insert("index".into(), index.into());
    }
    call.insert("id".into(), id.into());
    call.insert("type".into(), "function".into());
    call.insert("function".into(), json!({ "name": name, "arguments": arguments }));
    call.extend(more.clone());
    Value::Object(call)
}

/// The message of a whole chat.
fn write_message(out: &mut BytesMut, gathered: &Gathered) {
    put(out, r#"{"role":"assistant","content":"#);
    let silent = gathered.text.is_empty() && (!gathered.calls.is_empty() || gathered.refusal.is_some());
    json(out, &(!silent).then_some(&gathered.text));
    put(out, r#","refusal":"#);
    json(out, &gathered.refusal);
    if !gathered.reasoning.is_empty() {
        put(out, r#","reasoning_content":"#);
        json(out, &gathered.reasoning);
    }
    if !gathered.calls.is_empty() {
        put(out, r#","tool_calls":"#);
        let calls = gathered.calls.iter().map(|c| call(None, &c.id, &c.name, &c.arguments, &c.more));
        json(out, &calls.collect::<Vec<Value>>());
    }
    for (name, value) in &gathered.rest {
        put(out, ",");
        json(out, name);
        put(out, ":");
        json(out, value);
    }
    put(out, "}");
}

/// The end of every stream that ended well.
pub(super) const DONE: &str = "data: [DONE]\n\n";

/// An error in the middle of a stream.
pub(super) fn write_error(out: &mut BytesMut, error: &[u8]) {
    put(out, "data: ");
    out.put_slice(error);
    put(out, "\n\n");
}

fn write_head(object: &str, label: &Label<'_>) -> Vec<u8> {
    let mut out = BytesMut::new();
    put(&mut out, "{\"id\":");
    json(&mut out, label.id);
    put(&mut out, ",\"object\":");
    json(&mut out, object);
    put(&mut out, ",\"created\":");
    json(&mut out, &label.created);
    put(&mut out, ",\"model\":");
    json(&mut out, label.model);
    put(&mut out, ",\"choices\":[");
    out.to_vec()
}

fn write_usage(out: &mut BytesMut, total: &Total) {
    put(out, ",\"usage\":{\"prompt_tokens\":");
    json(out, &total.prompt_tokens);
    put(out, ",\"completion_tokens\":");
    json(out, &total.output_tokens);
    put(out, ",\"total_tokens\":");
    json(out, &(total.prompt_tokens + total.output_tokens));
    put(out, ",\"prompt_tokens_details\":{\"cached_tokens\":");
    json(out, &total.cached_tokens);
    put(out, "}}");
}

fn write_weir(out: &mut BytesMut, running: &Running) {
    put(out, ",\"weir\":");
    json(out, &weir(running));
}

/// Where a request ran, and what it cost.
pub(super) fn weir(running: &Running) -> Value {
    let (cost, nodes) = (running.cost(), running.nodes().iter().map(|node| &**node).collect::<Vec<&str>>());
    let mut weir =
        json!({ "request": running.first_request(), "nodes": nodes, "cost_usd": cost.nano_usd as f64 / 1e9 });
    if cost.estimated {
        weir["cost_estimated"] = true.into();
    }
    weir
}

fn write_chat_logprobs(out: &mut BytesMut, logprobs: &[Logprob]) {
    put(out, "{\"content\":[");
    for (i, logprob) in logprobs.iter().enumerate() {
        put(out, if i == 0 { "" } else { "," });
        write_candidate(out, &logprob.chosen);
        put(out, ",\"top_logprobs\":[");
        for (j, candidate) in logprob.top.iter().enumerate() {
            put(out, if j == 0 { "" } else { "," });
            write_candidate(out, candidate);
            put(out, "}");
        }
        put(out, "]}");
    }
    put(out, "],\"refusal\":null}");
}

/// Without the closing brace.
fn write_candidate(out: &mut BytesMut, candidate: &Candidate) {
    put(out, "{\"token\":");
    json(out, &*String::from_utf8_lossy(&candidate.bytes));
    put(out, ",\"logprob\":");
    json(out, &finite(candidate.logprob));
    put(out, ",\"bytes\":");
    json(out, &candidate.bytes);
}

fn write_legacy_logprobs(out: &mut BytesMut, logprobs: &[Logprob], offset: &mut usize) {
    let list = |out: &mut BytesMut, name: &str, each: &mut dyn FnMut(&mut BytesMut, &Logprob)| {
        put(out, name);
        for (i, logprob) in logprobs.iter().enumerate() {
            put(out, if i == 0 { "" } else { "," });
            each(out, logprob);
        }
        put(out, "]");
    };
    list(out, "{\"tokens\":[", &mut |out, l| json(out, &*String::from_utf8_lossy(&l.chosen.bytes)));
    list(out, ",\"token_logprobs\":[", &mut |out, l| json(out, &finite(l.chosen.logprob)));
    list(out, ",\"top_logprobs\":[", &mut |out, l| {
        put(out, "{");
        let chosen = std::iter::once(&l.chosen).filter(|c| l.top.iter().all(|t| t.id != c.id));
        for (j, candidate) in l.top.iter().chain(chosen).enumerate() {
            put(out, if j == 0 { "" } else { "," });
            json(out, &*String::from_utf8_lossy(&candidate.bytes));
            put(out, ":");
            json(out, &finite(candidate.logprob));
        }
        put(out, "}");
    });
    list(out, ",\"text_offset\":[", &mut |out, l| {
        json(out, offset);
        *offset += String::from_utf8_lossy(&l.chosen.bytes).chars().count();
    });
    put(out, "}");
}

/// JSON has no infinities; OpenAI writes -9999 for "never".
pub(super) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// Text as it is.
pub(super) fn put(out: &mut BytesMut, text: &str) {
    out.put_slice(text.as_bytes());
}

/// A value as JSON.
pub(super) fn json<T: Serialize + ?Sized>(out: &mut BytesMut, value: &T) {
    // Strings, numbers and lists of them can't fail, and neither can the buffer.
    let _ = serde_json::to_writer(out.writer(), value);
}
