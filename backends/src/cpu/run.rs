//! Runs batches: all threads walk the steps of the plan together.
mod attention;
mod clock;
mod prepared;
mod room;

use super::attend;
use super::gemm::{Acts, Gemm};
use super::kernels::Kernels;
use super::load::{GateUpStep, HeadStep, LowStep, Lowered, Product, QkvStep, ResidualStep};
use super::os::Bytes;
use super::pack::{self, BLOCK};
use super::pool::{Pool, Thread};
use super::rows::NormArgs;
use super::simd::LANES;
use crate::plan::{Rope, RopePairs};
use crate::program::{
    Batch, DeviceError, Input, Program, Sampled, SegmentOutput, StepOutput, StepTime, Terms, Want,
};
use crate::sampling;
use clock::StepClock;
use prepared::{Prepared, Row};
use room::{LOGIT_ROWS, Room, bytes};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use weir_scheduler::BLOCK_TOKENS;

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
        batch.check(&self.run.terms())?;
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
            if let SegmentOutput::Sampled(sampled) = out
                && let Some(last) = sampled.last()
            {
                self.last_sampled[s.slot as usize] = last.id;
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
    fn terms(&self) -> Terms {
        Terms {
            kv: self.low.kv,
            vocab: self.low.vocab,
            hidden: self.low.hidden,
            embeds: self.low.embed.is_some(),
            heads: self.low.head.is_some(),
        }
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
                self.deliver(w, row, logits);
            }
            w.thread.barrier();
        }
    }

    /// What a row's logits are wanted for.
    fn deliver(&self, w: &Walk<'_>, row: usize, logits: &mut [f32]) {
        let segment = w.batch.rows[row].segment;
        let (first, wanted) = w.batch.wanted(segment);
        let lock = || w.batch.outputs.lock().unwrap_or_else(|e| e.into_inner());
        let i = row - first;
        if let Want::Sample(specs) = &w.batch.segments[segment].want {
            let sampled = sampling::sample(logits, &specs[i]);
            let mut outputs = lock();
            if !matches!(outputs[segment], SegmentOutput::Sampled(_)) {
                outputs[segment] = SegmentOutput::Sampled(vec![Sampled { id: 0, logprobs: None }; wanted]);
            }
            if let SegmentOutput::Sampled(all) = &mut outputs[segment] {
                all[i] = sampled;
            }
            return;
        }
        let mut outputs = lock();
        if !matches!(outputs[segment], SegmentOutput::Logits(_)) {
            outputs[segment] = SegmentOutput::Logits(vec![0.0; wanted * logits.len()]);
        }
        if let SegmentOutput::Logits(all) = &mut outputs[segment] {
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
