//! Any processor: plain arrays that the compiler may vectorise. Multiplies and adds are rounded separately, so its
//! numerics differ from those of the fused instruction sets.
use super::{LANES, Simd};
use half::{bf16, f16};

/// Needs nothing.
#[derive(Clone, Copy)]
pub struct Portable;

type F = [f32; LANES];
type I = [i32; LANES];
type B = [u8; 64];

#[inline(always)]
fn zip<T: Copy>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> T) -> [T; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// SAFETY: the trait's contract is that of each method.
#[rustfmt::skip]
#[allow(clippy::missing_safety_doc)]
impl Simd for Portable {
    type F = F;
    type I = I;
    type B = B;

    #[inline(always)] unsafe fn splat(x: f32) -> F { [x; LANES] }
    #[inline(always)] unsafe fn load(p: *const f32) -> F { unsafe { p.cast::<F>().read_unaligned() } }
    #[inline(always)] unsafe fn store(p: *mut f32, v: F) { unsafe { p.cast::<F>().write_unaligned(v) } }
    #[inline(always)] unsafe fn load_f16(p: *const u16) -> F { let h = unsafe { p.cast::<[u16; LANES]>().read_unaligned() }; h.map(|b| f16::from_bits(b).to_f32()) }
    #[inline(always)] unsafe fn load_bf16(p: *const u16) -> F { let h = unsafe { p.cast::<[u16; LANES]>().read_unaligned() }; h.map(|b| bf16::from_bits(b).to_f32()) }
    #[inline(always)] unsafe fn add(a: F, b: F) -> F { zip(a, b, |a, b| a + b) }
    #[inline(always)] unsafe fn sub(a: F, b: F) -> F { zip(a, b, |a, b| a - b) }
    #[inline(always)] unsafe fn mul(a: F, b: F) -> F { zip(a, b, |a, b| a * b) }
    #[inline(always)] unsafe fn div(a: F, b: F) -> F { zip(a, b, |a, b| a / b) }
    #[inline(always)] unsafe fn fma(a: F, b: F, c: F) -> F { std::array::from_fn(|i| a[i] * b[i] + c[i]) }
    #[inline(always)] unsafe fn max(a: F, b: F) -> F { zip(a, b, |a, b| if a > b { a } else { b }) }
    #[inline(always)] unsafe fn min(a: F, b: F) -> F { zip(a, b, |a, b| if a < b { a } else { b }) }
    #[inline(always)] unsafe fn abs(a: F) -> F { a.map(f32::abs) }
    #[inline(always)] unsafe fn round(a: F) -> F { a.map(f32::round_ties_even) }
    #[inline(always)] unsafe fn select_lt(a: F, b: F, x: F, y: F) -> F { std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] }) }
    #[inline(always)] unsafe fn exp2i(n: F) -> F { n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23)) }
    #[inline(always)] unsafe fn reduce_max(a: F) -> f32 { a.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m }) }

    #[inline(always)] unsafe fn isplat(x: i32) -> I { [x; LANES] }
    #[inline(always)] unsafe fn load_i8(p: *const i8) -> I { let b = unsafe { p.cast::<[i8; LANES]>().read_unaligned() }; b.map(i32::from) }
    #[inline(always)] unsafe fn load_u8(p: *const u8) -> I { let b = unsafe { p.cast::<[u8; LANES]>().read_unaligned() }; b.map(i32::from) }
    #[inline(always)] unsafe fn store_i8(p: *mut i8, v: I) { unsafe { p.cast::<[i8; LANES]>().write_unaligned(v.map(|x| x as i8)) } }
    #[inline(always)] unsafe fn iadd(a: I, b: I) -> I { zip(a, b, i32::wrapping_add) }
    #[inline(always)] unsafe fn imul(a: I, b: I) -> I { zip(a, b, i32::wrapping_mul) }
    #[inline(always)] unsafe fn to_f(a: I) -> F { a.map(|x| x as f32) }
    #[inline(always)] unsafe fn to_i(a: F) -> I { a.map(|x| x as i32) }

    #[inline(always)] unsafe fn bload(p: *const u8) -> B { unsafe { p.cast::<B>().read_unaligned() } }
    #[inline(always)] unsafe fn band(a: B, mask: u8) -> B { a.map(|b| b & mask) }
    #[inline(always)] unsafe fn bhigh(a: B) -> B { a.map(|b| b >> 4) }
    #[inline(always)] unsafe fn bmerge<const R: i32>(w: B, h: B, mask: u8) -> B {
        std::array::from_fn(|i| {
            let s = if R >= 0 { h[i].wrapping_shr(R as u32) } else { h[i].wrapping_shl(-R as u32) };
            w[i] | (s & mask)
        })
    }
    #[inline(always)] unsafe fn blookup(table: &[u8; 16], a: B) -> B { a.map(|b| table[usize::from(b & 15)]) }
    #[inline(always)] unsafe fn dot4(acc: I, w: B, x: *const i8) -> I {
        let x = unsafe { x.cast::<[i8; 4]>().read_unaligned() };
        std::array::from_fn(|l| acc[l] + (0..4).map(|i| i32::from(w[4 * l + i]) * i32::from(x[i])).sum::<i32>())
    }
    #[inline(always)] unsafe fn dot8_start(sum: i32) -> I { [-128 * sum; LANES] }
    #[inline(always)] unsafe fn dot8(acc: I, w: B, x: *const i8) -> I { unsafe { Self::dot4(acc, w, x) } }
}
