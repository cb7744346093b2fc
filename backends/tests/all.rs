//! Integration tests of the backends: one binary, a module a subject.
#![allow(clippy::unwrap_used)]
mod golden;
