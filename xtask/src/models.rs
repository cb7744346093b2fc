//! The models that tests and benches use.
use crate::run::{cargo, output, root};
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};

/// The test models: their files' names (without `.gguf`) in the folder that `WEIR_TEST_MODELS` names, and their names
/// in the catalog.
const MODELS: [(&str, &str); 3] =
    [("smollm2", "smollm2-135m"), ("gemma3", "gemma3-270m"), ("qwen2", "qwen2.5-coder-0.5b")];

/// The folder that holds them all: the one that `WEIR_TEST_MODELS` names, or else links to the model store, into which
/// missing ones are fetched.
pub fn folder() -> Result<PathBuf> {
    match std::env::var_os("WEIR_TEST_MODELS").map(PathBuf::from) {
        Some(folder) => given(folder),
        None => fetched(),
    }
}

fn given(folder: PathBuf) -> Result<PathBuf> {
    for (file, _) in MODELS {
        let path = folder.join(format!("{file}.gguf"));
        if !path.exists() {
            bail!("WEIR_TEST_MODELS: {} does not exist; unset it to have the models fetched", path.display());
        }
    }
    Ok(folder)
}

fn fetched() -> Result<PathBuf> {
    let folder = root().join("target/test-models");
    std::fs::create_dir_all(&folder)?;
    let mut pull = cargo(&["run", "--quiet", "--package", "weir", "--", "pull"]);
    pull.args(MODELS.map(|(_, name)| name)).stderr(std::process::Stdio::inherit());
    let paths = output(&mut pull).context("the test models can't be fetched")?;
    let paths: Vec<&str> = paths.lines().collect();
    if paths.len() != MODELS.len() {
        bail!("`weir pull` named {} files, not {}", paths.len(), MODELS.len());
    }
    for ((file, _), path) in MODELS.into_iter().zip(paths) {
        link(Path::new(path), &folder.join(format!("{file}.gguf")))?;
    }
    Ok(folder)
}

/// Makes `link` the file `original`, as cheaply as the system allows.
fn link(original: &Path, link: &Path) -> Result<()> {
    if link.symlink_metadata().is_ok() {
        std::fs::remove_file(link)?;
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(original, link)?;
    #[cfg(not(unix))]
    if std::fs::hard_link(original, link).is_err() {
        std::fs::copy(original, link)?;
    }
    Ok(())
}
