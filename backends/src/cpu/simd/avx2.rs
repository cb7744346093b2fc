//! AVX2 with FMA and F16C: two halves of eight lanes.
use super::Simd;
use std::arch::x86_64::*;

/// Needs avx2, fma and f16c.
#[derive(Clone, Copy)]
pub struct Avx2;

/// Two registers.
#[derive(Clone, Copy)]
pub struct Two<T>(T, T);

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

macro_rules! each {
    ($f:ident, $a:expr) => {
        Two($f($a.0), $f($a.1))
    };
    ($f:ident, $a:expr, $b:expr) => {
        Two($f($a.0, $b.0), $f($a.1, $b.1))
    };
    ($f:ident, $a:expr, $b:expr, $c:expr) => {
        Two($f($a.0, $b.0, $c.0), $f($a.1, $b.1, $c.1))
    };
}

// SAFETY: the trait's contract is that of each method.
#[rustfmt::skip]
#[allow(clippy::missing_safety_doc)]
impl Simd for Avx2 {
    type F = Two<__m256>;
    type I = Two<__m256i>;
    type B = Two<__m256i>;

    #[inline(always)] unsafe fn splat(x: f32) -> Self::F { unsafe { let v = _mm256_set1_ps(x); Two(v, v) } }
    #[inline(always)] unsafe fn load(p: *const f32) -> Self::F { unsafe { Two(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) } }
    #[inline(always)] unsafe fn store(p: *mut f32, v: Self::F) { unsafe { _mm256_storeu_ps(p, v.0); _mm256_storeu_ps(p.add(8), v.1) } }
    #[inline(always)] unsafe fn load_f16(p: *const u16) -> Self::F {
        unsafe { Two(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))) }
    }
    #[inline(always)] unsafe fn load_bf16(p: *const u16) -> Self::F {
        unsafe {
            let half = |p: *const u16| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))));
            Two(half(p), half(p.add(8)))
        }
    }
    #[inline(always)] unsafe fn add(a: Self::F, b: Self::F) -> Self::F { unsafe { each!(_mm256_add_ps, a, b) } }
    #[inline(always)] unsafe fn sub(a: Self::F, b: Self::F) -> Self::F { unsafe { each!(_mm256_sub_ps, a, b) } }
    #[inline(always)] unsafe fn mul(a: Self::F, b: Self::F) -> Self::F { unsafe { each!(_mm256_mul_ps, a, b) } }
    #[inline(always)] unsafe fn div(a: Self::F, b: Self::F) -> Self::F { unsafe { each!(_mm256_div_ps, a, b) } }
    #[inline(always)] unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F { unsafe { each!(_mm256_fmadd_ps, a, b, c) } }
    #[inline(always)] unsafe fn max(a: Self::F, b: Self::F) -> Self::F { unsafe { each!(_mm256_max_ps, a, b) } }
    #[inline(always)] unsafe fn min(a: Self::F, b: Self::F) -> Self::F { unsafe { each!(_mm256_min_ps, a, b) } }
    #[inline(always)] unsafe fn abs(a: Self::F) -> Self::F {
        unsafe { let m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fff_ffff)); each!(_mm256_and_ps, a, Two(m, m)) }
    }
    #[inline(always)] unsafe fn round(a: Self::F) -> Self::F { unsafe { Two(_mm256_round_ps::<NEAREST>(a.0), _mm256_round_ps::<NEAREST>(a.1)) } }
    #[inline(always)] unsafe fn select_lt(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        unsafe {
            let m = Two(_mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0), _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1));
            each!(_mm256_blendv_ps, y, x, m)
        }
    }
    #[inline(always)] unsafe fn exp2i(n: Self::F) -> Self::F {
        unsafe {
            let half = |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127))));
            Two(half(n.0), half(n.1))
        }
    }
    #[inline(always)] unsafe fn reduce_max(a: Self::F) -> f32 {
        unsafe {
            let m = _mm256_max_ps(a.0, a.1);
            let m = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps::<1>(m));
            let m = _mm_max_ps(m, _mm_movehl_ps(m, m));
            _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps::<1>(m, m)))
        }
    }

    #[inline(always)] unsafe fn isplat(x: i32) -> Self::I { unsafe { let v = _mm256_set1_epi32(x); Two(v, v) } }
    #[inline(always)] unsafe fn load_i8(p: *const i8) -> Self::I {
        unsafe { Two(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))) }
    }
    #[inline(always)] unsafe fn load_u8(p: *const u8) -> Self::I {
        unsafe { Two(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()))) }
    }
    #[inline(always)] unsafe fn store_i8(p: *mut i8, v: Self::I) {
        unsafe {
            // packs works within 128-bit halves: [a0 b0 a1 b1] of 4 i16 each, put back in order
            let w = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(v.0, v.1));
            _mm_storeu_si128(p.cast(), _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256::<1>(w)))
        }
    }
    #[inline(always)] unsafe fn iadd(a: Self::I, b: Self::I) -> Self::I { unsafe { each!(_mm256_add_epi32, a, b) } }
    #[inline(always)] unsafe fn imul(a: Self::I, b: Self::I) -> Self::I { unsafe { each!(_mm256_mullo_epi32, a, b) } }
    #[inline(always)] unsafe fn to_f(a: Self::I) -> Self::F { unsafe { each!(_mm256_cvtepi32_ps, a) } }
    #[inline(always)] unsafe fn to_i(a: Self::F) -> Self::I { unsafe { each!(_mm256_cvtps_epi32, a) } }

    #[inline(always)] unsafe fn bload(p: *const u8) -> Self::B {
        unsafe { Two(_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())) }
    }
    #[inline(always)] unsafe fn band(a: Self::B, mask: u8) -> Self::B {
        unsafe { let m = _mm256_set1_epi8(mask as i8); each!(_mm256_and_si256, a, Two(m, m)) }
    }
    #[inline(always)] unsafe fn bhigh(a: Self::B) -> Self::B {
        unsafe { Self::band(Two(_mm256_srli_epi16::<4>(a.0), _mm256_srli_epi16::<4>(a.1)), 0x0f) }
    }
    #[inline(always)] unsafe fn bmerge<const R: i32>(w: Self::B, h: Self::B, mask: u8) -> Self::B {
        unsafe {
            let n = _mm_cvtsi32_si128(if R >= 0 { R } else { -R });
            let s = if R >= 0 { Two(_mm256_srl_epi16(h.0, n), _mm256_srl_epi16(h.1, n)) } else { Two(_mm256_sll_epi16(h.0, n), _mm256_sll_epi16(h.1, n)) };
            each!(_mm256_or_si256, w, Self::band(s, mask))
        }
    }
    #[inline(always)] unsafe fn blookup(table: &[u8; 16], a: Self::B) -> Self::B {
        unsafe { let t = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())); each!(_mm256_shuffle_epi8, Two(t, t), a) }
    }
    #[inline(always)] unsafe fn dot4(acc: Self::I, w: Self::B, x: *const i8) -> Self::I {
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let one = _mm256_set1_epi16(1);
            let half = |acc, w| _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), one));
            Two(half(acc.0, w.0), half(acc.1, w.1))
        }
    }
    #[inline(always)] unsafe fn dot8_start(_sum: i32) -> Self::I { unsafe { Self::isplat(0) } }
    #[inline(always)] unsafe fn dot8(acc: Self::I, w: Self::B, x: *const i8) -> Self::I {
        unsafe {
            // pairs of unsigned products would saturate 16 bits, so the weight's sign goes to x: |w| <= 128, |x| <= 127
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let one = _mm256_set1_epi16(1);
            let flip = _mm256_set1_epi8(-128);
            let half = |acc, w| {
                let w = _mm256_xor_si256(w, flip);
                let p = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                _mm256_add_epi32(acc, _mm256_madd_epi16(p, one))
            };
            Two(half(acc.0, w.0), half(acc.1, w.1))
        }
    }
}
