//! The reference device against llama.cpp in F32.
use crate::golden::device::mean_kl;
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

#[test]
fn qwen2_agrees() {
    check("qwen2");
}

#[test]
fn gemma3_agrees() {
    check("gemma3");
}
