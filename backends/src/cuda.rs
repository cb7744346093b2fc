//! The CUDA device: kernels generated for exactly the loaded model and chip, weights in the order in which tensor cores
//! take them, about five launches a layer that are replayed as a graph.
//!
//! Activations are quantised by the step that produces them, and the root of a norm, a factor of whole rows, is applied
//! to the product; so a step needs nothing of the one before it but its output, and loads its first weights before that
//! is there. A token's bits don't depend on the batch: up to 32 columns (`few.cu`) a warp takes a segment of a tile row
//! straight into registers, beyond (`wide.cu`) a thread block shares tiles of 128 by 128 through shared memory, and both do
//! the same arithmetic (`gemm.cu`) in the same order. Prompts have an arithmetic of their own, in bf16 (`prompt.cu`), wherever no
//! matrix is f16 or f32.
//!
//! The `.cu` files are templates; `kernels.rs` writes the instances for the model's shapes and has NVRTC compile them.
//! `emulate.cpp` lets the same sources run on a processor, a fiber a thread, each kernel begun before the one ahead of it
//! has run (`--features cuda-emulator`). Figures, predictions and outcomes are in `benches/notes/cuda.md`.
mod args;
mod constants;
#[cfg_attr(feature = "cuda-emulator", path = "cuda/emulated.rs")]
mod driver;
mod forms;
mod kernels;
mod load;
mod run;
mod trace;
mod upload;

use crate::gguf::ModelFile;
use crate::plan::Plan;
use crate::program::{Device, DeviceError, DeviceInfo, KvLayout, Program};
use driver::{Buffer, Compiler, Gpu, Pinned, Stream};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Memory left to the driver and others.
const SPARE: u64 = 256 << 20;

/// One of NVIDIA's GPUs, compute capability 8.0 or later.
pub struct Cuda {
    gpu: Arc<Gpu>,
    compiler: Arc<Compiler>,
    ring: upload::Ring,
    loaded: Mutex<LoadTimes>,
}

/// What loading a model took. Weights and kernels are made ready at the same time.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadTimes {
    /// Of the matrices, in the file.
    pub bytes: u64,
    /// Memory on the GPU.
    pub memory: Duration,
    /// The kernel that packs weights, compiled or found on disk.
    pub pack: Duration,
    /// Bringing all weights from the file to their places, once that was there.
    pub weights: Duration,
    /// All other kernels.
    pub kernels: Duration,
    /// All in all.
    pub total: Duration,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda").field("index", &self.gpu.index).field("name", &self.gpu.name).finish()
    }
}

impl Cuda {
    /// All that can be used here.
    ///
    /// # Errors
    /// Why none can, for a person.
    pub fn all() -> Result<Vec<Cuda>, String> {
        let count = Gpu::count()?;
        let compiler = Arc::new(Compiler::find()?);
        let mut found = Vec::new();
        let mut why = "NVIDIA's driver found no GPU".to_owned();
        for index in 0..count {
            let gpu = Gpu::open(index).map_err(|e| e.to_string())?;
            if gpu.capability < 80 {
                let (major, minor) = (gpu.capability / 10, gpu.capability % 10);
                why = format!("{} has compute capability {major}.{minor}; 8.0 is needed", gpu.name);
                continue;
            }
            found.push(Cuda {
                gpu: Arc::new(gpu),
                compiler: compiler.clone(),
                ring: upload::Ring::default(),
                loaded: Mutex::default(),
            });
        }
        if found.is_empty() { Err(why) } else { Ok(found) }
    }
}

impl Cuda {
    /// Bytes a second of a large copy within the GPU's memory, read and written: what products are measured against.
    pub fn copy_bytes_per_s(&self) -> Result<f64, DeviceError> {
        const BYTES: usize = 1 << 30;
        let stream = Stream::new(&self.gpu)?;
        let (a, b) = (Buffer::zeroed(&self.gpu, BYTES, &stream)?, Buffer::zeroed(&self.gpu, BYTES, &stream)?);
        let mut best = 0f64;
        for _ in 0..8 {
            stream.wait()?;
            let began = Instant::now();
            for _ in 0..4 {
                stream.copy(&a, &b, BYTES)?;
            }
            stream.wait()?;
            best = best.max(8.0 * BYTES as f64 / began.elapsed().as_secs_f64());
        }
        Ok(best)
    }

    /// Bytes a second of large copies from pinned memory to the GPU: what loading is measured against.
    pub fn upload_bytes_per_s(&self) -> Result<f64, DeviceError> {
        const BYTES: usize = 64 << 20;
        let stream = Stream::new(&self.gpu)?;
        let (to, from) = (Buffer::zeroed(&self.gpu, BYTES, &stream)?, Pinned::zeroed(&self.gpu, BYTES)?);
        let mut best = 0f64;
        for _ in 0..8 {
            stream.wait()?;
            let began = Instant::now();
            for _ in 0..4 {
                // SAFETY: both are that long, and live until the wait below.
                unsafe { stream.upload(to.at, from.host, BYTES)? };
            }
            stream.wait()?;
            best = best.max(4.0 * BYTES as f64 / began.elapsed().as_secs_f64());
        }
        Ok(best)
    }

    /// What the last load took.
    pub fn load_times(&self) -> LoadTimes {
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Cuda {
    fn describe(&self) -> DeviceInfo {
        let gpu = &self.gpu;
        let (major, minor) = (gpu.capability / 10, gpu.capability % 10);
        DeviceInfo {
            name: format!("cuda:{}", gpu.index),
            description: format!(
                "{}, {} multiprocessors, compute capability {major}.{minor}",
                gpu.name, gpu.chip.processors
            ),
            numerics: format!("cuda-2-sm{}", gpu.capability),
            memory_free: gpu.memory().map_or(0, |(free, _)| free.saturating_sub(SPARE)),
        }
    }

    fn compile(
        &self,
        model: &ModelFile,
        plan: &Plan,
        layers: Range<usize>,
        kv: KvLayout,
    ) -> Result<Box<dyn Program>, DeviceError> {
        let gpu = &self.gpu;
        let began = Instant::now();
        let sized = load::lower(model, plan, layers.clone(), kv, 0, gpu.chip)?;
        let (free, _) = gpu.memory()?;
        if sized.bytes as u64 + SPARE > free {
            return Err(DeviceError::Memory {
                weights_mib: (sized.weights_bytes >> 20) as u64,
                kv_mib: ((sized.bytes - sized.weights_bytes) >> 20) as u64,
                free_mib: free.saturating_sub(SPARE) >> 20,
                device: self.describe().name,
            });
        }
        let stream = Stream::new(gpu)?;
        let arena = Buffer::zeroed(gpu, sized.bytes, &stream)?;
        let low = load::lower(model, plan, layers, kv, arena.at, gpu.chip)?;
        let mut times = LoadTimes { memory: began.elapsed(), ..LoadTimes::default() };
        let kernels = std::thread::scope(|scope| {
            let kernels = scope.spawn(|| {
                let began = Instant::now();
                (kernels::Kernels::new(&self.compiler, gpu, &low), began.elapsed())
            });
            let began = Instant::now();
            let sent = kernels::pack(&self.compiler, gpu, &low).and_then(|pack| {
                times.pack = began.elapsed();
                let began = Instant::now();
                times.bytes = upload::upload(model, gpu, &self.ring, &stream, &low, &pack)?;
                times.weights = began.elapsed();
                Ok(())
            });
            let lost = || DeviceError::Lost("the thread that makes kernels panicked".into());
            let (kernels, took) = kernels.join().map_err(|_| lost())?;
            times.kernels = took;
            // the file's faults come first
            sent.and(kernels)
        })?;
        let program = run::CudaProgram::new(gpu.clone(), stream, arena, low, kernels, kv)?;
        times.total = began.elapsed();
        tracing::debug!(?times, "loaded");
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = times;
        Ok(Box::new(program))
    }
}

#[cfg(test)]
mod tests;
