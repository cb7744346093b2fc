//! How far a device's logits are from the golden ones.
use super::logits::Golden;
use std::path::PathBuf;
use std::sync::Arc;
use weir_backends::gguf::ModelFile;
use weir_backends::models;
use weir_backends::program::{Batch, Device, Input, KvLayout, Segment, SegmentOutput, Want};
use weir_scheduler::{BLOCK_TOKENS, KvType};

/// The file of a test model (`smollm2`, `qwen2`, `gemma3`), from the folder that `WEIR_TEST_MODELS` names. Without it
/// the test is skipped, but not in CI.
pub fn model_path(model: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("WEIR_TEST_MODELS").map(PathBuf::from);
    let found = folder.map(|folder| folder.join(format!("{model}.gguf"))).filter(|path| path.exists());
    if found.is_none() {
        eprintln!("SKIPPED: {model}.gguf isn't there; set WEIR_TEST_MODELS to the folder that has it");
        assert!(std::env::var_os("CI").is_none(), "{model}.gguf is needed here");
    }
    found
}

/// Whether everything shall be compared, which takes minutes (`cargo xtask test --full`).
pub fn is_full() -> bool {
    std::env::var_os("WEIR_TEST_FULL").is_some()
}

/// Mean over the positions of KL(golden || device), in nats, the text going in by `chunk` tokens at a time. None where
/// the model isn't there.
pub fn mean_kl(device: &dyn Device, model: &str, chunk: usize) -> Option<f64> {
    mean_kl_of(device, model, chunk, usize::MAX, true)
}

/// The same, of the first `positions` only; `prompt`: as a prompt.
pub fn mean_kl_of(
    device: &dyn Device,
    model: &str,
    chunk: usize,
    positions: usize,
    prompt: bool,
) -> Option<f64> {
    let file = ModelFile::open(&model_path(model)?).unwrap();
    let plan = models::plan(&file).unwrap();
    let mut golden: Golden = super::read(model);
    golden.tokens.truncate(positions);
    let blocks = golden.tokens.len().div_ceil(BLOCK_TOKENS) as u32;
    let layout = KvLayout { blocks, kv: KvType::F16, slots: 1, rows: chunk as u32 };
    let mut program = device.compile(&file, &plan, 0..plan.layers.len(), layout).unwrap();
    let table: Arc<[u32]> = (0..blocks).rev().collect();
    let mut kl = 0.0;
    for (i, ids) in golden.tokens.chunks(chunk).enumerate() {
        let segment = Segment {
            slot: 0,
            start: (i * chunk) as u32,
            prompt,
            input: Input::Ids(ids.to_vec()),
            blocks: table.clone(),
            want: Want::Logits(ids.len() as u32),
        };
        program.submit(Batch { segments: vec![segment] }).unwrap();
        let output = loop {
            if let Some(output) = program.poll() {
                break output.unwrap();
            }
        };
        let [SegmentOutput::Logits(logits)] = &output.segments[..] else { panic!("{output:?}") };
        let rows = &golden.rows[i * chunk..];
        kl += logits.chunks_exact(plan.vocab).zip(rows).map(|(logits, row)| row.kl(logits)).sum::<f64>();
    }
    Some(kl / golden.tokens.len() as f64)
}
