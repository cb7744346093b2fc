//! Integration tests of the backends: one binary, a module a subject.
#![allow(clippy::unwrap_used)]
mod conformance;
mod cpu;
mod draw;
mod engine;
mod family;
mod golden;
mod reference;
mod text;
mod wgpu;
