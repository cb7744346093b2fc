//! The models that tests and benches use.
use anyhow::{Result, bail};
use std::path::PathBuf;

/// Names of the test models, as files of the folder that `WEIR_TEST_MODELS` names: `NAME.gguf`.
pub const NAMES: [&str; 3] = ["smollm2", "gemma3", "qwen2"];

/// The folder that holds them all.
pub fn folder() -> Result<PathBuf> {
    let Some(folder) = std::env::var_os("WEIR_TEST_MODELS").map(PathBuf::from) else {
        bail!(
            "set WEIR_TEST_MODELS to a folder with {}",
            NAMES.map(|name| format!("{name}.gguf")).join(", ")
        );
    };
    for name in NAMES {
        let file = folder.join(format!("{name}.gguf"));
        if !file.exists() {
            bail!("WEIR_TEST_MODELS: {} does not exist", file.display());
        }
    }
    Ok(folder)
}
