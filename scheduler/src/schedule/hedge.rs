//! Requests that somebody watches and that are slow to begin: another node with room to spare tries, too.
use super::{Phase, Run, Scheduler};
use crate::pool::Place;
use crate::{Generate, NodeId, Output, Priority, RequestId, Time, ToNode};

impl Scheduler {
    /// When a request given to a node at `sent` counts as slow.
    pub(super) fn hedge_at(&self, ask: &Generate, first_by: Option<Time>, run: &Run) -> Option<Time> {
        if ask.priority != Priority::Interactive {
            return None;
        }
        let slow = run.predicted.ttft.saturating_mul(self.limits.hedge_times).max(self.limits.hedge_min);
        // Half of the time that a client gives, so that the other half is enough for another node.
        let half = first_by.map(|by| by.since(run.sent) / 2);
        Some(run.sent + half.map_or(slow, |half| half.min(slow)))
    }

    /// Gives a slow request to another node with room to spare, beside the one that has it.
    pub(super) fn hedge(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Phase::Running(run) = &mut request.phase else { return };
        run.hedge_at = None;
        let (node, model) = (run.node, request.ask.model);
        if request.rival.is_some() || request.reader_behind {
            return;
        }
        let Place::On(elsewhere, predicted) = self.search(now, id, Some(node)) else { return };
        if elsewhere == node || !self.pool.has_spare_room(elsewhere, model) {
            return;
        }
        if let Some(request) = self.requests.get_mut(&id) {
            request.ask.attempt += 1;
        }
        let rival = self.give(now, id, elsewhere, predicted);
        if let (Some(request), Ok(rival)) = (self.requests.get_mut(&id), rival) {
            request.rival = Some(Run { hedge_at: None, ..rival });
        }
    }

    /// Ends the run on `node` of a request that runs on another, too, and says whether that is so. `tell`: the node is to
    /// be told.
    pub(super) fn falls_back(&mut self, now: Time, id: RequestId, node: NodeId, tell: bool) -> bool {
        let Some(request) = self.requests.get_mut(&id) else { return false };
        let (Phase::Running(run), Some(rival)) = (&mut request.phase, &mut request.rival) else {
            return false;
        };
        if run.node == node {
            std::mem::swap(run, rival);
        } else if rival.node != node {
            return false;
        }
        let Some(mut lost) = request.rival.take() else { return false };
        lost.stopped |= tell;
        self.let_go(now, id, &lost, tell);
        self.arm(id);
        true
    }

    /// A node was the first to have something: the other, if there is one, is told to stop.
    pub(super) fn wins(&mut self, now: Time, id: RequestId, node: NodeId) {
        let loser = self.requests.get(&id).and_then(|r| r.runs().find(|run| run.node != node));
        if let Some(loser) = loser.map(|run| run.node) {
            self.falls_back(now, id, loser, true);
        }
    }

    pub(super) fn drop_rival(&mut self, now: Time, id: RequestId) {
        if let Some(mut rival) = self.requests.get_mut(&id).and_then(|request| request.rival.take()) {
            rival.stopped = true;
            self.let_go(now, id, &rival, true);
        }
    }

    fn let_go(&mut self, now: Time, id: RequestId, run: &Run, tell: bool) {
        if tell {
            let message = ToNode::Cancel { request: id, attempt: run.attempt };
            self.outputs.push_back(Output::Send { node: run.node, message });
        }
        let Some(request) = self.requests.get(&id) else { return };
        let (ask, counted) = (request.ask.clone(), request.tokens_counted);
        self.leave(now, &ask, run, counted);
    }

    /// A run is over, however it came: its place on the node is free, and what it took is settled.
    /// So many of the request's tokens were settled before.
    pub(super) fn leave(&mut self, now: Time, ask: &Generate, run: &Run, counted: u64) {
        self.pool.release(now, run.node, ask, run.queued);
        self.freed.insert(ask.model);
        self.settle(ask, run, counted);
    }
}
