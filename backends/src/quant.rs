//! What the storage types mean: the naive specification that every kernel is tested against.
//!
//! Values come in blocks along a matrix' rows. `d` and `m` are half-precision numbers, `q` small unsigned integers;
//! all arithmetic is in f32, in the order written. Little-endian. Source of the layouts: ggml's `ggml-common.h`.
#![forbid(unsafe_code)]

use crate::gguf::GgmlType;
use half::{bf16, f16};

/// Values of `bytes`, whole blocks of type `ty`.
///
/// # Panics
/// If `ty` is unknown, or `bytes` and `out` aren't the same number of whole blocks: a [`crate::plan::Plan`] made by
/// [`crate::models::plan`] names no such tensor.
pub fn dequantize(ty: GgmlType, bytes: &[u8], out: &mut [f32]) {
    let (values, size) = (ty.block_values(), ty.block_bytes());
    assert!(values > 0, "{ty} can't be dequantised");
    assert_eq!(bytes.len() / size * values, out.len(), "{ty}: {} bytes", bytes.len());
    assert_eq!(bytes.len() % size, 0, "{ty}: {} bytes", bytes.len());
    let block: fn(&[u8], &mut [f32]) = match ty {
        GgmlType::F32 => |b, x| x[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        GgmlType::F16 => |b, x| x[0] = half_at(b, 0),
        GgmlType::BF16 => |b, x| x[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        GgmlType::Q4_0 => q4_0,
        GgmlType::Q4_1 => q4_1,
        GgmlType::Q5_0 => q5_0,
        GgmlType::Q5_1 => q5_1,
        GgmlType::Q8_0 => q8_0,
        GgmlType::Q2_K => q2_k,
        GgmlType::Q3_K => q3_k,
        GgmlType::Q4_K => q4_k,
        GgmlType::Q5_K => q5_k,
        GgmlType::Q6_K => q6_k,
        GgmlType::IQ4_NL => iq4_nl,
        GgmlType::IQ4_XS => iq4_xs,
        GgmlType::Unknown(_) => unreachable!("has no blocks"),
    };
    for (b, x) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(values)) {
        block(b, x);
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The low half of byte `j` for value `j`, the high half for value `j + 16`, of 32.
fn nibble(q: &[u8], i: usize) -> u8 {
    if i < 16 { q[i] & 15 } else { q[i - 16] >> 4 }
}

/// Bit `i` of a little-endian word.
fn bit(word: &[u8], i: usize) -> u8 {
    word[i / 8] >> (i % 8) & 1
}

/// `d, q[32 x 4 bits]`: `x = d (q - 8)`.
fn q4_0(b: &[u8], x: &mut [f32]) {
    let d = half_at(b, 0);
    for (i, x) in x.iter_mut().enumerate() {
        *x = d * (f32::from(nibble(&b[2..], i)) - 8.0);
    }
}

/// `d, m, q[32 x 4 bits]`: `x = d q + m`.
fn q4_1(b: &[u8], x: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for (i, x) in x.iter_mut().enumerate() {
        *x = d * f32::from(nibble(&b[4..], i)) + m;
    }
}

/// `d, h[32 x 1 bit], q[32 x 4 bits]`: `x = d (q + 16 h - 16)`.
fn q5_0(b: &[u8], x: &mut [f32]) {
    let d = half_at(b, 0);
    for (i, x) in x.iter_mut().enumerate() {
        let q = nibble(&b[6..], i) | bit(&b[2..6], i) << 4;
        *x = d * (f32::from(q) - 16.0);
    }
}

/// `d, m, h[32 x 1 bit], q[32 x 4 bits]`: `x = d (q + 16 h) + m`.
fn q5_1(b: &[u8], x: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for (i, x) in x.iter_mut().enumerate() {
        let q = nibble(&b[8..], i) | bit(&b[4..8], i) << 4;
        *x = d * f32::from(q) + m;
    }
}

/// `d, q[32 x i8]`: `x = d q`.
fn q8_0(b: &[u8], x: &mut [f32]) {
    let d = half_at(b, 0);
    for (x, &q) in x.iter_mut().zip(&b[2..]) {
        *x = d * f32::from(q as i8);
    }
}

/// `s[16 x (4 bits scale, 4 bits minimum)], q[256 x 2 bits], d, m`: `x = (d scale) q - m minimum`, a scale for 16
/// values. Each 32 bytes of `q` hold 128 values, the first 32 in their lowest bits.
fn q2_k(b: &[u8], x: &mut [f32]) {
    let (s, q, d, m) = (&b[..16], &b[16..80], half_at(b, 80), half_at(b, 82));
    for (i, x) in x.iter_mut().enumerate() {
        let s = s[i / 16];
        let q = q[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        *x = d * f32::from(s & 15) * f32::from(q) - m * f32::from(s >> 4);
    }
}

/// `h[256 x 1 bit], q[256 x 2 bits], s[16 x 6 bits], d`: `x = d (s - 32) (q + 4 h - 4)`, a scale for 16 values. Bit
/// `i / 32` of byte `i % 32` of `h` is value `i`'s. Scales keep their low 4 bits in the halves of `s[0..8]`, their
/// high 2 bits in `s[8..12]`, four a byte at stride 4.
fn q3_k(b: &[u8], x: &mut [f32]) {
    let (h, q, s, d) = (&b[..32], &b[32..96], &b[96..108], half_at(b, 108));
    for (i, x) in x.iter_mut().enumerate() {
        let j = i / 16;
        let low = if j < 8 { s[j] & 15 } else { s[j - 8] >> 4 };
        let scale = low | (s[8 + j % 4] >> (j / 4 * 2) & 3) << 4;
        let q = q[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        let h = h[i % 32] >> (i / 32) & 1;
        *x = d * (f32::from(scale) - 32.0) * (f32::from(q | h << 2) - 4.0);
    }
}

/// Scale and minimum `j` of the eight of Q4_K and Q5_K, 6 bits each in 12 bytes: the first four whole in `s[0..4]` and
/// `s[4..8]`, whose upper 2 bits complete the halves in `s[8..12]` for the last four.
fn scale_min(s: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// `d, m, s[8 x (6 bits scale, 6 bits minimum)], q[256 x 4 bits]`: `x = (d scale) q - m minimum`, a scale for 32
/// values. Each 32 bytes of `q` hold 64 values, the first 32 in their low halves.
fn q4_k(b: &[u8], x: &mut [f32]) {
    let (d, m, s, q) = (half_at(b, 0), half_at(b, 2), &b[4..16], &b[16..144]);
    for (i, x) in x.iter_mut().enumerate() {
        let (scale, min) = scale_min(s, i / 32);
        let q = q[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        *x = d * scale * f32::from(q) - m * min;
    }
}

/// `d, m, s[8 x (6 bits scale, 6 bits minimum)], h[256 x 1 bit], q[256 x 4 bits]`: `x = (d scale) (q + 16 h) - m
/// minimum`, a scale for 32 values; `q` as in Q4_K, bit `i / 32` of byte `i % 32` of `h` is value `i`'s.
fn q5_k(b: &[u8], x: &mut [f32]) {
    let (d, m, s, h, q) = (half_at(b, 0), half_at(b, 2), &b[4..16], &b[16..48], &b[48..176]);
    for (i, x) in x.iter_mut().enumerate() {
        let (scale, min) = scale_min(s, i / 32);
        let q = q[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        let h = h[i % 32] >> (i / 32) & 1;
        *x = d * scale * f32::from(q | h << 4) - m * min;
    }
}

/// `q[256 x 4 bits], h[256 x 2 bits], s[16 x i8], d`: `x = d s (q + 16 h - 32)`, a scale for 16 values. Each 64 bytes
/// of `q` hold 128 values, the first 64 in their low halves; each 32 bytes of `h` hold 128, the first 32 in their
/// lowest bits.
fn q6_k(b: &[u8], x: &mut [f32]) {
    let (q, h, s, d) = (&b[..128], &b[128..192], &b[192..208], half_at(b, 208));
    for (i, x) in x.iter_mut().enumerate() {
        let q = q[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
        let h = h[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        *x = d * f32::from(s[i / 16] as i8) * (f32::from(q | h << 4) - 32.0);
    }
}

/// The steps of IQ4_NL and IQ4_XS.
pub const IQ4_STEPS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// `d, q[32 x 4 bits]`: `x = d steps[q]`.
fn iq4_nl(b: &[u8], x: &mut [f32]) {
    let d = half_at(b, 0);
    for (i, x) in x.iter_mut().enumerate() {
        *x = d * f32::from(IQ4_STEPS[nibble(&b[2..], i) as usize]);
    }
}

/// `d, sh[8 x 2 bits], sl[8 x 4 bits], q[8 x 32 x 4 bits]`: `x = d (sl + 16 sh - 32) steps[q]`, a scale for 32 values.
fn iq4_xs(b: &[u8], x: &mut [f32]) {
    let (d, sh, sl, q) = (half_at(b, 0), &b[2..4], &b[4..8], &b[8..136]);
    for (i, x) in x.iter_mut().enumerate() {
        let j = i / 32;
        let scale = sl[j / 2] >> (j % 2 * 4) & 15 | (sh[j / 4] >> (j % 4 * 2) & 3) << 4;
        let q = nibble(&q[j * 16..], i % 32);
        *x = d * (f32::from(scale) - 32.0) * f32::from(IQ4_STEPS[q as usize]);
    }
}

/// Stores `values`, whole blocks, as `ty`: F32, F16, BF16, Q4_0, Q4_1, Q5_0 or Q8_0, rounding to nearest within the
/// block's range. None for the other types, which need a search for good scales.
///
/// # Panics
/// If `values` don't fill whole blocks.
pub fn quantize(ty: GgmlType, values: &[f32]) -> Option<Vec<u8>> {
    let put: fn(&[f32], &mut Vec<u8>) = match ty {
        GgmlType::F32 => |x, out| out.extend(x[0].to_le_bytes()),
        GgmlType::F16 => |x, out| out.extend(f16::from_f32(x[0]).to_le_bytes()),
        GgmlType::BF16 => |x, out| out.extend(bf16::from_f32(x[0]).to_le_bytes()),
        GgmlType::Q4_0 => |x, out| {
            let (d, q) = signed::<8>(x);
            out.extend(d.to_le_bytes());
            out.extend((0..16).map(|j| q[j] | q[j + 16] << 4));
        },
        GgmlType::Q4_1 => put_q4_1,
        GgmlType::Q5_0 => |x, out| {
            let (d, q) = signed::<16>(x);
            let high = (0..32).fold(0u32, |word, i| word | u32::from(q[i] >> 4) << i);
            out.extend(d.to_le_bytes());
            out.extend(high.to_le_bytes());
            out.extend((0..16).map(|j| q[j] & 15 | (q[j + 16] & 15) << 4));
        },
        GgmlType::Q8_0 => put_q8_0,
        _ => return None,
    };
    let blocks = values.chunks_exact(ty.block_values());
    assert!(blocks.remainder().is_empty(), "{} values in {ty}", values.len());
    let mut out = Vec::with_capacity(values.len() / ty.block_values() * ty.block_bytes());
    blocks.for_each(|block| put(block, &mut out));
    Some(out)
}

/// `d` so that the value of largest magnitude becomes `-LEVELS`, and `q = round(x / d) + LEVELS`.
fn signed<const LEVELS: u8>(x: &[f32]) -> (f16, [u8; 32]) {
    let levels = f32::from(LEVELS);
    let extreme = x.iter().copied().fold(0.0f32, |a, b| if b.abs() > a.abs() { b } else { a });
    let d = extreme / -levels;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let q = std::array::from_fn(|i| ((x[i] * inverse).round() + levels).clamp(0.0, 2.0 * levels - 1.0) as u8);
    (f16::from_f32(d), q)
}

fn put_q4_1(x: &[f32], out: &mut Vec<u8>) {
    let (min, max) = x.iter().fold((f32::MAX, f32::MIN), |(lo, hi), &v| (lo.min(v), hi.max(v)));
    let d = (max - min) / 15.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let q = |i: usize| ((x[i] - min) * inverse).round().clamp(0.0, 15.0) as u8;
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(f16::from_f32(min).to_le_bytes());
    out.extend((0..16).map(|j| q(j) | q(j + 16) << 4));
}

fn put_q8_0(x: &[f32], out: &mut Vec<u8>) {
    let d = x.iter().fold(0.0f32, |a, v| a.max(v.abs())) / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(x.iter().map(|v| (v * inverse).round().clamp(-127.0, 127.0) as i8 as u8));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `tests/golden/quants.py`.
    const GOLDEN: &[u8] = include_bytes!("../tests/golden/quants.bin");

    #[test]
    fn values_equal_those_of_the_gguf_package() {
        fn number(bytes: &mut &[u8]) -> usize {
            let (head, rest) = bytes.split_at(4);
            *bytes = rest;
            u32::from_le_bytes(head.try_into().unwrap()) as usize
        }
        let mut golden = GOLDEN;
        let mut types = 0;
        while !golden.is_empty() {
            let ty = GgmlType::from_id(number(&mut golden) as u32);
            let length = number(&mut golden);
            let bytes = golden.split_off(..length).unwrap();
            let count = number(&mut golden);
            let expected = golden.split_off(..count * 4).unwrap().chunks_exact(4);
            let mut found = vec![0.0; count];
            dequantize(ty, bytes, &mut found);
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                assert_eq!(*found, f32::from_le_bytes(expected.try_into().unwrap()), "value {i} of {ty}");
            }
            types += 1;
        }
        assert_eq!(types, GgmlType::KNOWN.len() - 2, "all but F32 and F16");
    }

    fn check(ty: GgmlType, steps: f32) {
        let x: Vec<f32> = (0..320).map(|i| ((i * 37 % 101) as f32 - 40.0) / 17.0).collect();
        let mut back = vec![0.0; x.len()];
        dequantize(ty, &quantize(ty, &x).unwrap(), &mut back);
        for (x, back) in x.chunks(32).zip(back.chunks(32)) {
            let extreme = x.iter().fold(0.0f32, |a, v| a.max(v.abs()));
            for (x, back) in x.iter().zip(back) {
                assert!((x - back).abs() <= 1.02 * extreme / steps, "{ty}: {x} became {back}");
            }
        }
        assert_eq!(quantize(ty, &[0.0; 32]).map(|b| b.len()), Some(ty.bytes_of(32).unwrap() as usize));
        dequantize(ty, &quantize(ty, &[0.0; 32]).unwrap(), &mut back[..32]);
        assert_eq!(back[..32], [0.0; 32]);
    }

    #[test]
    fn quantised_values_are_near() {
        check(GgmlType::F32, f32::INFINITY);
        check(GgmlType::F16, 2048.0);
        check(GgmlType::BF16, 256.0);
        check(GgmlType::Q4_0, 8.0); // the end without the extreme has one step less
        check(GgmlType::Q4_1, 15.0);
        check(GgmlType::Q5_0, 16.0);
        check(GgmlType::Q8_0, 254.0 * 0.98);
        assert_eq!(quantize(GgmlType::Q4_K, &[0.0; 256]), None);
    }
}
