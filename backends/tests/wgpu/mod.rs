//! The wgpu device against the reference, on every adapter that is wanted: `WEIR_TEST_GPU` is a part of its description,
//! by default the programs that imitate a GPU (lavapipe: Debian's `mesa-vulkan-drivers`).
use crate::conformance::{
    self, check_halves, check_invariance, check_last_sampled, check_refusals, check_several_sampled, near,
    step,
};
use crate::golden::{
    self,
    device::{is_full, mean_kl_of},
};
use std::sync::Arc;
use std::time::Instant;
use weir_backends::gguf::{GgmlType, ModelFile};
use weir_backends::models;
use weir_backends::models::random::Random;
use weir_backends::plan::Heads;
use weir_backends::program::{
    Device, DeviceError, Input, KvLayout, SampleSpec, Segment, SegmentOutput, TokenCount, Want,
};
use weir_backends::sampling;
use weir_backends::wgpu::Wgpu;
use weir_scheduler::{KvType, Sampling};

/// The adapter to test; without one the test is skipped, but not in CI.
fn gpu() -> Option<Wgpu> {
    let wanted = std::env::var("WEIR_TEST_GPU").ok();
    let all = Wgpu::find();
    let found = match &wanted {
        Some(part) => all.iter().find(|found| found.description.contains(part.as_str())),
        None => all.iter().find(|found| found.software).or(all.first()),
    };
    let Some(found) = found else {
        let names: Vec<&str> = all.iter().map(|found| &*found.description).collect();
        eprintln!("SKIPPED: no adapter {wanted:?} among {names:?}; lavapipe is in mesa-vulkan-drivers");
        assert!(std::env::var_os("CI").is_none() && wanted.is_none(), "an adapter is needed here");
        return None;
    };
    eprintln!("{}", found.description);
    Some(Wgpu::new(found).unwrap())
}

/// A random model whose matrices have type `ty`, against the reference on the same file.
fn check_type(device: &Wgpu, family: &'static str, ty: GgmlType, kv: KvType, tolerance: f64) {
    let file = near::model(family, ty);
    let error = near::error(&near::logits(device, &file, kv), &near::reference(&file));
    eprintln!("{family} {ty:?} {kv:?}: {error:.2e}");
    assert!(error < tolerance, "{family} {ty:?} {kv:?}: off by {error:e}");
}

#[test]
fn every_type_meets_the_reference() {
    let Some(gpu) = gpu() else { return };
    for ty in GgmlType::KNOWN {
        let float = matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        check_type(&gpu, "llama", ty, KvType::F16, if float { 1e-3 } else { 0.03 });
    }
}

#[test]
fn every_family_meets_the_reference() {
    let Some(gpu) = gpu() else { return };
    for family in ["llama", "qwen2", "qwen3", "gemma3"] {
        check_type(&gpu, family, GgmlType::Q8_0, KvType::F16, 0.03);
        check_type(&gpu, family, GgmlType::F32, KvType::F16, 2e-3);
        check_type(&gpu, family, GgmlType::F32, KvType::Q8_0, 0.03);
    }
    crate::family::check(&gpu, 2e-2);
}

#[test]
fn batches_do_not_show_in_the_bits() {
    let Some(gpu) = gpu() else { return };
    for (seed, family) in ["llama", "qwen2", "qwen3", "gemma3"].into_iter().enumerate() {
        check_invariance(&gpu, family, seed as u64 + 1);
    }
    check_halves(&gpu, "gemma3");
    check_halves(&gpu, "llama");
    check_last_sampled(&gpu);
    check_several_sampled(&gpu);
    check_refusals(&gpu);
}

/// What the GPU samples after a prompt is what the rule makes of the logits that the GPU itself gives.
fn check_sampling(gpu: &Wgpu, change: fn(&mut SampleSpec)) {
    let (file, plan) = conformance::model("llama", 6);
    let layout = KvLayout { blocks: 2, kv: KvType::F16, slots: 1, rows: 16 };
    let mut program = gpu.compile(&file, &plan, 0..plan.layers.len(), layout).unwrap();
    let mut segment = |want| {
        let input = Input::Ids((0..9).collect());
        step(
            &mut *program,
            vec![Segment { slot: 0, start: 0, prompt: false, input, blocks: [1].into(), want }],
        )
        .remove(0)
    };
    let SegmentOutput::Logits(logits) = segment(Want::Logits(1)) else { panic!("no logits") };
    for seed in 0..40 {
        let sampling = Sampling { temperature: 1.5, seed: seed << 20 | seed, ..Sampling::default() };
        let mut spec = SampleSpec {
            sampling: Arc::new(sampling),
            position: 9 + seed as u32,
            counts: Vec::new(),
            mask: None,
        };
        change(&mut spec);
        let expected = sampling::sample(&mut logits.clone(), &spec);
        let found = segment(Want::Sample(vec![spec]));
        assert_eq!(found, SegmentOutput::Sampled(vec![expected]), "seed {seed}");
    }
}

#[test]
fn tokens_are_chosen_by_the_rule() {
    let Some(gpu) = gpu() else { return };
    fn with(change: impl FnOnce(&mut Sampling)) -> impl FnOnce(&mut SampleSpec) {
        |spec| change(Arc::make_mut(&mut spec.sampling))
    }
    check_sampling(&gpu, |_| {});
    check_sampling(&gpu, |spec| with(|s| s.temperature = 0.0)(spec));
    check_sampling(&gpu, |spec| with(|s| s.min_p = 0.2)(spec));
    check_sampling(&gpu, |spec| with(|s| s.top_k = 5)(spec));
    check_sampling(&gpu, |spec| with(|s| s.top_p = 0.5)(spec));
    check_sampling(&gpu, |spec| with(|s| s.logprobs = Some(3))(spec));
    check_sampling(&gpu, |spec| spec.mask = Some(vec![0x8000_0001; 10].into()));
    check_sampling(&gpu, |spec| {
        with(|s| s.repetition_penalty = 2.0)(spec);
        spec.counts = (0..100).map(|id| TokenCount { id, in_output: 1 }).collect();
    });
}

#[test]
fn a_model_larger_than_memory_is_refused() {
    let Some(gpu) = gpu() else { return };
    let (file, plan) = conformance::model("llama", 6);
    let layout = KvLayout { blocks: 1 << 26, kv: KvType::F16, slots: 1, rows: 16 };
    let error = gpu.compile(&file, &plan, 0..plan.layers.len(), layout).err().unwrap();
    assert!(matches!(error, DeviceError::Memory { .. } | DeviceError::Unsupported(_)), "{error}");
}

/// A model whose products have more blocks of columns than lanes share a row.
fn wide(matrices: GgmlType) -> ModelFile {
    let mut random = Random { matrices, ..Random::tiny("llama", 4) };
    (random.shape.hidden, random.shape.ff) = (512, 4608);
    random.shape.heads = Heads { heads: 4, kv_heads: 2, head_dim: 64 };
    random.file()
}

#[test]
fn wide_products_meet_the_reference() {
    let Some(gpu) = gpu() else { return };
    for (ty, tolerance) in [(GgmlType::Q4_1, 0.03), (GgmlType::Q6_K, 0.03), (GgmlType::F16, 1e-3)] {
        let file = wide(ty);
        let ours = near::logits(&gpu, &file, KvType::F16);
        let error = near::error(&ours, &near::reference(&file));
        eprintln!("wide {ty:?}: {error:.2e}");
        assert!(error < tolerance, "{ty:?}: off by {error:e}");
        check_one_by_one(&gpu, &file, 12);
    }
}

/// A sequence that comes one token at a time, in steps of one row, has the bits of the whole prompt at once.
fn check_one_by_one(gpu: &Wgpu, file: &ModelFile, length: u32) {
    let plan = models::plan(file).unwrap();
    // Four spans of attention: the last two are split over workgroups where rows come one by one.
    let layout = KvLayout { blocks: 14, kv: KvType::F16, slots: 1, rows: 448 };
    let ids: Vec<u32> = (0..length).map(|i| (i * 41 + 3) % plan.vocab as u32).collect();
    let run = |each: usize| -> Vec<f32> {
        let mut program = gpu.compile(file, &plan, 0..plan.layers.len(), layout).unwrap();
        let mut all = Vec::new();
        for (i, ids) in ids.chunks(each).enumerate() {
            let segment = Segment {
                slot: 0,
                start: (i * each) as u32,
                prompt: false,
                input: Input::Ids(ids.to_vec()),
                blocks: [7, 0, 3, 1, 4, 13, 12, 11, 10, 9, 8, 6, 5, 2].into(),
                want: Want::Logits(ids.len() as u32),
            };
            match step(&mut *program, vec![segment]).remove(0) {
                SegmentOutput::Logits(logits) => all.extend(logits),
                other => panic!("{other:?}"),
            }
        }
        all
    };
    let (whole, single) = (run(length as usize), run(1));
    let same = whole.iter().zip(&single).filter(|(a, b)| a.to_bits() == b.to_bits()).count();
    assert_eq!(same, whole.len(), "logits with equal bits");
}

#[test]
fn decoding_has_the_bits_of_prefilling() {
    let Some(gpu) = gpu() else { return };
    for family in ["llama", "qwen2", "qwen3", "gemma3"] {
        eprintln!("{family}");
        check_one_by_one(&gpu, &conformance::model(family, 8).0, 420);
    }
}

/// The device strays from llama.cpp's F32 logits no further than llama.cpp's own quantised kernels do, and a quarter.
fn check_golden(model: &str, positions: usize) {
    let Some(gpu) = gpu() else { return };
    let (start, peer) = (Instant::now(), golden::read(model).peer_kl);
    if let Some(kl) = mean_kl_of(&gpu, model, 64, positions, true) {
        eprintln!("{model}: mean KL {kl:.3e}, llama.cpp {peer:.3e}, in {:.1?}", start.elapsed());
        assert!(kl <= 1.25 * peer, "{model}: mean KL {kl:e}, llama.cpp's own is {peer:e}");
    }
}

/// A GPU takes seconds for all positions and models, a program that imitates one many minutes.
fn is_patient() -> bool {
    is_full() || std::env::var_os("WEIR_TEST_GPU").is_some()
}

#[test]
fn smollm2_is_as_near_as_llama_cpp() {
    check_golden("smollm2", if is_patient() { usize::MAX } else { 128 });
}

#[test]
fn the_larger_models_are_as_near_as_llama_cpp() {
    if is_patient() {
        ["gemma3", "qwen2"].into_iter().for_each(|model| check_golden(model, usize::MAX));
    } else {
        eprintln!("SKIPPED: gemma3 and qwen2 on this adapter; `cargo xtask test --full` runs them");
    }
}
