//! Products of rows of the batch with quantised matrices, and what becomes of them.
use super::blocks::{block_type, load, multiply};
use super::norm::{Prologue, put};
use super::text::{Text, float, shuffle};
use super::{Dialect, Kernel, Matrix};
use crate::plan::Activation;

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

    /// Units of so many rows that a workgroup computes in turn, so that what it does to its input is done once for all
    /// of them. Large GPUs have enough workgroups all the same.
    fn turns(&self) -> usize {
        match (&self.fused, &self.parts[..]) {
            (Some(_), [part]) => (part.matrices[0].rows / self.rows() / (4 * BUSY)).clamp(1, 8),
            _ => 1,
        }
    }

    /// Workgroups of a dispatch.
    pub fn width(&self) -> usize {
        self.groups().iter().sum::<usize>().div_ceil(self.turns())
    }

    /// Units of rows of each part.
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
            Some(_) if dialect.lanes < 8 => 5 * self.cols() + self.cols() / 4 + 1100,
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
        t.main();
        t.line("let t0 = wg.y * TILE; let lane = lid % LPR; let group = lid / LPR;");
        let turns = self.turns();
        if turns > 1 {
            t.line("prologue(t0, lid, wg.x == 0u); workgroupBarrier();");
            t.line(&format!(
                "for (var turn = 0u; turn < {turns}u; turn++) {{ let unit = wg.x * {turns}u + turn;"
            ));
        } else {
            t.line("let unit = wg.x; {");
        }
        let mut before = 0;
        for (number, (part, groups)) in self.parts.iter().zip(self.groups()).enumerate() {
            t.line(&format!("if unit >= {before}u && unit < {}u {{", before + groups));
            self.part(&mut t, (number, part), before, shuffled);
            t.line("}");
            before += groups;
        }
        if turns > 1 {
            t.line("workgroupBarrier();");
        }
        t.line("} }");
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
        let rows = part.matrices[0].rows;
        t.line(&format!("let r0 = (unit - {before}u) * ROWS;"));
        for i in 0..per {
            t.line(&format!("let r_{i} = min(r0 + group * PER + {i}u, {}u);", rows - 1));
        }
        self.each(part, &mut |m, i| {
            (0..self.tile).for_each(|k| t.line(&format!("var acc_{m}_{i}_{k} = 0.0;")));
        });
        let blocks = self.cols() / part.matrices[0].format.block();
        t.line("var b = lane;");
        let ahead = self.ahead();
        if self.fused.is_some() && self.turns() == 1 {
            // The first weights are on their way while the input is made.
            for (u, offset) in LANES_AHEAD.iter().enumerate().take(ahead) {
                self.load(t, (number, part), u, &format!("min(b{offset}, {}u)", blocks - 1));
            }
            t.line("prologue(t0, lid, wg.x == 0u); workgroupBarrier();");
            for (u, offset) in LANES_AHEAD.iter().enumerate().take(ahead) {
                t.line(&format!("if b{offset} < {blocks}u {{"));
                self.multiply(t, part, u);
                t.line("}");
            }
            t.line(&format!("b += {ahead}u * LPR;"));
        }
        for ahead in [ahead, 1] {
            t.line(&format!("for (; b{} < {blocks}u; b += {ahead}u * LPR) {{", LANES_AHEAD[ahead - 1]));
            for (u, offset) in LANES_AHEAD.iter().enumerate().take(ahead) {
                self.load(t, (number, part), u, &format!("b{offset}"));
            }
            (0..ahead).for_each(|u| self.multiply(t, part, u));
            t.line("}");
            if ahead == 1 {
                break;
            }
        }
        self.reduce(t, part, shuffled);
        self.epilogue(t, part, before);
    }

    /// For each matrix of the part and each row of it that a lane computes.
    fn each(&self, part: &Part, f: &mut dyn FnMut(usize, usize)) {
        let per = self.per_lane();
        (0..part.matrices.len()).for_each(|m| (0..per).for_each(|i| f(m, i)));
    }

    /// Reads that block of each row, as the `u`th of those under way.
    fn load(&self, t: &mut Text, (number, part): (usize, &Part), u: usize, block: &str) {
        self.each(part, &mut |m, i| {
            t.line(&format!("let w_{m}_{i}_{u} = block_{number}_{m}(r_{i}, {block});"));
        });
    }

    /// Multiplies the `u`th block under way: a row of activations is read once for all rows of the matrix.
    fn multiply(&self, t: &mut Text, part: &Part, u: usize) {
        for k in 0..self.tile {
            t.line(&format!("{{ let c = b{}; {}", LANES_AHEAD[u], self.input(k)));
            self.each(part, &mut |m, i| {
                let format = part.matrices[m].format;
                t.line(&multiply(format, &format!("acc_{m}_{i}_{k}"), &format!("w_{m}_{i}_{u}")));
            });
            t.line("}");
        }
    }

    /// Adds up what neighbouring lanes have, and leaves it in `red` for `reduced`.
    fn reduce(&self, t: &mut Text, part: &Part, shuffled: usize) {
        let mut at = 0;
        for m in 0..part.matrices.len() {
            for k in 0..self.tile {
                for i in 0..self.per_lane() {
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
                    "peaks[(t0 + lid) * {peaks}u + {first_peak}u + unit - {before}u] = most; }}"
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

impl Text {
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
