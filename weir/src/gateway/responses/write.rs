//! Answers in the form of the Responses API: an object with items, whole or as events.
use super::read::Asked;
use super::store::Entry;
use crate::gateway::error::ApiError;
use crate::gateway::parts::{Ending, Gathered, Part, Said};
use crate::gateway::running::{Running, Total};
use crate::gateway::write::{Label, finite, json, put, weir};
use bytes::BytesMut;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use weir_scheduler::{Candidate, Logprob};

/// Writes the events of one streamed response.
pub(in crate::gateway) struct Writer {
    answer: Answer,
    /// Number of the next event.
    sequence: u64,
    open: Option<Open>,
    /// Tool calls by their index, and the places of their items.
    calls: Vec<(u32, usize)>,
}

/// The response so far.
struct Answer {
    id: String,
    model: String,
    created: u64,
    asked: Arc<Asked>,
    /// Items that have begun; those before the open one are whole.
    output: Vec<Value>,
}

/// The item that gets more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    Text,
    Refusal,
    Reasoning,
    Call(u32),
}

/// What a part of an item is called in events: its type, the field with its text, and the events' beginning.
struct Names {
    kind: &'static str,
    field: &'static str,
    event: &'static str,
}

impl Open {
    fn names(self) -> Names {
        let (kind, field, event) = match self {
            Open::Text => ("output_text", "text", "response.output_text"),
            Open::Refusal => ("refusal", "refusal", "response.refusal"),
            Open::Reasoning => ("reasoning_text", "text", "response.reasoning_text"),
            Open::Call(_) => ("function_call", "arguments", "response.function_call_arguments"),
        };
        Names { kind, field, event }
    }
}

impl Answer {
    fn new(label: &Label<'_>, asked: &Arc<Asked>) -> Answer {
        Answer {
            id: label.id.to_owned(),
            model: label.model.to_owned(),
            created: label.created,
            asked: asked.clone(),
            output: Vec::new(),
        }
    }

    /// The id of an item; unique, since the response's is.
    fn item_id(&self, kind: &str) -> String {
        format!("{kind}_{}_{}", self.id.trim_start_matches("resp_"), self.output.len())
    }

    fn message(&self, part: Option<Value>, status: &str) -> Value {
        let content: Vec<Value> = part.into_iter().collect();
        json!({ "id": self.item_id("msg"), "type": "message", "status": status, "role": "assistant", "content": content })
    }

    fn reasoning(&self, text: Option<&str>, status: &str) -> Value {
        let part = |text| json!({ "type": "reasoning_text", "text": text });
        let content: Vec<Value> = text.into_iter().map(part).collect();
        json!({ "id": self.item_id("rs"), "type": "reasoning", "status": status, "summary": [], "content": content })
    }

    fn call(&self, id: &str, name: &str, arguments: &str, status: &str) -> Value {
        json!({
            "id": self.item_id("fc"), "type": "function_call", "status": status, "call_id": id, "name": name,
            "arguments": arguments,
        })
    }

    /// The response object.
    fn object(&self, status: &str) -> Value {
        let mut object = self.asked.repeated.clone();
        let mut set = |name: &str, value: Value| _ = object.insert(name.to_owned(), value);
        set("id", self.id.as_str().into());
        set("object", "response".into());
        set("created_at", self.created.into());
        set("status", status.into());
        set("model", self.model.as_str().into());
        set("output", self.output.as_slice().into());
        for name in ["error", "incomplete_details", "usage"] {
            set(name, Value::Null);
        }
        Value::Object(object)
    }

    /// The response object at its end, which is kept if it is to be.
    fn ended(&self, ending: &Ending, total: &Total, ran: &Running) -> Value {
        let reason = match ending {
            Ending::Length => Some("max_output_tokens"),
            Ending::Other(word) if word == "content_filter" => Some("content_filter"),
            _ => None,
        };
        let mut object = self.object(if reason.is_some() { "incomplete" } else { "completed" });
        if let Some(reason) = reason {
            object["incomplete_details"] = json!({ "reason": reason });
        }
        object["usage"] = usage(total);
        object["weir"] = weir(ran);
        if let Some(store) = &self.asked.store {
            let Asked { owner, previous, input, .. } = &*self.asked;
            let items = input.iter().chain(&self.output).cloned().collect();
            store.put(&self.id, Entry::new(*owner, previous.clone(), items, object.clone()));
        }
        object
    }
}

impl Writer {
    /// Begins with `response.created` and `response.in_progress`.
    pub(in crate::gateway) fn begin(out: &mut BytesMut, label: &Label<'_>, asked: &Arc<Asked>) -> Writer {
        let answer = Answer::new(label, asked);
        let mut writer = Writer { answer, sequence: 0, open: None, calls: Vec::new() };
        for name in ["response.created", "response.in_progress"] {
            let response = writer.answer.object("in_progress");
            writer.event(out, name, json!({ "response": response }));
        }
        writer
    }

    pub(in crate::gateway) fn said(&mut self, out: &mut BytesMut, said: Said) {
        let logprobs = logprobs(said.logprob.as_slice());
        for part in said.parts {
            match part {
                Part::Text(text) => {
                    self.open(out, Open::Text, |answer| answer.message(None, "in_progress"));
                    self.more(out, &text, logprobs.clone());
                }
                Part::Refusal(text) => {
                    self.open(out, Open::Refusal, |answer| answer.message(None, "in_progress"));
                    self.more(out, &text, Vec::new());
                }
                Part::Reasoning(text) => {
                    self.open(out, Open::Reasoning, |answer| answer.reasoning(None, "in_progress"));
                    self.more(out, &text, Vec::new());
                }
                Part::CallBegin { index, id, name, .. } => {
                    self.close(out);
                    self.open(out, Open::Call(index), |answer| answer.call(&id, &name, "", "in_progress"));
                    self.calls.push((index, self.answer.output.len() - 1));
                }
                Part::CallArguments { index, json } => self.arguments(out, index, &json),
            }
        }
    }

    /// The end of a response.
    pub(in crate::gateway) fn finish(
        &mut self,
        out: &mut BytesMut,
        ending: &Ending,
        total: &Total,
        ran: &Running,
    ) {
        self.close(out);
        let response = self.answer.ended(ending, total, ran);
        let name =
            if response["status"] == "completed" { "response.completed" } else { "response.incomplete" };
        self.event(out, name, json!({ "response": response }));
    }

    /// The end of one that fails.
    pub(in crate::gateway) fn fail(&mut self, out: &mut BytesMut, error: &ApiError) {
        let mut response = self.answer.object("failed");
        let code = if error.is_no_room() { "rate_limit_exceeded" } else { "server_error" };
        response["error"] = json!({ "code": code, "message": error.message() });
        self.event(out, "response.failed", json!({ "response": response }));
    }

    /// Goes on with the open item if it is of this kind; else begins one.
    fn open(&mut self, out: &mut BytesMut, kind: Open, item: impl FnOnce(&Answer) -> Value) {
        if self.open == Some(kind) {
            return;
        }
        self.close(out);
        let item = item(&self.answer);
        let place = self.answer.output.len();
        self.event(out, "response.output_item.added", json!({ "output_index": place, "item": item }));
        self.answer.output.push(item);
        self.open = Some(kind);
        if !matches!(kind, Open::Call(_)) {
            let part = empty_part(kind);
            let data = self.about(json!({ "content_index": 0, "part": part }));
            self.event(out, "response.content_part.added", data);
            self.answer.output[place]["content"] = json!([part]);
        }
    }

    /// More text of the open item.
    fn more(&mut self, out: &mut BytesMut, text: &str, logprobs: Vec<Value>) {
        let (Some(kind), Some(item)) = (self.open, self.answer.output.last_mut()) else { return };
        let names = kind.names();
        let part = &mut item["content"][0];
        append(&mut part[names.field], text);
        let mut data = json!({ "content_index": 0, "delta": text });
        if kind == Open::Text {
            if let Some(all) = part["logprobs"].as_array_mut() {
                all.extend(logprobs.iter().cloned());
            }
            data["logprobs"] = logprobs.into();
        }
        let data = self.about(data);
        self.event(out, &format!("{}.delta", names.event), data);
    }

    /// More arguments of a call; where calls come mixed, of one that was thought to be whole.
    fn arguments(&mut self, out: &mut BytesMut, index: u32, text: &str) {
        let Some((_, place)) = self.calls.iter().rfind(|(call, _)| *call == index).copied() else { return };
        let item = &mut self.answer.output[place];
        append(&mut item["arguments"], text);
        let data = json!({ "item_id": item["id"], "output_index": place, "delta": text });
        self.event(out, "response.function_call_arguments.delta", data);
    }

    /// Ends the open item, if any.
    fn close(&mut self, out: &mut BytesMut) {
        let Some(kind) = self.open.take() else { return };
        let (names, place) = (kind.names(), self.answer.output.len() - 1);
        let item = &mut self.answer.output[place];
        item["status"] = "completed".into();
        let item = item.clone();
        if let Open::Call(_) = kind {
            let data = self.about(json!({ "name": item["name"], "arguments": item["arguments"] }));
            self.event(out, "response.function_call_arguments.done", data);
        } else {
            let part = &item["content"][0];
            let mut done = json!({ "content_index": 0, names.field: part[names.field] });
            if kind == Open::Text {
                done["logprobs"] = part["logprobs"].clone();
            }
            let done = self.about(done);
            self.event(out, &format!("{}.done", names.event), done);
            let ended = self.about(json!({ "content_index": 0, "part": part }));
            self.event(out, "response.content_part.done", ended);
        }
        self.event(out, "response.output_item.done", json!({ "output_index": place, "item": item }));
    }

    /// Data about the last item.
    fn about(&self, mut data: Value) -> Value {
        let place = self.answer.output.len().saturating_sub(1);
        data["item_id"] = self.answer.output.last().map_or(Value::Null, |item| item["id"].clone());
        data["output_index"] = place.into();
        data
    }

    fn event(&mut self, out: &mut BytesMut, name: &str, mut data: Value) {
        data["type"] = name.into();
        data["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        put(out, "event: ");
        put(out, name);
        put(out, "\ndata: ");
        json(out, &data);
        put(out, "\n\n");
    }
}

/// A whole response.
pub(in crate::gateway) fn whole(
    label: &Label<'_>,
    asked: &Arc<Asked>,
    gathered: &Gathered,
    total: &Total,
    ran: &Running,
) -> Vec<u8> {
    let mut answer = Answer::new(label, asked);
    if !gathered.reasoning.is_empty() {
        answer.output.push(answer.reasoning(Some(&gathered.reasoning), "completed"));
    }
    if !gathered.text.is_empty() {
        let mut part = empty_part(Open::Text);
        part["text"] = gathered.text.as_str().into();
        part["logprobs"] = logprobs(gathered.logprobs.as_deref().unwrap_or_default()).into();
        answer.output.push(answer.message(Some(part), "completed"));
    }
    if let Some(refusal) = &gathered.refusal {
        let part = json!({ "type": "refusal", "refusal": refusal });
        answer.output.push(answer.message(Some(part), "completed"));
    }
    for call in &gathered.calls {
        answer.output.push(answer.call(&call.id, &call.name, &call.arguments, "completed"));
    }
    answer.ended(gathered.ending.as_ref().unwrap_or(&Ending::Stop), total, ran).to_string().into_bytes()
}

fn empty_part(kind: Open) -> Value {
    let names = kind.names();
    let mut part =
        Map::from_iter([("type".to_owned(), names.kind.into()), (names.field.to_owned(), "".into())]);
    if kind == Open::Text {
        part.insert("annotations".into(), json!([]));
        part.insert("logprobs".into(), json!([]));
    }
    Value::Object(part)
}

fn append(field: &mut Value, text: &str) {
    match field {
        Value::String(before) => before.push_str(text),
        other => *other = text.into(),
    }
}

fn logprobs(all: &[Logprob]) -> Vec<Value> {
    let one = |candidate: &Candidate| {
        let token = String::from_utf8_lossy(&candidate.bytes);
        json!({ "token": token, "logprob": finite(candidate.logprob), "bytes": candidate.bytes })
    };
    let mut written = Vec::with_capacity(all.len());
    for logprob in all {
        let mut token = one(&logprob.chosen);
        token["top_logprobs"] = logprob.top.iter().map(one).collect::<Vec<_>>().into();
        written.push(token);
    }
    written
}

fn usage(total: &Total) -> Value {
    json!({
        "input_tokens": total.prompt_tokens,
        "input_tokens_details": { "cached_tokens": total.cached_tokens },
        "output_tokens": total.output_tokens,
        "output_tokens_details": { "reasoning_tokens": 0 },
        "total_tokens": total.prompt_tokens + total.output_tokens,
    })
}
