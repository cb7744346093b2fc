//! WGSL for exactly one model: dimensions, formats and places are constants of the text.
use super::pack::{Codes, Format, Scales};
use crate::plan::{Activation, NormKind};
use std::fmt::Write;

/// What the generated text may rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// Lanes that shuffle among each other: a power of two up to 32; 1 where there are no subgroups.
    pub lanes: u32,
    /// Whether the text needs `enable subgroups;`, as browsers do.
    pub browser: bool,
    /// Bytes of memory of a workgroup.
    pub shared_bytes: u32,
}

/// A kernel's text and whether each of its buffers is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    pub text: String,
    pub entry: &'static str,
    pub writes: Vec<bool>,
}

/// A matrix in its step's region: where its streams begin, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    pub format: Format,
    pub rows: usize,
    /// Padded.
    pub cols: usize,
    pub codes: usize,
    pub high: usize,
    pub scales: usize,
    pub supers: usize,
    /// Word of the bias.
    pub bias: Option<usize>,
}

/// A norm's vectors in its step's region, in words.
#[derive(Clone, Debug, PartialEq)]
pub struct NormAt {
    pub kind: NormKind,
    pub weight: usize,
    pub bias: Option<usize>,
    pub eps: f32,
}

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

/// What becomes of a step's products.
#[derive(Clone, Debug, PartialEq)]
pub enum Epilogue {
    /// Stored: `[rows][width]`.
    Store { width: usize },
    /// Added to the residual stream.
    Add { width: usize },
    /// Activated, multiplied, and stored as the next product's input of `cols` padded columns.
    GateUp { act: Activation, cols: usize, floating: bool },
    /// Stored as logits, and the largest of each workgroup as a peak: `[rows][peaks]`, this part's from `first_peak` on.
    Logits { width: usize, cap: Option<f32>, peaks: usize, first_peak: usize },
}

/// A part of a product: one matrix, or a gate and its up matrix.
#[derive(Clone, Debug)]
pub struct Part {
    pub matrices: Vec<Matrix>,
    /// First output.
    pub first: usize,
}

/// A product of a tile of rows with one or several matrices that share their input.
#[derive(Clone, Debug)]
pub struct Product {
    pub parts: Vec<Part>,
    /// Normalises its own input; else it finds it ready.
    pub fused: Option<Prologue>,
    pub epilogue: Epilogue,
    /// Rows of the batch that a workgroup computes.
    pub tile: usize,
}

const GROUP: usize = 256;
/// What is added to a block's number for the blocks ahead of it.
const LANES_AHEAD: [&str; 4] = ["", " + LPR", " + 2u * LPR", " + 3u * LPR"];
/// Workgroups that keep a large GPU busy: two a processor of an H100.
const BUSY: usize = 264;

impl Product {
    /// Lanes that share a row of the matrix. They fix the order of its sum, so this must not depend on the tile.
    pub fn lanes(&self) -> usize {
        let m = &self.parts[0].matrices[0];
        match m.cols / m.format.block() {
            0..5 => 4,
            5..9 => 8,
            9..17 => 16,
            _ => 32,
        }
    }

    /// Rows of the matrix that a lane computes: with its neighbours 32 a workgroup, but fewer where a single row of the
    /// batch would leave much of a large GPU idle. Rows that are quantised together stay together, and peaks are counted
    /// alike for every tile.
    fn per_lane(&self) -> usize {
        let most = (self.lanes() / 8).max(1);
        let free = matches!(self.epilogue, Epilogue::Store { .. } | Epilogue::Add { .. });
        if !free || self.tile > 1 {
            return most;
        }
        let rows: usize = self.parts.iter().map(|part| part.matrices[0].rows).sum();
        let least = rows * self.lanes() / GROUP / BUSY;
        if least >= 4 { most } else { least.clamp(1, most).next_power_of_two().min(most) }
    }

    /// Blocks of each row that a lane asks for before it uses the first, so that enough is on its way from memory.
    fn ahead(&self) -> usize {
        if self.tile > 1 {
            return 1;
        }
        let rows = self.parts.iter().map(|part| part.matrices.len()).max().unwrap_or(1) * self.per_lane();
        (8 / rows).clamp(1, 4)
    }

    /// Rows of the matrix that a workgroup computes.
    pub fn rows(&self) -> usize {
        GROUP / self.lanes() * self.per_lane()
    }

    /// Workgroups of each part.
    pub fn groups(&self) -> Vec<usize> {
        self.parts.iter().map(|part| part.matrices[0].rows.div_ceil(self.rows())).collect()
    }

    fn floating(&self) -> bool {
        self.parts[0].matrices[0].format.floating()
    }

    fn cols(&self) -> usize {
        self.parts[0].matrices[0].cols
    }

    fn sums(&self) -> usize {
        self.parts.iter().map(|p| p.matrices.len()).max().unwrap_or(1) * self.tile * self.per_lane()
    }

    /// Bytes of workgroup memory.
    pub fn shared_bytes(&self, dialect: Dialect) -> usize {
        let lanes = self.lanes().min(dialect.lanes as usize);
        let input = match &self.fused {
            None => 0,
            Some(_) if self.floating() => 4 * self.cols() + 1100,
            Some(_) => self.cols() + self.cols() / 4 + 1100,
        };
        4 * self.sums() * GROUP / lanes + 4 * self.tile * self.rows() + input
    }

    /// The text. Buffers: the step's region twice, then the residual stream and the sums (fused, with sums also where
    /// it goes, and with wanted rows their list), or the input's codes and scales; then what the epilogue writes.
    pub fn kernel(&self, dialect: Dialect) -> Kernel {
        let mut t = Text::new(dialect);
        t.region();
        match &self.fused {
            Some(prologue) => {
                t.prologue(prologue, self.cols());
            }
            None => {
                t.buffer("xin", "vec4<u32>", false);
                t.buffer("xsc", "vec2<u32>", false);
            }
        }
        self.outputs(&mut t);
        let (rows, lanes) = (self.rows(), self.lanes());
        t.constants(&[("LPR", lanes), ("ROWS", rows), ("TILE", self.tile), ("PER", self.per_lane())]);
        let shuffled = lanes.min(dialect.lanes as usize);
        t.constants(&[("SHUFFLED", shuffled)]);
        t.line(&format!("var<workgroup> red: array<f32, {}>;", self.sums() * GROUP / shuffled));
        t.line(&format!("var<workgroup> done: array<f32, {}>;", self.tile * rows));
        t.add(&tree(lanes / shuffled, GROUP / shuffled));
        t.line(block_type(self.floating()));
        for (number, part) in self.parts.iter().enumerate() {
            for (m, matrix) in part.matrices.iter().enumerate() {
                t.add(&load(matrix, &format!("block_{number}_{m}")));
            }
        }
        t.line("@compute @workgroup_size(256)\nfn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {");
        t.line("let t0 = wg.y * TILE; let lane = lid % LPR; let group = lid / LPR;");
        if self.fused.is_some() {
            t.line("prologue(t0, lid, wg.x == 0u); workgroupBarrier();");
        }
        let mut before = 0;
        for (number, (part, groups)) in self.parts.iter().zip(self.groups()).enumerate() {
            t.line(&format!("if wg.x >= {before}u && wg.x < {}u {{", before + groups));
            self.part(&mut t, (number, part), before, shuffled);
            t.line("}");
            before += groups;
        }
        t.line("}");
        t.finish("main")
    }

    fn outputs(&self, t: &mut Text) {
        match self.epilogue {
            Epilogue::Store { .. } => t.buffer("out", "f32", true),
            Epilogue::Add { .. } => t.buffer("x", "f32", true),
            Epilogue::GateUp { .. } => {
                t.buffer("outq", "vec4<u32>", true);
                t.buffer("outs", "vec2<u32>", true);
            }
            Epilogue::Logits { .. } => {
                t.buffer("out", "f32", true);
                t.buffer("peaks", "f32", true);
            }
        }
    }

    fn part(&self, t: &mut Text, (number, part): (usize, &Part), before: usize, shuffled: usize) {
        let per = self.per_lane();
        let each = |f: &mut dyn FnMut(usize, usize)| {
            (0..part.matrices.len()).for_each(|m| (0..per).for_each(|i| f(m, i)));
        };
        let rows = part.matrices[0].rows;
        t.line(&format!("let r0 = (wg.x - {before}u) * ROWS;"));
        for i in 0..per {
            t.line(&format!("let r_{i} = min(r0 + group * PER + {i}u, {}u);", rows - 1));
        }
        each(&mut |m, i| (0..self.tile).for_each(|k| t.line(&format!("var acc_{m}_{i}_{k} = 0.0;"))));
        let blocks = self.cols() / part.matrices[0].format.block();
        t.line("var b = lane;");
        for ahead in [self.ahead(), 1] {
            let last = LANES_AHEAD[ahead - 1];
            t.line(&format!("for (; b{last} < {blocks}u; b += {ahead}u * LPR) {{"));
            for (u, offset) in LANES_AHEAD.iter().enumerate().take(ahead) {
                // All codes first, so that a row of activations is read once for all rows of the matrix.
                each(&mut |m, i| {
                    t.line(&format!("let w_{m}_{i}_{u} = block_{number}_{m}(r_{i}, b{offset});"));
                });
            }
            for (u, offset) in LANES_AHEAD.iter().enumerate().take(ahead) {
                for k in 0..self.tile {
                    t.line("{");
                    t.line(&format!("let c = b{offset};"));
                    t.line(&self.input(k));
                    each(&mut |m, i| {
                        let format = part.matrices[m].format;
                        t.line(&multiply(format, &format!("acc_{m}_{i}_{k}"), &format!("w_{m}_{i}_{u}")));
                    });
                    t.line("}");
                }
            }
            t.line("}");
            if ahead == 1 {
                break;
            }
        }
        let mut at = 0;
        for m in 0..part.matrices.len() {
            for k in 0..self.tile {
                for i in 0..per {
                    let name = format!("acc_{m}_{i}_{k}");
                    t.add(&shuffle(&name, shuffled));
                    t.line(&format!(
                        "if lid % SHUFFLED == 0u {{ red[{at}u * (256u / SHUFFLED) + lid / SHUFFLED] = {name}; }}"
                    ));
                    at += 1;
                }
            }
        }
        t.line("workgroupBarrier();");
        self.epilogue(t, part, before);
    }

    /// Activations of block `c`, row `k` of the tile.
    fn input(&self, k: usize) -> String {
        let cols = self.cols();
        match (&self.fused, self.floating()) {
            (Some(_), true) => "let xa = xf[2u * c]; let xb = xf[2u * c + 1u];".into(),
            (Some(_), false) => "let xa = xq[2u * c]; let xb = xq[2u * c + 1u]; let xs = xh[c];".into(),
            (None, true) => format!(
                "let xi = (t0 + {k}u) * {}u + 2u * c; let xa = bitcast<vec4<f32>>(xin[xi]); let xb = \
                 bitcast<vec4<f32>>(xin[xi + 1u]);",
                cols / 4
            ),
            (None, false) => format!(
                "let xi = (t0 + {k}u) * {}u + c; let xa = xin[2u * xi]; let xb = xin[2u * xi + 1u]; let xs = \
                 xsc[xi];",
                cols / 32
            ),
        }
    }

    fn epilogue(&self, t: &mut Text, part: &Part, before: usize) {
        let first = part.first;
        let rows = part.matrices[0].rows;
        let bias = |m: usize| {
            part.matrices[m].bias.map_or("0.0".into(), |at| format!("bitcast<f32>(w1[{at}u + r])"))
        };
        t.line(&format!("let first = {first}u;"));
        t.line("for (var o = lid; o < TILE * ROWS; o += 256u) { let k = o / ROWS; let lr = o % ROWS; let r = min(r0 + lr, ");
        t.line(&format!(
            "{}u); let fits = r0 + lr < {rows}u && t0 + k < P.rows; let row = t0 + k;",
            rows - 1
        ));
        let value = |m: usize| {
            format!(
                "(reduced(({m}u * TILE + k) * PER + lr % PER, (lr / PER) * (LPR / SHUFFLED)) + {})",
                bias(m)
            )
        };
        match &self.epilogue {
            Epilogue::Store { width } => {
                t.line(&format!("if fits {{ out[row * {width}u + {first}u + r] = {}; }} }}", value(0)));
            }
            Epilogue::Add { width } => {
                t.line(&format!(
                    "if fits {{ let at = row * {width}u + {first}u + r; x[at] = x[at] + {}; }} }}",
                    value(0)
                ));
            }
            Epilogue::Logits { width, cap, peaks, first_peak } => {
                t.line(&format!("var v = {};", value(0)));
                if let Some(cap) = cap {
                    t.line(&format!("v = capped(v, {});", float(*cap)));
                }
                t.line(&format!("if fits {{ out[row * {width}u + {first}u + r] = v; }}"));
                t.line("done[o] = select(-3e38, v, r0 + lr < ");
                t.line(&format!("{rows}u); }} workgroupBarrier();"));
                t.line("if lid < TILE && t0 + lid < P.rows { var most = -3e38; for (var i = 0u; i < ROWS; i++) { most = max(most, done[lid * ROWS + i]); }");
                t.line(&format!(
                    "peaks[(t0 + lid) * {peaks}u + {first_peak}u + wg.x - {before}u] = most; }}"
                ));
            }
            Epilogue::GateUp { act, cols, floating } => {
                let last = part.matrices.len() - 1;
                t.line(&format!("var v = activate({});", value(0)));
                if last > 0 {
                    t.line(&format!("v *= {};", value(last)));
                }
                t.line("done[o] = select(0.0, v, r0 + lr < ");
                t.line(&format!("{rows}u); }} workgroupBarrier();"));
                t.line("for (var o = lid; o < TILE * ROWS / 32u; o += 256u) { let k = o / (ROWS / 32u); let column = first + r0 + 32u * (o % (ROWS / 32u));");
                t.line(&format!("if t0 + k < P.rows && column < {cols}u {{ var v: array<vec4<f32>, 8>;"));
                t.line("for (var i = 0u; i < 8u; i++) { let d = 32u * o + 4u * i; v[i] = vec4<f32>(done[d], done[d + 1u], done[d + 2u], done[d + 3u]); }");
                t.add(&put("(t0 + k)", "column", *cols, *floating));
                t.line("} }");
                t.activation(*act);
            }
        }
    }
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
        t.line("@compute @workgroup_size(256)\nfn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {");
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

/// What attention needs to know.
#[derive(Clone, Debug)]
pub struct Attention {
    pub heads: crate::plan::Heads,
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
        let dims = if self.q8 { 4 } else { 2 };
        let groups = (128 / (h.head_dim / dims)).max(1);
        let groups = if groups.is_power_of_two() { groups } else { groups.next_power_of_two() / 2 };
        let room = |at_once: usize| 4 * at_once * (2 * h.head_dim + 128 + groups * h.head_dim) + 1024;
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
            ("PER", 128 / groups),
            ("DIMS", dims),
        ]);
        t.line(&format!("const ADJACENT = {}; const SCALE = {};", self.adjacent, float(self.scale)));
        t.line(&format!("const CAP = {};", float(self.cap.unwrap_or(1.0))));
        let mut norms = String::new();
        for (name, norm) in [("norm_query", &self.q_norm), ("norm_key", &self.k_norm)] {
            norms.extend(norm.iter().map(|norm| head_norm(name, norm)));
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
        let text = include_str!("kernels/attend.wgsl");
        let text = text.replace("//#norms", &norms);
        let together = (128 / at_once).min(dialect.lanes as usize);
        t.constants(&[("TOGETHER", together)]);
        let text = text.replace("//#most", &largest_of("most", together));
        let text = text.replace("//#sum", &shuffle("sum", together));
        let put = put("wg.y", "column", self.out, self.floating);
        t.add(&expand(&text.replace("//#put v wg.y column OUT", &put), &flags, dialect));
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
        let put = put("wg.y", "column", self.out, self.floating);
        let text = include_str!("kernels/merge.wgsl").replace("//#put v wg.y column OUT", &put);
        t.add(&expand(&text, &[], dialect));
        t.writes = vec![false, false, true, true];
        t.finish("merge")
    }
}

/// Normalises the heads in `qs`.
fn head_norm(name: &str, norm: &NormAt) -> String {
    let (weight, eps) = (norm.weight, float(norm.eps));
    let mean = match norm.kind {
        NormKind::Rms => "",
        NormKind::Layer => {
            "for (var d = l; d < HD; d += TPH) { s += qs[h * HD + d]; } workgroupBarrier(); red[lid] = s; \
             workgroupBarrier(); mean = head_sum(h, 1u) / f32(HD); s = 0.0;"
        }
    };
    let bias = norm.bias.map_or("0.0".into(), |at| format!("weight({at}u, d)"));
    format!(
        "fn {name}(n: u32, lid: u32) {{ let h = lid / TPH; let l = lid % TPH; var mean = 0.0; var s = 0.0; {mean}
for (var d = l; d < HD; d += TPH) {{ let v = qs[h * HD + d] - mean; s = fma(v, v, s); }}
workgroupBarrier(); red[lid] = s; workgroupBarrier();
let scale = 1.0 / sqrt(fma(head_sum(h, 1u), 1.0 / f32(HD), {eps}));
for (var d = l; d < HD; d += TPH) {{ if h < n {{ let at = h * HD + d; qs[at] = fma((qs[at] - mean) * scale, weight({weight}u, d), {bias}); }} }}
workgroupBarrier(); }}\n"
    )
}

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
    t.add(&expand(include_str!("kernels/embed.wgsl"), &[], dialect));
    t.writes.extend([false, false, true]);
    t.finish("main")
}

/// The two kernels that choose tokens: `choose` and `settle`.
pub fn sample(dialect: Dialect, constants: &[(&str, usize)], entry: &'static str) -> Kernel {
    let mut t = Text::new(dialect);
    t.constants(constants);
    t.add(&expand(include_str!("kernels/sample.wgsl"), &[], dialect));
    t.writes = vec![false, false, false, true, true, true];
    t.finish(entry)
}

/// A test of what the other kernels rely on: a sum over `lanes` neighbours of their numbers, products of bytes, packing.
pub fn probe(dialect: Dialect) -> Kernel {
    let mut t = Text::new(dialect);
    t.buffer("out", "u32", true);
    t.line(
        "@compute @workgroup_size(256)\nfn main(@builtin(local_invocation_index) lid: u32) { var v = lid;",
    );
    t.add(&shuffle("v", dialect.lanes as usize));
    t.line("out[2u + lid] = v; if lid == 0u {");
    t.line("let a = pack4xI8(vec4<i32>(-128, 127, 7, -13)); let b = pack4xI8(vec4<i32>(3, -5, 11, 17));");
    t.line("out[0] = u32(idot(vec4<u32>(a, 0u, 0u, 0u), vec4<u32>(b, 0u, 0u, 0u))); out[1] = pack4xI8(vec4<i32>(1, 127, -1, -128)); out[0] += P.base; } }");
    t.finish("main")
}

/// Reads all of a buffer with `width` workgroups; each invocation leaves what depends on all it has read.
pub fn read(dialect: Dialect, width: usize) -> Kernel {
    let mut t = Text::new(dialect);
    t.buffer("data", "vec4<u32>", false);
    t.buffer("out", "u32", true);
    t.constants(&[("STEP", 256 * width)]);
    t.line("@compute @workgroup_size(256)\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {");
    t.line("var a = vec4<u32>(); var b = a; var c = a; var d = a; let n = arrayLength(&data);");
    t.line("for (var i = at.x; i < n; i += 4u * STEP) { a += data[i]; b += data[min(i + STEP, n - 1u)];");
    t.line("c += data[min(i + 2u * STEP, n - 1u)]; d += data[min(i + 3u * STEP, n - 1u)]; }");
    t.line("let all = a + b + c + d; out[at.x] += all.x + all.y + all.z + all.w + P.base; }");
    t.finish("main")
}

/// A kernel's text as it grows.
struct Text {
    dialect: Dialect,
    text: String,
    writes: Vec<bool>,
}

impl Text {
    fn new(dialect: Dialect) -> Text {
        let mut text = String::new();
        if dialect.browser && dialect.lanes > 1 {
            text.push_str("enable subgroups;\n");
        }
        _ = writeln!(text, "const SG = {}u;", dialect.lanes);
        text.push_str(include_str!("kernels/common.wgsl"));
        Text { dialect, text, writes: Vec::new() }
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn add(&mut self, text: &str) {
        self.text.push_str(text);
    }

    fn constants(&mut self, constants: &[(&str, usize)]) {
        for (name, value) in constants {
            _ = writeln!(self.text, "const {name} = {value}u;");
        }
    }

    fn buffer(&mut self, name: &str, element: &str, written: bool) {
        let access = if written { "read_write" } else { "read" };
        let at = self.writes.len();
        _ = writeln!(self.text, "@group(0) @binding({at}) var<storage, {access}> {name}: array<{element}>;");
        self.writes.push(written);
    }

    fn region(&mut self) {
        self.buffer("w4", "vec4<u32>", false);
        self.buffer("w1", "u32", false);
    }

    /// The function `prologue(row, lid, store)`, which leaves the normalised row in `xf` or `xq` and `xh`.
    fn prologue(&mut self, p: &Prologue, cols: usize) {
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
        let text = expand(include_str!("kernels/norm.wgsl"), few, self.dialect);
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

    /// The function of that name goes to the front, where it may as well be.
    fn activation(&mut self, act: Activation) {
        let body = match act {
            Activation::Silu => "return x / (1.0 + exp(clamp(-x, -80.0, 80.0)));",
            Activation::GeluTanh => {
                "let inner = 0.7978845608 * fma(0.044715 * x * x, x, x); return 0.5 * x * (1.0 + tanh(clamp(inner, -15.0, 15.0)));"
            }
        };
        let at = self.text.find("const NOTHING").unwrap_or(0);
        self.text.insert_str(at, &format!("fn activate(x: f32) -> f32 {{ {body} }}\n"));
    }

    fn finish(self, entry: &'static str) -> Kernel {
        Kernel { text: self.text, entry, writes: self.writes }
    }
}

/// From `v`, eight vec4, to `most`, `qa` and `qb`.
const QUANTIZE: &str = "var most = 0.0; for (var k = 0u; k < 8u; k++) { most = max(most, largest(v[k])); }
let inverse = inverse_step(most);
let qa = vec4<u32>(quantized(v[0], inverse), quantized(v[1], inverse), quantized(v[2], inverse), quantized(v[3], inverse));
let qb = vec4<u32>(quantized(v[4], inverse), quantized(v[5], inverse), quantized(v[6], inverse), quantized(v[7], inverse));
";

/// Stores `v`, 32 columns from `column` on, as a product's input of `cols` columns.
fn put(row: &str, column: &str, cols: usize, floating: bool) -> String {
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

/// What a matrix' blocks become in registers: codes, or eight values; then scale, minimum, and their factors.
fn block_type(floating: bool) -> &'static str {
    if floating {
        "struct Block { lo: vec4<f32>, hi: vec4<f32> }"
    } else {
        "struct Block { lo: vec4<u32>, hi: vec4<u32>, d: f32, m: f32, s: vec4<i32> }"
    }
}

/// A function that reads block `b` of a row.
fn load(m: &Matrix, name: &str) -> String {
    let f = m.format;
    let blocks = m.cols / f.block();
    let mut t = format!("fn {name}(row: u32, b: u32) -> Block {{ let at = row * {blocks}u + b; ");
    let codes = m.codes / 4;
    t += &match f.codes {
        Codes::F32 => format!(
            "let lo = bitcast<vec4<f32>>(w4[{codes}u + 2u * at]); let hi = bitcast<vec4<f32>>(w4[{codes}u + 2u * at + 1u]);"
        ),
        Codes::F16 => format!(
            "let v = w4[{codes}u + at]; let lo = vec4<f32>(unpack2x16float(v.x), unpack2x16float(v.y)); let hi = \
             vec4<f32>(unpack2x16float(v.z), unpack2x16float(v.w));"
        ),
        Codes::BF16 => format!(
            "let v = w4[{codes}u + at]; let lo = bitcast<vec4<f32>>(vec4<u32>(v.x << 16u, v.x & 0xffff0000u, v.y << 16u, \
             v.y & 0xffff0000u)); let hi = bitcast<vec4<f32>>(vec4<u32>(v.z << 16u, v.z & 0xffff0000u, v.w << 16u, v.w & \
             0xffff0000u));"
        ),
        Codes::N8 => format!("let lo = w4[{codes}u + 2u * at]; let hi = w4[{codes}u + 2u * at + 1u];"),
        Codes::N4 => format!(
            "let v = w4[{codes}u + at]; let lo = v & vec4<u32>(0x0f0f0f0fu); let hi = (v >> vec4<u32>(4u)) & \
             vec4<u32>(0x0f0f0f0fu);"
        ),
        Codes::N5 => format!(
            "let v = w4[{codes}u + at]; let h = w1[{}u + at]; let one = vec4<u32>(0x01010101u); let lo = (v & \
             vec4<u32>(0x0f0f0f0fu)) | (((vec4<u32>(h) >> vec4<u32>(0u, 1u, 2u, 3u)) & one) << vec4<u32>(4u)); let hi = ((v >> \
             vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu)) | (((vec4<u32>(h) >> vec4<u32>(4u, 5u, 6u, 7u)) & one) << vec4<u32>(4u));",
            m.high
        ),
        Codes::N6 => format!(
            "let v = w4[{codes}u + at]; let h0 = w1[{0}u + 2u * at]; let h1 = w1[{0}u + 2u * at + 1u]; let three = \
             vec4<u32>(0x03030303u); let turn = vec4<u32>(0u, 2u, 4u, 6u); let lo = (v & vec4<u32>(0x0f0f0f0fu)) | \
             (((vec4<u32>(h0) >> turn) & three) << vec4<u32>(4u)); let hi = ((v >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu)) | \
             (((vec4<u32>(h1) >> turn) & three) << vec4<u32>(4u));",
            m.high
        ),
    };
    let words = f.row_words(m.cols);
    let (scales, supers) = (m.scales, m.supers);
    let byte = |at: u32| format!("i32(sb << {}u) >> 24u", 24 - 8 * at);
    let two = format!("vec4<i32>({}, {}, 0, 0)", byte(0), byte(1));
    let four = format!("vec4<i32>({}, {}, {}, {})", byte(0), byte(1), byte(2), byte(3));
    t += &match (f.scales, f.min) {
        (Scales::None, _) => "return Block(lo, hi); }".into(),
        (Scales::Half, false) => format!(
            " let d = unpack2x16float(w1[{scales}u + row * {}u + b / 2u] >> (16u * (b % 2u))).x; return Block(lo, hi, d, 0.0, \
             vec4<i32>()); }}",
            words.scales
        ),
        (Scales::Half, true) => format!(
            " let dm = unpack2x16float(w1[{scales}u + at]); return Block(lo, hi, dm.x, dm.y, vec4<i32>()); }}"
        ),
        (Scales::Byte16, true) => format!(
            " let dm = unpack2x16float(w1[{supers}u + at / 8u]); let sb = w1[{scales}u + at]; return Block(lo, hi, dm.x, dm.y, \
             {four}); }}"
        ),
        (Scales::Byte16 | Scales::Byte32, _) => format!(
            " let dm = unpack2x16float(w1[{supers}u + at / 8u]); let sb = w1[{scales}u + at / 2u] >> (16u * (b % 2u)); return \
             Block(lo, hi, dm.x, dm.y, {two}); }}"
        ),
    };
    t.push('\n');
    t
}

/// `acc +=` the product of block `w` with the activations `xa`, `xb`, `xs`.
fn multiply(f: Format, acc: &str, w: &str) -> String {
    if f.floating() {
        let one = |half: &str, x: &str, c: char| format!("{acc} = fma({w}.{half}.{c}, {x}.{c}, {acc}); ");
        let four = |half: &str, x: &str| "xyzw".chars().map(|c| one(half, x, c)).collect::<String>();
        return four("lo", "xa") + &four("hi", "xb");
    }
    let mut t = String::from("{ let dx = bitcast<f32>(xs.x); ");
    if f.zero != 0 || f.min {
        t += "let x0 = i32(xs.y << 16u) >> 16u; let x1 = i32(xs.y) >> 16u; ";
    }
    let zero = f.zero;
    let less = |sum: &str| if zero == 0 { String::new() } else { format!(" - {zero} * {sum}") };
    let both = format!("f32(idot({w}.lo, xa) + idot({w}.hi, xb){})", less("(x0 + x1)"));
    t += &match f.scales {
        Scales::None => String::new(),
        Scales::Half => format!("{acc} = fma({both}, {w}.d * dx, {acc}); "),
        Scales::Byte32 => format!("{acc} = fma({both}, {w}.d * f32({w}.s.x) * dx, {acc}); "),
        Scales::Byte16 => format!(
            "{acc} = fma(f32({w}.s.x * (idot({w}.lo, xa){}) + {w}.s.y * (idot({w}.hi, xb){})), {w}.d * dx, {acc}); ",
            less("x0"),
            less("x1")
        ),
    };
    t += &match (f.scales, f.min) {
        (_, false) => String::new(),
        (Scales::Byte32, _) => format!("{acc} = fma({w}.m * f32({w}.s.y), dx * f32(x0 + x1), {acc});"),
        (Scales::Byte16, _) => {
            format!("{acc} = fma({w}.m, dx * f32({w}.s.z * x0 + {w}.s.w * x1), {acc});")
        }
        _ => format!("{acc} = fma({w}.m, dx * f32(x0 + x1), {acc});"),
    };
    t + " }"
}

/// Adds a value up over `lanes` neighbouring lanes.
fn shuffle(name: &str, lanes: usize) -> String {
    let mut t = String::new();
    let mut step = 1;
    while step < lanes {
        _ = writeln!(t, "{name} += subgroupShuffleXor({name}, {step}u);");
        step *= 2;
    }
    t
}

/// The largest of a value over `lanes` neighbouring lanes.
fn largest_of(name: &str, lanes: usize) -> String {
    shuffle(name, lanes)
        .replace(&format!("{name} += subgroup"), &format!("{name} = max({name}, subgroup"))
        .replace(");", "));")
}

/// The function `reduced`: sum `a`'s values from place `first` on, `n` of them, as neighbours and their neighbours.
fn tree(n: usize, width: usize) -> String {
    fn sum(from: usize, n: usize) -> String {
        if n == 1 {
            return format!("red[at + {from}u]");
        }
        format!("({} + {})", sum(from, n / 2), sum(from + n / 2, n / 2))
    }
    format!(
        "fn reduced(a: u32, first: u32) -> f32 {{ let at = a * {width}u + first; return {}; }}\n",
        sum(0, n)
    )
}

/// Keeps what lies between `//#if FLAG` and `//#end` only where the flag is set, else what lies behind `//#else`, and
/// writes shuffles out.
fn expand(text: &str, flags: &[&str], dialect: Dialect) -> String {
    let mut out = String::with_capacity(text.len());
    let mut keep = true;
    for line in text.lines() {
        let word = line.trim_start();
        if let Some(flag) = word.strip_prefix("//#if ") {
            keep = flags.contains(&flag.trim());
        } else if word.starts_with("//#else") {
            keep = !keep;
        } else if word.starts_with("//#end") {
            keep = true;
        } else if keep {
            if word.starts_with("//#shuffle v SG") {
                out.push_str(&shuffle("v", dialect.lanes as usize));
            } else if !word.starts_with("//") {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out
}

/// A float as WGSL spells it.
fn float(value: f32) -> String {
    format!("{value:e}f")
}
