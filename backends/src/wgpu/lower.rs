//! From a [`Plan`] to dispatches: what lies in which region of the weights, which kernels run in which order.
use super::kernels::{self, Attention, Dialect, Epilogue, Kernel, Matrix, NormAt, Part, Product, Prologue};
use super::pack::{BLOCK, Format};
use crate::gguf::{GgmlType, ModelFile, TensorInfo};
use crate::plan::{Heads, Linear, Norm, Plan, Residual, Rope, RopePairs, Step};
use crate::program::{DeviceError, KvLayout};
use std::collections::HashMap;
use std::ops::Range;
use weir_scheduler::{BLOCK_TOKENS, KvType};

/// Rows of a batch that a workgroup computes when there is more than one.
const TILE: usize = 4;
/// Positions that the fine table of a rotation holds.
const ROPE_FINE: usize = 256;
/// Ids that a workgroup chooses among.
pub const CHUNK: usize = 2048;
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
    /// Most spans that this layer's attention looks at; 1 where the dispatch has no third dimension.
    pub spans: usize,
    /// The fused step that it belongs to, and the bytes of weights it reads.
    pub name: &'static str,
    pub bytes: usize,
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
    /// Rows that a dispatch of [`Height::Tiles`] computes in one workgroup.
    pub tile: usize,
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
    if layers.end > plan.layers.len() || layers.start > layers.end {
        return Err(unsupported(format!("layers {layers:?} of {}", plan.layers.len())));
    }
    if !plan.hidden.is_multiple_of(4) || kv.rows == 0 || kv.slots == 0 || kv.blocks == 0 {
        return Err(unsupported(format!("hidden size {} is not a multiple of 4", plan.hidden)));
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
    l.out.tile = l.tile();
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
    fn tensor(&self, name: &str) -> Result<&'a TensorInfo, DeviceError> {
        self.file.tensor(name).ok_or_else(|| unsupported(format!("the file has no tensor {name}")))
    }

    fn region(&mut self) -> usize {
        self.out.regions.push(Region::default());
        self.out.regions.len() - 1
    }

    fn vector(&mut self, region: usize, name: &str, values: Range<usize>) -> Result<usize, DeviceError> {
        if self.tensor(name)?.values() < values.end as u64 {
            return Err(unsupported(format!("tensor {name} has fewer than {} values", values.end)));
        }
        let region = &mut self.out.regions[region];
        let at = region.words;
        region.words = (at + values.len()).next_multiple_of(4);
        region.fills.push(Fill::Vector { tensor: name.into(), values, at });
        Ok(at)
    }

    fn norm(&mut self, region: usize, norm: &Norm, width: usize) -> Result<NormAt, DeviceError> {
        let weight = self.vector(region, &norm.weight, 0..width)?;
        let bias = norm.bias.as_ref().map(|bias| self.vector(region, bias, 0..width)).transpose()?;
        Ok(NormAt { kind: norm.kind, weight, bias, eps: norm.eps })
    }

    /// The format of a matrix; as f32 where others of its step are floating and it isn't.
    fn format(&self, linear: &Linear, step: &[&Linear]) -> Result<(GgmlType, Format), DeviceError> {
        let of = |linear: &Linear| -> Result<(GgmlType, Format), DeviceError> {
            let info = self.tensor(&linear.weight)?;
            let format = Format::of(info.ty).filter(|_| linear.cols.is_multiple_of(info.ty.block_values()));
            let format = format.ok_or_else(|| {
                unsupported(format!(
                    "tensor {} has type {}, which the GPU can't compute",
                    linear.weight, info.ty
                ))
            })?;
            if info.dims != [linear.cols as u64, linear.rows as u64] {
                let (name, dims) = (&linear.weight, &info.dims);
                return Err(unsupported(format!(
                    "tensor {name} is {dims:?}, expected [{}, {}]",
                    linear.cols, linear.rows
                )));
            }
            Ok((info.ty, format))
        };
        let (ty, format) = of(linear)?;
        for other in step {
            let blocks = of(other)?.1.block();
            if blocks != format.block() {
                return Ok((ty, Format::F32));
            }
        }
        Ok((ty, format))
    }

    /// Rows of a matrix into a region.
    fn matrix(
        &mut self,
        region: usize,
        linear: &Linear,
        (ty, format): (GgmlType, Format),
        rows: Range<usize>,
    ) -> Result<Matrix, DeviceError> {
        let cols = linear.cols.next_multiple_of(BLOCK);
        let words = format.row_words(cols);
        let count = rows.len();
        let place = &mut self.out.regions[region].words;
        let mut take = |words: usize| {
            let at = *place;
            *place = (at + words * count).next_multiple_of(4);
            at
        };
        let (codes, high) = (take(words.codes), take(words.high));
        let (scales, supers) = (take(words.scales), take(words.supers));
        let bias = linear.bias.as_ref().map(|bias| self.vector(region, bias, rows.clone())).transpose()?;
        let matrix = Matrix { format, rows: count, cols, codes, high, scales, supers, bias };
        let fill = Fill::Matrix {
            tensor: linear.weight.clone(),
            ty,
            rows,
            cols: linear.cols,
            matrix: matrix.clone(),
        };
        self.out.regions[region].fills.push(fill);
        Ok(matrix)
    }

    /// Places a step's matrices in as few regions as bindings allow, each group of them cut at the same rows.
    fn place(&mut self, groups: &[Vec<&Linear>]) -> Result<Vec<(usize, Vec<Part>)>, DeviceError> {
        let all: Vec<&Linear> = groups.iter().flatten().copied().collect();
        // Vectors need some room too.
        let room = self.limit / 4 - self.limit / 64;
        let mut placed: Vec<(usize, Vec<Part>)> = Vec::new();
        let mut first = 0;
        for group in groups {
            let mut formats = Vec::new();
            let mut row_words = 0;
            for linear in group {
                let format = self.format(linear, &all)?;
                row_words += format.1.row_words(linear.cols.next_multiple_of(BLOCK)).sum() + 1;
                formats.push(format);
            }
            let rows = group[0].rows;
            let mut done = 0;
            while done < rows {
                let used = placed.last().map_or(room, |(region, _)| self.out.regions[*region].words);
                let mut fits = (room.saturating_sub(used) / row_words).min(rows - done);
                if fits < rows - done {
                    fits = fits / 256 * 256;
                }
                if fits == 0 {
                    if room / row_words < 256.min(rows - done) {
                        return Err(unsupported(format!("{}: its rows are too wide", group[0].weight)));
                    }
                    placed.push((self.region(), Vec::new()));
                    continue;
                }
                let Some((region, parts)) = placed.last_mut() else { continue };
                let region = *region;
                let mut matrices = Vec::new();
                for (linear, format) in group.iter().zip(&formats) {
                    matrices.push(self.matrix(region, linear, *format, done..done + fits)?);
                }
                parts.push(Part { matrices, first: first + done });
                done += fits;
            }
            first += rows;
        }
        Ok(placed)
    }

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
                self.out.embed.push(Call {
                    kernel,
                    buffers: vec![Buf::Region(region), Buf::Region(region), Buf::Step, Buf::Last, Buf::X(0)],
                    width: 1,
                    height: Height::Rows,
                    when: When::Always,
                    spans: 1,
                    name: "embed",
                    bytes: 0,
                });
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
                    self.product("norm_qkv_rope_cache", Some(&s.norm), &groups, epilogue, &[Buf::Raw], None)?;
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
                    self.product("norm_gate_up_act", Some(&s.norm), &[group], epilogue, &output, None)?;
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
        match &s.post_norm {
            None => {
                let output = [Buf::X(self.x)];
                self.product(name, None, &groups, Epilogue::Add { width }, &output, Some(input))
            }
            Some(norm) => {
                let output = [Buf::Delta(self.pending.len())];
                self.product(name, None, &groups, Epilogue::Store { width }, &output, Some(input))?;
                self.pending.push(norm);
                self.grow(Buf::Deltas, 4 * width * self.out.rows_max * self.pending.len());
                Ok(())
            }
        }
    }

    /// The dispatches of one product, behind a norm or with its input ready.
    fn product(
        &mut self,
        name: &'static str,
        norm: Option<&'a Norm>,
        groups: &[Vec<&Linear>],
        epilogue: Epilogue,
        output: &[Buf],
        input: Option<[Buf; 2]>,
    ) -> Result<(), DeviceError> {
        let placed = self.place(groups)?;
        let floating = placed[0].1[0].matrices[0].format.floating();
        let cols = placed[0].1[0].matrices[0].cols;
        for (n, (region, parts)) in placed.into_iter().enumerate() {
            let bytes = 4 * self.out.regions[region].words;
            let call = |kernel, buffers, width, height| Call {
                kernel,
                buffers,
                width,
                height,
                when: When::Always,
                spans: 1,
                name,
                bytes,
            };
            let ready = input.unwrap_or([Buf::Normed, Buf::NormedScales]);
            let regions = [Buf::Region(region); 2];
            let buffers = |input: &[Buf]| [&regions[..], input, output].concat();
            let tiled = Product { parts, fused: None, epilogue: epilogue.clone(), tile: self.tile() };
            let single = Product { tile: 1, ..tiled.clone() };
            let width: usize = single.groups().iter().sum();
            if let Some(norm) = norm {
                let prologue = self.prologue(region, Some(norm), floating, None)?;
                let mut before = call(
                    prologue.kernel(self.dialect, cols),
                    self.prologue_buffers(region, &prologue, true),
                    1,
                    Height::Rows,
                );
                before.bytes = 0;
                let fused = Product { fused: Some(prologue.clone()), ..single.clone() };
                if fused.shared_bytes(self.dialect) <= self.dialect.shared_bytes as usize {
                    let inputs = self.prologue_buffers(region, &prologue, false);
                    let buffers = [&inputs[..], output].concat();
                    self.out.one.push(call(fused.kernel(self.dialect), buffers, width, Height::One));
                } else {
                    if n == 0 {
                        self.out.one.push(before.clone());
                    }
                    let kernel = single.kernel(self.dialect);
                    self.out.one.push(call(kernel, buffers(&ready), width, Height::One));
                }
                if n == 0 {
                    self.out.many.push(before);
                }
                self.input_buffers([Buf::Normed, Buf::NormedScales], cols, floating);
            } else {
                let kernel = single.kernel(self.dialect);
                self.out.one.push(call(kernel, buffers(&ready), width, Height::One));
            }
            let width = tiled.groups().iter().sum();
            self.out.many.push(call(tiled.kernel(self.dialect), buffers(&ready), width, Height::Tiles));
        }
        if norm.is_some() && !self.pending.is_empty() {
            self.pending.clear();
            self.x = 1 - self.x;
        }
        Ok(())
    }

    fn tile(&self) -> usize {
        // Without subgroups the partial sums of a tile take too much of the workgroup's memory.
        if self.dialect.lanes >= 4 { TILE } else { 1 }
    }

    fn prologue(
        &mut self,
        region: usize,
        norm: Option<&Norm>,
        floating: bool,
        wanted: Option<usize>,
    ) -> Result<Prologue, DeviceError> {
        let hidden = self.plan.hidden;
        let mut pending = Vec::new();
        for norm in self.pending.clone() {
            pending.push(self.norm(region, norm, hidden)?);
        }
        let norm = norm.map(|norm| self.norm(region, norm, hidden)).transpose()?;
        Ok(Prologue { hidden, rows_max: self.out.rows_max, pending, norm, floating, wanted })
    }

    fn prologue_buffers(&self, region: usize, prologue: &Prologue, alone: bool) -> Vec<Buf> {
        let mut buffers = vec![Buf::Region(region), Buf::Region(region), Buf::X(self.x)];
        if !prologue.pending.is_empty() {
            buffers.extend([Buf::Deltas, Buf::X(1 - self.x)]);
        }
        buffers.extend(prologue.wanted.map(|_| Buf::Step));
        if alone && prologue.norm.is_some() {
            buffers.extend([Buf::Normed, Buf::NormedScales]);
        }
        buffers
    }

    fn attend(&mut self, attention: &Attention, region: usize) {
        let layer = self.layers;
        self.layers += 1;
        let heads = attention.heads;
        let (key, value) = Attention::place(heads.head_dim, attention.q8);
        let places = self.kv.blocks as usize * BLOCK_TOKENS * heads.kv_heads;
        self.out.sizes.insert(Buf::Keys(layer), places * key * 16);
        self.out.sizes.insert(Buf::Values(layer), places * value * 4);
        self.out.kv_bytes += places * (key * 16 + value * 4);
        let inputs =
            [Buf::Raw, Buf::Region(region), Buf::Ropes, Buf::Step, Buf::Keys(layer), Buf::Values(layer)];
        let result = [Buf::Attended, Buf::AttendedScales];
        let spans = match attention.window {
            0 => usize::MAX,
            window => window / SPAN + 2,
        };
        let call = |kernel, buffers: Vec<Buf>, when| Call {
            kernel,
            buffers,
            width: heads.kv_heads,
            height: Height::Rows,
            when,
            spans: 1,
            name: "attend",
            bytes: 0,
        };
        let kernel = |entry| attention.kernel(self.dialect, entry);
        // What is merged stays in the workgroup's memory.
        let splits = 4 * heads.heads / heads.kv_heads * heads.head_dim <= self.dialect.shared_bytes as usize;
        let cache = call(kernel("cache"), [&inputs[..], &result].concat(), When::Prefill);
        let when = if splits { When::Whole } else { When::Always };
        let mut calls = vec![call(kernel("attend"), [&inputs[..], &result].concat(), when)];
        if splits {
            let mut split =
                call(kernel("attend_span"), [&inputs[..], &[Buf::Partials]].concat(), When::Split);
            split.spans = spans;
            let merged = [Buf::Partials, Buf::Step, Buf::Attended, Buf::AttendedScales].to_vec();
            calls.extend([split, call(attention.merge(self.dialect), merged, When::Split)]);
        }
        self.out.one.extend(calls.clone());
        self.out.many.push(cache);
        self.out.many.extend(calls);
        self.out.partial_words = self.out.partial_words.max(heads.heads * (heads.head_dim + 2));
        self.out.kv_heads = self.out.kv_heads.max(heads.kv_heads);
        self.input_buffers([Buf::Attended, Buf::AttendedScales], attention.out, attention.floating);
    }

    /// Where a rotation's fine and coarse tables begin: `cos, sin` of `(p % 256) f` and of `(p / 256) 256 f`.
    fn rope(&mut self, rope: &'a Rope) -> (usize, usize) {
        if let Some((_, at)) = self.ropes.iter().find(|(known, _)| *known == rope) {
            return *at;
        }
        let coarse = (self.kv.blocks as usize * BLOCK_TOKENS).div_ceil(ROPE_FINE);
        let mut table = |positions: usize, step: usize, magnitude: f32| {
            let at = self.out.ropes.len();
            for position in 0..positions {
                self.out.ropes.extend(rope.inv_freq.iter().map(|f| {
                    let (sin, cos) = ((position * step) as f64 * f64::from(*f)).sin_cos();
                    [cos as f32 * magnitude, sin as f32 * magnitude]
                }));
            }
            at
        };
        let at = (table(ROPE_FINE, 1, rope.magnitude), table(coarse, ROPE_FINE, 1.0));
        self.ropes.push((rope, at));
        at
    }

    fn head(&mut self) -> Result<(), DeviceError> {
        let plan = self.plan;
        let head = &plan.head;
        let mut table = Vec::new();
        if head.linear.weight == plan.embed.table && head.linear.bias.is_none() {
            table = std::mem::take(&mut self.table);
        }
        if table.is_empty() {
            for (region, parts) in self.place(&[vec![&head.linear]])? {
                table.extend(parts.into_iter().map(|part| (region, part)));
            }
        }
        let (floating, cols) = (table[0].1.matrices[0].format.floating(), table[0].1.matrices[0].cols);
        let product = |part: &Part, tile| Product {
            parts: vec![part.clone()],
            fused: None,
            epilogue: Epilogue::Logits { width: plan.vocab, cap: None, peaks: 0, first_peak: 0 },
            tile,
        };
        let widths: Vec<usize> = table.iter().map(|(_, part)| product(part, 1).groups()[0]).collect();
        let peaks: usize = widths.iter().sum();
        let mut first_peak = 0;
        let output = [Buf::Logits, Buf::Peaks];
        for (n, ((region, part), width)) in table.iter().zip(&widths).enumerate() {
            let epilogue = Epilogue::Logits { width: plan.vocab, cap: head.soft_cap, peaks, first_peak };
            first_peak += width;
            let tiled = Product { epilogue: epilogue.clone(), ..product(part, self.tile()) };
            let single = Product { tile: 1, ..tiled.clone() };
            let prologue = self.prologue(*region, Some(&head.norm), floating, Some(self.out.wanted_at))?;
            let bytes = 4 * self.out.regions[*region].words;
            let call = |kernel, buffers, width, height, bytes| Call {
                kernel,
                buffers,
                width,
                height,
                when: When::Always,
                spans: 1,
                name: "norm_logits",
                bytes,
            };
            let alone = self.prologue_buffers(*region, &prologue, true);
            let before = call(prologue.kernel(self.dialect, cols), alone, 1, Height::Rows, 0);
            let ready = [Buf::Region(*region), Buf::Region(*region), Buf::Normed, Buf::NormedScales];
            let ready = [&ready[..], &output].concat();
            let fused = Product { fused: Some(prologue.clone()), ..single.clone() };
            if fused.shared_bytes(self.dialect) <= self.dialect.shared_bytes as usize {
                let inputs = self.prologue_buffers(*region, &prologue, false);
                let buffers = [&inputs[..], &output].concat();
                let kernel = fused.kernel(self.dialect);
                self.out.head_one.push(call(kernel, buffers, *width, Height::One, bytes));
            } else {
                self.out.head_one.extend((n == 0).then(|| before.clone()));
                let kernel = single.kernel(self.dialect);
                self.out.head_one.push(call(kernel, ready.clone(), *width, Height::One, bytes));
            }
            self.out.head_many.extend((n == 0).then_some(before));
            self.out.head_many.push(call(tiled.kernel(self.dialect), ready, *width, Height::Tiles, bytes));
        }
        self.input_buffers([Buf::Normed, Buf::NormedScales], cols, floating);
        self.grow(Buf::Logits, 4 * plan.vocab * self.out.logits_rows);
        self.grow(Buf::Peaks, 4 * peaks * self.out.logits_rows);
        self.choose(peaks);
        Ok(())
    }

    fn choose(&mut self, peaks: usize) {
        let vocab = self.plan.vocab;
        let chunks = vocab.div_ceil(CHUNK);
        let constants = [
            ("VOCAB", vocab),
            ("OUTS", self.out.wanted_at),
            ("PEAKS", peaks),
            ("CHUNKS", chunks),
            ("CHUNK", CHUNK),
        ];
        for (entry, width) in [("choose", chunks), ("settle", 1)] {
            self.out.choose.push(Call {
                kernel: kernels::sample(self.dialect, &constants, entry),
                buffers: vec![Buf::Logits, Buf::Peaks, Buf::Step, Buf::Candidates, Buf::Last, Buf::Ids],
                width,
                height: Height::Rows,
                when: When::Always,
                spans: 1,
                name: "sample",
                bytes: 0,
            });
        }
        self.grow(Buf::Candidates, 8 * chunks * self.out.logits_rows);
    }

    fn settle(&mut self) -> Result<(), DeviceError> {
        if !self.pending.is_empty() {
            let region = self.region();
            let prologue = self.prologue(region, None, true, None)?;
            self.out.settle.push(Call {
                kernel: prologue.kernel(self.dialect, self.plan.hidden.next_multiple_of(BLOCK)),
                buffers: self.prologue_buffers(region, &prologue, true),
                width: 1,
                height: Height::Rows,
                when: When::Always,
                spans: 1,
                name: "settle",
                bytes: 0,
            });
            self.x = 1 - self.x;
        }
        self.out.x_end = self.x;
        Ok(())
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
