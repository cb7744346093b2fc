//! The engine: from requests to batches, and from sampled ids to events.
//!
//! [`Engine`] is the core: it has no thread and no clock, [`Engine::step`] is told the time. [`EngineHandle`] runs one
//! on a thread of its own and is what the rest of a node holds; in a browser, whoever made it drives it.

mod blocks;
mod draft;
mod drafter;
// Tested everywhere, used in browsers.
#[cfg(any(test, target_arch = "wasm32"))]
#[cfg_attr(not(target_arch = "wasm32"), allow(dead_code))]
mod driven;
#[cfg(not(target_arch = "wasm32"))]
mod handle;
mod schedule;
mod sequence;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use drafter::Draft;
#[cfg(target_arch = "wasm32")]
pub use driven::EngineHandle;
#[cfg(not(target_arch = "wasm32"))]
pub use handle::EngineHandle;
pub use vocabulary::Vocabulary;

use crate::grammar::{self, GrammarError, Grammars, Masks};
use crate::program::{DeviceError, KvLayout, Program, SegmentOutput, StepOutput};
use blocks::BlockPool;
use draft::Pace;
use drafter::{Drafter, Turn};
use sequence::{Flushed, Outbox, Rank, Sequence};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use weir_scheduler::{BLOCK_TOKENS, Event, Failure, FailureKind, Finish, Generate, ModelId, RequestId, Time};

/// Requests that an engine holds beyond those in its slots; further ones are refused as busy.
pub const QUEUE_MAX: usize = 512;

/// What an engine runs, and within which bounds.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Requests for other models are refused.
    pub model: ModelId,
    /// What the program was compiled with.
    pub layout: KvLayout,
    /// Most tokens of a sequence, prompt and output. What the KV cache can't hold is cut off.
    pub context: u32,
    /// Most rows of prompts in one step, all sequences together: longer ones are spread over several steps, in which
    /// others go on decoding.
    pub prefill_chunk: u32,
    /// Whether several tokens of a sequence are computed in one step where the next ones can be guessed. The tokens are
    /// the same either way.
    pub speculation: Speculation,
}

/// When the next tokens are guessed, to be checked in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// Where it has been seen to pay.
    #[default]
    Auto,
    /// Never.
    Off,
    /// So many wherever there is a guess, whether it pays or not: for tests and benches.
    Always(u8),
}

impl EngineConfig {
    /// The same with every bound brought within what the layout can do.
    fn bounded(mut self) -> Self {
        let tokens = u64::from(self.layout.blocks) * BLOCK_TOKENS as u64;
        self.context = self.context.min(u32::try_from(tokens).unwrap_or(u32::MAX));
        self.layout.slots = self.layout.slots.min(self.layout.rows);
        self.prefill_chunk = self.prefill_chunk.clamp(1, self.layout.rows.max(1));
        self
    }

    /// Whether a request can ever be served.
    fn check(&self, ask: &Generate, vocabulary: &Vocabulary) -> Result<(), Failure> {
        let invalid = |message| Err(Failure { kind: FailureKind::Invalid, message });
        if ask.model != self.model {
            let message = format!("this engine runs model {}, not {}", self.model, ask.model);
            return Err(Failure { kind: FailureKind::NoModel, message });
        }
        if ask.prompt.is_empty() {
            return invalid("the prompt has no tokens; send at least one".into());
        }
        if ask.max_tokens == 0 {
            return invalid("max_tokens is 0; ask for at least 1".into());
        }
        let size = vocabulary.size();
        if let Some(id) = ask.prompt.iter().chain(&ask.output).find(|id| **id >= size) {
            return invalid(format!("token {id} is not in the model's vocabulary of {size}"));
        }
        if ask.grammar.is_some() && !grammar::KNOWN {
            return Err(GrammarError::Absent.into());
        }
        let (prompt, output, context) = (ask.prompt.len(), ask.output.len(), self.context as usize);
        if prompt >= context || prompt + output > context {
            return invalid(format!(
                "the prompt has {prompt} tokens and {output} of output so far, the context holds {context} with at \
                 least one token of output; shorten the prompt"
            ));
        }
        Ok(())
    }
}

/// How an engine is doing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStatus {
    /// Sequences in slots.
    pub running: usize,
    /// Requests that wait for a slot or for KV blocks, preempted ones included.
    pub queued: usize,
    /// Tokens of prompts that are still to be computed.
    pub queued_prompt_tokens: usize,
    /// All KV blocks.
    pub kv_blocks_total: usize,
    /// Blocks with nothing in them.
    pub kv_blocks_free: usize,
    /// Blocks that nobody uses but a request with the same beginning can adopt.
    pub kv_blocks_cached: usize,
    /// Tokens sampled since the start.
    pub tokens_generated: u64,
    /// Rows of prompts computed since the start, again after preemption too.
    pub prompt_tokens: u64,
    /// Steps since the start.
    pub steps: u64,
    /// Tokens that were guessed and checked since the start.
    pub guessed: u64,
    /// Of those, the ones that were right: each has saved a step.
    pub guessed_right: u64,
    /// Of the guesses, those of a draft model.
    pub drafted: u64,
    /// Of those, the ones that were right.
    pub drafted_right: u64,
    /// How long the engine has been without a finished step although it had work that nobody else held up; else zero.
    pub last_step_age: Duration,
    /// Why the device can't go on; every request is refused then.
    pub failed: Option<String>,
}

/// What a step did, so that its driver knows when to call the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A step of the program was finished: call again at once.
    Worked,
    /// The device computes: call again soon.
    Computing,
    /// Every sequence waits for its reader: call again within milliseconds.
    Blocked,
    /// Nothing to do until the next request.
    Idle,
}

/// Continuous batching over one [`Program`].
///
/// A request enters through [`Engine::generate`] and gets its events through the channel that came with it, one
/// `Finished` or `Failed` at the end. Its owner calls [`Engine::step`] as long as there is work, from one thread.
///
/// In one step all running sequences decode, and prompts fill the rest of the row budget, in order of priority, then
/// age. Background work is in no step that has anybody else's rows, and gives up its slot and blocks where a more
/// important request lacks them. Where the KV cache runs out, the least important youngest sequence is preempted: it
/// goes back to the queue with its output, and is computed again from there, so that nothing sent is revised and the
/// oldest of the most important always advances. A sequence whose reader is behind is left out until there is room.
pub struct Engine {
    program: Box<dyn Program>,
    vocabulary: Vocabulary,
    config: EngineConfig,
    pool: BlockPool,
    /// By slot.
    running: Vec<Option<Box<Sequence>>>,
    /// By rank.
    waiting: VecDeque<Box<Sequence>>,
    /// Last events of sequences that have ended.
    draining: Vec<Outbox>,
    in_flight: VecDeque<Step>,
    /// Sequences so far, runs so far.
    ages: u64,
    runs: u64,
    /// Requests that have ended and whose events are all delivered, since the start.
    ended: u64,
    tokens_generated: u64,
    prompt_tokens: u64,
    steps: u64,
    guessed: u64,
    guessed_right: u64,
    drafted: u64,
    drafted_right: u64,
    drafter: Option<Box<Drafter>>,
    last_progress: Time,
    pace: Pace,
    /// When a step of decoding was last known to be done.
    last_done: Time,
    /// The step that was taken in the call before, until the time is known.
    took: Option<Taken>,
    failed: Option<String>,
    /// Made when it is asked for.
    grammars: Option<Box<Grammars>>,
    /// Kept to save its allocation.
    ranked: Vec<(Rank, usize)>,
}

/// A step in flight.
#[derive(Debug)]
struct Step {
    flights: Vec<Flight>,
    /// Rows, where all of them decode.
    decoding: Option<usize>,
    submitted: Time,
}

/// A step of decoding that is done.
#[derive(Clone, Copy, Debug)]
struct Taken {
    rows: usize,
    /// When it was submitted, or when the one ahead of it was done, if that was later.
    since: Time,
}

/// A segment of a step in flight.
#[derive(Clone, Copy, Debug)]
struct Flight {
    slot: usize,
    run: u64,
    sampled: bool,
}

impl Engine {
    /// An engine without requests.
    pub fn new(program: Box<dyn Program>, vocabulary: Vocabulary, config: EngineConfig) -> Self {
        let config = config.bounded();
        Engine {
            program,
            vocabulary,
            config,
            pool: BlockPool::new(config.layout.blocks),
            running: (0..config.layout.slots).map(|_| None).collect(),
            waiting: VecDeque::new(),
            draining: Vec::new(),
            in_flight: VecDeque::new(),
            ages: 0,
            runs: 0,
            ended: 0,
            tokens_generated: 0,
            prompt_tokens: 0,
            steps: 0,
            guessed: 0,
            guessed_right: 0,
            drafted: 0,
            drafted_right: 0,
            drafter: None,
            last_progress: Time::ZERO,
            pace: Pace::default(),
            last_done: Time::ZERO,
            took: None,
            failed: None,
            grammars: None,
            ranked: Vec::new(),
        }
    }

    /// Runs one on a thread of its own.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn spawn(
        program: Box<dyn Program>,
        vocabulary: impl Into<Vocabulary>,
        config: EngineConfig,
    ) -> EngineHandle {
        Engine::new(program, vocabulary.into(), config).start()
    }

    /// Runs this one on a thread of its own.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn start(self) -> EngineHandle {
        EngineHandle::new(self)
    }

    /// Takes a request, or refuses it at once. Events go to `sink`; while it is full the sequence rests, and when its
    /// receiver is dropped the request is cancelled. A grammar is compiled here and now; [`EngineHandle`] does that
    /// elsewhere.
    pub fn generate(&mut self, now: Time, ask: Generate, sink: Sender<Event>) -> Result<(), Failure> {
        self.config.check(&ask, &self.vocabulary)?;
        let masks = match &ask.grammar {
            Some(grammar) => {
                if self.grammars.is_none() {
                    self.grammars = Some(Box::new(Grammars::new(&self.vocabulary)?));
                }
                let begun = self.grammars.as_mut().map(|all| all.begin(grammar, &ask.output));
                begun.transpose()?.map(Box::new)
            }
            None => None,
        };
        self.follow(now, ask, masks, sink)
    }

    /// The same, with masks that have seen the output so far, if it has a grammar.
    fn follow(
        &mut self,
        now: Time,
        ask: Generate,
        masks: Option<Box<Masks>>,
        sink: Sender<Event>,
    ) -> Result<(), Failure> {
        if let Some(why) = &self.failed {
            return Err(Failure { kind: FailureKind::Internal, message: why.clone() });
        }
        self.config.check(&ask, &self.vocabulary)?;
        let held = self.running().count() + self.waiting.len() + self.draining.len();
        if held >= self.running.len() + QUEUE_MAX {
            return Err(busy(held));
        }
        self.ages += 1;
        let deadline = ask.deadline.map(|left| now + left);
        let context = self.config.context;
        let mut sequence =
            Box::new(Sequence::new(ask, masks, sink, &self.vocabulary, context, self.ages, deadline));
        sequence.apart = self.program.prompts_apart();
        if self.idle() {
            self.last_progress = now;
        }
        match sequence.ended(&self.vocabulary) {
            Some(reason) => self.close(sequence, Ok(reason)),
            None => self.enqueue(sequence),
        }
        Ok(())
    }

    /// Ends a request with [`FailureKind::Cancelled`]; nothing happens if it has ended already.
    pub fn cancel(&mut self, request: RequestId, attempt: u32) {
        self.end_where(FailureKind::Cancelled, "cancelled", |s| s.request == request && s.attempt == attempt);
    }

    /// Delivers, admits, submits as many steps as the program takes, and reads what it has finished.
    pub fn step(&mut self, now: Time) -> Progress {
        // A device without a clock of its own computes while it is asked: only now is it known how long that took.
        if let Some(Taken { rows, since }) = self.took.take() {
            self.pace.took(rows, now.since(since));
            self.last_done = now;
        }
        self.time_draft(now);
        self.end_where(FailureKind::Deadline, "the deadline passed", |s| {
            s.deadline.is_some_and(|d| d <= now)
        });
        self.deliver(now);
        if self.failed.is_some() {
            return if self.draining.is_empty() { Progress::Idle } else { Progress::Blocked };
        }
        if let Some(progress) = self.follow_draft(now) {
            return progress;
        }
        let depth = self.program.depth().max(1);
        while self.in_flight.len() < depth {
            self.admit(now);
            match self.begin_draft(now) {
                Turn::No => {}
                Turn::Wait => break,
                Turn::Begun => return Progress::Worked,
            }
            let scheduled = self.schedule();
            self.drafter.iter_mut().for_each(|drafter| drafter.ready = false);
            let Some((batch, flights, decoding)) = scheduled else { break };
            if let Err(error) = self.program.submit(batch) {
                self.lose(&error);
                return Progress::Worked;
            }
            self.in_flight.push_back(Step { flights, decoding, submitted: now });
        }
        if self.in_flight.is_empty() {
            self.last_progress = now;
            return if self.idle() { Progress::Idle } else { Progress::Blocked };
        }
        match self.program.poll() {
            None => Progress::Computing,
            Some(output) => {
                self.last_progress = now;
                if let Err(error) = output.and_then(|output| self.take(output)) {
                    self.lose(&error);
                }
                Progress::Worked
            }
        }
    }

    /// Ends every request with [`FailureKind::Internal`] and refuses all that follow.
    pub fn fail(&mut self, why: &str) {
        self.failed = Some(why.to_owned());
        self.in_flight.clear();
        self.drafter = None;
        self.end_where(FailureKind::Internal, why, |_| true);
    }

    fn lose(&mut self, error: &DeviceError) {
        tracing::error!(%error, "the engine's device can't go on");
        self.fail(&error.to_string());
    }

    /// How it is doing.
    pub fn status(&self, now: Time) -> EngineStatus {
        let todo = |s: &Sequence| s.prompt.saturating_sub(s.computed);
        let queued_prompt_tokens =
            self.running().map(todo).sum::<usize>() + self.waiting.iter().map(|s| todo(s)).sum::<usize>();
        EngineStatus {
            running: self.running().count(),
            queued: self.waiting.len(),
            queued_prompt_tokens,
            kv_blocks_total: self.pool.total(),
            kv_blocks_free: self.pool.free(),
            kv_blocks_cached: self.pool.cached(),
            tokens_generated: self.tokens_generated,
            prompt_tokens: self.prompt_tokens,
            steps: self.steps,
            guessed: self.guessed,
            guessed_right: self.guessed_right,
            drafted: self.drafted,
            drafted_right: self.drafted_right,
            last_step_age: if self.idle() { Duration::ZERO } else { now.since(self.last_progress) },
            failed: self.failed.clone(),
        }
    }

    /// Panics unless every block is free, cached or in use by exactly the sequences that hold it. For tests.
    pub fn check(&self) {
        self.pool.check(self.running().flat_map(|s| &s.blocks));
        assert!(self.waiting.iter().all(|s| s.blocks.is_empty()), "a waiting sequence holds blocks");
        assert!(self.waiting.iter().is_sorted_by_key(|s| s.rank), "the queue is out of order");
    }

    fn running(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().flatten().map(|s| &**s)
    }

    fn idle(&self) -> bool {
        self.waiting.is_empty() && self.draining.is_empty() && self.running.iter().all(Option::is_none)
    }

    /// Into the queue, by rank.
    fn enqueue(&mut self, sequence: Box<Sequence>) {
        let place = self.waiting.partition_point(|s| s.rank < sequence.rank);
        self.waiting.insert(place, sequence);
    }

    /// Hands events to readers, and forgets requests whose readers are gone.
    fn deliver(&mut self, now: Time) {
        let mut gone = false;
        for sequence in self.running.iter_mut().flatten().chain(&mut self.waiting) {
            match sequence.outbox.flush() {
                Flushed::Empty => sequence.stalled = None,
                Flushed::Full => _ = sequence.stalled.get_or_insert(now),
                Flushed::Closed => gone = true,
            }
        }
        if gone {
            self.end_where(FailureKind::Cancelled, "the reader is gone", |s| s.outbox.sink.is_closed());
        }
        let before = self.draining.len();
        self.draining.retain_mut(|outbox| outbox.flush() == Flushed::Full);
        self.ended += (before - self.draining.len()) as u64;
    }

    /// The results of a step.
    fn take(&mut self, output: StepOutput) -> Result<(), DeviceError> {
        let Some(Step { flights, decoding, submitted }) = self.in_flight.pop_front() else { return Ok(()) };
        self.took = decoding.map(|rows| Taken { rows, since: submitted.max(self.last_done) });
        if flights.len() != output.segments.len() {
            return Err(DeviceError::Lost("a step came back with other segments than it was given".into()));
        }
        self.steps += 1;
        for (flight, segment) in flights.into_iter().zip(output.segments) {
            let slot = &mut self.running[flight.slot];
            let Some(sequence) = slot.as_mut().filter(|s| s.run == flight.run) else { continue };
            sequence.register(&mut self.pool);
            if !flight.sampled {
                continue;
            }
            let SegmentOutput::Sampled(sampled) = segment else {
                return Err(DeviceError::Lost("a step came back without the token it was asked for".into()));
            };
            if sampled.len() != 1 + sequence.guessed.len() {
                return Err(DeviceError::Lost(
                    "a step came back with other tokens than it was asked for".into(),
                ));
            }
            let (guessed, drafted) = (sequence.guessed.len(), sequence.draft.checked);
            let (taken, finished) = sequence.accept(sampled, &self.vocabulary);
            Engine::learn(&mut self.drafter, sequence, guessed, taken, finished.is_some());
            self.tokens_generated += taken as u64;
            self.guessed += guessed as u64;
            self.guessed_right += taken as u64 - 1;
            if drafted {
                self.drafted += guessed as u64;
                self.drafted_right += taken as u64 - 1;
            }
            if finished.is_none() {
                sequence.outbox.flush();
            }
            // The last token goes out with the end, so that its reader is woken once.
            if let Some(end) = finished {
                self.end_slot(flight.slot, end.map_err(Failure::from));
            }
        }
        Ok(())
    }

    /// Ends the sequence in a slot.
    fn end_slot(&mut self, slot: usize, end: Result<Finish, Failure>) {
        if let Some(sequence) = self.running[slot].take() {
            self.close(sequence, end);
        }
    }

    /// Ends the requests for which `which` holds.
    fn end_where(&mut self, kind: FailureKind, message: &str, which: impl Fn(&Sequence) -> bool) {
        let mut ended: Vec<Box<Sequence>> = Vec::new();
        for slot in &mut self.running {
            ended.extend(slot.take_if(|s| which(s)));
        }
        if self.waiting.iter().any(|s| which(s)) {
            let (out, kept): (VecDeque<_>, VecDeque<_>) = self.waiting.drain(..).partition(|s| which(s));
            ended.extend(out);
            self.waiting = kept;
        }
        for sequence in ended {
            self.close(sequence, Err(Failure { kind, message: message.to_owned() }));
        }
    }

    /// Gives back what a sequence holds, and its last event to its reader.
    fn close(&mut self, mut sequence: Box<Sequence>, end: Result<Finish, Failure>) {
        let EngineConfig { model, layout, .. } = self.config;
        sequence.release(&mut self.pool, model, layout.kv);
        match end {
            Ok(reason) => sequence.finish(reason),
            Err(failure) => sequence.outbox.events.push_back(Event::Failed(failure)),
        }
        match sequence.outbox.flush() {
            Flushed::Full => self.draining.push(sequence.outbox),
            Flushed::Empty | Flushed::Closed => self.ended += 1,
        }
    }
}

impl From<GrammarError> for Failure {
    fn from(error: GrammarError) -> Failure {
        // It goes no better elsewhere; only tokens that stray are somebody's fault here.
        let kind = match error {
            GrammarError::Strayed => FailureKind::Internal,
            GrammarError::Bad(_) | GrammarError::Mask(_) | GrammarError::Absent => FailureKind::Invalid,
        };
        Failure { kind, message: error.to_string() }
    }
}

fn busy(held: usize) -> Failure {
    let message = format!("the engine holds {held} requests already; try again later, or another node");
    Failure { kind: FailureKind::Busy, message }
}
