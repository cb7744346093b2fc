//! Our side: [`Ours`] through the seam that the engine uses (a device compiles a plan, batches are submitted and
//! polled), [`ThroughEngine`] through the engine itself.
use crate::workload::{OUTPUT, PREFILL, PROMPT, STREAM_OUTPUT, STREAMS, Side, Workload, token};
use anyhow::{Context as _, Result, anyhow, bail};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use weir_backends::engine::{Engine, EngineConfig, EngineHandle, Speculation, Vocabulary};
use weir_backends::gguf::ModelFile;
use weir_backends::models;
use weir_backends::plan::Plan;
use weir_backends::program::{
    Batch, Device, Input, KvLayout, Program, SampleSpec, Segment, SegmentOutput, StepOutput, StepTime, Want,
};
use weir_scheduler::{BLOCK_TOKENS, Event, Generate, KvType, ModelId, RequestId};

/// KV blocks of one stream: enough for the longest workload.
const BLOCKS: u32 = PREFILL.div_ceil(BLOCK_TOKENS as u32) + 1;

/// A model compiled for a device.
pub struct Ours {
    program: Box<dyn Program>,
    vocab: usize,
}

/// A model file and its plan.
pub struct Model {
    /// The file.
    pub file: ModelFile,
    /// What it computes.
    pub plan: Plan,
}

impl Model {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Model> {
        Model::of(ModelFile::open(path)?)
    }

    /// What an open file computes.
    pub fn of(file: ModelFile) -> Result<Model> {
        let plan = models::plan(&file)?;
        Ok(Model { file, plan })
    }
}

impl Ours {
    /// Compiles `model` whole.
    pub fn new(device: &dyn Device, model: &Model) -> Result<Ours> {
        let program = device.compile(&model.file, &model.plan, 0..model.plan.layers.len(), layout())?;
        Ok(Ours { program, vocab: model.plan.vocab })
    }

    /// Time spent so far in each kind of fused step, where the device measures it.
    pub fn profile(&self) -> Vec<StepTime> {
        self.program.profile()
    }

    /// Dispatches of one step of decoding, where the device counts them.
    pub fn dispatches_of_a_token(&mut self) -> Result<u64> {
        let count = |ours: &Ours| ours.profile().iter().map(|step| step.count).sum::<u64>();
        self.step(vec![self.prompt(0, PROMPT)])?;
        let before = count(self);
        self.step(vec![segment(0, PROMPT, Input::LastSampled, 1)])?;
        Ok(count(self) - before)
    }

    /// A prompt of `length` tokens into `slot`, and the token that follows it.
    fn prompt(&self, slot: u32, length: u32) -> Segment {
        let ids = (0..length).map(|i| token(i + 31 * slot, self.vocab)).collect();
        segment(slot, 0, Input::Ids(ids), length)
    }

    /// One batch, from submission to result.
    fn step(&mut self, segments: Vec<Segment>) -> Result<StepOutput> {
        self.program.submit(Batch { segments })?;
        self.wait()
    }

    fn wait(&mut self) -> Result<StepOutput> {
        loop {
            if let Some(result) = self.program.poll() {
                let output = result?;
                if output.segments.iter().any(|s| !matches!(s, SegmentOutput::Sampled(_))) {
                    bail!("the program answered with something else than a token");
                }
                return Ok(output);
            }
            std::hint::spin_loop();
        }
    }

    /// Prompts of `streams` sequences, then `output` tokens of each in step; tokens a second of the second part.
    fn generate(&mut self, streams: u32, output: u32) -> Result<f64> {
        for slot in 0..streams {
            self.step(vec![self.prompt(slot, PROMPT)])?;
        }
        let began = Instant::now();
        let mut flying = 0;
        for at in PROMPT..PROMPT + output {
            let segments = (0..streams).map(|slot| segment(slot, at, Input::LastSampled, 1)).collect();
            self.program.submit(Batch { segments })?;
            flying += 1;
            if flying >= self.program.depth().max(1) {
                self.wait()?;
                flying -= 1;
            }
        }
        for _ in 0..flying {
            self.wait()?;
        }
        Ok(f64::from(streams * output) / began.elapsed().as_secs_f64())
    }
}

impl Side for Ours {
    fn run(&mut self, workload: Workload) -> Result<f64> {
        match workload {
            Workload::Decode => self.generate(1, OUTPUT),
            Workload::Streams => self.generate(STREAMS, STREAM_OUTPUT),
            Workload::Prefill => {
                let prompt = self.prompt(0, PREFILL);
                let began = Instant::now();
                self.step(vec![prompt])?;
                Ok(f64::from(PREFILL) / began.elapsed().as_secs_f64())
            }
        }
    }
}

fn layout() -> KvLayout {
    KvLayout { blocks: BLOCKS * STREAMS, kv: KvType::F16, slots: STREAMS, rows: PREFILL }
}

/// Rows of a stream, whose KV blocks are its own, and greedy choice of the token after them.
fn segment(slot: u32, start: u32, input: Input, rows: u32) -> Segment {
    let blocks: Arc<[u32]> = (slot * BLOCKS..(slot + 1) * BLOCKS).collect();
    let spec =
        SampleSpec { sampling: Arc::default(), position: start + rows, counts: Vec::new(), mask: None };
    Segment { slot, start, prompt: false, input, blocks, want: Want::Sample(vec![spec]) }
}

/// The same model behind the engine's queue, batching and streams, as requests see it.
pub struct ThroughEngine {
    handle: EngineHandle,
    model: ModelId,
    vocab: usize,
    requests: u64,
}

impl ThroughEngine {
    /// Compiles `model` whole and starts an engine on it.
    pub fn new(device: &dyn Device, model: &Model) -> Result<ThroughEngine> {
        let Ours { program, vocab } = Ours::new(device, model)?;
        let config = EngineConfig {
            model: ModelId([0; 32]),
            layout: layout(),
            context: BLOCKS * BLOCK_TOKENS as u32,
            prefill_chunk: PREFILL,
            speculation: Speculation::Off,
        };
        let words = Vocabulary::Numbers { size: vocab as u32, end: u32::MAX };
        let handle = Engine::spawn(program, words, config);
        Ok(ThroughEngine { handle, model: config.model, vocab, requests: 0 })
    }

    /// A request that nothing can be reused for.
    fn ask(&mut self, prompt: u32, output: u32) -> Generate {
        self.requests += 1;
        let shift = 97 * self.requests as u32;
        let prompt = (0..prompt).map(|i| token(i + shift, self.vocab)).collect();
        Generate {
            request: RequestId(self.requests),
            ignore_eos: true,
            ..Generate::new(self.model, prompt, output)
        }
    }

    /// When each token of each of `streams` requests came, in seconds from the first request.
    fn arrivals(&mut self, streams: u32, prompt: u32, output: u32) -> Result<Vec<Vec<f64>>> {
        let began = Instant::now();
        let mut readers = Vec::new();
        for _ in 0..streams {
            let (sender, receiver) = tokio::sync::mpsc::channel(output as usize + 1);
            let ask = self.ask(prompt, output);
            self.handle.generate(ask, sender).map_err(|failure| anyhow!(failure.message))?;
            readers.push(std::thread::spawn(move || read(receiver, began)));
        }
        readers.into_iter().map(|reader| reader.join().map_err(|_| anyhow!("a reader panicked"))?).collect()
    }
}

/// When each token came.
fn read(mut events: tokio::sync::mpsc::Receiver<Event>, began: Instant) -> Result<Vec<f64>> {
    let mut at = Vec::new();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Token(_) => at.push(began.elapsed().as_secs_f64()),
            Event::Finished { .. } => return Ok(at),
            Event::Failed(failure) => bail!("{}", failure.message),
        }
    }
    bail!("the engine went silent")
}

impl Side for ThroughEngine {
    fn run(&mut self, workload: Workload) -> Result<f64> {
        let (streams, output) = match workload {
            Workload::Decode => (1, OUTPUT + 1),
            Workload::Streams => (STREAMS, STREAM_OUTPUT + 1),
            Workload::Prefill => {
                let arrivals = self.arrivals(1, PREFILL, 1)?;
                let first = arrivals[0].first().context("no token came")?;
                return Ok(f64::from(PREFILL) / first);
            }
        };
        let arrivals = self.arrivals(streams, PROMPT, output)?;
        // From the moment when all are under way.
        let from = arrivals.iter().filter_map(|at| at.first()).copied().fold(0.0, f64::max);
        let to = arrivals.iter().filter_map(|at| at.last()).copied().fold(0.0, f64::max);
        let tokens = arrivals.iter().flatten().filter(|&&at| at > from).count();
        Ok(tokens as f64 / (to - from))
    }
}
