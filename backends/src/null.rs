//! A device without weights: tokens are a hash of everything before them, and a step takes as long as it is told to.
//!
//! It stands in for a model where the engine, the scheduler and the gateway are tested or measured. Its KV cache holds a
//! hash a position, chained, and a choice folds over all of them as they lie in the blocks: a wrong block table, a stale
//! block, a wrong position, a wrong resume or wrong penalty counts give other tokens. Temperature makes the choice
//! depend on the seed; truncation and bias are passed over, masks are kept.
use crate::engine::Vocabulary;
use crate::gguf::ModelFile;
use crate::plan::Plan;
use crate::program::{
    Batch, Device, DeviceError, DeviceInfo, Input, KvLayout, Program, SampleSpec, Sampled, Segment,
    SegmentOutput, StepOutput, Want,
};
use crate::sampling::GREEDY_BELOW;
use std::collections::VecDeque;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use weir_scheduler::{BLOCK_TOKENS, ModelId};

/// The id that the null model is known by.
pub const NULL_MODEL: ModelId = ModelId(*b"the null model has no weights...");
/// The id that ends a generation.
const END: u32 = 0;

/// A null device: how large its vocabulary is, how long its texts and its steps are.
#[derive(Clone, Debug, PartialEq)]
pub struct Null {
    /// Token ids are below it. At least 2.
    pub vocab: u32,
    /// One token in so many ends the generation; 0 is never.
    pub end_one_in: u32,
    /// What computing takes.
    pub cost: NullCost,
    /// Steps in flight, at least 1. With 1, polling waits for the step; with more, it tells that it isn't done.
    pub depth: usize,
    /// Steps after which the device is lost, as one that is unplugged; 0 is never.
    pub fail_after: u32,
    /// Most tokens follow from the one before alone, so that greedy texts repeat themselves; else each follows from all
    /// before it.
    pub repeats: bool,
}

/// What a step takes: `step + prefill_row * rows of prompts + decode_row * single rows`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NullCost {
    /// Each step.
    pub step: Duration,
    /// Each row of a segment of several.
    pub prefill_row: Duration,
    /// Each row that is alone in its segment.
    pub decode_row: Duration,
}

impl Default for Null {
    /// A vocabulary of 32,000, endless texts, no cost.
    fn default() -> Self {
        Null {
            vocab: 32_000,
            end_one_in: 0,
            cost: NullCost::default(),
            depth: 1,
            fail_after: 0,
            repeats: false,
        }
    }
}

impl FromStr for Null {
    type Err = String;

    /// `vocab=1000,end=50,step_us=1000,prefill_us=20,decode_us=50,depth=1,fail_after=0,repeats=0`, each optional.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut null = Null::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let known = "vocab, end, step_us, prefill_us, decode_us, depth, fail_after or repeats";
            let (key, value) =
                part.split_once('=').ok_or(format!("{part:?} is not KEY=NUMBER with {known}"))?;
            let number: u32 = value.parse().map_err(|_| format!("{key}: {value:?} is not a number"))?;
            let duration = Duration::from_micros(number.into());
            match key {
                "vocab" if number >= 2 => null.vocab = number,
                "end" => null.end_one_in = number,
                "step_us" => null.cost.step = duration,
                "prefill_us" => null.cost.prefill_row = duration,
                "decode_us" => null.cost.decode_row = duration,
                "fail_after" => null.fail_after = number,
                "repeats" => null.repeats = number != 0,
                "depth" if (1..=16).contains(&number) => null.depth = number as usize,
                "vocab" | "depth" => return Err(format!("{key}: {number} is out of range")),
                _ => return Err(format!("{key:?} is not known; use {known}")),
            }
        }
        Ok(null)
    }
}

impl Null {
    /// The tokens' texts.
    pub fn vocabulary(&self) -> Vocabulary {
        Vocabulary::Numbers { size: self.vocab, end: END }
    }

    /// A program that takes the time it is told to.
    pub fn program(&self, kv: KvLayout) -> Box<dyn Program> {
        Box::new(NullProgram::new(self.clone(), kv, Clock::Wall { busy: Instant::now() }))
    }

    /// A program that takes no time, but adds up in nanoseconds what it would have taken.
    pub fn virtual_program(&self, kv: KvLayout) -> (Box<dyn Program>, Arc<AtomicU64>) {
        let total = Arc::new(AtomicU64::new(0));
        (Box::new(NullProgram::new(self.clone(), kv, Clock::Virtual(total.clone()))), total)
    }
}

impl Device for Null {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo {
            name: "null".into(),
            description: "null device, tokens are hashes".into(),
            numerics: "null".into(),
            memory_free: u64::MAX,
        }
    }

    fn compile(
        &self,
        _model: &ModelFile,
        plan: &Plan,
        layers: Range<usize>,
        kv: KvLayout,
    ) -> Result<Box<dyn Program>, DeviceError> {
        if layers != (0..plan.layers.len()) {
            return Err(unsupported("the null device has no hidden rows, so it takes all layers or none"));
        }
        let vocab = u32::try_from(plan.vocab).unwrap_or(u32::MAX).max(2);
        Ok(Null { vocab, ..self.clone() }.program(kv))
    }
}

fn unsupported(why: &str) -> DeviceError {
    DeviceError::Unsupported(why.to_owned())
}

/// When a step is done.
enum Clock {
    /// The device is busy until then.
    Wall { busy: Instant },
    /// At once; nanoseconds so far.
    Virtual(Arc<AtomicU64>),
}

struct NullProgram {
    null: Null,
    layout: KvLayout,
    clock: Clock,
    /// A hash a position.
    kv: Vec<[u64; BLOCK_TOKENS]>,
    /// By slot.
    last: Vec<u32>,
    done: VecDeque<(Option<Instant>, StepOutput)>,
    /// Steps polled.
    steps: u32,
}

impl NullProgram {
    fn new(null: Null, layout: KvLayout, clock: Clock) -> Self {
        let kv = vec![[0; BLOCK_TOKENS]; layout.blocks as usize];
        let last = vec![0; layout.slots as usize];
        NullProgram { null, layout, clock, kv, last, done: VecDeque::new(), steps: 0 }
    }

    /// The caller's part of the contract.
    fn check(&self, batch: &Batch) -> Result<(), DeviceError> {
        let mut rows = 0;
        for (at, segment) in batch.segments.iter().enumerate() {
            let n = match &segment.input {
                Input::Ids(ids) => ids.len(),
                Input::LastSampled => 1,
                Input::Hidden(_) => return Err(unsupported("the null device takes no hidden rows")),
            };
            rows += n;
            let end = segment.start as usize + n;
            if n == 0 || segment.blocks.len() * BLOCK_TOKENS < end {
                return Err(unsupported("a segment without rows, or whose block table is too short"));
            }
            if segment.blocks.iter().any(|&block| block >= self.layout.blocks) {
                return Err(unsupported("a block that doesn't exist"));
            }
            if segment.slot >= self.layout.slots
                || batch.segments[..at].iter().any(|s| s.slot == segment.slot)
            {
                return Err(unsupported("a slot that doesn't exist, or twice in a batch"));
            }
        }
        if rows > self.layout.rows as usize {
            return Err(unsupported("more rows than the program was compiled for"));
        }
        Ok(())
    }

    fn compute(&mut self, segment: Segment) -> Result<SegmentOutput, DeviceError> {
        let last = [self.last[segment.slot as usize]];
        let ids: &[u32] = match &segment.input {
            Input::Ids(ids) => ids,
            Input::LastSampled | Input::Hidden(_) => &last,
        };
        let place =
            |position: usize| (segment.blocks[position / BLOCK_TOKENS] as usize, position % BLOCK_TOKENS);
        for (position, &id) in (segment.start as usize..).zip(ids) {
            let before = match position {
                0 => 0,
                _ => {
                    let (block, at) = place(position - 1);
                    self.kv[block][at]
                }
            };
            let (block, at) = place(position);
            self.kv[block][at] = mix(before, u64::from(id));
        }
        let first = segment.start as usize;
        let token = |end: usize| ids[end - 1 - first];
        let end = segment.start as usize + ids.len();
        let past = |end: usize| {
            let blocks = segment.blocks.iter().flat_map(|&block| &self.kv[block as usize]);
            blocks.take(end).fold(end as u64, |fold, &hash| fold.rotate_left(5) ^ hash)
        };
        Ok(match segment.want {
            Want::Nothing => SegmentOutput::Nothing,
            Want::Sample(specs) => {
                let ends = end + 1 - specs.len()..;
                let sampled: Vec<_> = specs
                    .iter()
                    .zip(ends)
                    .map(|(spec, end)| self.choose(past(end), token(end), spec))
                    .collect();
                self.last[segment.slot as usize] = sampled.last().map_or(0, |sampled| sampled.id);
                SegmentOutput::Sampled(sampled)
            }
            Want::Logits(rows) => {
                let vocab = self.null.vocab as usize;
                let mut logits = vec![0.0; vocab * rows as usize];
                for (row, end) in logits.chunks_exact_mut(vocab).zip(end + 1 - rows as usize..) {
                    row[self.id(mix(past(end), 0)) as usize] = 10.0;
                }
                SegmentOutput::Logits(logits)
            }
            Want::Hidden => return Err(unsupported("the null device gives no hidden rows")),
        })
    }

    fn choose(&self, past: u64, token: u32, spec: &SampleSpec) -> Sampled {
        let s = &spec.sampling;
        let mut hash = match self.null.repeats && !past.is_multiple_of(32) {
            true => mix(1, token.into()),
            false => mix(past, spec.position.into()),
        };
        if s.temperature >= GREEDY_BELOW {
            hash = mix(hash, s.seed);
        }
        // Counts come in any order.
        let counts = spec.counts.iter().map(|c| mix(c.id.into(), c.in_output.into()));
        hash = hash.wrapping_add(counts.fold(0, u64::wrapping_add));
        let mut id = self.id(hash);
        if let Some(mask) = &spec.mask {
            let allowed =
                |id: &u32| mask.get(*id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
            id = (id..self.null.vocab).chain(0..id).find(allowed).unwrap_or(0);
        }
        let next = |i: u32| (id.wrapping_add(i) % self.null.vocab, -0.5 - i as f32);
        let top = |n: u8| (0..u32::from(n).min(self.null.vocab)).map(next).collect();
        Sampled { id, logprobs: s.logprobs.map(|n| (-0.5, top(n))) }
    }

    fn id(&self, hash: u64) -> u32 {
        let ends = u64::from(self.null.end_one_in);
        if ends > 0 && (hash >> 40).is_multiple_of(ends) {
            END
        } else {
            1 + (hash % u64::from(self.null.vocab - 1)) as u32
        }
    }
}

impl Program for NullProgram {
    fn submit(&mut self, batch: Batch) -> Result<(), DeviceError> {
        self.check(&batch)?;
        let cost = &self.null.cost;
        let mut takes = cost.step;
        for segment in &batch.segments {
            takes += match &segment.input {
                Input::Ids(ids) if ids.len() > 1 => cost.prefill_row * ids.len() as u32,
                _ => cost.decode_row,
            };
        }
        let segments =
            batch.segments.into_iter().map(|segment| self.compute(segment)).collect::<Result<_, _>>()?;
        let due = match &mut self.clock {
            Clock::Wall { .. } if takes.is_zero() => None,
            Clock::Wall { busy } => {
                *busy = (*busy).max(Instant::now()) + takes;
                Some(*busy)
            }
            Clock::Virtual(total) => {
                total.fetch_add(takes.as_nanos() as u64, Ordering::Relaxed);
                None
            }
        };
        self.done.push_back((due, StepOutput { segments }));
        Ok(())
    }

    fn poll(&mut self) -> Option<Result<StepOutput, DeviceError>> {
        if let Some(left) = self.done.front()?.0.and_then(|due| due.checked_duration_since(Instant::now())) {
            if self.null.depth > 1 {
                return None;
            }
            std::thread::sleep(left);
        }
        let (_, output) = self.done.pop_front()?;
        self.steps = self.steps.saturating_add(1);
        if self.null.fail_after > 0 && self.steps > self.null.fail_after {
            return Some(Err(DeviceError::Lost(format!(
                "as it was told to, after {} steps",
                self.null.fail_after
            ))));
        }
        Some(Ok(output))
    }

    fn depth(&self) -> usize {
        self.null.depth
    }
}

/// Steele, Lea, Flood: SplitMix64's finaliser.
fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_is_read_or_refused() {
        let check = |text: &str| text.parse::<Null>();
        assert_eq!(check("").unwrap(), Null::default());
        let null = check("vocab=50,step_us=1000,depth=2").unwrap();
        assert_eq!((null.vocab, null.cost.step, null.depth), (50, Duration::from_millis(1), 2));
        for wrong in ["vocab", "vocab=1", "vocab=x", "depth=0", "speed=1"] {
            assert!(check(wrong).is_err(), "{wrong}");
        }
    }
}
