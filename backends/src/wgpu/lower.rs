//! From a [`Plan`] to dispatches: what lies in which region of the weights, which kernels run in which order.
mod attend;
mod head;
mod places;
mod product;

use super::kernels::{self, Attention, Dialect, Epilogue, Kernel, Matrix, Part};
use super::pack::BLOCK;
use crate::gguf::{GgmlType, ModelFile};
use crate::plan::{Heads, Linear, Norm, Plan, Residual, Rope, RopePairs, Step};
use crate::program::{DeviceError, KvLayout, check_layers};
use product::Source;
use std::collections::HashMap;
use std::ops::Range;
use weir_scheduler::{BLOCK_TOKENS, KvType};

/// Positions that attention folds at once; see `attend.wgsl`.
pub const SPAN: usize = 128;
/// Bytes of what split attention leaves to be merged.
const PARTIAL_BYTES: usize = 64 << 20;
/// Bytes of logits that are computed at once.
const LOGITS_BYTES: usize = 64 << 20;

/// A contiguous piece of the weights, bound as a whole: all that one dispatch needs.
#[derive(Clone, Debug, Default)]
pub struct Region {
    pub words: usize,
    pub fills: Vec<Fill>,
}

/// What goes into a region.
#[derive(Clone, Debug)]
pub enum Fill {
    /// Rows of a matrix, packed.
    Matrix { tensor: String, ty: GgmlType, rows: Range<usize>, cols: usize, matrix: Matrix },
    /// Values of a vector, as f32.
    Vector { tensor: String, values: Range<usize>, at: usize },
}

/// Buffers of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Buf {
    Region(usize),
    /// The residual stream; two, where sums are left to later steps.
    X(usize),
    /// All sums left to later steps, or one of them.
    Deltas,
    Delta(usize),
    /// The normalised input of a product: codes and scales.
    Normed,
    NormedScales,
    Raw,
    Partials,
    Attended,
    AttendedScales,
    Gated,
    GatedScales,
    Logits,
    Peaks,
    Candidates,
    Ids,
    Last,
    Step,
    Ropes,
    Keys(usize),
    Values(usize),
}

/// Workgroups in the second dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Height {
    One,
    Rows,
    Tiles,
}

/// Which steps a dispatch is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Always,
    /// Those in which a segment has several rows.
    Prefill,
    /// Those whose attention is split into spans, and the others.
    Split,
    Whole,
}

/// One dispatch.
#[derive(Clone, Debug)]
pub struct Call {
    pub kernel: Kernel,
    pub buffers: Vec<Buf>,
    pub width: usize,
    pub height: Height,
    pub when: When,
    /// Rows of the batch that a workgroup computes, of [`Height::Tiles`].
    pub tile: usize,
    /// Most spans that this layer's attention looks at; 1 where the dispatch has no third dimension.
    pub spans: usize,
    /// The fused step that it belongs to, and the bytes of weights it reads.
    pub name: &'static str,
    pub bytes: usize,
}

impl Call {
    /// Part of every step, flat, and without weights worth counting.
    fn new(name: &'static str, kernel: Kernel, buffers: Vec<Buf>, width: usize, height: Height) -> Call {
        Call { kernel, buffers, width, height, when: When::Always, tile: 1, spans: 1, name, bytes: 0 }
    }
}

/// All that a program runs.
#[derive(Default)]
pub struct Lowered {
    pub regions: Vec<Region>,
    pub embed: Vec<Call>,
    /// The layers for one row, and for several.
    pub one: Vec<Call>,
    pub many: Vec<Call>,
    /// The head, where there is one, for one row and for several, and the choice of tokens.
    pub head_one: Vec<Call>,
    pub head_many: Vec<Call>,
    pub choose: Vec<Call>,
    /// Brings the residual stream up to date, where there is no head; and where it is then.
    pub settle: Vec<Call>,
    pub x_end: usize,
    /// Bytes of each buffer that isn't weights.
    pub sizes: HashMap<Buf, usize>,
    pub ropes: Vec<[f32; 2]>,
    pub hidden: usize,
    pub vocab: usize,
    /// Rows of the batch that the buffers hold, and rows of logits computed at once.
    pub rows_max: usize,
    pub logits_rows: usize,
    /// Where the wanted rows and the block tables are in the step's words.
    pub wanted_at: usize,
    pub tables_at: usize,
    pub tables_words: usize,
    pub kv_bytes: usize,
    /// Words of one row's one span of split attention, and rows times spans that there is room for.
    pub partial_words: usize,
    pub partials: usize,
    pub kv_heads: usize,
}

struct Lowering<'a> {
    file: &'a ModelFile,
    plan: &'a Plan,
    kv: KvLayout,
    dialect: Dialect,
    /// Most bytes of a binding.
    limit: usize,
    out: Lowered,
    x: usize,
    pending: Vec<&'a Norm>,
    layers: usize,
    ropes: Vec<(&'a Rope, (usize, usize))>,
    table: Vec<(usize, Part)>,
}

fn unsupported(what: impl Into<String>) -> DeviceError {
    DeviceError::Unsupported(what.into())
}

/// Checks everything and places it; reads no weights.
pub fn lower(
    file: &ModelFile,
    plan: &Plan,
    layers: Range<usize>,
    kv: KvLayout,
    dialect: Dialect,
    limit: usize,
) -> Result<Lowered, DeviceError> {
    check_layers(plan, &layers)?;
    if !plan.hidden.is_multiple_of(4) {
        return Err(unsupported(format!("hidden size {} is not a multiple of 4", plan.hidden)));
    }
    if kv.rows == 0 || kv.slots == 0 || kv.blocks == 0 {
        return Err(unsupported(format!("no room for anything: {kv:?}")));
    }
    let rows_max = (kv.rows as usize).next_multiple_of(64);
    let mut out = Lowered {
        hidden: plan.hidden,
        vocab: plan.vocab,
        rows_max,
        wanted_at: 4 * rows_max,
        tables_at: 12 * rows_max,
        tables_words: kv.slots as usize * kv.blocks as usize,
        ..Lowered::default()
    };
    out.logits_rows = (LOGITS_BYTES.min(limit) / (4 * plan.vocab)).clamp(1, kv.rows as usize);
    let pending = Vec::new();
    let mut l = Lowering {
        file,
        plan,
        kv,
        dialect,
        limit,
        out,
        x: 0,
        pending,
        layers: 0,
        ropes: Vec::new(),
        table: Vec::new(),
    };
    if layers.start == 0 {
        l.embed()?;
    }
    for layer in &plan.layers[layers.clone()] {
        l.layer(layer)?;
    }
    if layers.end == plan.layers.len() {
        l.head()?;
    } else {
        l.settle()?;
    }
    l.sizes();
    l.check()?;
    Ok(l.out)
}

impl<'a> Lowering<'a> {
    fn embed(&mut self) -> Result<(), DeviceError> {
        let plan = self.plan;
        let linear =
            Linear { weight: plan.embed.table.clone(), bias: None, rows: plan.vocab, cols: plan.hidden };
        for (region, parts) in self.place(&[vec![&linear]])? {
            for part in parts {
                let kernel = kernels::embed(
                    self.dialect,
                    &part.matrices[0],
                    part.first,
                    plan.hidden,
                    plan.embed.scale,
                );
                let buffers = vec![Buf::Region(region), Buf::Region(region), Buf::Step, Buf::Last, Buf::X(0)];
                self.out.embed.push(Call::new("embed", kernel, buffers, 1, Height::Rows));
                self.table.push((region, part));
            }
        }
        Ok(())
    }

    fn layer(&mut self, steps: &'a [Step]) -> Result<(), DeviceError> {
        let mut queries = None;
        let linear_of = |out: bool| {
            steps.iter().find_map(|step| match step {
                Step::Out(s) if out => Some(&s.linear),
                Step::Down(s) if !out => Some(&s.linear),
                _ => None,
            })
        };
        for step in steps {
            match step {
                Step::NormQkvRopeCache(s) => {
                    check_heads(&s.heads)?;
                    queries = Some(s);
                    let width = (s.heads.heads + 2 * s.heads.kv_heads) * s.heads.head_dim;
                    let groups = [vec![&s.q], vec![&s.k], vec![&s.v]];
                    let epilogue = Epilogue::Store { width };
                    self.product(
                        "norm_qkv_rope_cache",
                        Source::Norm(&s.norm),
                        &groups,
                        epilogue,
                        &[Buf::Raw],
                    )?;
                    self.grow(Buf::Raw, 4 * width * self.out.rows_max);
                }
                Step::Attend(s) => {
                    let q = queries.ok_or_else(|| unsupported("a layer attends before it has queries"))?;
                    let out = linear_of(true).ok_or_else(|| unsupported("a layer drops its attention"))?;
                    let floating = self.format(out, &[])?.1.floating();
                    let region = self.region();
                    let width = s.heads.head_dim;
                    let mut norm = |n: Option<&Norm>| n.map(|n| self.norm(region, n, width)).transpose();
                    let (q_norm, k_norm) = (norm(q.q_norm.as_ref())?, norm(q.k_norm.as_ref())?);
                    // A region isn't empty.
                    self.out.regions[region].words += 4;
                    let attention = Attention {
                        heads: s.heads,
                        q_norm,
                        k_norm,
                        pairs: q.rope.inv_freq.len(),
                        adjacent: q.rope.pairs == RopePairs::Adjacent,
                        rope: self.rope(&q.rope),
                        tables: self.out.tables_at,
                        window: s.window.unwrap_or(0),
                        cap: s.soft_cap,
                        scale: s.scale,
                        q8: self.kv.kv == KvType::Q8_0,
                        out: out.cols.next_multiple_of(BLOCK),
                        floating,
                    };
                    self.attend(&attention, region);
                }
                Step::Out(s) => {
                    let input = [Buf::Attended, Buf::AttendedScales];
                    self.residual("out_residual", s, input)?;
                }
                Step::NormGateUpAct(s) => {
                    let down = linear_of(false).ok_or_else(|| unsupported("a layer drops its MLP"))?;
                    let floating = self.format(down, &[])?.1.floating();
                    let cols = down.cols.next_multiple_of(BLOCK);
                    let group = s.gate.iter().chain([&s.up]).collect();
                    let epilogue = Epilogue::GateUp { act: s.act, cols, floating };
                    let output = [Buf::Gated, Buf::GatedScales];
                    self.product("norm_gate_up_act", Source::Norm(&s.norm), &[group], epilogue, &output)?;
                    self.input_buffers(output, cols, floating);
                }
                Step::Down(s) => self.residual("down_residual", s, [Buf::Gated, Buf::GatedScales])?,
            }
        }
        Ok(())
    }

    fn residual(&mut self, name: &'static str, s: &'a Residual, input: [Buf; 2]) -> Result<(), DeviceError> {
        let width = self.plan.hidden;
        let groups = [vec![&s.linear]];
        let input = Source::Ready(input);
        match &s.post_norm {
            None => {
                let output = [Buf::X(self.x)];
                self.product(name, input, &groups, Epilogue::Add { width }, &output)
            }
            Some(norm) => {
                let output = [Buf::Delta(self.pending.len())];
                self.product(name, input, &groups, Epilogue::Store { width }, &output)?;
                self.pending.push(norm);
                self.grow(Buf::Deltas, 4 * width * self.out.rows_max * self.pending.len());
                Ok(())
            }
        }
    }

    fn grow(&mut self, buffer: Buf, bytes: usize) {
        let size = self.out.sizes.entry(buffer).or_default();
        *size = bytes.max(*size);
    }

    fn input_buffers(&mut self, [codes, scales]: [Buf; 2], cols: usize, floating: bool) {
        let rows = self.out.rows_max;
        self.grow(codes, rows * cols * if floating { 4 } else { 1 });
        self.grow(scales, rows * cols / 4);
    }

    fn sizes(&mut self) {
        let (rows, hidden) = (self.out.rows_max, self.plan.hidden);
        self.grow(Buf::X(0), 4 * rows * hidden);
        self.grow(Buf::X(1), 4 * rows * hidden);
        let words = self.out.partial_words.max(1);
        let spans = (self.kv.blocks as usize * BLOCK_TOKENS).div_ceil(SPAN);
        self.out.partials = (PARTIAL_BYTES.min(self.limit) / (4 * words)).min(spans * rows);
        self.grow(Buf::Partials, 4 * words * self.out.partials);
        self.grow(Buf::Ids, 4 * rows);
        self.grow(Buf::Last, 4 * self.kv.slots as usize);
        self.grow(Buf::Step, 4 * (self.out.tables_at + self.out.tables_words));
        if self.out.ropes.is_empty() {
            self.out.ropes.push([1.0, 0.0]);
        }
        self.grow(Buf::Ropes, 8 * self.out.ropes.len());
    }

    fn check(&self) -> Result<(), DeviceError> {
        for (buffer, &bytes) in &self.out.sizes {
            if bytes > self.limit {
                let (mib, limit) = (bytes >> 20, self.limit >> 20);
                return Err(unsupported(format!(
                    "{buffer:?} needs {mib} MiB, and this GPU binds at most {limit} MiB at once; try fewer tokens of \
                     context or fewer rows a batch"
                )));
            }
        }
        Ok(())
    }
}

fn check_heads(h: &Heads) -> Result<(), DeviceError> {
    if !h.head_dim.is_multiple_of(32)
        || !(32..=256).contains(&h.head_dim)
        || h.kv_heads == 0
        || !h.heads.is_multiple_of(h.kv_heads)
    {
        return Err(unsupported(format!("{h:?}: the GPU computes heads of 32 to 256, a multiple of 32")));
    }
    Ok(())
}
