//! The CUDA device: kernels generated for exactly the loaded model and chip, weights in the order in which tensor cores
//! take them, about five launches a layer that are replayed as a graph.
//!
//! Activations are quantised by the step that produces them, and the root of a norm, a factor of whole rows, is applied
//! to the product; so a step needs nothing of the one before it but its output, and loads its first weights before that
//! is there. One kind of kernel serves one column and many: a token's bits don't depend on the batch.
mod args;
mod constants;
#[cfg_attr(feature = "cuda-emulator", path = "cuda/emulated.rs")]
mod driver;
mod forms;
mod kernels;
mod load;
mod run;

use crate::gguf::{GgmlType, ModelFile};
use crate::plan::Plan;
use crate::program::{Device, DeviceError, DeviceInfo, KvLayout, Program};
use crate::quant;
use args::PackArgs;
use driver::{Buffer, Compiler, Gpu, Kernel, Pinned, Stream};
use forms::Form;
use load::{Lowered, PackJob};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of the file that travel at once.
const CHUNK: usize = 4 << 20;
/// Chunks that may be under way.
const CHUNKS: usize = 4;
/// Memory left to the driver and others.
const SPARE: u64 = 256 << 20;

/// One of NVIDIA's GPUs, compute capability 8.0 or later.
pub struct Cuda {
    gpu: Arc<Gpu>,
    compiler: Arc<Compiler>,
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
            found.push(Cuda { gpu: Arc::new(gpu), compiler: compiler.clone() });
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
            let began = std::time::Instant::now();
            for _ in 0..4 {
                stream.copy(&a, &b, BYTES)?;
            }
            stream.wait()?;
            best = best.max(8.0 * BYTES as f64 / began.elapsed().as_secs_f64());
        }
        Ok(best)
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
                gpu.name, gpu.processors
            ),
            numerics: format!("cuda-1-sm{}", gpu.capability),
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
        let sized = load::lower(model, plan, layers.clone(), kv, 0, gpu.shared_bytes)?;
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
        let low = load::lower(model, plan, layers, kv, arena.at, gpu.shared_bytes)?;
        let (kernels, pack) = kernels::Kernels::new(&self.compiler, gpu, &low)?;
        upload(model, gpu, &stream, &low, &pack)?;
        Ok(Box::new(run::CudaProgram::new(gpu.clone(), stream, arena, low, kernels, kv)?))
    }
}

/// Reads every matrix through a ring of pinned chunks and has the GPU pack it. The file is never in memory as a whole.
fn upload(
    file: &ModelFile,
    gpu: &Arc<Gpu>,
    stream: &Stream,
    low: &Lowered,
    pack: &[(Form, Kernel)],
) -> Result<(), DeviceError> {
    for (at, bytes) in &low.vectors {
        // SAFETY: the place was taken for exactly these bytes; pageable memory is read before the call returns.
        unsafe { stream.upload(*at, bytes.as_ptr(), bytes.len())? };
    }
    let mut ring = Ring { pinned: Vec::new(), staging: Vec::new(), next: 0 };
    for _ in 0..CHUNKS {
        ring.pinned.push(Pinned::zeroed(gpu, CHUNK)?);
        ring.staging.push(Buffer::zeroed(gpu, CHUNK, stream)?);
    }
    for job in &low.jobs {
        let kernel = pack.iter().find(|(f, _)| *f == job.form).map(|(_, k)| k);
        let kernel = kernel.ok_or_else(|| DeviceError::Lost("a kernel is missing".into()))?;
        ring.send(file, stream, job, kernel)?;
    }
    stream.wait()
}

struct Ring {
    pinned: Vec<Pinned>,
    staging: Vec<Buffer>,
    next: usize,
}

impl Ring {
    /// One tensor, some rows at a time.
    fn send(
        &mut self,
        file: &ModelFile,
        stream: &Stream,
        job: &PackJob,
        kernel: &Kernel,
    ) -> Result<(), DeviceError> {
        let missing = || DeviceError::Unsupported(format!("the file has no tensor {}", job.tensor));
        let info = file.tensor(&job.tensor).ok_or_else(missing)?;
        let [cols, rows] = info.dims[..] else { return Err(missing()) };
        let (cols, rows) = (cols as usize, rows as usize);
        let row_bytes = cols / info.ty.block_values() * info.ty.block_bytes();
        let whole = job.form.packs(info.ty);
        let (ty, sent_bytes) = if whole { (info.ty, row_bytes) } else { (GgmlType::F32, cols * 4) };
        let per = (CHUNK / sent_bytes.max(row_bytes)).max(1).min(rows);
        if sent_bytes > CHUNK {
            return Err(DeviceError::Unsupported(format!("a row of {} exceeds {CHUNK} bytes", job.tensor)));
        }
        for row0 in (0..rows).step_by(per) {
            let n = per.min(rows - row0);
            self.next += 1;
            let place = self.next % CHUNKS;
            if place == 0 {
                // all chunks have been used: the first may be overwritten once they are done
                stream.wait()?;
            }
            let pinned = &mut self.pinned[place];
            // SAFETY: the memory is `CHUNK` bytes, and nothing is copying from it.
            let to = unsafe { std::slice::from_raw_parts_mut(pinned.host, n * sent_bytes) };
            let range = (row0 * row_bytes) as u64..((row0 + n) * row_bytes) as u64;
            let failed = |e: crate::gguf::GgufError| DeviceError::File(e.to_string());
            if whole {
                file.read(info, range, to).map_err(failed)?;
            } else {
                let mut bytes = vec![0u8; n * row_bytes];
                file.read(info, range, &mut bytes).map_err(failed)?;
                let mut values = vec![0f32; n * cols];
                quant::dequantize(info.ty, &bytes, &mut values);
                for (to, v) in to.chunks_exact_mut(4).zip(&values) {
                    to.copy_from_slice(&v.to_le_bytes());
                }
            }
            let args = PackArgs {
                raw: self.staging[place].at,
                row0: row0 as i32,
                rows: n as i32,
                cols: cols as i32,
                ty: ty.id() as i32,
                half: job.half,
                tile0: job.tile0 as i32,
                pairs: job.pairs as i32,
                q: job.matrix.q,
                high: job.matrix.high,
                s: job.matrix.s,
                supers: job.matrix.supers,
            };
            // SAFETY: the staging buffer holds a chunk; the kernel writes the matrix' own tiles.
            unsafe {
                stream.upload(args.raw, self.pinned[place].host, n * sent_bytes)?;
                stream.launch(kernel, [(n * cols / 32).div_ceil(256), 1, 1], &args)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
