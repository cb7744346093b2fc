//! `weir remove`
use crate::config::Config;
use weir_backends::store::human;

/// Delete fetched models from this machine
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  weir remove gemma3-270m\n\nOnly what `weir pull` fetched is deleted.")]
pub(super) struct Remove {
    /// Names from the catalog
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

impl Remove {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let store = super::store(config)?;
        for name in &self.names {
            match store.remove(name)? {
                (name, 0) => eprintln!("{name} was not on this machine"),
                (name, freed) => eprintln!("removed {name}: {} freed", human(freed)),
            }
        }
        Ok(())
    }
}
