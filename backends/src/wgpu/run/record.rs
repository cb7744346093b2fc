//! A batch becomes commands.
use super::describe::{Shape, on_gpu};
use super::profile::Profile;
use super::readback::take_spare;
use super::{Answer, Flight, Ready, Run, WgpuProgram};
use crate::program::{Batch, DeviceError, Segment, Want};
use crate::wgpu::adapter::PARAMS_STRIDE;
use crate::wgpu::lower::{Buf, Height};
use ::wgpu::{BindGroup, CommandEncoder, CommandEncoderDescriptor, ComputePass, ComputePassDescriptor};
use std::sync::Arc;

impl WgpuProgram {
    /// Writes what the kernels need to know, records all dispatches, and submits.
    pub(super) fn record(&mut self, batch: Batch) -> Result<(), DeviceError> {
        let step = self.describe(&batch);
        let (answers, wanted, here) = self.answers(batch.segments);
        let mut commands = self.gpu.device.create_command_encoder(&CommandEncoderDescriptor { label: None });
        let wants_hidden = answers.iter().any(|answer| matches!(answer, Answer::Hidden { .. }));
        let logits = self.dispatch(&mut commands, &step, wanted, &here);
        let mut flight = Flight {
            ids: None,
            logits,
            hidden: None,
            ticks: None,
            mapped: Arc::default(),
            maps: 0,
            submission: None,
            answers,
        };
        if flight.answers.iter().any(|answer| matches!(answer, Answer::Ids { .. })) {
            flight.ids = Some(self.read_back(&mut commands, (Buf::Ids, 0), 4 * wanted as u64));
        }
        if wants_hidden {
            let bytes = 4 * (step.rows * self.lowered.hidden) as u64;
            flight.hidden = Some(self.read_back(&mut commands, (Buf::X(self.lowered.x_end), 0), bytes));
        }
        let spare = |bytes| take_spare(&mut self.spare, &self.gpu, bytes);
        flight.ticks = self.profile.resolve(&mut commands, spare);
        flight.submission = Some(self.gpu.queue.submit([commands.finish()]));
        flight.map(&self.gpu, &self.wake);
        self.flights.push_back(flight);
        Ok(())
    }

    /// How each segment's result will be found, how many rows are wanted, and the wanted rows whose logits come back.
    fn answers(&self, segments: Vec<Segment>) -> (Vec<Answer>, usize, Vec<usize>) {
        let mut answers = Vec::new();
        let (mut row, mut wanted) = (0, 0);
        let mut here = Vec::new();
        for segment in segments {
            let rows = segment.input.rows(self.lowered.hidden);
            let logits = segment.want.rows();
            let answer = match segment.want {
                Want::Nothing => Answer::Nothing,
                Want::Hidden => Answer::Hidden { first: row, rows },
                Want::Logits(n) => {
                    here.extend(wanted..wanted + n as usize);
                    Answer::Logits { first: wanted, rows: n as usize }
                }
                Want::Sample(specs) if specs.iter().all(on_gpu) => {
                    Answer::Ids { first: wanted, rows: specs.len(), slot: segment.slot }
                }
                Want::Sample(specs) => {
                    here.extend(wanted..wanted + specs.len());
                    Answer::Sample { first: wanted, slot: segment.slot, specs }
                }
            };
            answers.push(answer);
            wanted += logits;
            row += rows;
        }
        (answers, wanted, here)
    }

    /// All dispatches of a step, in one pass where logits needn't be copied in between. `here` are wanted rows whose
    /// logits come back.
    fn dispatch(
        &mut self,
        commands: &mut CommandEncoder,
        step: &Shape,
        wanted: usize,
        here: &[usize],
    ) -> Vec<Run> {
        let mut runs = Vec::new();
        let begin = |commands: &mut CommandEncoder| {
            commands.begin_compute_pass(&ComputePassDescriptor::default()).forget_lifetime()
        };
        let mut pass = Some(begin(commands));
        let rows = step.rows as u32;
        let body = if rows == 1 { &self.one } else { &self.many };
        if let Some(pass) = &mut pass {
            for list in [&self.embed, body, &self.settle] {
                play(pass, list, &self.params_bound, (0, rows), step, &mut self.profile);
            }
        }
        let each = self.lowered.logits_rows;
        for (chunk, first) in (0..wanted).step_by(each).enumerate() {
            let rows = each.min(wanted - first);
            let in_chunk = |row: &&usize| (first..first + rows).contains(*row);
            let (low, high) = (here.iter().find(in_chunk), here.iter().rfind(in_chunk));
            let all_here = here.iter().filter(in_chunk).count() == rows;
            let mut on = match pass.take() {
                Some(pass) => pass,
                None => begin(commands),
            };
            let head = if rows == 1 { &self.head_one } else { &self.head_many };
            let lists = [(head, true), (&self.choose, !all_here)];
            for (list, _) in lists.into_iter().filter(|(_, needed)| *needed) {
                play(&mut on, list, &self.params_bound, (chunk + 1, rows as u32), step, &mut self.profile);
            }
            if let (Some(&low), Some(&high)) = (low, high) {
                drop(on);
                let width = 4 * self.lowered.vocab as u64;
                let bytes = width * (high + 1 - low) as u64;
                let from = width * (low - first) as u64;
                let buffer = self.read_back(commands, (Buf::Logits, from), bytes);
                runs.push(Run { first: low, rows: high + 1 - low, buffer });
            } else {
                pass = Some(on);
            }
        }
        runs
    }
}

/// Records a list of dispatches with the parameters of that number.
fn play(
    pass: &mut ComputePass<'_>,
    list: &[Ready],
    params_bound: &BindGroup,
    (params, rows): (usize, u32),
    step: &Shape,
    profile: &mut Profile,
) {
    let mut first = true;
    for ready in list.iter().filter(|ready| step.includes(ready.when)) {
        pass.set_pipeline(&ready.pipeline);
        if first {
            pass.set_bind_group(1, params_bound, &[(params as u64 * PARAMS_STRIDE) as u32]);
            first = false;
        }
        pass.set_bind_group(0, &ready.bound, &[]);
        let height = match ready.height {
            Height::One => 1,
            Height::Rows => rows,
            Height::Tiles => rows.div_ceil(ready.tile),
        };
        profile.before(pass);
        pass.dispatch_workgroups(ready.width, height, step.spans.min(ready.spans) as u32);
        profile.after(pass, ready);
    }
}
