//! What lies where in GPU memory: working memory, matrices, vectors.
use super::super::args::{Acts, Matrix};
use super::super::forms::{Form, PAIR, PROMPT_ROWS, TILE, WIDE_TILES};
use super::{Lowering, PackJob, TOGETHER, unsupported};
use crate::gguf::{GgmlType, TensorInfo};
use crate::plan::{Linear, Plan, Step};
use crate::program::DeviceError;
use crate::quant;
use std::ops::Range;

/// Widest of everything in a range of layers.
#[derive(Default)]
struct Widths {
    qkv: usize,
    heads: usize,
    ff: usize,
    kv_heads: usize,
    query_heads: usize,
    head_dim: usize,
}

fn widths(layers: &[Vec<Step>]) -> Widths {
    let mut w = Widths::default();
    for step in layers.iter().flatten() {
        match step {
            Step::NormQkvRopeCache(s) => {
                let h = s.heads;
                w.qkv = w.qkv.max((h.heads + 2 * h.kv_heads) * h.head_dim);
                w.heads = w.heads.max(h.heads * h.head_dim);
                w.kv_heads = w.kv_heads.max(h.kv_heads);
                w.query_heads = w.query_heads.max(h.heads);
                w.head_dim = w.head_dim.max(h.head_dim);
            }
            Step::NormGateUpAct(s) => w.ff = w.ff.max(s.up.rows),
            _ => {}
        }
    }
    w
}

impl Lowering<'_> {
    pub(super) fn take(&mut self, bytes: usize) -> u64 {
        let at = self.at;
        self.at += (bytes as u64).next_multiple_of(256);
        at
    }

    pub(super) fn acts(&mut self, cols: usize) -> Acts {
        // products read whole tiles of columns
        let pairs = (self.rows + TOGETHER) * cols.div_ceil(PAIR);
        let prompts = if self.out.prompts { self.rows.next_multiple_of(PROMPT_ROWS) } else { 0 };
        Acts {
            q: self.take(pairs * 64),
            d: self.take(pairs * 8),
            totals: self.take(pairs * 8),
            h: self.take(pairs * 128),
            hd: self.take(pairs * 8),
            sums: self.take(pairs * 8),
            squares: self.take(self.rows * cols.div_ceil(32) * 4),
            prompt: self.take(prompts * cols.div_ceil(PAIR) * PAIR * 2),
        }
    }

    /// Working memory.
    pub(super) fn room(&mut self, plan: &Plan, layers: &Range<usize>) {
        let w = widths(&plan.layers[layers.clone()]);
        let rows = self.rows;
        self.x = self.take(rows * plan.hidden * 4);
        self.y = self.take(rows * plan.hidden * 4);
        self.qkv = self.take(rows * w.qkv * 4);
        self.from_hidden = self.acts(plan.hidden);
        self.from_heads = self.acts(w.heads);
        self.from_ff = self.acts(w.ff);
        self.partial = self.take(self.out.partials * w.query_heads * (w.head_dim + 2) * 4);
        self.arrived_heads = self.take(TOGETHER * w.kv_heads * 4);
        self.out.last = self.take(self.kv.slots as usize * 4);
        if layers.end == plan.layers.len() {
            self.out.logits = self.take(TOGETHER.min(rows) * plan.vocab * 4);
        }
        self.out.most = self.take(TOGETHER * 64 * 8);
        self.out.best = self.take(TOGETHER * 64 * 8);
        self.out.cut = self.take(TOGETHER * 8);
        self.out.arrived = self.take(TOGETHER * 4);
        self.out.rows_done = self.take(4);
    }

    pub(super) fn upload(&mut self, bytes: Vec<u8>) -> u64 {
        let at = self.take(bytes.len());
        self.out.vectors.push((at, bytes));
        at
    }

    pub(super) fn ropes(&mut self, layers: &[Vec<Step>]) {
        for step in layers.iter().flatten() {
            let Step::NormQkvRopeCache(s) = step else { continue };
            if !self.ropes.iter().any(|(r, _)| *r == s.rope) {
                self.ropes.push((s.rope.clone(), self.angles));
                self.angles += s.rope.inv_freq.len();
            }
        }
        let pairs = || self.ropes.iter().flat_map(|(r, _)| r.inv_freq.iter().map(move |f| (*f, r.magnitude)));
        let frequencies: Vec<u8> = pairs().flat_map(|(f, _)| f64::from(f).to_le_bytes()).collect();
        let magnitudes: Vec<u8> = pairs().flat_map(|(_, m)| m.to_le_bytes()).collect();
        self.out.enter.frequencies = self.upload(frequencies);
        self.out.enter.magnitudes = self.upload(magnitudes);
        self.out.enter.angles = self.take(self.rows * self.angles.max(1) * 8);
    }

    pub(super) fn tensor(&self, name: &str) -> Result<&TensorInfo, DeviceError> {
        self.file.tensor(name).ok_or_else(|| unsupported(format!("the file has no tensor {name}")))
    }

    pub(super) fn type_of(&self, l: &Linear) -> Result<GgmlType, DeviceError> {
        let info = self.tensor(&l.weight)?;
        if info.dims != [l.cols as u64, l.rows as u64] || !l.cols.is_multiple_of(32) {
            return Err(unsupported(format!(
                "tensor {} is {:?}, expected [{}, {}], the first a multiple of 32",
                l.weight, info.dims, l.cols, l.rows
            )));
        }
        if matches!(info.ty, GgmlType::Unknown(_)) {
            return Err(unsupported(format!("tensor {} has an unknown type", l.weight)));
        }
        Ok(info.ty)
    }

    pub(super) fn bytes(&self, linears: &[&Linear]) -> u64 {
        linears.iter().filter_map(|l| self.file.tensor(&l.weight)).map(|t| t.bytes).sum()
    }

    /// The forms of the matrices of one step. f16 beside bf16 becomes f32, since they would read other inputs.
    pub(super) fn forms(&self, linears: &[&Linear]) -> Result<Vec<Form>, DeviceError> {
        let mut forms = Vec::new();
        for l in linears {
            forms.push(Form::of(self.type_of(l)?));
        }
        if forms.contains(&Form::F16) && forms.iter().any(|f| matches!(f, Form::BF16 | Form::F32)) {
            forms.iter_mut().filter(|f| **f == Form::F16).for_each(|f| *f = Form::F32);
        }
        Ok(forms)
    }

    pub(super) fn place(&mut self, form: Form, tiles: usize, pairs: usize) -> Matrix {
        let [q, high, s, supers] = form.bytes(tiles, pairs).map(|bytes| {
            self.out.weights_bytes += bytes;
            self.take(bytes)
        });
        Matrix { q, high, s, supers, bias: 0 }
    }

    pub(super) fn matrix(&mut self, l: &Linear, form: Form) -> Result<Matrix, DeviceError> {
        let bias = self.maybe_vector(l.bias.as_ref(), l.rows)?;
        if let Some((matrix, known, _)) = self.by_name.get(&l.weight)
            && *known == form
        {
            return Ok(Matrix { bias, ..*matrix });
        }
        // whole thread blocks read their tiles unchecked
        let (tiles, pairs) = (l.rows.div_ceil(TILE * WIDE_TILES) * WIDE_TILES, l.cols.div_ceil(PAIR));
        let matrix = self.place(form, tiles, pairs);
        self.out.jobs.push(PackJob { tensor: l.weight.clone(), form, half: 0, tile0: 0, pairs, matrix });
        self.by_name.insert(l.weight.clone(), (matrix, form, pairs));
        Ok(Matrix { bias, ..matrix })
    }

    pub(super) fn vector(&mut self, name: &str, n: usize) -> Result<u64, DeviceError> {
        if let Some(&at) = self.vectors_by_name.get(name) {
            return Ok(at);
        }
        let info = self.tensor(name)?;
        if info.dims.iter().product::<u64>() != n as u64 {
            return Err(unsupported(format!("tensor {name} has {:?} values, expected {n}", info.dims)));
        }
        let mut bytes = vec![0u8; info.bytes as usize];
        self.file.read(info, 0..info.bytes, &mut bytes).map_err(|e| DeviceError::File(e.to_string()))?;
        let mut values = vec![0f32; n];
        quant::dequantize(info.ty, &bytes, &mut values);
        let at = self.upload(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        self.vectors_by_name.insert(name.to_owned(), at);
        Ok(at)
    }

    pub(super) fn maybe_vector(&mut self, name: Option<&String>, n: usize) -> Result<u64, DeviceError> {
        name.map_or(Ok(0), |name| self.vector(name, n))
    }
}
