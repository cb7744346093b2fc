//! Whatever makes tokens: model files, plans, kernels, devices and the engine.
//!
//! A model file ([`gguf`]) and a family ([`models`]) give a [`plan::Plan`]: a list of fused steps with shapes. A
//! device compiles it into a [`program::Program`], bespoke to that model. The [`engine`] feeds programs with batches.

pub mod cpu;
#[cfg(any(target_os = "linux", target_os = "windows"))]
pub mod cuda;
pub mod engine;
pub mod gguf;
pub mod grammar;
pub mod load;
pub mod models;
pub mod null;
#[cfg(any(target_os = "linux", target_os = "windows"))]
pub mod nvml;
pub mod philox;
pub mod plan;
pub mod program;
pub mod quant;
pub mod reference;
pub mod sampling;
#[cfg(not(target_family = "wasm"))]
pub mod store;
pub mod text;
// What browsers have for a GPU belongs to one thread.
#[cfg(not(all(target_family = "wasm", target_feature = "atomics")))]
pub mod wgpu;
