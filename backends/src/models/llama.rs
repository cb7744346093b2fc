//! Llama and all that share its layer: Llama 1 to 3, SmolLM2, Mistral 7B, Yi, ...
//!
//! Keys and tensor names: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. The converter permutes the rows
//! of q and k so that pairs are adjacent. Llama 3's rope scaling is in the tensor `rope_freqs.weight`.
use super::{ModelError, Parts, Shape};
use crate::plan::{
    Activation, Attend, Heads, NormGateUpAct, NormKind, NormQkvRopeCache, Plan, Rope, RopePairs, Step,
};

pub(super) fn plan(parts: &Parts<'_>) -> Result<Plan, ModelError> {
    if let Some(experts @ 1..) = parts.optional::<u32>("expert_count")? {
        return Err(parts.wrong("expert_count", experts, "mixtures of experts aren't supported"));
    }
    decoder(parts, RopePairs::Adjacent)
}

/// Pre-norm attention and gated MLP, one after the other: the layer that most families share. Biases of any product
/// and norms of query and key heads are taken where the file has them.
pub(super) fn decoder(parts: &Parts<'_>, pairs: RopePairs) -> Result<Plan, ModelError> {
    let shape = parts.shape()?;
    let rope = parts.rope(pairs, &shape)?;
    let default = 1.0 / (shape.heads.head_dim as f32).sqrt();
    let attend = Attend {
        heads: shape.heads,
        scale: parts.positive_if_any("attention.scale")?.unwrap_or(default),
        window: None,
        soft_cap: None,
    };
    Ok(Plan {
        hidden: shape.hidden,
        vocab: shape.vocab,
        context: shape.context,
        embed: parts.embed(&shape, 1.0)?,
        layers: (0..shape.layers)
            .map(|i| layer(parts, &format!("blk.{i}"), &shape, &rope, &attend))
            .collect::<Result<_, _>>()?,
        head: parts.head(NormKind::Rms, &shape, None)?,
    })
}

fn layer(
    parts: &Parts<'_>,
    at: &str,
    shape: &Shape,
    rope: &Rope,
    attend: &Attend,
) -> Result<Vec<Step>, ModelError> {
    let &Shape { hidden, ff, eps, .. } = shape;
    let Heads { heads, kv_heads, head_dim } = shape.heads;
    let norm = |name: &str, width| parts.norm(NormKind::Rms, &format!("{at}.{name}"), width, eps);
    let head_norm =
        |name: &str| parts.has(&format!("{at}.{name}.weight")).then(|| norm(name, head_dim)).transpose();
    let linear = |name: &str, rows, cols| parts.linear(&format!("{at}.{name}"), rows, cols);
    Ok(vec![
        Step::NormQkvRopeCache(NormQkvRopeCache {
            norm: norm("attn_norm", hidden)?,
            q: linear("attn_q", heads * head_dim, hidden)?,
            k: linear("attn_k", kv_heads * head_dim, hidden)?,
            v: linear("attn_v", kv_heads * head_dim, hidden)?,
            heads: shape.heads,
            q_norm: head_norm("attn_q_norm")?,
            k_norm: head_norm("attn_k_norm")?,
            rope: rope.clone(),
        }),
        Step::Attend(attend.clone()),
        Step::Out(parts.residual(&format!("{at}.attn_output"), hidden, heads * head_dim)?),
        Step::NormGateUpAct(NormGateUpAct {
            norm: norm("ffn_norm", hidden)?,
            gate: Some(linear("ffn_gate", ff, hidden)?),
            up: linear("ffn_up", ff, hidden)?,
            act: Activation::Silu,
        }),
        Step::Down(parts.residual(&format!("{at}.ffn_down"), hidden, ff)?),
    ])
}
