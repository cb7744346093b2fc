//! Tokenizers, streams and chat templates, of real models and made-up ones.
mod streams;
mod templates;
mod tokens;
mod vocabularies;

use std::path::{Path, PathBuf};
use weir_backends::gguf::write::Writer;
use weir_backends::gguf::{ModelFile, Strings, Value};
use weir_backends::text::Tokenizer;

/// A test model, from the folder that `WEIR_TEST_MODELS` names. Without it the test is skipped, except in CI.
fn model(name: &str) -> Option<ModelFile> {
    let Some(folder) = std::env::var_os("WEIR_TEST_MODELS") else {
        assert!(std::env::var_os("CI").is_none(), "WEIR_TEST_MODELS must name the folder of the test models");
        eprintln!("SKIPPED: WEIR_TEST_MODELS names no folder with {name}.gguf; `cargo xtask test` sets it");
        return None;
    };
    Some(ModelFile::open(&PathBuf::from(folder).join(format!("{name}.gguf"))).unwrap())
}

/// A file beside the goldens.
fn golden(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap()
}

/// A model file with nothing but these values of `tokenizer.ggml.*`.
fn vocabulary_file(values: &[(&str, Value)]) -> ModelFile {
    let mut writer = Writer::new("none");
    for (name, value) in values {
        writer.set(&format!("tokenizer.ggml.{name}"), value.clone());
    }
    let mut bytes = Vec::new();
    writer.write(&mut bytes, |_| Vec::new()).unwrap();
    ModelFile::from_bytes(bytes).unwrap()
}

/// All bytes, some longer tokens, and `<end>`, a control token.
fn small_tokenizer() -> Tokenizer {
    let longer = ["ab", "abc", "▁the", "é", "漢字", "🙂", "END", "\n\nUser"].map(String::from);
    let kinds: Vec<i32> = (0..256).map(|_| 6).chain(longer.iter().map(|_| 1)).chain([3]).collect();
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let tokens: Strings = bytes.chain(longer).chain(["<end>".into()]).collect();
    let file = vocabulary_file(&[
        ("model", "llama".into()),
        ("tokens", tokens.into()),
        ("token_type", kinds.into()),
        ("eos_token_id", 264u32.into()),
    ]);
    Tokenizer::from_gguf(&file).unwrap()
}
