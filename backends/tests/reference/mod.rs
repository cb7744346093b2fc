//! The reference device against llama.cpp in F32.
use crate::golden::device::{is_full, mean_kl};
use std::time::Instant;
use weir_backends::reference::Reference;

fn check(model: &str) {
    let start = Instant::now();
    if let Some(kl) = mean_kl(&Reference::default(), model, 128) {
        eprintln!("{model}: mean KL {kl:.2e} in {:.1?}", start.elapsed());
        assert!(kl.abs() <= 1e-5, "{model}: mean KL {kl:e}");
    }
}

#[test]
fn smollm2_agrees() {
    check("smollm2");
}

/// Slow, and what they have beyond the first is in the CPU device's comparison too.
#[test]
fn larger_models_agree() {
    if is_full() {
        check("qwen2");
        check("gemma3");
    }
}
