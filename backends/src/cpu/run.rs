//! Runs batches: all threads walk the steps of the plan together.
use super::attend::{self, AttendArgs, Lanes, Query, SPAN};
use super::gemm::{Acts, Gemm, SUMS};
use super::kernels::Kernels;
use super::load::{AttendStep, GateUpStep, HeadStep, LowStep, Lowered, Product, QkvStep, ResidualStep};
use super::os::Bytes;
use super::pack::{self, BLOCK};
use super::pool::{Pool, Thread};
use super::rows::NormArgs;
use super::simd::LANES;
use crate::plan::{Rope, RopePairs};
use crate::program::{
    Batch, DeviceError, Input, Program, Segment, SegmentOutput, StepOutput, StepTime, Want,
};
use crate::sampling;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use weir_scheduler::BLOCK_TOKENS;

/// Rows of one sequence whose attention is computed together.
const TILE: usize = 8;
/// Rows of logits computed at once.
const LOGIT_ROWS: usize = 16;
/// Values of attention that wait to be folded, at most (16 MiB).
const PARTIALS: usize = 4 << 20;

/// A compiled range of layers.
pub struct CpuProgram {
    run: Runner,
    pool: Pool,
    queue: VecDeque<Batch>,
    /// By slot.
    last_sampled: Vec<u32>,
}

/// All that threads share while a batch runs.
struct Runner {
    low: Lowered,
    kernels: &'static Kernels,
    weights: Bytes,
    cache: Bytes,
    room: Room,
    /// One a step: tasks of attention taken so far.
    taken: Vec<AtomicUsize>,
    profile: Mutex<Vec<StepTime>>,
}

/// Working memory, all f32 but for the quantised activations.
struct Room {
    /// Two of `[rows][hidden]`: the residual stream before and after its pending sum.
    x: [Bytes; 2],
    /// `[rows][hidden]`: the pending sum, and a second product to add to it.
    y: [Bytes; 2],
    qkv: Bytes,
    gate: Bytes,
    up: Bytes,
    acts: ActsRoom,
    /// One row for each thread.
    solo: Vec<ActsRoom>,
    /// Two rows of the residual stream for each thread.
    scratch: Vec<Bytes>,
    /// Queries, sums and states of a tile for each thread.
    tiles: Vec<Bytes>,
    /// `[row][head][span]` of sum and state.
    partials: Bytes,
    logits: Bytes,
    /// `[rope][row]` of cosines, then sines.
    angles: Vec<Bytes>,
}

struct ActsRoom {
    f: Bytes,
    q: Bytes,
    d: Bytes,
    sums: Bytes,
}

fn bytes(len: usize) -> Result<Bytes, DeviceError> {
    Bytes::zeroed(len).ok_or_else(|| DeviceError::Lost(format!("the system has no {} MiB left", len >> 20)))
}

fn floats(n: usize) -> Result<Bytes, DeviceError> {
    bytes(4 * n + 64)
}

impl ActsRoom {
    fn new(rows: usize, cols: usize) -> Result<ActsRoom, DeviceError> {
        let blocks = rows * cols.div_ceil(BLOCK);
        Ok(ActsRoom {
            f: floats(rows * cols)?,
            q: bytes(rows * cols + 64)?,
            d: floats(blocks)?,
            sums: floats(blocks * SUMS)?,
        })
    }
    fn of(&self, cols: usize) -> Acts {
        Acts {
            f: self.f.ptr().cast(),
            q: self.q.ptr().cast(),
            d: self.d.ptr().cast(),
            sums: self.sums.ptr().cast(),
            cols,
        }
    }
}

/// Values of a tile's scratch for one thread: `TILE * group` queries with two sums and two states each.
fn tile_values(queries: usize, head_dim: usize) -> usize {
    queries * (3 * head_dim + 4)
}

impl Room {
    fn new(low: &Lowered, threads: usize) -> Result<Room, DeviceError> {
        let rows = low.kv.rows as usize;
        let heads = |f: fn(&AttendStep) -> usize| {
            let steps = low.steps.iter().map(|s| if let LowStep::Attend(a) = s { f(a) } else { 0 });
            steps.max().unwrap_or(0)
        };
        let (group, head_dim) = (heads(|a| a.heads.heads / a.heads.kv_heads), heads(|a| a.heads.head_dim));
        let each = |n: usize| (0..threads).map(|_| floats(n)).collect::<Result<Vec<_>, _>>();
        let pair = |n: usize| Ok::<_, DeviceError>([floats(n)?, floats(n)?]);
        Ok(Room {
            x: pair(rows * low.hidden)?,
            y: pair(rows * low.hidden)?,
            qkv: floats(rows * low.qkv_max)?,
            gate: floats(rows * low.ff_max)?,
            up: floats(rows * low.ff_max)?,
            acts: ActsRoom::new(rows, low.cols_max)?,
            solo: (0..threads).map(|_| ActsRoom::new(1, low.cols_max)).collect::<Result<_, _>>()?,
            scratch: each(2 * low.hidden)?,
            tiles: each(tile_values(TILE * group, head_dim))?,
            partials: floats(PARTIALS)?,
            logits: floats(LOGIT_ROWS * low.vocab.next_multiple_of(LANES))?,
            angles: low
                .ropes
                .iter()
                .map(|r| floats(rows * 2 * r.inv_freq.len()))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// A row of the batch.
struct Row {
    position: usize,
    segment: usize,
}

/// A batch, taken apart once for all threads.
struct Prepared<'a> {
    segments: &'a [Segment],
    rows: Vec<Row>,
    /// By row, where the segment's input is ids.
    ids: Vec<u32>,
    /// First row of each segment.
    first: Vec<usize>,
    /// Rows whose attention is computed together: first row and how many.
    tiles: Vec<(usize, usize)>,
    /// Rows whose logits are wanted.
    logit_rows: Vec<usize>,
    /// Spans of the longest sequence.
    spans: usize,
    outputs: Mutex<Vec<SegmentOutput>>,
}

impl<'a> Prepared<'a> {
    fn new(segments: &'a [Segment], hidden: usize, last: &[u32]) -> Prepared<'a> {
        let mut p = Prepared {
            segments,
            rows: Vec::new(),
            ids: Vec::new(),
            first: Vec::new(),
            tiles: Vec::new(),
            logit_rows: Vec::new(),
            spans: 0,
            outputs: Mutex::new(vec![SegmentOutput::Nothing; segments.len()]),
        };
        for (segment, s) in segments.iter().enumerate() {
            let first = p.rows.len();
            let n = match &s.input {
                Input::Ids(ids) => {
                    p.ids.extend(ids);
                    ids.len()
                }
                Input::LastSampled => {
                    p.ids.push(last[s.slot as usize]);
                    1
                }
                Input::Hidden(x) => {
                    p.ids.resize(first + x.len() / hidden, 0);
                    x.len() / hidden
                }
            };
            p.first.push(first);
            p.rows.extend((0..n).map(|i| Row { position: s.start as usize + i, segment }));
            p.tiles.extend((0..n).step_by(TILE).map(|i| (first + i, (n - i).min(TILE))));
            p.spans = p.spans.max((s.start as usize + n).div_ceil(SPAN));
            let wanted = match s.want {
                Want::Sample(_) => 1,
                Want::Logits(n) => n as usize,
                Want::Nothing | Want::Hidden => 0,
            };
            p.logit_rows.extend(first + n - wanted.min(n)..first + n);
        }
        p
    }

    fn blocks(&self, row: usize) -> &[u32] {
        &self.segments[self.rows[row].segment].blocks
    }
}

/// What a thread knows while it walks the steps; the same on all of them.
struct Walk<'a> {
    batch: &'a Prepared<'a>,
    thread: Thread<'a>,
    /// Which of [`Room::x`] is the residual stream.
    x: usize,
    /// Whether [`Room::y`] waits to be added, and the norm it passes first.
    pending: bool,
    post: Option<NormArgs>,
    /// Attention's output waits as partial sums: heads, window.
    partial: bool,
    window: usize,
}

impl CpuProgram {
    /// Allocates working memory and starts the threads.
    pub fn new(
        low: Lowered,
        weights: Bytes,
        kernels: &'static Kernels,
        threads: usize,
    ) -> Result<CpuProgram, DeviceError> {
        let room = Room::new(&low, threads)?;
        let cache = bytes(low.cache_bytes)?;
        let taken = low.steps.iter().map(|_| AtomicUsize::new(0)).collect();
        let slots = low.kv.slots as usize;
        let pool = Pool::new(threads).map_err(|e| DeviceError::Lost(format!("no threads: {e}")))?;
        let profile = Mutex::new(Vec::new());
        let run = Runner { low, kernels, weights, cache, room, taken, profile };
        Ok(CpuProgram { run, pool, queue: VecDeque::new(), last_sampled: vec![0; slots] })
    }
}

impl Program for CpuProgram {
    fn submit(&mut self, batch: Batch) -> Result<(), DeviceError> {
        self.run.check(&batch)?;
        self.queue.push_back(batch);
        Ok(())
    }

    fn poll(&mut self) -> Option<Result<StepOutput, DeviceError>> {
        let batch = self.queue.pop_front()?;
        let prepared = Prepared::new(&batch.segments, self.run.low.hidden, &self.last_sampled);
        for t in &self.run.taken {
            t.store(0, Ordering::Relaxed);
        }
        self.pool.run(&|thread| self.run.walk(&prepared, thread));
        let segments = prepared.outputs.into_inner().unwrap_or_else(|e| e.into_inner());
        for (s, out) in batch.segments.iter().zip(&segments) {
            if let SegmentOutput::Sampled(sampled) = out {
                self.last_sampled[s.slot as usize] = sampled.id;
            }
        }
        Some(Ok(StepOutput { segments }))
    }

    fn depth(&self) -> usize {
        1
    }

    fn profile(&self) -> Vec<StepTime> {
        self.run.profile.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Runner {
    /// Refuses what would reach beyond buffers: a caller's bug must not become memory corruption.
    fn check(&self, batch: &Batch) -> Result<(), DeviceError> {
        let bug = |what: &str| Err(DeviceError::Unsupported(format!("batch refused: {what}")));
        let mut rows = 0;
        for s in &batch.segments {
            let n = match &s.input {
                Input::Ids(ids) if self.low.embed.is_none() && !ids.is_empty() => {
                    return bug("ids for a program without the embedding");
                }
                Input::Ids(ids) => {
                    if ids.iter().any(|&id| id as usize >= self.low.vocab) {
                        return bug("a token id beyond the vocabulary");
                    }
                    ids.len()
                }
                Input::LastSampled => 1,
                Input::Hidden(_) if self.low.embed.is_some() => {
                    return bug("hidden rows for the first layers");
                }
                Input::Hidden(x) if !x.len().is_multiple_of(self.low.hidden) => {
                    return bug("part of a hidden row");
                }
                Input::Hidden(x) => x.len() / self.low.hidden,
            };
            rows += n;
            if n == 0 || s.slot >= self.low.kv.slots {
                return bug("an empty segment or an unknown slot");
            }
            if s.blocks.len() * BLOCK_TOKENS < s.start as usize + n
                || s.blocks.iter().any(|&b| b >= self.low.kv.blocks)
            {
                return bug("positions without KV blocks");
            }
            if matches!(s.want, Want::Logits(wanted) if wanted as usize > n) {
                return bug("logits of more rows than there are");
            }
            if s.want == Want::Hidden && self.low.head.is_some() {
                return bug("hidden rows of the last layers");
            }
            if matches!(s.want, Want::Sample(_) | Want::Logits(_)) && self.low.head.is_none() {
                return bug("logits of a program without the head");
            }
        }
        if rows > self.low.kv.rows as usize {
            return bug("more rows than the program has room for");
        }
        Ok(())
    }

    fn walk(&self, batch: &Prepared<'_>, thread: Thread<'_>) {
        let mut w =
            Walk { batch, thread, x: 0, pending: false, post: None, partial: false, window: usize::MAX / 2 };
        let mut times = StepClock::start(thread.index == 0);
        self.enter(&w);
        thread.barrier();
        times.lap("embed", 0);
        for (i, step) in self.low.steps.iter().enumerate() {
            match step {
                LowStep::Qkv(s) => self.qkv(s, &mut w),
                LowStep::Attend(s) => self.attend(s, &mut w, &self.taken[i]),
                LowStep::GateUp(s) => self.gate_up(s, &mut w),
                LowStep::Residual(s) => self.residual(s, &mut w),
            }
            thread.barrier();
            times.lap(step.name(), self.step_bytes(step));
        }
        self.hidden_out(&w);
        if let Some(head) = &self.low.head {
            self.logits(head, &w);
            times.lap("norm_logits_sample", self.product_bytes(&head.product));
        }
        times.add_to(&self.profile);
    }

    fn step_bytes(&self, step: &LowStep) -> u64 {
        match step {
            LowStep::Qkv(s) => [s.q, s.k, s.v].iter().map(|p| self.product_bytes(p)).sum(),
            LowStep::Attend(_) => 0,
            LowStep::GateUp(s) => self.product_bytes(&s.up) + s.gate.map_or(0, |g| self.product_bytes(&g)),
            LowStep::Residual(s) => self.product_bytes(&s.product),
        }
    }

    fn product_bytes(&self, p: &Product) -> u64 {
        let m = &self.low.matrices[p.matrix];
        (m.panels * m.panel_bytes) as u64
    }

    /// Rows that this thread prepares, where rows are dealt out.
    fn own(&self, n: usize, t: &Thread<'_>) -> Range<usize> {
        n * t.index / t.count()..n * (t.index + 1) / t.count()
    }

    fn x(&self, which: usize, row: usize) -> *mut f32 {
        // SAFETY: rows are checked against the buffers when a batch is submitted.
        unsafe { self.room.x[which].ptr().cast::<f32>().add(row * self.low.hidden) }
    }

    fn y(&self, row: usize) -> *mut f32 {
        // SAFETY: as above.
        unsafe { self.room.y[0].ptr().cast::<f32>().add(row * self.low.hidden) }
    }

    /// Embeddings or hidden rows into the residual stream, and the angles of every row.
    fn enter(&self, w: &Walk<'_>) {
        let hidden = self.low.hidden;
        for row in self.own(w.batch.rows.len(), &w.thread) {
            let Row { position, segment } = w.batch.rows[row];
            // SAFETY: this thread alone writes this row now.
            let out = unsafe { std::slice::from_raw_parts_mut(self.x(0, row), hidden) };
            match (&w.batch.segments[segment].input, self.low.embed) {
                (Input::Hidden(x), _) => {
                    let i = row - w.batch.first[segment];
                    out.copy_from_slice(&x[i * hidden..(i + 1) * hidden]);
                }
                (_, Some((matrix, scale))) => {
                    let m = &self.low.matrices[matrix];
                    let (panel, lane) =
                        (w.batch.ids[row] as usize / LANES, w.batch.ids[row] as usize % LANES);
                    // SAFETY: ids are below the vocabulary, which is the table's rows.
                    let panel = unsafe {
                        let at = self.weights.ptr().add(m.offset + panel * m.panel_bytes);
                        std::slice::from_raw_parts(at, m.panel_bytes)
                    };
                    pack::unpack_row(m.kind, panel, lane, out);
                    out.iter_mut().for_each(|x| *x *= scale);
                }
                (_, None) => out.fill(0.0),
            }
            for (rope, room) in self.low.ropes.iter().zip(&self.room.angles) {
                let n = rope.inv_freq.len();
                // SAFETY: this thread alone writes this row now.
                let angles = unsafe {
                    std::slice::from_raw_parts_mut(room.ptr().cast::<f32>().add(row * 2 * n), 2 * n)
                };
                let (cos, sin) = angles.split_at_mut(n);
                for (i, f) in rope.inv_freq.iter().enumerate() {
                    // in f64, so that no system's library shows in the bits
                    let (s, c) = (position as f64 * f64::from(*f)).sin_cos();
                    (cos[i], sin[i]) = (c as f32 * rope.magnitude, s as f32 * rope.magnitude);
                }
            }
        }
    }

    /// Adds what is pending to the residual stream of `row`, into `out`.
    ///
    /// # Safety
    /// This thread alone writes `out` now.
    unsafe fn settle(&self, w: &Walk<'_>, row: usize, out: *mut f32) {
        let y = if w.pending { self.y(row).cast_const() } else { std::ptr::null() };
        // SAFETY: a thread's scratch has two rows; this is the second.
        unsafe {
            let scratch = self.room.scratch[w.thread.index].ptr().cast::<f32>().add(self.low.hidden);
            (self.kernels.residual)(self.x(w.x, row), y, w.post.as_ref(), out, scratch, self.low.hidden);
        }
    }

    /// Residual sum, norm and quantisation of the given rows of the batch; returns the activations that this thread
    /// reads. One row is done by every thread for itself, more are dealt out, with a barrier behind.
    fn prepare(&self, w: &mut Walk<'_>, norm: &NormArgs, rows: &[usize], keep: bool) -> Acts {
        let (k, n) = (self.kernels, self.low.hidden);
        let next = 1 - w.x;
        let blocks = n / BLOCK;
        let acts;
        if let [row] = *rows {
            acts = self.room.solo[w.thread.index].of(n);
            // SAFETY: solo rows and scratch are this thread's; only thread 0 writes the next residual stream.
            unsafe {
                let x = self.room.scratch[w.thread.index].ptr().cast::<f32>();
                self.settle(w, row, x);
                if keep && w.pending && w.thread.index == 0 {
                    self.x(next, row).copy_from_nonoverlapping(x, n);
                }
                (k.norm)(x, norm, acts.f.cast_mut(), n);
                (k.quantize)(&acts, 0, 0, blocks);
            }
        } else {
            acts = self.room.acts.of(n);
            for i in self.own(rows.len(), &w.thread) {
                // SAFETY: rows are dealt out.
                unsafe {
                    let x = if keep && w.pending {
                        self.x(next, rows[i])
                    } else {
                        self.room.scratch[w.thread.index].ptr().cast::<f32>()
                    };
                    self.settle(w, rows[i], x);
                    (k.norm)(x, norm, acts.f.add(i * n).cast_mut(), n);
                    (k.quantize)(&acts, i, 0, blocks);
                }
            }
            w.thread.barrier();
        }
        if keep && w.pending {
            w.x = next;
            w.pending = false;
            w.post = None;
        }
        acts
    }

    /// This thread's panels of a product. `y` is where row 0 of the matrix goes for activation row 0.
    fn product(&self, p: &Product, panels: &Range<usize>, x: Acts, n: usize, y: *mut f32, y_stride: usize) {
        if panels.is_empty() || n == 0 {
            return;
        }
        let m = &self.low.matrices[p.matrix];
        debug_assert_eq!(m.cols, x.cols);
        // SAFETY: panels are the matrix's; `y` has room for all its rows, and panels are dealt out.
        unsafe {
            let g = Gemm {
                panels: self.weights.ptr().add(m.offset + panels.start * m.panel_bytes),
                count: panels.len(),
                panel_bytes: m.panel_bytes,
                x,
                n,
                y: y.add(panels.start * LANES),
                y_stride,
            };
            (self.kernels.gemm)(m.kind)(&g);
            if !p.bias.is_null() {
                let rows = panels.start * LANES..(panels.end * LANES).min(m.rows);
                for i in 0..n {
                    for r in rows.clone() {
                        *y.add(i * y_stride + r) += *p.bias.add(r);
                    }
                }
            }
        }
    }

    fn qkv(&self, s: &QkvStep, w: &mut Walk<'_>) {
        let n = w.batch.rows.len();
        let all: Vec<usize> = if n == 1 { vec![0] } else { (0..n).collect() };
        let acts = self.prepare(w, &s.norm, &all, true);
        let hd = s.heads.head_dim;
        let kv_dim = s.heads.kv_heads * hd;
        let stride = 2 * kv_dim + s.heads.heads * hd;
        let base = self.room.qkv.ptr().cast::<f32>();
        let ranges = &s.split[w.thread.index];
        let q = Product { bias: std::ptr::null(), ..s.q }; // added where queries are read
        // SAFETY: the buffer holds `stride` values a row; k and v are split by whole heads.
        unsafe {
            self.product(&s.k, &ranges[0], acts, n, base, stride);
            self.product(&s.v, &ranges[1], acts, n, base.add(kv_dim), stride);
            self.product(&q, &ranges[2], acts, n, base.add(2 * kv_dim), stride);
            let (block_stride, offset) = self.low.caches[s.layer];
            let heads = |r: &Range<usize>| r.start * LANES / hd..r.end * LANES / hd;
            for row in 0..n {
                let position = w.batch.rows[row].position;
                let block = w.batch.blocks(row)[position / BLOCK_TOKENS] as usize;
                let block = self.cache.ptr().add(offset + block * block_stride);
                let at = |head| block.add(head * attend::block_bytes(self.low.kv.kv, hd));
                let slot = position % BLOCK_TOKENS;
                for head in heads(&ranges[0]) {
                    let k = base.add(row * stride + head * hd);
                    if let Some(norm) = &s.k_norm {
                        (self.kernels.norm)(k, norm, k, hd);
                    }
                    self.rotate(s.rope, row, k);
                    attend::write(self.low.kv.kv, hd, at(head), slot, k, std::ptr::null());
                }
                for head in heads(&ranges[1]) {
                    let v = base.add(row * stride + kv_dim + head * hd);
                    attend::write(self.low.kv.kv, hd, at(head), slot, std::ptr::null(), v);
                }
            }
        }
    }

    /// Rotates one head in place.
    ///
    /// # Safety
    /// `head` points to a head of the plan's size, and this thread alone uses it now.
    unsafe fn rotate(&self, rope: usize, row: usize, head: *mut f32) {
        let Rope { pairs, inv_freq, .. } = &self.low.ropes[rope];
        let n = inv_freq.len();
        // SAFETY: the angles of `row` were written before the first barrier; `2n` values of the head rotate.
        unsafe {
            let angles = self.room.angles[rope].ptr().cast::<f32>().add(row * 2 * n);
            let (cos, sin) =
                (std::slice::from_raw_parts(angles, n), std::slice::from_raw_parts(angles.add(n), n));
            let head = std::slice::from_raw_parts_mut(head, 2 * n);
            match pairs {
                RopePairs::Adjacent => {
                    for (pair, (c, s)) in head.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                        let (a, b) = (pair[0], pair[1]);
                        (pair[0], pair[1]) = (a * c - b * s, a * s + b * c);
                    }
                }
                RopePairs::Halves => {
                    let (first, second) = head.split_at_mut(n);
                    for i in 0..n {
                        let (a, b) = (first[i], second[i]);
                        (first[i], second[i]) = (a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]);
                    }
                }
            }
        }
    }

    fn attend(&self, s: &AttendStep, w: &mut Walk<'_>, taken: &AtomicUsize) {
        let (kv_heads, tiles) = (s.heads.kv_heads, w.batch.tiles.len());
        let partials = w.batch.rows.len() * s.heads.heads * w.batch.spans * (s.heads.head_dim + 2);
        w.window = s.window;
        // few queries over a long past: threads take spans; otherwise whole tiles
        w.partial = w.batch.spans > 1 && tiles * kv_heads < 4 * w.thread.count() && partials <= PARTIALS;
        let spans = if w.partial { w.batch.spans } else { 1 };
        loop {
            let task = taken.fetch_add(1, Ordering::Relaxed);
            if task >= tiles * kv_heads * spans {
                return;
            }
            let (tile, head, span) = (task / spans / kv_heads, task / spans % kv_heads, task % spans);
            self.attend_tile(s, w, w.batch.tiles[tile], head, span);
        }
    }

    /// Spans that a query at `position` sees.
    fn spans(window: usize, position: usize) -> Range<usize> {
        (position + 1).saturating_sub(window) / SPAN..position / SPAN + 1
    }

    fn attend_tile(
        &self,
        s: &AttendStep,
        w: &Walk<'_>,
        (row0, rows): (usize, usize),
        kv_head: usize,
        span: usize,
    ) {
        let (hd, group) = (s.heads.head_dim, s.heads.heads / s.heads.kv_heads);
        let kv_dim = s.heads.kv_heads * hd;
        let stride = 2 * kv_dim + s.heads.heads * hd;
        let count = rows * group;
        let room = self.room.tiles[w.thread.index].ptr().cast::<f32>();
        let (block_stride, offset) = self.low.caches[s.layer];
        let args = AttendArgs {
            // SAFETY: inside the cache.
            cache: unsafe { self.cache.ptr().add(offset) },
            block_stride,
            head_offset: kv_head * attend::block_bytes(self.low.kv.kv, hd),
            kv: self.low.kv.kv,
            head_dim: hd,
            scale: s.scale,
            window: s.window,
            soft_cap: s.soft_cap,
        };
        let mut lanes = Lanes::new();
        let blocks = w.batch.blocks(row0);
        // SAFETY: the tile's room holds `count` queries, two sums and two states each; outputs belong to this task.
        unsafe {
            let part = |k: usize, i: usize| room.add((k * count + i) * hd);
            let state = |k: usize, i: usize| room.add(3 * count * hd + (k * count + i) * 2);
            let mut queries = Vec::with_capacity(count);
            for i in 0..count {
                let (row, head) = (row0 + i / group, kv_head * group + i % group);
                let from = self.room.qkv.ptr().cast::<f32>().add(row * stride + 2 * kv_dim + head * hd);
                let q = part(0, i);
                (0..hd).for_each(|d| {
                    *q.add(d) =
                        *from.add(d) + if s.q_bias.is_null() { 0.0 } else { *s.q_bias.add(head * hd + d) };
                });
                if let Some(norm) = &s.q_norm {
                    (self.kernels.norm)(q, norm, q, hd);
                }
                self.rotate(s.rope, row, q);
                let position = w.batch.rows[row].position;
                queries.push(Query { q, position, acc: part(1, i), state: state(0, i) });
            }
            if w.partial {
                for (i, q) in queries.iter_mut().enumerate() {
                    let (row, head) = (row0 + i / group, kv_head * group + i % group);
                    q.acc = self.partial(w, &s.heads, row, head, span);
                    q.state = q.acc.add(hd);
                }
                (self.kernels.span)(&args, blocks, span, &queries, &mut lanes);
                return;
            }
            for i in 0..count {
                std::slice::from_raw_parts_mut(part(2, i), hd).fill(0.0);
                (*state(1, i), *state(1, i).add(1)) = (f32::NEG_INFINITY, 0.0);
            }
            let (first, last) = (queries[0].position, queries[count - 1].position);
            for span in Self::spans(s.window, first).start..Self::spans(s.window, last).end {
                (self.kernels.span)(&args, blocks, span, &queries, &mut lanes);
                for (i, q) in queries.iter().enumerate() {
                    (self.kernels.merge)(hd, (part(2, i), state(1, i)), (q.acc, q.state));
                }
            }
            let out = self.room.acts.f.ptr().cast::<f32>();
            for i in 0..count {
                let (row, head) = (row0 + i / group, kv_head * group + i % group);
                let out = out.add((row * s.heads.heads + head) * hd);
                (self.kernels.finish)(hd, part(2, i), state(1, i), out);
            }
        }
    }

    /// Where the partial sum of one span of one head goes; its state lies behind it.
    ///
    /// # Safety
    /// The batch's partial sums fit (checked where attention begins).
    unsafe fn partial(
        &self,
        w: &Walk<'_>,
        h: &crate::plan::Heads,
        row: usize,
        head: usize,
        span: usize,
    ) -> *mut f32 {
        let i = (row * h.heads + head) * w.batch.spans + span;
        // SAFETY: the caller's contract.
        unsafe { self.room.partials.ptr().cast::<f32>().add(i * (h.head_dim + 2)) }
    }

    /// The attention's output of `row`, folded into `out`.
    ///
    /// # Safety
    /// This thread alone writes `out` now.
    unsafe fn fold(&self, w: &Walk<'_>, h: &crate::plan::Heads, row: usize, out: *mut f32) {
        let hd = h.head_dim;
        let acc = self.room.tiles[w.thread.index].ptr().cast::<f32>();
        // SAFETY: the tile's room holds at least one sum and state.
        unsafe {
            for head in 0..h.heads {
                let state = acc.add(hd);
                std::slice::from_raw_parts_mut(acc, hd).fill(0.0);
                (*state, *state.add(1)) = (f32::NEG_INFINITY, 0.0);
                for span in Self::spans(w.window, w.batch.rows[row].position) {
                    let from = self.partial(w, h, row, head, span);
                    (self.kernels.merge)(hd, (acc, state), (from, from.add(hd)));
                }
                (self.kernels.finish)(hd, acc, state, out.add(head * hd));
            }
        }
    }

    /// Attention's output, quantised.
    fn attended(&self, w: &Walk<'_>, h: &crate::plan::Heads) -> Acts {
        let (n, cols) = (w.batch.rows.len(), h.heads * h.head_dim);
        let shared = self.room.acts.of(cols);
        let blocks = cols / BLOCK;
        // SAFETY: solo rows are this thread's, shared rows are dealt out.
        unsafe {
            if n == 1 {
                let acts = self.room.solo[w.thread.index].of(cols);
                if w.partial {
                    self.fold(w, h, 0, acts.f.cast_mut());
                } else {
                    acts.f.cast_mut().copy_from_nonoverlapping(shared.f, cols);
                }
                (self.kernels.quantize)(&acts, 0, 0, blocks);
                return acts;
            }
            for row in self.own(n, &w.thread) {
                if w.partial {
                    self.fold(w, h, row, shared.f.add(row * cols).cast_mut());
                }
                (self.kernels.quantize)(&shared, row, 0, blocks);
            }
        }
        w.thread.barrier();
        shared
    }

    fn residual(&self, s: &ResidualStep, w: &mut Walk<'_>) {
        let n = w.batch.rows.len();
        let acts = match &s.attention {
            Some(heads) => self.attended(w, heads),
            None => self.room.acts.of(self.low.matrices[s.product.matrix].cols),
        };
        let range = &s.split[w.thread.index][0];
        let hidden = self.low.hidden;
        if !w.pending {
            self.product(&s.product, range, acts, n, self.y(0), hidden);
            (w.pending, w.post) = (true, s.post);
            return;
        }
        // attention and MLP in parallel: the second sum joins the first, whose split is the same
        let second = self.room.y[1].ptr().cast::<f32>();
        self.product(&s.product, range, acts, n, second, hidden);
        for row in 0..n {
            for i in range.start * LANES..range.end * LANES {
                // SAFETY: this thread's own columns of both.
                unsafe { *self.y(row).add(i) += *second.add(row * hidden + i) };
            }
        }
    }

    fn gate_up(&self, s: &GateUpStep, w: &mut Walk<'_>) {
        let n = w.batch.rows.len();
        let all: Vec<usize> = if n == 1 { vec![0] } else { (0..n).collect() };
        // attention and MLP in parallel: nothing is pending, or it was kept by the step before
        let acts = self.prepare(w, &s.norm, &all, true);
        let ff = self.low.matrices[s.up.matrix].rows;
        let (up, gate) = (self.room.up.ptr().cast::<f32>(), self.room.gate.ptr().cast::<f32>());
        let range = &s.split[w.thread.index][0];
        self.product(&s.up, range, acts, n, up, ff);
        if let Some(g) = &s.gate {
            self.product(g, range, acts, n, gate, ff);
        }
        if n > 1 {
            w.thread.barrier(); // the rows quantised below take the place of those read above
        }
        let out = self.room.acts.of(ff);
        let (from, to) = (range.start * LANES, range.end * LANES);
        for row in 0..n {
            // SAFETY: this thread's own columns; they are whole blocks.
            unsafe {
                let at = row * ff + from;
                let (g, u) = if s.gate.is_some() {
                    (gate.add(at), up.add(at).cast_const())
                } else {
                    (up.add(at), std::ptr::null())
                };
                (self.kernels.gate)(s.act, g, u, out.f.add(at).cast_mut(), to - from);
                (self.kernels.quantize)(&out, row, from / BLOCK, to / BLOCK);
            }
        }
    }

    /// Hidden rows out, by the first thread.
    fn hidden_out(&self, w: &Walk<'_>) {
        if w.thread.index != 0 {
            return;
        }
        for (i, s) in w.batch.segments.iter().enumerate().filter(|(_, s)| s.want == Want::Hidden) {
            let first = w.batch.first[i];
            let n = w.batch.first.get(i + 1).copied().unwrap_or(w.batch.rows.len()) - first;
            let mut out = vec![0f32; n * self.low.hidden];
            for (row, out) in out.chunks_exact_mut(self.low.hidden).enumerate() {
                // SAFETY: `out` is this row's alone.
                unsafe { self.settle(w, first + row, out.as_mut_ptr()) };
            }
            debug_assert_eq!(s.want, Want::Hidden);
            w.batch.outputs.lock().unwrap_or_else(|e| e.into_inner())[i] = SegmentOutput::Hidden(out);
        }
    }

    fn logits(&self, s: &HeadStep, w: &Walk<'_>) {
        let vocab = self.low.vocab;
        let stride = vocab.next_multiple_of(LANES);
        let logits = self.room.logits.ptr().cast::<f32>();
        let range = &s.split[w.thread.index][0];
        for rows in w.batch.logit_rows.chunks(LOGIT_ROWS) {
            let mut own = Walk { post: w.post, ..*w };
            let acts = self.prepare(&mut own, &s.norm, rows, false);
            self.product(&s.product, range, acts, rows.len(), logits, stride);
            if s.soft_cap > 0.0 {
                for i in 0..rows.len() {
                    // SAFETY: this thread's own panels.
                    unsafe {
                        let at = logits.add(i * stride + range.start * LANES);
                        (self.kernels.soft_cap)(at, s.soft_cap, range.len() * LANES);
                    }
                }
            }
            w.thread.barrier();
            for (i, &row) in rows.iter().enumerate().skip(w.thread.index).step_by(w.thread.count()) {
                // SAFETY: this row is this thread's until the next barrier.
                let logits = unsafe { std::slice::from_raw_parts_mut(logits.add(i * stride), vocab) };
                let segment = w.batch.rows[row].segment;
                let result = match &w.batch.segments[segment].want {
                    Want::Sample(spec) => SegmentOutput::Sampled(sampling::sample(logits, spec)),
                    _ => SegmentOutput::Logits(Vec::new()),
                };
                self.deliver(w, segment, row, result, logits);
            }
            w.thread.barrier();
        }
    }

    fn deliver(&self, w: &Walk<'_>, segment: usize, row: usize, result: SegmentOutput, logits: &[f32]) {
        let mut outputs = w.batch.outputs.lock().unwrap_or_else(|e| e.into_inner());
        let Want::Logits(wanted) = w.batch.segments[segment].want else {
            outputs[segment] = result;
            return;
        };
        let end = w.batch.first.get(segment + 1).copied().unwrap_or(w.batch.rows.len());
        let n = (wanted as usize).min(end - w.batch.first[segment]);
        if !matches!(outputs[segment], SegmentOutput::Logits(_)) {
            outputs[segment] = SegmentOutput::Logits(vec![0.0; n * logits.len()]);
        }
        if let SegmentOutput::Logits(all) = &mut outputs[segment] {
            let i = row - (end - n);
            all[i * logits.len()..(i + 1) * logits.len()].copy_from_slice(logits);
        }
    }
}

impl LowStep {
    fn name(&self) -> &'static str {
        match self {
            LowStep::Qkv(_) => "norm_qkv_rope_cache",
            LowStep::Attend(_) => "attend",
            LowStep::GateUp(_) => "norm_gate_up_act",
            LowStep::Residual(s) if s.attention.is_some() => "out_residual",
            LowStep::Residual(_) => "down_residual",
        }
    }
}

/// Time a step by the first thread's clock.
struct StepClock {
    last: Option<Instant>,
    laps: Vec<StepTime>,
}

impl StepClock {
    fn start(on: bool) -> StepClock {
        StepClock { last: on.then(Instant::now), laps: Vec::new() }
    }

    fn lap(&mut self, name: &'static str, bytes: u64) {
        let Some(last) = self.last else { return };
        let now = Instant::now();
        let nanos = now.duration_since(last).as_nanos() as u64;
        self.last = Some(now);
        match self.laps.iter_mut().find(|l| l.name == name) {
            Some(l) => (l.count, l.nanos, l.bytes) = (l.count + 1, l.nanos + nanos, l.bytes + bytes),
            None => self.laps.push(StepTime { name, count: 1, nanos, bytes }),
        }
    }

    fn add_to(self, profile: &Mutex<Vec<StepTime>>) {
        if self.last.is_none() {
            return;
        }
        let mut all = profile.lock().unwrap_or_else(|e| e.into_inner());
        for lap in self.laps {
            match all.iter_mut().find(|l| l.name == lap.name) {
                Some(l) => {
                    (l.count, l.nanos, l.bytes) =
                        (l.count + lap.count, l.nanos + lap.nanos, l.bytes + lap.bytes);
                }
                None => all.push(lap),
            }
        }
    }
}
