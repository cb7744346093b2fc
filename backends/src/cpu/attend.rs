//! Attention over the paged KV cache.
//!
//! A KV block holds 32 positions of one key/value head: keys as `[head_dim][32]` (a lane is a position), values as
//! `[32][head_dim]` (a lane is a dimension). The cache is walked in spans of [`SPAN`] positions at absolute places;
//! within a span blocks are folded in order by online softmax, and spans are folded in order by [`merge`]. So the
//! bits do not depend on how many queries or threads work beside this one.
use super::rows::capped;
use super::simd::{LANES, Simd, exp, sum};
use half::f16;
use weir_scheduler::{BLOCK_TOKENS, KvType};

/// Positions in a span; threads may work on different spans of one query.
pub const SPAN: usize = 128;

/// Query rows whose scores are computed together.
const ROWS: usize = 4;

/// Bytes of one block of one head, keys and values.
pub fn block_bytes(kv: KvType, head_dim: usize) -> usize {
    2 * half_bytes(kv, head_dim)
}

fn half_bytes(kv: KvType, head_dim: usize) -> usize {
    match kv {
        KvType::F16 => BLOCK_TOKENS * head_dim * 2,
        KvType::Q8_0 => BLOCK_TOKENS * head_dim / 32 * 34,
    }
}

/// Everything that a span of attention needs besides its queries.
#[derive(Clone, Copy)]
pub struct AttendArgs {
    /// First byte of this layer's cache.
    pub cache: *const u8,
    /// Bytes from one block to the next.
    pub block_stride: usize,
    /// Byte of this head within a block.
    pub head_offset: usize,
    /// Storage.
    pub kv: KvType,
    /// Values in a head, a multiple of 32.
    pub head_dim: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// Positions visible to a query, itself included.
    pub window: usize,
    /// Scores are capped smoothly; 0 is not.
    pub soft_cap: f32,
}

/// One query row and the state of its softmax.
#[derive(Clone, Copy)]
pub struct Query {
    /// `[head_dim]`, rotated.
    pub q: *const f32,
    /// Position.
    pub position: usize,
    /// `[head_dim]` sum of values weighted by `exp(score - max)`.
    pub acc: *mut f32,
    /// `[2]`: the largest score so far, and the sum of weights.
    pub state: *mut f32,
}

/// Folds the positions of `span` that each query sees into its fresh state.
///
/// # Safety
/// `blocks` covers every position up to the last query's; pointers as described.
#[inline(always)]
pub unsafe fn span<S: Simd>(
    a: &AttendArgs,
    blocks: &[u32],
    span: usize,
    queries: &[Query],
    lanes: &mut Lanes,
) {
    // SAFETY: the caller's contract.
    unsafe {
        for q in queries {
            for d in (0..a.head_dim).step_by(LANES) {
                S::store(q.acc.add(d), S::splat(0.0));
            }
            *q.state = f32::NEG_INFINITY;
            *q.state.add(1) = 0.0;
        }
        let per_span = SPAN / BLOCK_TOKENS;
        for b in span * per_span..((span + 1) * per_span).min(blocks.len()) {
            let first = b * BLOCK_TOKENS;
            let block = a.cache.add(blocks[b] as usize * a.block_stride + a.head_offset);
            for rows in queries.chunks(ROWS) {
                let sees =
                    |q: &Query| first <= q.position && first + BLOCK_TOKENS + a.window > q.position + 1;
                if !rows.iter().any(sees) {
                    continue;
                }
                match rows.len() {
                    4 => block_rows::<S, 4>(a, block, first, rows, lanes),
                    3 => block_rows::<S, 3>(a, block, first, rows, lanes),
                    2 => block_rows::<S, 2>(a, block, first, rows, lanes),
                    _ => block_rows::<S, 1>(a, block, first, rows, lanes),
                }
            }
        }
    }
}

/// Room for the weights of [`ROWS`] queries over one block.
pub struct Lanes([[f32; BLOCK_TOKENS]; ROWS]);

impl Lanes {
    /// Zeros.
    pub fn new() -> Lanes {
        Lanes([[0.0; BLOCK_TOKENS]; ROWS])
    }
}

/// 32 x minus infinity, 32 x 0, 32 x minus infinity: a window into it masks a block's positions.
const MASK: [f32; 3 * BLOCK_TOKENS] = {
    let mut m = [f32::NEG_INFINITY; 3 * BLOCK_TOKENS];
    let mut i = BLOCK_TOKENS;
    while i < 2 * BLOCK_TOKENS {
        m[i] = 0.0;
        i += 1;
    }
    m
};

#[inline(always)]
unsafe fn block_rows<S: Simd, const R: usize>(
    a: &AttendArgs,
    block: *const u8,
    first: usize,
    queries: &[Query],
    lanes: &mut Lanes,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut s = scores::<S, R>(a, block, queries);
        let mut visible = 0;
        for (r, q) in queries.iter().enumerate().take(R) {
            let s = &mut s[r];
            for half in s.iter_mut() {
                *half = S::mul(*half, S::splat(a.scale));
                if a.soft_cap > 0.0 {
                    *half = capped::<S>(*half, a.soft_cap);
                }
            }
            // visible lanes of this block: low..high
            let high = (q.position + 1).saturating_sub(first).min(BLOCK_TOKENS);
            let low = (q.position + 1).saturating_sub(a.window).saturating_sub(first).min(BLOCK_TOKENS);
            visible = visible.max(high);
            for (h, half) in s.iter_mut().enumerate() {
                if high < BLOCK_TOKENS {
                    *half = S::add(*half, S::load(MASK.as_ptr().add(2 * BLOCK_TOKENS - high + h * LANES)));
                }
                if low > 0 {
                    *half = S::add(*half, S::load(MASK.as_ptr().add(BLOCK_TOKENS - low + h * LANES)));
                }
            }
            let old = *q.state;
            let new = old.max(S::reduce_max(S::max(s[0], s[1])));
            let p = &mut lanes.0[r];
            if new == f32::NEG_INFINITY {
                p.fill(0.0); // nothing seen yet
                continue;
            }
            let m = S::splat(new);
            let (p0, p1) = (exp::<S>(S::sub(s[0], m)), exp::<S>(S::sub(s[1], m)));
            S::store(p.as_mut_ptr(), p0);
            S::store(p.as_mut_ptr().add(LANES), p1);
            if new > old {
                let shrink = shrink::<S>(old, new);
                *q.state = new;
                *q.state.add(1) *= shrink;
                let by = S::splat(shrink);
                for d in (0..a.head_dim).step_by(LANES) {
                    S::store(q.acc.add(d), S::mul(S::load(q.acc.add(d)), by));
                }
            }
            *q.state.add(1) += sum::<S>(S::add(p0, p1));
        }
        values::<S, R>(a, block.add(half_bytes(a.kv, a.head_dim)), visible, queries, lanes);
    }
}

/// `e^(old - new)` by the kernels' own exponential.
#[inline(always)]
unsafe fn shrink<S: Simd>(old: f32, new: f32) -> f32 {
    // SAFETY: the caller vouches for the instruction set.
    unsafe { S::reduce_max(exp::<S>(S::splat(old - new))) }
}

/// Dot products of R queries with 32 keys.
#[inline(always)]
unsafe fn scores<S: Simd, const R: usize>(
    a: &AttendArgs,
    block: *const u8,
    queries: &[Query],
) -> [[S::F; 2]; R] {
    // SAFETY: the caller's contract.
    unsafe {
        let zero = S::splat(0.0);
        let mut s = [[zero; 2]; R];
        match a.kv {
            KvType::F16 => {
                let k = block.cast::<u16>();
                for d in 0..a.head_dim {
                    let k0 = S::load_f16(k.add(d * BLOCK_TOKENS));
                    let k1 = S::load_f16(k.add(d * BLOCK_TOKENS + LANES));
                    for r in 0..R {
                        let q = S::splat(*queries[r].q.add(d));
                        s[r][0] = S::fma(q, k0, s[r][0]);
                        s[r][1] = S::fma(q, k1, s[r][1]);
                    }
                }
            }
            KvType::Q8_0 => {
                let (k, scales) = (block.cast::<i8>(), block.add(BLOCK_TOKENS * a.head_dim).cast::<u16>());
                for g in 0..a.head_dim / 32 {
                    let mut part = [[zero; 2]; R];
                    for d in 32 * g..32 * (g + 1) {
                        let k0 = S::to_f(S::load_i8(k.add(d * BLOCK_TOKENS)));
                        let k1 = S::to_f(S::load_i8(k.add(d * BLOCK_TOKENS + LANES)));
                        for r in 0..R {
                            let q = S::splat(*queries[r].q.add(d));
                            part[r][0] = S::fma(q, k0, part[r][0]);
                            part[r][1] = S::fma(q, k1, part[r][1]);
                        }
                    }
                    let d0 = S::load_f16(scales.add(g * BLOCK_TOKENS));
                    let d1 = S::load_f16(scales.add(g * BLOCK_TOKENS + LANES));
                    for r in 0..R {
                        s[r][0] = S::fma(part[r][0], d0, s[r][0]);
                        s[r][1] = S::fma(part[r][1], d1, s[r][1]);
                    }
                }
            }
        }
        s
    }
}

/// `acc += weights . values` for the first `visible` positions (the others' weights are zero).
#[inline(always)]
unsafe fn values<S: Simd, const R: usize>(
    a: &AttendArgs,
    block: *const u8,
    visible: usize,
    queries: &[Query],
    lanes: &Lanes,
) {
    // SAFETY: the caller's contract.
    unsafe {
        // two vectors of dimensions at a time: one scale of q8_0 covers them
        for d in (0..a.head_dim).step_by(2 * LANES) {
            let mut acc = [[S::splat(0.0); 2]; R];
            for r in 0..R {
                let p = queries[r].acc.add(d);
                acc[r] = [S::load(p), S::load(p.add(LANES))];
            }
            for j in 0..visible {
                let (v0, v1) = match a.kv {
                    KvType::F16 => {
                        let v = block.cast::<u16>().add(j * a.head_dim + d);
                        (S::load_f16(v), S::load_f16(v.add(LANES)))
                    }
                    KvType::Q8_0 => {
                        let v = block.cast::<i8>().add(j * a.head_dim + d);
                        let scales = block.add(BLOCK_TOKENS * a.head_dim).cast::<u16>();
                        let bits = scales.add(j * (a.head_dim / 32) + d / 32).read_unaligned();
                        let s = S::splat(f16::from_bits(bits).to_f32());
                        (S::mul(S::to_f(S::load_i8(v)), s), S::mul(S::to_f(S::load_i8(v.add(LANES))), s))
                    }
                };
                for r in 0..R {
                    let p = S::splat(lanes.0[r][j]);
                    acc[r][0] = S::fma(p, v0, acc[r][0]);
                    acc[r][1] = S::fma(p, v1, acc[r][1]);
                }
            }
            for r in 0..R {
                let p = queries[r].acc.add(d);
                S::store(p, acc[r][0]);
                S::store(p.add(LANES), acc[r][1]);
            }
        }
    }
}

/// Folds the state of a later span into `into`.
///
/// # Safety
/// Both hold `head_dim` values and two of state.
#[inline(always)]
pub unsafe fn merge<S: Simd>(head_dim: usize, into: (*mut f32, *mut f32), from: (*const f32, *const f32)) {
    // SAFETY: the caller's contract.
    unsafe {
        let ((acc, state), (acc2, state2)) = (into, from);
        let (m1, m2) = (*state, *state2);
        if m2 == f32::NEG_INFINITY {
            return;
        }
        let m = m1.max(m2);
        let (s1, s2) = (shrink::<S>(m1, m), shrink::<S>(m2, m));
        *state = m;
        *state.add(1) = *state.add(1) * s1 + *state2.add(1) * s2;
        let (v1, v2) = (S::splat(s1), S::splat(s2));
        for d in (0..head_dim).step_by(LANES) {
            let v = S::mul(S::load(acc.add(d)), v1);
            S::store(acc.add(d), S::fma(S::load(acc2.add(d)), v2, v));
        }
    }
}

/// Divides the sum by the weights: the head's output.
///
/// # Safety
/// As [`merge`]; `out` holds `head_dim` values.
#[inline(always)]
pub unsafe fn finish<S: Simd>(head_dim: usize, acc: *const f32, state: *const f32, out: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        let by = S::splat(1.0 / *state.add(1));
        for d in (0..head_dim).step_by(LANES) {
            S::store(out.add(d), S::mul(S::load(acc.add(d)), by));
        }
    }
}

/// Writes one position's key and value of one head. Values beyond f16's range are clamped, so that a block never
/// holds an infinity that a zero weight would turn into NaN.
///
/// # Safety
/// `block` is this head's part of the block, `k` and `v` hold `head_dim` values.
pub unsafe fn write(kv: KvType, head_dim: usize, block: *mut u8, slot: usize, k: *const f32, v: *const f32) {
    // SAFETY: the caller's contract.
    unsafe {
        if !k.is_null() {
            let k = std::slice::from_raw_parts(k, head_dim);
            write_half(kv, block, k, |d| d * BLOCK_TOKENS + slot, |g| g * BLOCK_TOKENS + slot);
        }
        if !v.is_null() {
            let v = std::slice::from_raw_parts(v, head_dim);
            let groups = head_dim / 32;
            let block = block.add(half_bytes(kv, head_dim));
            write_half(kv, block, v, |d| slot * head_dim + d, |g| slot * groups + g);
        }
    }
}

unsafe fn write_half(
    kv: KvType,
    block: *mut u8,
    x: &[f32],
    at: impl Fn(usize) -> usize,
    scale_at: impl Fn(usize) -> usize,
) {
    let half = |x: f32| f16::from_f32(x.clamp(-65504.0, 65504.0));
    // SAFETY: the caller's contract.
    unsafe {
        match kv {
            KvType::F16 => {
                for (d, x) in x.iter().enumerate() {
                    block.cast::<u16>().add(at(d)).write_unaligned(half(*x).to_bits());
                }
            }
            KvType::Q8_0 => {
                let scales = block.add(BLOCK_TOKENS * x.len()).cast::<u16>();
                for (g, group) in x.chunks_exact(32).enumerate() {
                    let largest = group.iter().fold(0f32, |m, x| m.max(x.abs())).min(65504.0 * 127.0);
                    let d = half(largest / 127.0);
                    let inverse = if d.to_f32() > 0.0 { 1.0 / d.to_f32() } else { 0.0 };
                    scales.add(scale_at(g)).write_unaligned(d.to_bits());
                    for (i, x) in group.iter().enumerate() {
                        let q = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
                        block.cast::<i8>().add(at(32 * g + i)).write(q);
                    }
                }
            }
        }
    }
}
