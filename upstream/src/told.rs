//! What events tell of an answer, whatever the provider speaks: read from their data alone, without a connection.
use crate::catalog::Prices;
use crate::{anthropic, openai};
use serde_json::{Map, Value};
use std::collections::VecDeque;

/// Parts with an index, the last of them, that are looked at for the one that goes on: nobody makes so many tool calls.
const PARTS_MAX: usize = 256;

/// A piece of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Text that follows what came before; may be empty where `rest` isn't.
    pub text: String,
    /// Other fields of the delta as OpenAI writes them: `tool_calls`, `reasoning_content`, `refusal`, ...
    pub rest: Map<String, Value>,
    /// `logprobs` of the choice, as OpenAI writes them.
    pub logprobs: Option<Value>,
}

impl Piece {
    /// Takes in what follows it, as if both had come at once.
    pub fn merge(&mut self, next: Piece) {
        self.text.push_str(&next.text);
        merge_delta(&mut self.rest, next.rest);
        match (&mut self.logprobs, next.logprobs) {
            (Some(before), Some(next)) => merge_value(before, next),
            (before, next) => *before = before.take().or(next),
        }
    }

    /// There is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.rest.is_empty() && self.logprobs.is_none()
    }
}

/// Adds the fields of a delta to those before it: strings and lists go on, and parts of one tool call, which have its
/// `index`, become one.
pub fn merge_delta(before: &mut Map<String, Value>, next: Map<String, Value>) {
    for (name, value) in next {
        match before.get_mut(&name) {
            Some(old) => merge_value(old, value),
            None => _ = before.insert(name, value),
        }
    }
}

fn merge_value(before: &mut Value, next: Value) {
    match (before, next) {
        (Value::String(before), Value::String(next)) => before.push_str(&next),
        (Value::Object(before), Value::Object(next)) => {
            for (name, value) in next {
                match before.get_mut(&name) {
                    // These name what the delta is a part of.
                    Some(_) if ["index", "id", "type"].contains(&name.as_str()) => {}
                    Some(old) => merge_value(old, value),
                    None => _ = before.insert(name, value),
                }
            }
        }
        (Value::Array(before), Value::Array(next)) => {
            for value in next {
                let index = value.get("index").and_then(Value::as_u64);
                let is_same = |old: &&mut Value| old.get("index").and_then(Value::as_u64) == index;
                match index.and_then(|_| before.iter_mut().rev().take(PARTS_MAX).find(is_same)) {
                    Some(old) => merge_value(old, value),
                    None => before.push(value),
                }
            }
        }
        (before, next) => *before = next,
    }
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// By itself, or at a stop string.
    Stop,
    /// It is as long as it may be.
    Length,
    /// In another way, in OpenAI's word: `tool_calls`, `content_filter`, ...
    Other(String),
}

/// What was used, as the provider counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, the ones that it had cached.
    pub cached_tokens: u32,
    /// Of those, the ones that it wrote to a cache, where that costs extra.
    pub cache_write_tokens: u32,
    /// Tokens of output.
    pub output_tokens: u32,
}

/// What an answer cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Billionths of a dollar.
    pub nano_usd: u64,
    /// By our own count: the provider did not report its own.
    pub estimated: bool,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Why.
    pub finish: Finish,
    /// What was used.
    pub usage: Usage,
    /// What it cost.
    pub cost: Cost,
}

impl Prices {
    /// What so much costs, in billionths of a dollar, rounded up.
    pub fn of(&self, usage: &Usage) -> u64 {
        let plain =
            usage.prompt_tokens.saturating_sub(usage.cached_tokens).saturating_sub(usage.cache_write_tokens);
        let usd_per_mtok = f64::from(plain) * self.prompt
            + f64::from(usage.cached_tokens) * self.cached.unwrap_or(self.prompt)
            + f64::from(usage.cache_write_tokens) * self.cache_write.unwrap_or(self.prompt)
            + f64::from(usage.output_tokens) * self.output;
        // A dollar for a million tokens is a thousand billionths for one.
        (usd_per_mtok * 1e3).ceil() as u64
    }
}

/// What events have told so far, whatever the provider speaks.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub pieces: VecDeque<Piece>,
    pub finish: Option<Finish>,
    /// By the provider's count, as far as it has told.
    pub usage: Option<Usage>,
    /// By the provider's own account, in dollars.
    pub usd: Option<f64>,
    /// Nothing comes after this.
    pub done: bool,
}

/// Why an event ends an answer.
pub(crate) enum Fault {
    /// The provider says so: the kind by its own word, and its message.
    Said { kind: String, message: String },
    /// It is no event of this kind: what is wrong.
    Nonsense(String),
}

/// Reads the events of one answer.
pub(crate) enum Reader {
    OpenAi(openai::Reader),
    Anthropic(anthropic::Reader),
}

impl Reader {
    pub fn take(&mut self, data: &str, told: &mut Told) -> Result<(), Fault> {
        match self {
            Reader::OpenAi(reader) => reader.take(data, told),
            Reader::Anthropic(reader) => reader.take(data, told),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn deltas_become_one() {
        let delta = |value: Value| match value {
            Value::Object(rest) => Piece { rest, ..Piece::default() },
            _ => Piece::default(),
        };
        let call = |value: Value| delta(json!({ "tool_calls": [value] }));
        let mut piece = call(json!({ "index": 0, "id": "a", "function": { "name": "f", "arguments": "{" } }));
        piece.merge(call(json!({ "index": 1, "id": "b", "function": { "name": "g", "arguments": "" } })));
        piece.merge(call(json!({ "index": 0, "id": "a", "function": { "arguments": "}" } })));
        piece.merge(delta(json!({ "reasoning_content": "h" })));
        piece.merge(delta(json!({ "reasoning_content": "m" })));
        let expected = json!({
            "tool_calls": [
                { "index": 0, "id": "a", "function": { "name": "f", "arguments": "{}" } },
                { "index": 1, "id": "b", "function": { "name": "g", "arguments": "" } },
            ],
            "reasoning_content": "hm",
        });
        assert_eq!(Value::Object(piece.rest), expected);
    }

    #[test]
    fn very_many_parts_take_no_long_time() {
        let parts: Vec<Value> = (0..50_000).map(|n| json!({ "index": n })).collect();
        let (mut before, next) = (Value::Array(parts.clone()), Value::Array(parts));
        let began = std::time::Instant::now();
        merge_value(&mut before, next);
        assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
    }

    #[test]
    fn costs_are_by_price() {
        let prices = Prices { prompt: 0.15, cached: Some(0.075), cache_write: None, output: 0.6 };
        let usage =
            Usage { prompt_tokens: 1000, cached_tokens: 400, cache_write_tokens: 0, output_tokens: 100 };
        assert_eq!(prices.of(&usage), 600 * 150 + 400 * 75 + 100 * 600);
        let one = Usage { prompt_tokens: 1, ..Usage::default() };
        assert_eq!(Prices { prompt: 0.0001, ..Prices::default() }.of(&one), 1, "rounded up");
    }
}
