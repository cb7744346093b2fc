//! Weights from the file into GPU memory, packed on the way, a bounded piece at a time.
use super::adapter::Gpu;
use super::lower::{Fill, Region};
use super::pack::{self, Row};
use crate::gguf::ModelFile;
use crate::program::DeviceError;
use crate::quant;
use ::wgpu::{Buffer, BufferDescriptor, BufferUsages, CommandEncoderDescriptor, SubmissionIndex};
use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of the file that are packed at once.
const CHUNK: usize = 8 << 20;
/// Pieces on their way to the GPU.
const PIECES: usize = 3;
/// Bytes of a buffer that regions share.
const ARENA: u64 = 256 << 20;
const ALIGN: u64 = 256;

/// Where a region is.
#[derive(Clone, Debug)]
pub struct Place {
    pub arena: usize,
    pub offset: u64,
    pub bytes: u64,
}

/// All weights of a program.
pub struct Weights {
    pub arenas: Vec<Buffer>,
    pub places: Vec<Place>,
}

/// Makes room for all regions.
pub fn allocate(gpu: &Gpu, regions: &[Region]) -> Weights {
    let most = gpu.buffer_max;
    let mut sizes: Vec<u64> = Vec::new();
    let mut places = Vec::new();
    for region in regions {
        let bytes = (4 * region.words as u64).next_multiple_of(ALIGN);
        match sizes.last_mut() {
            Some(size) if *size + bytes <= ARENA.min(most) => *size += bytes,
            _ => sizes.push(bytes),
        }
        let arena = sizes.len() - 1;
        places.push(Place { arena, offset: sizes[arena] - bytes, bytes });
    }
    let arena = |size: &u64| {
        gpu.device.create_buffer(&BufferDescriptor {
            label: Some("weights"),
            size: *size,
            usage: BufferUsages::STORAGE | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    };
    Weights { arenas: sizes.iter().map(arena).collect(), places }
}

/// Reads, packs and sends everything.
pub async fn fill(
    gpu: &Gpu,
    file: &ModelFile,
    regions: &[Region],
    weights: &Weights,
) -> Result<(), DeviceError> {
    let mut sender = Sender { gpu, on_the_way: VecDeque::new() };
    for (region, place) in regions.iter().zip(&weights.places) {
        for fill in &region.fills {
            sender.fill(file, fill, &weights.arenas[place.arena], place.offset).await?;
        }
    }
    sender.wait(0).await
}

struct Sender<'a> {
    gpu: &'a Gpu,
    on_the_way: VecDeque<SubmissionIndex>,
}

impl Sender<'_> {
    async fn fill(
        &mut self,
        file: &ModelFile,
        fill: &Fill,
        arena: &Buffer,
        base: u64,
    ) -> Result<(), DeviceError> {
        let missing = |name: &str| DeviceError::Unsupported(format!("the file has no tensor {name}"));
        let failed = |error: crate::gguf::GgufError| DeviceError::File(error.to_string());
        match fill {
            Fill::Vector { tensor, values, at } => {
                let info = file.tensor(tensor).ok_or_else(|| missing(tensor))?;
                let mut bytes = vec![0; info.bytes as usize];
                file.read(info, 0..info.bytes, &mut bytes).map_err(failed)?;
                let mut all = vec![0f32; info.values() as usize];
                quant::dequantize(info.ty, &bytes, &mut all);
                let bytes: Vec<u8> = all[values.clone()].iter().flat_map(|v| v.to_le_bytes()).collect();
                self.send(&[(&bytes, base + 4 * *at as u64)], arena).await
            }
            Fill::Matrix { tensor, ty, rows, cols, matrix } => {
                let info = file.tensor(tensor).ok_or_else(|| missing(tensor))?;
                let row_bytes = cols / ty.block_values() * ty.block_bytes();
                let words = matrix.format.row_words(matrix.cols);
                let per = (CHUNK / row_bytes.max(4 * words.sum())).max(1);
                let mut bytes = Vec::new();
                for first in rows.clone().step_by(per) {
                    let piece = first..(first + per).min(rows.end);
                    bytes.resize(piece.len() * row_bytes, 0);
                    let from = (piece.start * row_bytes) as u64;
                    file.read(info, from..from + bytes.len() as u64, &mut bytes).map_err(failed)?;
                    let streams = [words.codes, words.high, words.scales, words.supers];
                    let mut packed = streams.map(|words| vec![0u8; 4 * words * piece.len()]);
                    let pack = |row: &[u8], out: &mut Row<'_>| {
                        pack::pack_row(*ty, matrix.format, row, *cols, out);
                    };
                    pack_rows(
                        &bytes,
                        row_bytes,
                        streams.map(|w| 4 * w),
                        &mut packed,
                        self.gpu.threads,
                        &pack,
                    );
                    let starts = [matrix.codes, matrix.high, matrix.scales, matrix.supers];
                    let done = piece.start - rows.start;
                    let parts: Vec<(&[u8], u64)> = packed
                        .iter()
                        .zip(starts.iter().zip(streams))
                        .filter(|(bytes, _)| !bytes.is_empty())
                        .map(|(bytes, (start, words))| (&bytes[..], base + 4 * (start + done * words) as u64))
                        .collect();
                    self.send(&parts, arena).await?;
                }
                Ok(())
            }
        }
    }

    /// Through a mapped buffer, which the driver can place where both sides reach it fast; a browser has its own way.
    async fn send(&mut self, parts: &[(&[u8], u64)], arena: &Buffer) -> Result<(), DeviceError> {
        let size: usize = parts.iter().map(|(bytes, _)| bytes.len()).sum();
        if size == 0 {
            return Ok(());
        }
        if cfg!(target_family = "wasm") {
            parts.iter().for_each(|(bytes, to)| self.gpu.queue.write_buffer(arena, *to, bytes));
            self.on_the_way.push_back(self.gpu.queue.submit([]));
            return self.wait(PIECES).await;
        }
        let staging = self.gpu.device.create_buffer(&BufferDescriptor {
            label: Some("staging"),
            size: size as u64,
            usage: BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        });
        let mut commands = self.gpu.device.create_command_encoder(&CommandEncoderDescriptor { label: None });
        let mut at = 0;
        for (bytes, to) in parts {
            let end = at + bytes.len() as u64;
            let mapped = staging.slice(at..end).get_mapped_range_mut();
            let mut mapped = mapped.map_err(|error| DeviceError::Lost(error.to_string()))?;
            mapped.copy_from_slice(bytes);
            drop(mapped);
            commands.copy_buffer_to_buffer(&staging, at, arena, *to, bytes.len() as u64);
            at = end;
        }
        staging.unmap();
        self.on_the_way.push_back(self.gpu.queue.submit([commands.finish()]));
        self.wait(PIECES).await
    }

    async fn wait(&mut self, left: usize) -> Result<(), DeviceError> {
        while self.on_the_way.len() > left
            && let Some(first) = self.on_the_way.pop_front()
        {
            self.gpu.passed(first).await?;
        }
        Ok(())
    }
}

/// Packs rows on several threads.
fn pack_rows(
    bytes: &[u8],
    row_bytes: usize,
    widths: [usize; 4],
    packed: &mut [Vec<u8>; 4],
    threads: usize,
    pack: &(dyn Fn(&[u8], &mut Row<'_>) + Sync),
) {
    let rows = bytes.len() / row_bytes;
    let each = if bytes.len() < 1 << 18 { rows } else { rows.div_ceil(threads) };
    let [mut codes, mut high, mut scales, mut supers] = packed.each_mut().map(|stream| &mut stream[..]);
    let mut shares = Vec::new();
    for first in (0..rows).step_by(each.max(1)) {
        let some: Range<usize> = first..(first + each).min(rows);
        fn take<'a>(stream: &mut &'a mut [u8], bytes: usize) -> &'a mut [u8] {
            let (head, tail) = std::mem::take(stream).split_at_mut(bytes);
            *stream = tail;
            head
        }
        let streams = [
            take(&mut codes, widths[0] * some.len()),
            take(&mut high, widths[1] * some.len()),
            take(&mut scales, widths[2] * some.len()),
            take(&mut supers, widths[3] * some.len()),
        ];
        shares.push((&bytes[some.start * row_bytes..some.end * row_bytes], streams));
    }
    let work = |(bytes, streams): (&[u8], [&mut [u8]; 4])| {
        let [codes, high, scales, supers] = streams;
        for (i, row) in bytes.chunks_exact(row_bytes).enumerate() {
            let at = |stream: usize| i * widths[stream]..(i + 1) * widths[stream];
            pack(
                row,
                &mut Row {
                    codes: &mut codes[at(0)],
                    high: &mut high[at(1)],
                    scales: &mut scales[at(2)],
                    supers: &mut supers[at(3)],
                },
            );
        }
    };
    if shares.len() < 2 {
        return shares.into_iter().for_each(work);
    }
    std::thread::scope(|scope| {
        for share in shares {
            scope.spawn(|| work(share));
        }
    });
}
