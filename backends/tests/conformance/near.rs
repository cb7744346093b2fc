//! How near a device's logits are to the reference's, on small random models.
use super::step;
use weir_backends::gguf::{GgmlType, ModelFile};
use weir_backends::models;
use weir_backends::models::random::Random;
use weir_backends::plan::Heads;
use weir_backends::program::{Device, Input, KvLayout, Segment, SegmentOutput, Want};
use weir_backends::reference::Reference;
use weir_scheduler::KvType;

/// A model whose matrices have type `ty`, wide enough for its blocks.
pub fn model(family: &'static str, ty: GgmlType) -> ModelFile {
    let mut random = Random::tiny(family, 3);
    random.matrices = ty;
    if ty.block_values() == 256 {
        (random.shape.hidden, random.shape.ff) = (256, 512);
        random.shape.heads = Heads { heads: 4, kv_heads: 2, head_dim: 64 };
    }
    random.file()
}

/// Logits of every row of 70 tokens, computed at once.
pub fn logits(device: &dyn Device, file: &ModelFile, kv: KvType) -> Vec<f32> {
    logits_of(device, file, kv, false)
}

/// The same; `prompt`: as a prompt.
pub fn logits_of(device: &dyn Device, file: &ModelFile, kv: KvType, prompt: bool) -> Vec<f32> {
    let plan = models::plan(file).unwrap();
    let layout = KvLayout { blocks: 4, kv, slots: 1, rows: 128 };
    let mut program = device.compile(file, &plan, 0..plan.layers.len(), layout).unwrap();
    let ids: Vec<u32> = (0..70u32).map(|i| (i * 37 + 11) % plan.vocab as u32).collect();
    let want = Want::Logits(ids.len() as u32);
    let segment =
        Segment { slot: 0, start: 0, prompt, input: Input::Ids(ids), blocks: [2, 0, 3].into(), want };
    match step(&mut *program, vec![segment]).remove(0) {
        SegmentOutput::Logits(l) => l,
        other => panic!("{other:?}"),
    }
}

/// Those of the reference.
pub fn reference(file: &ModelFile) -> Vec<f32> {
    logits(&Reference::default(), file, KvType::F16)
}

/// Root mean square of the difference over that of the reference's logits.
pub fn error(a: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(a.len(), reference.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(reference).map(|(a, b)| square(f64::from(a - b))).sum();
    (difference / reference.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}
