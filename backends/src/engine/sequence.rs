//! One request on its way through the engine.
use super::blocks::BlockPool;
use super::draft::{Lookup, Pace};
use super::drafter::Drafted;
use super::vocabulary::{Text, Vocabulary};
use crate::grammar::{GrammarError, Masks};
use crate::program::{Input, SampleSpec, Sampled, Segment, TokenCount, Want};
use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;
use weir_scheduler::{
    BLOCK_TOKENS, BlockKey, Candidate, Event, Finish, Generate, KvType, Logprob, ModelId, Priority,
    RequestId, Sampling, Time, Token, Usage, chain,
};

/// Smaller is more urgent: priority, then age.
pub(crate) type Rank = (Reverse<Priority>, u64);

/// A request in the queue, in a slot, or preempted. What has been sent is never revised: a preempted sequence is
/// computed again from `prompt ++ output`.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) request: RequestId,
    pub(crate) attempt: u32,
    pub(crate) rank: Rank,
    pub(crate) deadline: Option<Time>,
    pub(crate) outbox: Outbox,
    /// Since when its reader has been behind.
    pub(crate) stalled: Option<Time>,
    /// Prompt and output, as far as the host knows.
    pub(crate) tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
    /// [`crate::program::Program::prompts_apart`].
    pub(crate) apart: bool,
    /// Of `tokens`, when it ends.
    limit: usize,
    ignore_eos: bool,
    salt: u64,
    sampling: Arc<Sampling>,
    counts: Option<Counts>,
    /// Where the output stands in its grammar.
    masks: Option<Box<Masks>>,
    text: Text,
    /// The output that came with the request holds a stop string.
    stopped: bool,
    /// Of the prompt, found in the KV cache when it was first admitted.
    cached: Option<u32>,
    /// Numbers the times it was given a slot: results of an earlier time are void.
    pub(crate) run: u64,
    /// Positions whose keys and values have been submitted.
    pub(crate) computed: usize,
    /// Tokens sampled in steps still in flight, guesses apart.
    pub(crate) pending: usize,
    /// Guesses in the step in flight.
    pub(crate) guessed: Vec<u32>,
    /// What makes them, once it has been asked to.
    lookup: Option<Box<Lookup>>,
    /// What a draft model knows of it.
    pub(super) draft: Drafted,
    pub(crate) blocks: Vec<u32>,
    /// The same, as programs take it; rebuilt when it is behind.
    table: Arc<[u32]>,
    /// Names of the full blocks of `tokens`, as far as they were needed.
    keys: Vec<BlockKey>,
    /// Leading blocks that have been registered or adopted.
    registered: usize,
}

impl Sequence {
    /// `deadline` is absolute; `context` is the most tokens a sequence may have; `masks` have seen the output so far.
    pub(crate) fn new(
        ask: Generate,
        masks: Option<Box<Masks>>,
        sink: Sender<Event>,
        vocabulary: &Vocabulary,
        context: u32,
        age: u64,
        deadline: Option<Time>,
    ) -> Self {
        let prompt = ask.prompt.len();
        let mut text = vocabulary.stream(&ask.stop);
        let stopped = ask.output.iter().any(|&id| text.push(id).stopped);
        let mut tokens = ask.prompt;
        tokens.extend_from_slice(&ask.output);
        let counts = Counts::new(&ask.sampling, &tokens[..prompt], &tokens[prompt..]);
        Sequence {
            request: ask.request,
            attempt: ask.attempt,
            rank: (Reverse(ask.priority), age),
            deadline,
            outbox: Outbox { sink, events: VecDeque::new() },
            stalled: None,
            prompt,
            apart: false,
            limit: (context as usize).min(prompt.saturating_add(ask.max_tokens as usize)),
            ignore_eos: ask.ignore_eos,
            salt: ask.salt,
            sampling: Arc::new(ask.sampling),
            counts,
            masks,
            text,
            stopped,
            cached: None,
            run: 0,
            computed: 0,
            pending: 0,
            guessed: Vec::new(),
            lookup: None,
            draft: Drafted::default(),
            blocks: Vec::new(),
            table: Arc::new([]),
            keys: Vec::new(),
            registered: 0,
            tokens,
        }
    }

    /// If the tokens that came with the request already end it.
    pub(crate) fn ended(&self, vocabulary: &Vocabulary) -> Option<Finish> {
        let last = *self.tokens[self.prompt..].last()?;
        let done = self.masks.as_ref().is_some_and(|masks| masks.is_done());
        if self.stopped || done || (!self.ignore_eos && vocabulary.is_end(last)) {
            return Some(Finish::Stop);
        }
        (self.tokens.len() >= self.limit).then_some(Finish::Length)
    }

    /// Rows that may be computed next, one if it decodes; 0 if it has to wait for a step in flight.
    pub(crate) fn rows(&self) -> usize {
        let end = if self.in_prompt() { self.prompt } else { self.tokens.len() };
        let known = end.saturating_sub(self.computed);
        if known > 0 {
            return known;
        }
        // The next id is on its way; a device can go on from it, unless the choice needs the host.
        let ready = self.counts.is_none() && self.masks.is_none() && self.guessed.is_empty();
        usize::from(ready && self.tokens.len() + self.pending < self.limit)
    }

    /// Whether the next row is a prompt's, and so not of a kind with an answer's.
    pub(crate) fn in_prompt(&self) -> bool {
        self.apart && self.computed < self.prompt
    }

    /// Tokens whose keys and values others may adopt: where they depend on it, only a prompt's.
    pub(crate) fn sharable(&self) -> usize {
        if self.apart { self.prompt } else { self.tokens.len() }
    }

    /// Guesses at what comes after the last token, at most so many, as far as they pay; see [`Lookup::guess`].
    pub(crate) fn guess(&mut self, most: usize, gain: impl Fn(f32, usize) -> f32) -> Vec<u32> {
        let most = most.min((self.limit - self.tokens.len()).saturating_sub(1));
        if self.counts.is_some() || most == 0 {
            return Vec::new();
        }
        let lookup = self.lookup.get_or_insert_with(|| Box::new(Lookup::new()));
        lookup.follow(&self.tokens, self.prompt);
        lookup.guess(&self.tokens, most, gain)
    }

    /// What the guesses of [`Sequence::guess`] would gain in a step of `all` rows without any; 1 where there are none.
    pub(super) fn lookup_gain(&mut self, most: usize, all: usize, pace: &Pace) -> f32 {
        self.lookup_best(most, |expected, guesses| pace.gain(all, expected, guesses))
    }

    /// More than 1 if there are any.
    pub(super) fn lookup_always(&mut self, most: usize) -> f32 {
        self.lookup_best(most, |expected, _| expected * 1e3)
    }

    fn lookup_best(&mut self, most: usize, gain: impl Fn(f32, usize) -> f32) -> f32 {
        let lookup = self.lookup.get_or_insert_with(|| Box::new(Lookup::new()));
        lookup.follow(&self.tokens, self.prompt);
        lookup.best(most, gain).0
    }

    /// Whether how often tokens have occurred has a say in the next one.
    pub(super) fn is_counted(&self) -> bool {
        self.counts.is_some()
    }

    /// Most tokens, prompt and output.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// The request's.
    pub(super) fn sampling(&self) -> &Arc<Sampling> {
        &self.sampling
    }

    /// Names of all full blocks of what is known.
    pub(crate) fn keys(&mut self, model: ModelId, kv: KvType) -> &[BlockKey] {
        let full = self.tokens.len() / BLOCK_TOKENS;
        if self.keys.len() < full {
            let known = &self.tokens[..full * BLOCK_TOKENS];
            self.keys.extend(chain(model, kv, self.salt, known).skip(self.keys.len()));
        }
        &self.keys
    }

    /// Begins a run on blocks that were found in the cache.
    pub(crate) fn begin(&mut self, run: u64, adopted: Vec<u32>, pool: &BlockPool) {
        self.run = run;
        self.draft.begin(pool.drafted(&adopted));
        self.computed = adopted.len() * BLOCK_TOKENS;
        self.registered = adopted.len();
        self.blocks = adopted;
        self.cached.get_or_insert(self.computed.min(self.prompt) as u32);
    }

    /// Names computed blocks, as far as names are known.
    pub(crate) fn register(&mut self, pool: &mut BlockPool) {
        let full = self.computed.min(self.sharable()) / BLOCK_TOKENS;
        while self.registered < full.min(self.keys.len()) {
            pool.register(self.blocks[self.registered], self.keys[self.registered]);
            self.registered += 1;
        }
    }

    /// Ends a run: every computed block is named and given back, the last one first, so that it is evicted first.
    pub(crate) fn release(&mut self, pool: &mut BlockPool, model: ModelId, kv: KvType) {
        self.keys(model, kv);
        self.register(pool);
        self.blocks.drain(..).rev().for_each(|id| pool.release(id));
        self.table = Arc::new([]);
        (self.computed, self.pending, self.registered, self.run) = (0, 0, 0, 0);
        self.guessed.clear();
        self.draft.begin(0);
    }

    /// Its blocks, as programs take them.
    pub(crate) fn table(&mut self) -> Arc<[u32]> {
        if self.table.len() != self.blocks.len() {
            self.table = self.blocks.as_slice().into();
        }
        self.table.clone()
    }

    /// What the device needs to choose the token at `position`.
    fn spec(&self, position: usize, mask: Option<Arc<[u32]>>) -> SampleSpec {
        let counts = self.counts.as_ref().map(|c| c.counts.clone()).unwrap_or_default();
        let sampling = self.sampling.clone();
        SampleSpec { sampling, position: position as u32, counts, mask }
    }

    /// The next `rows` rows of what is known, or the one of a token on its way, and then `guesses`, as far as they follow the
    /// grammar: under way from here on.
    pub(crate) fn segment(
        &mut self,
        slot: usize,
        rows: usize,
        mut guesses: Vec<u32>,
    ) -> Result<Segment, GrammarError> {
        let start = self.computed;
        let mut masks = Vec::new();
        if let Some(grammar) = self.masks.as_mut().filter(|_| start + rows >= self.tokens.len()) {
            masks = grammar.allowed(&guesses)?;
            guesses.truncate(masks.len() - 1);
        }
        let prompt = start < self.prompt;
        let input = match self.tokens.get(start..start + rows) {
            Some(known) => Input::Ids([known, &guesses].concat()),
            None => Input::LastSampled,
        };
        self.computed += rows;
        let want = if self.computed < self.tokens.len() {
            Want::Nothing
        } else {
            self.pending += 1;
            let masks = masks.into_iter().map(Some).chain(std::iter::repeat(None));
            let places = self.computed..=self.computed + guesses.len();
            Want::Sample(places.zip(masks).map(|(at, mask)| self.spec(at, mask)).collect())
        };
        self.computed += guesses.len();
        self.guessed = guesses;
        Ok(Segment { slot: slot as u32, start: start as u32, prompt, input, blocks: self.table(), want })
    }

    /// Takes what was sampled behind the last token and behind each guess, as far as they were right. Says how many tokens
    /// that gave, and if the last one was the last of all.
    pub(crate) fn accept(
        &mut self,
        sampled: Vec<Sampled>,
        vocabulary: &Vocabulary,
    ) -> (usize, Option<Result<Finish, GrammarError>>) {
        self.pending -= 1;
        let guessed = std::mem::take(&mut self.guessed);
        let (mut taken, mut end) = (0, None);
        for sampled in sampled {
            let id = sampled.id;
            end = self.push(sampled, vocabulary);
            if end.is_some() || guessed.get(taken) != Some(&id) {
                taken += 1;
                break;
            }
            taken += 1;
        }
        if !guessed.is_empty() {
            // What was computed behind a wrong guess is computed again, in the same place.
            self.computed = self.tokens.len() - 1;
        }
        (taken, end)
    }

    /// Takes the next token: its event goes to the outbox. Says if it was the last one.
    fn push(&mut self, sampled: Sampled, vocabulary: &Vocabulary) -> Option<Result<Finish, GrammarError>> {
        let Sampled { id, logprobs } = sampled;
        self.tokens.push(id);
        if let Some(counts) = &mut self.counts {
            counts.add(id, 1);
        }
        // Matrices may have rows past the last token: no text, and no way to go on from it elsewhere.
        if id >= vocabulary.size() || (!self.ignore_eos && vocabulary.is_end(id)) {
            return Some(Ok(Finish::Stop));
        }
        let done = match self.masks.as_mut().map(|masks| masks.take(id)).transpose() {
            Ok(done) => done.unwrap_or(false),
            Err(error) => return Some(Err(error)),
        };
        let candidate = |(id, logprob)| Candidate { id, logprob, bytes: vocabulary.bytes(id) };
        let logprob = logprobs.map(|(chosen, top)| Logprob {
            chosen: candidate((id, chosen)),
            top: top.into_iter().map(candidate).collect(),
        });
        let pushed = self.text.push(id);
        let position = (self.tokens.len() - self.prompt - 1) as u32;
        self.outbox.events.push_back(Event::Token(Token { position, id, text: pushed.text, logprob }));
        if pushed.stopped || done {
            return Some(Ok(Finish::Stop));
        }
        (self.tokens.len() >= self.limit).then_some(Ok(Finish::Length))
    }

    /// The last event.
    pub(crate) fn finish(&mut self, reason: Finish) {
        let usage = Usage {
            prompt_tokens: self.prompt as u32,
            cached_tokens: self.cached.unwrap_or(0),
            output_tokens: (self.tokens.len() - self.prompt) as u32,
        };
        self.outbox.events.push_back(Event::Finished { reason, text: self.text.finish(), usage });
    }
}

/// Events that the reader has not taken yet.
#[derive(Debug)]
pub(crate) struct Outbox {
    pub(crate) sink: Sender<Event>,
    pub(crate) events: VecDeque<Event>,
}

/// What became of an outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Nothing is left in it.
    Empty,
    /// The reader is behind.
    Full,
    /// The reader is gone.
    Closed,
}

impl Outbox {
    /// Sends what there is room for.
    pub(crate) fn flush(&mut self) -> Flushed {
        while let Some(event) = self.events.pop_front() {
            match self.sink.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.events.push_front(event);
                    return Flushed::Full;
                }
                Err(TrySendError::Closed(_)) => return Flushed::Closed,
            }
        }
        if self.sink.is_closed() { Flushed::Closed } else { Flushed::Empty }
    }
}

/// How often each token has occurred, for penalties.
#[derive(Debug)]
struct Counts {
    place: HashMap<u32, usize>,
    counts: Vec<TokenCount>,
}

impl Counts {
    /// None where nothing looks at them.
    fn new(sampling: &Sampling, prompt: &[u32], output: &[u32]) -> Option<Self> {
        let repetition = sampling.repetition_penalty != 1.0;
        if !repetition && sampling.frequency_penalty == 0.0 && sampling.presence_penalty == 0.0 {
            return None;
        }
        let mut counts = Counts { place: HashMap::new(), counts: Vec::new() };
        if repetition {
            prompt.iter().for_each(|&id| counts.add(id, 0));
        }
        output.iter().for_each(|&id| counts.add(id, 1));
        Some(counts)
    }

    fn add(&mut self, id: u32, times: u32) {
        let place = *self.place.entry(id).or_insert_with(|| {
            self.counts.push(TokenCount { id, in_output: 0 });
            self.counts.len() - 1
        });
        self.counts[place].in_output += times;
    }
}
