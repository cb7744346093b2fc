//! A program at work: batches become commands, results come back late through mapped buffers.
mod build;
mod describe;
mod profile;
mod readback;
mod record;

use super::adapter::{Gpu, PARAMS_STRIDE};
use super::load::{self, Weights};
use super::lower::{Buf, Call, Height, Lowered, When};
use super::{Wake, Wgpu};
use crate::gguf::ModelFile;
use crate::program::{
    Batch, DeviceError, Input, KvLayout, Program, SampleSpec, Segment, StepOutput, StepTime, Terms, Want,
};
use ::wgpu::{BindGroup, Buffer, BufferUsages, ComputePipeline, SubmissionIndex};
use profile::Profile;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Steps in flight that keep the GPU busy while the CPU records the next.
const DEPTH: usize = 3;
/// How long a poll waits for the GPU: long enough to see a step end at once, short enough for the caller's other work.
const PATIENCE: Duration = Duration::from_millis(1);
const FAILED: usize = usize::MAX / 2;

/// A dispatch, ready to be recorded.
struct Ready {
    pipeline: ComputePipeline,
    bound: BindGroup,
    width: u32,
    height: Height,
    tile: u32,
    when: When,
    spans: usize,
    name: &'static str,
    bytes: u64,
}

/// A compiled range of layers.
pub struct WgpuProgram {
    gpu: Arc<Gpu>,
    lowered: Lowered,
    kv: KvLayout,
    buffers: HashMap<Buf, Buffer>,
    params: Buffer,
    params_bound: BindGroup,
    embed: Vec<Ready>,
    one: Vec<Ready>,
    many: Vec<Ready>,
    head_one: Vec<Ready>,
    head_many: Vec<Ready>,
    choose: Vec<Ready>,
    settle: Vec<Ready>,
    /// What the parameters hold.
    params_now: Vec<u8>,
    /// Mappable buffers that wait for use.
    spare: Vec<Buffer>,
    flights: VecDeque<Flight>,
    /// Batches that go on from ids which are sampled here and not known yet, and those behind them.
    held: VecDeque<Batch>,
    wake: Wake,
    /// Slots that have sampled.
    sampled: Vec<bool>,
    profile: Profile,
    /// Kept to save its allocation.
    words: Vec<u32>,
    /// Holds the weights alive; the bind groups refer to them.
    _weights: Weights,
}

/// A step on its way.
struct Flight {
    answers: Vec<Answer>,
    /// Ids, where any are sampled on the GPU.
    ids: Option<Buffer>,
    /// Runs of rows of logits, and of the residual stream.
    logits: Vec<Run>,
    hidden: Option<Buffer>,
    /// Ticks before the first dispatch and after each, and whose they are.
    ticks: Option<(Buffer, Vec<&'static str>)>,
    mapped: Arc<AtomicUsize>,
    maps: usize,
    submission: Option<SubmissionIndex>,
}

/// Rows `first..` of the wanted ones, in a mappable buffer.
struct Run {
    first: usize,
    rows: usize,
    buffer: Buffer,
}

/// How a segment's result is found.
enum Answer {
    Nothing,
    /// Wanted rows.
    Ids {
        first: usize,
        rows: usize,
        slot: u32,
    },
    /// The same, one a specification, to be sampled here.
    Sample {
        first: usize,
        slot: u32,
        specs: Vec<SampleSpec>,
    },
    Logits {
        first: usize,
        rows: usize,
    },
    /// Rows of the batch.
    Hidden {
        first: usize,
        rows: usize,
    },
}

impl WgpuProgram {
    /// Compiles kernels and loads weights, at the same time.
    pub async fn new(
        device: &Wgpu,
        file: &ModelFile,
        lowered: Lowered,
        kv: KvLayout,
    ) -> Result<WgpuProgram, DeviceError> {
        let gpu = device.gpu.clone();
        let profile = Profile::new(&gpu, device.profile);
        let weights = load::allocate(&gpu, &lowered.regions);
        let mut buffers = HashMap::new();
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        for (&name, &bytes) in &lowered.sizes {
            buffers.insert(name, gpu.buffer(&format!("{name:?}"), bytes as u64, usage));
        }
        let ropes: Vec<u8> = lowered.ropes.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
        gpu.queue.write_buffer(&buffers[&Buf::Ropes], 0, &ropes);
        let chunks = (kv.rows as usize).div_ceil(lowered.logits_rows);
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let params = gpu.buffer("params", PARAMS_STRIDE * (1 + chunks as u64), usage);
        let lists = [
            &lowered.embed,
            &lowered.one,
            &lowered.many,
            &lowered.head_one,
            &lowered.head_many,
            &lowered.choose,
            &lowered.settle,
        ];
        let pipelines = build::build(&gpu, file, &lists, &lowered, &weights).await?;
        let ready = |calls: &Vec<Call>| -> Vec<Ready> {
            let one = |call: &Call| Ready {
                pipeline: pipelines[&call.kernel].clone(),
                bound: build::bind(&gpu, call, &buffers, &weights, &lowered),
                width: call.width as u32,
                height: call.height,
                tile: call.tile as u32,
                when: call.when,
                spans: call.spans,
                name: call.name,
                bytes: call.bytes as u64,
            };
            calls.iter().map(one).collect()
        };
        Ok(WgpuProgram {
            embed: ready(&lowered.embed),
            one: ready(&lowered.one),
            many: ready(&lowered.many),
            head_one: ready(&lowered.head_one),
            head_many: ready(&lowered.head_many),
            choose: ready(&lowered.choose),
            settle: ready(&lowered.settle),
            params_bound: gpu.bind_params(&params),
            params,
            params_now: Vec::new(),
            spare: Vec::new(),
            flights: VecDeque::new(),
            held: VecDeque::new(),
            wake: device.wake.clone(),
            sampled: vec![false; kv.slots as usize],
            profile,
            words: Vec::new(),
            _weights: weights,
            buffers,
            kv,
            lowered,
            gpu,
        })
    }
}

impl WgpuProgram {
    /// What every program refuses, and rows that go on from a slot that has sampled nothing.
    fn check(&self, batch: &Batch) -> Result<(), DeviceError> {
        batch.check(&Terms {
            kv: self.kv,
            vocab: self.lowered.vocab,
            hidden: self.lowered.hidden,
            embeds: !self.embed.is_empty(),
            heads: !self.head_one.is_empty(),
        })?;
        let fresh = |s: &&Segment| s.input == Input::LastSampled && !self.sampled[s.slot as usize];
        match batch.segments.iter().find(fresh) {
            Some(segment) => {
                let slot = segment.slot;
                Err(DeviceError::Unsupported(format!("batch refused: slot {slot} has sampled nothing")))
            }
            None => Ok(()),
        }
    }

    /// Submits held batches, up to the first that waits for an id.
    fn release(&mut self) -> Result<(), DeviceError> {
        while self.held.front().is_some_and(|batch| !self.waits(batch))
            && let Some(batch) = self.held.pop_front()
        {
            self.record(batch)?;
        }
        Ok(())
    }
}

impl Program for WgpuProgram {
    fn submit(&mut self, batch: Batch) -> Result<(), DeviceError> {
        self.gpu.fine()?;
        self.check(&batch)?;
        for segment in batch.segments.iter().filter(|segment| matches!(segment.want, Want::Sample(_))) {
            self.sampled[segment.slot as usize] = true;
        }
        self.held.push_back(batch);
        self.release()
    }

    fn poll(&mut self) -> Option<Result<StepOutput, DeviceError>> {
        let flight = self.flights.front()?;
        if let Err(error) = self.gpu.poll(flight.submission.clone(), PATIENCE) {
            self.flights.clear();
            self.held.clear();
            return Some(Err(error));
        }
        match flight.mapped.load(Ordering::Acquire) {
            n if n >= FAILED => {
                self.flights.clear();
                self.held.clear();
                Some(Err(DeviceError::Lost("a buffer could not be mapped".into())))
            }
            n if n < flight.maps => None,
            _ => {
                let flight = self.flights.pop_front()?;
                let landed = self.land(flight);
                Some(landed.and_then(|output| self.release().map(|()| output)))
            }
        }
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    /// Dispatches so far, the weights that they read, and, where that was asked for, their time.
    fn profile(&self) -> Vec<StepTime> {
        self.profile.steps()
    }
}
