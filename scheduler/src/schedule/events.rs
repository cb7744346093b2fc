//! What nodes say of requests.
use super::{KEYS_MAX, Phase, Run, Scheduler};
use crate::pool::BUSY_PAUSE;
use crate::{
    BLOCK_TOKENS, BlockKey, Event, Failure, FailureKind, KvType, NodeId, RequestId, Time, Token, chain,
};

impl Scheduler {
    pub(super) fn event(&mut self, now: Time, node: NodeId, id: RequestId, attempt: u32, event: Event) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let speaks = |run: &Run| (run.node, run.attempt) == (node, attempt);
        let run = match (&mut request.phase, &mut request.rival) {
            (Phase::Running(run), _) if speaks(run) => run,
            (_, Some(rival)) if speaks(rival) => rival,
            _ => return,
        };
        run.last = now;
        run.stalls = 0;
        let tokens = u64::from(matches!(event, Event::Token(_)));
        self.pool.progressed(now, node, request.ask.model, tokens);
        match event {
            Event::Token(token) => {
                self.wins(now, id, node);
                self.token(now, id, token);
            }
            Event::Finished { .. } => {
                self.wins(now, id, node);
                self.note_finish(now, id, &event);
                self.consider_check(now, id);
                self.end(now, id, event);
            }
            Event::Failed(failure) => self.node_failed(now, node, id, failure),
        }
    }

    fn token(&mut self, now: Time, id: RequestId, token: Token) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Phase::Running(run) = &mut request.phase else { return };
        let next = request.ask.output.len() as u64;
        if u64::from(token.position) < next {
            return;
        }
        if u64::from(token.position) > next || next >= u64::from(request.ask.max_tokens) {
            let reason = format!("a node sent token {} where {next} was due", token.position);
            let node = run.node;
            self.pool.failed(now, node);
            self.stop_running(now, id);
            return self.displace(now, id, reason);
        }
        if run.first.is_none() {
            run.first = Some(now);
            let observed = now.since(run.sent);
            self.pool.remember(run.node, request.ask.model, &request.keys);
            self.pool.first_token(now, run.node, request.ask.model, run.queued, &run.predicted, observed);
            run.queued = 0;
            if request.numerics.is_none() {
                request.numerics = self.pool.numerics(run.node, request.ask.model).map(str::to_owned);
            }
        }
        run.tokens += 1;
        request.ask.output.push(token.id);
        self.emit(now, id, Event::Token(token));
    }

    fn note_finish(&mut self, now: Time, id: RequestId, event: &Event) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Phase::Running(run) = &mut request.phase else { return };
        if let Event::Finished { usage, .. } = event {
            run.said = usage.prompt_tokens.saturating_add(usage.output_tokens);
        }
        let (node, ask) = (run.node, &request.ask);
        self.pool.worked(now, node);
        if let Event::Finished { usage, .. } = event
            && u64::from(usage.cached_tokens) + (BLOCK_TOKENS as u64) < run.predicted.cached
        {
            // Our reckoning of its cache was wrong.
            self.pool.forget(node, ask.model, &request.keys);
        } else {
            // The next turn of a conversation begins with this one.
            let whole = [ask.prompt.as_slice(), &ask.output].concat();
            let keys: Vec<BlockKey> =
                chain(ask.model, KvType::F16, ask.salt, &whole).take(KEYS_MAX).collect();
            self.pool.remember(node, ask.model, &keys);
        }
        let tokens = request.ask.output.len() as f64;
        if !id.is_own() {
            self.expected_output += 0.1 * (tokens - self.expected_output);
        }
        if let Some(first) = run.first.filter(|_| run.tokens >= 8 && !run.held_up) {
            let pace = run.last.since(first) / (run.tokens - 1);
            self.pool.observe_pace(now, run.node, request.ask.model, &run.predicted, pace);
        }
    }

    fn node_failed(&mut self, now: Time, node: NodeId, id: RequestId, failure: Failure) {
        let Some(model) = self.requests.get(&id).map(|request| request.ask.model) else { return };
        match failure.kind {
            // Of accounts, only our own driver speaks: what it could not write down is no node's fault.
            FailureKind::Invalid
            | FailureKind::Deadline
            | FailureKind::Budget { .. }
            | FailureKind::Rate { .. }
            | FailureKind::Unbooked => return self.end(now, id, Event::Failed(failure)),
            FailureKind::Busy => self.pool.busy(now, node, model),
            FailureKind::NoModel => self.pool.drop_model(node, model),
            FailureKind::Cancelled | FailureKind::Internal | FailureKind::Upstream => {
                self.pool.failed(now, node)
            }
        }
        if self.falls_back(now, id, node, false) {
            return;
        }
        let Some(request) = self.requests.get_mut(&id) else { return };
        match failure.kind {
            FailureKind::Busy if request.busy < self.limits.busy_max => {
                request.busy += 1;
                self.requeue(now, id, Some(now + BUSY_PAUSE));
                self.place(now, id);
            }
            FailureKind::Busy => self.end(now, id, Event::Failed(failure)),
            FailureKind::Upstream => self.displace_by(now, id, failure),
            _ => self.displace(now, id, failure.message),
        }
    }

    /// Takes a request from a node that failed it; it goes on elsewhere, or ends.
    pub(super) fn displace(&mut self, now: Time, id: RequestId, reason: String) {
        self.displace_by(now, id, Failure { kind: FailureKind::Internal, message: reason });
    }

    /// The same; if it ends, it ends by that failure.
    fn displace_by(&mut self, now: Time, id: RequestId, failure: Failure) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if let Phase::Running(run) = &request.phase {
            request.tried.push(run.node);
        }
        if !self.may_go_on(now, id) {
            let message = format!("{}; by the policy nobody else goes on with it", failure.message);
            return self.end_failed(now, id, failure.kind, message);
        }
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.trouble = Some(failure);
        self.requeue(now, id, None);
        self.place(now, id);
    }
}
