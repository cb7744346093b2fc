//! Weights on their way to the GPU. The processor does nothing but read: several threads take pieces of the matrices,
//! whole rows of them, read each from the file straight into pinned memory, and have it copied to a place of its own on the
//! GPU, where a kernel puts its blocks into tiles (`pack.cu`). Each thread has two such places and streams, so that it
//! reads one piece while the other travels. Types that the kernel doesn't know are widened to f32 here.
use super::args::PackArgs;
use super::driver::{Buffer, Gpu, Kernel, Pinned, Stream};
use super::forms::Form;
use super::load::{Lowered, PackJob};
use crate::gguf::{GgmlType, GgufError, ModelFile, TensorInfo};
use crate::program::DeviceError;
use crate::quant;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of the file that travel at once. More of them don't travel faster, and fewer stay in the processor's caches
/// from the read to the copy.
const CHUNK: usize = 2 << 20;
/// Threads that read, at most: one copies out of the system's cache at a sixth of what the bus takes.
const READERS: usize = 16;

/// A thread's two places: pinned memory and as much on the GPU, one after the other.
struct Lane {
    streams: [Stream; 2],
    pinned: Pinned,
    staging: Buffer,
}

impl Lane {
    fn new(gpu: &Arc<Gpu>) -> Result<Lane, DeviceError> {
        let streams = [Stream::new(gpu)?, Stream::new(gpu)?];
        let staging = Buffer::zeroed(gpu, 2 * CHUNK, &streams[0])?;
        let pinned = Pinned::unset(gpu, 2 * CHUNK)?;
        streams[0].wait()?;
        Ok(Lane { streams, pinned, staging })
    }
}

/// The places of all threads, made when they are first wanted and kept for the next model: pinning memory takes as long as
/// filling it a few times. At most [`READERS`] lanes, 64 MiB on either side.
#[derive(Default)]
pub struct Ring(Mutex<Vec<Lane>>);

impl Ring {
    fn take(&self, gpu: &Arc<Gpu>) -> Result<Lane, DeviceError> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.map_or_else(|| Lane::new(gpu), Ok)
    }

    /// Once nothing is under way in it.
    fn give(&self, lane: Lane) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < READERS {
            kept.push(lane);
        }
    }
}

/// Some rows of a tensor.
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

/// Brings every vector and matrix to its place. The file is never in memory as a whole. Returns the bytes that were read
/// of matrices.
pub fn upload(
    file: &ModelFile,
    gpu: &Arc<Gpu>,
    ring: &Ring,
    stream: &Stream,
    low: &Lowered,
    pack: &[(Form, Kernel)],
) -> Result<u64, DeviceError> {
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
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.clamp(1, READERS).min(pieces.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let sent = send(file, gpu, ring, &pieces, &next, pack);
        // whoever fails stops the others
        sent.inspect_err(|_| next.store(pieces.len(), Ordering::Relaxed))
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let lost = || Err(DeviceError::Lost("a thread that reads weights panicked".into()));
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|_| lost()))
    })?;
    Ok(pieces.iter().map(|piece| (piece.rows * piece.row_bytes) as u64).sum())
}

/// Pieces of a tensor that fit into places.
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
    ring: &Ring,
    pieces: &[Piece<'_>],
    next: &AtomicUsize,
    pack: &[(Form, Kernel)],
) -> Result<(), DeviceError> {
    gpu.enter()?;
    let lane = ring.take(gpu)?;
    let mut sent = Ok(());
    for place in (0..2).cycle() {
        let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
        sent = lane.send(place, file, piece, pack);
        if sent.is_err() {
            break;
        }
    }
    // what is under way uses the lane, whatever became of the rest
    let done = lane.streams.each_ref().map(Stream::wait);
    sent?;
    done.into_iter().collect::<Result<(), _>>()?;
    ring.give(lane);
    Ok(())
}

impl Lane {
    /// Has a piece read, copied and packed in one of the places; the latter two are under way when this returns.
    fn send(
        &self,
        place: usize,
        file: &ModelFile,
        piece: &Piece<'_>,
        pack: &[(Form, Kernel)],
    ) -> Result<(), DeviceError> {
        let kernel = pack.iter().find(|(form, _)| *form == piece.job.form).map(|(_, kernel)| kernel);
        let kernel = kernel.ok_or_else(|| DeviceError::Lost("a kernel is missing".into()))?;
        let stream = &self.streams[place];
        stream.wait()?;
        let length = piece.rows * piece.sent_bytes;
        assert!(length <= CHUNK, "a piece fits its place");
        // SAFETY: the place is `CHUNK` bytes, and nothing is copying from it.
        let to = unsafe { std::slice::from_raw_parts_mut(self.pinned.host.add(place * CHUNK), length) };
        let ty = piece.read(file, to)?;
        let PackJob { matrix, half, tile0, pairs, .. } = piece.job;
        let args = PackArgs {
            raw: self.staging.at + (place * CHUNK) as u64,
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
        let grid = [(piece.rows * piece.cols / 32).div_ceil(256), 1, 1];
        // SAFETY: the place on the GPU is as large; the kernel writes the matrix' own tiles.
        unsafe {
            stream.upload(args.raw, to.as_ptr(), length)?;
            stream.launch(kernel, grid, &args)
        }
    }
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
