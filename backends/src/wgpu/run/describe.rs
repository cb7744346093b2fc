//! What the kernels are told of a step: its rows, wanted rows, block tables and parameters.
use super::WgpuProgram;
use crate::program::{Batch, Input, SampleSpec, Want};
use crate::sampling::GREEDY_BELOW;
use crate::wgpu::adapter::PARAMS_STRIDE;
use crate::wgpu::lower::{Buf, SPAN, When};
use weir_scheduler::BLOCK_TOKENS;

/// Attention is split where it has so many spans and so few workgroups: it would leave most of the GPU idle.
const SPLIT_SPANS: usize = 3;
const SPLIT_GROUPS: usize = 512;
/// Words of a wanted row; see `sample.wgsl`.
const WANT_WORDS: usize = 8;
/// The id of a row that takes what its slot sampled last.
const LAST: u32 = u32::MAX;

/// The size of a step.
pub(super) struct Shape {
    pub(super) rows: usize,
    /// Whether a segment has several rows.
    pub(super) prefill: bool,
    /// Spans of the longest row's attention, 1 where each row's is computed whole.
    pub(super) spans: usize,
}

impl Shape {
    pub(super) fn includes(&self, when: When) -> bool {
        match when {
            When::Always => true,
            When::Prefill => self.prefill,
            When::Split => self.spans > 1,
            When::Whole => self.spans == 1,
        }
    }
}

impl WgpuProgram {
    /// Puts rows, wanted rows, block tables, parameters and hidden input where the kernels look for them.
    pub(super) fn describe(&mut self, batch: &Batch) -> Shape {
        let (hidden, wanted_at, tables_at) =
            (self.lowered.hidden, self.lowered.wanted_at, self.lowered.tables_at);
        let mut shape = Shape { rows: 0, prefill: false, spans: 1 };
        let mut end_max = 0;
        let mut words = std::mem::take(&mut self.words);
        let (mut wanted, mut tables) = (Vec::new(), Vec::new());
        words.clear();
        for segment in &batch.segments {
            let rows = segment.input.rows(hidden);
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
                Want::Sample(specs) => {
                    let first = last - specs.len() as u32;
                    let rows = specs.iter().zip(first..);
                    wanted.extend(rows.flat_map(|(spec, row)| want(row, spec, segment.slot)));
                }
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
}

/// Whether the GPU can choose the token by itself.
pub(super) fn on_gpu(spec: &SampleSpec) -> bool {
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
