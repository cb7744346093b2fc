//! `weir devices`
use super::output::table;
use crate::config::Config;
use serde_json::json;
use std::io::{Write, stdout};
use weir_backends::cpu::{Cpu, CpuOptions};
use weir_backends::program::{Device, DeviceInfo};
use weir_backends::store::human;
use weir_backends::wgpu::Wgpu;

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
        let mut devices =
            vec![Cpu::new(CpuOptions { threads: config.threads, ..CpuOptions::default() }).describe()];
        let mut refused = Vec::new();
        #[cfg(any(target_os = "linux", target_os = "windows"))]
        match weir_backends::cuda::Cuda::all() {
            Ok(found) => devices.extend(found.iter().map(Device::describe)),
            Err(why) => refused.push(format!("no CUDA: {why}")),
        }
        let found = Wgpu::find();
        if found.is_empty() {
            refused.push("no GPU: no driver of Vulkan, Metal or Direct3D 12 offers one".to_owned());
        }
        for found in &found {
            match Wgpu::new(found) {
                Ok(gpu) => devices.push(gpu.describe()),
                Err(error) => refused.push(format!("{} can't be used: {error}", found.name)),
            }
        }
        let mut out = stdout().lock();
        if self.json {
            let device = |device: &DeviceInfo| {
                json!({
                    "name": device.name,
                    "description": device.description,
                    "numerics": device.numerics,
                    "memory_free_bytes": device.memory_free,
                })
            };
            let devices: Vec<_> = devices.iter().map(device).collect();
            let all = json!({ "devices": devices, "refused": refused });
            writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
            return Ok(());
        }
        let mut rows = vec![["DEVICE", "MEMORY FREE", "DESCRIPTION"].map(str::to_owned).to_vec()];
        rows.extend(devices.into_iter().map(|d| vec![d.name, human(d.memory_free), d.description]));
        table(&mut out, &rows)?;
        refused.iter().for_each(|why| eprintln!("{why}"));
        Ok(())
    }
}
