//! Integration tests of the backends: one binary, a module a subject.
#![allow(clippy::unwrap_used)]
mod conformance;
mod cpu;
#[cfg(any(target_os = "linux", target_os = "windows"))]
mod cuda;
mod draw;
mod engine;
mod family;
mod golden;
mod reference;
mod text;
mod wgpu;
