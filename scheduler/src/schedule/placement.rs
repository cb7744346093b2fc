//! Who waits, and which node takes whom.
use super::{Phase, Request, Run, Scheduler};
use crate::ledger::{Amount, Lack};
use crate::pool::{Bring, Place, Refusal, Search};
use crate::serving::Prediction;
use crate::{
    Ask, Clock, FailureKind, Generate, ModelId, NodeId, OnLoss, Output, PoolView, RequestId, Time, ToNode,
    Unit,
};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::Duration;

/// Requests that are counted as waiting before one, at most.
const AHEAD_MAX: usize = 256;
/// Times that the predicted wait for a faster node may be exceeded.
const PATIENCE_TIMES: u32 = 4;
/// Whoever takes nothing for longer than this isn't waited for.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Waiting requests that are looked at again as often as the policy likes; more are looked at less often.
const LOOKED_AT: usize = 128;
/// Waiting requests that are looked at when a place is free, at most.
const LOOKED_AT_ONCE: usize = 8;

impl Scheduler {
    pub(super) fn enqueue(&mut self, id: RequestId) {
        let Some(request) = self.requests.get(&id) else { return };
        let turn = (Reverse(request.ask.priority), id);
        let mut is_new = false;
        for model in request.models() {
            is_new |= self.waiting.entry(model).or_default().insert(turn);
        }
        self.waiting_total += usize::from(is_new);
    }

    pub(super) fn dequeue(&mut self, id: RequestId) {
        let Some(request) = self.requests.get(&id) else { return };
        let (turn, mut waited) = ((Reverse(request.ask.priority), id), false);
        for model in request.models() {
            let Some(turns) = self.waiting.get_mut(&model) else { continue };
            waited |= turns.remove(&turn);
            if turns.is_empty() {
                self.waiting.remove(&model);
            }
        }
        self.waiting_total -= usize::from(waited);
    }

    /// Takes a request off its node, if it is on one, and lets it wait.
    pub(super) fn requeue(&mut self, now: Time, id: RequestId, until: Option<Time>) {
        self.drop_rival(now, id);
        let Some(request) = self.requests.get_mut(&id) else { return };
        if let Phase::Running(run) = std::mem::replace(&mut request.phase, Phase::Waiting { until }) {
            let (ask, counted) = (request.ask.clone(), request.tokens_counted);
            request.ask.attempt += 1;
            self.leave(now, &ask, &run, counted);
        }
        self.enqueue(id);
        self.arm(id);
    }

    /// Gives a waiting request to the best node, lets it wait, or ends it. True if it still waits.
    pub(super) fn place(&mut self, now: Time, id: RequestId) -> bool {
        let Some(request) = self.requests.get(&id) else { return false };
        if !matches!(request.phase, Phase::Waiting { .. }) {
            return false;
        }
        if request.tried.len() >= self.limits.attempts_max as usize {
            let (kind, reason) = request
                .trouble
                .as_ref()
                .map_or((FailureKind::Internal, ""), |last| (last.kind, &last.message));
            let message = format!("{} nodes failed; the last: {reason}", request.tried.len());
            self.end_failed(now, id, kind, message);
            return false;
        }
        if let Some(lack) = self.lacks_tokens(now, id) {
            self.end_lacking(now, id, &lack);
            return false;
        }
        let mut place = self.search(now, id, None);
        if !matches!(place, Place::On(..))
            && let Some(other) = self.search_others(now, id, None, &mut place)
        {
            self.change_model(id, other);
        }
        if let Some(why) = self.too_late(now, id, &place) {
            self.end_failed(now, id, FailureKind::Deadline, why);
            return false;
        }
        let Some(request) = self.requests.get_mut(&id) else { return false };
        if let Place::Later(at) = place {
            // Predictions err: whoever has waited for so many times as long takes what there is.
            request.patient_until.get_or_insert(now + at.since(now).saturating_mul(PATIENCE_TIMES));
        }
        match place {
            Place::On(node, predicted) => {
                self.start(now, id, node, predicted);
                false
            }
            Place::Wait(Some(until)) if until.since(now) > PAUSE_MAX => {
                let wait_s = until.since(now).as_secs();
                let message = format!("whoever could take it takes nothing for {wait_s} s; try again later");
                self.end_failed(now, id, FailureKind::Busy, message);
                false
            }
            Place::Wait(_) | Place::Later(_) => {
                let until = place.until();
                request.orphaned = None;
                // The more there are, the less often each is looked at.
                let seldom = u32::try_from(1 + self.waiting_total / LOOKED_AT).unwrap_or(u32::MAX);
                request.look = self.policy.looks_again().map(|after| now + after.saturating_mul(seldom));
                self.requeue(now, id, until);
                self.look_at(now + self.limits.crowded_after);
                true
            }
            Place::Never(Refusal::NoModel | Refusal::Exhausted)
                if self.may_hope(now, id) || self.is_coming(now, id) =>
            {
                self.requeue(now, id, None);
                true
            }
            Place::Never(refusal) => {
                let (kind, message) = self.explain(now, id, refusal);
                self.end_failed(now, id, kind, message);
                false
            }
        }
    }

    /// Why a request that has no token yet had better be refused at once: no node can begin in time, not even if it
    /// were twice as fast as we think.
    fn too_late(&self, now: Time, id: RequestId, place: &Place) -> Option<String> {
        let request = self.requests.get(&id)?;
        let by = request.first_by.into_iter().chain(request.deadline).min()?;
        let soonest = match place {
            Place::On(_, predicted) => predicted.ttft,
            Place::Wait(_) | Place::Later(_) => {
                self.pool.soonest(&request.ask, &request.keys, self.ahead(id, request))?
            }
            // A node would have to load it first.
            Place::Never(Refusal::NoModel) => {
                self.pool.soonest_loaded(now, request.ask.model, request.ask.prompt.len() as u64)?
            }
            Place::Never(_) => return None,
        };
        let left = by.since(now);
        let late = request.ask.output.is_empty() && soonest / 2 > left;
        late.then(|| {
            let (left, soonest) = (left.as_secs_f64(), soonest.as_secs_f64());
            format!("no node can begin within {left:.3} s: the soonest would take about {soonest:.3} s")
        })
    }

    /// Whether a request that no node can take is one that had a node a short while ago.
    fn may_hope(&mut self, now: Time, id: RequestId) -> bool {
        let wait = self.limits.orphan_wait;
        let Some(request) = self.requests.get_mut(&id) else { return false };
        request.bereft && now < *request.orphaned.get_or_insert(now + wait)
    }

    /// Where a request would go now, but for one node.
    pub(super) fn search(&mut self, now: Time, id: RequestId, not_on: Option<NodeId>) -> Place {
        let draw = self.draw();
        let Some(request) = self.requests.get(&id) else { return Place::Wait(None) };
        self.pool.wake(now, request.ask.model);
        let left = request.ask.max_tokens.saturating_sub(request.ask.output.len() as u32);
        let view = if self.policy.looks_at_pool() { self.view(now, request) } else { PoolView::default() };
        let ask = self.seen(now, request);
        let decision = self.policy.begin(&ask, &view);
        let tried: Vec<NodeId> = request.tried.iter().copied().chain(not_on).collect();
        let search = Search {
            now,
            decision: decision.as_ref(),
            breadth: self.policy.breadth(),
            tried: &tried,
            numerics: request.numerics.as_deref(),
            expected_output: left.min(self.expected_output as u32),
            keys: &request.keys,
            first_by: request.first_by.filter(|_| request.ask.output.is_empty()),
            budget: self.ledger.left(&self.accounts(request), Unit::NanoUsd, self.unix_s(now)),
            draw,
            ahead: self.ahead(id, request),
            patient: request.patient_until.is_none_or(|until| now < until),
        };
        self.pool.place(&request.ask, &search)
    }

    /// What policies see of a request.
    fn seen<'a>(&'a self, now: Time, request: &'a Request) -> Ask<'a> {
        let ask = &request.ask;
        let known = if self.policy.looks_at_pool() { self.pool.known_as(request.first) } else { None };
        let (model, model_bytes) = known.unwrap_or_default();
        let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
        let seen = Ask {
            key: self.ledger.name_of(ask.key),
            tags: &ask.tags,
            priority: ask.priority,
            prompt_tokens: count(ask.prompt.len()),
            max_tokens: ask.max_tokens,
            output_tokens: count(ask.output.len()),
            model,
            model_bytes,
            ttft: ask.ttft,
            deadline: request.deadline.map(|at| at.since(now)),
            max_cost: ask.max_cost,
            waited: now.since(request.submitted),
        };
        match &request.terms {
            None => seen,
            Some(terms) => Ask {
                key: self.ledger.name_of(terms.key),
                tags: &terms.tags,
                priority: terms.priority,
                prompt_tokens: terms.prompt_tokens,
                max_tokens: terms.max_tokens,
                ..seen
            },
        }
    }

    /// What policies see of the pool.
    fn view(&self, now: Time, request: &Request) -> PoolView {
        let ask = &request.ask;
        let itself = usize::from(matches!(request.phase, Phase::Waiting { .. }));
        let same = self.waiting.get(&request.first).map_or(0, BTreeSet::len);
        let clock = self.clock.map(|(since, clock)| Clock {
            unix_s: clock.unix_s.saturating_add_unsigned(now.since(since).as_secs()),
            ..clock
        });
        PoolView {
            queue: same.saturating_sub(itself),
            waiting: self.waiting_total.saturating_sub(itself),
            running: self.requests.len() - self.waiting_total,
            clock,
            ..self.pool.view(request.first, ask.priority)
        }
    }

    /// Whether the policy lets another node go on with a request that has tokens and has lost its own.
    pub(super) fn may_go_on(&self, now: Time, id: RequestId) -> bool {
        let Some(request) = self.requests.get(&id).filter(|r| !r.ask.output.is_empty()) else { return true };
        let (view, ask) = (self.view(now, request), self.seen(now, request));
        self.policy.begin(&ask, &view).on_loss() != OnLoss::Fail
    }

    /// Where a request could go now for another of its models, but for one node: which model, if there is one; `place` is
    /// then there. If all that can be done is wait, that is what becomes of `place`.
    pub(super) fn search_others(
        &mut self,
        now: Time,
        id: RequestId,
        not_on: Option<NodeId>,
        place: &mut Place,
    ) -> Option<usize> {
        let others = self.requests.get(&id).map_or(0, |request| request.ask.otherwise.len());
        for other in 0..others {
            self.swap_model(id, other);
            let found = self.search(now, id, not_on);
            self.swap_model(id, other);
            match (&found, &*place) {
                (Place::On(..), _) => {
                    *place = found;
                    return Some(other);
                }
                (Place::Wait(None), Place::Never(_))
                | (Place::Wait(Some(_)) | Place::Later(_), Place::Never(_) | Place::Wait(None)) => {
                    *place = found;
                }
                (
                    Place::Wait(Some(soon)) | Place::Later(soon),
                    Place::Wait(Some(late)) | Place::Later(late),
                ) if soon < late => *place = found,
                _ => {}
            }
        }
        None
    }

    /// The other model changes places with the request's own, for a search: blocks of a cache are a model's.
    fn swap_model(&mut self, id: RequestId, other: usize) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Generate { model, otherwise, .. } = &mut *request.ask;
        std::mem::swap(model, &mut otherwise[other]);
        std::mem::swap(&mut request.keys, &mut request.other_keys);
    }

    /// It goes to a node for another of its models.
    fn change_model(&mut self, id: RequestId, other: usize) {
        self.swap_model(id, other);
        if let Some(request) = self.requests.get_mut(&id) {
            // Its tokens aren't that model's, so no cache has them, and nobody can check them.
            (request.keys, request.other_keys) = (Vec::new(), Vec::new());
            request.changed = true;
        }
    }

    /// How many wait for the same model before this request; counted up to a bound, beyond which it makes no difference.
    fn ahead(&self, id: RequestId, request: &Request) -> usize {
        let turn = (Reverse(request.ask.priority), id);
        let waiting = self.waiting.get(&request.ask.model);
        waiting.map_or(0, |turns| turns.range(..turn).take(AHEAD_MAX).count())
    }

    /// Random bits.
    pub(super) fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn explain(&self, now: Time, id: RequestId, refusal: Refusal) -> (FailureKind, String) {
        let request = self.requests.get(&id);
        let trouble = request.and_then(|r| r.trouble.clone());
        match (refusal, trouble) {
            (Refusal::NoModel | Refusal::Exhausted, Some(trouble)) => {
                (trouble.kind, format!("{}; no other node can go on with it", trouble.message))
            }
            (Refusal::NoModel, None) => {
                let why = request.map(|r| self.pool.bring(now, r.ask.model, &self.limits, &|_| false));
                let why = why.and_then(|bring| if let Bring::Never(why) = bring { Some(why) } else { None });
                (FailureKind::NoModel, why.unwrap_or_else(|| "no node holds this model".into()))
            }
            (Refusal::Exhausted, None) if request.is_some_and(|r| r.ask.grammar.is_some()) => {
                let why = "no node that takes requests for this model now can hold its output to a grammar";
                (FailureKind::NoModel, why.into())
            }
            (Refusal::Exhausted, None) => {
                (FailureKind::NoModel, "no node that holds this model takes requests now".into())
            }
            (Refusal::TooLong { longest }, _) => {
                let tokens = request.map_or(0, |r| r.ask.prompt.len() + r.ask.output.len());
                let message = format!(
                    "the prompt has {tokens} tokens and leaves no room for an answer: the longest context on offer \
                     is {longest}; shorten the prompt"
                );
                (FailureKind::Invalid, message)
            }
            (Refusal::Policy(reason), _) => {
                (FailureKind::Invalid, format!("the policy refuses it: {reason}"))
            }
            (Refusal::Budget { worst, others }, _) => self.too_dear(now, id, worst, &others),
        }
    }

    fn start(&mut self, now: Time, id: RequestId, node: NodeId, predicted: Prediction) {
        self.dequeue(id);
        let run = match self.give(now, id, node, predicted) {
            Ok(run) => run,
            Err(Some(lack)) => return self.end_lacking(now, id, &lack),
            Err(None) => return,
        };
        let Some(request) = self.requests.get_mut(&id) else { return };
        (request.bereft, request.orphaned, request.patient_until) = (false, None, None);
        request.phase = Phase::Running(run);
        self.arm(id);
    }

    /// Sends a request to a node, as the attempt that is due. Nothing is sent if it may take more than an account has left.
    pub(super) fn give(
        &mut self,
        now: Time,
        id: RequestId,
        node: NodeId,
        predicted: Prediction,
    ) -> Result<Run, Option<Lack>> {
        let request = self.requests.get(&id).ok_or(None)?;
        let (ask, price) = (&request.ask, self.pool.price(node));
        let given = (ask.prompt.len() + ask.output.len()) as u64;
        let left = u64::from(ask.max_tokens).saturating_sub(ask.output.len() as u64);
        let prompt_due = if request.tokens_counted > 0 { 0 } else { ask.prompt.len() as u64 };
        let worst = self.pool.node(node).map_or(Amount::default(), |node| Amount {
            nano_usd: node.worst(given, left),
            tokens: node.worst_prompt(prompt_due).saturating_add(left),
        });
        let (accounts, unix_s) = (self.accounts(request), self.unix_s(now));
        let entries = self.ledger.reserve((ask.key, id, ask.attempt), &accounts, worst, unix_s)?;
        if !entries.is_empty() {
            self.outputs.push_back(Output::Reserved { request: id, attempt: ask.attempt, entries });
        }
        let queued = given.saturating_sub(predicted.cached);
        self.pool.take(now, node, ask, queued);
        let run = Run {
            node,
            attempt: ask.attempt,
            price,
            sent: now,
            hedge_at: None,
            given,
            predicted,
            queued,
            first: None,
            last: now,
            tokens: 0,
            stalls: 0,
            held_up: request.reader_behind,
            said: 0,
            stopped: false,
        };
        let mut ask = request.ask.clone();
        ask.deadline = request.deadline.map(|at| at.since(now));
        let hedge_at = self.hedge_at(&ask, request.first_by, &run);
        self.outputs.push_back(Output::Send { node, message: ToNode::Generate(ask) });
        Ok(Run { hedge_at, ..run })
    }

    /// Looks again at who waits for a model: at all, where a node is gone and some may have to be told so; else at the
    /// first few, as long as there is room: the place that one can't take may be another's.
    pub(super) fn retry(&mut self, now: Time, model: ModelId, all: bool) {
        let Some(turns) = self.waiting.get(&model) else { return };
        let most = if all { usize::MAX } else { LOOKED_AT_ONCE };
        let ids: Vec<RequestId> = turns.iter().take(most).map(|t| t.1).collect();
        for id in ids {
            if self.place(now, id) && !all && !self.pool.has_room(model) {
                break;
            }
        }
    }

    /// The same for all models of a node that has more to offer than before.
    pub(super) fn retry_all(&mut self, now: Time, node: NodeId) {
        for model in self.pool.models_of(node) {
            self.retry(now, model, true);
        }
    }
}
