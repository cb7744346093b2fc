//! Output under grammars: it follows them, and its tokens are the same however they were computed.
use super::*;
use serde_json::{Value, json};
use std::sync::Arc;
use weir_backends::gguf::Strings;
use weir_backends::grammar::Grammars;
use weir_backends::text::Tokenizer;

/// A schema, and whether a text is JSON that fits it.
type Case = (&'static str, fn(&Value) -> bool);

const CASES: [Case; 6] = [
    (
        r#"{"type":"object","properties":{"a":{"type":"integer","minimum":3,"maximum":42},"b":{"enum":["x","yy"]}},"required":["a","b"],"additionalProperties":false}"#,
        |v| {
            v.as_object().is_some_and(|o| o.len() == 2)
                && v["a"].as_i64().is_some_and(|a| (3..=42).contains(&a))
                && ["x", "yy"].contains(&v["b"].as_str().unwrap_or(""))
        },
    ),
    (r#"{"type":"array","items":{"type":"boolean"},"minItems":2,"maxItems":4}"#, |v| {
        v.as_array().is_some_and(|a| (2..=4).contains(&a.len()) && a.iter().all(Value::is_boolean))
    }),
    (r#"{"type":"string","maxLength":12}"#, |v| v.as_str().is_some_and(|s| s.chars().count() <= 12)),
    (r#"{"type":"string","pattern":"^[a-f]{2,5}-\\d\\d$"}"#, |v| {
        let text = v.as_str().unwrap_or("");
        let (letters, digits) = text.split_once('-').unwrap_or(("", ""));
        (2..=5).contains(&letters.len())
            && letters.bytes().all(|b| (b'a'..=b'f').contains(&b))
            && digits.len() == 2
            && digits.bytes().all(|b| b.is_ascii_digit())
    }),
    (
        r##"{"$defs":{"t":{"type":"object","properties":{"n":{"type":"null"},"k":{"type":"array","maxItems":2,"items":{"$ref":"#/$defs/t"}}},"required":["n"],"additionalProperties":false}},"$ref":"#/$defs/t"}"##,
        |v| {
            fn tree(v: &Value) -> bool {
                let kids = v.get("k").and_then(Value::as_array);
                v.get("n") == Some(&Value::Null) && kids.is_none_or(|k| k.len() <= 2 && k.iter().all(tree))
            }
            tree(v)
        },
    ),
    (r#"{"anyOf":[{"const":"ja"},{"type":"number","minimum":0,"exclusiveMaximum":1}]}"#, |v| {
        v == "ja" || v.as_f64().is_some_and(|n| (0.0..1.0).contains(&n))
    }),
];

/// Token 0 ends, 1 to 256 are the bytes, then come pieces that cross what a grammar has boundaries between.
fn tokenizer() -> Arc<Tokenizer> {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let name = |byte: u8| {
        let shifted = 256 + (0..byte).filter(|b| !printable(*b)).count() as u32;
        char::from_u32(if printable(byte) { byte.into() } else { shifted }).unwrap().to_string()
    };
    let pieces =
        ["{\"", "\":", "\",\"", "\"}", "tr", "ue", "},", "]}", "12", "null", "\":\u{120}", ",\u{120}\""];
    let tokens = std::iter::once("<|end|>".to_owned()).chain((0..=255).map(name));
    let tokens: Vec<String> = tokens.chain(pieces.map(str::to_owned)).collect();
    let types: Vec<i32> = (0..tokens.len()).map(|id| if id == 0 { 3 } else { 1 }).collect();
    let mut writer = weir_backends::gguf::write::Writer::new("null");
    writer.set("tokenizer.ggml.model", "gpt2");
    writer.set("tokenizer.ggml.pre", "gpt-2");
    writer.set("tokenizer.ggml.tokens", tokens.iter().map(String::as_str).collect::<Strings>());
    writer.set("tokenizer.ggml.token_type", types);
    writer.set("tokenizer.ggml.merges", std::iter::empty::<&str>().collect::<Strings>());
    writer.set("tokenizer.ggml.eos_token_id", 0u32);
    let mut file = Vec::new();
    writer.write(&mut file, |_| Vec::new()).unwrap();
    Arc::new(Tokenizer::from_gguf(&ModelFile::from_bytes(file).unwrap()).unwrap())
}

fn grammar(schema: &str) -> Option<Arc<str>> {
    Some(format!("start: %json {schema}").into())
}

fn asked(seed: u64, schema: &str, max_tokens: u32) -> Generate {
    let sampling = Sampling { seed, temperature: 1.0, ..Sampling::default() };
    let prompt = vec![1 + seed as u32 % 200, 2, 3, 4];
    Generate {
        sampling,
        grammar: grammar(schema),
        request: RequestId(seed),
        ..Generate::new(MODEL, prompt, max_tokens)
    }
}

/// Tokens of each, whether it was cut, and its text.
fn run(mut engine: Engine, asks: &[Generate]) -> Vec<(Vec<u32>, bool, String)> {
    let mut readers = Vec::new();
    for ask in asks {
        let (sink, events) = channel(4096);
        engine.generate(Time::ZERO, ask.clone(), sink).unwrap();
        readers.push(events);
    }
    while engine.step(Time::ZERO) != Progress::Idle {
        engine.check();
    }
    let read = |mut events: Receiver<Event>| {
        let (mut ids, mut text) = (Vec::new(), String::new());
        loop {
            match events.try_recv().expect("a stream ends") {
                Event::Token(token) => {
                    ids.push(token.id);
                    text.push_str(&token.text);
                }
                Event::Finished { reason, text: rest, .. } => {
                    return (ids, reason == weir_scheduler::Finish::Length, text + &rest);
                }
                Event::Failed(failure) => panic!("{failure:?}"),
            }
        }
    };
    readers.into_iter().map(read).collect()
}

/// `engine(speculation)` makes one; what it writes follows the schema, whichever way it was computed.
fn check(name: &str, engine: &dyn Fn(Speculation) -> Engine, seeds: u64) {
    for (number, (schema, fits)) in CASES.into_iter().enumerate() {
        let asks: Vec<Generate> = (0..seeds).map(|seed| asked(seed, schema, 300)).collect();
        let all = run(engine(Speculation::Off), &asks);
        for (seed, (_, cut, text)) in all.iter().enumerate() {
            let value = serde_json::from_str(text);
            let good = value.as_ref().is_ok_and(fits);
            assert!(good || *cut, "{name}, case {number}, seed {seed}: {text:?}");
        }
        let whole = all.iter().filter(|(_, cut, _)| !cut).count();
        assert!(whole * 2 > all.len() || number == 4, "{name}, case {number}: most end by themselves");
        assert_eq!(run(engine(Speculation::Always(3)), &asks), all, "{name}, case {number}: guessing");
        let alone = run(engine(Speculation::Off), &asks[..1]);
        assert_eq!(alone[0], all[0], "{name}, case {number}: alone");
        let ids = &all[1].0;
        for at in [1, ids.len() / 2, ids.len() - 1] {
            let resumed = Generate { output: ids[..at].to_vec(), ..asks[1].clone() };
            let rest = run(engine(Speculation::Off), &[resumed]);
            assert_eq!(rest[0].0, ids[at..], "{name}, case {number}: resumed at {at}");
        }
    }
}

#[test]
fn output_follows_its_grammar_on_the_null_device() {
    let tokenizer = tokenizer();
    let null = Null { vocab: tokenizer.len() as u32, ..Null::default() };
    let config = config(400, 8, 72, 64);
    check(
        "null",
        &|speculation| {
            let config = EngineConfig { model: MODEL, speculation, ..config };
            let engine = Engine::new(null.program(config.layout), tokenizer.clone().into(), config);
            let (program, layout) = (null.program(config.layout), config.layout);
            engine.with_draft(Draft { program, layout, context: 4000, vocab: null.vocab, cost: 0.2 })
        },
        8,
    );
}

#[test]
fn output_follows_its_grammar_on_a_random_model() {
    let tokenizer = tokenizer();
    let (file, plan) = model("llama", 1);
    let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() });
    let bench = Bench { device: &cpu, file: &file, plan: &plan };
    check(
        "a random model",
        &|speculation| {
            let config = EngineConfig { speculation, ..config(100, 4, 68, 64) };
            let program =
                bench.device.compile(bench.file, bench.plan, 0..bench.plan.layers.len(), config.layout);
            Engine::new(program.unwrap(), tokenizer.clone().into(), config)
        },
        4,
    );
}

#[test]
fn grammars_that_cannot_be_followed_are_refused() {
    let tokenizer = tokenizer();
    let null = Null { vocab: tokenizer.len() as u32, ..Null::default() };
    let deep = format!("start: {}\"a\"{}", "(".repeat(200), ")".repeat(200));
    let wide = format!("start: %json {{\"enum\":[{}0]}}", "\"aaaaaaaaaaaaaaaa\",".repeat(70_000));
    let check = |grammar: &str, says: &str| {
        let config = config(400, 8, 72, 64);
        let config = EngineConfig { model: MODEL, ..config };
        let mut engine = Engine::new(null.program(config.layout), tokenizer.clone().into(), config);
        let ask = Generate { grammar: Some(grammar.into()), ..asked(1, "{}", 5) };
        let began = Instant::now();
        let refused = engine.generate(Time::ZERO, ask, channel(8).0).expect_err(grammar);
        assert!(began.elapsed() < Duration::from_secs(5), "{:.60} took {:?}", grammar, began.elapsed());
        assert_eq!(refused.kind, FailureKind::Invalid);
        assert!(refused.message.contains(says), "{:.60}: {refused:?}", grammar);
        assert!(weir_backends::grammar::check(grammar).is_err(), "{:.60}", grammar);
    };
    check("start: other", "other");
    check(&deep, "nested 200 deep");
    check(&wide, "bytes");
    check("start: %json {\"type\":\"objekt\"}", "");
    check("start: %json {\"type\":\"integer\",\"minimum\":5,\"maximum\":3}", "");
}

/// A schema of anything, sometimes nonsense.
fn any_schema(draw: &mut Draw, depth: u32) -> Value {
    let inner = |draw: &mut Draw| any_schema(draw, depth.saturating_sub(1));
    let small = draw.below(4);
    match draw.below(if depth == 0 { 8 } else { 14 }) {
        0 => json!({ "type": "integer", "minimum": draw.below(50), "maximum": 20 + draw.below(50) }),
        1 => json!({ "type": "string", "minLength": small, "maxLength": 3 + draw.below(9) }),
        2 => json!({ "enum": ["a", 1, null, [true], { "b": -2.5 }] }),
        3 => json!({ "type": ["boolean", "null"] }),
        4 => {
            let patterns = ["^[a-c]+$", "x{2,5}", "^(ab|c)*d$", "^\\w{3}$", "("];
            json!({ "type": "string", "pattern": (patterns[draw.below(5) as usize]) })
        }
        5 => {
            json!({ "type": "string", "format": (["date", "time", "uuid", "ipv4", "nonsense"][draw.below(5) as usize]) })
        }
        6 => json!({ "type": "number", "multipleOf": 0.5, "minimum": 0, "exclusiveMaximum": 9 }),
        7 => [json!(true), json!({}), json!(7), json!({ "type": 3 }), json!({ "$ref": "#/gone" })]
            [draw.below(5) as usize]
            .clone(),
        8 | 9 => json!({ "type": "array", "items": inner(draw), "minItems": small / 2, "maxItems": small }),
        10 => json!({ "anyOf": [inner(draw), inner(draw)] }),
        11 => json!({ "allOf": [inner(draw), inner(draw)] }),
        12 => json!({ "oneOf": [inner(draw), { "const": "one" }] }),
        _ => {
            let properties = json!({ "p": inner(draw), "q\"\u{e4}": inner(draw) });
            json!({ "type": "object", "properties": properties, "required": ["p"], "additionalProperties": small == 0 })
        }
    }
}

#[test]
fn schemas_made_at_random_are_followed_or_refused() {
    let mut grammars = Grammars::new(&tokenizer().into()).unwrap();
    let (mut followed, mut ended) = (0, 0);
    for seed in 0..300 {
        let mut draw = Draw::new(seed);
        let schema = any_schema(&mut draw, 3);
        let began = Instant::now();
        let grammar = grammar(&schema.to_string()).unwrap();
        let checked = weir_backends::grammar::check(&grammar);
        let Ok(mut masks) = grammars.begin(&grammar, &[]) else {
            assert!(checked.is_err(), "seed {seed}: {schema} is good for bytes");
            continue;
        };
        assert!(checked.is_ok(), "seed {seed}: {schema} is no good for bytes: {checked:?}");
        followed += 1;
        let mut ids = Vec::new();
        while !masks.is_done() && ids.len() < 300 {
            let mask = masks.mask().unwrap_or_else(|error| panic!("seed {seed}: {schema}: {error}"));
            let allowed: Vec<u32> = (0..mask.len() as u32 * 32)
                .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
                .collect();
            // To the end, where that may be; else often to what closes something.
            let close = |id: &&u32| **id > 0 && b"\"]}".contains(&((**id - 1) as u8)) && **id <= 256;
            let id = match allowed.first() {
                Some(0) => 0,
                _ if draw.below(2) == 0 => {
                    *allowed.iter().find(close).unwrap_or(&allowed[draw.below(allowed.len() as u32) as usize])
                }
                _ => allowed[draw.below(allowed.len() as u32) as usize],
            };
            masks.take(id).unwrap_or_else(|error| panic!("seed {seed}: {schema}: {error}"));
            ids.push(id);
        }
        if masks.is_done() {
            ended += 1;
            let text = tokenizer().decode(&ids);
            let read: Result<Value, _> = serde_json::from_str(&text);
            assert!(read.is_ok(), "seed {seed}: {schema}: {text:?}");
        }
        assert!(began.elapsed() < Duration::from_secs(5), "seed {seed}: {schema} took {:?}", began.elapsed());
    }
    assert!(followed > 100 && ended * 10 > followed * 8, "{followed} of 300 followed, {ended} to the end");
}
