//! WebAssembly's 128-bit vectors, four of them for sixteen lanes. Multiplies and adds are rounded separately, as in the
//! portable set, whose bits these are.
use super::{Codes, Simd};
use core::arch::wasm32::*;

/// Needs simd128, which the whole module is built with or not.
#[derive(Clone, Copy)]
pub struct Simd128;

type V = [v128; 4];

#[inline(always)]
fn each(f: impl Fn(usize) -> v128) -> V {
    [f(0), f(1), f(2), f(3)]
}

/// Four halves in the low parts of 32-bit lanes, as floats: the exponent is moved by a multiplication, which also brings
/// subnormal numbers right.
#[inline(always)]
fn widen(h: v128) -> v128 {
    let sign = i32x4_shl(v128_and(h, i32x4_splat(0x8000)), 16);
    let rest = i32x4_shl(v128_and(h, i32x4_splat(0x7fff)), 13);
    let value = f32x4_mul(rest, f32x4_splat(f32::from_bits((127 + 112) << 23)));
    let special = i32x4_ge(rest, i32x4_splat(0x7c00 << 13));
    let value = v128_or(value, v128_and(special, i32x4_splat(0x7f80_0000)));
    v128_or(value, sign)
}

/// Sums of neighbours: four 32-bit lanes out of eight.
#[inline(always)]
fn pairs(a: v128, b: v128) -> v128 {
    i32x4_add(i32x4_shuffle::<0, 2, 4, 6>(a, b), i32x4_shuffle::<1, 3, 5, 7>(a, b))
}

/// Four bytes, four times.
#[inline(always)]
unsafe fn four(x: *const i8) -> v128 {
    // SAFETY: the caller's contract.
    unsafe { v128_load32_splat(x.cast()) }
}

// SAFETY: the trait's contract is that of each method.
#[rustfmt::skip]
#[allow(clippy::missing_safety_doc)]
impl Simd for Simd128 {
    type F = V;
    type I = V;
    type B = V;

    #[inline(always)] unsafe fn splat(x: f32) -> V { [f32x4_splat(x); 4] }
    #[inline(always)] unsafe fn load(p: *const f32) -> V { each(|k| unsafe { v128_load(p.add(4 * k).cast()) }) }
    #[inline(always)] unsafe fn store(p: *mut f32, v: V) { for k in 0..4 { unsafe { v128_store(p.add(4 * k).cast(), v[k]) } } }
    #[inline(always)] unsafe fn load_f16(p: *const u16) -> V { each(|k| widen(unsafe { u32x4_load_extend_u16x4(p.add(4 * k)) })) }
    #[inline(always)] unsafe fn load_bf16(p: *const u16) -> V { each(|k| i32x4_shl(unsafe { u32x4_load_extend_u16x4(p.add(4 * k)) }, 16)) }
    #[inline(always)] unsafe fn add(a: V, b: V) -> V { each(|k| f32x4_add(a[k], b[k])) }
    #[inline(always)] unsafe fn sub(a: V, b: V) -> V { each(|k| f32x4_sub(a[k], b[k])) }
    #[inline(always)] unsafe fn mul(a: V, b: V) -> V { each(|k| f32x4_mul(a[k], b[k])) }
    #[inline(always)] unsafe fn div(a: V, b: V) -> V { each(|k| f32x4_div(a[k], b[k])) }
    #[inline(always)] unsafe fn fma(a: V, b: V, c: V) -> V { each(|k| f32x4_add(f32x4_mul(a[k], b[k]), c[k])) }
    #[inline(always)] unsafe fn max(a: V, b: V) -> V { each(|k| f32x4_pmax(b[k], a[k])) }
    #[inline(always)] unsafe fn min(a: V, b: V) -> V { each(|k| f32x4_pmin(b[k], a[k])) }
    #[inline(always)] unsafe fn abs(a: V) -> V { each(|k| f32x4_abs(a[k])) }
    #[inline(always)] unsafe fn round(a: V) -> V { each(|k| f32x4_nearest(a[k])) }
    #[inline(always)] unsafe fn select_lt(a: V, b: V, x: V, y: V) -> V { each(|k| v128_bitselect(x[k], y[k], f32x4_lt(a[k], b[k]))) }
    #[inline(always)] unsafe fn exp2i(n: V) -> V { each(|k| i32x4_shl(i32x4_add(i32x4_trunc_sat_f32x4(n[k]), i32x4_splat(127)), 23)) }
    #[inline(always)] unsafe fn reduce_max(a: V) -> f32 {
        let m = f32x4_pmax(f32x4_pmax(a[0], a[1]), f32x4_pmax(a[2], a[3]));
        let m = f32x4_pmax(m, i32x4_shuffle::<2, 3, 0, 1>(m, m));
        f32x4_extract_lane::<0>(f32x4_pmax(m, i32x4_shuffle::<1, 0, 3, 2>(m, m)))
    }

    #[inline(always)] unsafe fn isplat(x: i32) -> V { [i32x4_splat(x); 4] }
    #[inline(always)] unsafe fn load_i8(p: *const i8) -> V {
        let (a, b) = unsafe { (i16x8_load_extend_i8x8(p), i16x8_load_extend_i8x8(p.add(8))) };
        [i32x4_extend_low_i16x8(a), i32x4_extend_high_i16x8(a), i32x4_extend_low_i16x8(b), i32x4_extend_high_i16x8(b)]
    }
    #[inline(always)] unsafe fn load_u8(p: *const u8) -> V {
        let (a, b) = unsafe { (u16x8_load_extend_u8x8(p), u16x8_load_extend_u8x8(p.add(8))) };
        [u32x4_extend_low_u16x8(a), u32x4_extend_high_u16x8(a), u32x4_extend_low_u16x8(b), u32x4_extend_high_u16x8(b)]
    }
    #[inline(always)] unsafe fn store_i8(p: *mut i8, v: V) {
        let bytes = i8x16_narrow_i16x8(i16x8_narrow_i32x4(v[0], v[1]), i16x8_narrow_i32x4(v[2], v[3]));
        unsafe { v128_store(p.cast(), bytes) }
    }
    #[inline(always)] unsafe fn iadd(a: V, b: V) -> V { each(|k| i32x4_add(a[k], b[k])) }
    #[inline(always)] unsafe fn imul(a: V, b: V) -> V { each(|k| i32x4_mul(a[k], b[k])) }
    #[inline(always)] unsafe fn to_f(a: V) -> V { each(|k| f32x4_convert_i32x4(a[k])) }
    #[inline(always)] unsafe fn to_i(a: V) -> V { each(|k| i32x4_trunc_sat_f32x4(a[k])) }

    #[inline(always)] unsafe fn bload(p: *const u8) -> V { each(|k| unsafe { v128_load(p.add(16 * k).cast()) }) }
    #[inline(always)] unsafe fn band(a: V, mask: u8) -> V { each(|k| v128_and(a[k], u8x16_splat(mask))) }
    #[inline(always)] unsafe fn bhigh(a: V) -> V { each(|k| u8x16_shr(a[k], 4)) }
    #[inline(always)] unsafe fn bmerge<const R: i32>(w: V, h: V, mask: u8) -> V {
        each(|k| {
            let s = if R >= 0 { u8x16_shr(h[k], R as u32) } else { u8x16_shl(h[k], -R as u32) };
            v128_or(w[k], v128_and(s, u8x16_splat(mask)))
        })
    }
    #[inline(always)] unsafe fn blookup(table: &[u8; 16], a: V) -> V {
        let table = unsafe { v128_load(table.as_ptr().cast()) };
        each(|k| u8x16_swizzle(table, a[k]))
    }
    #[inline(always)] unsafe fn dot4(acc: V, w: V, x: *const i8) -> V {
        let x = i16x8_extend_low_i8x16(unsafe { four(x) });
        each(|k| {
            let (low, high) = (u16x8_extend_low_u8x16(w[k]), u16x8_extend_high_u8x16(w[k]));
            i32x4_add(acc[k], pairs(i32x4_dot_i16x8(low, x), i32x4_dot_i16x8(high, x)))
        })
    }
    #[inline(always)] unsafe fn dot8_start(sum: i32) -> V { [i32x4_splat(-128 * sum); 4] }
    #[inline(always)] unsafe fn dot8(acc: V, w: V, x: *const i8) -> V { unsafe { Self::dot4(acc, w, x) } }

    /// Products are added up in 16 bits as far as they fit, and neighbours only at the end.
    #[inline(always)] unsafe fn dot_codes<const N: usize>(acc: V, codes: Codes, w: &[V; N], x: *const i8) -> V {
        each(|k| {
            let zero = i32x4_splat(0);
            let (mut low, mut high) = (zero, zero);
            if matches!(codes, Codes::Byte) {
                for j in 0..N {
                    let x = i16x8_extend_low_i8x16(unsafe { four(x.add(4 * j)) });
                    low = i32x4_add(low, i32x4_dot_i16x8(u16x8_extend_low_u8x16(w[j][k]), x));
                    high = i32x4_add(high, i32x4_dot_i16x8(u16x8_extend_high_u8x16(w[j][k]), x));
                }
            } else {
                let fit = if matches!(codes, Codes::Below16) { 8 } else { 4 };
                for first in (0..N).step_by(fit) {
                    let (mut l, mut h) = (zero, zero);
                    for j in first..(first + fit).min(N) {
                        let x = unsafe { four(x.add(4 * j)) };
                        l = i16x8_add(l, i16x8_extmul_low_i8x16(w[j][k], x));
                        h = i16x8_add(h, i16x8_extmul_high_i8x16(w[j][k], x));
                    }
                    low = i32x4_add(low, i32x4_extadd_pairwise_i16x8(l));
                    high = i32x4_add(high, i32x4_extadd_pairwise_i16x8(h));
                }
            }
            i32x4_add(acc[k], pairs(low, high))
        })
    }
}
