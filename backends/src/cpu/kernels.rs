//! One table of entry points per instruction set: the generic kernels, inlined into functions that may use it.
use super::attend::{AttendArgs, Lanes, Query};
use super::gemm::{self, Acts, Format, Gemm};
use super::pack::Kind;
use super::rows::NormArgs;
use super::simd::{self, Simd};
use super::{attend, rows};
use crate::plan::Activation;

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 512-bit vectors with byte dot products.
    Avx512Vnni,
    /// 256-bit vectors with FMA and F16C.
    Avx2,
    /// WebAssembly's 128-bit vectors.
    Simd128,
    /// Whatever the compiler makes of plain arrays.
    Portable,
}

impl Isa {
    /// All, best first.
    pub const ALL: [Isa; 4] = [Isa::Avx512Vnni, Isa::Avx2, Isa::Simd128, Isa::Portable];

    /// Whether this processor has it.
    pub fn present(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Vnni | Isa::Avx2 => false,
            // A module with vectors isn't even loaded where there are none.
            Isa::Simd128 => cfg!(all(target_arch = "wasm32", target_feature = "simd128")),
            Isa::Portable => true,
        }
    }

    /// For a person.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512Vnni => "AVX-512 VNNI",
            Isa::Avx2 => "AVX2",
            Isa::Simd128 => "WebAssembly SIMD",
            Isa::Portable => "portable",
        }
    }

    /// Programs of equal numerics compute equal bits.
    pub fn numerics(self) -> &'static str {
        match self {
            Isa::Avx512Vnni | Isa::Avx2 => "cpu-fma-1",
            Isa::Simd128 | Isa::Portable => "cpu-nofma-1",
        }
    }
}

/// Entry points.
///
/// # Safety
/// Each has the contract of the generic kernel of its name; the instruction set must be present.
#[allow(missing_docs)]
pub struct Kernels {
    pub gemm: fn(Kind) -> unsafe fn(&Gemm),
    pub residual: unsafe fn(*const f32, *const f32, Option<&NormArgs>, *mut f32, *mut f32, usize),
    pub norm: unsafe fn(*const f32, &NormArgs, *mut f32, usize),
    pub quantize: unsafe fn(&Acts, usize, usize, usize),
    pub gate: unsafe fn(Activation, *const f32, *const f32, *mut f32, usize),
    pub soft_cap: unsafe fn(*mut f32, f32, usize),
    pub span: unsafe fn(&AttendArgs, &[u32], usize, &[Query], &mut Lanes),
    pub merge: unsafe fn(usize, (*mut f32, *mut f32), (*const f32, *const f32)),
    pub finish: unsafe fn(usize, *const f32, *const f32, *mut f32),
}

macro_rules! table {
    ($name:ident, $isa:ty, $tiles:ty $(, $features:literal)?) => {
        mod $name {
            use super::*;
            type I = $isa;

            $(#[target_feature(enable = $features)])?
            unsafe fn product<F: Format>(g: &Gemm) {
                // SAFETY: the caller's contract.
                unsafe { gemm::gemm::<I, $tiles, F>(g) }
            }
            fn gemm_of(kind: Kind) -> unsafe fn(&Gemm) {
                match kind {
                    Kind::Q4_0 => product::<gemm::Q4_0>,
                    Kind::Q4_1 => product::<gemm::Q4_1>,
                    Kind::Q5_0 => product::<gemm::Q5_0>,
                    Kind::Q5_1 => product::<gemm::Q5_1>,
                    Kind::Q8_0 => product::<gemm::Q8_0>,
                    Kind::Q2K => product::<gemm::Q2K>,
                    Kind::Q4K => product::<gemm::Q4K>,
                    Kind::Q5K => product::<gemm::Q5K>,
                    Kind::Q6K => product::<gemm::Q6K>,
                    Kind::Iq4Nl => product::<gemm::Iq4Nl>,
                    Kind::Iq4Xs => product::<gemm::Iq4Xs>,
                    Kind::F16 => product::<gemm::F16>,
                    Kind::Bf16 => product::<gemm::Bf16>,
                    Kind::F32 => product::<gemm::F32>,
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn residual(
                x: *const f32, y: *const f32, post: Option<&NormArgs>, out: *mut f32, scratch: *mut f32, n: usize,
            ) {
                // SAFETY: the caller's contract.
                unsafe { rows::residual::<I>(x, y, post, out, scratch, n) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn norm(x: *const f32, args: &NormArgs, out: *mut f32, n: usize) {
                // SAFETY: the caller's contract.
                unsafe { rows::norm::<I>(x, args, out, n) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn quantize(acts: &Acts, n: usize, from: usize, to: usize) {
                // SAFETY: the caller's contract.
                unsafe { rows::quantize::<I>(acts, n, from, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn gate(act: Activation, gate: *const f32, up: *const f32, out: *mut f32, n: usize) {
                // SAFETY: the caller's contract.
                unsafe { rows::gate::<I>(act, gate, up, out, n) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn soft_cap(x: *mut f32, cap: f32, n: usize) {
                // SAFETY: the caller's contract.
                unsafe { rows::soft_cap::<I>(x, cap, n) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn span(a: &AttendArgs, blocks: &[u32], span: usize, queries: &[Query], lanes: &mut Lanes) {
                // SAFETY: the caller's contract.
                unsafe { attend::span::<I>(a, blocks, span, queries, lanes) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn merge(head_dim: usize, into: (*mut f32, *mut f32), from: (*const f32, *const f32)) {
                // SAFETY: the caller's contract.
                unsafe { attend::merge::<I>(head_dim, into, from) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn finish(head_dim: usize, acc: *const f32, state: *const f32, out: *mut f32) {
                // SAFETY: the caller's contract.
                unsafe { attend::finish::<I>(head_dim, acc, state, out) }
            }
            pub static TABLE: Kernels =
                Kernels { gemm: gemm_of, residual, norm, quantize, gate, soft_cap, span, merge, finish };
            const _: () = { const fn is<S: Simd>() {} is::<I>() };
        }
    };
}

#[cfg(target_arch = "x86_64")]
table!(avx512, simd::avx512::Avx512, gemm::Eight, "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
table!(avx2, simd::avx2::Avx2, gemm::Four, "avx2,fma,f16c");
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
table!(simd128, simd::wasm::Simd128, gemm::Four);
table!(portable, simd::portable::Portable, gemm::One);

/// The table of an instruction set that is [`Isa::present`].
pub fn of(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => &avx512::TABLE,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &avx2::TABLE,
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        Isa::Simd128 => &simd128::TABLE,
        _ => &portable::TABLE,
    }
}
