//! `weir models`
use super::output::table;
use crate::config::Config;
use serde_json::{Value, json};
use std::io::{Write, stdout};
use weir_backends::store::{Listed, State, Store, human};

/// List the models of the catalog, and what of them is on this machine
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  weir models
  weir models --json | jq -r '.models[] | select(.state == \"present\") | .path'

A path to a .gguf works wherever a name does. Further catalogs: `catalog` in weir.toml, or WEIR_CATALOG.")]
pub(super) struct Models {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Models {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let store = super::store(config)?;
        let default = config.model.as_deref().unwrap_or(store.catalog().default_name());
        let is_default = |l: &Listed<'_>| store.catalog().find(default) == Some(l.model);
        let mut out = stdout().lock();
        if self.json {
            let models: Vec<Value> = store.list().iter().map(|l| as_json(l, is_default(l))).collect();
            let all = json!({ "folder": store.folder(), "models": models });
            writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
            return Ok(());
        }
        let head = ["NAME", "ALIAS", "SIZE", "TYPE", "HERE", "LICENCE"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(store.list().iter().map(|l| as_row(l, is_default(l))));
        table(&mut out, &rows)?;
        footer(&store);
        Ok(())
    }
}

fn as_row(listed: &Listed<'_>, is_default: bool) -> Vec<String> {
    let model = listed.model;
    let here = match listed.state {
        State::Present(_) => "yes".to_owned(),
        State::Partial(bytes) => format!("{}%", bytes * 100 / model.size.max(1)),
        State::Absent => "no".to_owned(),
    };
    vec![
        format!("{}{}", model.name, if is_default { " *" } else { "" }),
        model.aliases.first().cloned().unwrap_or_default(),
        human(model.size),
        format!("{} {}", model.architecture, model.quantisation),
        here,
        model.license.split(" (").next().unwrap_or_default().to_owned(),
    ]
}

fn as_json(listed: &Listed<'_>, is_default: bool) -> Value {
    let model = listed.model;
    let (state, bytes, path) = match &listed.state {
        State::Absent => ("absent", 0, None),
        State::Partial(bytes) => ("partial", *bytes, None),
        State::Present(path) => ("present", model.size, Some(path)),
    };
    json!({
        "name": model.name,
        "aliases": model.aliases,
        "default": is_default,
        "description": model.description,
        "architecture": model.architecture,
        "quantisation": model.quantisation,
        "license": model.license,
        "size_bytes": model.size,
        "sha256": model.sha256.iter().map(|b| format!("{b:02x}")).collect::<String>(),
        "state": state,
        "bytes_here": bytes,
        "path": path,
    })
}

fn footer(store: &Store) {
    super::output::note(&format!("* the default. Kept in {}", store.folder().display()));
}
