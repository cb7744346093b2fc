//! The state machine: requests and what nodes say go in, what to send and what to tell clients comes out.
mod accounts;
mod audit;
mod events;
mod hedge;
mod placement;
mod residency;
mod timers;

use crate::ledger::Ledger;
use crate::policy::Terms;
use crate::pool::{Place, Pool};
use crate::serving::Prediction;
use crate::{
    Account, Balance, BlockKey, Clock, Event, Failure, FailureKind, FromNode, Generate, Input, KvType,
    Limits, Load, ModelId, NodeId, NodeView, Output, Policy, Price, Priority, RequestId, Time, ToNode, chain,
};
use audit::Audit;
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
    /// What time it was for people, and when.
    clock: Option<(Time, Clock)>,
    pool: Pool,
    requests: BTreeMap<RequestId, Request>,
    /// By model: who waits, most important and then oldest first.
    waiting: BTreeMap<ModelId, BTreeSet<Turn>>,
    waiting_total: usize,
    ledger: Ledger,
    audit: Audit,
    residency: Residency,
    timers: BTreeSet<(Time, Timer)>,
    outputs: VecDeque<Output>,
    /// Models for which a node has a place again: whoever waits for one is looked at when all has been taken in.
    freed: BTreeSet<ModelId>,
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
    /// The same while others of its models are searched for: none.
    other_keys: Vec<BlockKey>,
    /// The model that it was asked for: what policies see, wherever it goes.
    first: ModelId,
    /// It has been given to another than its first model.
    changed: bool,
    deadline: Option<Time>,
    /// No use in a first token after this.
    first_by: Option<Time>,
    phase: Phase,
    /// The same again on another node, while neither has a token: who has one first goes on.
    rival: Option<Run>,
    /// Nodes that failed it, and what the last of them said.
    tried: Vec<NodeId>,
    trouble: Option<Failure>,
    numerics: Option<String>,
    /// What policies see of it, where that isn't the request itself.
    terms: Option<Box<Terms>>,
    /// When it is looked at again, while it waits.
    look: Option<Time>,
    busy: u32,
    reader_behind: bool,
    /// It has waited for a faster node; no longer than until then.
    patient_until: Option<Time>,
    /// Its node was lost.
    bereft: bool,
    /// No other can take it: it fails then.
    orphaned: Option<Time>,
    /// Its entry in `timers`.
    timer: Option<Time>,
    /// Tokens of it that are settled already: its prompt, once, and output.
    tokens_counted: u64,
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
    attempt: u32,
    price: Price,
    sent: Time,
    /// It is slow if nothing has come by then, and another node may try.
    hedge_at: Option<Time>,
    /// Tokens that it began with.
    given: u64,
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
    /// Tokens of the whole request, by its node's word.
    said: u32,
    /// We told the node to stop.
    stopped: bool,
}

impl Run {
    fn patience(&self, limits: &Limits) -> Duration {
        let expected = if self.first.is_some() { self.predicted.token_time } else { self.predicted.ttft };
        expected.saturating_mul(limits.stall_times).max(limits.stall_min)
    }
}

impl Request {
    /// Its model, and those that will do as well.
    fn models(&self) -> impl Iterator<Item = ModelId> + use<> {
        let others = self.ask.otherwise.clone();
        std::iter::once(self.ask.model).chain(others)
    }

    /// Where it runs.
    fn runs(&self) -> impl Iterator<Item = &Run> {
        let run = if let Phase::Running(run) = &self.phase { Some(run) } else { None };
        run.into_iter().chain(&self.rival)
    }
}

impl Scheduler {
    /// A scheduler without nodes. From equal seeds and inputs come equal outputs.
    pub fn new(limits: Limits, policy: Box<dyn Policy>, seed: u64) -> Scheduler {
        Scheduler {
            policy,
            clock: None,
            pool: Pool::default(),
            requests: BTreeMap::new(),
            waiting: BTreeMap::new(),
            waiting_total: 0,
            ledger: Ledger::default(),
            audit: Audit::default(),
            residency: Residency::default(),
            timers: BTreeSet::new(),
            outputs: VecDeque::new(),
            freed: BTreeSet::new(),
            excused: Time::ZERO,
            expected_output: f64::from(limits.output_guess),
            limits,
            random: seed,
        }
    }

    /// Another policy holds from now on. What runs goes on where it is; what waits may find a place.
    pub fn set_policy(&mut self, now: Time, policy: Box<dyn Policy>) {
        self.policy = policy;
        let models: Vec<ModelId> = self.waiting.keys().copied().collect();
        models.into_iter().for_each(|model| self.retry(now, model, true));
    }

    /// What time it is for people. It goes on from there; whoever says it says it again now and then, as clocks are put
    /// forward and back.
    pub fn set_clock(&mut self, now: Time, clock: Clock) {
        self.clock = Some((now, clock));
    }

    /// Takes in what happened.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.take_in(now, input);
        while let Some(model) = self.freed.pop_first() {
            self.retry(now, model, false);
        }
    }

    fn take_in(&mut self, now: Time, input: Input) {
        match input {
            Input::Submit(ask) => self.submit(now, ask),
            Input::Cancel(request) => {
                self.stop_running(now, request);
                self.end_failed(now, request, FailureKind::Cancelled, "the client cancelled it".into());
            }
            Input::Reader { request, behind } => self.reader(now, request, behind),
            Input::Connected { node, profile } => {
                self.pool.profile(now, node, profile);
                self.timers.insert((now + self.limits.suspect_after, Timer::Node(node)));
                if self.pool.guest(node).is_some_and(|guest| self.audit.is_refuted(guest)) {
                    return self.refuse(now, node);
                }
                self.retry_all(now, node);
                self.look_after_all(now);
            }
            Input::Node { node, from } => self.node_says(now, node, from),
            Input::Broken { node, request, attempt, reason } => {
                self.broken(now, node, request, attempt, reason)
            }
            Input::RoundTrip { node, time } => self.pool.round_trip(now, node, time),
            Input::Lost { node, reason } => self.lost(now, node, &reason),
            Input::Drain { node, on } => {
                self.pool.drain(now, node, on);
                match on {
                    true => self.vacate(now, node),
                    false => self.retry_all(now, node),
                }
            }
            Input::Keys(names) => self.ledger.name(names),
            Input::Allow(allowances) => {
                self.ledger.allow(allowances);
                let models: Vec<ModelId> = self.waiting.keys().copied().collect();
                models.into_iter().for_each(|model| self.retry(now, model, true));
            }
            Input::Booked { account, window, taken } => self.ledger.book(account, window, taken),
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
            checks: self.requests.range(RequestId(RequestId::OWN)..).count(),
            hedged: self.requests.values().filter(|r| r.rival.is_some()).count(),
            waiting: self.waiting_total,
        }
    }

    /// What an account has spent and may spend in its present window.
    pub fn balance(&self, account: &Account) -> Balance {
        self.ledger.balance(account)
    }

    /// Seconds since 1970, where somebody has said what time it is; else since the beginning of [`Time`].
    fn unix_s(&self, now: Time) -> i64 {
        match self.clock {
            Some((since, clock)) => clock.unix_s.saturating_add_unsigned(now.since(since).as_secs()),
            None => now.since(Time::ZERO).as_secs() as i64,
        }
    }

    /// Panics unless the books agree with what runs. For tests.
    pub fn check(&self) {
        let load = self.load();
        self.ledger.check(load.running + load.hedged);
    }

    /// All nodes, for a person.
    pub fn survey(&self, now: Time) -> Vec<NodeView> {
        self.pool.survey(now)
    }

    fn submit(&mut self, now: Time, ask: Box<Generate>) {
        self.submit_on(now, ask, None);
    }

    /// Where `terms` are given, policies look at them instead.
    fn submit_on(&mut self, now: Time, ask: Box<Generate>, terms: Option<Box<Terms>>) {
        let request = ask.request;
        assert!(!self.requests.contains_key(&request), "request numbers are used once");
        let entry = Request {
            submitted: now,
            deadline: ask.deadline.map(|left| now + left),
            first_by: ask.ttft.map(|left| now + left),
            rival: None,
            phase: Phase::Waiting { until: None },
            tried: Vec::new(),
            trouble: None,
            numerics: None,
            terms,
            look: None,
            busy: 0,
            reader_behind: false,
            patient_until: None,
            bereft: false,
            orphaned: None,
            timer: None,
            other_keys: Vec::new(),
            first: ask.model,
            changed: false,
            tokens_counted: 0,
            keys: chain(ask.model, KvType::F16, ask.salt, &ask.prompt).take(KEYS_MAX).collect(),
            ask,
        };
        self.requests.insert(request, entry);
        if let Err(lack) = self.count(now, request) {
            return self.end_lacking(now, request, &lack);
        }
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
                self.clear_out(now, node);
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
            FromNode::Pause(pause) => self.pool.pause(now, node, pause),
            FromNode::Charged { request, attempt, amount } => {
                let speaks = |run: &Run| (run.node, run.attempt) == (node, attempt);
                if self.requests.get(&request).is_some_and(|r| r.runs().any(speaks))
                    && let Some(worst) = self.ledger.charge(request, attempt, amount)
                {
                    self.pool.charged(node, amount, worst);
                }
            }
            FromNode::Event { request, attempt, event } => self.event(now, node, request, attempt, event),
        }
        if now.since(before) > self.limits.suspect_after {
            self.retry_all(now, node);
        }
    }

    /// Moves what runs on a node of models that it doesn't hold any more.
    fn clear_out(&mut self, now: Time, node: NodeId) {
        let (name, held) = (self.node_name(node), self.pool.models_of(node));
        let on_node: Vec<RequestId> =
            self.pool.node(node).map(|n| n.requests.iter().copied().collect()).unwrap_or_default();
        for id in on_node {
            let Some(request) = self.requests.get_mut(&id).filter(|r| !held.contains(&r.ask.model)) else {
                continue;
            };
            request.bereft = true;
            if !self.falls_back(now, id, node, true) {
                self.stop_running(now, id);
                self.displace(now, id, format!("node {name} let go of the model"));
            }
        }
    }

    fn engine_died(&mut self, now: Time, node: NodeId, model: ModelId) {
        let name = self.node_name(node);
        let on_node: Vec<RequestId> =
            self.pool.node(node).map(|n| n.requests.iter().copied().collect()).unwrap_or_default();
        for request in on_node {
            if self.requests.get(&request).is_some_and(|r| r.ask.model == model)
                && !self.falls_back(now, request, node, false)
            {
                self.displace(now, request, format!("the engine of node {name} died"));
            }
        }
        self.retry(now, model, true);
    }

    fn broken(&mut self, now: Time, node: NodeId, id: RequestId, attempt: u32, reason: String) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if !request.runs().any(|run| (run.node, run.attempt) == (node, attempt)) {
            return;
        }
        if !self.falls_back(now, id, node, false)
            && let Some(request) = self.requests.get_mut(&id)
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
            if self.falls_back(now, id, node, true) {
                continue;
            }
            if let Place::On(elsewhere, _) = self.search(now, id, Some(node))
                && elsewhere != node
                && self.may_go_on(now, id)
            {
                self.stop_running(now, id);
                self.requeue(now, id, None);
                self.place(now, id);
            }
        }
    }

    fn lost(&mut self, now: Time, id: NodeId, reason: &str) {
        let models = self.pool.models_of(id);
        let Some(node) = self.pool.remove(now, id) else { return };
        for request in node.requests {
            if self.falls_back(now, request, id, false) {
                continue;
            }
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

    // Ends

    /// Tells the node to stop, if it runs.
    fn stop_running(&mut self, now: Time, id: RequestId) {
        self.drop_rival(now, id);
        let Some(Request { phase: Phase::Running(run), .. }) = self.requests.get_mut(&id) else { return };
        run.stopped = true;
        let message = ToNode::Cancel { request: id, attempt: run.attempt };
        self.outputs.push_back(Output::Send { node: run.node, message });
    }

    fn end_failed(&mut self, now: Time, id: RequestId, kind: FailureKind, message: String) {
        self.end(now, id, Event::Failed(Failure { kind, message }));
    }

    fn end(&mut self, now: Time, id: RequestId, event: Event) {
        self.drop_rival(now, id);
        self.dequeue(id);
        let Some(request) = self.requests.remove(&id) else { return };
        if let Some(at) = request.timer {
            self.timers.remove(&(at, Timer::Request(id)));
        }
        // What it cost is said before its end is.
        if let Phase::Running(run) = &request.phase {
            self.leave(now, &request.ask, run, request.tokens_counted);
        }
        self.emit(now, id, event);
    }
}
