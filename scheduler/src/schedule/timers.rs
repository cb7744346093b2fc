//! What time brings: deadlines, silence, stalls.
use super::{Phase, Request, Run, Scheduler, Timer};
use crate::pool::Place;
use crate::{FailureKind, NodeId, Output, RequestId, Time};

impl Scheduler {
    /// When a request needs a look.
    fn due(&self, request: &Request) -> Option<Time> {
        let by_phase = match &request.phase {
            Phase::Waiting { until } => [*until, request.orphaned, request.look].into_iter().flatten().min(),
            Phase::Running(_) if request.reader_behind => None,
            Phase::Running(run) => {
                let hedge_at = run.hedge_at.filter(|_| run.first.is_none()).unwrap_or(Time(u64::MAX));
                let heard = run.last.max(self.pool.progress(run.node, request.ask.model)).max(self.excused);
                Some(hedge_at.min(heard + run.patience(&self.limits)))
            }
        };
        [by_phase, request.deadline].into_iter().flatten().min()
    }

    /// Sees to it that a request's timer isn't later than it must be. A timer that is too early is put off when it
    /// goes off, so that a token doesn't cost a change of timers.
    pub(super) fn arm(&mut self, id: RequestId) {
        let Some(request) = self.requests.get(&id) else { return };
        let Some(due) = self.due(request) else { return };
        if request.timer.is_some_and(|at| at <= due) {
            return;
        }
        if let Some(at) = request.timer {
            self.timers.remove(&(at, Timer::Request(id)));
        }
        self.timers.insert((due, Timer::Request(id)));
        if let Some(request) = self.requests.get_mut(&id) {
            request.timer = Some(due);
        }
    }

    pub(super) fn tick(&mut self, now: Time) {
        if self.wake_at().is_some_and(|due| now.since(due) > self.limits.suspect_after / 2) {
            self.excused = now;
        }
        while let Some((at, timer)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.remove(&(at, timer));
            match timer {
                Timer::Request(id) => self.request_due(now, id),
                Timer::Node(id) => self.node_due(now, id),
                Timer::Residency => self.residency_due(now),
            }
        }
    }

    fn node_due(&mut self, now: Time, id: NodeId) {
        let Some(node) = self.pool.node(id) else { return };
        let heard = node.heard.max(self.excused);
        let suspected = heard + self.limits.suspect_after;
        if now < suspected {
            self.timers.insert((suspected, Timer::Node(id)));
            return;
        }
        let lost = heard + self.limits.lost_after;
        if now < lost {
            // Perhaps it comes back; but those who can go on elsewhere needn't wait for that.
            self.pool.suspect(now, id);
            self.vacate(now, id);
            self.timers.insert((lost.min(now + self.limits.suspect_after), Timer::Node(id)));
            return;
        }
        let reason = format!("not heard of for {} s", now.since(node.heard).as_secs());
        self.lost(now, id, &reason);
        self.outputs.push_back(Output::Disconnect { node: id, reason, refuted: false });
    }

    fn request_due(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.timer = None;
        if request.deadline.is_some_and(|deadline| deadline <= now) {
            self.stop_running(now, id);
            return self.end_failed(now, id, FailureKind::Deadline, "its deadline passed".into());
        }
        let slow = |run: &Run| run.first.is_none() && run.hedge_at.is_some_and(|at| at <= now);
        if matches!(&request.phase, Phase::Running(run) if slow(run)) {
            self.hedge(now, id);
        }
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.look = None;
        let Some(request) = self.requests.get(&id) else { return };
        match &request.phase {
            Phase::Running(run) if self.due(request).is_some_and(|due| due <= now) => {
                let node = run.node;
                self.stalled(now, id, node);
            }
            Phase::Running(_) => {}
            Phase::Waiting { .. } => {
                self.place(now, id);
            }
        }
        self.arm(id);
    }

    /// Nothing has come of it for long: it goes on elsewhere, if there is room right now.
    fn stalled(&mut self, now: Time, id: RequestId, node: NodeId) {
        let reason = format!("node {} made no progress", self.node_name(node));
        let mut elsewhere = self.search(now, id, Some(node));
        if !matches!(elsewhere, Place::On(..)) {
            self.search_others(now, id, Some(node), &mut elsewhere);
        }
        let may_move = matches!(elsewhere, Place::On(..)) && self.may_go_on(now, id);
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Phase::Running(run) = &mut request.phase else { return };
        run.stalls += 1;
        run.last = now;
        if request.rival.is_some() {
            self.pool.failed(now, node);
            self.falls_back(now, id, node, true);
        } else if may_move {
            self.pool.failed(now, node);
            self.stop_running(now, id);
            self.displace(now, id, reason);
        } else if run.stalls >= self.limits.stalls_max && !self.pool.is_provider(node) {
            self.stop_running(now, id);
            let message = format!("{reason} for long; no other node can go on with it");
            self.end_failed(now, id, FailureKind::Internal, message);
        }
    }
}
