//! Tokens: rows of the embedding's table, and the choice among logits.
use super::blocks::{block_type, load};
use super::text::{Text, expand, float};
use super::{Dialect, Kernel, Matrix};
use crate::wgpu::pack::Scales;

/// Rows `first..` of the embedding's table, a part of it.
pub fn embed(dialect: Dialect, matrix: &Matrix, first: usize, hidden: usize, scale: f32) -> Kernel {
    let mut t = Text::new(dialect);
    t.region();
    t.constants(&[("HID", hidden), ("FIRST", first), ("COUNT", matrix.rows)]);
    t.line(&format!("const SCALE = {};", float(scale)));
    t.line(block_type(matrix.format.floating()));
    t.add(&load(matrix, "block"));
    t.line("fn value8(row: u32, c: u32) -> array<f32, 8> {");
    if matrix.format.floating() {
        t.line("let w = block(row, c);");
        t.line("return array<f32, 8>(w.lo.x, w.lo.y, w.lo.z, w.lo.w, w.hi.x, w.hi.y, w.hi.z, w.hi.w); }");
    } else {
        t.line("let w = block(row, c / 4u); let j = c % 4u;");
        t.line("let words = select(w.lo, w.hi, j > 1u); var v: array<f32, 8>; let half = j / 2u;");
        let zero = matrix.format.zero;
        let (scale, min) = match (matrix.format.scales, matrix.format.min) {
            (Scales::Byte32, true) => ("w.d * f32(w.s.x)", "w.m * f32(w.s.y)"),
            (Scales::Byte16, true) => ("w.d * f32(w.s[half])", "w.m * f32(w.s[2u + half])"),
            (Scales::Byte16, false) => ("w.d * f32(w.s[half])", "0.0"),
            (_, true) => ("w.d", "w.m"),
            _ => ("w.d", "0.0"),
        };
        t.line(&format!(
            "for (var i = 0u; i < 8u; i++) {{ let q = i32(words[(2u * j + i / 4u) % 4u] << (24u - 8u * (i % 4u))) >> 24u; \
             v[i] = fma({scale}, f32(q - {zero}), {min}); }} return v; }}"
        ));
    }
    t.add(&expand(include_str!("embed.wgsl"), &[], dialect));
    t.writes.extend([false, false, true]);
    t.finish("main")
}

/// The two kernels that choose tokens: `choose` and `settle`.
pub fn sample(dialect: Dialect, constants: &[(&str, usize)], entry: &'static str) -> Kernel {
    let mut t = Text::new(dialect);
    t.constants(constants);
    t.add(&expand(include_str!("sample.wgsl"), &[], dialect));
    t.writes = vec![false, false, false, true, true, true];
    t.finish(entry)
}
