//! What an answer is made of, whoever gave it: the one form in which whatever writes answers gets it.
//!
//! A node of our own gives tokens with text, an upstream gives text and OpenAI's deltas ([`Extra`]). [`super::running`]
//! turns both into [`Next`]: what a choice said, in [`Part`]s, or how it ended. The writers of each API turn parts into
//! their own chunks, or gather them ([`Gathered`]) into a whole answer. A tool call is a `CallBegin` and then any number of
//! `CallArguments` of the same `index`, whose texts together are JSON.
use crate::driver::Extra;
use serde_json::{Map, Value};
use weir_scheduler::{Failure, Finish, Logprob, Usage};
use weir_upstream::Piece;

/// The next thing that happens to one choice.
#[derive(Debug)]
pub(super) enum Next {
    /// More of the answer.
    Said(Said),
    /// The end.
    Finished { ending: Ending, usage: Usage },
    /// The end, without success.
    Failed(Failure),
}

/// What came at once.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Said {
    /// In order; perhaps none, where there are only log-probabilities.
    pub(super) parts: Vec<Part>,
    /// Of the token that it came with, from a node of our own.
    pub(super) logprob: Option<Logprob>,
    /// As an upstream writes them for OpenAI's API.
    pub(super) their_logprobs: Option<Value>,
    /// Other fields of an upstream's delta: for OpenAI's API, and nobody else's business.
    pub(super) rest: Map<String, Value>,
}

/// A part of an answer, or more of one.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Part {
    /// More text.
    Text(String),
    /// More of what the model thinks before it answers.
    Reasoning(String),
    /// More of why it won't answer.
    Refusal(String),
    /// A tool is called. `more` are fields of the call that only its provider understands.
    CallBegin { index: u32, id: String, name: String, more: Map<String, Value> },
    /// More of the call's arguments.
    CallArguments { index: u32, json: String },
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// By itself, or at a stop string.
    Stop,
    /// At this stop string, where that is known.
    StopString(String),
    /// It is as long as it may be.
    Length,
    /// It waits for what the tools say.
    ToolCalls,
    /// An upstream's own word, in OpenAI's API: `content_filter`, ...
    Other(String),
}

impl Ending {
    /// `word` is an upstream's own, `calls` whether tools were called.
    pub(super) fn of(reason: Finish, word: Option<String>, calls: bool) -> Ending {
        match (reason, word) {
            (_, Some(word)) if word == "tool_calls" => Ending::ToolCalls,
            (_, Some(word)) => Ending::Other(word),
            (Finish::Stop, None) if calls => Ending::ToolCalls,
            (Finish::Stop, None) => Ending::Stop,
            (Finish::Length, None) => Ending::Length,
        }
    }

    /// As OpenAI's API says it.
    pub(super) fn name(&self) -> &str {
        match self {
            Ending::Stop | Ending::StopString(_) => "stop",
            Ending::Length => "length",
            Ending::ToolCalls => "tool_calls",
            Ending::Other(word) => word,
        }
    }
}

impl Said {
    /// Text, and what an upstream said beside it.
    pub(super) fn of_upstream(text: String, extra: Extra) -> Said {
        let Extra { mut rest, logprobs } = extra;
        let mut parts = Vec::new();
        for name in ["reasoning_content", "reasoning"] {
            if let Some(Value::String(_)) = rest.get(name)
                && let Some(Value::String(thought)) = rest.remove(name)
                && !thought.is_empty()
                && parts.is_empty()
            {
                parts.push(Part::Reasoning(thought));
            }
        }
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
        if let Some(Value::String(_)) = rest.get("refusal")
            && let Some(Value::String(refusal)) = rest.remove("refusal")
        {
            parts.push(Part::Refusal(refusal));
        }
        if let Some(Value::Array(_)) = rest.get("tool_calls")
            && let Some(Value::Array(calls)) = rest.remove("tool_calls")
        {
            calls.into_iter().enumerate().for_each(|(place, call)| read_call(place, call, &mut parts));
        }
        Said { parts, logprob: None, their_logprobs: logprobs, rest }
    }

    /// Whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
            && self.logprob.is_none()
            && self.their_logprobs.is_none()
            && self.rest.is_empty()
    }

    /// Whether a tool is called.
    pub(super) fn calls(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::CallBegin { .. }))
    }
}

/// One element of a delta's `tool_calls`. What has a name begins a call.
fn read_call(place: usize, call: Value, parts: &mut Vec<Part>) {
    let Value::Object(mut more) = call else { return };
    let index = more.remove("index").and_then(|index| index.as_u64());
    let index = index.and_then(|index| u32::try_from(index).ok()).unwrap_or(place as u32);
    let string = |value: Option<Value>| match value {
        Some(Value::String(text)) => Some(text),
        _ => None,
    };
    let mut function = match more.remove("function") {
        Some(Value::Object(function)) => function,
        _ => Map::new(),
    };
    if let Some(name) = string(function.remove("name")).filter(|name| !name.is_empty()) {
        let id = string(more.remove("id")).unwrap_or_default();
        more.remove("type");
        parts.push(Part::CallBegin { index, id, name, more });
    }
    if let Some(json) = string(function.remove("arguments")).filter(|json| !json.is_empty()) {
        parts.push(Part::CallArguments { index, json });
    }
}

/// All of one choice.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    pub(super) text: String,
    pub(super) reasoning: String,
    pub(super) refusal: Option<String>,
    /// In the order in which they began.
    pub(super) calls: Vec<Call>,
    /// Where asked for, and a node of our own answered.
    pub(super) logprobs: Option<Vec<Logprob>>,
    /// An upstream's.
    pub(super) their_logprobs: Option<Value>,
    /// Other fields of an upstream's message.
    pub(super) rest: Map<String, Value>,
    /// None until it has ended.
    pub(super) ending: Option<Ending>,
}

/// A whole tool call.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    index: u32,
    pub(super) id: String,
    pub(super) name: String,
    /// JSON, as the model wrote it.
    pub(super) arguments: String,
    /// Fields that only its provider understands.
    pub(super) more: Map<String, Value>,
}

impl Gathered {
    /// More was said.
    pub(super) fn add(&mut self, said: Said) {
        for part in said.parts {
            match part {
                Part::Text(text) => self.text.push_str(&text),
                Part::Reasoning(text) => self.reasoning.push_str(&text),
                Part::Refusal(text) => self.refusal.get_or_insert_default().push_str(&text),
                Part::CallBegin { index, id, name, more } => {
                    self.calls.push(Call { index, id, name, arguments: String::new(), more });
                }
                Part::CallArguments { index, json } => {
                    if let Some(call) = self.calls.iter_mut().rfind(|call| call.index == index) {
                        call.arguments.push_str(&json);
                    }
                }
            }
        }
        if let (Some(all), Some(one)) = (&mut self.logprobs, said.logprob) {
            all.push(one);
        }
        if said.their_logprobs.is_some() || !said.rest.is_empty() {
            let (rest, logprobs) = (std::mem::take(&mut self.rest), self.their_logprobs.take());
            let mut all = Piece { text: String::new(), rest, logprobs };
            all.merge(Piece { text: String::new(), rest: said.rest, logprobs: said.their_logprobs });
            (self.rest, self.their_logprobs) = (all.rest, all.logprobs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(text: &str, rest: Value) -> Said {
        let Value::Object(rest) = rest else { panic!("{rest} is no object") };
        Said::of_upstream(text.into(), Extra { rest, logprobs: None })
    }

    #[test]
    fn an_upstreams_deltas_become_parts() {
        let call = |index: u32, function: Value| json!({ "index": index, "id": "a", "type": "function", "function": function, "x": 1 });
        let first = said(
            "Hi",
            json!({ "reasoning_content": "hm", "tool_calls": [call(1, json!({ "name": "f", "arguments": "" }))] }),
        );
        let Value::Object(more) = json!({ "x": 1 }) else { panic!() };
        let begun = Part::CallBegin { index: 1, id: "a".into(), name: "f".into(), more };
        assert_eq!(first.parts, [Part::Reasoning("hm".into()), Part::Text("Hi".into()), begun]);
        assert!(first.rest.is_empty() && first.calls());
        let second =
            said("", json!({ "tool_calls": [{ "index": 1, "function": { "arguments": "{}" } }], "odd": 2 }));
        assert_eq!(second.parts, [Part::CallArguments { index: 1, json: "{}".into() }]);
        assert_eq!(second.rest.len(), 1);
        let mut all = Gathered::default();
        [first, second].into_iter().for_each(|said| all.add(said));
        assert_eq!((all.text.as_str(), all.reasoning.as_str(), all.calls.len()), ("Hi", "hm", 1));
        assert_eq!((all.calls[0].name.as_str(), all.calls[0].arguments.as_str()), ("f", "{}"));
    }

    #[test]
    fn nonsense_is_passed_over() {
        for tool_calls in [json!("x"), json!([1, null]), json!([{ "function": 3 }]), json!([{ "index": -1 }])]
        {
            assert!(!said("", json!({ "tool_calls": tool_calls })).calls());
        }
        let mut all = Gathered::default();
        all.add(said("", json!({ "tool_calls": [{ "index": 7, "function": { "arguments": "lost" } }] })));
        assert!(all.calls.is_empty());
    }

    #[test]
    fn endings_have_their_words() {
        let check = |reason, word: Option<&str>, calls, expected: &str| {
            assert_eq!(Ending::of(reason, word.map(str::to_owned), calls).name(), expected);
        };
        check(Finish::Stop, None, false, "stop");
        check(Finish::Stop, None, true, "tool_calls");
        check(Finish::Length, None, true, "length");
        check(Finish::Stop, Some("tool_calls"), false, "tool_calls");
        check(Finish::Stop, Some("content_filter"), true, "content_filter");
    }
}
