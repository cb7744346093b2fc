//! Writes files to start from into folders of the one that is its argument: for `reader` a very small model of every family,
//! and a header with a value of every type; for `frames` the golden frames; for `policies` the shipped ones; for `streams`
//! an answer of each dialect.
#![allow(dead_code)] // the sources are whole, and not all of them is used here

#[path = "../../backends/src/gguf/mod.rs"]
pub mod gguf;
#[path = "../../backends/src/models/mod.rs"]
pub mod models;
#[path = "../../backends/src/plan.rs"]
pub mod plan;
#[path = "../../backends/src/quant.rs"]
pub mod quant;

use gguf::write::Writer;
use gguf::{Array, GgmlType, ModelFile, Strings, Value};
use models::random::Random;
use models::{FAMILIES, Shape};
use plan::Heads;
use std::path::Path;

/// A line a frame: its name, its bytes in hexadecimal digits.
const FRAMES: &str = include_str!("../../transport/tests/golden/frames.txt");

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "corpus".into());
    let [reader, frames, policies, streams] =
        ["reader", "frames", "policies", "streams"].map(|target| Path::new(&folder).join(target));
    for folder in [&reader, &frames, &policies, &streams] {
        std::fs::create_dir_all(folder)?;
    }
    golden_frames(&frames)?;
    for policy in &weir_policies::SHIPPED {
        std::fs::write(policies.join(policy.name), policy.text)?;
        std::fs::write(policies.join(format!("{}.test", policy.name)), policy.table)?;
    }
    for (name, dialect, events) in STREAMS {
        let events: String = events.iter().map(|data| format!("data: {data}\n\n")).collect();
        std::fs::write(streams.join(name), [&[dialect, 7], events.as_bytes()].concat())?;
    }
    models(&reader)
}

/// Answers with all that they may have: their name, their dialect's number, and the data of their events.
const STREAMS: [(&str, u8, &[&str]); 2] = [
    ("openai", 0, &[
        r#"{"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},"logprobs":{"content":[{"token":"Hi","logprob":-0.1}]}}],"usage":null}"#,
        r#"{"choices":[{"delta":{"reasoning_content":"hm","tool_calls":[{"index":0,"id":"a","type":"function","function":{"name":"f","arguments":"{"}}]}}]}"#,
        r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"}"}}]},"finish_reason":"tool_calls"}]}"#,
        r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"cost":0.1,"prompt_tokens_details":{"cached_tokens":2}}}"#,
        "[DONE]",
    ]),
    ("anthropic", 1, &[
        r#"{"type":"message_start","message":{"usage":{"input_tokens":10,"output_tokens":1,"cache_read_input_tokens":2}}}"#,
        r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
        r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" blue"}}"#,
        r#"{"type":"content_block_start","content_block":{"type":"tool_use","id":"a","name":"f"}}"#,
        r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{}"}}"#,
        r#"{"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"hm"}}"#,
        r#"{"type":"message_delta","delta":{"stop_reason":"tool_use"},"usage":{"output_tokens":2}}"#,
        r#"{"type":"message_stop"}"#,
        r#"{"type":"error","error":{"type":"overloaded_error","message":"no"}}"#,
    ]),
];

/// Each alone as its body and kind, and all of them as a stream.
fn golden_frames(folder: &Path) -> std::io::Result<()> {
    let mut stream = vec![0, 30];
    for (name, digits) in FRAMES.lines().filter_map(|line| line.split_once(' ')) {
        let digit = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).expect("golden digits");
        let bytes: Vec<u8> = (0..digits.len()).step_by(2).map(digit).collect();
        stream.extend(&bytes);
        // A header is 16 bytes long, and its kind lies at 6.
        std::fs::write(folder.join(name), [&bytes[6..7], &bytes[16..]].concat())?;
    }
    std::fs::write(folder.join("stream"), stream)
}

fn models(folder: &Path) -> std::io::Result<()> {
    for (i, family) in FAMILIES.iter().enumerate() {
        let heads = Heads { heads: 1, kv_heads: 1, head_dim: 32 };
        let model = Random {
            architecture: family.architecture,
            shape: Shape { layers: 1, hidden: 32, ff: 32, vocab: 8, context: 64, heads, eps: 1e-5 },
            matrices: [GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::Q5_1, GgmlType::IQ4_NL][i % 4],
            better: None,
            embedding: GgmlType::F16,
            tied: i % 2 == 0,
            seed: i as u64,
        };
        let mut writer = model.writer();
        let set = |key: &str| format!("{}.{key}", family.architecture);
        writer.set(&set("rope.scaling.type"), ["linear", "yarn"][i % 2]);
        writer.set(&set("rope.scaling.factor"), 2.0f32);
        writer.set("tokenizer.ggml.tokens", ["a", "b", "ab", "<s>"].into_iter().collect::<Strings>());
        let bytes = writer.to_bytes(|tensor| model.weights(tensor));
        let file = ModelFile::from_bytes(&bytes[..]).expect("the writer's files can be read");
        models::plan(&file).expect("a seed gets past the last check");
        std::fs::write(folder.join(format!("{}.gguf", family.architecture)), bytes)?;
    }
    std::fs::write(folder.join("values.gguf"), values())
}

fn values() -> Vec<u8> {
    let mut writer = Writer::new("none");
    writer
        .set("u8", 1u8)
        .set("i8", -1i8)
        .set("u16", 1u16)
        .set("i16", -1i16)
        .set("u32", 1u32)
        .set("i32", -1i32);
    writer.set("f32", 1f32).set("bool", true).set("u64", 1u64).set("i64", -1i64).set("f64", 1f64);
    writer.set("as", Value::Array(Array::Array(vec![Array::U16(vec![1]), Array::Array(vec![])])));
    writer.set("bs", vec![true]).set("is", vec![1i32, 2]).set("general.alignment", 32u32);
    for ty in GgmlType::KNOWN {
        writer.declare(&ty.to_string(), ty, &[ty.block_values() as u64, 1]);
    }
    writer.to_bytes(|tensor| vec![0x11; tensor.bytes as usize])
}
