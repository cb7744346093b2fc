//! Token ids against llama.cpp's, on a corpus made for it (`tests/golden/corpus.py`).
use super::{golden, model};
use serde_json::Value;
use weir_backends::text::{Special, Tokenizer};

fn check(name: &str) {
    let Some(file) = model(name) else { return };
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    let corpus: Vec<String> = serde_json::from_str(&golden("corpus.json")).unwrap();
    let lines: Vec<Value> = serde_json::from_str(&golden(&format!("{name}.tokens.json"))).unwrap();
    assert_eq!((corpus.len(), lines.len()), (2000, 2000));
    let ids = |line: &Value| {
        line.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect::<Vec<_>>()
    };
    let mut wrong = 0;
    for (text, line) in corpus.iter().zip(&lines) {
        let pair = line.get(0).filter(|first| first.is_array());
        let (special, plain) = if pair.is_some() { (&line[0], &line[1]) } else { (line, line) };
        for (how, expected) in [(Special::Parse, ids(special)), (Special::AsText, ids(plain))] {
            let found = tokenizer.encode(text, how);
            if found != expected {
                wrong += 1;
                eprintln!("{name}, {how:?}: {text:?}\n  found    {found:?}\n  expected {expected:?}");
            }
            if how == Special::AsText && !expected.iter().any(|id| tokenizer.is_control(*id)) {
                let written = if name == "gemma3" { text.replace('▁', " ") } else { text.clone() };
                assert_eq!(tokenizer.decode(&found), written, "{name}");
            }
        }
    }
    assert_eq!(wrong, 0, "{name}: so many of 4000 encodings differ");
}

#[test]
fn smollm2_tokens_are_llama_cpps() {
    check("smollm2");
}

#[test]
fn qwen2_tokens_are_llama_cpps() {
    check("qwen2");
}

#[test]
fn gemma3_tokens_are_llama_cpps() {
    check("gemma3");
}

#[test]
fn roles_are_llama_cpps() {
    let check = |name: &str, bos: &str, eos: &str, adds_bos: bool, ends: &[&str]| {
        let Some(file) = model(name) else { return };
        let tokenizer = Tokenizer::from_gguf(&file).unwrap();
        assert_eq!(tokenizer.bos().map(|id| tokenizer.name(id)), Some(bos), "{name}");
        assert_eq!(tokenizer.eos().map(|id| tokenizer.name(id)), Some(eos), "{name}");
        assert_eq!((tokenizer.adds_bos(), tokenizer.adds_eos()), (adds_bos, false), "{name}");
        let names: Vec<&str> = tokenizer.ends().iter().map(|id| tokenizer.name(*id)).collect();
        assert_eq!(names, ends, "{name}");
        assert!(tokenizer.is_end(tokenizer.eos().unwrap()) && !tokenizer.is_end(tokenizer.len() as u32 - 1));
    };
    check("smollm2", "<|im_start|>", "<|im_end|>", false, &["<|endoftext|>", "<|im_end|>", "<reponame>"]);
    let qwen = ["</s>", "<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"];
    check("qwen2", "<|endoftext|>", "<|im_end|>", false, &qwen);
    check("gemma3", "<bos>", "<eos>", true, &["<eos>", "<end_of_turn>", "</s>"]);
}

#[test]
fn hostile_text_takes_no_long() {
    for name in ["smollm2", "qwen2", "gemma3"] {
        let Some(file) = model(name) else { return };
        let tokenizer = Tokenizer::from_gguf(&file).unwrap();
        for unit in [" ", "a", "\n", "<", "<|im_end|>", "\t\n", "漢", "ab"] {
            let text = unit.repeat((1 << 20) / unit.len());
            let ids = tokenizer.encode(&text, Special::Parse);
            assert!(unit.starts_with("<|") || tokenizer.decode(&ids) == text, "{name}: {unit:?}");
        }
    }
}
