//! Tests of the whole, by real processes: what the tests share. The tests are in `tests/tests`.
#![forbid(unsafe_code)]

mod collector;
mod etcd;
mod http;
mod process;
mod wire;

pub use collector::{Collector, Span};
pub use etcd::EtcdServer;
pub use http::{Connection, Reply};
pub use process::{Node, Program, Serve, free_address, program, target, weir};
pub use wire::Wire;

use std::path::PathBuf;

/// The file of a real model, from the folder `WEIR_TEST_MODELS`; says loudly that a test is skipped where there is none,
/// and fails in continuous integration.
pub fn model(file: &str) -> Option<PathBuf> {
    let found = std::env::var_os("WEIR_TEST_MODELS").map(|folder| PathBuf::from(folder).join(file));
    match found.filter(|path| path.is_file()) {
        Some(path) => Some(path),
        None => {
            skip(&format!("there is no {file} in the folder WEIR_TEST_MODELS"));
            None
        }
    }
}

/// Says that a test doesn't run.
///
/// # Panics
/// In continuous integration, where nothing may be skipped.
pub fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "would be skipped: {reason}");
    eprintln!("SKIPPED: {reason}");
}
