//! Guests are checked now and then: a node of ours says how likely it finds some of their greedy tokens.
//!
//! A check is an ordinary request, private and in the background: after the prompt and the guest's tokens up to a
//! position, what are the likeliest next ones? So the guest's own text is what it is measured by, token for token, and a
//! near tie that fell the other way costs it nothing later on.
use super::{Phase, Request, Scheduler};
use crate::policy::Terms;
use crate::{Event, Generate, NodeId, Output, PRIVATE, Priority, RequestId, Sampling, Time, Token};
use std::collections::BTreeMap;
use std::time::Duration;

/// Tokens of a request that are checked.
const POSITIONS: u64 = 3;
/// Candidates that the checker names: as many as can be asked for.
const CANDIDATES: u8 = 20;
/// A token whose log-probability is so far below the likeliest one's is none that an honest node chooses.
const FAR: f32 = 3.0;
/// What each token that is not far off makes up for, of one that is.
const REDEEMS: f64 = 0.25;
/// So many tokens far off, less what others made up for, refute a guest.
const REFUTED: f64 = 3.0;
/// Checks under way, and guests remembered, at most.
const CHECKS_MAX: usize = 64;
const REMEMBERED_MAX: usize = 4096;
/// A check that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Audit {
    checks: BTreeMap<RequestId, Check>,
    so_far: u64,
    /// Tokens far off, by the guest's identity.
    suspicion: BTreeMap<u64, f64>,
}

/// Whose token is checked, and which it is.
#[derive(Debug)]
struct Check {
    guest: u64,
    token: u32,
}

impl Audit {
    pub fn is_refuted(&self, guest: u64) -> bool {
        self.suspicion.get(&guest).is_some_and(|s| *s >= REFUTED)
    }

    /// Checks under way.
    pub fn len(&self) -> usize {
        self.checks.len()
    }

    /// A check has ended, one way or another.
    pub fn ended(&mut self, id: RequestId) {
        self.checks.remove(&id);
    }
}

impl Scheduler {
    /// A node finished a request: perhaps it is to be checked.
    pub(super) fn consider_check(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.get(&id) else { return };
        let Phase::Running(run) = &request.phase else { return };
        let (ask, tokens) = (&request.ask, u64::from(run.tokens));
        let Some(guest) = self.pool.guest(run.node).filter(|_| is_greedy(&ask.sampling) && tokens > 0) else {
            return;
        };
        if id.is_own()
            || request.changed
            || self.audit.len() >= CHECKS_MAX
            || !self.pool.is_held_by_us(ask.model)
        {
            return;
        }
        if !self.draw().is_multiple_of(u64::from(self.limits.check_one_in.max(1))) {
            return;
        }
        let Some(Request { ask, .. }) = self.requests.get(&id) else { return };
        let terms = Terms::of(ask);
        let (model, prompt, output, salt) = (ask.model, ask.prompt.clone(), ask.output.clone(), ask.salt);
        let first = output.len() as u64 - tokens.min(output.len() as u64);
        for _ in 0..POSITIONS.min(tokens) {
            let at = (first + self.draw() % tokens) as usize;
            self.audit.so_far += 1;
            let check = RequestId(RequestId::OWN | self.audit.so_far);
            self.audit.checks.insert(check, Check { guest, token: output[at] });
            let known = [prompt.as_slice(), &output[..at]].concat();
            self.submit_on(
                now,
                Box::new(Generate {
                    request: check,
                    sampling: Sampling { logprobs: Some(CANDIDATES), ..Sampling::default() },
                    ignore_eos: true,
                    priority: Priority::Background,
                    deadline: Some(PATIENCE),
                    salt,
                    tags: vec![(PRIVATE.into(), String::new())],
                    ..Generate::new(model, known, 1)
                }),
                Some(Box::new(terms.clone())),
            );
        }
    }

    /// What a node of ours says where the guest said something.
    pub(super) fn judge(&mut self, now: Time, id: RequestId, said: &Token) {
        let Some(Check { guest, token }) = self.audit.checks.remove(&id) else { return };
        let Some(likely) = said.logprob.as_ref().map(|logprob| &logprob.top) else { return };
        let (Some(best), Some(last)) = (likely.first(), likely.last()) else { return };
        // One that isn't named is no likelier than the last that is.
        let its = likely.iter().find(|candidate| candidate.id == token).unwrap_or(last);
        let far = best.logprob - its.logprob > FAR;
        let known = self.audit.suspicion.contains_key(&guest);
        if !known && (!far || self.audit.suspicion.len() >= REMEMBERED_MAX) {
            return;
        }
        let suspicion = self.audit.suspicion.entry(guest).or_insert(0.0);
        *suspicion += if far { 1.0 } else { -REDEEMS };
        if *suspicion <= 0.0 {
            self.audit.suspicion.remove(&guest);
        } else if *suspicion >= REFUTED {
            for node in self.pool.with_identity(guest) {
                self.refuse(now, node);
            }
        }
    }

    /// A guest that has been refuted gets nothing any more.
    pub(super) fn refuse(&mut self, now: Time, node: NodeId) {
        let reason = "a node of ours finds the tokens of this guest too unlikely, again and again".to_owned();
        self.lost(now, node, &reason);
        self.outputs.push_back(Output::Disconnect { node, reason, refuted: true });
    }

    /// An event of a request, for whoever asked: perhaps that was us.
    pub(super) fn emit(&mut self, now: Time, id: RequestId, event: Event) {
        if id.is_own() {
            match &event {
                Event::Token(token) => self.judge(now, id, token),
                _ => self.audit.ended(id),
            }
        }
        self.outputs.push_back(Output::Emit { request: id, event });
    }
}

/// Whether the likeliest token is always the one.
fn is_greedy(sampling: &Sampling) -> bool {
    let Sampling { temperature, repetition_penalty, frequency_penalty, presence_penalty, logit_bias, .. } =
        sampling;
    *temperature == 0.0
        && *repetition_penalty == 1.0
        && *frequency_penalty == 0.0
        && *presence_penalty == 0.0
        && logit_bias.is_empty()
}
