//! Our side, through the seam that the engine uses: a device compiles a plan, batches are submitted and polled.
use crate::workload::{OUTPUT, PREFILL, PROMPT, STREAM_OUTPUT, STREAMS, Side, Workload, token};
use anyhow::{Result, bail};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use weir_backends::gguf::ModelFile;
use weir_backends::models;
use weir_backends::plan::Plan;
use weir_backends::program::{
    Batch, Device, Input, KvLayout, Program, SampleSpec, Segment, SegmentOutput, StepOutput, Want,
};
use weir_scheduler::{BLOCK_TOKENS, KvType};

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
        let file = ModelFile::open(path)?;
        let plan = models::plan(&file)?;
        Ok(Model { file, plan })
    }
}

impl Ours {
    /// Compiles `model` whole.
    pub fn new(device: &dyn Device, model: &Model) -> Result<Ours> {
        let layout =
            KvLayout { blocks: BLOCKS * STREAMS, kv: KvType::F16, slots: STREAMS, rows: PREFILL.max(STREAMS) };
        let program = device.compile(&model.file, &model.plan, 0..model.plan.layers.len(), layout)?;
        Ok(Ours { program, vocab: model.plan.vocab })
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

/// Rows of a stream, whose KV blocks are its own, and greedy choice of the token after them.
fn segment(slot: u32, start: u32, input: Input, rows: u32) -> Segment {
    let blocks: Arc<[u32]> = (slot * BLOCKS..(slot + 1) * BLOCKS).collect();
    let spec =
        SampleSpec { sampling: Arc::default(), position: start + rows, counts: Vec::new(), mask: None };
    Segment { slot, start, input, blocks, want: Want::Sample(Box::new(spec)) }
}
