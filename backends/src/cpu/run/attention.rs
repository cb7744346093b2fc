//! The two halves of attention: spans of the KV cache into partial sums or whole rows, and these into activations.
use super::super::attend::{self, AttendArgs, Lanes, Query, SPAN};
use super::super::gemm::Acts;
use super::super::load::AttendStep;
use super::super::pack::BLOCK;
use super::room::PARTIALS;
use super::{Runner, Walk};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

impl Runner {
    pub(super) fn attend(&self, s: &AttendStep, w: &mut Walk<'_>, taken: &AtomicUsize) {
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
    pub(super) fn attended(&self, w: &Walk<'_>, h: &crate::plan::Heads) -> Acts {
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
}
