//! The formulas, on slices.
use crate::gguf::{GgmlType, ModelFile};
use crate::plan::{Activation, Attend, NormKind, Rope, RopePairs};
use crate::program::DeviceError;
use crate::quant;
use std::ops::Range;

/// A tensor as the file stores it.
pub(super) struct Tensor {
    ty: GgmlType,
    bytes: Vec<u8>,
}

impl Tensor {
    pub(super) fn read(model: &ModelFile, name: &str) -> Result<Tensor, DeviceError> {
        let info = model
            .tensor(name)
            .ok_or_else(|| DeviceError::Unsupported(format!("the file has no tensor {name}")))?;
        let mut bytes = vec![0; info.bytes as usize];
        model.read(info, 0..info.bytes, &mut bytes).map_err(|error| DeviceError::File(error.to_string()))?;
        Ok(Tensor { ty: info.ty, bytes })
    }

    pub(super) fn values(&self) -> usize {
        self.bytes.len() / self.ty.block_bytes() * self.ty.block_values()
    }

    /// Some rows of `cols` values, dequantised.
    pub(super) fn rows(&self, rows: Range<usize>, cols: usize) -> Vec<f32> {
        let row_bytes = cols / self.ty.block_values() * self.ty.block_bytes();
        let mut values = vec![0.0; rows.len() * cols];
        quant::dequantize(self.ty, &self.bytes[rows.start * row_bytes..rows.end * row_bytes], &mut values);
        values
    }
}

/// `x += y`.
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Of one row; means in double precision.
pub(super) fn norm(kind: NormKind, eps: f32, weight: &[f32], bias: Option<&[f32]>, x: &[f32]) -> Vec<f32> {
    let mean_of = |f: &dyn Fn(f64) -> f64| x.iter().map(|&v| f(f64::from(v))).sum::<f64>() / x.len() as f64;
    let centre = match kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => mean_of(&|v| v),
    };
    let scale = (1.0 / (mean_of(&|v| (v - centre) * (v - centre)) + f64::from(eps)).sqrt()) as f32;
    let mut y: Vec<f32> = x.iter().zip(weight).map(|(v, w)| (v - centre as f32) * scale * w).collect();
    if let Some(bias) = bias {
        add(&mut y, bias);
    }
    y
}

/// Rotates every head of one row in place.
pub(super) fn rotate(rope: &Rope, position: usize, head_dim: usize, row: &mut [f32]) {
    let pairs = rope.inv_freq.len();
    for (i, &freq) in rope.inv_freq.iter().enumerate() {
        let (sin, cos) = (position as f64 * f64::from(freq)).sin_cos();
        let (sin, cos) = (sin as f32 * rope.magnitude, cos as f32 * rope.magnitude);
        let (first, second) = match rope.pairs {
            RopePairs::Adjacent => (2 * i, 2 * i + 1),
            RopePairs::Halves => (i, i + pairs),
        };
        for head in row.chunks_exact_mut(head_dim) {
            let (a, b) = (head[first], head[second]);
            head[first] = a * cos - b * sin;
            head[second] = a * sin + b * cos;
        }
    }
}

/// The non-linearity.
pub(super) fn activate(act: Activation, x: f32) -> f32 {
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

/// All heads of one query row over the keys and values at `places`.
pub(super) fn attend(s: &Attend, q: &[f32], places: &[usize], keys: &[f32], values: &[f32], out: &mut [f32]) {
    let size = s.heads.head_dim;
    for (head, (q, out)) in q.chunks_exact(size).zip(out.chunks_exact_mut(size)).enumerate() {
        let kv = head / (s.heads.heads / s.heads.kv_heads) * size;
        let mut scores: Vec<f32> = places
            .iter()
            .map(|at| {
                let score = s.scale * dots(q, [&keys[at + kv..at + kv + size]])[0];
                s.soft_cap.map_or(score, |cap| cap * (score / cap).tanh())
            })
            .collect();
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter_mut().for_each(|score| *score = (*score - most).exp());
        let total: f32 = scores.iter().sum();
        out.fill(0.0);
        for (at, score) in places.iter().zip(&scores) {
            let v = &values[at + kv..at + kv + size];
            out.iter_mut().zip(v).for_each(|(out, v)| *out += score / total * v);
        }
    }
}

/// `y = W x` for every row of `x`: `[n, cols]` to `[n, rows]`.
pub(super) fn product(w: &Tensor, rows: usize, cols: usize, x: &[f32], threads: usize) -> Vec<f32> {
    /// Multiplications worth a thread.
    const MANY: usize = 1 << 20;
    let n = x.len() / cols;
    let each = if rows * cols * n < MANY { rows } else { rows.div_ceil(threads) };
    let parts: Vec<Vec<f32>> = if each == rows {
        vec![some_rows(w, 0..rows, cols, x)]
    } else {
        std::thread::scope(|scope| {
            let part = |from| scope.spawn(move || some_rows(w, from..rows.min(from + each), cols, x));
            let running: Vec<_> = (0..rows).step_by(each).map(part).collect();
            running.into_iter().map(|part| part.join().expect("a product doesn't panic")).collect()
        })
    };
    let mut y = vec![0.0; n * rows];
    for (row, products) in parts.iter().flat_map(|part| part.chunks_exact(n.max(1))).enumerate() {
        products.iter().enumerate().for_each(|(i, product)| y[i * rows + row] = *product);
    }
    y
}

/// `[rows, n]`.
fn some_rows(w: &Tensor, rows: Range<usize>, cols: usize, x: &[f32]) -> Vec<f32> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { some_rows_avx2(w, rows, cols, x) };
    }
    some_rows_in_order(w, rows, cols, x)
}

/// The same in wider registers: the same bits, since nothing is contracted or reordered.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn some_rows_avx2(w: &Tensor, rows: Range<usize>, cols: usize, x: &[f32]) -> Vec<f32> {
    some_rows_in_order(w, rows, cols, x)
}

#[inline(always)]
fn some_rows_in_order(w: &Tensor, rows: Range<usize>, cols: usize, x: &[f32]) -> Vec<f32> {
    /// Rows that are dequantised together, and stay in the cache while all of `x` passes.
    const TILE: usize = 16;
    /// Rows of `x` that are multiplied with a row of weights at once.
    const COLUMNS: usize = 4;
    let n = x.len() / cols;
    let mut y = vec![0.0; rows.len() * n];
    for from in rows.clone().step_by(TILE) {
        let tile = w.rows(from..rows.end.min(from + TILE), cols);
        for (at, x) in x.chunks(COLUMNS * cols).enumerate() {
            for (r, w) in tile.chunks_exact(cols).enumerate() {
                let y = &mut y[(from - rows.start + r) * n + at * COLUMNS..];
                if x.len() == COLUMNS * cols {
                    let x: [&[f32]; COLUMNS] = std::array::from_fn(|i| &x[i * cols..(i + 1) * cols]);
                    y[..COLUMNS].copy_from_slice(&dots(w, x));
                } else {
                    x.chunks_exact(cols).zip(y).for_each(|(x, y)| *y = dots(w, [x])[0]);
                }
            }
        }
    }
    y
}

/// Products of `w` with each of `x`, always summed in the same order: value `i` to lane `i % 16`, then the lanes.
#[inline(always)]
fn dots<const N: usize>(w: &[f32], x: [&[f32]; N]) -> [f32; N] {
    const LANES: usize = 16;
    let (blocks, rest) = w.as_chunks::<LANES>();
    let split = x.map(|x| x[..w.len()].as_chunks::<LANES>());
    let mut sums = [[0.0f32; LANES]; N];
    for (b, w) in blocks.iter().enumerate() {
        for (sums, (x, _)) in sums.iter_mut().zip(&split) {
            let x = &x[b];
            for lane in 0..LANES {
                sums[lane] += w[lane] * x[lane];
            }
        }
    }
    for (sums, (_, x)) in sums.iter_mut().zip(&split) {
        rest.iter().zip(*x).zip(sums).for_each(|((w, x), sum)| *sum += w * x);
    }
    sums.map(|sums| sums.iter().sum())
}
