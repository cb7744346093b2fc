//! Qwen 3: Llama's layer with a norm of every query and key head, a head size of its own, and NeoX rotation.
use super::{ModelError, Parts, llama};
use crate::plan::{Plan, RopePairs};

pub(super) fn plan(parts: &Parts<'_>) -> Result<Plan, ModelError> {
    for name in ["blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"] {
        if !parts.has(name) {
            return Err(ModelError::MissingTensor { tensor: name.into() });
        }
    }
    llama::decoder(parts, RopePairs::Halves)
}
