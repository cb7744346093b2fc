//! The generations of one request, read as one, in the parts that answers are made of.
use super::parts::{Ending, Next, Said};
use super::stats::Counted;
use super::stopped::StopWatch;
use super::voice::Voice;
use crate::driver::{Cost, Generation, NO_TOKEN};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::time::{Instant, Sleep, sleep_until};
use weir_scheduler::{Event, Failure, FailureKind, Token, Usage};

/// Generations under way, by choice. Dropping it cancels what still runs.
pub(super) struct Running {
    choices: Vec<Option<Generation>>,
    /// Who makes parts of text, by choice.
    voices: Vec<Voice>,
    /// Whether a choice has called tools.
    calls: Vec<bool>,
    /// What is to be told before anything else: a last part came with the end.
    end: Option<(usize, Next)>,
    open: usize,
    /// Whose turn it is: no choice starves the others.
    next: usize,
    first_request: u64,
    nodes: Vec<Arc<str>>,
    /// Of what has ended.
    cost: Cost,
    /// When the first event must have come; none once it has.
    first_by: Option<Pin<Box<Sleep>>>,
    counted: Counted,
    /// For those who want to know at which stop string the only choice ended.
    watch: Option<StopWatch>,
}

impl Running {
    /// At least one generation. If nothing has come of any by `first_by`, all are cancelled, and that is the event.
    pub(super) fn new(choices: Vec<Generation>, first_by: Option<Instant>, counted: Counted) -> Running {
        Running {
            open: choices.len(),
            next: 0,
            first_request: choices.first().map_or(0, |g| g.id.0),
            nodes: Vec::new(),
            cost: Cost::default(),
            voices: vec![Voice::default(); choices.len()],
            calls: vec![false; choices.len()],
            end: None,
            first_by: first_by.map(|at| Box::pin(sleep_until(at))),
            choices: choices.into_iter().map(Some).collect(),
            counted,
            watch: None,
        }
    }

    /// The same, whose choices speak with these voices.
    pub(super) fn voiced(self, voices: Vec<Voice>) -> Running {
        Running { voices, ..self }
    }

    /// The same, which tells at what stop string its only choice ended.
    pub(super) fn watched(self, watch: Option<StopWatch>) -> Running {
        Running { watch, ..self }
    }

    /// What comes next and its choice; none when every choice has ended.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<(usize, Next)>> {
        if let Some(end) = self.end.take() {
            return Poll::Ready(Some(end));
        }
        while self.open > 0 {
            let (choice, event) = match self.poll_event(cx) {
                Poll::Ready(event) => event,
                Poll::Pending => return Poll::Pending,
            };
            if let Some(next) = self.told(choice, event) {
                return Poll::Ready(Some((choice, next)));
            }
        }
        Poll::Ready(None)
    }

    /// What an event says; none for one that says nothing.
    fn told(&mut self, choice: usize, event: Event) -> Option<Next> {
        match event {
            Event::Token(token) => {
                self.counted.token();
                self.watch.iter_mut().for_each(|watch| watch.take(&token));
                let said = self.said(choice, token);
                self.calls[choice] |= said.calls();
                (!said.is_empty()).then_some(Next::Said(said))
            }
            Event::Finished { reason, text, usage } => {
                let word = self.close(choice);
                if self.open == 0 {
                    self.counted.done();
                }
                self.counted.finished(&usage);
                let mut parts = self.voices[choice].say(text);
                parts.extend(self.voices[choice].end());
                let said = Said { parts, ..Said::default() };
                self.calls[choice] |= said.calls();
                let ending = match Ending::of(reason, word, self.calls[choice]) {
                    Ending::Stop => match self.watch.as_ref().and_then(|watch| watch.found(&usage)) {
                        Some(stop) => Ending::StopString(stop),
                        None => Ending::Stop,
                    },
                    other => other,
                };
                let end = Next::Finished { ending, usage };
                if said.is_empty() {
                    return Some(end);
                }
                self.end = Some((choice, end));
                Some(Next::Said(said))
            }
            Event::Failed(failure) => {
                self.close(choice);
                self.counted.failed(failure.kind);
                Some(Next::Failed(failure))
            }
        }
    }

    fn said(&mut self, choice: usize, token: Token) -> Said {
        let voice = &mut self.voices[choice];
        if token.id != NO_TOKEN {
            return Said { parts: voice.say(token.text), logprob: token.logprob, ..Said::default() };
        }
        // An upstream tells parts apart itself.
        let extra = self.choices[choice].as_ref().and_then(|generation| generation.extra(token.position));
        let mut said = Said::of_upstream(token.text, extra.unwrap_or_default());
        said.parts.splice(0..0, voice.end());
        said
    }

    /// A choice has ended: an upstream's own word for why.
    fn close(&mut self, choice: usize) -> Option<String> {
        let generation = self.choices[choice].take()?;
        for node in generation.nodes() {
            if !self.nodes.contains(&node) {
                self.nodes.push(node);
            }
        }
        let cost = generation.cost();
        self.cost.nano_usd = self.cost.nano_usd.saturating_add(cost.nano_usd);
        self.cost.estimated |= cost.estimated;
        self.open -= 1;
        generation.finish()
    }

    /// The next event and its choice; one is open.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<(usize, Event)> {
        for turn in 0..self.choices.len() {
            let choice = (self.next + turn) % self.choices.len();
            let Some(generation) = &mut self.choices[choice] else { continue };
            let Poll::Ready(event) = generation.events.poll_recv(cx) else { continue };
            let event = event.unwrap_or_else(|| {
                Event::Failed(Failure {
                    kind: FailureKind::Internal,
                    message: "the generation ended without an answer".into(),
                })
            });
            self.next = choice + 1;
            self.first_by = None;
            return Poll::Ready((choice, event));
        }
        if self.first_by.as_mut().is_some_and(|late| late.as_mut().poll(cx).is_ready()) {
            self.abandon();
            self.counted.failed(FailureKind::Deadline);
            let message = "no token came within the time that weir.ttft_ms allows".into();
            return Poll::Ready((0, Event::Failed(Failure { kind: FailureKind::Deadline, message })));
        }
        Poll::Pending
    }

    /// Number of choices, ended ones included.
    pub(super) fn count(&self) -> usize {
        self.choices.len()
    }

    /// Whether every choice has ended, and been told.
    pub(super) fn ended(&self) -> bool {
        self.open == 0 && self.end.is_none()
    }

    /// The number of the request that made the first choice.
    pub(super) fn first_request(&self) -> u64 {
        self.first_request
    }

    /// The nodes that took part in what has ended.
    pub(super) fn nodes(&self) -> &[Arc<str>] {
        &self.nodes
    }

    /// What that which has ended cost.
    pub(super) fn cost(&self) -> Cost {
        self.cost
    }

    /// Cancels what still runs.
    pub(super) fn abandon(&mut self) {
        self.choices.iter_mut().for_each(|c| *c = None);
        self.end = None;
        self.open = 0;
    }
}

/// Usage of a request: each prompt counts once, however many answers it has.
#[derive(Clone, Debug, Default)]
pub(super) struct Total {
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) output_tokens: u64,
    /// Answers to one prompt.
    n: usize,
    counted: Vec<bool>,
}

impl Total {
    /// Of `prompts` prompts with `n` answers each.
    pub(super) fn new(prompts: usize, n: usize) -> Total {
        Total { n, counted: vec![false; prompts], ..Total::default() }
    }

    /// Adds what `choice` took.
    pub(super) fn add(&mut self, choice: usize, usage: &Usage) {
        self.output_tokens += u64::from(usage.output_tokens);
        if !std::mem::replace(&mut self.counted[choice / self.n], true) {
            self.prompt_tokens += u64::from(usage.prompt_tokens);
            self.cached_tokens += u64::from(usage.cached_tokens);
        }
    }
}
