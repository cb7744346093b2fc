//! Benches, and the comparison with peers on the same files, the same threads, in the same run.
pub mod gateways;
pub mod load;
pub mod machine;
pub mod ours;
#[cfg(feature = "peers")]
pub mod peer;
pub mod report;
pub mod requantise;
pub mod roofline;
pub mod shapes;
pub mod weights;
pub mod workload;
