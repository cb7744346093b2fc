//! The state machine: requests and what nodes say go in, what to send and what to tell clients comes out.
mod placement;
mod residency;

use crate::pool::{BUSY_PAUSE, Place, Pool};
use crate::serving::Prediction;
use crate::{
    BLOCK_TOKENS, BlockKey, Event, Failure, FailureKind, FromNode, Generate, Input, KvType, Limits, Load,
    ModelId, NodeId, NodeView, Output, Policy, Priority, RequestId, Time, ToNode, Token, chain,
};
use residency::Residency;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// Decides where requests go, and sees each through to its end, whatever becomes of nodes.
///
/// The caller passes what happened to [`handle`](Self::handle), then takes from [`poll`](Self::poll) until it is
/// empty and does what it says, in order; and passes [`Input::Tick`] when the time of [`wake_at`](Self::wake_at) has
/// come. `now` never runs backwards.
///
/// For each request: its tokens' positions run from the first one asked for without a gap, none twice, none revised;
/// then comes exactly one `Finished` or `Failed`. What an older attempt still says is not heard.
pub struct Scheduler {
    limits: Limits,
    policy: Box<dyn Policy>,
    pool: Pool,
    requests: BTreeMap<RequestId, Request>,
    /// By model: who waits, most important and then oldest first.
    waiting: BTreeMap<ModelId, BTreeSet<Turn>>,
    waiting_total: usize,
    residency: Residency,
    timers: BTreeSet<(Time, Timer)>,
    outputs: VecDeque<Output>,
    /// Silence before this isn't held against anybody: we weren't listening ourselves.
    excused: Time,
    expected_output: f64,
    /// SplitMix64.
    random: u64,
}

/// Blocks at the beginning of a prompt that are looked for in caches, at most.
const KEYS_MAX: usize = 256;

/// A place in the queue.
type Turn = (Reverse<Priority>, RequestId);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Request(RequestId),
    Node(NodeId),
    Residency,
}

struct Request {
    /// As the next node will get it: `output` grows with what has been delivered.
    ask: Box<Generate>,
    submitted: Time,
    /// Of its prompt's blocks.
    keys: Vec<BlockKey>,
    deadline: Option<Time>,
    phase: Phase,
    /// Nodes that failed it, and what the last of them said.
    tried: Vec<NodeId>,
    trouble: Option<String>,
    numerics: Option<String>,
    busy: u32,
    reader_behind: bool,
    /// Its node was lost.
    bereft: bool,
    /// No other can take it: it fails then.
    orphaned: Option<Time>,
    /// Its entry in `timers`.
    timer: Option<Time>,
}

enum Phase {
    Waiting {
        /// Not before then.
        until: Option<Time>,
    },
    Running(Run),
}

struct Run {
    node: NodeId,
    sent: Time,
    predicted: Prediction,
    /// Prompt tokens in the node's queue on our account; 0 once the first token is here.
    queued: u64,
    first: Option<Time>,
    /// When it was last heard of, or last excused.
    last: Time,
    tokens: u32,
    stalls: u32,
    /// The reader was behind at some time: its pace says nothing of the node.
    held_up: bool,
}

impl Run {
    fn patience(&self, limits: &Limits) -> Duration {
        let expected = if self.first.is_some() { self.predicted.token_time } else { self.predicted.ttft };
        expected.saturating_mul(limits.stall_times).max(limits.stall_min)
    }
}

impl Scheduler {
    /// A scheduler without nodes. From equal seeds and inputs come equal outputs.
    pub fn new(limits: Limits, policy: Box<dyn Policy>, seed: u64) -> Scheduler {
        Scheduler {
            policy,
            pool: Pool::default(),
            requests: BTreeMap::new(),
            waiting: BTreeMap::new(),
            waiting_total: 0,
            residency: Residency::default(),
            timers: BTreeSet::new(),
            outputs: VecDeque::new(),
            excused: Time::ZERO,
            expected_output: f64::from(limits.output_guess),
            limits,
            random: seed,
        }
    }

    /// Takes in what happened.
    pub fn handle(&mut self, now: Time, input: Input) {
        match input {
            Input::Submit(ask) => self.submit(now, ask),
            Input::Cancel(request) => {
                self.stop_running(request);
                self.end_failed(now, request, FailureKind::Cancelled, "the client cancelled it".into());
            }
            Input::Reader { request, behind } => self.reader(now, request, behind),
            Input::Connected { node, profile } => {
                self.pool.profile(now, node, profile);
                self.timers.insert((now + self.limits.suspect_after, Timer::Node(node)));
                self.retry_all(now, node);
                self.look_after_all(now);
            }
            Input::Node { node, from } => self.node_says(now, node, from),
            Input::Broken { node, request, attempt, reason } => {
                self.broken(now, node, request, attempt, reason)
            }
            Input::Lost { node, reason } => self.lost(now, node, &reason),
            Input::Drain { node, on } => {
                self.pool.drain(now, node, on);
                match on {
                    true => self.vacate(now, node),
                    false => self.retry_all(now, node),
                }
            }
            Input::Want { want, model } => self.want(now, want, model),
            Input::Tick => self.tick(now),
        }
    }

    /// What to do next.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Input::Tick`] is due.
    pub fn wake_at(&self) -> Option<Time> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// How much there is of everything.
    pub fn load(&self) -> Load {
        Load {
            nodes: self.pool.len(),
            running: self.requests.len() - self.waiting_total,
            waiting: self.waiting_total,
        }
    }

    /// All nodes, for a person.
    pub fn survey(&self, now: Time) -> Vec<NodeView> {
        self.pool.survey(now)
    }

    fn submit(&mut self, now: Time, ask: Box<Generate>) {
        let request = ask.request;
        assert!(!self.requests.contains_key(&request), "request numbers are used once");
        let entry = Request {
            submitted: now,
            deadline: ask.deadline.map(|left| now + left),
            phase: Phase::Waiting { until: None },
            tried: Vec::new(),
            trouble: None,
            numerics: None,
            busy: 0,
            reader_behind: false,
            bereft: false,
            orphaned: None,
            timer: None,
            keys: chain(ask.model, KvType::F16, ask.salt, &ask.prompt).take(KEYS_MAX).collect(),
            ask,
        };
        self.requests.insert(request, entry);
        self.enqueue(request);
        self.place(now, request);
        if self.waiting_total > self.limits.waiting_max {
            let message = format!("{} requests wait already; try again later", self.limits.waiting_max);
            self.end_failed(now, request, FailureKind::Busy, message);
        }
    }

    fn reader(&mut self, now: Time, id: RequestId, behind: bool) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.reader_behind = behind;
        if let Phase::Running(run) = &mut request.phase {
            run.last = now;
            run.held_up = true;
        }
        self.arm(id);
    }

    // Nodes

    fn node_says(&mut self, now: Time, node: NodeId, from: FromNode) {
        let Some(before) = self.pool.node(node).map(|n| n.heard) else { return };
        self.pool.heard(now, node);
        match from {
            FromNode::Profile(profile) => {
                self.pool.profile(now, node, profile);
                self.retry_all(now, node);
                self.look_after_all(now);
            }
            FromNode::Status(status) => {
                for model in self.pool.status(now, node, status) {
                    self.engine_died(now, node, model);
                }
                if self.pool.node(node).is_some_and(|n| n.is_draining() && !n.requests.is_empty()) {
                    self.vacate(now, node);
                }
            }
            FromNode::Event { request, attempt, event } => self.event(now, node, request, attempt, event),
        }
        if now.since(before) > self.limits.suspect_after {
            self.retry_all(now, node);
        }
    }

    fn engine_died(&mut self, now: Time, node: NodeId, model: ModelId) {
        let name = self.node_name(node);
        let on_node: Vec<RequestId> =
            self.pool.node(node).map(|n| n.requests.iter().copied().collect()).unwrap_or_default();
        for request in on_node {
            if self.requests.get(&request).is_some_and(|r| r.ask.model == model) {
                self.displace(now, request, format!("the engine of node {name} died"));
            }
        }
        self.retry(now, model, true);
    }

    fn broken(&mut self, now: Time, node: NodeId, id: RequestId, attempt: u32, reason: String) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if matches!(&request.phase, Phase::Running(run) if run.node == node) && request.ask.attempt == attempt
        {
            request.bereft = true;
            self.displace(now, id, reason);
        }
    }

    /// Moves what runs on a draining or silent node to others, as far as they have room; the rest goes on there.
    fn vacate(&mut self, now: Time, node: NodeId) {
        let running: Vec<RequestId> =
            self.pool.node(node).map(|n| n.requests.iter().copied().collect()).unwrap_or_default();
        for id in running {
            if let Place::On(elsewhere, _) = self.search(now, id, Some(node))
                && elsewhere != node
            {
                self.stop_running(id);
                self.requeue(now, id, None);
                self.place(now, id);
            }
        }
    }

    fn lost(&mut self, now: Time, id: NodeId, reason: &str) {
        let models = self.pool.models_of(id);
        let Some(node) = self.pool.remove(now, id) else { return };
        for request in node.requests {
            if let Some(request) = self.requests.get_mut(&request) {
                request.bereft = true;
            }
            self.displace(now, request, format!("node {} was lost: {reason}", node.name));
        }
        for model in models {
            self.retry(now, model, true);
        }
    }

    fn node_name(&self, id: NodeId) -> String {
        self.pool.node(id).map(|n| n.name.clone()).unwrap_or_default()
    }

    // Events of requests

    fn event(&mut self, now: Time, node: NodeId, id: RequestId, attempt: u32, event: Event) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Phase::Running(run) = &mut request.phase else { return };
        if run.node != node || request.ask.attempt != attempt {
            return;
        }
        run.last = now;
        run.stalls = 0;
        let tokens = u64::from(matches!(event, Event::Token(_)));
        self.pool.progressed(now, node, request.ask.model, tokens);
        match event {
            Event::Token(token) => self.token(now, id, token),
            Event::Finished { .. } => {
                self.note_finish(now, id, &event);
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
            self.stop_running(id);
            return self.displace(now, id, reason);
        }
        if run.first.is_none() {
            run.first = Some(now);
            let observed = now.since(run.sent);
            self.pool.remember(run.node, request.ask.model, &request.keys);
            self.pool.first_token(
                now,
                run.node,
                request.ask.model,
                run.queued,
                run.predicted.stated_ttft,
                observed,
            );
            run.queued = 0;
            if request.numerics.is_none() {
                request.numerics = self.pool.numerics(run.node, request.ask.model).map(str::to_owned);
            }
        }
        run.tokens += 1;
        request.ask.output.push(token.id);
        self.outputs.push_back(Output::Emit { request: id, event: Event::Token(token) });
    }

    fn note_finish(&mut self, now: Time, id: RequestId, event: &Event) {
        let Some(request) = self.requests.get(&id) else { return };
        let Phase::Running(run) = &request.phase else { return };
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
        self.expected_output += 0.1 * (tokens - self.expected_output);
        if let Some(first) = run.first.filter(|_| run.tokens >= 8 && !run.held_up) {
            let pace = run.last.since(first) / (run.tokens - 1);
            self.pool.observe_pace(now, run.node, request.ask.model, run.predicted.stated_token_time, pace);
        }
    }

    fn node_failed(&mut self, now: Time, node: NodeId, id: RequestId, failure: Failure) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let model = request.ask.model;
        match failure.kind {
            FailureKind::Invalid | FailureKind::Deadline => self.end(now, id, Event::Failed(failure)),
            FailureKind::Busy if request.busy < self.limits.busy_max => {
                request.busy += 1;
                self.pool.busy(now, node, model);
                self.requeue(now, id, Some(now + BUSY_PAUSE));
                self.place(now, id);
            }
            FailureKind::Busy => self.end(now, id, Event::Failed(failure)),
            FailureKind::NoModel => {
                self.pool.drop_model(node, model);
                self.displace(now, id, failure.message);
            }
            FailureKind::Cancelled | FailureKind::Internal => {
                self.pool.failed(now, node);
                self.displace(now, id, failure.message);
            }
        }
    }

    /// Takes a request from a node that failed it; it goes on elsewhere, or ends.
    fn displace(&mut self, now: Time, id: RequestId, reason: String) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if let Phase::Running(run) = &request.phase {
            request.tried.push(run.node);
        }
        request.trouble = Some(reason);
        self.requeue(now, id, None);
        self.place(now, id);
    }

    // Ends

    /// Tells the node to stop, if it runs.
    fn stop_running(&mut self, id: RequestId) {
        let Some(Request { phase: Phase::Running(run), ask, .. }) = self.requests.get(&id) else { return };
        let message = ToNode::Cancel { request: id, attempt: ask.attempt };
        self.outputs.push_back(Output::Send { node: run.node, message });
    }

    fn end_failed(&mut self, now: Time, id: RequestId, kind: FailureKind, message: String) {
        self.end(now, id, Event::Failed(Failure { kind, message }));
    }

    fn end(&mut self, now: Time, id: RequestId, event: Event) {
        self.dequeue(id);
        let Some(request) = self.requests.remove(&id) else { return };
        if let Some(at) = request.timer {
            self.timers.remove(&(at, Timer::Request(id)));
        }
        self.outputs.push_back(Output::Emit { request: id, event });
        if let Phase::Running(run) = request.phase {
            self.pool.release(now, run.node, &request.ask, run.queued);
            self.retry(now, request.ask.model, false);
        }
    }

    // Time

    /// When a request needs a look.
    fn due(&self, request: &Request) -> Option<Time> {
        let by_phase = match &request.phase {
            Phase::Waiting { until } => [*until, request.orphaned].into_iter().flatten().min(),
            Phase::Running(_) if request.reader_behind => None,
            Phase::Running(run) => {
                let heard = run.last.max(self.pool.progress(run.node, request.ask.model)).max(self.excused);
                Some(heard + run.patience(&self.limits))
            }
        };
        [by_phase, request.deadline].into_iter().flatten().min()
    }

    /// Sees to it that a request's timer isn't later than it must be. A timer that is too early is put off when it
    /// goes off, so that a token doesn't cost a change of timers.
    fn arm(&mut self, id: RequestId) {
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

    fn tick(&mut self, now: Time) {
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
        self.outputs.push_back(Output::Disconnect { node: id, reason });
    }

    fn request_due(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.timer = None;
        if request.deadline.is_some_and(|deadline| deadline <= now) {
            self.stop_running(id);
            return self.end_failed(now, id, FailureKind::Deadline, "its deadline passed".into());
        }
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
        let elsewhere = self.search(now, id, Some(node));
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Phase::Running(run) = &mut request.phase else { return };
        run.stalls += 1;
        run.last = now;
        if matches!(elsewhere, Place::On(..)) {
            self.pool.failed(now, node);
            self.stop_running(id);
            self.displace(now, id, reason);
        } else if run.stalls >= self.limits.stalls_max {
            self.stop_running(id);
            let message = format!("{reason} for long; no other node can go on with it");
            self.end_failed(now, id, FailureKind::Internal, message);
        }
    }
}
