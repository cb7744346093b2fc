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

use crate::gguf::{GgmlType, GgufError, ModelFile, TensorInfo};
use crate::plan::Plan;
use crate::program::{Device, DeviceError, DeviceInfo, KvLayout, Program};
use crate::quant;
use args::PackArgs;
use driver::{Buffer, Compiler, Gpu, Kernel, Pinned, Stream};
use forms::Form;
use load::{Lowered, PackJob};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of the file that travel at once.
const CHUNK: usize = 4 << 20;
/// Threads that read the file, at most; each has two chunks.
const READERS: usize = 8;
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
        let (kernels, pack) = kernels::Kernels::new(&self.compiler, gpu, &low)?;
        upload(model, gpu, &stream, &low, &pack)?;
        Ok(Box::new(run::CudaProgram::new(gpu.clone(), stream, arena, low, kernels, kv)?))
    }
}

/// Some rows of a tensor on their way into tiles.
struct Piece<'a> {
    job: &'a PackJob,
    info: &'a TensorInfo,
    row0: usize,
    rows: usize,
    cols: usize,
    /// Bytes of a row in the file.
    row_bytes: usize,
    /// Bytes of a row as it is sent: f32 where the GPU doesn't know the type.
    sent_bytes: usize,
}

/// Reads every matrix in pieces, several threads at once, and has the GPU pack them. The file is never in memory as a
/// whole.
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
    // other streams write where this one has put zeros
    stream.wait()?;
    let mut pieces = Vec::new();
    for job in &low.jobs {
        cut(file, job, &mut pieces)?;
    }
    let threads =
        std::thread::available_parallelism().map_or(1, usize::from).clamp(1, READERS).min(pieces.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let sent = send(file, gpu, &pieces, &next, pack);
        // whoever fails stops the others
        sent.inspect_err(|_| next.store(pieces.len(), Ordering::Relaxed))
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let lost = || Err(DeviceError::Lost("a thread that reads weights panicked".into()));
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|_| lost()))
    })
}

/// Pieces of a tensor that fit into chunks.
fn cut<'a>(file: &'a ModelFile, job: &'a PackJob, pieces: &mut Vec<Piece<'a>>) -> Result<(), DeviceError> {
    let missing = || DeviceError::Unsupported(format!("the file has no tensor {}", job.tensor));
    let info = file.tensor(&job.tensor).ok_or_else(missing)?;
    let [cols, rows] = info.dims[..] else { return Err(missing()) };
    let (cols, rows) = (cols as usize, rows as usize);
    let row_bytes = cols / info.ty.block_values() * info.ty.block_bytes();
    let sent_bytes = if job.form.packs(info.ty) { row_bytes } else { cols * 4 };
    if sent_bytes > CHUNK {
        return Err(DeviceError::Unsupported(format!("a row of {} exceeds {CHUNK} bytes", job.tensor)));
    }
    let per = (CHUNK / sent_bytes.max(row_bytes)).max(1);
    let piece = |row0| Piece { job, info, row0, rows: per.min(rows - row0), cols, row_bytes, sent_bytes };
    pieces.extend((0..rows).step_by(per).map(piece));
    Ok(())
}

/// Takes pieces until there are none: one is read while the one before is copied and packed.
fn send(
    file: &ModelFile,
    gpu: &Arc<Gpu>,
    pieces: &[Piece<'_>],
    next: &AtomicUsize,
    pack: &[(Form, Kernel)],
) -> Result<(), DeviceError> {
    gpu.enter()?;
    let mut places = Vec::new();
    for _ in 0..2 {
        let stream = Stream::new(gpu)?;
        let staging = Buffer::zeroed(gpu, CHUNK, &stream)?;
        places.push((Pinned::zeroed(gpu, CHUNK)?, staging, stream));
    }
    for place in (0..2).cycle() {
        let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
        let (pinned, staging, stream) = &places[place];
        let kernel = pack.iter().find(|(form, _)| *form == piece.job.form).map(|(_, kernel)| kernel);
        let kernel = kernel.ok_or_else(|| DeviceError::Lost("a kernel is missing".into()))?;
        stream.wait()?;
        // SAFETY: the memory is `CHUNK` bytes, and nothing is copying from it.
        let to = unsafe { std::slice::from_raw_parts_mut(pinned.host, piece.rows * piece.sent_bytes) };
        let ty = piece.read(file, to)?;
        let PackJob { matrix, half, tile0, pairs, .. } = piece.job;
        let args = PackArgs {
            raw: staging.at,
            row0: piece.row0 as i32,
            rows: piece.rows as i32,
            cols: piece.cols as i32,
            ty: ty.id() as i32,
            half: *half,
            tile0: *tile0 as i32,
            pairs: *pairs as i32,
            q: matrix.q,
            high: matrix.high,
            s: matrix.s,
            supers: matrix.supers,
        };
        // SAFETY: the staging buffer holds a chunk; the kernel writes the matrix' own tiles.
        unsafe {
            stream.upload(args.raw, pinned.host, to.len())?;
            stream.launch(kernel, [(piece.rows * piece.cols / 32).div_ceil(256), 1, 1], &args)?;
        }
    }
    places.iter().try_for_each(|(_, _, stream)| stream.wait())
}

impl Piece<'_> {
    /// Its rows into `to`, and their type there.
    fn read(&self, file: &ModelFile, to: &mut [u8]) -> Result<GgmlType, DeviceError> {
        let range = (self.row0 * self.row_bytes) as u64..((self.row0 + self.rows) * self.row_bytes) as u64;
        let failed = |e: GgufError| DeviceError::File(e.to_string());
        if self.job.form.packs(self.info.ty) {
            file.read(self.info, range, to).map_err(failed)?;
            return Ok(self.info.ty);
        }
        let mut bytes = vec![0u8; self.rows * self.row_bytes];
        file.read(self.info, range, &mut bytes).map_err(failed)?;
        let mut values = vec![0f32; self.rows * self.cols];
        quant::dequantize(self.info.ty, &bytes, &mut values);
        for (to, v) in to.chunks_exact_mut(4).zip(&values) {
            to.copy_from_slice(&v.to_le_bytes());
        }
        Ok(GgmlType::F32)
    }
}

#[cfg(test)]
mod tests;
