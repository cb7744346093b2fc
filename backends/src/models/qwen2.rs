//! Qwen 2 and 2.5: Llama's layer with biases on q, k and v, and NeoX rotation.
use super::{ModelError, Parts, llama};
use crate::plan::{Plan, RopePairs};

pub(super) fn plan(parts: &Parts<'_>) -> Result<Plan, ModelError> {
    for name in ["blk.0.attn_q.bias", "blk.0.attn_k.bias", "blk.0.attn_v.bias"] {
        if !parts.has(name) {
            return Err(ModelError::MissingTensor { tensor: name.into() });
        }
    }
    llama::decoder(parts, RopePairs::Halves)
}
