//! `weir devices`
use super::output::table;
use crate::config::Config;
use serde_json::json;
use std::io::{Write, stdout};
use weir_backends::cpu::{Cpu, CpuOptions};
use weir_backends::program::Device;
use weir_backends::store::human;

/// List what can run models on this machine
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  weir devices\n  weir devices --json")]
pub(super) struct Devices {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Devices {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let cpu = Cpu::new(CpuOptions { threads: config.threads, ..CpuOptions::default() }).describe();
        let mut out = stdout().lock();
        if self.json {
            let device = json!({
                "name": cpu.name,
                "description": cpu.description,
                "numerics": cpu.numerics,
                "memory_free_bytes": cpu.memory_free,
            });
            writeln!(out, "{}", serde_json::to_string_pretty(&json!({ "devices": [device] }))?)?;
            return Ok(());
        }
        let head = ["DEVICE", "MEMORY FREE", "DESCRIPTION"].map(str::to_owned).to_vec();
        table(&mut out, &[head, vec![cpu.name, human(cpu.memory_free), cpu.description]])?;
        Ok(())
    }
}
