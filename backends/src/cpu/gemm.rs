//! Products of packed weights with quantised activations.
//!
//! For output row `r` and column `n`, the sum runs over blocks in order: an exact integer dot product of the block's
//! codes, then one fused multiply-add into an f32 accumulator (and one for the minimum). Nothing depends on which
//! other columns or rows are computed beside it, so results are the same bits in any batch.
use super::pack::{BLOCK, Codes, IQ4, Kind, Layout, Scales};
use super::simd::{self, LANES, Simd};

/// Quantised columns of activations, as raw parts: column `n` of array `a` starts at `a + n * stride`.
///
/// Per block of 32 values `x`: `q = round(x / d)` in -127..=127 with `d = max|x| / 127`; sums of `q` over the block and
/// its halves, multiplied by what unsigned codes need.
#[derive(Clone, Copy)]
pub struct Acts {
    /// The values as f32, `[n][cols]`, for float weights.
    pub f: *const f32,
    /// `[n][cols]`.
    pub q: *const i8,
    /// `[n][blocks]` scales.
    pub d: *const f32,
    /// `[n][blocks]` of [`Sums`], as separate arrays.
    pub sums: *const i32,
    /// Columns of the weights (rows of the batch are "columns" of the activations).
    pub cols: usize,
}

/// The arrays behind [`Acts::sums`], each `blocks` long; `SUMS` of them a column.
#[derive(Clone, Copy)]
#[repr(usize)]
pub enum Sums {
    /// `d * sum` as f32 bits.
    Scaled,
    /// `-8 sum`.
    M8,
    /// `-16 sum`.
    M16,
    /// `sum`, for codes of any byte.
    Plain,
    /// `-32 sum` of the first half.
    FirstM32,
    /// `-32 sum` of the second half.
    SecondM32,
    /// `sum` of the first half.
    First,
    /// `sum` of the second half.
    Second,
}

/// Arrays in [`Sums`].
pub const SUMS: usize = 8;

/// A product `y[n][row0 + r] = W[r] . x[n]` over some panels.
pub struct Gemm {
    /// First panel's bytes.
    pub panels: *const u8,
    /// How many.
    pub count: usize,
    /// Bytes of one.
    pub panel_bytes: usize,
    /// The activations.
    pub x: Acts,
    /// Columns of `x` to multiply with.
    pub n: usize,
    /// Where the first panel's 16 rows go for column 0.
    pub y: *mut f32,
    /// From one column's output to the next, in f32.
    pub y_stride: usize,
}

/// A number format at compile time.
pub trait Format: 'static {
    /// Which.
    const KIND: Kind;
}

macro_rules! formats {
    ($($name:ident),*) => { $(
        #[doc = concat!("[`Kind::", stringify!($name), "`].")]
        pub struct $name;
        impl Format for $name { const KIND: Kind = Kind::$name; }
    )* };
}
formats!(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q4K, Q5K, Q6K, Iq4Nl, Iq4Xs, F16, Bf16, F32);

/// How many columns are computed by one pass over a panel's codes: the most that registers hold. Each size is one more
/// copy of every format's kernel, so there are few.
pub trait Tiles {
    /// The largest.
    const MOST: usize;
    /// Computes some of the `left` columns from `n0` on, and says how many.
    ///
    /// # Safety
    /// As [`gemm`].
    unsafe fn run<S: Simd, F: Format>(
        left: usize,
        w: *const u8,
        x: &Acts,
        n0: usize,
        y: *mut f32,
        y_stride: usize,
    ) -> usize;
}

macro_rules! tiles {
    ($(#[$doc:meta])* $name:ident, $most:literal, $($n:literal),*) => {
        $(#[$doc])*
        pub struct $name;
        impl Tiles for $name {
            const MOST: usize = $most;
            #[inline(always)]
            unsafe fn run<S: Simd, F: Format>(
                left: usize, w: *const u8, x: &Acts, n0: usize, y: *mut f32, y_stride: usize,
            ) -> usize {
                // SAFETY: the caller's contract; a tile of `n` columns runs only where there are as many.
                unsafe {
                    $(if left >= $n { return tile::<S, F, $n>(w, x, n0, y, y_stride); })*
                }
                left
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
tiles!(
    /// Thirty-two wide registers.
    Eight, 8, 8, 4, 1
);
#[cfg(any(target_arch = "x86_64", target_arch = "wasm32"))]
tiles!(
    /// Sixteen registers of half the width.
    Four, 4, 4, 1
);
tiles!(
    /// No registers to speak of.
    One, 1, 1
);

/// Runs `g`.
///
/// # Safety
/// Pointers as described in [`Gemm`]; `x.cols` a multiple of the format's unit; the instruction set is present.
#[inline(always)]
pub unsafe fn gemm<S: Simd, T: Tiles, F: Format>(g: &Gemm) {
    // SAFETY: the caller's contract is passed on; tiles stay below `g.n`.
    unsafe {
        // Columns in strips that stay in the second-level cache while the panels pass over them.
        let strip = (256 * 1024 / g.x.cols.max(1)).max(T::MOST) / T::MOST * T::MOST;
        let mut from = 0;
        while from < g.n {
            let to = (from + strip).min(g.n);
            for p in 0..g.count {
                let w = g.panels.add(p * g.panel_bytes);
                let mut n = from;
                while n < to {
                    let y = g.y.add(n * g.y_stride + p * LANES);
                    n += T::run::<S, F>(to - n, w, &g.x, n, y, g.y_stride);
                }
            }
            from = to;
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, F: Format, const N: usize>(
    w: *const u8,
    x: &Acts,
    n0: usize,
    y: *mut f32,
    y_stride: usize,
) -> usize {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [S::splat(0.0); N];
        match const { F::KIND.layout() } {
            Some(l) => integer_tile::<S, F, N>(&l, w, x, n0, &mut acc),
            None => float_tile::<S, F, N>(w, x, n0, &mut acc),
        }
        for (n, a) in acc.into_iter().enumerate() {
            S::store(y.add(n * y_stride), a);
        }
    }
    N
}

/// Even columns and odd ones, twice over, go to four accumulators, so that the adds overlap.
#[inline(always)]
unsafe fn float_tile<S: Simd, F: Format, const N: usize>(
    w: *const u8,
    x: &Acts,
    n0: usize,
    acc: &mut [S::F; N],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let row = |c: usize| match F::KIND {
            Kind::F16 => S::load_f16(w.cast::<u16>().add(c * LANES)),
            Kind::Bf16 => S::load_bf16(w.cast::<u16>().add(c * LANES)),
            _ => S::load(w.cast::<f32>().add(c * LANES)),
        };
        let mut four = [[S::splat(0.0); 4]; N];
        let whole = x.cols / 4 * 4;
        let mut c = 0;
        while c < whole {
            for i in 0..4 {
                let v = row(c + i);
                for n in 0..N {
                    let xn = S::splat(*x.f.add((n0 + n) * x.cols + c + i));
                    four[n][i] = S::fma(v, xn, four[n][i]);
                }
            }
            c += 4;
        }
        for n in 0..N {
            acc[n] = S::add(S::add(four[n][0], four[n][1]), S::add(four[n][2], four[n][3]));
            for c in whole..x.cols {
                acc[n] = S::fma(row(c), S::splat(*x.f.add((n0 + n) * x.cols + c)), acc[n]);
            }
        }
    }
}

/// The codes of a block, four columns a vector.
#[inline(always)]
unsafe fn codes<S: Simd>(l: &Layout, p: *const u8) -> [S::B; 8] {
    // SAFETY: a block has `l.codes.bytes()` bytes.
    unsafe {
        if matches!(l.codes, Codes::N8) {
            return std::array::from_fn(|j| S::bload(p.add(64 * j)));
        }
        let raw: [S::B; 4] = std::array::from_fn(|k| S::bload(p.add(64 * k)));
        let (a, b, c, d) = (raw[0], raw[1], raw[2], raw[3]);
        let mut w = [
            S::band(a, 15),
            S::band(b, 15),
            S::band(c, 15),
            S::band(d, 15),
            S::bhigh(a),
            S::bhigh(b),
            S::bhigh(c),
            S::bhigh(d),
        ];
        match l.codes {
            Codes::N5 => {
                let h = S::bload(p.add(256));
                w[0] = S::bmerge::<-4>(w[0], h, 16);
                w[1] = S::bmerge::<-3>(w[1], h, 16);
                w[2] = S::bmerge::<-2>(w[2], h, 16);
                w[3] = S::bmerge::<-1>(w[3], h, 16);
                w[4] = S::bmerge::<0>(w[4], h, 16);
                w[5] = S::bmerge::<1>(w[5], h, 16);
                w[6] = S::bmerge::<2>(w[6], h, 16);
                w[7] = S::bmerge::<3>(w[7], h, 16);
            }
            Codes::N6 => {
                for m in 0..2 {
                    let h = S::bload(p.add(256 + 64 * m));
                    w[4 * m] = S::bmerge::<-4>(w[4 * m], h, 48);
                    w[4 * m + 1] = S::bmerge::<-2>(w[4 * m + 1], h, 48);
                    w[4 * m + 2] = S::bmerge::<0>(w[4 * m + 2], h, 48);
                    w[4 * m + 3] = S::bmerge::<2>(w[4 * m + 3], h, 48);
                }
            }
            Codes::N4 | Codes::N8 => {}
        }
        if l.lut { w.map(|w| S::blookup(&IQ4, w)) } else { w }
    }
}

/// How large the codes are.
#[inline(always)]
fn size(l: &Layout) -> simd::Codes {
    match l.codes {
        Codes::N4 if !l.lut => simd::Codes::Below16,
        Codes::N5 | Codes::N6 => simd::Codes::Below64,
        Codes::N4 | Codes::N8 => simd::Codes::Byte,
    }
}

/// One column's arrays.
#[derive(Clone, Copy)]
struct Column {
    q: *const i8,
    d: *const f32,
    sums: *const i32,
    blocks: usize,
}

impl Column {
    #[inline(always)]
    unsafe fn of(x: &Acts, n: usize) -> Column {
        let blocks = x.cols / BLOCK;
        // SAFETY: column `n` exists.
        unsafe {
            Column {
                q: x.q.add(n * x.cols),
                d: x.d.add(n * blocks),
                sums: x.sums.add(n * SUMS * blocks),
                blocks,
            }
        }
    }
    #[inline(always)]
    unsafe fn sum(&self, which: Sums, block: usize) -> i32 {
        // SAFETY: `block` exists.
        unsafe { *self.sums.add(which as usize * self.blocks + block) }
    }
    #[inline(always)]
    unsafe fn scaled_sum(&self, block: usize) -> f32 {
        // SAFETY: `block` exists.
        f32::from_bits(unsafe { self.sum(Sums::Scaled, block) } as u32)
    }
    /// The exact dot product of one block, less the codes' zero.
    #[inline(always)]
    unsafe fn dot<S: Simd>(&self, l: &Layout, w: &[S::B; 8], block: usize) -> S::I {
        // SAFETY: `block` exists.
        unsafe {
            let start = match l.zero {
                0 => S::isplat(0),
                8 => S::isplat(self.sum(Sums::M8, block)),
                16 => S::isplat(self.sum(Sums::M16, block)),
                _ => S::dot8_start(self.sum(Sums::Plain, block)),
            };
            S::dot_codes(start, size(l), w, self.q.add(block * BLOCK))
        }
    }
    /// The same for the two halves of a block.
    #[inline(always)]
    unsafe fn dot_halves<S: Simd>(&self, l: &Layout, w: &[S::B; 8], block: usize) -> (S::I, S::I) {
        // SAFETY: `block` exists.
        unsafe {
            let (a, b) = if l.zero == 0 {
                (S::isplat(0), S::isplat(0))
            } else {
                (S::isplat(self.sum(Sums::FirstM32, block)), S::isplat(self.sum(Sums::SecondM32, block)))
            };
            let x = self.q.add(block * BLOCK);
            let [w0, w1, w2, w3, w4, w5, w6, w7] = *w;
            let first = S::dot_codes(a, size(l), &[w0, w1, w2, w3], x);
            (first, S::dot_codes(b, size(l), &[w4, w5, w6, w7], x.add(16)))
        }
    }
}

#[inline(always)]
unsafe fn integer_tile<S: Simd, F: Format, const N: usize>(
    l: &Layout,
    w: *const u8,
    x: &Acts,
    n0: usize,
    acc: &mut [S::F; N],
) {
    // SAFETY: the caller's contract; a panel has `cols / (32 * blocks a unit)` units.
    unsafe {
        let mut column = [Column::of(x, n0); N];
        for (n, c) in column.iter_mut().enumerate() {
            *c = Column::of(x, n0 + n);
        }
        let units = x.cols / (BLOCK * l.blocks());
        for u in 0..units {
            let unit = w.add(u * l.unit_bytes());
            if matches!(l.scales, Scales::Half) {
                half_block::<S, N>(l, unit, &column, u, acc);
                continue;
            }
            let d = S::load_f16(unit.cast());
            let dmin = if l.min {
                S::mul(S::load_f16(unit.add(2 * LANES).cast()), S::splat(-1.0))
            } else {
                S::splat(0.0)
            };
            for b in 0..8 {
                let block = unit.add(l.front() + b * l.block_bytes());
                if matches!(l.scales, Scales::Byte32) {
                    byte_block::<S, N>(l, block, &column, 8 * u + b, (d, dmin), acc);
                } else {
                    halves_block::<S, N>(l, block, &column, 8 * u + b, (d, dmin), acc);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn half_block<S: Simd, const N: usize>(
    l: &Layout,
    p: *const u8,
    columns: &[Column; N],
    block: usize,
    acc: &mut [S::F; N],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let w = codes::<S>(l, p);
        let scales = p.add(l.codes.bytes());
        let d = S::load_f16(scales.cast());
        let m = if l.min { S::load_f16(scales.add(2 * LANES).cast()) } else { d };
        scaled_block::<S, N>(l, &w, columns, block, (d, m), acc);
    }
}

/// Adds a block with one scale a row and, where the format has one, one minimum a row.
#[inline(always)]
unsafe fn scaled_block<S: Simd, const N: usize>(
    l: &Layout,
    w: &[S::B; 8],
    columns: &[Column; N],
    block: usize,
    (d, m): (S::F, S::F),
    acc: &mut [S::F; N],
) {
    // SAFETY: the caller's contract.
    unsafe {
        for (c, acc) in columns.iter().zip(acc) {
            let i = c.dot::<S>(l, w, block);
            *acc = S::fma(S::to_f(i), S::mul(d, S::splat(*c.d.add(block))), *acc);
            if l.min {
                *acc = S::fma(m, S::splat(c.scaled_sum(block)), *acc);
            }
        }
    }
}

/// Integer products times integer scales stay below 2^24, so they are exact as f32 too.
#[inline(always)]
unsafe fn byte_block<S: Simd, const N: usize>(
    l: &Layout,
    p: *const u8,
    columns: &[Column; N],
    block: usize,
    (d, dmin): (S::F, S::F),
    acc: &mut [S::F; N],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let w = codes::<S>(l, p);
        let scales = p.add(l.codes.bytes());
        let s = if l.min { S::load_u8(scales) } else { S::load_i8(scales.cast()) };
        let ds = S::mul(d, S::to_f(s));
        let m = if l.min { S::mul(dmin, S::to_f(S::load_u8(scales.add(LANES)))) } else { d };
        scaled_block::<S, N>(l, &w, columns, block, (ds, m), acc);
    }
}

#[inline(always)]
unsafe fn halves_block<S: Simd, const N: usize>(
    l: &Layout,
    p: *const u8,
    columns: &[Column; N],
    block: usize,
    (d, dmin): (S::F, S::F),
    acc: &mut [S::F; N],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let w = codes::<S>(l, p);
        let scales = p.add(l.codes.bytes());
        let load = |k: usize| {
            let p = scales.add(k * LANES);
            if l.min { S::load_u8(p) } else { S::load_i8(p.cast()) }
        };
        let (s0, s1) = (load(0), load(1));
        for (c, acc) in columns.iter().zip(acc) {
            let (a, b) = c.dot_halves::<S>(l, &w, block);
            let i = S::iadd(S::imul(a, s0), S::imul(b, s1));
            let dx = S::splat(*c.d.add(block));
            *acc = S::fma(S::to_f(i), S::mul(d, dx), *acc);
            if l.min {
                let i = S::iadd(
                    S::imul(load(2), S::isplat(c.sum(Sums::First, block))),
                    S::imul(load(3), S::isplat(c.sum(Sums::Second, block))),
                );
                *acc = S::fma(S::to_f(i), S::mul(dmin, dx), *acc);
            }
        }
    }
}
