//! Our evaluator and the `cel` crate agree, over random expressions and values.
use crate::compile::{Scope, condition};
use crate::eval::Expr;
use crate::fields::{FIELDS, Facts, Read};
use crate::random::{Kind, Rng, expression};
use crate::value::{Fault, Value};
use cel::objects::{Key, Map};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use weir_scheduler::{
    Ask, Clock, Held, KvType, ModelId, NodeId, Offer, PoolView, Price, Priority, Rates, Trust,
};

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn held() -> Held {
    let rates = Rates {
        prefill_tokens_per_s: 1000.0,
        token_time_alone: Duration::from_millis(10),
        token_time_full: Duration::from_millis(20),
    };
    Held {
        model: ModelId([1; 32]),
        name: "m".into(),
        text: None,
        context: 4096,
        numerics: "n".into(),
        kv: KvType::F16,
        kv_blocks: 0,
        slots: 3,
        rates,
        weights: 7,
        bytes: 8,
        pinned: true,
        resumes: true,
        grammars: true,
        prefixes: Vec::new(),
    }
}

/// What `cel` says: true, false, or that there is no value.
fn reference(text: &str, facts: &Facts<'_>) -> Option<bool> {
    let mut subjects: HashMap<&str, HashMap<Key, cel::Value>> = HashMap::new();
    for field in FIELDS {
        let value = match (field.read, facts.offer) {
            (Read::Whole(read), _) => read(facts),
            (Read::Node(read), Some(offer)) => read(facts, offer),
            _ => continue,
        };
        let value = match value {
            Ok(Value::Bool(value)) => cel::Value::Bool(value),
            Ok(Value::Int(value)) => cel::Value::Int(value),
            Ok(Value::Float(value)) => cel::Value::Float(value),
            Ok(Value::Text(value)) => cel::Value::String(Arc::new(value.to_owned())),
            Err(_) => continue,
        };
        subjects.entry(field.of).or_default().insert(Key::from(field.name), value);
    }
    let offer = facts.offer.expect("it is given");
    for (of, name, entries) in [("request", "tags", facts.ask.tags), ("node", "labels", offer.labels)] {
        let text = |value: &String| cel::Value::String(Arc::new(value.clone()));
        let map = entries.iter().map(|(name, value)| (Key::from(name.as_str()), text(value))).collect();
        let map = cel::Value::Map(Map { map: Arc::new(map) });
        subjects.entry(of).or_default().insert(Key::from(name), map);
    }
    let mut context = cel::Context::default();
    for (subject, fields) in subjects {
        context.add_variable_from_value(subject, cel::Value::Map(Map { map: Arc::new(fields) }));
    }
    let program = cel::Program::compile(text).unwrap_or_else(|why| panic!("cel can't read {text}: {why:?}"));
    match program.execute(&context) {
        Ok(cel::Value::Bool(value)) => Some(value),
        Ok(other) => panic!("{text}: {other:?} is no bool"),
        Err(_) => None,
    }
}

fn ours(expr: &Expr, facts: &Facts<'_>) -> Option<bool> {
    let whole = expr.test(facts).ok();
    // The same in two parts, as it is done in earnest.
    let (mut parts, mut slots) = (expr.clone(), Vec::new());
    parts.hoist(&mut slots);
    let whole_facts = Facts { offer: None, ..*facts };
    let slots: Vec<Result<Value<'_>, Fault>> = slots.iter().map(|slot| slot.eval(&whole_facts)).collect();
    let in_parts = parts.test(&Facts { slots: &slots, ..*facts }).ok();
    assert_eq!(whole, in_parts, "{expr:?}");
    whole
}

#[test]
fn our_evaluator_agrees_with_the_reference() {
    let seed = 0x5eed;
    let mut rng = Rng(seed);
    let (held, pool) = (held(), PoolView { queue: 3, own_free: 1, ..PoolView::default() });
    let tags = [pairs(&[]), pairs(&[("team", "blue")]), pairs(&[("private", ""), ("team", "DE")])];
    let labels = [pairs(&[("zone", "own"), ("country", "DE")]), pairs(&[])];
    let (mut values, mut faults) = (0, 0);
    for round in 0..4000 {
        let clock = rng.one_in(2).then_some(Clock { unix_s: rng.below(1 << 40) as i64, utc_offset_s: 3600 });
        let pool = PoolView { clock, ..pool.clone() };
        let ask = Ask {
            key: "blue",
            tags: &tags[rng.below(3) as usize],
            priority: rng.of(&[Priority::Background, Priority::Normal, Priority::Interactive]),
            prompt_tokens: rng.below(300) as u32,
            max_tokens: rng.below(3) as u32,
            output_tokens: 0,
            model: "m",
            model_bytes: 7,
            ttft: rng.one_in(2).then_some(Duration::from_millis(250)),
            deadline: None,
            max_cost: rng.one_in(2).then_some(500_000_000),
            waited: Duration::from_millis(rng.below(3) * 250),
        };
        let trust = rng.of(&Trust::ALL);
        let offer = Offer {
            node: NodeId(1),
            name: "blue",
            trust,
            labels: &labels[rng.below(2) as usize],
            held: &held,
            resident: true,
            running: rng.below(5) as u32,
            ttft: Duration::from_millis(rng.below(3) * 250),
            total: Duration::from_millis(900),
            price: Price { prompt: 0, output: rng.below(3) * 500 },
            cost: rng.below(3) * 500_000_000,
            worst: 9,
            late: false,
            burden: Duration::ZERO,
            same_numerics: true,
        };
        let facts = Facts {
            ask: &ask,
            pool: &pool,
            key: "blue",
            size: "small",
            utc_offset_s: None,
            offer: Some(&offer),
            slots: &[],
        };
        let text = expression(&mut rng, Kind::Bool, 4, true);
        if text.len() > crate::syntax::TEXT_MAX {
            continue;
        }
        let expr = condition(&text, Scope::Node).unwrap_or_else(|why| panic!("{text}: {why:?}"));
        let (ours, theirs) = (ours(&expr, &facts), reference(&text, &facts));
        assert_eq!(ours, theirs, "seed {seed:#x}, round {round}: {text}\n{ask:?}\n{offer:?}");
        values += u32::from(ours.is_some());
        faults += u32::from(ours.is_none());
    }
    println!("{values} had a value, {faults} had none");
    assert!(values > 1000 && faults > 100, "{values} had a value, {faults} had none");
}
