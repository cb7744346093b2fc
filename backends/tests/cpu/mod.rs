//! The CPU device: its kernels against the reference, on every instruction set that is present.
use crate::conformance::{
    self, check_halves, check_invariance, check_last_sampled, check_refusals, check_several_sampled, near,
};
use crate::golden;
use crate::golden::device::{is_full, mean_kl};
use std::time::Instant;
use weir_backends::cpu::{Cpu, CpuOptions, Isa};
use weir_backends::gguf::GgmlType;
use weir_scheduler::KvType;

fn cpus() -> Vec<(Isa, Cpu)> {
    let present = Isa::ALL.into_iter().filter(|isa| isa.present());
    present.map(|isa| (isa, Cpu::new(CpuOptions { threads: Some(2), isa: Some(isa) }))).collect()
}

/// A random model whose matrices have type `ty`, against the reference on the same file.
fn check_type(family: &'static str, ty: GgmlType, kv: KvType, tolerance: f64) {
    let file = near::model(family, ty);
    let reference = near::reference(&file);
    let mut fused: Option<Vec<f32>> = None;
    for (isa, cpu) in cpus() {
        let ours = near::logits(&cpu, &file, kv);
        let error = near::error(&ours, &reference);
        eprintln!("{family} {ty:?} {kv:?} {}: {error:.2e}", isa.name());
        assert!(error < tolerance, "{family} {ty:?} {kv:?} on {}: off by {error:e}", isa.name());
        if isa != Isa::Portable {
            let first = fused.get_or_insert_with(|| ours.clone());
            assert!(*first == ours, "{ty:?}: {} has bits of its own", isa.name());
        }
    }
}

#[test]
fn every_type_meets_the_reference() {
    for ty in GgmlType::KNOWN {
        let float = matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        check_type("llama", ty, KvType::F16, if float { 1e-3 } else { 0.03 });
    }
}

#[test]
fn every_family_meets_the_reference() {
    for family in ["llama", "qwen2", "qwen3", "gemma3"] {
        check_type(family, GgmlType::Q8_0, KvType::F16, 0.03);
        check_type(family, GgmlType::F32, KvType::F16, 2e-3);
        check_type(family, GgmlType::F32, KvType::Q8_0, 0.03);
    }
}

#[test]
fn batches_do_not_show_in_the_bits() {
    for (isa, cpu) in cpus() {
        eprintln!("{}", isa.name());
        for (seed, family) in ["llama", "qwen2", "qwen3", "gemma3"].into_iter().enumerate() {
            check_invariance(&cpu, family, seed as u64 + 1);
        }
        check_halves(&cpu, "gemma3");
        check_last_sampled(&cpu);
        check_several_sampled(&cpu);
        check_refusals(&cpu);
    }
}

#[test]
fn threads_do_not_show_in_the_bits() {
    let (file, _) = conformance::model("gemma3", 1);
    let with = |threads| {
        near::logits(&Cpu::new(CpuOptions { threads: Some(threads), isa: None }), &file, KvType::F16)
    };
    let one = with(1);
    for threads in [2, 3, 5, 16] {
        assert!(one == with(threads), "{threads} threads");
    }
}

/// The device strays from llama.cpp's F32 logits no further than llama.cpp's own quantised kernels do, and a quarter:
/// with the instructions that ship here, and in a full run with all that are present.
fn check_golden(model: &str) {
    let peer = golden::read(model).peer_kl;
    for (isa, cpu) in cpus().into_iter().take(if is_full() { usize::MAX } else { 1 }) {
        let start = Instant::now();
        let Some(kl) = mean_kl(&cpu, model, 128) else { return };
        let name = isa.name();
        eprintln!("{model} {name}: mean KL {kl:.3e}, llama.cpp {peer:.3e}, in {:.1?}", start.elapsed());
        assert!(kl <= 1.25 * peer, "{model} {name}: mean KL {kl:e}, llama.cpp's own is {peer:e}");
    }
}

#[test]
fn smollm2_is_as_near_as_llama_cpp() {
    check_golden("smollm2");
}

#[test]
fn gemma3_is_as_near_as_llama_cpp() {
    check_golden("gemma3");
}

#[test]
fn qwen2_is_as_near_as_llama_cpp() {
    check_golden("qwen2");
}
