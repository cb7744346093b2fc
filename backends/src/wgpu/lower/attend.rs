//! Attention and the tables of rotations.
use super::{Buf, Call, Height, Lowering, SPAN, When};
use crate::plan::Rope;
use crate::wgpu::kernels::Attention;
use weir_scheduler::BLOCK_TOKENS;

/// Positions that the fine table of a rotation holds.
const ROPE_FINE: usize = 256;

impl<'a> Lowering<'a> {
    pub(super) fn attend(&mut self, attention: &Attention, region: usize) {
        let layer = self.layers;
        self.layers += 1;
        let heads = attention.heads;
        let (key, value) = Attention::place(heads.head_dim, attention.q8);
        let places = self.kv.blocks as usize * BLOCK_TOKENS * heads.kv_heads;
        self.out.sizes.insert(Buf::Keys(layer), places * key * 16);
        self.out.sizes.insert(Buf::Values(layer), places * value * 4);
        self.out.kv_bytes += places * (key * 16 + value * 4);
        let inputs =
            [Buf::Raw, Buf::Region(region), Buf::Ropes, Buf::Step, Buf::Keys(layer), Buf::Values(layer)];
        let result = [Buf::Attended, Buf::AttendedScales];
        let spans = match attention.window {
            0 => usize::MAX,
            window => window / SPAN + 2,
        };
        let call = |kernel, buffers, when| Call {
            when,
            ..Call::new("attend", kernel, buffers, heads.kv_heads, Height::Rows)
        };
        let kernel = |entry| attention.kernel(self.dialect, entry);
        // What is merged stays in the workgroup's memory.
        let splits = 4 * heads.heads / heads.kv_heads * heads.head_dim <= self.dialect.shared_bytes as usize;
        let cache = call(kernel("cache"), [&inputs[..], &result].concat(), When::Prefill);
        let when = if splits { When::Whole } else { When::Always };
        let mut calls = vec![call(kernel("attend"), [&inputs[..], &result].concat(), when)];
        if splits {
            let mut split =
                call(kernel("attend_span"), [&inputs[..], &[Buf::Partials]].concat(), When::Split);
            split.spans = spans;
            let merged = [Buf::Partials, Buf::Step, Buf::Attended, Buf::AttendedScales].to_vec();
            calls.extend([split, call(attention.merge(self.dialect), merged, When::Split)]);
        }
        self.out.one.extend(calls.clone());
        self.out.many.push(cache);
        self.out.many.extend(calls);
        self.out.partial_words = self.out.partial_words.max(heads.heads * (heads.head_dim + 2));
        self.out.kv_heads = self.out.kv_heads.max(heads.kv_heads);
        self.input_buffers([Buf::Attended, Buf::AttendedScales], attention.out, attention.floating);
    }

    /// Where a rotation's fine and coarse tables begin: `cos, sin` of `(p % 256) f` and of `(p / 256) 256 f`.
    pub(super) fn rope(&mut self, rope: &'a Rope) -> (usize, usize) {
        if let Some((_, at)) = self.ropes.iter().find(|(known, _)| *known == rope) {
            return *at;
        }
        let coarse = (self.kv.blocks as usize * BLOCK_TOKENS).div_ceil(ROPE_FINE);
        let mut table = |positions: usize, step: usize, magnitude: f32| {
            let at = self.out.ropes.len();
            for position in 0..positions {
                self.out.ropes.extend(rope.inv_freq.iter().map(|f| {
                    let (sin, cos) = ((position * step) as f64 * f64::from(*f)).sin_cos();
                    [cos as f32 * magnitude, sin as f32 * magnitude]
                }));
            }
            at
        };
        let at = (table(ROPE_FINE, 1, rope.magnitude), table(coarse, ROPE_FINE, 1.0));
        self.ropes.push((rope, at));
        at
    }
}
