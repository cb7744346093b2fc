//! Gemma 3 (text): norms before and after both halves of a layer, norms of query and key heads, five layers with a
//! sliding window for each one without, GELU.
//!
//! Norm weights in the file have Gemma's `+ 1` already. Layers with a window rotate with base 10000, unscaled; the
//! others with the file's base and scaling. Paper: arXiv 2503.19786.
use super::parts::rope_plain;
use super::{ModelError, Parts, Shape};
use crate::plan::{
    Activation, Attend, Heads, NormGateUpAct, NormKind, NormQkvRopeCache, Plan, Residual, Rope, RopePairs,
    Step,
};

/// Every sixth layer sees all of the past.
const PATTERN: usize = 6;
/// Layers of the 27B model, which alone scales its scores by `hidden / heads` and not by the head's size.
const LAYERS_27B: usize = 62;

pub(super) fn plan(parts: &Parts<'_>) -> Result<Plan, ModelError> {
    let shape = parts.shape()?;
    let dims = parts.rope_dims(&shape)?;
    let base = parts.rope_base("rope.freq_base", 1_000_000.0)?;
    let global = parts.rope_scaled(RopePairs::Halves, dims, base, shape.context)?;
    let local = rope_plain(RopePairs::Halves, dims, parts.rope_base("rope.freq_base_swa", 10_000.0)?);
    let window = parts.size("attention.sliding_window", None)?;
    let per_head = match shape.layers {
        LAYERS_27B => shape.hidden / shape.heads.heads,
        _ => shape.heads.head_dim,
    };
    let attend =
        Attend { heads: shape.heads, scale: 1.0 / (per_head as f32).sqrt(), window: None, soft_cap: None };
    let soft_cap = parts.positive_if_any("final_logit_softcapping")?;
    Ok(Plan {
        hidden: shape.hidden,
        vocab: shape.vocab,
        context: shape.context,
        embed: parts.embed(&shape, (shape.hidden as f32).sqrt())?,
        layers: (0..shape.layers)
            .map(|i| {
                let is_global = i % PATTERN == PATTERN - 1;
                let rope = if is_global { &global } else { &local };
                let attend = Attend { window: (!is_global).then_some(window), ..attend.clone() };
                layer(parts, &format!("blk.{i}"), &shape, rope.clone(), attend)
            })
            .collect::<Result<_, _>>()?,
        head: parts.head(NormKind::Rms, &shape, soft_cap)?,
    })
}

fn layer(
    parts: &Parts<'_>,
    at: &str,
    shape: &Shape,
    rope: Rope,
    attend: Attend,
) -> Result<Vec<Step>, ModelError> {
    let &Shape { hidden, ff, eps, .. } = shape;
    let Heads { heads, kv_heads, head_dim } = shape.heads;
    let norm = |name: &str, width| parts.norm(NormKind::Rms, &format!("{at}.{name}"), width, eps);
    let linear = |name: &str, rows, cols| parts.linear(&format!("{at}.{name}"), rows, cols);
    let residual = |name: &str, cols, post: &str| -> Result<Residual, ModelError> {
        Ok(Residual { linear: linear(name, hidden, cols)?, post_norm: Some(norm(post, hidden)?) })
    };
    Ok(vec![
        Step::NormQkvRopeCache(NormQkvRopeCache {
            norm: norm("attn_norm", hidden)?,
            q: linear("attn_q", heads * head_dim, hidden)?,
            k: linear("attn_k", kv_heads * head_dim, hidden)?,
            v: linear("attn_v", kv_heads * head_dim, hidden)?,
            heads: shape.heads,
            q_norm: Some(norm("attn_q_norm", head_dim)?),
            k_norm: Some(norm("attn_k_norm", head_dim)?),
            rope,
        }),
        Step::Attend(attend),
        Step::Out(residual("attn_output", heads * head_dim, "post_attention_norm")?),
        Step::NormGateUpAct(NormGateUpAct {
            norm: norm("ffn_norm", hidden)?,
            gate: Some(linear("ffn_gate", ff, hidden)?),
            up: linear("ffn_up", ff, hidden)?,
            act: Activation::GeluTanh,
        }),
        Step::Down(residual("ffn_down", ff, "post_ffw_norm")?),
    ])
}
