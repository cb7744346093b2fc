//! What comes before a product: sums added to the residual stream, norms, quantised input.
use super::text::{Text, expand, float};
use super::{Dialect, Kernel, NormAt};
use crate::plan::NormKind;

/// Invocations of a workgroup.
const GROUP: usize = 256;

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
            if self.dialect.lanes < 8 {
                self.line("var<workgroup> normed: array<vec4<f32>, COLS / 4u>;");
            }
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
        let pieces = (cols / 4).div_ceil(GROUP);
        for k in 0..pieces {
            self.line(&format!("let w_{k} = lid + {}u; var v_{k} = vec4<f32>();", GROUP * k));
            self.line(&format!("if w_{k} < HID / 4u {{ v_{k} = residual(source, w_{k});"));
            if !p.pending.is_empty() {
                self.line(&format!("if store {{ x_out[source * (HID / 4u) + w_{k}] = v_{k}; }}"));
            }
            self.line("}");
        }
        if let Some(norm) = &p.norm {
            self.normalised(norm, p.floating, pieces);
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

    /// From the pieces `v_k` of the row to its normalised values.
    fn normalised(&mut self, norm: &NormAt, floating: bool, pieces: usize) {
        let inside = |k: usize| format!("w_{k} < HID / 4u");
        for k in 0..pieces {
            let vector = |at: usize| {
                format!(
                    "if {} {{ {} = vector4({at}u, w_{k}); }}",
                    inside(k),
                    if at == norm.weight { format!("g_{k}") } else { format!("b_{k}") }
                )
            };
            self.line(&format!("var g_{k} = vec4<f32>(); {} var b_{k} = vec4<f32>();", vector(norm.weight)));
            norm.bias.iter().for_each(|at| self.line(&vector(*at)));
        }
        self.line("mean = 0.0; var s = 0.0;");
        if norm.kind == NormKind::Layer {
            (0..pieces).for_each(|k| self.line(&format!("s += v_{k}.x + v_{k}.y + v_{k}.z + v_{k}.w;")));
            self.line("mean = workgroup_sum(s, lid) / f32(HID); s = 0.0;");
        }
        for k in 0..pieces {
            self.line(&format!("if {} {{ s = square4(v_{k} - mean, s); }}", inside(k)));
        }
        self.line(&format!(
            "scale = 1.0 / sqrt(fma(workgroup_sum(s, lid), 1.0 / f32(HID), {}));",
            float(norm.eps)
        ));
        for k in 0..pieces {
            // Beyond the row the norm's vectors are zeros, and so are the values.
            self.line(&format!("v_{k} = fma((v_{k} - mean) * scale, g_{k}, b_{k});"));
            if floating {
                self.line(&format!("if w_{k} < COLS / 4u {{ xf[w_{k}] = v_{k}; }}"));
            } else if self.dialect.lanes >= 8 {
                self.line(&QUANTIZE_SHARED.replace("{k}", &k.to_string()));
            } else {
                self.line(&format!("if w_{k} < COLS / 4u {{ normed[w_{k}] = v_{k}; }}"));
            }
        }
        if !floating && self.dialect.lanes < 8 {
            self.line("workgroupBarrier(); for (var c = lid; c < COLS / 32u; c += 256u) { var v: array<vec4<f32>, 8>;");
            self.line("for (var k = 0u; k < 8u; k++) { v[k] = normed[8u * c + k]; }");
            self.add(QUANTIZE);
            self.line("xq[2u * c] = qa; xq[2u * c + 1u] = qb; xh[c] = block_scale(most, sum_of_bytes(qa), sum_of_bytes(qb)); }");
        }
    }
}

/// Eight lanes quantise a block, four columns each; the first of four stores what they have.
const QUANTIZE_SHARED: &str = "{ var most = largest(v_{k});
most = max(most, subgroupShuffleXor(most, 1u)); most = max(most, subgroupShuffleXor(most, 2u)); most = max(most, subgroupShuffleXor(most, 4u));
let q = quantized(v_{k}, inverse_step(most)); var half = dot4I8Packed(q, 0x01010101u);
half += subgroupShuffleXor(half, 1u); half += subgroupShuffleXor(half, 2u);
let other = subgroupShuffleXor(half, 4u);
let codes = vec4<u32>(q, subgroupShuffleXor(q, 1u), subgroupShuffleXor(q, 2u), subgroupShuffleXor(q, 3u));
if w_{k} < COLS / 4u && lid % 4u == 0u { xq[w_{k} / 4u] = codes; if lid % 8u == 0u { xh[w_{k} / 8u] = block_scale(most, half, other); } } }";

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
