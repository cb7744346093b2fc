//! What comes before a product: sums added to the residual stream, norms, quantised input.
use super::text::{Text, expand, float};
use super::{Dialect, Kernel, NormAt};
use crate::plan::NormKind;

/// What a step does with a row of the residual stream before its products.
#[derive(Clone, Debug)]
pub struct Prologue {
    pub hidden: usize,
    /// Rows that buffers hold.
    pub rows_max: usize,
    /// Sums that are still to be added.
    pub pending: Vec<NormAt>,
    /// None: only the sums are added.
    pub norm: Option<NormAt>,
    /// Whether the products want f32.
    pub floating: bool,
    /// Word of [`super::step`]'s list of wanted rows, where the row is looked up there.
    pub wanted: Option<usize>,
}

impl Prologue {
    /// A dispatch of its own: a workgroup a row, into `outq` and `outs`, or, without a norm, only into `x_out`.
    pub fn kernel(&self, dialect: Dialect, cols: usize) -> Kernel {
        let mut t = Text::new(dialect);
        t.region();
        t.prologue(self, cols);
        if self.norm.is_some() {
            t.buffer("outq", "vec4<u32>", true);
            t.buffer("outs", "vec2<u32>", true);
        }
        t.main();
        t.line("prologue(wg.y, lid, true); workgroupBarrier();");
        match (&self.norm, self.floating) {
            (None, _) => {}
            (Some(_), true) => t.line(&format!(
                "for (var c = lid; c < {0}u; c += 256u) {{ outq[wg.y * {0}u + c] = bitcast<vec4<u32>>(xf[c]); }}",
                cols / 4
            )),
            (Some(_), false) => t.line(&format!(
                "for (var c = lid; c < {0}u; c += 256u) {{ let at = wg.y * {0}u + c; outq[2u * at] = xq[2u * c]; \
                 outq[2u * at + 1u] = xq[2u * c + 1u]; outs[at] = xh[c]; }}",
                cols / 32
            )),
        }
        t.line("}");
        t.finish("main")
    }
}

impl Text {
    /// The function `prologue(row, lid, store)`, which leaves the normalised row in `xf` or `xq` and `xh`.
    pub(super) fn prologue(&mut self, p: &Prologue, cols: usize) {
        self.buffer("x_in", "vec4<f32>", false);
        if !p.pending.is_empty() {
            self.buffer("delta", "vec4<f32>", false);
            self.buffer("x_out", "vec4<f32>", true);
        }
        if p.wanted.is_some() {
            self.buffer("wanted", "u32", false);
        }
        self.constants(&[("HID", p.hidden), ("COLS", cols), ("ROWS_MAX", p.rows_max)]);
        let few: &[&str] = if self.dialect.lanes >= 8 { &["FEW"] } else { &[] };
        let text = expand(include_str!("norm.wgsl"), few, self.dialect);
        self.add(&text);
        if p.floating {
            self.line("var<workgroup> xf: array<vec4<f32>, COLS / 4u>;");
        } else {
            self.line("var<workgroup> xq: array<vec4<u32>, COLS / 16u>;");
            self.line("var<workgroup> xh: array<vec2<u32>, COLS / 32u>;");
        }
        for k in 0..p.pending.len() {
            self.line(&format!("var<private> mean_{k}: f32; var<private> scale_{k}: f32;"));
        }
        self.line("var<private> mean: f32; var<private> scale: f32;");
        let delta = |k: usize| format!("delta[({k}u * ROWS_MAX + source) * (HID / 4u) + w]");
        self.line("fn residual(source: u32, w: u32) -> vec4<f32> { var v = x_in[source * (HID / 4u) + w];");
        for (k, norm) in p.pending.iter().enumerate() {
            if let Some(bias) = norm.bias {
                self.line(&format!("v += vector4({bias}u, w);"));
            }
            self.line(&format!(
                "v = fma(({} - mean_{k}) * scale_{k}, vector4({}u, w), v);",
                delta(k),
                norm.weight
            ));
        }
        self.line("return v; }");
        self.line("fn prologue(row: u32, lid: u32, store: bool) {");
        self.line(&match p.wanted {
            Some(at) => format!("let source = wanted[{at}u + 8u * (P.base + row)];"),
            None => "let source = row;".into(),
        });
        for (k, norm) in p.pending.iter().enumerate() {
            let names = (format!("mean_{k}"), format!("scale_{k}"));
            self.moments(norm, &names.0, &names.1, &delta(k));
        }
        if !p.pending.is_empty() {
            self.line("if store { for (var w = lid; w < HID / 4u; w += 256u) { x_out[source * (HID / 4u) + w] = residual(source, w); } }");
        }
        if let Some(norm) = &p.norm {
            self.moments(norm, "mean", "scale", "residual(source, w)");
            self.normalised(norm, p.floating);
        }
        self.line("}");
    }

    fn moments(&mut self, norm: &NormAt, mean: &str, scale: &str, value: &str) {
        self.line(&format!("{mean} = 0.0;"));
        if norm.kind == NormKind::Layer {
            self.line(&format!(
                "{{ var s = 0.0; for (var w = lid; w < HID / 4u; w += 256u) {{ let v = {value}; s += v.x + v.y + v.z + v.w; }} \
                 {mean} = workgroup_sum(s, lid) / f32(HID); }}"
            ));
        }
        self.line(&format!(
            "{{ var s = 0.0; for (var w = lid; w < HID / 4u; w += 256u) {{ s = square4({value} - {mean}, s); }} \
             {scale} = 1.0 / sqrt(fma(workgroup_sum(s, lid), 1.0 / f32(HID), {})); }}",
            float(norm.eps)
        ));
    }

    fn normalised(&mut self, norm: &NormAt, floating: bool) {
        let bias = norm.bias.map_or("vec4<f32>()".into(), |at| format!("vector4({at}u, w)"));
        let value =
            format!("fma((residual(source, w) - mean) * scale, vector4({}u, w), {bias})", norm.weight);
        if floating {
            self.line(&format!(
                "for (var w = lid; w < COLS / 4u; w += 256u) {{ var v = vec4<f32>(); if w < HID / 4u {{ v = {value}; }} xf[w] = v; }}"
            ));
            return;
        }
        self.line("for (var c = lid; c < COLS / 32u; c += 256u) { var v: array<vec4<f32>, 8>;");
        self.line(&format!(
            "for (var k = 0u; k < 8u; k++) {{ let w = 8u * c + k; if w < HID / 4u {{ v[k] = {value}; }} }}"
        ));
        self.add(QUANTIZE);
        self.line("xq[2u * c] = qa; xq[2u * c + 1u] = qb; xh[c] = block_scale(most, sum_of_bytes(qa), sum_of_bytes(qb)); }");
    }
}

/// From `v`, eight vec4, to `most`, `qa` and `qb`.
const QUANTIZE: &str = "var most = 0.0; for (var k = 0u; k < 8u; k++) { most = max(most, largest(v[k])); }
let inverse = inverse_step(most);
let qa = vec4<u32>(quantized(v[0], inverse), quantized(v[1], inverse), quantized(v[2], inverse), quantized(v[3], inverse));
let qb = vec4<u32>(quantized(v[4], inverse), quantized(v[5], inverse), quantized(v[6], inverse), quantized(v[7], inverse));
";

/// Stores `v`, 32 columns from `column` on, as a product's input of `cols` columns.
pub(super) fn put(row: &str, column: &str, cols: usize, floating: bool) -> String {
    if floating {
        let width = cols / 4;
        return format!(
            "for (var piece = 0u; piece < 8u; piece++) {{ outq[{row} * {width}u + {column} / 4u + piece] = bitcast<vec4<u32>>(v[piece]); }}\n"
        );
    }
    format!(
        "{{ {QUANTIZE}let at = {row} * {}u + {column} / 32u; outq[2u * at] = qa; outq[2u * at + 1u] = qb; \
         outs[at] = block_scale(most, sum_of_bytes(qa), sum_of_bytes(qb)); }}\n",
        cols / 32
    )
}
