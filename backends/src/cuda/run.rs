//! Runs batches: describes them to the GPU, launches the steps, collects what they gave.
use super::args::{EnterArgs, FinishArgs, SampleArgs, SettleArgs};
use super::driver::{Buffer, Gpu, Graph, Pinned, Stream};
use super::forms::{PAIR, PROMPT_WIDTHS, WIDE, WIDTHS};
use super::kernels::Kernels;
use super::load::{AttendStep, GemmStep, Low, Lowered, SPAN, SettleStep, TOGETHER, apart};
use super::trace::Trace;
use crate::program::{
    Batch, DeviceError, Input, KvLayout, Program, SampleSpec, Sampled, SegmentOutput, StepOutput, StepTime,
    Terms, Want,
};
use crate::sampling::{self, GREEDY_BELOW};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use weir_scheduler::BLOCK_TOKENS;

/// Steps that may be in flight.
const DEPTH: usize = 4;
/// Descriptions of steps that may be on their way; one more than [`DEPTH`], for those without a result.
const RING: usize = DEPTH + 2;
/// Chunks in which logits are searched, `CHUNKS` of `rows.cu`.
const CHUNKS: usize = 64;
/// Words of a `Choice` of `rows.cu`.
const CHOICE: usize = 9;
/// Polls after which the GPU is asked whether it is still well.
const PATIENCE: u32 = 1000;

/// Where the parts of a step's description lie, in words. There are two such layouts, one for few rows.
#[derive(Clone, Copy)]
struct Layout {
    rows: usize,
    choices: usize,
}

impl Layout {
    const STEP: usize = 0;
    fn array(self, i: usize) -> usize {
        4 + i * self.rows
    }
    fn position(self) -> usize {
        self.array(0)
    }
    fn id(self) -> usize {
        self.array(1)
    }
    fn slot(self) -> usize {
        self.array(2)
    }
    fn table(self) -> usize {
        self.array(3)
    }
    /// Rows whose logits are wanted.
    fn map(self) -> usize {
        self.array(4)
    }
    fn tile_row(self) -> usize {
        self.array(5)
    }
    fn tile_rows(self) -> usize {
        self.array(6)
    }
    fn partial_at(self) -> usize {
        self.array(7)
    }
    fn choice(self) -> usize {
        self.array(8)
    }
    fn blocks(self) -> usize {
        self.choice() + self.choices * CHOICE
    }
}

/// Longest segment of output whose rows attend one by one.
const ALONE_MAX: usize = 32;

/// The size of a step, apart from what its description says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    /// Of output; they come first.
    rows: usize,
    /// Of prompts.
    prompts: usize,
    /// Most spans of a row of output; 0: whole tiles instead.
    splits: usize,
    /// Some segment of output has several rows.
    several: bool,
    /// Tiles of rows: of output, of prompts. Those of prompts are described first.
    tiles: [usize; 2],
    sampled: usize,
    /// Whether some row's tokens are truncated.
    cut: bool,
    /// Whether every row takes its likeliest token.
    greedy: bool,
}

/// Rows that take the same kernels.
#[derive(Clone, Copy)]
struct Rows {
    first: usize,
    n: usize,
    prompt: bool,
}

/// A step on its way.
struct Flight {
    number: u32,
    outputs: Vec<SegmentOutput>,
    /// For each sampled row, its segment and where its id comes.
    sampled: Vec<usize>,
    ring: usize,
    ready: bool,
}

/// A compiled range of layers.
pub struct CudaProgram {
    // freed in this order
    graphs: HashMap<Shape, Graph>,
    kernels: Kernels,
    low: Lowered,
    kv: KvLayout,
    describe: Vec<Pinned>,
    described: Buffer,
    /// Ids of sampled rows, one line a step of the ring; the last word counts steps done.
    results: Pinned,
    _arena: Buffer,
    stream: Stream,
    gpu: Arc<Gpu>,
    flights: VecDeque<Flight>,
    number: u32,
    polls: u32,
    trace: Trace,
}

/// Shapes whose graphs are kept. A pool of 16 sequences and contexts up to 32k has about as many.
const GRAPHS: usize = 128;

impl CudaProgram {
    pub fn new(
        gpu: Arc<Gpu>,
        stream: Stream,
        arena: Buffer,
        low: Lowered,
        kernels: Kernels,
        kv: KvLayout,
    ) -> Result<CudaProgram, DeviceError> {
        let large = layout(kv, kv.rows as usize);
        let tables = kv.slots as usize * kv.blocks as usize;
        let words = large.blocks().max(layout(kv, 1).blocks()) + tables;
        let describe = (0..RING).map(|_| Pinned::zeroed(&gpu, words * 4)).collect::<Result<_, _>>()?;
        let described = Buffer::zeroed(&gpu, words * 4, &stream)?;
        let results = Pinned::zeroed(&gpu, (RING * line(kv) + 1) * 4)?;
        let trace = Trace::new(&gpu, &stream)?;
        stream.wait()?;
        Ok(CudaProgram {
            graphs: HashMap::new(),
            kernels,
            low,
            kv,
            describe,
            described,
            results,
            _arena: arena,
            stream,
            gpu,
            flights: VecDeque::new(),
            number: 0,
            polls: 0,
            trace,
        })
    }
}

/// Results of a step, at most.
fn line(kv: KvLayout) -> usize {
    (kv.slots as usize).max(TOGETHER)
}

fn layout(kv: KvLayout, rows: usize) -> Layout {
    let rows = if rows <= TOGETHER { TOGETHER } else { kv.rows as usize };
    Layout { rows, choices: line(kv) }
}

impl Drop for CudaProgram {
    fn drop(&mut self) {
        // what is in flight uses the memory that is about to go
        if self.gpu.enter().is_ok() {
            _ = self.stream.wait();
        }
    }
}

impl Program for CudaProgram {
    fn submit(&mut self, batch: Batch) -> Result<(), DeviceError> {
        batch.check(&self.terms())?;
        self.gpu.enter()?;
        while self.flights.len() >= RING - 1 {
            // more than was asked for: make room
            self.stream.wait()?;
            let Some(waiting) = self.flights.iter_mut().find(|f| !f.ready) else { break };
            collect(&self.results, self.kv, waiting);
            if self.flights.iter().all(|f| f.ready) {
                break;
            }
        }
        self.start(&batch)
    }

    fn poll(&mut self) -> Option<Result<StepOutput, DeviceError>> {
        let flight = self.flights.front_mut()?;
        if !flight.ready {
            let done = self.results.word(RING * line(self.kv));
            if (done.wrapping_sub(flight.number) as i32) < 0 {
                self.polls += 1;
                if !self.polls.is_multiple_of(PATIENCE) {
                    return None;
                }
                return self.gpu.enter().and_then(|()| self.stream.done()).err().map(Err);
            }
            collect(&self.results, self.kv, flight);
        }
        self.polls = 0;
        let flight = self.flights.pop_front()?;
        Some(Ok(StepOutput { segments: flight.outputs }))
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    fn prompts_apart(&self) -> bool {
        self.low.prompts
    }

    fn profile(&self) -> Vec<StepTime> {
        self.trace.sums()
    }
}

/// Takes the ids of a finished step.
fn collect(results: &Pinned, kv: KvLayout, flight: &mut Flight) {
    // ids were written before the word that says so
    fence(Ordering::Acquire);
    for (i, segment) in flight.sampled.iter().enumerate() {
        let id = results.word(flight.ring * line(kv) + i);
        push(&mut flight.outputs[*segment], Sampled { id, logprobs: None });
    }
    flight.ready = true;
}

/// Adds what was sampled after a segment's next row.
fn push(output: &mut SegmentOutput, sampled: Sampled) {
    match output {
        SegmentOutput::Sampled(all) => all.push(sampled),
        other => *other = SegmentOutput::Sampled(vec![sampled]),
    }
}

/// Whether the GPU samples by this itself.
fn simple(spec: &SampleSpec) -> bool {
    let s = &*spec.sampling;
    let penalties = s.repetition_penalty != 1.0 || s.frequency_penalty != 0.0 || s.presence_penalty != 0.0;
    s.logit_bias.is_empty()
        && (spec.counts.is_empty() || !penalties)
        && spec.mask.is_none()
        && s.logprobs.is_none()
}

/// Whether only the likeliest tokens may win.
fn truncated(spec: &SampleSpec) -> bool {
    let s = &*spec.sampling;
    s.temperature >= GREEDY_BELOW && (s.top_k != 0 || s.top_p < 1.0)
}

/// A batch, taken apart.
struct Prepared {
    shape: Shape,
    layout: Layout,
    /// Segment of each row whose logits are wanted.
    wanted: Vec<usize>,
    /// First row of each segment.
    first: Vec<usize>,
    on_device: bool,
    words: usize,
}

impl CudaProgram {
    fn terms(&self) -> Terms {
        Terms {
            kv: self.kv,
            vocab: self.low.vocab,
            hidden: self.low.hidden,
            embeds: self.low.embeds,
            heads: self.low.head.is_some(),
        }
    }

    fn start(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        self.number = self.number.wrapping_add(1);
        let ring = self.number as usize % RING;
        let prepared = self.prepare(batch, ring);
        let hidden = self.low.hidden;
        // SAFETY: the description has room for all its words; the pinned copy is used again only once the step is done.
        unsafe { self.stream.upload(self.described.at, self.describe[ring].host, prepared.words * 4)? };
        for (segment, first) in batch.segments.iter().zip(&prepared.first) {
            if let Input::Hidden(x) = &segment.input {
                // SAFETY: rows were checked against the room for them.
                unsafe {
                    let to = self.low.enter.x + (first * hidden * 4) as u64;
                    self.stream.upload(to, x.as_ptr().cast(), size_of_val(&x[..]))?;
                }
            }
        }
        self.trace.begin(&self.stream)?;
        let shape = prepared.shape;
        let replayed = shape.splits > 0
            && shape.prompts == 0
            && self.low.embeds
            && self.low.head.is_some()
            && shape.sampled > 0;
        if replayed {
            if self.trace.is_on() {
                // captured anew, so that launches have names
                self.graphs.clear();
            }
            if !self.graphs.contains_key(&shape) {
                if self.graphs.len() >= GRAPHS {
                    // one of them may be running
                    self.stream.wait()?;
                    self.graphs.clear();
                }
                let graph = self.stream.capture(|| self.launch(shape, prepared.layout))?;
                self.graphs.insert(shape, graph);
            }
            self.stream.replay(&self.graphs[&shape])?;
        } else {
            self.launch(shape, prepared.layout)?;
        }
        let mut flight = Flight {
            number: self.number,
            outputs: vec![SegmentOutput::Nothing; batch.segments.len()],
            sampled: Vec::new(),
            ring,
            ready: false,
        };
        if prepared.on_device {
            flight.sampled = prepared.wanted;
        } else if !prepared.wanted.is_empty() {
            self.sample_here(batch, &prepared, &mut flight)?;
        }
        self.hidden_out(batch, &prepared.first, &mut flight)?;
        self.trace.end(&self.stream)?;
        self.flights.push_back(flight);
        Ok(())
    }

    /// Writes the description of a step.
    fn prepare(&mut self, batch: &Batch, ring: usize) -> Prepared {
        let hidden = self.low.hidden;
        let counts: Vec<usize> = batch.segments.iter().map(|s| s.input.rows(hidden)).collect();
        let rows: usize = counts.iter().sum();
        let l = layout(self.kv, rows);
        let mut first = vec![0; counts.len()];
        let mut wanted = Vec::new();
        let on_device = batch.segments.iter().all(|s| match &s.want {
            Want::Sample(specs) => specs.iter().all(simple),
            Want::Logits(_) => false,
            Want::Nothing | Want::Hidden => true,
        });
        let is_prompt = |i: &usize| self.low.prompts && batch.segments[*i].prompt;
        let (prompts, output): (Vec<usize>, Vec<usize>) = (0..counts.len()).partition(is_prompt);
        let decoded: usize = output.iter().map(|i| counts[*i]).sum();
        let tile_rows =
            self.low.steps.iter().find_map(|s| if let Low::Attend(a) = s { Some(a.tile_rows) } else { None });
        let tile_rows = tile_rows.unwrap_or(1);
        let of_prompts: usize = prompts.iter().map(|i| counts[*i].div_ceil(tile_rows)).sum();
        let (mut row, mut tables, mut tiles, mut partials, mut splits) = (0, 0, [of_prompts, 0], 0, 1);
        let capacity = self.describe[ring].bytes / 4;
        let w = self.describe[ring].words(capacity);
        w[Layout::STEP] = self.number;
        // rows of output come first, and each kind's kernels count from its own first row
        for i in output.iter().chain(&prompts).copied() {
            let (s, n) = (&batch.segments[i], counts[i]);
            let prompt = row >= decoded;
            first[i] = row;
            let end = s.start as usize + n;
            let blocks = &s.blocks[..end.div_ceil(BLOCK_TOKENS)];
            w[l.blocks() + tables..][..blocks.len()].copy_from_slice(blocks);
            for j in 0..n {
                w[l.position() + row + j] = s.start + j as u32;
                w[l.id() + row + j] = match &s.input {
                    Input::Ids(ids) => ids[j],
                    Input::LastSampled => -1i32 as u32,
                    Input::Hidden(_) => -2i32 as u32,
                };
                w[l.slot() + row + j] = s.slot;
                w[l.table() + row + j] = tables as u32;
                w[l.partial_at() + row + j] = partials as u32;
                partials += if prompt { 0 } else { (s.start as usize + j) / SPAN + 1 };
            }
            let own = if prompt { row - decoded } else { row };
            for j in (0..n).step_by(tile_rows) {
                let tile = &mut tiles[usize::from(prompt)];
                w[l.tile_row() + *tile] = (own + j) as u32;
                w[l.tile_rows() + *tile] = (n - j).min(tile_rows) as u32;
                *tile += 1;
            }
            if !prompt {
                splits = splits.max(end.div_ceil(SPAN));
            }
            let logits = s.want.rows();
            for (j, r) in (row + n - logits..row + n).enumerate() {
                w[l.map() + wanted.len()] = r as u32;
                if let Want::Sample(specs) = &s.want
                    && on_device
                {
                    let at = l.choice() + wanted.len() * CHOICE;
                    w[at..at + CHOICE].copy_from_slice(&choice(
                        &specs[j],
                        s.slot,
                        ring * line(self.kv) + wanted.len(),
                    ));
                }
                wanted.push(i);
            }
            row += n;
            tables += blocks.len();
        }
        let longest = output.iter().map(|i| counts[*i]).max().unwrap_or(0);
        let apart = decoded <= TOGETHER && longest <= ALONE_MAX && partials <= self.low.partials;
        let specs = || {
            let wants = batch.segments.iter().map(|s| &s.want);
            wants.flat_map(|want| if let Want::Sample(specs) = want { &specs[..] } else { &[] })
        };
        let shape = Shape {
            rows: decoded,
            prompts: rows - decoded,
            splits: if apart { splits.next_power_of_two() } else { 0 },
            several: longest > 1,
            tiles: [if apart { 0 } else { tiles[0] - of_prompts }, of_prompts],
            sampled: if on_device { wanted.len() } else { 0 },
            cut: on_device && specs().any(truncated),
            greedy: on_device && specs().all(|s| s.sampling.temperature < GREEDY_BELOW),
        };
        Prepared { shape, layout: l, wanted, first, on_device, words: l.blocks() + tables }
    }

    /// Launches every step but what logits are for.
    fn launch(&self, shape: Shape, l: Layout) -> Result<(), DeviceError> {
        let at = |word: usize| self.described.at + 4 * word as u64;
        let enter = EnterArgs {
            ids: at(l.id()),
            slots: at(l.slot()),
            positions: at(l.position()),
            trace: self.trace.next("embed", 0),
            ..self.low.enter
        };
        // prompts' rows are prepared otherwise
        let settled = self.kernels.enter_settled.as_ref().filter(|_| shape.prompts == 0);
        let grid = [shape.rows + shape.prompts, self.low.hidden.div_ceil(256), 1];
        // SAFETY: here and below: arguments are the kernels', and point into the arena and the description.
        unsafe { self.stream.launch(settled.unwrap_or(&self.kernels.enter), grid, &enter)? };
        let kinds = [
            Rows { first: 0, n: shape.rows, prompt: false },
            Rows { first: shape.rows, n: shape.prompts, prompt: true },
        ];
        for step in &self.low.steps[usize::from(settled.is_some())..] {
            for rows in kinds.into_iter().filter(|r| r.n > 0) {
                match step {
                    Low::Gemm(s) if rows.prompt => self.prompt(s, rows)?,
                    Low::Gemm(s) => self.gemm(s, rows.n, 0)?,
                    Low::Settle(s) => self.settle(s, rows)?,
                    Low::Attend(s) => self.attend(s, rows, shape, l)?,
                }
            }
        }
        if shape.sampled > 0 {
            self.sample(shape, l)
        } else {
            let args = FinishArgs { flag: self.flag(), step: at(Layout::STEP) };
            unsafe { self.stream.launch(&self.kernels.finish, [1, 1, 1], &args) }
        }
    }

    fn flag(&self) -> u64 {
        self.results.at + 4 * (RING * line(self.kv)) as u64
    }

    /// `map`: where the rows that are the columns are named; 0: all of them.
    fn gemm(&self, s: &GemmStep, columns: usize, map: u64) -> Result<(), DeviceError> {
        let (width, chip) = (WIDTHS.iter().position(|most| *most >= columns), self.low.chip);
        let mut args = s.args;
        (args.columns, args.map) = (columns as i32, map);
        args.trace = self.trace.next(s.name, s.bytes);
        (args.partial, args.arrived) = (self.low.segments, self.low.segments_arrived);
        let (kernel, grid) = match width {
            Some(width) => (width, [s.units[0], 1, 1]),
            None => {
                let tiles = columns.div_ceil(WIDE);
                (WIDTHS.len(), [tiles, s.units[1], apart(s, tiles, chip)])
            }
        };
        // SAFETY: as in `launch`.
        unsafe { self.stream.launch(&self.kernels.gemms[s.kernel][kernel], grid, &args) }
    }

    /// A product of prompts' rows.
    fn prompt(&self, s: &GemmStep, rows: Rows) -> Result<(), DeviceError> {
        let mut args = s.args;
        args.columns = rows.n as i32;
        args.trace = self.trace.next(s.name, s.bytes);
        args.out += (rows.first * s.stride * 4) as u64;
        let blocks = self.low.hidden / 32;
        args.input = args.input.at_row(rows.first, s.pairs, blocks);
        args.next = args.next.at_row(rows.first, s.next_pairs, blocks);
        let width = PROMPT_WIDTHS.iter().position(|most| *most >= rows.n).unwrap_or(PROMPT_WIDTHS.len() - 1);
        let grid = [rows.n.div_ceil(PROMPT_WIDTHS[width]), s.units[1], 1];
        // SAFETY: as in `launch`.
        unsafe { self.stream.launch(&self.kernels.prompts[s.kernel][width], grid, &args) }
    }

    fn settle(&self, s: &SettleStep, rows: Rows) -> Result<(), DeviceError> {
        let hidden = self.low.hidden;
        let mut args = SettleArgs { trace: self.trace.next("settle", 0), ..s.args };
        args.x += (rows.first * hidden * 4) as u64;
        args.y += (rows.first * hidden * 4) as u64;
        args.next = args.next.at_row(rows.first, hidden.div_ceil(PAIR), hidden / 32);
        let kernel = s.kernels[usize::from(rows.prompt)];
        // SAFETY: as in `launch`.
        unsafe { self.stream.launch(&self.kernels.settles[kernel], [rows.n, s.blocks, 1], &args) }
    }

    fn attend(&self, s: &AttendStep, rows: Rows, shape: Shape, l: Layout) -> Result<(), DeviceError> {
        let at = |word: usize| self.described.at + 4 * word as u64;
        let stride = (s.heads.heads + 2 * s.heads.kv_heads) * s.heads.head_dim;
        let mut args = s.args;
        args.cache.qkv += (rows.first * stride * 4) as u64;
        args.cache.angles += (rows.first * s.angles * 8) as u64;
        args.cache.position = at(l.position() + rows.first);
        args.cache.table = at(l.table() + rows.first);
        args.cache.blocks = at(l.blocks());
        args.partial_at = at(l.partial_at());
        let (kernels, kind) = (&self.kernels.attends[s.kernel], usize::from(rows.prompt));
        let tile = [shape.tiles[1], 0][kind];
        args.tile_row = at(l.tile_row() + tile);
        args.tile_rows = at(l.tile_rows() + tile);
        let alone = shape.splits > 0 && !rows.prompt;
        // SAFETY: as in `launch`.
        unsafe {
            args.cache.trace = self.trace.next("attend", 0);
            if !alone || shape.several {
                self.stream.launch(&kernels.fill, [rows.n, 1, 1], &args.cache)?;
                args.cache.trace = self.trace.next("attend", 0);
            }
            if alone {
                // a window of w positions touches this many spans at most
                let most = s.window.map_or(usize::MAX, |w| w.div_ceil(SPAN) + 1);
                let kernel = if shape.several { &kernels.filled } else { &kernels.split };
                return self.stream.launch(kernel, [s.heads.kv_heads, shape.splits.min(most), rows.n], &args);
            }
            let kernel = if rows.prompt { &kernels.prompt } else { &kernels.tile };
            self.stream.launch(kernel, [shape.tiles[kind], s.heads.kv_heads, 1], &args)
        }
    }

    /// The head, and the choice of an id for each row that wants one.
    fn sample(&self, shape: Shape, l: Layout) -> Result<(), DeviceError> {
        let Some(head) = &self.low.head else { return Ok(()) };
        let at = |word: usize| self.described.at + 4 * word as u64;
        for from in (0..shape.sampled).step_by(TOGETHER) {
            let n = (shape.sampled - from).min(TOGETHER);
            self.gemm(head, n, at(l.map() + from))?;
            let args = SampleArgs {
                logits: self.low.logits,
                choices: at(l.choice() + from * CHOICE),
                most: self.low.most,
                best: self.low.best,
                cut: if shape.cut { self.low.cut } else { 0 },
                arrived: self.low.arrived,
                last: self.low.last,
                out: self.results.at,
                flag: self.flag(),
                step: at(Layout::STEP),
                rows_done: self.low.rows_done,
                trace: self.trace.next("sample", 0),
                rows: shape.sampled as i32,
            };
            // SAFETY: as in `launch`.
            unsafe {
                if shape.greedy {
                    self.stream.launch(&self.kernels.greedy, [CHUNKS, n, 1], &args)?;
                    continue;
                }
                self.stream.launch(&self.kernels.most, [CHUNKS, n, 1], &args)?;
                if shape.cut {
                    let args = SampleArgs { trace: self.trace.next("sample", 0), ..args };
                    self.stream.launch(&self.kernels.cut, [n, 1, 1], &args)?;
                }
                let args = SampleArgs { trace: self.trace.next("sample", 0), ..args };
                self.stream.launch(&self.kernels.pick, [CHUNKS, n, 1], &args)?;
            }
        }
        Ok(())
    }

    /// Fetches logits, and chooses by them where the request asks for more than the GPU does.
    fn sample_here(
        &mut self,
        batch: &Batch,
        prepared: &Prepared,
        flight: &mut Flight,
    ) -> Result<(), DeviceError> {
        let Some(head) = &self.low.head else { return Ok(()) };
        let vocab = self.low.vocab;
        let room = TOGETHER.min(self.kv.rows as usize);
        for (i, chunk) in prepared.wanted.chunks(room).enumerate() {
            let map = self.described.at + 4 * (prepared.layout.map() + i * room) as u64;
            self.gemm(head, chunk.len(), map)?;
            let mut logits = vec![0f32; chunk.len() * vocab];
            self.stream.download(&mut logits, self.low.logits)?;
            for (row, segment) in logits.chunks_exact_mut(vocab).zip(chunk) {
                let s = &batch.segments[*segment];
                match &s.want {
                    Want::Sample(specs) => {
                        let done = match &flight.outputs[*segment] {
                            SegmentOutput::Sampled(all) => all.len(),
                            _ => 0,
                        };
                        let sampled = sampling::sample(row, &specs[done]);
                        // SAFETY: the slot was checked.
                        unsafe { self.stream.set(self.low.last + 4 * u64::from(s.slot), sampled.id)? };
                        push(&mut flight.outputs[*segment], sampled);
                    }
                    _ => match &mut flight.outputs[*segment] {
                        SegmentOutput::Logits(all) => all.extend_from_slice(row),
                        other => *other = SegmentOutput::Logits(row.to_vec()),
                    },
                }
            }
        }
        flight.ready = true;
        Ok(())
    }

    fn hidden_out(&self, batch: &Batch, first: &[usize], flight: &mut Flight) -> Result<(), DeviceError> {
        let hidden = self.low.hidden;
        for (i, segment) in batch.segments.iter().enumerate().filter(|(_, s)| s.want == Want::Hidden) {
            let mut out = vec![0f32; segment.input.rows(hidden) * hidden];
            self.stream.download(&mut out, self.low.enter.x + (first[i] * hidden * 4) as u64)?;
            flight.outputs[i] = SegmentOutput::Hidden(out);
        }
        Ok(())
    }
}

/// A `Choice` of `rows.cu`.
fn choice(spec: &SampleSpec, slot: u32, place: usize) -> [u32; CHOICE] {
    let s = &*spec.sampling;
    let inverse = if s.temperature < GREEDY_BELOW { 0.0 } else { 1.0 / s.temperature };
    let floor = if s.min_p > 0.0 { s.min_p.ln() } else { f32::NEG_INFINITY };
    [
        f32::to_bits(inverse),
        floor.to_bits(),
        s.seed as u32,
        (s.seed >> 32) as u32,
        spec.position,
        slot,
        place as u32,
        s.top_k,
        s.top_p.to_bits(),
    ]
}
