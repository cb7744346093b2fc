//! `cuda [--loads] [MODEL...]`: what a GPU makes of models of the usual shapes with random weights, or of a file; with
//! `--loads` only how fast they are loaded.
//!
//! MODEL is `0.6b-q8_0`, `1b-q4_k_m`, `1b-q8_0`, `1b-bf16`, `8b-q4_k_m`, `8b-q8_0`, or a path to a .gguf. The roofline
//! beside each figure is `bytes / (0.92 * bandwidth)`, with the bandwidth measured in this run; bytes are those of the weights
//! and, behind a long context, of the cached keys and values that a token reads.
use anyhow::{Context as _, Result};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use weir_backends::cuda::Cuda;
use weir_backends::gguf::ModelFile;
use weir_backends::models;
use weir_backends::plan::{Plan, Step};
use weir_backends::program::{
    Batch, Device, Input, KvLayout, Program, SampleSpec, Segment, StepOutput, StepTime, Want,
};
use weir_benches::{shapes, weights};
use weir_scheduler::{BLOCK_TOKENS, KvType, Sampling};

const REPEATS: usize = 5;
/// Contexts behind which decoding is timed.
const LONG: [u32; 2] = [4096, 32768];
/// Most tokens of a prompt that go in at once.
const PIECE: u32 = 2048;

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, path] = &arguments[..]
        && flag == weights::FIRST_TOKEN
    {
        return weights::first_token(Path::new(path));
    }
    let named = arguments.len();
    arguments.retain(|argument| argument != "--loads");
    let loads = arguments.len() < named;
    let gpu = Cuda::all().map_err(anyhow::Error::msg)?.into_iter().next().context("no GPU")?;
    let bandwidth = gpu.copy_bytes_per_s()?;
    println!("{}; copies at {:.0} GB/s", gpu.describe().description, bandwidth / 1e9);
    println!(
        "medians of {REPEATS}\n{:<12} {:<14} {:>10} {:>8} {:>9}",
        "model", "workload", "tok/s", "share", "roofline"
    );
    for name in &arguments {
        if let Err(error) = run(&gpu, bandwidth, name, loads) {
            println!("{name}: {error:#}");
        }
    }
    Ok(())
}

/// Bytes of weights that one token reads.
fn weight_bytes(file: &ModelFile, plan: &Plan) -> u64 {
    let mut names = vec![&plan.head.linear.weight];
    for step in plan.layers.iter().flatten() {
        match step {
            Step::NormQkvRopeCache(s) => names.extend([&s.q.weight, &s.k.weight, &s.v.weight]),
            Step::NormGateUpAct(s) => names.extend(s.gate.iter().chain([&s.up]).map(|l| &l.weight)),
            Step::Out(s) | Step::Down(s) => names.push(&s.linear.weight),
            Step::Attend(_) => {}
        }
    }
    names.iter().filter_map(|name| file.tensor(name)).map(|t| t.bytes).sum()
}

/// Bytes of keys and values that a token at position `at` reads, kept as halves.
fn cache_bytes(plan: &Plan, at: usize) -> u64 {
    let steps = plan.layers.iter().flatten();
    let mut heads = None;
    steps.fold(0, |sum, step| match step {
        Step::NormQkvRopeCache(s) => {
            heads = Some(s.heads);
            sum
        }
        Step::Attend(s) => {
            let seen = s.window.map_or(at, |w| at.min(w));
            sum + heads.map_or(0, |h| (seen * h.kv_heads * h.head_dim * 4) as u64)
        }
        _ => sum,
    })
}

struct Bench {
    program: Box<dyn Program>,
    /// Of the profile, up to the last report.
    reported: Vec<StepTime>,
    vocab: u32,
    /// KV blocks of a sequence.
    blocks: u32,
}

impl Bench {
    /// Time in each kind of fused step since the last report, where WEIR_CUDA_TRACE has it measured.
    fn report(&mut self) {
        for now in self.program.profile() {
            let before = self.reported.iter().find(|s| s.name == now.name);
            let (count, nanos, bytes) = before.map_or((0, 0, 0), |s| (s.count, s.nanos, s.bytes));
            let (count, nanos, bytes) = (now.count - count, now.nanos - nanos, now.bytes - bytes);
            if count > 0 {
                let each = nanos as f64 / 1e3 / count as f64;
                let rate = bytes as f64 / nanos as f64;
                println!("    {:<22} {count:>7} x {each:>8.2} us {rate:>7.0} GB/s", now.name);
            }
        }
        self.reported = self.program.profile();
    }

    fn segment(&self, slot: u32, start: u32, input: Input, rows: u32) -> Segment {
        let blocks: Arc<[u32]> = (slot * self.blocks..(slot + 1) * self.blocks).collect();
        let sampling = Arc::new(Sampling { temperature: 0.0, ..Sampling::default() });
        let spec = SampleSpec { sampling, position: start + rows, counts: Vec::new(), mask: None };
        Segment { slot, start, prompt: false, input, blocks, want: Want::Sample(vec![spec]) }
    }

    fn prompt(&self, slot: u32, start: u32, n: u32) -> Segment {
        let ids =
            (start..start + n).map(|i| (i.wrapping_mul(7919) + 31 * slot + 1000) % self.vocab).collect();
        Segment { prompt: true, ..self.segment(slot, start, Input::Ids(ids), n) }
    }

    fn wait(&mut self) -> Result<StepOutput> {
        loop {
            if let Some(output) = self.program.poll() {
                return Ok(output?);
            }
            std::hint::spin_loop();
        }
    }

    fn step(&mut self, segments: Vec<Segment>) -> Result<()> {
        self.program.submit(Batch { segments })?;
        self.wait().map(drop)
    }

    /// Fills `slot` from position `from` up to `to`, in pieces of [`PIECE`] tokens. Returns tokens a second.
    fn fill(&mut self, slot: u32, from: u32, to: u32) -> Result<f64> {
        let began = Instant::now();
        for at in (from..to).step_by(PIECE as usize) {
            let piece = self.prompt(slot, at, (to - at).min(PIECE));
            self.step(vec![piece])?;
        }
        Ok(f64::from(to - from) / began.elapsed().as_secs_f64())
    }

    /// Tokens a second of `streams` sequences from position `at` on.
    fn decode(&mut self, streams: u32, at: u32, n: u32) -> Result<f64> {
        self.decode_as(false, streams, at, n)
    }

    /// The same; `prompt`: in the arithmetic of prompts, in which a row's bits are not those of decoding.
    fn decode_as(&mut self, prompt: bool, streams: u32, at: u32, n: u32) -> Result<f64> {
        let depth = self.program.depth().max(1);
        let mut began = Instant::now();
        let mut flying = 0;
        for i in 0..n + 8 {
            if i == 8 {
                // graphs are made, clocks are up
                while flying > 0 {
                    self.wait()?;
                    flying -= 1;
                }
                began = Instant::now();
            }
            let segment = |slot| Segment { prompt, ..self.segment(slot, at + i, Input::LastSampled, 1) };
            let segments = (0..streams).map(segment).collect();
            self.program.submit(Batch { segments })?;
            flying += 1;
            if flying >= depth {
                self.wait()?;
                flying -= 1;
            }
        }
        while flying > 0 {
            self.wait()?;
            flying -= 1;
        }
        Ok(f64::from(streams * n) / began.elapsed().as_secs_f64())
    }
}

fn median(mut run: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut all = (0..REPEATS).map(|_| run()).collect::<Result<Vec<f64>>>()?;
    all.sort_by(f64::total_cmp);
    Ok(all[REPEATS / 2])
}

fn run(gpu: &Cuda, bandwidth: f64, name: &str, loads: bool) -> Result<()> {
    let made = shapes::bytes(name).map(|bytes| weights::made(name, &bytes)).transpose()?;
    let path = made.as_ref().map_or(Path::new(name), |made| &made.path);
    let label = name.rsplit('/').next().unwrap_or(name);
    weights::report(gpu, path, label)?;
    if loads {
        return Ok(());
    }
    let file = ModelFile::open(path)?;
    let plan = models::plan(&file)?;
    let bytes = weight_bytes(&file, &plan) as f64;
    let began = Instant::now();
    let small = std::env::var_os("WEIR_BENCH_SMALL").is_some();
    let (slots, context) = if small { (8, 1024) } else { (128, LONG[LONG.len() - 1] + 256) };
    let blocks = 1 + context / BLOCK_TOKENS as u32;
    let own = 16u32.max(1024 / BLOCK_TOKENS as u32);
    let total = (slots * own).max(blocks) + blocks;
    let layout = KvLayout { blocks: total, kv: KvType::F16, slots, rows: PIECE };
    let program = gpu.compile(&file, &plan, 0..plan.layers.len(), layout)?;
    println!("{label:<12} loaded in {:.2?}, {:.2} GB a token", began.elapsed(), bytes / 1e9);
    let mut bench =
        Bench { program, reported: Vec::new(), vocab: (plan.vocab as u32).min(30_000), blocks: own };
    let line = |workload: &str, rate: f64, streams: u32, at: u32| {
        let steps = rate / f64::from(streams);
        let bytes = bytes + f64::from(streams) * cache_bytes(&plan, at as usize) as f64;
        let share = 100.0 * steps * bytes / bandwidth;
        let roofline = f64::from(streams) * 0.92 * bandwidth / bytes;
        println!("{label:<12} {workload:<14} {rate:>10.1} {share:>7.1}% {roofline:>9.0}");
    };
    bench.fill(0, 0, 16)?;
    bench.report();
    line("decode", median(|| bench.decode(1, 16, 128))?, 1, 64);
    bench.report();
    println!("{label:<12} prefill 512    {:>10.1}", median(|| bench.fill(0, 0, 512))?);
    bench.report();
    let batches: &[u32] = if small { &[4, 8] } else { &[4, 8, 32, 128] };
    for &streams in batches {
        for slot in 0..streams {
            bench.fill(slot, 0, 16)?;
        }
        line(&format!("batch {streams}"), median(|| bench.decode(streams, 16, 64))?, streams, 48);
        if streams >= 8 {
            let rate = median(|| bench.decode_as(true, streams, 16, 64))?;
            line(&format!("as prompts {streams}"), rate, streams, 48);
        }
    }
    if !small {
        bench.blocks = blocks;
        let mut filled = 0;
        for at in LONG {
            println!("{label:<12} prefill {at:<6} {:>10.1}", bench.fill(0, filled, at)?);
            line(&format!("decode at {}k", at / 1024), median(|| bench.decode(1, at, 64))?, 1, at);
            filled = at;
        }
    }
    Ok(())
}
