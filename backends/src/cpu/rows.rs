//! What happens to one row of activations between products: residual sums, norms, quantisation, the gate.
use super::gemm::{Acts, SUMS, Sums};
use super::pack::BLOCK;
use super::simd::{LANES, Simd, exp, sum};
use crate::plan::{Activation, NormKind};

/// A norm with its weights; none is the identity.
#[derive(Clone, Copy)]
pub struct NormArgs {
    /// Formula.
    pub kind: NormKind,
    /// Gain, one a column.
    pub weight: *const f32,
    /// Null where there is none.
    pub bias: *const f32,
    /// Under the root.
    pub eps: f32,
}

/// `out = x + post(y)`; `y` may be null, `out` may be `x`.
///
/// # Safety
/// All point to `n` values, a multiple of 16.
#[inline(always)]
pub unsafe fn residual<S: Simd>(
    x: *const f32,
    y: *const f32,
    post: Option<&NormArgs>,
    out: *mut f32,
    scratch: *mut f32,
    n: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let y = match (y.is_null(), post) {
            (false, Some(post)) => {
                norm::<S>(y, post, scratch, n);
                scratch.cast_const()
            }
            _ => y,
        };
        for i in (0..n).step_by(LANES) {
            let v = S::load(x.add(i));
            S::store(out.add(i), if y.is_null() { v } else { S::add(v, S::load(y.add(i))) });
        }
    }
}

/// `out = norm(x)`; `out` may be `x`.
///
/// # Safety
/// All point to `n` values, a multiple of 16.
#[inline(always)]
pub unsafe fn norm<S: Simd>(x: *const f32, args: &NormArgs, out: *mut f32, n: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let mean = match args.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => {
                let mut s = S::splat(0.0);
                for i in (0..n).step_by(LANES) {
                    s = S::add(s, S::load(x.add(i)));
                }
                sum::<S>(s) / n as f32
            }
        };
        let m = S::splat(mean);
        let mut s = S::splat(0.0);
        for i in (0..n).step_by(LANES) {
            let v = S::sub(S::load(x.add(i)), m);
            s = S::fma(v, v, s);
        }
        let scale = S::splat(1.0 / (sum::<S>(s) / n as f32 + args.eps).sqrt());
        for i in (0..n).step_by(LANES) {
            let v = S::mul(S::sub(S::load(x.add(i)), m), scale);
            let v = S::mul(v, S::load(args.weight.add(i)));
            let v = if args.bias.is_null() { v } else { S::add(v, S::load(args.bias.add(i))) };
            S::store(out.add(i), v);
        }
    }
}

/// Quantises row `n` of `acts.f` (blocks `from..to` of it) into the other arrays.
///
/// # Safety
/// The arrays hold row `n`; `acts.cols` is a multiple of 32.
#[inline(always)]
pub unsafe fn quantize<S: Simd>(acts: &Acts, n: usize, from: usize, to: usize) {
    let blocks = acts.cols / BLOCK;
    // SAFETY: the caller's contract; the arrays were allocated by the program that owns them, as mutable memory.
    unsafe {
        for b in from..to {
            let x = acts.f.add(n * acts.cols + b * BLOCK);
            let q = acts.q.add(n * acts.cols + b * BLOCK).cast_mut();
            let (lo, hi) = (S::load(x), S::load(x.add(LANES)));
            let largest = S::reduce_max(S::max(S::abs(lo), S::abs(hi)));
            let d = largest / 127.0;
            let inverse = S::splat(if d > 0.0 { 127.0 / largest } else { 0.0 });
            let (lo, hi) = (S::round(S::mul(lo, inverse)), S::round(S::mul(hi, inverse)));
            S::store_i8(q, S::to_i(lo));
            S::store_i8(q.add(LANES), S::to_i(hi));
            // whole numbers below 2^11: exact in any order
            let (first, second) = (sum::<S>(lo) as i32, sum::<S>(hi) as i32);
            let all = first + second;
            *acts.d.add(n * blocks + b).cast_mut() = d;
            let sums = acts.sums.add(n * SUMS * blocks + b).cast_mut();
            let put = |which: Sums, v: i32| *sums.add(which as usize * blocks) = v;
            put(Sums::Scaled, (d * all as f32).to_bits() as i32);
            put(Sums::M8, -8 * all);
            put(Sums::M16, -16 * all);
            put(Sums::Plain, all);
            put(Sums::FirstM32, -32 * first);
            put(Sums::SecondM32, -32 * second);
            put(Sums::First, first);
            put(Sums::Second, second);
        }
    }
}

/// `out = act(gate) * up`, or `act(gate)` where `up` is null.
///
/// # Safety
/// All point to `n` values, a multiple of 16; `out` may be either input.
#[inline(always)]
pub unsafe fn gate<S: Simd>(act: Activation, gate: *const f32, up: *const f32, out: *mut f32, n: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let one = S::splat(1.0);
        for i in (0..n).step_by(LANES) {
            let g = S::load(gate.add(i));
            // gelu_tanh(x) = x * sigmoid(2 u), silu(x) = x * sigmoid(x)
            let u = match act {
                Activation::Silu => g,
                Activation::GeluTanh => {
                    let k = S::splat(2.0 * 0.797_884_6);
                    let cubic = S::fma(S::mul(S::splat(0.044_715), S::mul(g, g)), g, g);
                    S::mul(k, cubic)
                }
            };
            let e = exp::<S>(S::sub(S::splat(0.0), u));
            let v = S::div(g, S::add(one, e));
            S::store(out.add(i), if up.is_null() { v } else { S::mul(v, S::load(up.add(i))) });
        }
    }
}

/// `x = cap * tanh(x / cap)`.
///
/// # Safety
/// `x` points to `n` values, a multiple of 16.
#[inline(always)]
pub unsafe fn soft_cap<S: Simd>(x: *mut f32, cap: f32, n: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        for i in (0..n).step_by(LANES) {
            S::store(x.add(i), capped::<S>(S::load(x.add(i)), cap));
        }
    }
}

/// `cap * tanh(x / cap)`, lane by lane.
#[inline(always)]
pub unsafe fn capped<S: Simd>(x: S::F, cap: f32) -> S::F {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let one = S::splat(1.0);
        // tanh(u) = 1 - 2 / (e^(2u) + 1)
        let e = exp::<S>(S::mul(x, S::splat(2.0 / cap)));
        S::mul(S::splat(cap), S::sub(one, S::div(S::splat(2.0), S::add(e, one))))
    }
}
