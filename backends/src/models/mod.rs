//! Model families: from a model file's header to a [`Plan`]. One row of [`FAMILIES`] and one file each.
//!
//! A family's function takes what it needs through [`Parts`], which checks every value and every tensor's shape as it
//! hands it out, so that devices can trust a plan. A tensor that no step takes is an error: silently ignoring, say, a
//! norm would give wrong answers.
#![forbid(unsafe_code)]

mod gemma3;
mod llama;
mod parts;
mod qwen2;
mod qwen3;
pub mod random;
#[cfg(test)]
mod tests;

pub use parts::{Parts, Shape};

use crate::gguf::{GgufError, ModelFile};
use crate::plan::Plan;

/// A family of models.
pub struct Family {
    /// `general.architecture` in the file; also the prefix of its keys.
    pub architecture: &'static str,
    /// Makes the plan.
    pub plan: fn(&Parts<'_>) -> Result<Plan, ModelError>,
}

/// All that are known.
pub const FAMILIES: &[Family] = &[
    Family { architecture: "llama", plan: llama::plan },
    Family { architecture: "qwen2", plan: qwen2::plan },
    Family { architecture: "qwen3", plan: qwen3::plan },
    Family { architecture: "gemma3", plan: gemma3::plan },
];

/// What the model in `file` computes. All that it names is in the file, in shapes that fit together.
pub fn plan(file: &ModelFile) -> Result<Plan, ModelError> {
    let architecture = file.str("general.architecture")?;
    let family = FAMILIES
        .iter()
        .find(|family| family.architecture == architecture)
        .ok_or_else(|| ModelError::Architecture { found: architecture.to_owned() })?;
    family.plan(file)
}

impl Family {
    /// What a model of this family computes.
    pub fn plan(&self, file: &ModelFile) -> Result<Plan, ModelError> {
        let parts = Parts::new(file, self.architecture);
        let plan = (self.plan)(&parts)?;
        parts.finish()?;
        Ok(plan)
    }
}

/// Why no plan could be made.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// No family of that name.
    #[error(
        "architecture {found:?} isn't known; these are: {}",
        FAMILIES.iter().map(|f| f.architecture).collect::<Vec<_>>().join(", ")
    )]
    Architecture {
        /// The file's.
        found: String,
    },
    /// The file lacks a key, or has it in another type, or can't be read.
    #[error(transparent)]
    File(#[from] GgufError),
    /// A key's value can't be.
    #[error("key {key} is {value}; {expected}")]
    Value {
        /// The key.
        key: String,
        /// What the file says.
        value: String,
        /// What it should be.
        expected: String,
    },
    /// A tensor isn't there.
    #[error("the file has no tensor {tensor}")]
    MissingTensor {
        /// Its name.
        tensor: String,
    },
    /// A tensor has other dimensions than the keys say.
    #[error("tensor {tensor} is {found:?}, not {expected:?}")]
    TensorShape {
        /// Its name.
        tensor: String,
        /// From the keys, the fastest-running dimension first.
        expected: Vec<u64>,
        /// The file's.
        found: Vec<u64>,
    },
    /// A tensor's storage type isn't supported.
    #[error("tensor {tensor}: {cause}")]
    TensorType {
        /// Its name.
        tensor: String,
        /// Which type.
        cause: GgufError,
    },
    /// A tensor that the family has no use for.
    #[error(
        "the file has a tensor {tensor}, which {architecture} models don't have here: it may be a variant that isn't supported"
    )]
    UnusedTensor {
        /// Its name.
        tensor: String,
        /// The family.
        architecture: String,
    },
    /// Something that this family's code doesn't compute.
    #[error("{0}")]
    Unsupported(String),
}
