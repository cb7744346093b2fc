//! What can be wrong with a model file.
use super::GgmlType;
use std::fmt::Display;

/// Why a model file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The cause, and the file, key or tensor that it concerns.
    #[error("{what}: {cause}")]
    Within {
        /// A path, `key NAME` or `tensor NAME`.
        what: String,
        /// What happened there.
        cause: Box<GgufError>,
    },
    /// The operating system says no.
    #[error("can't be read: {0}")]
    Io(#[from] std::io::Error),
    /// The first four bytes are others.
    #[error("is not a GGUF file: it begins with {0:02x?}")]
    Magic([u8; 4]),
    /// A version that this reader doesn't know, or the other byte order.
    #[error("is GGUF version {0} (or big-endian); versions 2 and 3, little-endian, are read")]
    Version(u32),
    /// Something would reach past the end.
    #[error("is cut short or damaged: at byte {at}, {needed} more bytes are due and {left} are left")]
    Truncated {
        /// Offset in the file.
        at: u64,
        /// Bytes that would have to follow.
        needed: u64,
        /// Bytes that do.
        left: u64,
    },
    /// Against the format.
    #[error("{0}")]
    Malformed(String),
    /// A key that is needed isn't there.
    #[error("the model file has no key {key}")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A key has a value of another type.
    #[error("key {key} of the model file is {found}, not {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// The type asked for.
        expected: &'static str,
        /// What the file has.
        found: String,
    },
    /// A quantisation that isn't supported.
    #[error(
        "is stored as {0}, which isn't supported; try a file quantised as Q4_K_M, Q5_K_M, Q6_K, Q8_0 or F16"
    )]
    UnknownType(GgmlType),
}

impl GgufError {
    pub(super) fn within(self, what: impl Display) -> GgufError {
        GgufError::Within { what: what.to_string(), cause: Box::new(self) }
    }

    pub(super) fn malformed(why: impl Into<String>) -> GgufError {
        GgufError::Malformed(why.into())
    }
}
