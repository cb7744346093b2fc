//! The reference device: every step of a plan in naive f32. It is the specification that other devices are tested
//! against, and fast enough for that: only its matrix product has any craft.
//!
//! Weights stay as the file stores them and are dequantised as they are read; keys and values are kept in f32 whatever
//! [`KvLayout::kv`] says. All sums have one fixed order, so results depend neither on what else is in a batch, nor on
//! how a prompt was cut, nor on the number of threads.
mod maths;

use crate::gguf::ModelFile;
use crate::plan::{Attend, Linear, Norm, NormGateUpAct, NormQkvRopeCache, Plan, Residual, Step};
use crate::program::{
    Batch, Device, DeviceError, DeviceInfo, Input, KvLayout, Program, Segment, SegmentOutput, StepOutput,
    Terms, Want, check_layers,
};
use crate::sampling;
use maths::{Tensor, add, norm, rotate};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use weir_scheduler::BLOCK_TOKENS;

/// The device. Its programs compute in [`Program::poll`].
#[derive(Clone, Copy, Debug)]
pub struct Reference {
    /// Threads that share a large product; the results don't depend on it.
    pub threads: usize,
    /// Bytes that the weights and the KV cache of one program may take.
    pub memory_bytes: u64,
}

impl Default for Reference {
    /// All of the machine's threads, and 64 GiB.
    fn default() -> Reference {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Reference { threads, memory_bytes: 64 << 30 }
    }
}

impl Device for Reference {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo {
            name: "reference".into(),
            description: format!("f32 reference, {} threads", self.threads),
            numerics: "reference-f32".into(),
            memory_free: self.memory_bytes,
        }
    }

    fn compile(
        &self,
        model: &ModelFile,
        plan: &Plan,
        layers: Range<usize>,
        kv: KvLayout,
    ) -> Result<Box<dyn Program>, DeviceError> {
        check_layers(plan, &layers)?;
        let steps: Vec<Step> = plan.layers[layers.clone()].iter().flatten().cloned().collect();
        let program = Compiled {
            embeds: layers.start == 0,
            heads: layers.end == plan.layers.len(),
            caches: Vec::new(),
            weights: HashMap::new(),
            threads: self.threads.max(1),
            kv,
            last: vec![None; kv.slots as usize],
            queue: VecDeque::new(),
            steps,
            plan: Plan { layers: Vec::new(), ..plan.clone() },
        };
        Ok(Box::new(program.load(model, self)?))
    }
}

/// A compiled range of layers: the plan itself, interpreted.
struct Compiled {
    /// Without its layers.
    plan: Plan,
    steps: Vec<Step>,
    /// Whether the embedding belongs to this range.
    embeds: bool,
    /// Whether the head does.
    heads: bool,
    weights: HashMap<String, Tensor>,
    /// One for each [`Step::NormQkvRopeCache`].
    caches: Vec<Cache>,
    kv: KvLayout,
    threads: usize,
    /// The id that each slot sampled last.
    last: Vec<Option<u32>>,
    queue: VecDeque<Batch>,
}

/// Keys and values, each `[blocks, BLOCK_TOKENS, kv_heads * head_dim]`.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
    width: usize,
}

/// Where a row belongs.
struct Row {
    position: usize,
    blocks: Arc<[u32]>,
}

impl Row {
    /// Index of `position` in a cache.
    fn place(&self, position: usize) -> usize {
        self.blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
    }
}

impl Program for Compiled {
    fn submit(&mut self, batch: Batch) -> Result<(), DeviceError> {
        batch.check(&self.terms())?;
        self.queue.push_back(batch);
        Ok(())
    }

    fn poll(&mut self) -> Option<Result<StepOutput, DeviceError>> {
        let batch = self.queue.pop_front()?;
        Some(self.run(batch))
    }

    fn depth(&self) -> usize {
        1
    }
}

impl Compiled {
    /// Reads the weights and makes room for keys and values.
    fn load(mut self, model: &ModelFile, device: &Reference) -> Result<Compiled, DeviceError> {
        let places = self.kv.blocks as usize * BLOCK_TOKENS;
        let widths: Vec<usize> = self
            .steps
            .iter()
            .filter_map(|step| match step {
                Step::NormQkvRopeCache(s) => Some(s.heads.kv_heads * s.heads.head_dim),
                _ => None,
            })
            .collect();
        let names = self.names();
        let bytes = |name: &String| model.tensor(name).map_or(0, |tensor| tensor.bytes);
        let weights_bytes: u64 = names.iter().map(bytes).sum();
        let kv_bytes = widths
            .iter()
            .map(|&width| (places * 2 * size_of::<f32>()).saturating_mul(width) as u64)
            .fold(0, u64::saturating_add);
        if weights_bytes.saturating_add(kv_bytes) > device.memory_bytes {
            return Err(DeviceError::Memory {
                weights_mib: weights_bytes >> 20,
                kv_mib: kv_bytes >> 20,
                free_mib: device.memory_bytes >> 20,
                device: device.describe().name,
            });
        }
        for name in names {
            let tensor = Tensor::read(model, &name)?;
            self.weights.insert(name, tensor);
        }
        let zeros = |width: usize| vec![0.0; places * width];
        self.caches = widths
            .into_iter()
            .map(|width| Cache { keys: zeros(width), values: zeros(width), width })
            .collect();
        Ok(self)
    }

    /// Names of all tensors that this range of layers needs.
    fn names(&self) -> Vec<String> {
        fn of_norm(norm: &Norm) -> impl Iterator<Item = String> {
            [Some(norm.weight.clone()), norm.bias.clone()].into_iter().flatten()
        }
        fn of_linear(linear: &Linear) -> impl Iterator<Item = String> {
            [Some(linear.weight.clone()), linear.bias.clone()].into_iter().flatten()
        }
        let mut names = Vec::new();
        if self.embeds {
            names.push(self.plan.embed.table.clone());
        }
        for step in &self.steps {
            match step {
                Step::NormQkvRopeCache(s) => {
                    names.extend([&s.q, &s.k, &s.v].into_iter().flat_map(of_linear));
                    [Some(&s.norm), s.q_norm.as_ref(), s.k_norm.as_ref()]
                        .into_iter()
                        .flatten()
                        .for_each(|norm| names.extend(of_norm(norm)));
                }
                Step::Attend(_) => {}
                Step::Out(s) | Step::Down(s) => {
                    names.extend(of_linear(&s.linear));
                    names.extend(s.post_norm.iter().flat_map(of_norm));
                }
                Step::NormGateUpAct(s) => {
                    names.extend(of_norm(&s.norm));
                    names.extend(of_linear(&s.up));
                    names.extend(s.gate.iter().flat_map(of_linear));
                }
            }
        }
        if self.heads {
            names.extend(of_norm(&self.plan.head.norm));
            names.extend(of_linear(&self.plan.head.linear));
        }
        names.sort_unstable();
        names.dedup();
        names
    }

    fn terms(&self) -> Terms {
        let (vocab, hidden) = (self.plan.vocab, self.plan.hidden);
        Terms { kv: self.kv, vocab, hidden, embeds: self.embeds, heads: self.heads }
    }

    fn rows(&self, segment: &Segment) -> usize {
        segment.input.rows(self.plan.hidden)
    }

    fn run(&mut self, batch: Batch) -> Result<StepOutput, DeviceError> {
        let mut rows = Vec::new();
        let mut x = Vec::new();
        for segment in &batch.segments {
            rows.extend(
                (0..self.rows(segment))
                    .map(|i| Row { position: segment.start as usize + i, blocks: segment.blocks.clone() }),
            );
            match &segment.input {
                Input::Ids(ids) => self.embed(ids, &mut x),
                Input::Hidden(hidden) => x.extend(hidden),
                Input::LastSampled => {
                    let id = self.last[segment.slot as usize].ok_or_else(|| {
                        DeviceError::Unsupported(format!("slot {} has sampled nothing", segment.slot))
                    })?;
                    self.embed(&[id], &mut x);
                }
            }
        }
        self.layers(&mut x, &rows);
        let mut output = StepOutput::default();
        let mut from = 0;
        for segment in batch.segments {
            let to = from + self.rows(&segment) * self.plan.hidden;
            output.segments.push(self.answer(segment, &x[from..to]));
            from = to;
        }
        Ok(output)
    }

    fn embed(&self, ids: &[u32], x: &mut Vec<f32>) {
        let embed = &self.plan.embed;
        for &id in ids {
            let row = self.tensor(&embed.table).rows(id as usize..id as usize + 1, self.plan.hidden);
            x.extend(row.into_iter().map(|v| v * embed.scale));
        }
    }

    /// Takes `x`, `[rows, hidden]`, through all layers.
    fn layers(&mut self, x: &mut [f32], rows: &[Row]) {
        let (mut queries, mut attended, mut gated) = (Vec::new(), Vec::new(), Vec::new());
        let mut cached = 0;
        let steps = std::mem::take(&mut self.steps);
        for step in &steps {
            match step {
                Step::NormQkvRopeCache(s) => {
                    queries = self.norm_qkv_rope_cache(s, x, rows, cached);
                    cached += 1;
                }
                Step::Attend(s) => attended = self.attend(s, &queries, rows, &self.caches[cached - 1]),
                Step::Out(s) => add(x, &self.residual(s, &attended)),
                Step::NormGateUpAct(s) => gated = self.norm_gate_up_act(s, x),
                Step::Down(s) => add(x, &self.residual(s, &gated)),
            }
        }
        self.steps = steps;
    }

    fn norm_qkv_rope_cache(
        &mut self,
        s: &NormQkvRopeCache,
        x: &[f32],
        rows: &[Row],
        cache: usize,
    ) -> Vec<f32> {
        let normed = self.norm(&s.norm, x);
        let (mut q, mut k) = (self.linear(&s.q, &normed), self.linear(&s.k, &normed));
        let v = self.linear(&s.v, &normed);
        if let Some(norm) = &s.q_norm {
            q = self.norm(norm, &q);
        }
        if let Some(norm) = &s.k_norm {
            k = self.norm(norm, &k);
        }
        for heads in [(&mut q, s.q.rows), (&mut k, s.k.rows)] {
            for (row, values) in rows.iter().zip(heads.0.chunks_exact_mut(heads.1)) {
                rotate(&s.rope, row.position, s.heads.head_dim, values);
            }
        }
        let Cache { keys, values, width } = &mut self.caches[cache];
        for (i, row) in rows.iter().enumerate() {
            let at = row.place(row.position) * *width;
            keys[at..at + *width].copy_from_slice(&k[i * *width..(i + 1) * *width]);
            values[at..at + *width].copy_from_slice(&v[i * *width..(i + 1) * *width]);
        }
        q
    }

    fn attend(&self, s: &Attend, queries: &[f32], rows: &[Row], cache: &Cache) -> Vec<f32> {
        let width = s.heads.heads * s.heads.head_dim;
        let mut out = vec![0.0; queries.len()];
        let each = rows.len().div_ceil(self.threads);
        let some = |rows: &[Row], queries: &[f32], out: &mut [f32]| {
            for ((row, q), out) in
                rows.iter().zip(queries.chunks_exact(width)).zip(out.chunks_exact_mut(width))
            {
                let first = s.window.map_or(0, |window| (row.position + 1).saturating_sub(window));
                let places: Vec<usize> = (first..=row.position).map(|p| row.place(p) * cache.width).collect();
                maths::attend(s, q, &places, &cache.keys, &cache.values, out);
            }
        };
        if rows.len() < 16 {
            some(rows, queries, &mut out);
            return out;
        }
        std::thread::scope(|scope| {
            let queries = queries.chunks(each * width);
            for ((rows, queries), out) in rows.chunks(each).zip(queries).zip(out.chunks_mut(each * width)) {
                scope.spawn(move || some(rows, queries, out));
            }
        });
        out
    }

    fn norm_gate_up_act(&self, s: &NormGateUpAct, x: &[f32]) -> Vec<f32> {
        let normed = self.norm(&s.norm, x);
        let mut up = self.linear(&s.up, &normed);
        match &s.gate {
            None => up.iter_mut().for_each(|up| *up = maths::activate(s.act, *up)),
            Some(gate) => {
                let gate = self.linear(gate, &normed);
                up.iter_mut().zip(gate).for_each(|(up, gate)| *up *= maths::activate(s.act, gate));
            }
        }
        up
    }

    fn residual(&self, s: &Residual, y: &[f32]) -> Vec<f32> {
        let product = self.linear(&s.linear, y);
        match &s.post_norm {
            Some(norm) => self.norm(norm, &product),
            None => product,
        }
    }

    /// What a segment gets, `x` being its rows.
    fn answer(&mut self, segment: Segment, x: &[f32]) -> SegmentOutput {
        match segment.want {
            Want::Nothing => SegmentOutput::Nothing,
            Want::Hidden => SegmentOutput::Hidden(x.to_vec()),
            Want::Logits(last) => {
                SegmentOutput::Logits(self.logits(&x[x.len() - last as usize * self.plan.hidden..]))
            }
            Want::Sample(specs) => {
                let mut logits = self.logits(&x[x.len() - specs.len() * self.plan.hidden..]);
                let vocab = logits.len() / specs.len();
                let rows = logits.chunks_exact_mut(vocab).zip(&specs);
                let sampled: Vec<_> = rows.map(|(logits, spec)| sampling::sample(logits, spec)).collect();
                self.last[segment.slot as usize] = sampled.last().map(|sampled| sampled.id);
                SegmentOutput::Sampled(sampled)
            }
        }
    }

    fn logits(&self, x: &[f32]) -> Vec<f32> {
        let head = &self.plan.head;
        let mut logits = self.linear(&head.linear, &self.norm(&head.norm, x));
        if let Some(cap) = head.soft_cap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        logits
    }

    /// `[n, cols]` to `[n, rows]`.
    fn linear(&self, linear: &Linear, x: &[f32]) -> Vec<f32> {
        let mut y = maths::product(self.tensor(&linear.weight), linear.rows, linear.cols, x, self.threads);
        if let Some(bias) = &linear.bias {
            let bias = self.tensor(bias).rows(0..1, linear.rows);
            y.chunks_exact_mut(linear.rows).for_each(|y| add(y, &bias));
        }
        y
    }

    /// Of each row of the norm's width.
    fn norm(&self, step: &Norm, x: &[f32]) -> Vec<f32> {
        let weight = self.tensor(&step.weight);
        let width = weight.values();
        let weight = weight.rows(0..1, width);
        let bias = step.bias.as_ref().map(|bias| self.tensor(bias).rows(0..1, width));
        x.chunks_exact(width).flat_map(|x| norm(step.kind, step.eps, &weight, bias.as_deref(), x)).collect()
    }

    fn tensor(&self, name: &str) -> &Tensor {
        self.weights.get(name).expect("load() has read all that names() lists")
    }
}
