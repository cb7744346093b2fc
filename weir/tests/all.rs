//! Tests of the program's parts from outside, in one process.
#![allow(clippy::unwrap_used)]

mod cli;
