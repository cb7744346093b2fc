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

/// How a workgroup of 128 is dealt out.
#[derive(Clone, Copy)]
struct Geometry {
    /// Dimensions of a value that an invocation sums, and invocations that have all of a value's.
    dims: usize,
    lanes: usize,
    /// Of such invocations; and how many of them shuffle among each other, and add up what they have.
    groups: usize,
    folded: usize,
    /// Query heads.
    at_once: usize,
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

    fn geometry(&self, dialect: Dialect) -> Geometry {
        let h = self.heads;
        let dims = if self.q8 { 4 } else { 8 };
        let lanes = h.head_dim / dims;
        let groups = (128 / lanes).max(1);
        let groups = if groups.is_power_of_two() { groups } else { groups.next_power_of_two() / 2 };
        let folded = match dialect.lanes as usize / lanes {
            n if n > 1 && !self.q8 && lanes.is_power_of_two() => n.min(groups),
            _ => 1,
        };
        let room = |at_once: usize| {
            4 * at_once * (3 * h.head_dim + 128 + groups / folded * h.head_dim) + 4 * h.head_dim + 1536
        };
        let mut at_once = (h.heads / h.kv_heads).next_power_of_two().min(4);
        while at_once > 1 && room(at_once) > dialect.shared_bytes as usize {
            at_once /= 2;
        }
        Geometry { dims, lanes, groups, folded, at_once }
    }

    fn constants(&self, t: &mut Text, g: Geometry) {
        let h = self.heads;
        let (key, value) = Attention::place(h.head_dim, self.q8);
        let together = (128 / g.at_once).min(t.dialect.lanes as usize);
        t.constants(&[
            ("HD", h.head_dim),
            ("G", h.heads / h.kv_heads),
            ("GH", g.at_once),
            ("KH", h.kv_heads),
            ("NQKV", (h.heads + 2 * h.kv_heads) * h.head_dim),
            ("PAIRS", self.pairs),
            ("ROPE_LOW", self.rope.0),
            ("ROPE_HIGH", self.rope.1),
            ("TABLES", self.tables),
            ("WINDOW", self.window),
            ("KEY", key),
            ("VALUE", value),
            ("GROUPS", g.groups),
            ("FOLDED", g.folded),
            ("DIMS", g.dims),
            ("TOGETHER", together),
        ]);
        t.line(&format!("const ADJACENT = {}; const SCALE = {};", self.adjacent, float(self.scale)));
        t.line(&format!("const CAP = {};", float(self.cap.unwrap_or(1.0))));
    }

    fn flags(&self, entry: &str) -> Vec<&'static str> {
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
        flags
    }

    /// `attend`, which does all of it; `cache`, which only writes keys and values; `attend_span`, one span.
    pub fn kernel(&self, dialect: Dialect, entry: &'static str) -> Kernel {
        let g = self.geometry(dialect);
        let mut t = Text::new(dialect);
        self.constants(&mut t, g);
        let mut norms = String::new();
        for (name, from, norm) in [("norm_query", "0u", &self.q_norm), ("norm_key", "GH * HD", &self.k_norm)]
        {
            norms.extend(norm.iter().map(|norm| head_norm(name, from, norm)));
        }
        let mut fold = String::new();
        for step in (0..g.folded.ilog2()).map(|i| g.lanes << i) {
            fold += &format!("a += subgroupShuffleXor(a, {step}u); b += subgroupShuffleXor(b, {step}u);\n");
        }
        let together = (128 / g.at_once).min(dialect.lanes as usize);
        let text = include_str!("attend.wgsl")
            .replace("//#norms", &norms)
            .replace("//#fold", &fold)
            .replace("//#most", &largest_of("most", together))
            .replace("//#sum", &shuffle("sum", together));
        t.add(&expand(&self.with_output(&text), &self.flags(entry), dialect));
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
