//! Answers in Anthropic's form: a message of blocks, whole or as events.
use crate::gateway::error::ApiError;
use crate::gateway::parts::{Ending, Gathered, Part, Said};
use crate::gateway::running::{Running, Total};
use crate::gateway::write::{Label, json, put, weir};
use bytes::BytesMut;
use serde_json::{Map, Value, json};
use weir_upstream::{REDACTED_THINKING as REDACTED, STOP_SEQUENCE, THINKING_SIGNATURE as SIGNATURE};

/// Writes the events of one streamed message.
pub(in crate::gateway) struct Writer {
    /// The block that is open, if any; the last one of `blocks`.
    open: Option<Block>,
    /// Blocks begun so far.
    blocks: usize,
    /// Tool calls by their index, and their blocks.
    calls: Vec<(u32, usize)>,
    /// At which a provider says that it has ended.
    sequence: Option<String>,
}

/// What kind of block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
    Call(u32),
}

impl Writer {
    /// Begins with `message_start`; the prompt has so many tokens.
    pub(in crate::gateway) fn begin(out: &mut BytesMut, label: &Label<'_>, prompt_tokens: usize) -> Writer {
        let usage = json!({
            "input_tokens": prompt_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
            "output_tokens": 0,
        });
        let message = json!({
            "id": label.id, "type": "message", "role": "assistant", "model": label.model, "content": [],
            "stop_reason": null, "stop_sequence": null, "usage": usage,
        });
        event(out, "message_start", json!({ "message": message }));
        Writer::silence(out);
        Writer { open: None, blocks: 0, calls: Vec::new(), sequence: None }
    }

    /// What keeps a silent connection alive.
    pub(in crate::gateway) fn silence(out: &mut BytesMut) {
        event(out, "ping", json!({}));
    }

    pub(in crate::gateway) fn said(&mut self, out: &mut BytesMut, said: Said) {
        for part in said.parts {
            match part {
                Part::Text(text) | Part::Refusal(text) => {
                    self.block(out, Block::Text, || json!({ "type": "text", "text": "" }));
                    delta(out, self.blocks - 1, "text_delta", "text", &text);
                }
                Part::Reasoning(text) => {
                    let block = || json!({ "type": "thinking", "thinking": "", "signature": "" });
                    self.block(out, Block::Thinking, block);
                    delta(out, self.blocks - 1, "thinking_delta", "thinking", &text);
                }
                Part::CallBegin { index, id, name, .. } => {
                    self.close(out);
                    self.block(
                        out,
                        Block::Call(index),
                        || json!({ "type": "tool_use", "id": id, "name": name, "input": {} }),
                    );
                    self.calls.push((index, self.blocks - 1));
                }
                Part::CallArguments { index, json } => {
                    // Where calls come mixed, a block may get more after the next has begun: it is named by its number.
                    if let Some((_, block)) = self.calls.iter().rfind(|(call, _)| *call == index) {
                        delta(out, *block, "input_json_delta", "partial_json", &json);
                    }
                }
            }
        }
        if let Some(signature) = said.rest.get(SIGNATURE).and_then(Value::as_str)
            && self.open == Some(Block::Thinking)
        {
            delta(out, self.blocks - 1, "signature_delta", "signature", signature);
        }
        if let Some(sequence) = said.rest.get(STOP_SEQUENCE).and_then(Value::as_str) {
            self.sequence = Some(sequence.to_owned());
        }
        if let Some(data) = said.rest.get(REDACTED).and_then(Value::as_str) {
            self.close(out);
            self.begin_block(out, json!({ "type": "redacted_thinking", "data": data }));
            event(out, "content_block_stop", json!({ "index": self.blocks - 1 }));
        }
    }

    /// The end of a message: its last block's, and why.
    pub(in crate::gateway) fn finish(
        &mut self,
        out: &mut BytesMut,
        ending: &Ending,
        total: &Total,
        ran: &Running,
    ) {
        self.close(out);
        let (reason, sequence) = stop(ending, self.sequence.as_deref());
        let delta = json!({ "stop_reason": reason, "stop_sequence": sequence });
        event(out, "message_delta", json!({ "delta": delta, "usage": usage(total), "weir": weir(ran) }));
        event(out, "message_stop", json!({}));
    }

    /// Goes on with the open block if it is of this kind; else begins one.
    fn block(&mut self, out: &mut BytesMut, kind: Block, block: impl FnOnce() -> Value) {
        if self.open == Some(kind) {
            return;
        }
        self.close(out);
        self.begin_block(out, block());
        self.open = Some(kind);
    }

    fn begin_block(&mut self, out: &mut BytesMut, block: Value) {
        event(out, "content_block_start", json!({ "index": self.blocks, "content_block": block }));
        self.blocks += 1;
    }

    fn close(&mut self, out: &mut BytesMut) {
        if self.open.take().is_some() {
            event(out, "content_block_stop", json!({ "index": self.blocks - 1 }));
        }
    }
}

/// An error in the middle of a stream.
pub(in crate::gateway) fn error(out: &mut BytesMut, error: &ApiError) {
    let (kind, message) = (error.anthropic_kind(), error.message());
    event(out, "error", json!({ "error": { "type": kind, "message": message } }));
}

/// A whole message.
pub(in crate::gateway) fn whole(
    label: &Label<'_>,
    gathered: &Gathered,
    total: &Total,
    ran: &Running,
) -> Vec<u8> {
    let mut content = Vec::new();
    if !gathered.reasoning.is_empty() {
        let signature = gathered.rest.get(SIGNATURE).and_then(Value::as_str).unwrap_or_default();
        content.push(json!({ "type": "thinking", "thinking": gathered.reasoning, "signature": signature }));
    }
    if let Some(data) = gathered.rest.get(REDACTED).and_then(Value::as_str) {
        content.push(json!({ "type": "redacted_thinking", "data": data }));
    }
    for text in [Some(&gathered.text), gathered.refusal.as_ref()].into_iter().flatten() {
        if !text.is_empty() {
            content.push(json!({ "type": "text", "text": text }));
        }
    }
    for call in &gathered.calls {
        // What was cut in the middle is no JSON.
        let input: Map<String, Value> = serde_json::from_str(&call.arguments).unwrap_or_default();
        content.push(json!({ "type": "tool_use", "id": call.id, "name": call.name, "input": input }));
    }
    let (reason, sequence) = gathered.ending.as_ref().map_or((None, None), |ending| {
        let sequence = gathered.rest.get(STOP_SEQUENCE).and_then(Value::as_str);
        let (reason, sequence) = stop(ending, sequence);
        (Some(reason), sequence)
    });
    json!({
        "id": label.id, "type": "message", "role": "assistant", "model": label.model, "content": content,
        "stop_reason": reason, "stop_sequence": sequence, "usage": usage(total), "weir": weir(ran),
    })
    .to_string()
    .into_bytes()
}

/// Anthropic's word for why, and the stop sequence where it was one.
fn stop<'a>(ending: &'a Ending, told: Option<&'a str>) -> (&'a str, Option<&'a str>) {
    match ending {
        Ending::Stop if told.is_some() => ("stop_sequence", told),
        Ending::Stop => ("end_turn", None),
        Ending::StopString(stop) => ("stop_sequence", Some(stop)),
        Ending::Length => ("max_tokens", None),
        Ending::ToolCalls => ("tool_use", None),
        Ending::Other(word) if word == "content_filter" => ("refusal", None),
        Ending::Other(word) => (word, None),
    }
}

/// What is cached isn't part of `input_tokens`.
fn usage(total: &Total) -> Value {
    json!({
        "input_tokens": total.prompt_tokens.saturating_sub(total.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": total.cached_tokens,
        "output_tokens": total.output_tokens,
    })
}

/// An event whose data has its name as `type` and the fields of `data`, an object.
fn event(out: &mut BytesMut, name: &str, data: Value) {
    put(out, "event: ");
    put(out, name);
    put(out, "\ndata: {\"type\":");
    json(out, name);
    for (field, value) in data.as_object().into_iter().flatten() {
        put(out, ",");
        json(out, field);
        put(out, ":");
        json(out, value);
    }
    put(out, "}\n\n");
}

/// An event of its own since there is one for each token: without a tree of values.
fn delta(out: &mut BytesMut, block: usize, kind: &str, field: &str, text: &str) {
    put(out, "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":");
    json(out, &block);
    put(out, ",\"delta\":{\"type\":\"");
    put(out, kind);
    put(out, "\",\"");
    put(out, field);
    put(out, "\":");
    json(out, text);
    put(out, "}}\n\n");
}
