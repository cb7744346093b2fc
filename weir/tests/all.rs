//! Tests of the program's parts from outside, in one process.
#![allow(clippy::unwrap_used)] // a test that panics has failed

mod cli;
mod driver;
mod gateway;
mod strangers;
