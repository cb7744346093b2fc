//! Plans of made-up and of real files.
use super::random::Random;
use super::*;
use crate::gguf::write::Writer;
use crate::gguf::{GgmlType, Value};
use crate::plan::{Activation, NormKind, NormQkvRopeCache, RopePairs, Step};
use std::path::PathBuf;
use std::time::Instant;

/// The plan of a tiny model after `change`.
fn plan_of(model: &Random, change: impl FnOnce(&mut Writer)) -> Result<Plan, ModelError> {
    let mut writer = model.writer();
    change(&mut writer);
    let file = ModelFile::from_bytes(writer.to_bytes(|tensor| vec![0x3c; tensor.bytes as usize]))?;
    plan(&file)
}

fn check_refused(architecture: &'static str, change: impl FnOnce(&mut Writer), message: &str) {
    let error = plan_of(&Random::tiny(architecture, 1), change).unwrap_err().to_string();
    assert!(error.contains(message), "{error:?} doesn't say {message:?}");
}

fn qkv(plan: &Plan, layer: usize) -> &NormQkvRopeCache {
    match &plan.layers[layer][0] {
        Step::NormQkvRopeCache(step) => step,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_family_plans_its_random_model() {
    for family in FAMILIES {
        let plan = plan_of(&Random::tiny(family.architecture, 1), |_| {}).unwrap();
        assert_eq!((plan.hidden, plan.vocab, plan.context, plan.layers.len()), (64, 320, 512, 2));
        assert_eq!(plan.head.linear.weight, "output.weight");
        let has_norm = matches!(family.architecture, "qwen3" | "gemma3");
        assert_eq!(qkv(&plan, 1).q_norm.is_some(), has_norm);
        assert_eq!(qkv(&plan, 1).v.bias.is_some(), family.architecture == "qwen2");
        let pairs = if family.architecture == "llama" { RopePairs::Adjacent } else { RopePairs::Halves };
        assert_eq!(qkv(&plan, 1).rope.pairs, pairs);
        let tied = Random { tied: true, ..Random::tiny(family.architecture, 1) };
        assert_eq!(plan_of(&tied, |_| {}).unwrap().head.linear.weight, "token_embd.weight");
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let set = |key: &'static str, value: Value| {
        move |writer: &mut Writer| {
            writer.set(key, value);
        }
    };
    check_refused(
        "llama",
        set("general.architecture", "mamba".into()),
        "these are: llama, qwen2, qwen3, gemma3",
    );
    check_refused("llama", set("llama.block_count", u32::MAX.into()), "block_count is 4294967295");
    check_refused("llama", set("llama.block_count", 22u32.into()), "22; the file's 21 tensors");
    check_refused("llama", set("llama.block_count", 3u32.into()), "no tensor blk.2.attn_norm.weight");
    check_refused(
        "llama",
        set("llama.block_count", 1u32.into()),
        "a tensor blk.1.attn_norm.weight, which llama",
    );
    check_refused("llama", set("llama.embedding_length", 0u32.into()), "embedding_length is 0");
    check_refused(
        "llama",
        set("llama.embedding_length", 96u32.into()),
        "token_embd.weight is [64, 320], not [96, 320]",
    );
    check_refused(
        "llama",
        set("llama.attention.head_count_kv", 3u32.into()),
        "must divide the 4 query heads",
    );
    check_refused("llama", set("llama.attention.head_count", "x".into()), "the string \"x\"");
    check_refused("llama", set("llama.attention.key_length", 48u32.into()), "a multiple of 32");
    check_refused("llama", set("llama.attention.key_length", 64u32.into()), "value_length is 32");
    check_refused("llama", set("llama.attention.layer_norm_rms_epsilon", f32::NAN.into()), "epsilon is NaN");
    check_refused("llama", set("llama.rope.freq_base", f32::INFINITY.into()), "freq_base is inf");
    check_refused("llama", set("llama.rope.freq_base", 1e-38f32.into()), "above 1");
    check_refused("llama", set("llama.rope.scaling.factor", 1e-30f32.into()), "too fast");
    check_refused("llama", set("llama.rope.dimension_count", 33u32.into()), "dimension_count is 33");
    check_refused("llama", set("llama.rope.scaling.type", "longrope".into()), "none, linear and yarn");
    check_refused("llama", set("llama.attention.causal", false.into()), "only causal");
    check_refused("llama", set("llama.expert_count", 8u32.into()), "mixtures of experts");
    check_refused(
        "llama",
        set("llama.feed_forward_length", 1u32.into()),
        "blk.0.ffn_gate.weight is [64, 160], not [64, 1]",
    );
    let extra = |writer: &mut Writer| {
        writer.declare("blk.0.strange", GgmlType::F32, &[1]);
    };
    check_refused("llama", extra, "a tensor blk.0.strange");
}

#[test]
fn rotations_are_scaled() {
    let model = Random::tiny("llama", 1);
    let rope = |change: fn(&mut Writer)| qkv(&plan_of(&model, change).unwrap(), 0).rope.clone();
    let plain = rope(|_| {});
    assert_eq!((plain.inv_freq.len(), plain.inv_freq[0], plain.magnitude), (16, 1.0, 1.0));
    assert!((plain.inv_freq[8] - 0.01).abs() < 1e-9);
    let linear = rope(|w| {
        w.set("llama.rope.scaling.factor", 4.0f32);
    });
    assert_eq!(linear.inv_freq, plain.inv_freq.iter().map(|f| f / 4.0).collect::<Vec<_>>());
    let none = rope(|w| {
        w.set("llama.rope.scaling.factor", 4.0f32).set("llama.rope.scaling.type", "none");
    });
    assert_eq!(none, plain);
    let yarn = rope(|w| {
        w.set("llama.rope.scaling.factor", 4.0f32).set("llama.rope.scaling.type", "yarn");
        w.set("llama.rope.scaling.original_context_length", 4096u32);
    });
    assert!((yarn.magnitude - (1.0 + 0.1 * 4f32.ln())).abs() < 1e-6);
    // The pair that turns 32 times over the trained context is the last to keep its speed, the one that turns once
    // the first to be slowed in full.
    let ratio: Vec<f32> = yarn.inv_freq.iter().zip(&plain.inv_freq).map(|(y, p)| y / p).collect();
    let turns = |i: usize| 4096.0 * plain.inv_freq[i] / (2.0 * std::f32::consts::PI);
    for (i, ratio) in ratio.iter().enumerate() {
        match turns(i) {
            t if t >= 32.0 => assert!((ratio - 1.0).abs() < 1e-6, "pair {i}: {ratio}"),
            t if t <= 0.5 => assert!((ratio - 0.25).abs() < 1e-6, "pair {i}: {ratio}"),
            _ => assert!((0.249..1.001).contains(ratio), "pair {i}: {ratio}"),
        }
    }
    // Llama 3: a tensor of factors (here bytes 3c3c3c3c, so 0.0115).
    let factors = rope(|w| {
        w.declare("rope_freqs.weight", GgmlType::F32, &[16]);
    });
    let factor = f32::from_bits(0x3c3c_3c3c);
    assert!((factors.inv_freq[3] * factor / plain.inv_freq[3] - 1.0).abs() < 1e-6);
}

#[test]
fn gemma_has_windows_but_in_every_sixth_layer() {
    let mut model = Random::tiny("gemma3", 1);
    model.shape.layers = 12;
    let plan = plan_of(&model, |w| {
        w.set("gemma3.rope.scaling.type", "linear").set("gemma3.rope.scaling.factor", 8.0f32);
    })
    .unwrap();
    for layer in 0..12 {
        let Step::Attend(attend) = &plan.layers[layer][1] else { panic!("{:?}", plan.layers[layer][1]) };
        let rope = &qkv(&plan, layer).rope;
        if layer % 6 == 5 {
            assert_eq!((attend.window, rope.inv_freq[0]), (None, 1.0 / 8.0));
        } else {
            assert_eq!((attend.window, rope.inv_freq[0]), (Some(32), 1.0));
            assert!((rope.inv_freq[8] - 0.01).abs() < 1e-9);
        }
    }
    assert_eq!(plan.embed.scale, 8.0);
}

/// A model of the folder that `WEIR_TEST_MODELS` names.
fn real(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("WEIR_TEST_MODELS").map(|folder| PathBuf::from(folder).join(name));
    let found = path.filter(|path| path.exists());
    if found.is_none() {
        eprintln!("SKIPPED: no {name}; set WEIR_TEST_MODELS to a folder that has it");
        assert!(std::env::var_os("CI").is_none(), "{name} is needed here");
    }
    found
}

fn check_real(name: &str, shape: (usize, usize, usize, usize), heads: (usize, usize, usize)) -> Option<Plan> {
    let start = Instant::now();
    let file = ModelFile::open(&real(name)?).unwrap();
    let opened = start.elapsed();
    let plan = plan(&file).unwrap();
    eprintln!("{name}: opened in {opened:?}, planned in {:?}", start.elapsed() - opened);
    assert_eq!((plan.hidden, plan.vocab, plan.context, plan.layers.len()), shape);
    let found = qkv(&plan, 0).heads;
    assert_eq!((found.heads, found.kv_heads, found.head_dim), heads);
    assert_eq!(plan.head.norm.kind, NormKind::Rms);
    Some(plan)
}

#[test]
fn real_models_are_planned() {
    if let Some(plan) = check_real("smollm2.gguf", (576, 49_152, 8192, 30), (9, 3, 64)) {
        assert_eq!(plan.head.linear.weight, "token_embd.weight");
        assert_eq!(qkv(&plan, 29).rope.inv_freq.len(), 32);
    }
    if let Some(plan) = check_real("qwen2.gguf", (896, 151_936, 32_768, 24), (14, 2, 64)) {
        assert_eq!(plan.head.linear.weight, "output.weight");
        assert!(qkv(&plan, 0).k.bias.is_some());
    }
    if let Some(plan) = check_real("gemma3.gguf", (640, 262_144, 32_768, 18), (4, 1, 256)) {
        assert_eq!(plan.embed.scale, 640f32.sqrt());
        let Step::NormGateUpAct(mlp) = &plan.layers[0][3] else { panic!("{:?}", plan.layers[0][3]) };
        assert_eq!(mlp.act, Activation::GeluTanh);
        let Step::Attend(attend) = &plan.layers[17][1] else { panic!("{:?}", plan.layers[17][1]) };
        assert_eq!((attend.window, attend.scale), (None, 1.0 / 16.0));
    }
}
