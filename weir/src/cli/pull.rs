//! `weir pull`
use super::output::PullBar;
use crate::config::Config;
use std::io::{Write, stdout};
use weir_backends::store::{Resolved, Store, StoreError};

/// Fetch models into the cache that all programs on this machine share
#[derive(clap::Args)]
#[command(after_help = "\
A pull that was interrupted goes on where it stopped. `weir models` lists the names. Models come from Hugging Face
(HF_TOKEN and HF_ENDPOINT are honoured) or, where that can't be reached, from other sources of the catalog.

Examples:
  weir pull smollm2-135m
  weir pull gemma3-270m qwen2.5-coder-0.5b
  MODEL=$(weir pull smollm2-135m)        the path of the file is what is printed")]
pub(super) struct Pull {
    /// Names from the catalog
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl Pull {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let store = super::store(config)?;
        for name in &self.names {
            let model = pull(&store, name)?;
            writeln!(stdout(), "{}", model.path.display())?;
        }
        Ok(())
    }
}

/// Fetches a model if it isn't here, and shows how far it is.
pub(super) fn pull(store: &Store, name: &str) -> Result<Resolved, StoreError> {
    let known = store.catalog().find(name).map_or(name, |m| &m.name);
    let mut bar = PullBar::new(known);
    let outcome = store.pull(name, &mut |p| bar.show(p));
    bar.finish();
    outcome
}
