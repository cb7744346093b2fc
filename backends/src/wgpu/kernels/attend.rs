//! Attention: rotation, the cache's new rows, spans folded whole or apart.
use super::norm::put;
use super::text::{Text, expand, float, largest_of, shuffle};
use super::{Dialect, Kernel, NormAt};
use crate::plan::{Heads, NormKind};

/// What attention needs to know.
#[derive(Clone, Debug)]
pub struct Attention {
    pub heads: Heads,
    pub q_norm: Option<NormAt>,
    pub k_norm: Option<NormAt>,
    pub pairs: usize,
    pub adjacent: bool,
    /// Where the rotation's tables begin, in pairs.
    pub rope: (usize, usize),
    /// Where block tables are in the step's words.
    pub tables: usize,
    pub window: usize,
    pub cap: Option<f32>,
    pub scale: f32,
    pub q8: bool,
    /// Columns of the next product's input, and whether it wants f32.
    pub out: usize,
    pub floating: bool,
}

impl Attention {
    /// vec4 of a key and words of a value, of one head.
    pub fn place(head_dim: usize, q8: bool) -> (usize, usize) {
        if q8 {
            (head_dim / 16 + head_dim.div_ceil(128), head_dim / 4 + head_dim / 32)
        } else {
            (head_dim / 8, head_dim / 2)
        }
    }

    /// `attend`, which does all of it; `cache`, which only writes keys and values; `attend_span`, one span.
    pub fn kernel(&self, dialect: Dialect, entry: &'static str) -> Kernel {
        let h = self.heads;
        let group = h.heads / h.kv_heads;
        let dims = if self.q8 { 4 } else { 8 };
        let groups = (128 / (h.head_dim / dims)).max(1);
        let groups = if groups.is_power_of_two() { groups } else { groups.next_power_of_two() / 2 };
        let room = |at_once: usize| {
            4 * at_once * (3 * h.head_dim + 128 + groups * h.head_dim) + 4 * h.head_dim + 1536
        };
        let mut at_once = group.next_power_of_two().min(4);
        while at_once > 1 && room(at_once) > dialect.shared_bytes as usize {
            at_once /= 2;
        }
        let (key, value) = Attention::place(h.head_dim, self.q8);
        let mut t = Text::new(dialect);
        t.constants(&[
            ("HD", h.head_dim),
            ("G", group),
            ("GH", at_once),
            ("KH", h.kv_heads),
            ("NQKV", (h.heads + 2 * h.kv_heads) * h.head_dim),
            ("PAIRS", self.pairs),
            ("ROPE_LOW", self.rope.0),
            ("ROPE_HIGH", self.rope.1),
            ("TABLES", self.tables),
            ("WINDOW", self.window),
            ("KEY", key),
            ("VALUE", value),
            ("GROUPS", groups),
            ("DIMS", dims),
        ]);
        t.line(&format!("const ADJACENT = {}; const SCALE = {};", self.adjacent, float(self.scale)));
        t.line(&format!("const CAP = {};", float(self.cap.unwrap_or(1.0))));
        let mut norms = String::new();
        for (name, from, norm) in [("norm_query", "0u", &self.q_norm), ("norm_key", "GH * HD", &self.k_norm)]
        {
            norms.extend(norm.iter().map(|norm| head_norm(name, from, norm)));
        }
        let mut flags = Vec::new();
        flags.extend(self.q_norm.is_some().then_some("Q_NORM"));
        flags.extend(self.k_norm.is_some().then_some("K_NORM"));
        flags.extend(self.cap.is_some().then_some("CAPPED"));
        flags.extend(self.q8.then_some("KV8"));
        flags.push(match entry {
            "attend" => "WHOLE",
            "attend_span" => "PART",
            _ => "CACHE",
        });
        let text = include_str!("attend.wgsl");
        let text = text.replace("//#norms", &norms);
        let together = (128 / at_once).min(dialect.lanes as usize);
        t.constants(&[("TOGETHER", together)]);
        let text = text.replace("//#most", &largest_of("most", together));
        let text = text.replace("//#sum", &shuffle("sum", together));
        t.add(&expand(&self.with_output(&text), &flags, dialect));
        t.writes = vec![false, false, false, false, true, true, true];
        t.writes.extend((entry != "attend_span").then_some(true));
        t.finish(entry)
    }

    /// The kernel that folds spans.
    pub fn merge(&self, dialect: Dialect) -> Kernel {
        let h = self.heads;
        let mut t = Text::new(dialect);
        t.constants(&[
            ("HD", h.head_dim),
            ("G", h.heads / h.kv_heads),
            ("KH", h.kv_heads),
            ("WINDOW", self.window),
        ]);
        t.add(&expand(&self.with_output(include_str!("merge.wgsl")), &[], dialect));
        t.writes = vec![false, false, true, true];
        t.finish("merge")
    }

    /// The text, with its result stored as the next product's input.
    fn with_output(&self, text: &str) -> String {
        text.replace("//#put v wg.y column OUT", &put("wg.y", "column", self.out, self.floating))
    }
}

/// Normalises heads in `qs`, from value `from` on.
fn head_norm(name: &str, from: &str, norm: &NormAt) -> String {
    let (weight, eps) = (norm.weight, float(norm.eps));
    let mean = match norm.kind {
        NormKind::Rms => String::new(),
        NormKind::Layer => format!(
            "for (var d = l; d < HD; d += TPH) {{ if h < n {{ s += qs[{from} + h * HD + d]; }} }} workgroupBarrier(); \
             red[lid] = s; workgroupBarrier(); mean = head_sum(h, 1u) / f32(HD); s = 0.0;"
        ),
    };
    let bias = norm.bias.map_or("0.0".into(), |at| format!("weight({at}u, d)"));
    format!(
        "fn {name}(n: u32, lid: u32) {{ let h = lid / TPH; let l = lid % TPH; var mean = 0.0; var s = 0.0; {mean}
for (var d = l; d < HD; d += TPH) {{ if h < n {{ let v = qs[{from} + h * HD + d] - mean; s = fma(v, v, s); }} }}
workgroupBarrier(); red[lid] = s; workgroupBarrier();
let scale = 1.0 / sqrt(fma(head_sum(h, 1u), 1.0 / f32(HD), {eps}));
for (var d = l; d < HD; d += TPH) {{ if h < n {{ let at = {from} + h * HD + d; qs[at] = fma((qs[at] - mean) * scale, weight({weight}u, d), {bias}); }} }}
workgroupBarrier(); }}\n"
    )
}
