//! From parts that JavaScript reads to a program on a device.
use crate::host::Part;
use js_sys::Array;
use serde::Deserialize;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use tokio::sync::Notify;
use wasm_bindgen::prelude::*;
use weir_backends::cpu::{Cpu, CpuOptions};
use weir_backends::gguf::{ModelFile, ReadAt};
use weir_backends::load::{LoadOptions, kv_layout};
use weir_backends::models;
use weir_backends::plan::Plan;
use weir_backends::program::{Device, DeviceInfo, KvLayout, Program};
#[cfg(not(target_feature = "atomics"))]
use weir_backends::wgpu::Wgpu;
use weir_scheduler::KvType;

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Where {
    /// On a GPU where there is a real one, else on the processor.
    #[default]
    Auto,
    /// On a GPU, even one that a program imitates.
    Gpu,
    /// On the processor.
    Cpu,
}

/// How a model is loaded.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Options {
    /// Which device.
    pub device: Where,
    /// Whether GPUs are asked for with subgroups.
    pub subgroups: bool,
    /// Longest sequence in tokens.
    pub context: Option<u32>,
    /// Sequences that run at once.
    pub slots: u32,
    /// Rows of prompts in one step.
    pub prefill_chunk: u32,
    /// Keys and values as 8-bit numbers.
    pub small_cache: bool,
    /// It is to be offered to a cluster, which knows it by this SHA-256, in hexadecimal.
    pub sha256: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            device: Where::Auto,
            subgroups: false,
            context: None,
            slots: 4,
            prefill_chunk: 256,
            small_cache: false,
            sha256: None,
        }
    }
}

impl Options {
    /// Whether a cluster is to be offered the model.
    pub fn is_offered(&self) -> bool {
        self.sha256.is_some()
    }

    /// What the engine knows it by; zeros where it has no name.
    pub fn id(&self) -> [u8; 32] {
        let mut id = [0; 32];
        let digits = self.sha256.as_deref().unwrap_or_default().as_bytes().chunks_exact(2);
        for (byte, pair) in id.iter_mut().zip(digits) {
            let digit = |d: u8| char::from(d).to_digit(16).unwrap_or_default() as u8;
            *byte = digit(pair[0]) << 4 | digit(pair[1]);
        }
        id
    }
}

/// A compiled model, and what it was made from.
pub struct Started {
    pub program: Box<dyn Program>,
    pub file: ModelFile,
    pub plan: Plan,
    pub info: DeviceInfo,
    pub layout: KvLayout,
    pub context: u32,
    pub options: Options,
    /// Rings when results have come back.
    pub wake: Arc<Notify>,
}

/// Reads the header, opens the device, compiles.
pub async fn start(parts: Array, options: &str) -> Result<Started, JsError> {
    let options: Options = serde_json::from_str(options)?;
    let options = Options { prefill_chunk: options.prefill_chunk.max(1), ..options };
    if options
        .sha256
        .as_ref()
        .is_some_and(|digits| digits.len() != 64 || !digits.bytes().all(|d| d.is_ascii_hexdigit()))
    {
        return Err(JsError::new("a SHA-256 has 64 hexadecimal digits"));
    }
    let sources = parts.iter().enumerate().map(|(i, part)| source(i, part)).collect();
    let file = ModelFile::from_sources(sources)?;
    let plan = models::plan(&file)?;
    let wake = Arc::new(Notify::new());
    let kv = if options.small_cache { KvType::Q8_0 } else { KvType::F16 };
    let Options { context, slots, prefill_chunk, .. } = options;
    let wanted = LoadOptions { context, slots, kv, prefill_chunk, ..LoadOptions::default() };
    let (program, info, (layout, context)) = match on_gpu(&file, &plan, wanted, &options, &wake).await? {
        Some(compiled) => compiled,
        None => {
            // As many threads as workers were lent.
            let cpu = Cpu::new(CpuOptions::default());
            let info = cpu.describe();
            let layout = kv_layout(&file, &plan, wanted, info.memory_free);
            (cpu.compile(&file, &plan, 0..plan.layers.len(), layout.0)?, info, layout)
        }
    };
    Ok(Started { program, file, plan, info, layout, context, options, wake })
}

type Compiled = (Box<dyn Program>, DeviceInfo, (KvLayout, u32));

/// Compiles for the browser's GPU, where that is wanted and there is one.
#[cfg(not(target_feature = "atomics"))]
async fn on_gpu(
    file: &ModelFile,
    plan: &Plan,
    wanted: LoadOptions,
    options: &Options,
    wake: &Arc<Notify>,
) -> Result<Option<Compiled>, JsError> {
    if options.device == Where::Cpu {
        return Ok(None);
    }
    let Some(gpu) = gpu(options.subgroups, options.device == Where::Gpu).await? else { return Ok(None) };
    let wake = wake.clone();
    let gpu = gpu.with_wake(Arc::new(move || wake.notify_one()));
    let info = gpu.describe();
    let layout = kv_layout(file, plan, wanted, info.memory_free);
    let program = gpu.compile_async(file, plan, 0..plan.layers.len(), layout.0).await?;
    Ok(Some((program, info, layout)))
}

/// A GPU belongs to one thread, and here are several.
#[cfg(target_feature = "atomics")]
async fn on_gpu(
    _: &ModelFile,
    _: &Plan,
    _: LoadOptions,
    options: &Options,
    _: &Arc<Notify>,
) -> Result<Option<Compiled>, JsError> {
    match options.device {
        Where::Gpu => Err(JsError::new("the module with threads computes on the processor")),
        Where::Auto | Where::Cpu => Ok(None),
    }
}

/// The browser's GPU; one that a program imitates only where that is wanted.
#[cfg(not(target_feature = "atomics"))]
async fn gpu(subgroups: bool, any: bool) -> Result<Option<Wgpu>, JsError> {
    let found = Wgpu::find_async().await;
    let Some(found) = found.iter().find(|found| any || !found.software) else {
        return if any { Err(JsError::new("this browser offers no WebGPU adapter")) } else { Ok(None) };
    };
    match Wgpu::open(found, subgroups).await {
        Ok(gpu) => Ok(Some(gpu)),
        Err(error) if any => Err(error.into()),
        Err(error) => {
            crate::host::error(&format!("computing on the processor instead: {error}"));
            Ok(None)
        }
    }
}

thread_local! {
    /// JavaScript's objects can't leave their thread; sources, which may, know them by number.
    static PARTS: RefCell<HashMap<u64, Part>> = RefCell::default();
    static NEXT: Cell<u64> = const { Cell::new(0) };
}

/// A part of a model, as JavaScript reads it.
#[derive(Debug)]
struct Source {
    number: u64,
    part: usize,
    size: u64,
}

fn source(part: usize, object: JsValue) -> Box<dyn ReadAt> {
    let object: Part = object.unchecked_into();
    let size = object.size() as u64;
    let number = NEXT.replace(NEXT.get() + 1);
    PARTS.with_borrow_mut(|parts| parts.insert(number, object));
    Box::new(Source { number, part, size })
}

impl ReadAt for Source {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let wanted = out.len();
        let read = PARTS.with_borrow(|parts| match parts.get(&self.number) {
            Some(part) => part.read(offset as f64, out).map_err(|error| format!("{error:?}")),
            None => Err("it belongs to another thread".to_owned()),
        });
        match read {
            Ok(read) if read == wanted as f64 => Ok(()),
            Ok(read) => {
                let why = format!("part {} gave {read} bytes at {offset}, not {wanted}", self.part);
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, why))
            }
            Err(why) => Err(io::Error::other(format!("part {}: {why}", self.part))),
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        PARTS.with_borrow_mut(|parts| parts.remove(&self.number));
    }
}
