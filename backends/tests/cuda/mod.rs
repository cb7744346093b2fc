//! The CUDA device against the reference, and its own promise: the same bits whatever the batch. Needs a GPU, so these
//! run with `cargo xtask test --gpu cuda`.
use crate::conformance::{
    check_halves, check_invariance, check_invariance_of, check_last_sampled, check_refusals,
    check_several_sampled, model, near, step,
};
use crate::family;
use crate::golden::{self, device::mean_kl_of};
use std::sync::Arc;
use std::time::Instant;
use weir_backends::cuda::Cuda;
use weir_backends::gguf::GgmlType;
use weir_backends::models;
use weir_backends::models::random::Random;
use weir_backends::plan::Heads;
use weir_backends::program::{Device, Input, KvLayout, Program, SampleSpec, Segment, SegmentOutput, Want};
use weir_scheduler::{BLOCK_TOKENS, KvType, Sampling};

/// On this processor everything is thousands of times slower.
const EMULATED: bool = cfg!(feature = "cuda-emulator");

fn gpu() -> Cuda {
    Cuda::all().unwrap().remove(0)
}

/// A random model whose matrices have type `ty`, against the reference on the same file.
fn check_type(device: &Cuda, family: &'static str, ty: GgmlType, kv: KvType, tolerance: f64) -> bool {
    let file = near::model(family, ty);
    let reference = near::reference(&file);
    [false, true].into_iter().all(|prompt| {
        let error = near::error(&near::logits_of(device, &file, kv, prompt), &reference);
        eprintln!("{family} {ty:?} {kv:?}{}: {error:.2e}", if prompt { ", a prompt" } else { "" });
        error < tolerance
    })
}

#[test]
#[cfg_attr(not(feature = "cuda-emulator"), ignore = "needs an NVIDIA GPU")]
fn every_type_meets_the_reference() {
    let gpu = gpu();
    let mut wrong = Vec::new();
    for ty in GgmlType::KNOWN {
        // one for each storage is enough where kernels take seconds to build
        let twin = [
            GgmlType::Q4_0,
            GgmlType::Q5_0,
            GgmlType::Q2_K,
            GgmlType::Q3_K,
            GgmlType::Q4_K,
            GgmlType::IQ4_NL,
        ];
        if EMULATED && twin.contains(&ty) {
            continue;
        }
        let float = matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        if !check_type(&gpu, "llama", ty, KvType::F16, if float { 6e-3 } else { 0.03 }) {
            wrong.push(ty);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
#[cfg_attr(not(feature = "cuda-emulator"), ignore = "needs an NVIDIA GPU")]
fn every_family_meets_the_reference() {
    let gpu = gpu();
    for family in ["qwen2", "qwen3", "gemma3"] {
        assert!(check_type(&gpu, family, GgmlType::Q8_0, KvType::F16, 0.03), "{family}");
        assert!(check_type(&gpu, family, GgmlType::BF16, KvType::Q8_0, 0.02), "{family}");
    }
}

#[test]
#[cfg_attr(not(feature = "cuda-emulator"), ignore = "needs an NVIDIA GPU")]
fn a_family_of_another_shape_meets_the_reference() {
    family::check_width(&gpu(), 64, 1e-2);
}

#[test]
#[cfg_attr(not(feature = "cuda-emulator"), ignore = "needs an NVIDIA GPU")]
fn batches_do_not_show_in_the_bits() {
    let gpu = gpu();
    let families = ["llama", "gemma3", "qwen2", "qwen3"];
    for (seed, family) in families.into_iter().enumerate().take(if EMULATED { 2 } else { 4 }) {
        check_invariance(&gpu, family, seed as u64 + 1);
        let file = near::model(family, GgmlType::Q4_K);
        let plan = models::plan(&file).unwrap();
        check_invariance_of(&gpu, (file, plan), [40, 9, 64], seed as u64 + 9);
    }
    check_halves(&gpu, "gemma3");
    check_last_sampled(&gpu);
    check_several_sampled(&gpu);
    check_refusals(&gpu);
}

fn greedy(position: u32) -> Want {
    Want::Sample(vec![SampleSpec {
        sampling: Arc::new(Sampling { temperature: 0.0, ..Sampling::default() }),
        position,
        counts: Vec::new(),
        mask: None,
    }])
}

fn sampled(output: &SegmentOutput) -> u32 {
    match output {
        SegmentOutput::Sampled(s) => s[0].id,
        other => panic!("{other:?}"),
    }
}

/// Replays `tokens` in `program` from position 0 and returns the logits of every row.
fn prefill(program: &mut dyn Program, tokens: &[u32], chunk: usize, blocks: &Arc<[u32]>) -> Vec<u32> {
    prefill_from(program, tokens, 0, chunk, blocks)
}

/// The same from a position on, what is before being in the cache.
fn prefill_from(
    program: &mut dyn Program,
    tokens: &[u32],
    from: usize,
    chunk: usize,
    blocks: &Arc<[u32]>,
) -> Vec<u32> {
    let mut all = Vec::new();
    for (i, ids) in tokens[from..].chunks(chunk).enumerate() {
        let segment = Segment {
            slot: 0,
            start: (from + i * chunk) as u32,
            prompt: false,
            input: Input::Ids(ids.to_vec()),
            blocks: blocks.clone(),
            want: Want::Logits(ids.len() as u32),
        };
        match step(program, vec![segment]).remove(0) {
            SegmentOutput::Logits(l) => all.extend(l.iter().map(|v| v.to_bits())),
            other => panic!("{other:?}"),
        }
    }
    all
}

/// Long sequences, whose attention is split over thread blocks when they are decoded and isn't when they are prefilled.
#[test]
#[cfg_attr(not(feature = "cuda-emulator"), ignore = "needs an NVIDIA GPU")]
fn long_sequences_have_the_same_bits_alone_together_and_at_once() {
    let gpu = gpu();
    for (family, kv) in [("llama", KvType::F16), ("gemma3", KvType::Q8_0)] {
        let mut random = Random::tiny(family, 21);
        random.shape.layers = if EMULATED { 2 } else { 8 };
        let file = random.file();
        let plan = models::plan(&file).unwrap();
        let layout = KvLayout { blocks: 48, kv, slots: 3, rows: 512 };
        let mut program = gpu.compile(&file, &plan, 0..plan.layers.len(), layout).unwrap();
        let tables: [Arc<[u32]>; 3] = [(0..14).collect(), (14..28).rev().collect(), (28..42).collect()];
        let (longest, steps) = if EMULATED { (250, 12) } else { (300, 100) };
        let prompts =
            [longest, 130, 5].map(|n| (0..n as u32).map(|i| (i * 31 + n as u32) % 320).collect::<Vec<_>>());
        // alone, then three together: the same tokens
        let mut texts = [Vec::new(), Vec::new(), Vec::new()];
        for together in [false, true] {
            let mut found = prompts.clone();
            let groups: Vec<Vec<usize>> =
                if together { vec![vec![0, 1, 2]] } else { vec![vec![0], vec![1], vec![2]] };
            for group in groups {
                for &s in &group {
                    let n = prompts[s].len() as u32;
                    let segment = Segment {
                        slot: s as u32,
                        start: 0,
                        prompt: false,
                        input: Input::Ids(prompts[s].clone()),
                        blocks: tables[s].clone(),
                        want: greedy(n),
                    };
                    found[s].push(sampled(&step(&mut *program, vec![segment])[0]));
                }
                for _ in 0..steps {
                    let segments = group.iter().map(|&s| Segment {
                        slot: s as u32,
                        start: found[s].len() as u32 - 1,
                        prompt: false,
                        input: Input::LastSampled,
                        blocks: tables[s].clone(),
                        want: greedy(found[s].len() as u32),
                    });
                    let outputs = step(&mut *program, segments.collect());
                    for (&s, output) in group.iter().zip(&outputs) {
                        found[s].push(sampled(output));
                    }
                }
            }
            if together {
                assert!(texts == found, "{family}: other tokens in company");
            }
            texts = found;
        }
        // the whole text at once, cut in two ways, and a token at a time
        let text = &texts[0][..longest + steps];
        let whole = prefill(&mut *program, text, 512, &tables[0]);
        assert!(whole == prefill(&mut *program, text, 77, &tables[1]), "{family}: other bits in pieces");
        // alone in its batch, a row's attention takes another way
        let from = if EMULATED { longest - 2 } else { 0 };
        prefill(&mut *program, &text[..from], 512, &tables[2]);
        let last = prefill_from(&mut *program, text, from, 1, &tables[2]);
        assert!(whole[from * plan.vocab..] == last, "{family}: other bits one by one");
        let best = |row: &[u32]| {
            let value = |i: &usize| f32::from_bits(row[*i]);
            (0..row.len()).max_by(|a, b| value(a).total_cmp(&value(b)).then(b.cmp(a))).unwrap() as u32
        };
        for (i, row) in whole.chunks(plan.vocab).enumerate().skip(longest - 1) {
            assert_eq!(best(row), texts[0][i + 1], "{family}: position {i}");
        }
    }
}

/// Random choices are those of the rule.
#[test]
#[cfg_attr(not(feature = "cuda-emulator"), ignore = "needs an NVIDIA GPU")]
fn random_choices_are_those_of_the_rule() {
    let (file, plan) = model("llama", 8);
    let layout = KvLayout { blocks: 4, kv: KvType::F16, slots: 1, rows: 64 };
    let mut program = gpu().compile(&file, &plan, 0..plan.layers.len(), layout).unwrap();
    let ids: Vec<u32> = (0..20).collect();
    let mut run = |want| {
        let segment = Segment {
            slot: 0,
            start: 0,
            prompt: false,
            input: Input::Ids(ids.clone()),
            blocks: [1].into(),
            want,
        };
        step(&mut *program, vec![segment]).remove(0)
    };
    let SegmentOutput::Logits(row) = run(Want::Logits(1)) else { panic!("no logits") };
    for seed in 0..if EMULATED { 20 } else { 200u64 } {
        let sampling = Sampling {
            temperature: [1.0, 0.3, 2.0][seed as usize % 3],
            min_p: if seed % 2 == 0 { 0.0 } else { 0.05 },
            top_k: [0, 7, 0, 40, 1][seed as usize % 5],
            top_p: [1.0, 0.9, 0.5, 1.0][seed as usize % 4],
            seed: seed * 0x9e37_79b9_7f4a,
            ..Sampling::default()
        };
        let spec = SampleSpec { sampling: Arc::new(sampling), position: 20, counts: Vec::new(), mask: None };
        let expected = weir_backends::sampling::sample(&mut row.clone(), &spec).id;
        assert_eq!(sampled(&run(Want::Sample(vec![spec]))), expected, "seed {seed}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn golden_logits() {
    for model in ["smollm2", "gemma3", "qwen2"] {
        let peer = golden::read(model).peer_kl;
        let start = Instant::now();
        for prompt in [true, false] {
            if let Some(kl) = mean_kl_of(&gpu(), model, 128, usize::MAX, prompt) {
                let kind = if prompt { "as a prompt" } else { "as an answer" };
                eprintln!(
                    "{model} {kind}: mean KL {kl:.3e}, llama.cpp {peer:.3e}, in {:.1?}",
                    start.elapsed()
                );
                assert!(kl <= 1.25 * peer, "{model}: mean KL {kl:e}, llama.cpp's own is {peer:e}");
            }
        }
    }
}

/// Ten thousand tokens are the same alone and in company.
#[test]
#[ignore = "needs an NVIDIA GPU; would take hours on a processor"]
fn ten_thousand_tokens_are_the_same_however_they_are_computed() {
    const EACH: u32 = 1250;
    let mut random = Random::tiny("llama", 77);
    random.shape.layers = 12;
    (random.shape.hidden, random.shape.ff) = (576, 1536);
    random.shape.heads = Heads { heads: 9, kv_heads: 3, head_dim: 64 };
    random.matrices = GgmlType::Q4_1;
    let file = random.file();
    let plan = models::plan(&file).unwrap();
    let blocks = EACH.div_ceil(BLOCK_TOKENS as u32) + 1;
    let layout = KvLayout { blocks: 8 * blocks, kv: KvType::F16, slots: 8, rows: 64 };
    let texts = |together: bool| {
        let mut program = gpu().compile(&file, &plan, 0..plan.layers.len(), layout).unwrap();
        let mut texts: Vec<Vec<u32>> = (0..8).map(|s| vec![s * 31 + 7]).collect();
        let groups: Vec<Vec<u32>> =
            if together { vec![(0..8).collect()] } else { (0..8).map(|s| vec![s]).collect() };
        for group in groups {
            for start in 0..EACH {
                let segment = |s: &u32| Segment {
                    slot: *s,
                    start,
                    prompt: false,
                    input: Input::Ids(vec![texts[*s as usize][start as usize]]),
                    blocks: (s * blocks..(s + 1) * blocks).collect(),
                    want: greedy(start + 1),
                };
                let outputs = step(&mut *program, group.iter().map(segment).collect());
                group.iter().zip(&outputs).for_each(|(s, output)| texts[*s as usize].push(sampled(output)));
            }
        }
        texts
    };
    let alone = texts(false);
    let distinct: std::collections::HashSet<_> = alone[0].iter().collect();
    eprintln!("{} distinct tokens of {EACH}", distinct.len());
    assert!(alone == texts(true), "other tokens in company");
}
