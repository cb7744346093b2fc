//! What expressions can ask: the fields of `request`, `node`, `pool` and `time`, their types, and where each comes from.
use crate::value::{Fault, Type, Value};
use std::time::Duration;
use weir_scheduler::{Ask, Clock, KvType, Offer, PoolView, Priority};

/// A field.
pub(crate) struct Field {
    /// `request`, `node`, `pool` or `time`.
    pub of: &'static str,
    pub name: &'static str,
    pub kind: Type,
    /// It may be absent: then `has()` is false, and asking for it is a fault.
    pub optional: bool,
    /// For a person.
    pub about: &'static str,
    pub read: Read,
}

/// Where a field comes from.
#[derive(Clone, Copy)]
pub(crate) enum Read {
    /// The same for all nodes of a decision.
    Whole(for<'v> fn(&Facts<'v>) -> Result<Value<'v>, Fault>),
    /// Of one node.
    Node(for<'v> fn(&Facts<'v>, &Offer<'v>) -> Result<Value<'v>, Fault>),
}

/// What an expression is evaluated over.
#[derive(Clone, Copy)]
pub(crate) struct Facts<'v> {
    pub ask: &'v Ask<'v>,
    pub pool: &'v PoolView,
    /// The name of the request's key.
    pub key: &'v str,
    /// The class of the request's model.
    pub size: &'v str,
    /// East of Greenwich, where the policy says so.
    pub utc_offset_s: Option<i32>,
    pub offer: Option<&'v Offer<'v>>,
    /// The parts that are the same for all nodes, evaluated once.
    pub slots: &'v [Result<Value<'v>, Fault>],
}

/// The maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Map {
    Tags,
    Labels,
}

impl Map {
    pub fn entries<'v>(self, facts: &Facts<'v>) -> &'v [(String, String)] {
        match self {
            Map::Tags => facts.ask.tags,
            Map::Labels => facts.offer.map_or(&[], |offer| offer.labels),
        }
    }

    pub fn of(of: &str, name: &str) -> Option<Map> {
        match (of, name) {
            ("request", "tags") => Some(Map::Tags),
            ("node", "labels") => Some(Map::Labels),
            _ => None,
        }
    }
}

/// The first of a name counts.
pub(crate) fn lookup<'v>(entries: &'v [(String, String)], name: &str) -> Option<&'v str> {
    entries.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

fn ms<'v>(duration: Duration) -> Result<Value<'v>, Fault> {
    Ok(Value::Float(duration.as_secs_f64() * 1e3))
}

fn usd<'v>(nano: u64) -> Result<Value<'v>, Fault> {
    Ok(Value::Float(nano as f64 / 1e9))
}

fn count<'v>(n: u64) -> Result<Value<'v>, Fault> {
    Ok(Value::Int(i64::try_from(n).unwrap_or(i64::MAX)))
}

fn label<'v>(offer: &Offer<'v>, name: &str) -> Result<Value<'v>, Fault> {
    Ok(Value::Text(lookup(offer.labels, name).unwrap_or("")))
}

/// Seconds of the week, from Monday's midnight, where the machine or the policy is.
fn second_of_week(facts: &Facts<'_>) -> Result<i64, Fault> {
    let Clock { unix_s, utc_offset_s } = facts.pool.clock.ok_or(Fault::NoClock)?;
    let local = unix_s.saturating_add(i64::from(facts.utc_offset_s.unwrap_or(utc_offset_s)));
    // The first of January 1970 was a Thursday.
    Ok((local + 3 * 86_400).rem_euclid(7 * 86_400))
}

/// How good a node's answers are: by its label, else by how its keys and values are stored.
pub(crate) fn quality(offer: &Offer<'_>) -> f64 {
    let said = lookup(offer.labels, "quality").and_then(|text| text.parse::<f64>().ok());
    let default = if offer.held.kv == KvType::F16 { 1.0 } else { 0.98 };
    said.filter(|q| (0.0..=100.0).contains(q)).unwrap_or(default)
}

fn priority_name(priority: Priority) -> &'static str {
    match priority {
        Priority::Background => "background",
        Priority::Normal => "normal",
        Priority::Interactive => "interactive",
    }
}

const fn field(of: &'static str, name: &'static str, kind: Type, about: &'static str, read: Read) -> Field {
    Field { of, name, kind, optional: false, about, read }
}

const fn optional(
    of: &'static str,
    name: &'static str,
    kind: Type,
    about: &'static str,
    read: Read,
) -> Field {
    Field { of, name, kind, optional: true, about, read }
}

use Read::{Node, Whole};
use Type::{Bool, Float, Int, Text};

/// All fields but the maps `request.tags` and `node.labels`.
pub(crate) static FIELDS: &[Field] = &[
    field(
        "request",
        "priority",
        Text,
        "background, normal or interactive",
        Whole(|f| Ok(Value::Text(priority_name(f.ask.priority)))),
    ),
    field(
        "request",
        "key",
        Text,
        "the name of its API key; empty without one",
        Whole(|f| Ok(Value::Text(f.key))),
    ),
    field(
        "request",
        "private",
        Bool,
        "it has the tag `private`",
        Whole(|f| Ok(Value::Bool(lookup(f.ask.tags, weir_scheduler::PRIVATE).is_some()))),
    ),
    field(
        "request",
        "prompt_tokens",
        Int,
        "tokens of its prompt",
        Whole(|f| count(f.ask.prompt_tokens.into())),
    ),
    field(
        "request",
        "max_tokens",
        Int,
        "tokens of output, at most",
        Whole(|f| count(f.ask.max_tokens.into())),
    ),
    field(
        "request",
        "output_tokens",
        Int,
        "tokens of output that it has already, where it moves",
        Whole(|f| count(f.ask.output_tokens.into())),
    ),
    field("request", "model", Text, "the model's name", Whole(|f| Ok(Value::Text(f.ask.model)))),
    field(
        "request",
        "model_bytes",
        Int,
        "bytes of the model's file; 0 where nobody says",
        Whole(|f| count(f.ask.model_bytes)),
    ),
    field(
        "request",
        "size",
        Text,
        "the model's class: by [classes], else small, medium or large by its bytes",
        Whole(|f| Ok(Value::Text(f.size))),
    ),
    field("request", "waited_ms", Float, "how long it has waited", Whole(|f| ms(f.ask.waited))),
    optional(
        "request",
        "ttft_ms",
        Float,
        "the first token must come within this",
        Whole(|f| f.ask.ttft.map_or(Err(Fault::Absent("request.ttft_ms")), ms)),
    ),
    optional(
        "request",
        "deadline_ms",
        Float,
        "the last token must come within this",
        Whole(|f| f.ask.deadline.map_or(Err(Fault::Absent("request.deadline_ms")), ms)),
    ),
    optional(
        "request",
        "max_usd",
        Float,
        "what it may cost",
        Whole(|f| f.ask.max_cost.map_or(Err(Fault::Absent("request.max_usd")), usd)),
    ),
    field("node", "name", Text, "its name", Node(|_, o| Ok(Value::Text(o.name)))),
    field("node", "trust", Text, "own, guest or provider", Node(|_, o| Ok(Value::Text(o.trust.name())))),
    field("node", "kind", Text, "its label `kind`; empty without one", Node(|_, o| label(o, "kind"))),
    field("node", "country", Text, "its label `country`", Node(|_, o| label(o, "country"))),
    field("node", "zone", Text, "its label `zone`", Node(|_, o| label(o, "zone"))),
    field("node", "provider", Text, "its label `provider`", Node(|_, o| label(o, "provider"))),
    field("node", "model", Text, "what it calls the model", Node(|_, o| Ok(Value::Text(&o.held.name)))),
    field("node", "model_bytes", Int, "bytes of the model's file there", Node(|_, o| count(o.held.weights))),
    field("node", "resident", Bool, "the model is in its memory", Node(|_, o| Ok(Value::Bool(o.resident)))),
    field(
        "node",
        "context",
        Int,
        "longest sequence, prompt and output, in tokens",
        Node(|_, o| count(o.held.context.into())),
    ),
    field(
        "node",
        "numerics",
        Text,
        "kernel family, activation and KV types",
        Node(|_, o| Ok(Value::Text(&o.held.numerics))),
    ),
    field(
        "node",
        "quality",
        Float,
        "its label `quality`; else 1, or 0.98 where the KV cache has 8 bits",
        Node(|_, o| Ok(Value::Float(quality(o)))),
    ),
    field(
        "node",
        "running",
        Int,
        "requests that it runs, of this model",
        Node(|_, o| count(o.running.into())),
    ),
    field(
        "node",
        "slots",
        Int,
        "sequences that run at once, of this model",
        Node(|_, o| count(o.held.slots.into())),
    ),
    field(
        "node",
        "load",
        Float,
        "running / slots",
        Node(|_, o| Ok(Value::Float(f64::from(o.running) / f64::from(o.held.slots.max(1))))),
    ),
    field("node", "ttft_ms", Float, "predicted time to the first token", Node(|_, o| ms(o.ttft))),
    field("node", "total_ms", Float, "predicted time to the last token", Node(|_, o| ms(o.total))),
    field(
        "node",
        "usd",
        Float,
        "what the request would cost there, by expectation",
        Node(|_, o| usd(o.cost)),
    ),
    field("node", "max_usd", Float, "what it would cost there at worst", Node(|_, o| usd(o.worst))),
    field(
        "node",
        "prompt_usd_per_mtok",
        Float,
        "price of a million tokens of prompts",
        Node(|_, o| Ok(Value::Float(o.price.prompt as f64 / 1e3))),
    ),
    field(
        "node",
        "output_usd_per_mtok",
        Float,
        "price of a million tokens of output",
        Node(|_, o| Ok(Value::Float(o.price.output as f64 / 1e3))),
    ),
    field(
        "pool",
        "queue",
        Int,
        "other requests that wait for this model",
        Whole(|f| count(f.pool.queue as u64)),
    ),
    field(
        "pool",
        "waiting",
        Int,
        "requests that wait, for any model",
        Whole(|f| count(f.pool.waiting as u64)),
    ),
    field("pool", "running", Int, "requests that run", Whole(|f| count(f.pool.running as u64))),
    field(
        "pool",
        "spilling",
        Int,
        "requests that run at providers",
        Whole(|f| count(f.pool.spilling as u64)),
    ),
    field("pool", "nodes", Int, "nodes connected", Whole(|f| count(f.pool.nodes as u64))),
    field("pool", "own", Int, "nodes of our own", Whole(|f| count(f.pool.own as u64))),
    field("pool", "guests", Int, "guests", Whole(|f| count(f.pool.guests as u64))),
    field("pool", "providers", Int, "providers", Whole(|f| count(f.pool.providers as u64))),
    field(
        "pool",
        "own_holding",
        Int,
        "nodes of our own that hold this model",
        Whole(|f| count(f.pool.own_holding as u64)),
    ),
    field(
        "pool",
        "own_free",
        Int,
        "nodes of our own that hold this model and have room",
        Whole(|f| count(f.pool.own_free as u64)),
    ),
    field(
        "time",
        "weekday",
        Int,
        "1 is Monday, 7 is Sunday",
        Whole(|f| Ok(Value::Int(second_of_week(f)? / 86_400 + 1))),
    ),
    field(
        "time",
        "hour",
        Int,
        "0 to 23, by `timezone` or else the scheduler's clock",
        Whole(|f| Ok(Value::Int(second_of_week(f)? / 3600 % 24))),
    ),
    field("time", "minute", Int, "0 to 59", Whole(|f| Ok(Value::Int(second_of_week(f)? / 60 % 60)))),
];

/// What has fields, and what it is.
pub(crate) const SUBJECTS: [(&str, &str); 4] = [
    ("request", "what is asked"),
    ("node", "one of those that could do it"),
    ("pool", "all of them together"),
    ("time", "now"),
];

/// Of everything that can be asked: the name, the type, what it is.
pub fn vocabulary() -> Vec<(String, &'static str, &'static str)> {
    let maps = [
        (
            "request.tags".to_owned(),
            "map",
            "its tags: `'team' in request.tags`, `request.tags.team == 'blue'`",
        ),
        ("node.labels".to_owned(), "map", "what its owner says of it; a guest has none"),
    ];
    let fields = FIELDS.iter().map(|f| (format!("{}.{}", f.of, f.name), f.kind.name(), f.about));
    maps.into_iter().chain(fields).collect()
}
