//! The generations of one request, read as one.
use super::stats::Counted;
use crate::driver::{Cost, Extra, Generation};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::time::{Instant, Sleep, sleep_until};
use weir_scheduler::{Event, Failure, FailureKind, Usage};

/// Generations under way, by choice. Dropping it cancels what still runs.
pub(super) struct Running {
    choices: Vec<Option<Generation>>,
    open: usize,
    /// Whose turn it is: no choice starves the others.
    next: usize,
    first_request: u64,
    nodes: Vec<Arc<str>>,
    /// Of what has ended.
    cost: Cost,
    /// Upstreams' own words for why choices ended.
    words: Vec<Option<String>>,
    /// When the first event must have come; none once it has.
    first_by: Option<Pin<Box<Sleep>>>,
    counted: Counted,
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
            words: vec![None; choices.len()],
            first_by: first_by.map(|at| Box::pin(sleep_until(at))),
            choices: choices.into_iter().map(Some).collect(),
            counted,
        }
    }

    /// The next event and its choice; none when every choice has ended.
    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<(usize, Event)>> {
        if self.open == 0 {
            return Poll::Ready(None);
        }
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
            if !matches!(event, Event::Token(_)) {
                for node in generation.nodes() {
                    if !self.nodes.contains(&node) {
                        self.nodes.push(node);
                    }
                }
                let cost = generation.cost();
                self.cost.nano_usd = self.cost.nano_usd.saturating_add(cost.nano_usd);
                self.cost.estimated |= cost.estimated;
                self.words[choice] = generation.finish();
                self.choices[choice] = None;
                self.open -= 1;
            }
            match event {
                Event::Token(_) => self.counted.token(),
                Event::Finished { .. } if self.open == 0 => self.counted.done(),
                _ => {}
            }
            self.next = choice + 1;
            self.first_by = None;
            return Poll::Ready(Some((choice, event)));
        }
        if self.first_by.as_mut().is_some_and(|late| late.as_mut().poll(cx).is_ready()) {
            self.abandon();
            let message = "no token came within the time that weir.ttft_ms allows".into();
            return Poll::Ready(Some((0, Event::Failed(Failure { kind: FailureKind::Deadline, message }))));
        }
        Poll::Pending
    }

    /// Number of choices, ended ones included.
    pub(super) fn count(&self) -> usize {
        self.choices.len()
    }

    /// Whether every choice has ended.
    pub(super) fn ended(&self) -> bool {
        self.open == 0
    }

    /// The number of the request that made the first choice.
    pub(super) fn first_request(&self) -> u64 {
        self.first_request
    }

    /// The nodes that took part in what has ended.
    pub(super) fn nodes(&self) -> &[Arc<str>] {
        &self.nodes
    }

    /// What came with the text of a choice at a position.
    pub(super) fn extra(&self, choice: usize, position: u32) -> Option<Extra> {
        self.choices[choice].as_ref()?.extra(position)
    }

    /// An upstream's own word for why a choice ended.
    pub(super) fn word(&self, choice: usize) -> Option<String> {
        self.words[choice].clone()
    }

    /// What that which has ended cost.
    pub(super) fn cost(&self) -> Cost {
        self.cost
    }

    /// Cancels what still runs.
    pub(super) fn abandon(&mut self) {
        self.choices.iter_mut().for_each(|c| *c = None);
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
