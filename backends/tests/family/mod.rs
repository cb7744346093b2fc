//! A made-up family that differs in earnest, written against the public interface alone: attention and MLP in parallel,
//! LayerNorm with bias, rotation of half of each head, biases everywhere, an MLP without a gate.
mod direct;

use crate::conformance::step;
use direct::direct;
use weir_backends::gguf::write::Writer;
use weir_backends::gguf::{GgmlType, ModelFile};
use weir_backends::models::random::Random;
use weir_backends::models::{Family, ModelError, Parts};
use weir_backends::plan::{
    Activation, Attend, NormGateUpAct, NormKind, NormQkvRopeCache, Plan, RopePairs, Step,
};
use weir_backends::program::{Device, Input, KvLayout, Segment, SegmentOutput, Want};
use weir_backends::reference::Reference;
use weir_scheduler::KvType;

const TWIN: Family = Family { architecture: "twin", plan };

fn plan(parts: &Parts<'_>) -> Result<Plan, ModelError> {
    let shape = parts.shape()?;
    let (hidden, width) = (shape.hidden, shape.heads.heads * shape.heads.head_dim);
    let rope = parts.rope(RopePairs::Halves, &shape)?;
    let layer = |i: usize| -> Result<Vec<Step>, ModelError> {
        let norm = |name: &str| parts.norm(NormKind::Layer, &format!("blk.{i}.{name}"), hidden, shape.eps);
        let linear = |name: &str, rows, cols| parts.linear(&format!("blk.{i}.{name}"), rows, cols);
        let [q, k, v] = ["attn_q", "attn_k", "attn_v"].map(|name| linear(name, width, hidden));
        let scale = 1.0 / (shape.heads.head_dim as f32).sqrt();
        Ok(vec![
            Step::NormQkvRopeCache(NormQkvRopeCache {
                norm: norm("attn_norm")?,
                q: q?,
                k: k?,
                v: v?,
                heads: shape.heads,
                q_norm: None,
                k_norm: None,
                rope: rope.clone(),
            }),
            Step::Attend(Attend { heads: shape.heads, scale, window: None, soft_cap: Some(5.0) }),
            Step::NormGateUpAct(NormGateUpAct {
                norm: norm("ffn_norm")?,
                gate: None,
                up: linear("ffn_up", shape.ff, hidden)?,
                act: Activation::GeluTanh,
            }),
            Step::Out(parts.residual(&format!("blk.{i}.attn_output"), hidden, width)?),
            Step::Down(parts.residual(&format!("blk.{i}.ffn_down"), hidden, shape.ff)?),
        ])
    };
    Ok(Plan {
        hidden,
        vocab: shape.vocab,
        context: shape.context,
        embed: parts.embed(&shape, 1.0)?,
        layers: (0..shape.layers).map(layer).collect::<Result<_, _>>()?,
        head: parts.head(NormKind::Layer, &shape, None)?,
    })
}

const HIDDEN: usize = 40;
const FF: usize = 96;
const VOCAB: usize = 50;
const HEADS: usize = 2;
const SIZE: usize = 32;
const LAYERS: usize = 2;
const EPS: f32 = 1e-4;

fn file(hidden: usize) -> ModelFile {
    let mut writer = Writer::new("twin");
    for (key, value) in [
        ("block_count", LAYERS),
        ("embedding_length", hidden),
        ("feed_forward_length", FF),
        ("context_length", 64),
        ("attention.head_count", HEADS),
        ("attention.key_length", SIZE),
        ("rope.dimension_count", SIZE / 2),
    ] {
        writer.set(&format!("twin.{key}"), value as u32);
    }
    writer.set("twin.attention.layer_norm_rms_epsilon", EPS);
    let mut both = |name: &str, cols: usize, rows: usize| {
        let dims = [cols as u64, rows as u64];
        writer.declare(&format!("{name}.weight"), GgmlType::F32, if cols == 1 { &dims[1..] } else { &dims });
        writer.declare(&format!("{name}.bias"), GgmlType::F32, &[rows as u64]);
    };
    both("output_norm", 1, hidden);
    both("output", hidden, VOCAB);
    for i in 0..LAYERS {
        ["attn_norm", "ffn_norm"].iter().for_each(|name| both(&format!("blk.{i}.{name}"), 1, hidden));
        let width = HEADS * SIZE;
        ["attn_q", "attn_k", "attn_v"]
            .iter()
            .for_each(|name| both(&format!("blk.{i}.{name}"), hidden, width));
        both(&format!("blk.{i}.attn_output"), width, hidden);
        both(&format!("blk.{i}.ffn_up"), hidden, FF);
        both(&format!("blk.{i}.ffn_down"), FF, hidden);
    }
    writer.declare("token_embd.weight", GgmlType::F32, &[hidden as u64, VOCAB as u64]);
    let random = Random::tiny("llama", 77);
    ModelFile::from_bytes(writer.to_bytes(|tensor| random.weights(tensor))).unwrap()
}

/// The made-up family on a device: its logits are within `tolerance`, relative to the largest, of the formula's.
pub fn check(device: &dyn Device, tolerance: f64) {
    check_width(device, HIDDEN, tolerance);
}

/// The same, as wide as that.
pub fn check_width(device: &dyn Device, hidden: usize, tolerance: f64) {
    let file = file(hidden);
    let plan = TWIN.plan(&file).unwrap();
    let layout = KvLayout { blocks: 2, kv: KvType::F16, slots: 1, rows: 64 };
    let mut program = device.compile(&file, &plan, 0..LAYERS, layout).unwrap();
    let ids: Vec<u32> = (0..37u32).map(|i| i * i * 7 % VOCAB as u32).collect();
    let input = Input::Ids(ids.clone());
    let segment =
        Segment { slot: 0, start: 0, prompt: false, input, blocks: [1, 0].into(), want: Want::Logits(37) };
    let output = step(&mut *program, vec![segment]);
    let [SegmentOutput::Logits(found)] = &output[..] else { panic!("{output:?}") };
    let expected = direct(&file, &ids).concat();
    let spread = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    let error =
        expected.iter().zip(found.iter().copied()).map(|(a, b)| (a - f64::from(b)).abs()).fold(0.0, f64::max);
    assert!(
        found.len() == expected.len() && spread > 1.0 && error < tolerance * spread,
        "{error} of {spread}"
    );
}

#[test]
fn a_new_family_needs_one_function() {
    check(&Reference::default(), 2e-5);
}
