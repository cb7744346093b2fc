//! Who waits, and which node takes whom.
use super::{Phase, Request, Run, Scheduler};
use crate::pool::{Bring, Place, Refusal, Search};
use crate::serving::Prediction;
use crate::{FailureKind, ModelId, NodeId, Output, RequestId, Time, ToNode};
use std::cmp::Reverse;

/// Requests that are counted as waiting before one, at most.
const AHEAD_MAX: usize = 256;

impl Scheduler {
    pub(super) fn enqueue(&mut self, id: RequestId) {
        let Some(request) = self.requests.get(&id) else { return };
        let turn = (Reverse(request.ask.priority), id);
        if self.waiting.entry(request.ask.model).or_default().insert(turn) {
            self.waiting_total += 1;
        }
    }

    pub(super) fn dequeue(&mut self, id: RequestId) {
        let Some(request) = self.requests.get(&id) else { return };
        let Some(turns) = self.waiting.get_mut(&request.ask.model) else { return };
        if turns.remove(&(Reverse(request.ask.priority), id)) {
            self.waiting_total -= 1;
        }
        if turns.is_empty() {
            self.waiting.remove(&request.ask.model);
        }
    }

    /// Takes a request off its node, if it is on one, and lets it wait.
    pub(super) fn requeue(&mut self, now: Time, id: RequestId, until: Option<Time>) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if let Phase::Running(run) = &request.phase {
            self.pool.release(now, run.node, &request.ask, run.queued);
            request.ask.attempt += 1;
        }
        request.phase = Phase::Waiting { until };
        self.enqueue(id);
        self.arm(id);
    }

    /// Gives a waiting request to the best node, lets it wait, or ends it. True if it still waits.
    pub(super) fn place(&mut self, now: Time, id: RequestId) -> bool {
        let Some(request) = self.requests.get(&id) else { return false };
        let Phase::Waiting { until } = request.phase else { return false };
        if until.is_some_and(|until| now < until) {
            return true;
        }
        if request.tried.len() >= self.limits.attempts_max as usize {
            let reason = request.trouble.clone().unwrap_or_default();
            let message = format!("{} nodes failed; the last: {reason}", request.tried.len());
            self.end_failed(now, id, FailureKind::Internal, message);
            return false;
        }
        let place = self.search(now, id, None);
        let Some(request) = self.requests.get_mut(&id) else { return false };
        match place {
            Place::On(node, predicted) => {
                self.start(now, id, node, predicted);
                false
            }
            Place::Wait(until) => {
                request.orphaned = None;
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
        let left = request.ask.max_tokens.saturating_sub(request.ask.output.len() as u32);
        let tried: Vec<NodeId> = request.tried.iter().copied().chain(not_on).collect();
        let search = Search {
            now,
            policy: self.policy.as_ref(),
            tried: &tried,
            numerics: request.numerics.as_deref(),
            expected_output: left.min(self.expected_output as u32),
            keys: &request.keys,
            draw,
            ahead: self.ahead(id, request),
        };
        self.pool.place(&request.ask, &search)
    }

    /// How many wait for the same model before this request; counted up to a bound, beyond which it makes no difference.
    fn ahead(&self, id: RequestId, request: &Request) -> usize {
        let turn = (Reverse(request.ask.priority), id);
        let waiting = self.waiting.get(&request.ask.model);
        waiting.map_or(0, |turns| turns.range(..turn).take(AHEAD_MAX).count())
    }

    /// Random bits.
    fn draw(&mut self) -> u64 {
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
                (FailureKind::Internal, format!("{trouble}; no other node can go on with it"))
            }
            (Refusal::NoModel, None) => {
                let why = request.map(|r| self.pool.bring(now, r.ask.model, &self.limits, &|_| false));
                let why = why.and_then(|bring| if let Bring::Never(why) = bring { Some(why) } else { None });
                (FailureKind::NoModel, why.unwrap_or_else(|| "no node holds this model".into()))
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
        }
    }

    fn start(&mut self, now: Time, id: RequestId, node: NodeId, predicted: Prediction) {
        self.dequeue(id);
        let Some(request) = self.requests.get_mut(&id) else { return };
        let tokens = (request.ask.prompt.len() + request.ask.output.len()) as u64;
        let queued = tokens.saturating_sub(predicted.cached);
        self.pool.take(now, node, &request.ask, queued);
        (request.bereft, request.orphaned) = (false, None);
        request.phase = Phase::Running(Run {
            node,
            sent: now,
            predicted,
            queued,
            first: None,
            last: now,
            tokens: 0,
            stalls: 0,
            held_up: request.reader_behind,
        });
        let mut ask = request.ask.clone();
        ask.deadline = request.deadline.map(|at| at.since(now));
        self.outputs.push_back(Output::Send { node, message: ToNode::Generate(ask) });
        self.arm(id);
    }

    /// Looks again at who waits for a model: at all, where a node is gone and some may have to be told so; else
    /// until there is no more room.
    pub(super) fn retry(&mut self, now: Time, model: ModelId, all: bool) {
        let Some(turns) = self.waiting.get(&model) else { return };
        let ids: Vec<RequestId> = turns.iter().take(if all { usize::MAX } else { 8 }).map(|t| t.1).collect();
        for id in ids {
            if self.place(now, id) && !all {
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
