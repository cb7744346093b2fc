//! Sixteen lanes: the little machine that every CPU kernel is written for.
//!
//! A kernel is a generic function over [`Simd`], inlined into one entry point per instruction set, so it is written
//! once. All instruction sets with a fused multiply-add give the same bits: integer sums are exact, every f32
//! operation is element-wise and in a fixed order, and horizontal sums go through [`sum`].
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
pub mod portable;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
pub mod wasm;

/// Lanes of a vector; also the rows of a panel of weights.
pub const LANES: usize = 16;

/// How large the codes of [`Simd::dot_codes`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// Four bits.
    Below16,
    /// Six bits.
    Below64,
    /// Any byte; the accumulator started with [`Simd::dot8_start`].
    Byte,
}

/// Vectors of 16 f32 (`F`), 16 i32 (`I`) and 64 u8 (`B`, four to a lane).
///
/// # Safety
/// Every method requires the instruction set to be present, and pointers to be valid for the bytes that the lane
/// types imply (no alignment is required).
#[allow(clippy::missing_safety_doc, missing_docs)]
pub trait Simd: Copy + 'static {
    type F: Copy;
    type I: Copy;
    type B: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    /// 16 halves.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// 16 bfloat16s.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the instruction set can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    /// Lane by lane `if a < b { x } else { y }`; `y` where either is NaN.
    unsafe fn select_lt(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// `2^n` for lanes that hold whole numbers in -126..=127.
    unsafe fn exp2i(n: Self::F) -> Self::F;
    /// The largest lane.
    unsafe fn reduce_max(a: Self::F) -> f32;

    unsafe fn isplat(x: i32) -> Self::I;
    /// 16 signed bytes, widened.
    unsafe fn load_i8(p: *const i8) -> Self::I;
    /// 16 unsigned bytes, widened.
    unsafe fn load_u8(p: *const u8) -> Self::I;
    /// Stores lanes that lie in -128..=127 as 16 signed bytes.
    unsafe fn store_i8(p: *mut i8, v: Self::I);
    unsafe fn iadd(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn imul(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn to_f(a: Self::I) -> Self::F;
    /// Lanes hold whole numbers.
    unsafe fn to_i(a: Self::F) -> Self::I;

    unsafe fn bload(p: *const u8) -> Self::B;
    /// Each byte `& mask`.
    unsafe fn band(a: Self::B, mask: u8) -> Self::B;
    /// Each byte `>> 4`.
    unsafe fn bhigh(a: Self::B) -> Self::B;
    /// `w | ((h >> R) & mask)` for `R >= 0`, `w | ((h << -R) & mask)` otherwise; `mask` clears what crosses bytes.
    unsafe fn bmerge<const R: i32>(w: Self::B, h: Self::B, mask: u8) -> Self::B;
    /// `table[byte]` for bytes below 16.
    unsafe fn blookup(table: &[u8; 16], a: Self::B) -> Self::B;
    /// `acc + sum of 4 (w[4 lane + i] * x[i])`, `w` unsigned and below 128, `x` four signed bytes (not -128).
    unsafe fn dot4(acc: Self::I, w: Self::B, x: *const i8) -> Self::I;
    /// What an accumulator of [`Simd::dot8`] starts with, `sum` being that of all `x`.
    unsafe fn dot8_start(sum: i32) -> Self::I;
    /// As `dot4` for any byte `w` with 128 taken off it; the accumulator started with [`Simd::dot8_start`].
    unsafe fn dot8(acc: Self::I, w: Self::B, x: *const i8) -> Self::I;
    /// `dot4`, or `dot8` for bytes, of `N` vectors and `4 N` signed bytes.
    #[inline(always)]
    unsafe fn dot_codes<const N: usize>(
        mut acc: Self::I,
        codes: Codes,
        w: &[Self::B; N],
        x: *const i8,
    ) -> Self::I {
        for (j, w) in w.iter().enumerate() {
            // SAFETY: the caller's contract.
            acc = unsafe {
                let x = x.add(4 * j);
                if matches!(codes, Codes::Byte) { Self::dot8(acc, *w, x) } else { Self::dot4(acc, *w, x) }
            };
        }
        acc
    }
}

/// The sum of the lanes in one fixed order.
#[inline(always)]
pub unsafe fn sum<S: Simd>(v: S::F) -> f32 {
    let mut l = [0f32; LANES];
    // SAFETY: `l` has 16 elements.
    unsafe { S::store(l.as_mut_ptr(), v) };
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            l[i] += l[i + half];
        }
    }
    l[0]
}

/// `e^x`, relative error below 2e-7; 0 below -87.3 (also for minus infinity).
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let low = S::splat(-87.3);
        let c = S::min(S::max(x, low), S::splat(88.0));
        let n = S::round(S::mul(c, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), c);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for k in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(k));
        }
        let e = S::add(S::fma(S::mul(r, r), p, r), S::splat(1.0));
        let scaled = S::mul(e, S::exp2i(n));
        S::select_lt(x, low, S::splat(0.0), scaled)
    }
}
