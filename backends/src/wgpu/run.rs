//! A program at work: batches become commands, results come back late through mapped buffers.
use super::adapter::{Gpu, PARAMS_STRIDE};
use super::kernels::Kernel;
use super::load::{self, Weights};
use super::lower::{Buf, Call, Height, Lowered, SPAN, When};
use crate::gguf::ModelFile;
use crate::program::{
    Batch, DeviceError, Input, KvLayout, Program, SampleSpec, Segment, SegmentOutput, StepOutput, StepTime,
    Want,
};
use crate::sampling::{self, GREEDY_BELOW};
use ::wgpu::{
    BindGroup, Buffer, BufferUsages, CommandEncoder, CommandEncoderDescriptor, ComputePass,
    ComputePassDescriptor, ComputePipeline, MapMode, QuerySet, QuerySetDescriptor, QueryType,
    SubmissionIndex,
};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use weir_scheduler::BLOCK_TOKENS;

/// Steps in flight that keep the GPU busy while the CPU records the next.
const DEPTH: usize = 3;
/// How long a poll waits for the GPU: long enough to see a step end at once, short enough for the caller's other work.
const PATIENCE: Duration = Duration::from_millis(1);
/// Attention is split where it has so many spans and so few workgroups: it would leave most of the GPU idle.
const SPLIT_SPANS: usize = 3;
const SPLIT_GROUPS: usize = 512;
/// Words of a wanted row; see `sample.wgsl`.
const WANT_WORDS: usize = 8;
/// The id of a row that takes what its slot sampled last.
const LAST: u32 = u32::MAX;
const FAILED: usize = usize::MAX / 2;

/// A dispatch, ready to be recorded.
struct Ready {
    pipeline: ComputePipeline,
    bound: BindGroup,
    width: u32,
    height: Height,
    tile: u32,
    when: When,
    spans: usize,
    name: &'static str,
    bytes: u64,
}

/// A compiled range of layers.
pub struct WgpuProgram {
    gpu: Arc<Gpu>,
    lowered: Lowered,
    kv: KvLayout,
    buffers: HashMap<Buf, Buffer>,
    params: Buffer,
    params_bound: BindGroup,
    embed: Vec<Ready>,
    one: Vec<Ready>,
    many: Vec<Ready>,
    head_one: Vec<Ready>,
    head_many: Vec<Ready>,
    choose: Vec<Ready>,
    settle: Vec<Ready>,
    /// What the parameters hold.
    params_now: Vec<u8>,
    /// Mappable buffers that wait for use.
    spare: Vec<Buffer>,
    flights: VecDeque<Flight>,
    done: VecDeque<StepOutput>,
    /// Slots that have sampled.
    sampled: Vec<bool>,
    profile: Vec<StepTime>,
    clock: Option<Clock>,
    /// Kept to save its allocation.
    words: Vec<u32>,
    /// Holds the weights alive; the bind groups refer to them.
    _weights: Weights,
}

/// A step on its way.
struct Flight {
    answers: Vec<Answer>,
    /// Ids, where any are sampled on the GPU.
    ids: Option<Buffer>,
    /// Runs of rows of logits, and of the residual stream.
    logits: Vec<Run>,
    hidden: Option<Buffer>,
    /// Ticks before the first dispatch and after each, and whose they are.
    ticks: Option<(Buffer, Vec<&'static str>)>,
    mapped: Arc<AtomicUsize>,
    maps: usize,
    submission: Option<SubmissionIndex>,
}

/// Rows `first..` of the wanted ones, in a mappable buffer.
struct Run {
    first: usize,
    rows: usize,
    buffer: Buffer,
}

/// How a segment's result is found.
enum Answer {
    Nothing,
    /// Wanted row.
    Id {
        row: usize,
        slot: u32,
    },
    /// The same, to be sampled here.
    Sample {
        row: usize,
        slot: u32,
        spec: Box<SampleSpec>,
    },
    Logits {
        first: usize,
        rows: usize,
    },
    /// Rows of the batch.
    Hidden {
        first: usize,
        rows: usize,
    },
}

impl WgpuProgram {
    /// Compiles kernels and loads weights, at the same time.
    pub fn new(
        gpu: Arc<Gpu>,
        file: &ModelFile,
        lowered: Lowered,
        kv: KvLayout,
        profile: bool,
    ) -> Result<WgpuProgram, DeviceError> {
        let clock = gpu.tick_nanos.filter(|_| profile).map(|nanos| Clock::new(&gpu, nanos));
        let weights = load::allocate(&gpu, &lowered.regions);
        let mut buffers = HashMap::new();
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        for (&name, &bytes) in &lowered.sizes {
            buffers.insert(name, gpu.buffer(&format!("{name:?}"), bytes as u64, usage));
        }
        let ropes: Vec<u8> = lowered.ropes.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
        gpu.queue.write_buffer(&buffers[&Buf::Ropes], 0, &ropes);
        let chunks = (kv.rows as usize).div_ceil(lowered.logits_rows);
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let params = gpu.buffer("params", PARAMS_STRIDE * (1 + chunks as u64), usage);
        let lists = [
            &lowered.embed,
            &lowered.one,
            &lowered.many,
            &lowered.head_one,
            &lowered.head_many,
            &lowered.choose,
            &lowered.settle,
        ];
        let pipelines = build(&gpu, file, &lists, &lowered, &weights)?;
        let tile = lowered.tile as u32;
        let ready = |calls: &Vec<Call>| -> Vec<Ready> {
            let one = |call: &Call| Ready {
                pipeline: pipelines[&call.kernel].clone(),
                bound: bind(&gpu, call, &buffers, &weights, &lowered),
                width: call.width as u32,
                height: call.height,
                tile,
                when: call.when,
                spans: call.spans,
                name: call.name,
                bytes: call.bytes as u64,
            };
            calls.iter().map(one).collect()
        };
        Ok(WgpuProgram {
            embed: ready(&lowered.embed),
            one: ready(&lowered.one),
            many: ready(&lowered.many),
            head_one: ready(&lowered.head_one),
            head_many: ready(&lowered.head_many),
            choose: ready(&lowered.choose),
            settle: ready(&lowered.settle),
            params_bound: gpu.bind_params(&params),
            params,
            params_now: Vec::new(),
            spare: Vec::new(),
            flights: VecDeque::new(),
            done: VecDeque::new(),
            sampled: vec![false; kv.slots as usize],
            profile: Vec::new(),
            clock,
            words: Vec::new(),
            _weights: weights,
            buffers,
            kv,
            lowered,
            gpu,
        })
    }
}

/// Each kernel once, compiled beside the loading of weights.
fn build(
    gpu: &Gpu,
    file: &ModelFile,
    lists: &[&Vec<Call>],
    lowered: &Lowered,
    weights: &Weights,
) -> Result<HashMap<Kernel, ComputePipeline>, DeviceError> {
    let mut kernels: Vec<&Kernel> = Vec::new();
    let mut known = std::collections::HashSet::new();
    for call in lists.iter().flat_map(|list| list.iter()) {
        if known.insert(&call.kernel) {
            kernels.push(&call.kernel);
        }
    }
    let compile = |kernels: &[&Kernel]| -> Vec<(Kernel, ComputePipeline)> {
        kernels.iter().map(|&kernel| (kernel.clone(), gpu.pipeline(kernel))).collect()
    };
    if cfg!(target_family = "wasm") {
        load::fill(gpu, file, &lowered.regions, weights)?;
        return Ok(compile(&kernels).into_iter().collect());
    }
    std::thread::scope(|scope| {
        let each = kernels.len().div_ceil(gpu.threads.min(8)).max(1);
        let parts: Vec<_> = kernels.chunks(each).map(|part| scope.spawn(move || compile(part))).collect();
        load::fill(gpu, file, &lowered.regions, weights)?;
        let mut pipelines = HashMap::new();
        for part in parts {
            let part = part.join();
            pipelines.extend(part.map_err(|_| DeviceError::Lost("a kernel could not be compiled".into()))?);
        }
        gpu.fine()?;
        Ok(pipelines)
    })
}

fn bind(
    gpu: &Gpu,
    call: &Call,
    buffers: &HashMap<Buf, Buffer>,
    weights: &Weights,
    lowered: &Lowered,
) -> BindGroup {
    let one = |&buf: &Buf| match buf {
        Buf::Region(region) => {
            let place = &weights.places[region];
            (&weights.arenas[place.arena], place.offset, place.bytes)
        }
        Buf::Delta(k) => {
            let bytes = 4 * lowered.rows_max * lowered.hidden;
            (&buffers[&Buf::Deltas], (k * bytes) as u64, bytes as u64)
        }
        other => (&buffers[&other], 0, buffers[&other].size()),
    };
    let bound: Vec<(&Buffer, u64, u64)> = call.buffers.iter().map(one).collect();
    gpu.bind(&call.kernel, &bound)
}

impl Program for WgpuProgram {
    fn submit(&mut self, batch: Batch) -> Result<(), DeviceError> {
        self.gpu.fine()?;
        self.check(&batch).map_err(DeviceError::Unsupported)?;
        self.await_slots(&batch)?;
        self.record(batch)
    }

    fn poll(&mut self) -> Option<Result<StepOutput, DeviceError>> {
        if let Some(output) = self.done.pop_front() {
            return Some(Ok(output));
        }
        let flight = self.flights.front()?;
        if let Err(error) = self.gpu.poll(flight.submission.clone(), PATIENCE) {
            self.flights.clear();
            return Some(Err(error));
        }
        match flight.mapped.load(Ordering::Acquire) {
            n if n >= FAILED => {
                self.flights.clear();
                Some(Err(DeviceError::Lost("a buffer could not be mapped".into())))
            }
            n if n < flight.maps => None,
            _ => {
                let flight = self.flights.pop_front()?;
                Some(self.land(flight))
            }
        }
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    /// Dispatches so far, the weights that they read, and, where that was asked for, their time.
    fn profile(&self) -> Vec<StepTime> {
        self.profile.clone()
    }
}

impl WgpuProgram {
    /// What the caller guarantees, and that this range of layers can take the input and give what is wanted.
    fn check(&self, batch: &Batch) -> Result<(), String> {
        let embeds = !self.embed.is_empty();
        let heads = !self.head_one.is_empty();
        let mut all = 0;
        let mut seen = vec![false; self.sampled.len()];
        for segment in &batch.segments {
            let n = self.rows(segment);
            all += n;
            let slot = segment.slot as usize;
            match seen.get_mut(slot) {
                None => return Err(format!("slot {slot} of {}", self.sampled.len())),
                Some(true) => return Err(format!("slot {slot} is there twice")),
                Some(seen) => *seen = true,
            }
            let input_fits = match &segment.input {
                Input::Ids(ids) => embeds && ids.iter().all(|&id| (id as usize) < self.lowered.vocab),
                Input::LastSampled => embeds && heads && self.sampled[slot],
                Input::Hidden(x) => !embeds && x.len() % self.lowered.hidden == 0,
            };
            let want_fits = match &segment.want {
                Want::Nothing => true,
                Want::Sample(_) => heads,
                Want::Logits(last) => heads && *last as usize <= n,
                Want::Hidden => !heads,
            };
            if n == 0 || !input_fits || !want_fits {
                return Err(format!("slot {slot}: {n} rows of input that these layers can't take or answer"));
            }
            let end = segment.start as usize + n;
            if end > segment.blocks.len() * BLOCK_TOKENS
                || end > self.kv.blocks as usize * BLOCK_TOKENS
                || segment.blocks.iter().any(|&block| block >= self.kv.blocks)
            {
                return Err(format!("slot {slot}: its blocks don't hold {end} positions"));
            }
        }
        if all > self.kv.rows as usize {
            return Err(format!("{all} rows in a batch of at most {}", self.kv.rows));
        }
        Ok(())
    }

    fn rows(&self, segment: &Segment) -> usize {
        match &segment.input {
            Input::Ids(ids) => ids.len(),
            Input::LastSampled => 1,
            Input::Hidden(x) => x.len() / self.lowered.hidden,
        }
    }

    /// Waits for ids that are sampled here and that this batch goes on from.
    fn await_slots(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        for segment in &batch.segments {
            if segment.input != Input::LastSampled {
                continue;
            }
            let samples = |flight: &Flight| {
                let here =
                    |answer: &Answer| matches!(answer, Answer::Sample { slot, .. } if *slot == segment.slot);
                flight.answers.iter().any(here)
            };
            let Some(last) = self.flights.iter().rposition(samples) else { continue };
            for _ in 0..=last {
                let Some(flight) = self.flights.pop_front() else { break };
                self.gpu.wait(flight.submission.clone())?;
                let output = self.land(flight)?;
                self.done.push_back(output);
            }
        }
        Ok(())
    }

    /// Writes what the kernels need to know, records all dispatches, and submits.
    fn record(&mut self, batch: Batch) -> Result<(), DeviceError> {
        let step = self.describe(&batch);
        let mut answers = Vec::new();
        let (mut row, mut wanted) = (0, 0);
        let mut here = Vec::new();
        for segment in batch.segments {
            let rows = self.rows(&segment);
            let one = |here: &mut Vec<usize>, sampled_here: bool| {
                here.extend(sampled_here.then_some(wanted));
                wanted
            };
            let answer = match segment.want {
                Want::Nothing => Answer::Nothing,
                Want::Hidden => Answer::Hidden { first: row, rows },
                Want::Logits(n) => {
                    here.extend(wanted..wanted + n as usize);
                    Answer::Logits { first: wanted, rows: n as usize }
                }
                Want::Sample(spec) if on_gpu(&spec) => {
                    Answer::Id { row: one(&mut here, false), slot: segment.slot }
                }
                Want::Sample(spec) => Answer::Sample { row: one(&mut here, true), slot: segment.slot, spec },
            };
            match &answer {
                Answer::Id { .. } | Answer::Sample { .. } => {
                    wanted += 1;
                    self.sampled[segment.slot as usize] = true;
                }
                Answer::Logits { rows, .. } => wanted += rows,
                Answer::Nothing | Answer::Hidden { .. } => {}
            }
            answers.push(answer);
            row += rows;
        }
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
        if flight.answers.iter().any(|answer| matches!(answer, Answer::Id { .. })) {
            flight.ids = Some(self.read_back(&mut commands, Buf::Ids, 4 * wanted as u64));
        }
        if wants_hidden {
            let bytes = 4 * (step.rows * self.lowered.hidden) as u64;
            flight.hidden = Some(self.read_back(&mut commands, Buf::X(self.lowered.x_end), bytes));
        }
        if let Some(clock) = &mut self.clock {
            let buffer = take_spare(&mut self.spare, &self.gpu, 8 * (1 + clock.names.len()) as u64);
            flight.ticks = Some((clock.resolve(&mut commands, &buffer), std::mem::take(&mut clock.names)));
        }
        flight.submission = Some(self.gpu.queue.submit([commands.finish()]));
        let logits = flight.logits.iter().map(|run| &run.buffer);
        let ticks = flight.ticks.iter().map(|(buffer, _)| buffer);
        for buffer in flight.ids.iter().chain(&flight.hidden).chain(logits).chain(ticks) {
            flight.maps += 1;
            let mapped = flight.mapped.clone();
            buffer.slice(..).map_async(MapMode::Read, move |result| {
                mapped.fetch_add(if result.is_ok() { 1 } else { FAILED }, Ordering::Release);
            });
        }
        if flight.maps == 0 {
            // Nothing to read, but the step must have ended.
            let mapped = flight.mapped.clone();
            flight.maps = 1;
            self.gpu.queue.on_submitted_work_done(move || _ = mapped.fetch_add(1, Ordering::Release));
        }
        self.flights.push_back(flight);
        Ok(())
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
                play(pass, list, &self.params_bound, (0, rows), step, &mut self.clock);
                count(&mut self.profile, list, step);
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
                play(&mut on, list, &self.params_bound, (chunk + 1, rows as u32), step, &mut self.clock);
                count(&mut self.profile, list, step);
            }
            if let (Some(&low), Some(&high)) = (low, high) {
                drop(on);
                let width = 4 * self.lowered.vocab as u64;
                let bytes = width * (high + 1 - low) as u64;
                let buffer = take_spare(&mut self.spare, &self.gpu, bytes);
                let from = width * (low - first) as u64;
                commands.copy_buffer_to_buffer(&self.buffers[&Buf::Logits], from, &buffer, 0, bytes);
                runs.push(Run { first: low, rows: high + 1 - low, buffer });
            } else {
                pass = Some(on);
            }
        }
        runs
    }

    /// A copy of a buffer's beginning that can be mapped.
    fn read_back(&mut self, commands: &mut CommandEncoder, from: Buf, bytes: u64) -> Buffer {
        let buffer = take_spare(&mut self.spare, &self.gpu, bytes);
        commands.copy_buffer_to_buffer(&self.buffers[&from], 0, &buffer, 0, bytes);
        buffer
    }

    /// Puts rows, wanted rows, block tables, parameters and hidden input where the kernels look for them.
    fn describe(&mut self, batch: &Batch) -> Shape {
        let (hidden, wanted_at, tables_at) =
            (self.lowered.hidden, self.lowered.wanted_at, self.lowered.tables_at);
        let mut shape = Shape { rows: 0, prefill: false, spans: 1 };
        let mut end_max = 0;
        let mut words = std::mem::take(&mut self.words);
        let (mut wanted, mut tables) = (Vec::new(), Vec::new());
        words.clear();
        for segment in &batch.segments {
            let rows = self.rows(segment);
            let end = segment.start as usize + rows;
            let table = tables.len() as u32;
            tables.extend_from_slice(&segment.blocks[..end.div_ceil(BLOCK_TOKENS)]);
            shape.prefill |= rows > 1;
            end_max = end_max.max(end);
            for i in 0..rows {
                let id = match &segment.input {
                    Input::Ids(ids) => ids[i],
                    Input::LastSampled | Input::Hidden(_) => LAST,
                };
                words.extend([segment.start + i as u32, table, id, segment.slot]);
            }
            if let Input::Hidden(x) = &segment.input {
                let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
                let at = 4 * (shape.rows * hidden) as u64;
                self.gpu.queue.write_buffer(&self.buffers[&Buf::X(0)], at, &bytes);
            }
            let last = (shape.rows + rows) as u32;
            match &segment.want {
                Want::Nothing | Want::Hidden => {}
                Want::Logits(n) => (last - n..last).for_each(|row| wanted.extend([row, 0, 0, 0, 0, 0, 0, 0])),
                Want::Sample(spec) => wanted.extend(want(last - 1, spec, segment.slot)),
            }
            shape.rows += rows;
        }
        let spans = end_max.div_ceil(SPAN);
        let groups = shape.rows * self.lowered.kv_heads;
        if spans >= SPLIT_SPANS && groups < SPLIT_GROUPS && shape.rows * spans <= self.lowered.partials {
            shape.spans = spans;
        }
        let count = wanted.len() / WANT_WORDS;
        for (at, words) in [(0, &words), (wanted_at, &wanted), (tables_at, &tables)] {
            if !words.is_empty() {
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                self.gpu.queue.write_buffer(&self.buffers[&Buf::Step], 4 * at as u64, &bytes);
            }
        }
        self.words = words;
        self.set_params(&shape, count);
        shape
    }

    fn set_params(&mut self, shape: &Shape, wanted: usize) {
        let each = self.lowered.logits_rows;
        let mut params = vec![[shape.rows as u32, 0, u32::from(!shape.prefill), shape.spans as u32]];
        params.extend((0..wanted).step_by(each).map(|first| {
            let rows = each.min(wanted - first);
            [rows as u32, first as u32, 0, 0]
        }));
        let mut bytes = vec![0; params.len() * PARAMS_STRIDE as usize];
        for (words, out) in params.iter().zip(bytes.chunks_exact_mut(PARAMS_STRIDE as usize)) {
            words.iter().zip(out.chunks_exact_mut(4)).for_each(|(w, o)| o.copy_from_slice(&w.to_le_bytes()));
        }
        if bytes != self.params_now {
            self.gpu.queue.write_buffer(&self.params, 0, &bytes);
            self.params_now = bytes;
        }
    }

    /// Reads what a finished step has brought, and samples what is sampled here.
    fn land(&mut self, flight: Flight) -> Result<StepOutput, DeviceError> {
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
                Answer::Id { row, .. } => {
                    let id = ids.get(*row).copied().unwrap_or_default();
                    SegmentOutput::Sampled(crate::program::Sampled { id, logprobs: None })
                }
                Answer::Sample { row, slot, spec } => {
                    let sampled = sampling::sample(&mut logits(*row, 1)?, spec);
                    self.remember(*slot, sampled.id);
                    SegmentOutput::Sampled(sampled)
                }
                Answer::Logits { first, rows } => SegmentOutput::Logits(logits(*first, *rows)?),
                Answer::Hidden { first, rows } => match &flight.hidden {
                    Some(buffer) => SegmentOutput::Hidden(floats(buffer, first * hidden, rows * hidden)?),
                    None => SegmentOutput::Nothing,
                },
            });
        }
        if let (Some((buffer, names)), Some(clock)) = (&flight.ticks, &self.clock) {
            let view = buffer.slice(..).get_mapped_range().map_err(lost)?;
            clock.add(&view, names, &mut self.profile);
        }
        let ticks = flight.ticks.into_iter().map(|(buffer, _)| buffer);
        let logits = flight.logits.into_iter().map(|run| run.buffer);
        for buffer in flight.ids.into_iter().chain(flight.hidden).chain(logits).chain(ticks) {
            buffer.unmap();
            self.spare.push(buffer);
        }
        self.spare.truncate(4 * DEPTH);
        Ok(output)
    }

    /// An id that was sampled here, for the next step's embedding; unless the slot has sampled again since.
    fn remember(&self, slot: u32, id: u32) {
        let again = |answer: &Answer| match answer {
            Answer::Id { slot: other, .. } | Answer::Sample { slot: other, .. } => *other == slot,
            _ => false,
        };
        if self.flights.iter().flat_map(|flight| &flight.answers).any(again) {
            return;
        }
        self.gpu.queue.write_buffer(&self.buffers[&Buf::Last], 4 * u64::from(slot), &id.to_le_bytes());
    }
}

/// Records a list of dispatches with the parameters of that number.
fn play(
    pass: &mut ComputePass<'_>,
    list: &[Ready],
    params_bound: &BindGroup,
    (params, rows): (usize, u32),
    step: &Shape,
    clock: &mut Option<Clock>,
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
        if let Some(clock) = clock {
            clock.before(pass);
        }
        pass.dispatch_workgroups(ready.width, height, step.spans.min(ready.spans) as u32);
        if let Some(clock) = clock {
            clock.after(pass, ready.name);
        }
    }
}

/// Reads the GPU's clock between dispatches.
struct Clock {
    queries: QuerySet,
    resolved: Buffer,
    tick_nanos: f64,
    /// Of the dispatches of this step.
    names: Vec<&'static str>,
}

impl Clock {
    const TICKS: u32 = 4096;

    fn new(gpu: &Gpu, tick_nanos: f64) -> Clock {
        let queries = gpu.device.create_query_set(&QuerySetDescriptor {
            label: None,
            ty: QueryType::Timestamp,
            count: Clock::TICKS,
        });
        let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
        let resolved = gpu.buffer("ticks", 8 * u64::from(Clock::TICKS), usage);
        Clock { queries, resolved, tick_nanos, names: Vec::new() }
    }

    fn before(&mut self, pass: &mut ComputePass<'_>) {
        if self.names.is_empty() {
            pass.write_timestamp(&self.queries, 0);
        }
    }

    fn after(&mut self, pass: &mut ComputePass<'_>, name: &'static str) {
        if self.names.len() + 1 < Clock::TICKS as usize {
            self.names.push(name);
            pass.write_timestamp(&self.queries, self.names.len() as u32);
        }
    }

    fn resolve(&self, commands: &mut CommandEncoder, into: &Buffer) -> Buffer {
        let ticks = 1 + self.names.len() as u32;
        commands.resolve_query_set(&self.queries, 0..ticks, &self.resolved, 0);
        commands.copy_buffer_to_buffer(&self.resolved, 0, into, 0, 8 * u64::from(ticks));
        into.clone()
    }

    fn add(&self, ticks: &[u8], names: &[&'static str], profile: &mut [StepTime]) {
        let at = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| ticks[8 * i + k]));
        for (i, name) in names.iter().enumerate() {
            if let Some(step) = profile.iter_mut().find(|step| step.name == *name) {
                step.nanos += (at(i + 1).saturating_sub(at(i)) as f64 * self.tick_nanos) as u64;
            }
        }
    }
}

fn count(profile: &mut Vec<StepTime>, list: &[Ready], step: &Shape) {
    for ready in list.iter().filter(|ready| step.includes(ready.when)) {
        match profile.iter_mut().find(|step| step.name == ready.name) {
            Some(step) => (step.count, step.bytes) = (step.count + 1, step.bytes + ready.bytes),
            None => profile.push(StepTime { name: ready.name, count: 1, nanos: 0, bytes: ready.bytes }),
        }
    }
}

/// The size of a step.
struct Shape {
    rows: usize,
    /// Whether a segment has several rows.
    prefill: bool,
    /// Spans of the longest row's attention, 1 where each row's is computed whole.
    spans: usize,
}

impl Shape {
    fn includes(&self, when: When) -> bool {
        match when {
            When::Always => true,
            When::Prefill => self.prefill,
            When::Split => self.spans > 1,
            When::Whole => self.spans == 1,
        }
    }
}

/// Whether the GPU can choose the token by itself.
fn on_gpu(spec: &SampleSpec) -> bool {
    let s = &*spec.sampling;
    let greedy = s.temperature < GREEDY_BELOW;
    (greedy || (s.top_k == 0 && s.top_p >= 1.0))
        && spec.counts.is_empty()
        && spec.mask.is_none()
        && s.logit_bias.is_empty()
        && s.logprobs.is_none()
}

/// A wanted row, as `sample.wgsl` reads it.
fn want(row: u32, spec: &SampleSpec, slot: u32) -> [u32; WANT_WORDS] {
    let s = &*spec.sampling;
    let inverse = if s.temperature < GREEDY_BELOW { 0.0 } else { 1.0 / s.temperature };
    let floor = if s.min_p > 0.0 { s.min_p.ln() } else { -3e38f32 };
    let sampled = u32::from(on_gpu(spec));
    let (low, high) = (s.seed as u32, (s.seed >> 32) as u32);
    [row, sampled, inverse.to_bits(), floor.to_bits(), low, high, spec.position, slot]
}

/// A mappable buffer of at least so many bytes.
fn take_spare(spare: &mut Vec<Buffer>, gpu: &Gpu, bytes: u64) -> Buffer {
    let fits = |buffer: &Buffer| (bytes..=4 * bytes.max(1024)).contains(&buffer.size());
    match spare.iter().position(fits) {
        Some(at) => spare.swap_remove(at),
        None => {
            let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
            gpu.buffer("read back", bytes.next_power_of_two().min(bytes + (1 << 20)), usage)
        }
    }
}
