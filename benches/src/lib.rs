//! Benches, and the comparison with peers on the same files, the same threads, in the same run.
#[cfg(feature = "peers")]
pub mod peer;
