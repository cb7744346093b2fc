//! From a [`Plan`] to kernels, arguments and places in GPU memory.
mod attend;
mod places;

use super::args::{Acts, AttendArgs, EnterArgs, GemmArgs, Matrix, SettleArgs};
use super::constants::{Constants, c, fusable};
use super::forms::{AS_PROMPT, Chip, Form, PAIR, Split, TILE, WIDE, WIDE_SUMS, WIDE_TILES};
use crate::gguf::ModelFile;
use crate::plan::{
    Activation, Heads, Linear, Norm, NormGateUpAct, NormKind, NormQkvRopeCache, Plan, Residual, Rope, Step,
};
use crate::program::{DeviceError, KvLayout, check_layers};
use std::collections::HashMap;
use std::ops::Range;
use weir_scheduler::BLOCK_TOKENS;

/// Columns that share a launch of the head, and rows that may be decoded together by a graph.
pub const TOGETHER: usize = 128;
/// Positions of a span of attention.
pub const SPAN: usize = 128;

/// A product: its kernels by number, and all arguments but columns and map.
pub struct GemmStep {
    pub kernel: usize,
    /// Thread blocks of all its matrices: with few columns, with many.
    pub units: [usize; 2],
    pub split: Split,
    pub args: GemmArgs,
    /// Floats of a row of `args.out`.
    pub stride: usize,
    /// Pairs of a row of its input, and of what it makes for the next product.
    pub pairs: usize,
    pub next_pairs: usize,
    /// Of weights, in the file.
    pub bytes: u64,
    pub name: &'static str,
}

pub struct AttendStep {
    pub kernel: usize,
    pub heads: Heads,
    pub args: AttendArgs,
    /// Pairs of a row of all ropes' angles.
    pub angles: usize,
    /// The rows of a sequence that one tile of queries holds.
    pub tile_rows: usize,
    pub window: Option<usize>,
}

pub struct SettleStep {
    /// For output, for prompts.
    pub kernels: [usize; 2],
    /// Thread blocks of a row.
    pub blocks: usize,
    pub args: SettleArgs,
    /// What it makes of rows of output, where blocks of values don't depend on each other.
    pub plain: Option<u32>,
}

pub enum Low {
    Gemm(GemmStep),
    Attend(AttendStep),
    Settle(SettleStep),
}

/// A tensor on its way into tiles.
pub struct PackJob {
    pub tensor: String,
    pub form: Form,
    /// 0: rows in order; 1, 2: upper, lower eight rows of each tile.
    pub half: i32,
    pub tile0: usize,
    pub pairs: usize,
    pub matrix: Matrix,
}

/// A product's kernels to be generated: the structure of their constants, and what they are fitted to.
#[derive(PartialEq)]
pub struct Product {
    pub constants: String,
    pub split: Split,
    pub forms: Vec<Form>,
    /// The forms that its kernels for prompts make; none where there are none.
    pub prompt: Option<u32>,
}

/// Kernels of attention to be generated.
pub struct Attention {
    pub constants: String,
    /// Tiles of queries of the split kernel and the whole one, and their shared memory.
    pub tiles: [(usize, usize); 2],
}

/// What a program is made of.
pub struct Lowered {
    /// Bytes from `base` on.
    pub bytes: usize,
    pub weights_bytes: usize,
    pub cache_bytes: usize,
    pub chip: Chip,
    pub gemms: Vec<Product>,
    pub attends: Vec<Attention>,
    /// Bodies of the kernels that settle.
    pub settles: Vec<String>,
    pub enter_body: String,
    /// The same, where it prepares the stream for the first step of output too.
    pub enter_settled: Option<String>,
    pub jobs: Vec<PackJob>,
    /// Small arrays to upload.
    pub vectors: Vec<(u64, Vec<u8>)>,
    pub steps: Vec<Low>,
    pub head: Option<GemmStep>,
    pub enter: EnterArgs,
    /// Prompts have an arithmetic of their own.
    pub prompts: bool,
    pub embeds: bool,
    pub hidden: usize,
    pub vocab: usize,
    pub logits: u64,
    pub last: u64,
    pub most: u64,
    pub best: u64,
    pub cut: u64,
    pub arrived: u64,
    pub rows_done: u64,
    /// Spans whose partial sums have room.
    pub partials: usize,
    /// Of products' segments that thread blocks of their own compute: sums, and how many have arrived.
    pub segments: u64,
    pub segments_arrived: u64,
}

fn unsupported(what: impl Into<String>) -> DeviceError {
    DeviceError::Unsupported(what.into())
}

/// A step that reads the residual stream, as the ones before it see it.
#[derive(Clone, Copy)]
struct Reader<'a> {
    norm: &'a Norm,
    /// What it reads of output, of prompts.
    forms: [u32; 2],
}

impl Reader<'_> {
    /// Whether what was prepared for `other` will do.
    fn reads(&self, other: &Reader<'_>) -> bool {
        self.norm == other.norm && (0..2).all(|i| other.forms[i] & self.forms[i] == self.forms[i])
    }
}

struct Lowering<'a> {
    file: &'a ModelFile,
    kv: KvLayout,
    at: u64,
    by_name: HashMap<String, (Matrix, Form, usize)>,
    vectors_by_name: HashMap<String, u64>,
    /// Distinct ropes and where their pairs begin in a row's angles.
    ropes: Vec<(Rope, usize)>,
    angles: usize,
    rows: usize,
    x: u64,
    y: u64,
    qkv: u64,
    from_hidden: Acts,
    from_heads: Acts,
    from_ff: Acts,
    partial: u64,
    arrived_heads: u64,
    out: Lowered,
}

/// Thread blocks that share the columns of a product for `tiles` tiles of many columns.
pub fn apart(g: &GemmStep, tiles: usize, chip: Chip) -> usize {
    if g.units[1] * tiles * 2 <= chip.processors { g.split.segs } else { 1 }
}

/// Checks and places everything from `base` on. Called twice: to learn the size, then with memory to place it in.
pub fn lower(
    file: &ModelFile,
    plan: &Plan,
    layers: Range<usize>,
    kv: KvLayout,
    base: u64,
    chip: Chip,
) -> Result<Lowered, DeviceError> {
    check_layers(plan, &layers)?;
    if !plan.hidden.is_multiple_of(32) || plan.hidden > 16384 || kv.rows == 0 || kv.slots == 0 {
        return Err(unsupported(format!(
            "hidden size {}: CUDA computes multiples of 32 up to 16384",
            plan.hidden
        )));
    }
    let out = Lowered {
        bytes: 0,
        weights_bytes: 0,
        cache_bytes: 0,
        chip,
        gemms: Vec::new(),
        attends: Vec::new(),
        settles: Vec::new(),
        enter_body: String::new(),
        enter_settled: None,
        jobs: Vec::new(),
        vectors: Vec::new(),
        steps: Vec::new(),
        head: None,
        enter: EnterArgs::default(),
        prompts: false,
        embeds: layers.start == 0,
        hidden: plan.hidden,
        vocab: plan.vocab,
        logits: 0,
        last: 0,
        most: 0,
        best: 0,
        cut: 0,
        arrived: 0,
        rows_done: 0,
        partials: kv.blocks as usize * BLOCK_TOKENS / SPAN + 2 * kv.slots as usize,
        segments: 0,
        segments_arrived: 0,
    };
    let mut l = Lowering {
        file,
        kv,
        at: base,
        by_name: HashMap::new(),
        vectors_by_name: HashMap::new(),
        ropes: Vec::new(),
        angles: 0,
        rows: kv.rows as usize,
        x: 0,
        y: 0,
        qkv: 0,
        from_hidden: Acts::default(),
        from_heads: Acts::default(),
        from_ff: Acts::default(),
        partial: 0,
        arrived_heads: 0,
        out,
    };
    l.out.prompts = l.prompts(&plan.layers[layers.clone()]);
    l.room(plan, &layers);
    l.ropes(&plan.layers[layers.clone()]);
    l.steps(plan, &layers)?;
    l.enter(plan)?;
    l.segments();
    l.out.bytes = (l.at - base) as usize;
    Ok(l.out)
}

impl Lowering<'_> {
    /// What the next step that touches the residual stream after step `i` wants of it; none if it is a sum.
    fn next_reader<'p>(
        &self,
        plan: &'p Plan,
        steps: &[&'p Step],
        i: usize,
        heads: bool,
    ) -> Result<Option<Reader<'p>>, DeviceError> {
        for step in &steps[i..] {
            match step {
                Step::NormQkvRopeCache(s) => {
                    return self.reader(&s.norm, &[&s.q, &s.k, &s.v], false).map(Some);
                }
                Step::NormGateUpAct(s) => {
                    let gate = s.gate.as_ref().unwrap_or(&s.up);
                    return self.reader(&s.norm, &[gate, &s.up], false).map(Some);
                }
                Step::Out(_) | Step::Down(_) => return Ok(None),
                Step::Attend(_) => {}
            }
        }
        if heads { self.reader(&plan.head.norm, &[&plan.head.linear], true).map(Some) } else { Ok(None) }
    }

    fn reader<'p>(&self, norm: &'p Norm, linears: &[&Linear], head: bool) -> Result<Reader<'p>, DeviceError> {
        let mut forms: Vec<Form> = self.forms(linears)?;
        if let [gate, up] = forms[..]
            && gate != up
        {
            forms = vec![Form::F32];
        }
        let output = forms.iter().fold(0, |all, f| all | f.input());
        Ok(Reader { norm, forms: [output, if head { output } else { AS_PROMPT }] })
    }

    /// Whether prompts can be multiplied in an arithmetic of their own.
    fn prompts(&self, layers: &[Vec<Step>]) -> bool {
        let widens = |linears: &[&Linear]| {
            let forms = self.forms(linears);
            forms.is_ok_and(|f| f.iter().all(|f| f.widens()))
        };
        layers.iter().flatten().all(|step| match step {
            Step::NormQkvRopeCache(s) => widens(&[&s.q, &s.k, &s.v]),
            Step::NormGateUpAct(s) => match &s.gate {
                Some(gate) => {
                    widens(&[gate, &s.up]) && self.forms(&[gate, &s.up]).is_ok_and(|f| f[0] == f[1])
                }
                None => widens(&[&s.up]),
            },
            Step::Out(s) | Step::Down(s) => widens(&[&s.linear]),
            Step::Attend(_) => true,
        })
    }

    fn steps(&mut self, plan: &Plan, layers: &Range<usize>) -> Result<(), DeviceError> {
        let heads = layers.end == plan.layers.len();
        let steps: Vec<&Step> = plan.layers[layers.clone()].iter().flatten().collect();
        // the norm for which the stream lies prepared, and a sum that waits for a norm of its own
        let mut prepared: Option<Reader<'_>> = None;
        let mut pending: Option<&Norm> = None;
        let mut qkv: Option<&NormQkvRopeCache> = None;
        for (i, step) in steps.iter().enumerate() {
            match step {
                Step::NormQkvRopeCache(s) => {
                    let reader = self.reader(&s.norm, &[&s.q, &s.k, &s.v], false)?;
                    self.settle(&mut prepared, &mut pending, Some(reader))?;
                    self.qkv(s)?;
                    qkv = Some(s);
                }
                Step::Attend(s) => {
                    let qkv = qkv.ok_or_else(|| unsupported("a layer attends before it has queries"))?;
                    let out =
                        steps[i..].iter().find_map(|s| if let Step::Out(r) = s { Some(r) } else { None });
                    let out = out.ok_or_else(|| unsupported("a layer's attention goes nowhere"))?;
                    let forms = self.forms(&[&out.linear])?[0].input();
                    self.attend(qkv, s, forms)?;
                }
                Step::NormGateUpAct(s) => {
                    let gate = s.gate.as_ref().unwrap_or(&s.up);
                    let reader = self.reader(&s.norm, &[gate, &s.up], false)?;
                    self.settle(&mut prepared, &mut pending, Some(reader))?;
                    let down =
                        steps[i..].iter().find_map(|s| if let Step::Down(r) = s { Some(r) } else { None });
                    let down = down.ok_or_else(|| unsupported("a layer's MLP goes nowhere"))?;
                    let forms = self.forms(&[&down.linear])?[0].input();
                    self.gate_up(s, forms)?;
                }
                Step::Out(s) | Step::Down(s) => {
                    if pending.is_some() {
                        self.settle(&mut prepared, &mut pending, None)?;
                    }
                    let next = self.next_reader(plan, &steps, i + 1, heads)?;
                    let next = next.filter(|r| fusable(r.norm) && s.post_norm.is_none());
                    prepared = next;
                    pending = s.post_norm.as_ref();
                    let attention = matches!(step, Step::Out(_));
                    self.residual(s, attention, next)?;
                }
            }
        }
        if heads {
            let reader = self.reader(&plan.head.norm, &[&plan.head.linear], true)?;
            self.settle(&mut prepared, &mut pending, Some(reader))?;
            self.head(plan)?;
        } else if pending.is_some() {
            self.settle(&mut prepared, &mut pending, None)?;
        }
        Ok(())
    }

    /// Adds what is pending and prepares the stream for `reader`, if that isn't so already.
    fn settle<'p>(
        &mut self,
        prepared: &mut Option<Reader<'p>>,
        pending: &mut Option<&'p Norm>,
        reader: Option<Reader<'p>>,
    ) -> Result<(), DeviceError> {
        if pending.is_none() && reader.is_none_or(|r| prepared.is_some_and(|p| r.reads(&p))) {
            return Ok(());
        }
        let hidden = self.out.hidden;
        let mut args = SettleArgs { x: self.x, y: self.y, next: self.from_hidden, ..SettleArgs::default() };
        let (mut post, mut norm, mut forms) = ((0, 0.0), (0, 0.0), [0; 2]);
        if let Some(p) = pending {
            args.post = self.vector(&p.weight, hidden)?;
            args.post_bias = self.maybe_vector(p.bias.as_ref(), hidden)?;
            post = (if p.kind == NormKind::Rms { 1 } else { 2 }, p.eps);
        }
        if let Some(r) = &reader {
            args.gain = self.vector(&r.norm.weight, hidden)?;
            args.bias = self.maybe_vector(r.norm.bias.as_ref(), hidden)?;
            let kind = match r.norm.kind {
                NormKind::Rms if fusable(r.norm) => 1,
                NormKind::Layer => 2,
                NormKind::Rms => 3,
            };
            (norm, forms) = ((kind, r.norm.eps), r.forms);
        }
        let kernels = forms.map(|forms| {
            let body = format!(
                "settle<{hidden}, {}, {}, {forms}>(p, {}, {});",
                post.0,
                norm.0,
                c(post.1),
                c(norm.1)
            );
            position_or_push(&mut self.out.settles, body)
        });
        let plain = (post.0 == 0 && norm.0 == 1).then_some(forms[0]);
        let blocks = if plain.is_some() { hidden.div_ceil(256) } else { 1 };
        self.out.steps.push(Low::Settle(SettleStep { kernels, blocks, args, plain }));
        *pending = None;
        *prepared = reader;
        Ok(())
    }

    /// Room for segments that thread blocks of their own compute.
    fn segments(&mut self) {
        let columns = self.rows.div_ceil(WIDE);
        let gemms = self.out.steps.iter().filter_map(|s| if let Low::Gemm(g) = s { Some(g) } else { None });
        let most = gemms.chain(&self.out.head).flat_map(|g| {
            (1..=columns)
                .map(|n| g.units[1] * n * if apart(g, n, self.out.chip) > 1 { g.split.segs } else { 0 })
        });
        let most = most.max().unwrap_or(0);
        self.out.segments = self.take(most * WIDE_SUMS * 4);
        self.out.segments_arrived = self.take(self.out.chip.processors * 4);
    }

    /// A product of `linears`, and its kernels unless there are such already.
    fn gemm(
        &mut self,
        constants: &Constants<'_>,
        args: GemmArgs,
        linears: &[&Linear],
        name: &'static str,
        prompt: Option<u32>,
    ) -> GemmStep {
        let split = constants.split;
        let prompt = prompt.filter(|_| self.out.prompts);
        let product = Product { constants: constants.text(), split, forms: constants.forms.to_vec(), prompt };
        let kernel = position_or_push(&mut self.out.gemms, product);
        let units = constants.rows.iter().map(|rows| split.units(*rows));
        let units = units.fold([0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
        let Constants { stride, pairs, next_pairs, .. } = *constants;
        GemmStep { kernel, units, split, args, stride, pairs, next_pairs, bytes: self.bytes(linears), name }
    }

    fn qkv(&mut self, s: &NormQkvRopeCache) -> Result<(), DeviceError> {
        let linears = [&s.q, &s.k, &s.v];
        let forms = self.forms(&linears)?;
        let pairs = s.q.cols.div_ceil(PAIR);
        let rows = linears.map(|l| l.rows);
        let split = Split::new(rows.iter().map(|r| r.div_ceil(TILE)).sum(), pairs, 1);
        let mut args = GemmArgs { input: self.from_hidden, out: self.qkv, ..GemmArgs::default() };
        for (i, l) in linears.iter().enumerate() {
            args.matrix[i] = self.matrix(l, forms[i])?;
        }
        let stride: usize = rows.iter().sum();
        let constants =
            Constants { split, pairs, kind: 0, forms: &forms, rows: &rows, stride, ..Constants::default() }
                .reading(&s.norm, self.out.hidden);
        let step = self.gemm(&constants, args, &linears, "norm_qkv_rope_cache", Some(0));
        self.out.steps.push(Low::Gemm(step));
        Ok(())
    }

    fn gate_up(&mut self, s: &NormGateUpAct, next: u32) -> Result<(), DeviceError> {
        let ff = s.up.rows;
        let pairs = s.up.cols.div_ceil(PAIR);
        let act = u8::from(s.act == Activation::GeluTanh);
        let next_pairs = ff.div_ceil(PAIR);
        let mut args = GemmArgs { input: self.from_hidden, next: self.from_ff, ..GemmArgs::default() };
        let (kind, form, rows, mt) = if let Some(gate) = &s.gate {
            let forms = self.forms(&[gate, &s.up])?;
            let form = if forms[0] == forms[1] { forms[0] } else { Form::F32 };
            let matrix = self.place(form, (2 * ff).div_ceil(TILE * WIDE_TILES) * WIDE_TILES, pairs);
            for (half, l) in [(1, gate), (2, &s.up)] {
                let tensor = l.weight.clone();
                self.out.jobs.push(PackJob { tensor, form, half, tile0: 0, pairs, matrix });
            }
            args.matrix[0] = Matrix { bias: self.maybe_vector(gate.bias.as_ref(), ff)?, ..matrix };
            args.matrix[1].bias = self.maybe_vector(s.up.bias.as_ref(), ff)?;
            (2, form, 2 * ff, 4)
        } else {
            let form = self.forms(&[&s.up])?[0];
            args.matrix[0] = self.matrix(&s.up, form)?;
            (3, form, ff, 2)
        };
        let split = Split::new(rows.div_ceil(TILE), pairs, mt);
        let (forms, all) = ([form], [rows]);
        let constants = Constants {
            split,
            pairs,
            kind,
            forms: &forms,
            rows: &all,
            act,
            next,
            next_pairs,
            ..Constants::default()
        };
        let constants = constants.reading(&s.norm, self.out.hidden);
        let linears: Vec<&Linear> = s.gate.iter().chain([&s.up]).collect();
        let step = self.gemm(&constants, args, &linears, "norm_gate_up_act", Some(AS_PROMPT));
        self.out.steps.push(Low::Gemm(step));
        Ok(())
    }

    fn residual(
        &mut self,
        s: &Residual,
        attention: bool,
        next: Option<Reader<'_>>,
    ) -> Result<(), DeviceError> {
        let l = &s.linear;
        let form = self.forms(&[l])?[0];
        let pairs = l.cols.div_ceil(PAIR);
        let split = Split::new(l.rows.div_ceil(TILE), pairs, 2);
        let mut args = GemmArgs {
            input: if attention { self.from_heads } else { self.from_ff },
            next: self.from_hidden,
            ..GemmArgs::default()
        };
        args.matrix[0] = self.matrix(l, form)?;
        let rows = [l.rows];
        let mut prompt = 0;
        let mut constants = Constants {
            split,
            pairs,
            kind: 0,
            forms: &[form],
            rows: &rows,
            stride: l.rows,
            ..Constants::default()
        };
        if s.post_norm.is_some() {
            args.out = self.y;
        } else {
            args.out = self.x;
            constants.kind = 1;
            if let Some(r) = &next {
                args.gain = self.vector(&r.norm.weight, l.rows)?;
                constants.next = r.forms[0];
                prompt = r.forms[1];
                constants.next_pairs = l.rows.div_ceil(PAIR);
            }
        }
        let name = if attention { "out_residual" } else { "down_residual" };
        let step = self.gemm(&constants, args, &[l], name, Some(prompt));
        self.out.steps.push(Low::Gemm(step));
        Ok(())
    }

    fn head(&mut self, plan: &Plan) -> Result<(), DeviceError> {
        let l = &plan.head.linear;
        let form = self.forms(&[l])?[0];
        let pairs = l.cols.div_ceil(PAIR);
        let split = Split::new(l.rows.div_ceil(TILE), pairs, 4);
        let mut args = GemmArgs { input: self.from_hidden, out: self.out.logits, ..GemmArgs::default() };
        args.matrix[0] = self.matrix(l, form)?;
        let constants = Constants {
            split,
            pairs,
            kind: 0,
            forms: &[form],
            rows: &[l.rows],
            stride: plan.vocab,
            map: true,
            cap: plan.head.soft_cap.unwrap_or(0.0),
            ..Constants::default()
        };
        let constants = constants.reading(&plan.head.norm, self.out.hidden);
        self.out.head = Some(self.gemm(&constants, args, &[l], "norm_logits_sample", None));
        Ok(())
    }

    fn enter(&mut self, plan: &Plan) -> Result<(), DeviceError> {
        let (mut form, mut pairs) = (-1, 0);
        if self.out.embeds {
            let (rows, cols) = (plan.vocab, plan.hidden);
            let table = Linear { weight: plan.embed.table.clone(), bias: None, rows, cols };
            let f = self.forms(&[&table])?[0];
            self.out.enter.table = self.matrix(&table, f)?;
            (form, pairs) = (f as i32, cols.div_ceil(PAIR));
        }
        self.out.enter.last = self.out.last;
        self.out.enter.x = self.x;
        let angles = self.angles;
        let body = |forms: u32| {
            let (hidden, scale) = (plan.hidden, c(plan.embed.scale));
            format!("enter<{form}, {pairs}, {hidden}, {angles}, {forms}>(p, {scale});")
        };
        self.out.enter_body = body(0);
        if let Some(Low::Settle(s)) = self.out.steps.first()
            && let Some(forms) = s.plain
        {
            (self.out.enter.gain, self.out.enter.next) = (s.args.gain, s.args.next);
            self.out.enter_settled = Some(body(forms));
        }
        Ok(())
    }
}

fn position_or_push<T: PartialEq>(all: &mut Vec<T>, one: T) -> usize {
    all.iter().position(|other| *other == one).unwrap_or_else(|| {
        all.push(one);
        all.len() - 1
    })
}
