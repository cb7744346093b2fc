//! AVX-512 with VNNI.
use super::Simd;
use std::arch::x86_64::*;

/// Needs avx512f, avx512bw, avx512vl, avx512vnni, avx2, fma and f16c.
#[derive(Clone, Copy)]
pub struct Avx512;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// SAFETY: the trait's contract is that of each method.
#[rustfmt::skip]
#[allow(clippy::missing_safety_doc)]
impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;

    #[inline(always)] unsafe fn splat(x: f32) -> __m512 { unsafe { _mm512_set1_ps(x) } }
    #[inline(always)] unsafe fn load(p: *const f32) -> __m512 { unsafe { _mm512_loadu_ps(p) } }
    #[inline(always)] unsafe fn store(p: *mut f32, v: __m512) { unsafe { _mm512_storeu_ps(p, v) } }
    #[inline(always)] unsafe fn load_f16(p: *const u16) -> __m512 { unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) } }
    #[inline(always)] unsafe fn load_bf16(p: *const u16) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }
    #[inline(always)] unsafe fn add(a: __m512, b: __m512) -> __m512 { unsafe { _mm512_add_ps(a, b) } }
    #[inline(always)] unsafe fn sub(a: __m512, b: __m512) -> __m512 { unsafe { _mm512_sub_ps(a, b) } }
    #[inline(always)] unsafe fn mul(a: __m512, b: __m512) -> __m512 { unsafe { _mm512_mul_ps(a, b) } }
    #[inline(always)] unsafe fn div(a: __m512, b: __m512) -> __m512 { unsafe { _mm512_div_ps(a, b) } }
    #[inline(always)] unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { unsafe { _mm512_fmadd_ps(a, b, c) } }
    #[inline(always)] unsafe fn max(a: __m512, b: __m512) -> __m512 { unsafe { _mm512_max_ps(a, b) } }
    #[inline(always)] unsafe fn min(a: __m512, b: __m512) -> __m512 { unsafe { _mm512_min_ps(a, b) } }
    #[inline(always)] unsafe fn abs(a: __m512) -> __m512 { unsafe { _mm512_abs_ps(a) } }
    #[inline(always)] unsafe fn round(a: __m512) -> __m512 { unsafe { _mm512_roundscale_ps::<NEAREST>(a) } }
    #[inline(always)] unsafe fn select_lt(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }
    #[inline(always)] unsafe fn exp2i(n: __m512) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)))) }
    }
    #[inline(always)] unsafe fn reduce_max(a: __m512) -> f32 { unsafe { _mm512_reduce_max_ps(a) } }

    #[inline(always)] unsafe fn isplat(x: i32) -> __m512i { unsafe { _mm512_set1_epi32(x) } }
    #[inline(always)] unsafe fn load_i8(p: *const i8) -> __m512i { unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) } }
    #[inline(always)] unsafe fn load_u8(p: *const u8) -> __m512i { unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) } }
    #[inline(always)] unsafe fn store_i8(p: *mut i8, v: __m512i) { unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v)) } }
    #[inline(always)] unsafe fn iadd(a: __m512i, b: __m512i) -> __m512i { unsafe { _mm512_add_epi32(a, b) } }
    #[inline(always)] unsafe fn imul(a: __m512i, b: __m512i) -> __m512i { unsafe { _mm512_mullo_epi32(a, b) } }
    #[inline(always)] unsafe fn to_f(a: __m512i) -> __m512 { unsafe { _mm512_cvtepi32_ps(a) } }
    #[inline(always)] unsafe fn to_i(a: __m512) -> __m512i { unsafe { _mm512_cvtps_epi32(a) } }

    #[inline(always)] unsafe fn bload(p: *const u8) -> __m512i { unsafe { _mm512_loadu_si512(p.cast()) } }
    #[inline(always)] unsafe fn band(a: __m512i, mask: u8) -> __m512i { unsafe { _mm512_and_si512(a, _mm512_set1_epi8(mask as i8)) } }
    #[inline(always)] unsafe fn bhigh(a: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(a), _mm512_set1_epi8(0x0f)) }
    }
    #[inline(always)] unsafe fn bmerge<const R: i32>(w: __m512i, h: __m512i, mask: u8) -> __m512i {
        unsafe {
            let s = if R >= 0 { _mm512_srl_epi16(h, _mm_cvtsi32_si128(R)) } else { _mm512_sll_epi16(h, _mm_cvtsi32_si128(-R)) };
            // w | (s & mask)
            _mm512_ternarylogic_epi32::<0xf8>(w, s, _mm512_set1_epi8(mask as i8))
        }
    }
    #[inline(always)] unsafe fn blookup(table: &[u8; 16], a: __m512i) -> __m512i {
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), a) }
    }
    #[inline(always)] unsafe fn dot4(acc: __m512i, w: __m512i, x: *const i8) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)] unsafe fn dot8_start(sum: i32) -> __m512i { unsafe { _mm512_set1_epi32(-128 * sum) } }
    #[inline(always)] unsafe fn dot8(acc: __m512i, w: __m512i, x: *const i8) -> __m512i { unsafe { Self::dot4(acc, w, x) } }
}
