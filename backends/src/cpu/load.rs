//! From a [`Plan`] to what the CPU runs: matrices packed in one arena, vectors in f32, work split over threads.
use super::attend;
use super::os::Bytes;
use super::pack::{self, BLOCK, Kind};
use super::rows::NormArgs;
use super::simd::LANES;
use crate::gguf::{GgmlType, ModelFile, TensorInfo};
use crate::plan::{Activation, Heads, Linear, Norm, Plan, Residual, Rope, Step};
use crate::program::{DeviceError, KvLayout, check_layers};
use crate::quant;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A packed matrix in the arena.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub kind: Kind,
    pub cols: usize,
    pub rows: usize,
    pub panels: usize,
    pub panel_bytes: usize,
    /// Byte of the first panel in the arena.
    pub offset: usize,
    ty: GgmlType,
    tensor: String,
}

/// A product: a matrix by number, and its bias or null.
#[derive(Clone, Copy)]
pub struct Product {
    pub matrix: usize,
    pub bias: *const f32,
}

/// For each thread, a range of panels of each matrix of a step.
pub type Split = Vec<Vec<Range<usize>>>;

pub struct QkvStep {
    pub norm: NormArgs,
    pub k: Product,
    pub v: Product,
    pub q: Product,
    pub heads: Heads,
    pub k_norm: Option<NormArgs>,
    pub rope: usize,
    /// Of k, v, q; k and v by whole heads.
    pub split: Split,
    /// Number of the attention layer in the cache.
    pub layer: usize,
}

pub struct AttendStep {
    pub heads: Heads,
    pub scale: f32,
    /// `usize::MAX / 2` for all of the past.
    pub window: usize,
    pub soft_cap: f32,
    pub q_bias: *const f32,
    pub q_norm: Option<NormArgs>,
    pub rope: usize,
    pub layer: usize,
}

pub struct GateUpStep {
    pub norm: NormArgs,
    pub gate: Option<Product>,
    pub up: Product,
    pub act: Activation,
    /// Of the gate's and the up matrix's panels alike, by pairs.
    pub split: Split,
}

pub struct ResidualStep {
    pub product: Product,
    pub post: Option<NormArgs>,
    pub split: Split,
    /// For attention's output; none for the MLP's.
    pub attention: Option<Heads>,
}

pub struct HeadStep {
    pub norm: NormArgs,
    pub product: Product,
    pub soft_cap: f32,
    pub split: Split,
}

pub enum LowStep {
    Qkv(QkvStep),
    Attend(AttendStep),
    GateUp(GateUpStep),
    Residual(ResidualStep),
}

/// What a program is made of, weights not yet read.
pub struct Lowered {
    pub matrices: Vec<Matrix>,
    /// What the pointers in steps point into.
    pub vectors: Vec<Box<[f32]>>,
    pub embed: Option<(usize, f32)>,
    pub steps: Vec<LowStep>,
    pub head: Option<HeadStep>,
    pub ropes: Vec<Rope>,
    pub hidden: usize,
    pub vocab: usize,
    /// Widest input of any product.
    pub cols_max: usize,
    /// Widest feed-forward.
    pub ff_max: usize,
    /// Widest q + k + v.
    pub qkv_max: usize,
    pub kv: KvLayout,
    /// Bytes of a block in each attention layer, and where each layer's cache starts.
    pub caches: Vec<(usize, usize)>,
    pub weights_bytes: usize,
    pub cache_bytes: usize,
}

// SAFETY: the pointers in steps point into `vectors`, whose boxes move with it and never change.
unsafe impl Send for Lowered {}
// SAFETY: as above.
unsafe impl Sync for Lowered {}

fn unsupported(what: impl Into<String>) -> DeviceError {
    DeviceError::Unsupported(what.into())
}

struct Lowering<'a> {
    file: &'a ModelFile,
    threads: usize,
    by_name: HashMap<String, usize>,
    out: Lowered,
}

/// Checks and places everything. Reads only vectors.
pub fn lower(
    file: &ModelFile,
    plan: &Plan,
    layers: Range<usize>,
    kv: KvLayout,
    threads: usize,
) -> Result<Lowered, DeviceError> {
    check_layers(plan, &layers)?;
    if !plan.hidden.is_multiple_of(BLOCK) || kv.rows == 0 || kv.slots == 0 {
        return Err(unsupported(format!("hidden size {} is not a multiple of {BLOCK}", plan.hidden)));
    }
    let out = Lowered {
        matrices: Vec::new(),
        vectors: Vec::new(),
        embed: None,
        steps: Vec::new(),
        head: None,
        ropes: Vec::new(),
        hidden: plan.hidden,
        vocab: plan.vocab,
        cols_max: plan.hidden,
        ff_max: 0,
        qkv_max: 0,
        kv,
        caches: Vec::new(),
        weights_bytes: 0,
        cache_bytes: 0,
    };
    let mut l = Lowering { file, threads, by_name: HashMap::new(), out };
    if layers.start == 0 {
        let m = l.matrix(&plan.embed.table, plan.vocab, plan.hidden)?;
        l.out.embed = Some((m, plan.embed.scale));
    }
    for layer in &plan.layers[layers.clone()] {
        l.layer(layer)?;
    }
    if layers.end == plan.layers.len() {
        let product = l.product(&plan.head.linear)?;
        l.out.head = Some(HeadStep {
            norm: l.norm(&plan.head.norm, plan.hidden)?,
            product,
            soft_cap: plan.head.soft_cap.unwrap_or(0.0),
            split: l.split(&[(product.matrix, 1)]),
        });
    }
    Ok(l.out)
}

impl Lowering<'_> {
    fn tensor(&self, name: &str) -> Result<&TensorInfo, DeviceError> {
        self.file.tensor(name).ok_or_else(|| unsupported(format!("the file has no tensor {name}")))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<usize, DeviceError> {
        if let Some(&m) = self.by_name.get(name) {
            return Ok(m);
        }
        let info = self.tensor(name)?;
        let ty = info.ty;
        let kind = Kind::of(ty).ok_or_else(|| {
            unsupported(format!("tensor {name} has type {ty:?}, which the CPU can't compute"))
        })?;
        if info.dims != [cols as u64, rows as u64] || !cols.is_multiple_of(ty.block_values()) {
            return Err(unsupported(format!("tensor {name} is {:?}, expected [{cols}, {rows}]", info.dims)));
        }
        let panels = rows.div_ceil(LANES);
        let panel_bytes = kind.panel_bytes(cols);
        let offset = self.out.weights_bytes;
        let tensor = name.to_owned();
        self.out.matrices.push(Matrix { kind, cols, rows, panels, panel_bytes, offset, ty, tensor });
        // panels of different matrices start on cache lines of their own; the last vector load stays inside
        self.out.weights_bytes = (offset + panels * panel_bytes + 64).next_multiple_of(64);
        self.out.cols_max = self.out.cols_max.max(cols);
        let m = self.out.matrices.len() - 1;
        self.by_name.insert(name.to_owned(), m);
        Ok(m)
    }

    fn vector(&mut self, name: &str, n: usize) -> Result<*const f32, DeviceError> {
        let info = self.tensor(name)?;
        if info.dims.iter().product::<u64>() != n as u64 {
            return Err(unsupported(format!("tensor {name} has {:?} values, expected {n}", info.dims)));
        }
        let mut bytes = vec![0u8; info.bytes as usize];
        self.file.read(info, 0..info.bytes, &mut bytes).map_err(|e| DeviceError::File(e.to_string()))?;
        let mut values = vec![0f32; n.next_multiple_of(LANES)].into_boxed_slice();
        quant::dequantize(info.ty, &bytes, &mut values[..n]);
        let at = values.as_ptr();
        self.out.vectors.push(values);
        Ok(at)
    }

    fn bias(&mut self, name: Option<&String>, n: usize) -> Result<*const f32, DeviceError> {
        name.map_or(Ok(std::ptr::null()), |name| self.vector(name, n))
    }

    fn product(&mut self, l: &Linear) -> Result<Product, DeviceError> {
        Ok(Product {
            matrix: self.matrix(&l.weight, l.rows, l.cols)?,
            bias: self.bias(l.bias.as_ref(), l.rows)?,
        })
    }

    fn norm(&mut self, n: &Norm, width: usize) -> Result<NormArgs, DeviceError> {
        Ok(NormArgs {
            kind: n.kind,
            weight: self.vector(&n.weight, width)?,
            bias: self.bias(n.bias.as_ref(), width)?,
            eps: n.eps,
        })
    }

    fn maybe_norm(&mut self, n: Option<&Norm>, width: usize) -> Result<Option<NormArgs>, DeviceError> {
        n.map(|n| self.norm(n, width)).transpose()
    }

    fn rope(&mut self, rope: &Rope) -> usize {
        let known = self.out.ropes.iter().position(|r| r == rope);
        known.unwrap_or_else(|| {
            self.out.ropes.push(rope.clone());
            self.out.ropes.len() - 1
        })
    }

    /// Deals panels out in runs of about equal bytes; each matrix comes with the panels that must stay together.
    fn split(&self, parts: &[(usize, usize)]) -> Split {
        let size = |&(m, _): &(usize, usize)| self.out.matrices[m].panels * self.out.matrices[m].panel_bytes;
        let total: usize = parts.iter().map(size).sum();
        let mut split: Split = vec![Vec::new(); self.threads];
        let mut before = 0;
        for &(m, together) in parts {
            let matrix = &self.out.matrices[m];
            let groups = matrix.panels.div_ceil(together);
            let group_bytes = together * matrix.panel_bytes;
            // the first group that starts at or after thread t's share
            let bound = |t: usize| {
                let share = (total as u128 * t as u128 / self.threads as u128) as usize;
                let group = (share.saturating_sub(before) + group_bytes / 2) / group_bytes;
                (group.min(groups) * together).min(matrix.panels)
            };
            for (t, ranges) in split.iter_mut().enumerate() {
                let end = if t + 1 == self.threads { matrix.panels } else { bound(t + 1) };
                ranges.push(if t == 0 { 0 } else { bound(t) }..end);
            }
            before += matrix.panels * matrix.panel_bytes;
        }
        split
    }

    fn layer(&mut self, steps: &[Step]) -> Result<(), DeviceError> {
        let mut queries = None;
        for step in steps {
            let low = match step {
                Step::NormQkvRopeCache(s) => {
                    let h = s.heads;
                    check_heads(&h)?;
                    let (k, v, q) = (self.product(&s.k)?, self.product(&s.v)?, self.product(&s.q)?);
                    let kv_dim = h.kv_heads * h.head_dim;
                    self.out.qkv_max = self.out.qkv_max.max(2 * kv_dim + h.heads * h.head_dim);
                    let layer = self.out.caches.len();
                    let block = h.kv_heads * attend::block_bytes(self.out.kv.kv, h.head_dim);
                    self.out.caches.push((block, self.out.cache_bytes));
                    self.out.cache_bytes += (block * self.out.kv.blocks as usize).next_multiple_of(4096);
                    let rope = self.rope(&s.rope);
                    queries = Some((q.bias, self.maybe_norm(s.q_norm.as_ref(), h.head_dim)?, rope, layer));
                    let whole = h.head_dim / LANES;
                    LowStep::Qkv(QkvStep {
                        norm: self.norm(&s.norm, self.out.hidden)?,
                        k,
                        v,
                        q,
                        heads: h,
                        k_norm: self.maybe_norm(s.k_norm.as_ref(), h.head_dim)?,
                        rope,
                        split: self.split(&[(k.matrix, whole), (v.matrix, whole), (q.matrix, 1)]),
                        layer,
                    })
                }
                Step::Attend(s) => {
                    let (q_bias, q_norm, rope, layer) =
                        queries.ok_or_else(|| unsupported("a layer attends before it has queries"))?;
                    LowStep::Attend(AttendStep {
                        heads: s.heads,
                        scale: s.scale,
                        window: s.window.unwrap_or(usize::MAX / 2),
                        soft_cap: s.soft_cap.unwrap_or(0.0),
                        q_bias,
                        q_norm,
                        rope,
                        layer,
                    })
                }
                Step::NormGateUpAct(s) => {
                    let up = self.product(&s.up)?;
                    let gate = s.gate.as_ref().map(|g| self.product(g)).transpose()?;
                    if !s.up.rows.is_multiple_of(BLOCK) {
                        return Err(unsupported(format!(
                            "feed-forward size {} is not a multiple of {BLOCK}",
                            s.up.rows
                        )));
                    }
                    self.out.ff_max = self.out.ff_max.max(s.up.rows);
                    let norm = self.norm(&s.norm, self.out.hidden)?;
                    let split = self.split(&[(up.matrix, 2)]);
                    LowStep::GateUp(GateUpStep { norm, gate, up, act: s.act, split })
                }
                Step::Out(s) => {
                    let heads = steps.iter().find_map(|s| match s {
                        Step::Attend(a) => Some(a.heads),
                        _ => None,
                    });
                    self.residual(s, Some(heads.ok_or_else(|| unsupported("a layer has no attention"))?))?
                }
                Step::Down(s) => self.residual(s, None)?,
            };
            self.out.steps.push(low);
        }
        Ok(())
    }

    fn residual(&mut self, s: &Residual, attention: Option<Heads>) -> Result<LowStep, DeviceError> {
        let product = self.product(&s.linear)?;
        let post = self.maybe_norm(s.post_norm.as_ref(), self.out.hidden)?;
        let split = self.split(&[(product.matrix, 1)]);
        Ok(LowStep::Residual(ResidualStep { product, post, split, attention }))
    }
}

fn check_heads(h: &Heads) -> Result<(), DeviceError> {
    if !h.head_dim.is_multiple_of(32)
        || h.head_dim == 0
        || h.kv_heads == 0
        || !h.heads.is_multiple_of(h.kv_heads)
    {
        return Err(unsupported(format!("{h:?}: the CPU computes heads whose size is a multiple of 32")));
    }
    Ok(())
}

/// Reads and packs every matrix, all threads taking chunks of panels; the file's bytes never are in memory as a whole.
pub fn weights(file: &ModelFile, lowered: &Lowered, threads: usize) -> Result<Bytes, DeviceError> {
    /// Bytes of the file that a thread reads at once.
    const CHUNK: usize = 1 << 20;
    let arena = Bytes::zeroed(lowered.weights_bytes).ok_or_else(|| DeviceError::Memory {
        weights_mib: (lowered.weights_bytes >> 20) as u64,
        kv_mib: (lowered.cache_bytes >> 20) as u64,
        free_mib: super::os::memory_free() >> 20,
        device: "the CPU".to_owned(),
    })?;
    let row_bytes = |m: &Matrix| m.cols / m.ty.block_values() * m.ty.block_bytes();
    let mut chunks = Vec::new();
    for m in &lowered.matrices {
        let per = (CHUNK / (LANES * row_bytes(m))).max(1);
        chunks.extend((0..m.panels).step_by(per).map(|p| (m, p..(p + per).min(m.panels))));
    }
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let work = || {
        let mut bytes = Vec::new();
        while let Some((m, panels)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(e) = pack_chunk(file, m, panels.clone(), row_bytes(m), &arena, &mut bytes) {
                *failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(e);
                next.store(chunks.len(), Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        (1..threads).for_each(|_| _ = scope.spawn(work));
        work();
    });
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(e) => Err(e),
        None => Ok(arena),
    }
}

fn pack_chunk(
    file: &ModelFile,
    m: &Matrix,
    panels: Range<usize>,
    row_bytes: usize,
    arena: &Bytes,
    bytes: &mut Vec<u8>,
) -> Result<(), DeviceError> {
    let info = file.tensor(&m.tensor).ok_or_else(|| unsupported(format!("no tensor {}", m.tensor)))?;
    let (first, last) = (panels.start * LANES, (panels.end * LANES).min(m.rows));
    bytes.resize((last - first) * row_bytes, 0);
    file.read(info, (first * row_bytes) as u64..(last * row_bytes) as u64, bytes)
        .map_err(|e| DeviceError::File(e.to_string()))?;
    for (panel, rows) in panels.zip(bytes.chunks(LANES * row_bytes)) {
        // SAFETY: the panel lies in the arena, and belongs to this chunk alone.
        let out = unsafe {
            std::slice::from_raw_parts_mut(arena.ptr().add(m.offset + panel * m.panel_bytes), m.panel_bytes)
        };
        pack::pack_panel(m.ty, m.cols, rows, out);
    }
    Ok(())
}
