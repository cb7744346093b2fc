//! Results come back late, through buffers that are mapped.
use super::{Answer, DEPTH, FAILED, Flight, WgpuProgram};
use crate::program::{Batch, DeviceError, Input, Sampled, SegmentOutput, StepOutput};
use crate::sampling;
use crate::wgpu::Wake;
use crate::wgpu::adapter::Gpu;
use crate::wgpu::lower::Buf;
use ::wgpu::{Buffer, BufferUsages, CommandEncoder, MapMode};
use std::sync::atomic::Ordering;

impl Flight {
    /// All that are mapped when the step has ended.
    fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        let logits = self.logits.iter().map(|run| &run.buffer);
        let ticks = self.ticks.iter().map(|(buffer, _)| buffer);
        self.ids.iter().chain(&self.hidden).chain(logits).chain(ticks)
    }

    /// Asks for all buffers of a submitted step.
    pub(super) fn map(&mut self, gpu: &Gpu, wake: &Wake) {
        for buffer in self.buffers() {
            let (mapped, wake) = (self.mapped.clone(), wake.clone());
            buffer.slice(..).map_async(MapMode::Read, move |result| {
                mapped.fetch_add(if result.is_ok() { 1 } else { FAILED }, Ordering::Release);
                wake();
            });
        }
        self.maps = self.buffers().count();
        if self.maps == 0 {
            // Nothing to read, but the step must have ended.
            let (mapped, wake) = (self.mapped.clone(), wake.clone());
            self.maps = 1;
            gpu.queue.on_submitted_work_done(move || {
                mapped.fetch_add(1, Ordering::Release);
                wake();
            });
        }
    }
}

impl WgpuProgram {
    /// Whether a batch goes on from ids that are sampled here, in a step that is still in flight.
    pub(super) fn waits(&self, batch: &Batch) -> bool {
        batch.segments.iter().filter(|segment| segment.input == Input::LastSampled).any(|segment| {
            let here =
                |answer: &Answer| matches!(answer, Answer::Sample { slot, .. } if *slot == segment.slot);
            self.flights.iter().any(|flight| flight.answers.iter().any(here))
        })
    }

    /// A copy of a part of a buffer that can be mapped.
    pub(super) fn read_back(
        &mut self,
        commands: &mut CommandEncoder,
        (from, first): (Buf, u64),
        bytes: u64,
    ) -> Buffer {
        let buffer = take_spare(&mut self.spare, &self.gpu, bytes);
        commands.copy_buffer_to_buffer(&self.buffers[&from], first, &buffer, 0, bytes);
        buffer
    }

    /// Reads what a finished step has brought, and samples what is sampled here.
    pub(super) fn land(&mut self, flight: Flight) -> Result<StepOutput, DeviceError> {
        let lost = |error: ::wgpu::MapRangeError| DeviceError::Lost(error.to_string());
        let (vocab, hidden) = (self.lowered.vocab, self.lowered.hidden);
        let mut ids = Vec::new();
        if let Some(buffer) = &flight.ids {
            let view = buffer.slice(..).get_mapped_range().map_err(lost)?;
            ids.extend(view.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
        let floats = |buffer: &Buffer, first: usize, n: usize| -> Result<Vec<f32>, DeviceError> {
            let view = buffer.slice(..).get_mapped_range().map_err(lost)?;
            let words = view[4 * first..4 * (first + n)].chunks_exact(4);
            Ok(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let logits = |first: usize, rows: usize| -> Result<Vec<f32>, DeviceError> {
            let mut all = Vec::with_capacity(rows * vocab);
            for run in &flight.logits {
                let (from, to) = (first.max(run.first), (first + rows).min(run.first + run.rows));
                if from < to {
                    all.extend(floats(&run.buffer, (from - run.first) * vocab, (to - from) * vocab)?);
                }
            }
            Ok(all)
        };
        let mut output = StepOutput::default();
        for answer in &flight.answers {
            output.segments.push(match answer {
                Answer::Nothing => SegmentOutput::Nothing,
                Answer::Ids { first, rows, .. } => {
                    let of = |row| Sampled { id: ids.get(row).copied().unwrap_or_default(), logprobs: None };
                    SegmentOutput::Sampled((*first..first + rows).map(of).collect())
                }
                Answer::Sample { first, slot, specs } => {
                    let mut logits = logits(*first, specs.len())?;
                    let rows = logits.chunks_exact_mut(vocab).zip(specs);
                    let sampled: Vec<_> = rows.map(|(row, spec)| sampling::sample(row, spec)).collect();
                    if let Some(last) = sampled.last() {
                        self.remember(*slot, last.id);
                    }
                    SegmentOutput::Sampled(sampled)
                }
                Answer::Logits { first, rows } => SegmentOutput::Logits(logits(*first, *rows)?),
                Answer::Hidden { first, rows } => match &flight.hidden {
                    Some(buffer) => SegmentOutput::Hidden(floats(buffer, first * hidden, rows * hidden)?),
                    None => SegmentOutput::Nothing,
                },
            });
        }
        if let Some((buffer, names)) = &flight.ticks {
            let view = buffer.slice(..).get_mapped_range().map_err(lost)?;
            self.profile.time(&view, names);
        }
        for buffer in flight.buffers() {
            buffer.unmap();
            self.spare.push(buffer.clone());
        }
        self.spare.truncate(4 * DEPTH);
        Ok(output)
    }

    /// An id that was sampled here, for the next step's embedding; unless the slot has sampled again since.
    fn remember(&self, slot: u32, id: u32) {
        let again = |answer: &Answer| match answer {
            Answer::Ids { slot: other, .. } | Answer::Sample { slot: other, .. } => *other == slot,
            _ => false,
        };
        if self.flights.iter().flat_map(|flight| &flight.answers).any(again) {
            return;
        }
        self.gpu.queue.write_buffer(&self.buffers[&Buf::Last], 4 * u64::from(slot), &id.to_le_bytes());
    }
}

/// A mappable buffer of at least so many bytes.
pub(super) fn take_spare(spare: &mut Vec<Buffer>, gpu: &Gpu, bytes: u64) -> Buffer {
    let fits = |buffer: &Buffer| (bytes..=4 * bytes.max(1024)).contains(&buffer.size());
    match spare.iter().position(fits) {
        Some(at) => spare.swap_remove(at),
        None => {
            let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
            gpu.buffer("read back", bytes.next_power_of_two().min(bytes + (1 << 20)), usage)
        }
    }
}
