//! The engine on devices that compute: a stream's tokens are the same alone, in a batch, from a prompt in pieces, from
//! a prefix that was there already, after preemption, and when it is resumed.
use crate::conformance::model;
use crate::draw::Draw;
use crate::golden::device::model_path;
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{Receiver, channel};
use weir_backends::cpu::{Cpu, CpuOptions};
use weir_backends::engine::{Draft, Engine, EngineConfig, EngineHandle, Progress, Speculation, Vocabulary};
use weir_backends::gguf::ModelFile;
use weir_backends::load::{LoadOptions, load_with_draft};
use weir_backends::models;
use weir_backends::null::Null;
use weir_backends::plan::Plan;
use weir_backends::program::{Device, KvLayout};
use weir_backends::reference::Reference;
use weir_scheduler::{Event, FailureKind, Generate, KvType, ModelId, RequestId, Sampling, Time};

mod grammar;

const MODEL: ModelId = ModelId([7; 32]);

fn ask(request: u64, prompt: Vec<u32>, max_tokens: u32) -> Generate {
    let sampling = Sampling { seed: request, temperature: (request % 2) as f32, ..Sampling::default() };
    Generate {
        request: RequestId(request),
        sampling,
        ignore_eos: true,
        ..Generate::new(MODEL, prompt, max_tokens)
    }
}

fn config(blocks: u32, slots: u32, rows: u32, prefill_chunk: u32) -> EngineConfig {
    let layout = KvLayout { blocks, kv: KvType::F16, slots, rows };
    EngineConfig { model: MODEL, layout, context: blocks * 32, prefill_chunk, speculation: Speculation::Off }
}

/// A device with a model, from which engines are made.
struct Bench<'a> {
    device: &'a dyn Device,
    file: &'a ModelFile,
    plan: &'a Plan,
}

impl Bench<'_> {
    fn engine(&self, config: EngineConfig) -> Engine {
        let layers = 0..self.plan.layers.len();
        let program = self.device.compile(self.file, self.plan, layers, config.layout).unwrap();
        Engine::new(program, Vocabulary::Numbers { size: self.plan.vocab as u32, end: 0 }, config)
    }

    /// One with a draft model: of `file` on the same device.
    fn drafting(&self, config: EngineConfig, (file, plan): (&ModelFile, &Plan)) -> Engine {
        let layout = config.layout;
        let program = self.device.compile(file, plan, 0..plan.layers.len(), layout).unwrap();
        let (context, vocab) = (plan.context as u32, plan.vocab as u32);
        self.engine(config).with_draft(Draft { program, layout, context, vocab, cost: 0.1 })
    }

    /// The tokens of all that is asked, begun together.
    fn run(&self, engine: &mut Engine, asks: &[Generate]) -> Vec<Vec<u32>> {
        let mut readers = Vec::new();
        for ask in asks {
            let (sink, events) = channel(1024);
            engine.generate(Time::ZERO, ask.clone(), sink).unwrap();
            readers.push(events);
        }
        while engine.step(Time::ZERO) != Progress::Idle {
            engine.check();
        }
        readers.into_iter().map(|mut events| tokens(&mut events)).collect()
    }

    /// `prompt_tokens` long prompts with a common half, `output_tokens` each.
    fn check(
        &self,
        name: &str,
        streams: u64,
        prompt_tokens: u32,
        output_tokens: u32,
        draft: (&ModelFile, &Plan),
    ) {
        let vocab = self.plan.vocab as u32;
        let prompt = |i: u64| {
            let own = |at: u32| if at < prompt_tokens / 2 { 0 } else { 1 + i as u32 };
            (0..prompt_tokens - i as u32).map(|at| (at * 31 + own(at) * 17 + 5) % vocab).collect()
        };
        let asks: Vec<Generate> = (0..streams).map(|i| ask(i, prompt(i), output_tokens)).collect();
        let blocks = (prompt_tokens + output_tokens).div_ceil(32) + 1;
        let (all, rows) = (blocks * streams as u32, prompt_tokens);
        let alone: Vec<Vec<u32>> = asks
            .iter()
            .map(|ask| {
                let mut engine = self.engine(config(blocks, 1, rows, rows));
                self.run(&mut engine, std::slice::from_ref(ask)).remove(0)
            })
            .collect();
        let slots = streams as u32;
        let mut together = self.engine(config(all, slots, rows + slots, rows));
        assert_eq!(self.run(&mut together, &asks), alone, "{name}: together");
        assert_eq!(self.run(&mut together, &asks), alone, "{name}: with their prefixes in the cache");
        for chunk in [1, 7, 32] {
            let mut pieces = self.engine(config(all, slots, chunk + slots, chunk));
            assert_eq!(self.run(&mut pieces, &asks), alone, "{name}: prompts by {chunk}");
        }
        for speculation in [Speculation::Auto, Speculation::Always(3), Speculation::Always(15)] {
            let mut guessing =
                self.engine(EngineConfig { speculation, ..config(all, slots, rows + slots, rows) });
            assert_eq!(self.run(&mut guessing, &asks), alone, "{name}: {speculation:?}");
        }
        for (speculation, blocks) in [(Speculation::Always(4), all), (Speculation::Auto, blocks + 1)] {
            let config = EngineConfig { speculation, ..config(blocks, slots, rows + slots, 19) };
            let mut drafting = self.drafting(config, draft);
            assert_eq!(self.run(&mut drafting, &asks), alone, "{name}: a draft model, {speculation:?}");
            let status = drafting.status(Time::ZERO);
            assert!(status.drafted > 0 || speculation == Speculation::Auto, "{name}: {status:?}");
        }
        let mut narrow = self.engine(config(blocks + 1, slots, rows + slots, 19));
        assert_eq!(self.run(&mut narrow, &asks), alone, "{name}: preempting each other");
        let resumed: Vec<Generate> = asks
            .iter()
            .zip(&alone)
            .map(|(ask, ids)| Generate { output: ids[..ids.len() / 2].to_vec(), ..ask.clone() })
            .collect();
        let rest: Vec<Vec<u32>> = alone.iter().map(|ids| ids[ids.len() / 2..].to_vec()).collect();
        let mut other = self.engine(config(all, slots, rows + slots, rows));
        assert_eq!(self.run(&mut other, &resumed), rest, "{name}: resumed");
        let always =
            EngineConfig { speculation: Speculation::Always(3), ..config(all, slots, rows + slots, rows) };
        let mut drafting = self.drafting(always, (self.file, self.plan));
        assert_eq!(self.run(&mut drafting, &resumed), rest, "{name}: resumed with itself as its draft model");
        let status = drafting.status(Time::ZERO);
        assert!(status.drafted > 0 && status.drafted_right * 4 > status.drafted * 3, "{name}: {status:?}");
    }
}

fn tokens(events: &mut Receiver<Event>) -> Vec<u32> {
    let mut ids = Vec::new();
    loop {
        match events.try_recv().expect("a stream ends with Finished") {
            Event::Token(token) => ids.push(token.id),
            Event::Finished { .. } => return ids,
            Event::Failed(failure) => panic!("{failure:?}"),
        }
    }
}

#[test]
fn streams_are_what_they_are_alone_on_random_models() {
    for family in ["llama", "qwen2", "gemma3"] {
        let (file, plan) = model(family, 3);
        let device = Reference { threads: 1, ..Reference::default() };
        let (other, its_plan) = model(family, 4);
        Bench { device: &device, file: &file, plan: &plan }.check(family, 3, 70, 12, (&other, &its_plan));
    }
}

#[test]
fn streams_are_what_they_are_alone_on_smollm2() {
    let Some(path) = model_path("smollm2") else { return };
    let file = ModelFile::open(&path).unwrap();
    let plan = models::plan(&file).unwrap();
    let device = Cpu::new(CpuOptions::default());
    Bench { device: &device, file: &file, plan: &plan }.check("smollm2", 3, 75, 6, (&file, &plan));
}

#[test]
fn a_draft_model_of_another_tokenizer_is_refused() {
    let (Some(model), Some(draft)) = (model_path("smollm2"), model_path("qwen2")) else { return };
    let cpu = Cpu::new(CpuOptions::default());
    let options = LoadOptions { slots: 1, context: Some(512), ..LoadOptions::default() };
    let load = |draft: &Path| load_with_draft(&model, Some(MODEL), Some(draft), &cpu, options);
    let refused = |draft: &Path, says: &str| {
        let why = load(draft).err().expect("it is refused").to_string();
        assert!(why.contains(says) && why.contains(&draft.display().to_string()), "{why}");
    };
    refused(&draft, "has another tokenizer: token");
    refused(Path::new("/nowhere/small.gguf"), "draft model");
    let loaded = load(&model).expect("a model can guess for itself");
    assert!(loaded.draft_bytes > loaded.weight_bytes);
    let (sink, mut events) = channel(64);
    loaded.engine.generate(ask(0, vec![1, 2, 3], 40), sink).unwrap();
    let mut count = 0;
    while let Some(event) = events.blocking_recv() {
        count += usize::from(matches!(event, Event::Token(_)));
    }
    assert_eq!(count, 40);
}

/// Kilobytes of memory that the process has resident; none where that can't be told.
fn resident_kb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// `requests` short requests, some of which are cancelled, some forgotten. Ends when all have.
fn churn(handle: &EngineHandle, vocab: u32, requests: u64, draw: &mut Draw) {
    let mut open: HashMap<u64, Receiver<Event>> = HashMap::new();
    let mut next = 0;
    while next < requests || !open.is_empty() {
        if next < requests && open.len() < 24 {
            let prompt = (0..1 + draw.below(40)).map(|_| 1 + draw.below(vocab - 1)).collect();
            let (sink, events) = channel(2);
            handle.generate(ask(next, prompt, 1 + draw.below(12)), sink).unwrap();
            open.insert(next, events);
            next += 1;
        }
        open.retain(|&request, events| {
            match draw.below(4000) {
                0 => handle.cancel(RequestId(request), 0),
                1 => return false,
                _ => {}
            }
            loop {
                match events.try_recv() {
                    Ok(Event::Token(_)) => {}
                    Ok(Event::Finished { .. }) => return false,
                    Ok(Event::Failed(failure)) => {
                        assert_eq!(failure.kind, FailureKind::Cancelled);
                        return false;
                    }
                    Err(_) => return true,
                }
            }
        });
        std::thread::sleep(Duration::from_micros(20));
    }
    let start = Instant::now();
    while handle.status().running + handle.status().queued > 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", handle.status());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Memory stays as it is and every block comes back, over 2,000 requests after a first few hundred.
fn check_soak(handle: &EngineHandle, vocab: u32, seed: u64) {
    let mut draw = Draw::new(seed);
    churn(handle, vocab, 300, &mut draw);
    let before = resident_kb();
    churn(handle, vocab, 2000, &mut draw);
    let status = handle.status();
    assert_eq!(
        status.kv_blocks_free + status.kv_blocks_cached,
        status.kv_blocks_total,
        "seed {seed}: a block leaked"
    );
    assert_eq!(status.failed, None);
    if let (Some(before), Some(after)) = (before, resident_kb()) {
        eprintln!("seed {seed}: {before} kB resident before, {after} kB after");
        // A leak of 200 bytes a token would be more.
        assert!(after < before + 2048, "seed {seed}: memory grew from {before} to {after} kB");
    }
}

/// Runs the soak of that name in a process of its own, where nobody else takes memory.
fn soak_apart(name: &str) {
    let mut soak = std::process::Command::new(std::env::current_exe().unwrap());
    soak.args(["--exact", name, "--ignored", "--nocapture"]);
    assert!(soak.status().unwrap().success(), "{name} failed");
}

#[test]
fn a_soak_leaves_memory_flat_on_the_null_device() {
    soak_apart("engine::soak_of_the_null_device");
}

#[test]
#[ignore = "measures its process; run by another test"]
fn soak_of_the_null_device() {
    let null = Null { vocab: 1000, ..Null::default() };
    let config = config(64, 8, 64, 32);
    check_soak(&Engine::spawn(null.program(config.layout), null.vocabulary(), config), 1000, 5);
}

#[test]
fn a_soak_leaves_memory_flat_on_smollm2() {
    if model_path("smollm2").is_some() {
        soak_apart("engine::soak_of_smollm2");
    }
}

#[test]
#[ignore = "measures its process; run by another test"]
fn soak_of_smollm2() {
    let Some(path) = model_path("smollm2") else { return };
    let file = ModelFile::open(&path).unwrap();
    let plan = models::plan(&file).unwrap();
    let config = config(64, 8, 64, 32);
    let device = Cpu::new(CpuOptions::default());
    let program = device.compile(&file, &plan, 0..plan.layers.len(), config.layout).unwrap();
    let words = Vocabulary::Numbers { size: plan.vocab as u32, end: 0 };
    check_soak(&Engine::spawn(program, words, config), plan.vocab as u32, 6);
}
