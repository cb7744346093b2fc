//! Lowering of attention.
use super::super::args::{AttendArgs, CacheArgs};
use super::super::constants::{c, fusable};
use super::super::forms::PAIR;
use super::{AttendStep, Attention, Low, Lowering, SPAN, unsupported};
use crate::plan::{Attend, Norm, NormQkvRopeCache, RopePairs};
use crate::program::DeviceError;
use std::fmt::Write;
use weir_scheduler::{BLOCK_TOKENS, KvType};

impl Lowering<'_> {
    pub(super) fn attend(
        &mut self,
        qkv: &NormQkvRopeCache,
        s: &Attend,
        forms: u32,
    ) -> Result<(), DeviceError> {
        let h = s.heads;
        if h.head_dim == 0
            || !h.head_dim.is_multiple_of(32)
            || h.head_dim > 256
            || h.kv_heads == 0
            || !h.heads.is_multiple_of(h.kv_heads)
            || h.heads / h.kv_heads > 64
        {
            return Err(unsupported(format!(
                "{h:?}: CUDA computes heads of 32 to 256 values, a multiple of 32"
            )));
        }
        for norm in [&qkv.q_norm, &qkv.k_norm].into_iter().flatten() {
            if !fusable(norm) {
                return Err(unsupported("CUDA computes head norms by the root mean square, without a bias"));
            }
        }
        let eps = qkv.q_norm.as_ref().or(qkv.k_norm.as_ref()).map_or(0.0, |n| n.eps);
        let group = h.heads / h.kv_heads;
        let query = h.head_dim + if h.head_dim.is_multiple_of(64) { 32 } else { 64 };
        let shared = |mt: usize| {
            let room = (mt * 16 * (SPAN.max(h.head_dim) + 4) * 4).max(8 * h.head_dim * 4);
            mt * 16 * (query * 4 + (SPAN + 32) * 2 + 24) + room + 4 * h.head_dim + 64
        };
        let alone = group.div_ceil(16).next_power_of_two();
        let whole = [4, 2, 1].into_iter().find(|mt| shared(*mt) <= self.out.chip.shared && mt * 16 >= group);
        let whole =
            whole.ok_or_else(|| unsupported(format!("{h:?} needs more shared memory than there is")))?;
        let angle0 = self.ropes.iter().find(|(r, _)| *r == qkv.rope).map_or(0, |(_, at)| *at);
        let stride = (h.heads + 2 * h.kv_heads) * h.head_dim;
        let mut text = String::new();
        // writing to a string can't fail
        _ = write!(
            text,
            "static constexpr int HD = {}, HEADS = {}, KV_HEADS = {}, STRIDE = {stride}, ROT = {}, ADJACENT = {}, \
             ANGLES = {}, ANGLE0 = {angle0}, WINDOW = {}, Q_NORM = {}, K_NORM = {}, BYTES = {}, FORMS = {forms}, NEXT_PAIRS = {};\n\
             static constexpr float SCALE = {}, CAP = {}, EPS = {};",
            h.head_dim,
            h.heads,
            h.kv_heads,
            qkv.rope.inv_freq.len(),
            u8::from(qkv.rope.pairs == RopePairs::Adjacent),
            self.angles.max(1),
            s.window.unwrap_or(0),
            u8::from(qkv.q_norm.is_some()),
            u8::from(qkv.k_norm.is_some()),
            u8::from(self.kv.kv == KvType::Q8_0),
            (h.heads * h.head_dim).div_ceil(PAIR),
            c(s.scale),
            c(s.soft_cap.unwrap_or(0.0)),
            c(eps),
        );
        let tiles = [(alone, shared(alone)), (whole, shared(whole))];
        let known = self.out.attends.iter().position(|a| a.constants == text);
        let kernel = known.unwrap_or_else(|| {
            self.out.attends.push(Attention { constants: text, tiles });
            self.out.attends.len() - 1
        });
        let values = self.kv.blocks as usize * h.kv_heads * BLOCK_TOKENS * h.head_dim;
        let (half, scales) = match self.kv.kv {
            KvType::F16 => (2 * values, 0),
            KvType::Q8_0 => (values, values / 32 * 2),
        };
        self.out.cache_bytes += 2 * (half + scales);
        let mut norm = |n: &Option<Norm>| n.as_ref().map_or(Ok(0), |n| self.vector(&n.weight, h.head_dim));
        let (q_norm, k_norm) = (norm(&qkv.q_norm)?, norm(&qkv.k_norm)?);
        let cache = CacheArgs {
            qkv: self.qkv,
            q_norm,
            k_norm,
            angles: self.out.enter.angles,
            keys: self.take(half),
            values: self.take(half),
            key_scales: self.take(scales),
            value_scales: self.take(scales),
            ..CacheArgs::default()
        };
        let args = AttendArgs {
            cache,
            partial: self.partial,
            arrived: self.arrived_heads,
            next: self.from_heads,
            ..AttendArgs::default()
        };
        let tile_rows = whole * 16 / group;
        self.out.steps.push(Low::Attend(AttendStep {
            kernel,
            heads: h,
            args,
            angles: self.angles.max(1),
            tile_rows,
            window: s.window,
        }));
        Ok(())
    }
}
