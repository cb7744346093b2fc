//! A world under virtual time: nodes that die, stall, refuse, flap, drain and answer late or twice, links that are cut for
//! a while or for good, streams that break, a scheduler that sleeps or is started again; models that come and go; clients
//! that cancel and dawdle, and have budgets. Whatever happens, each request's tokens must be those of an undisturbed run,
//! it must end once, no node's memory may be promised twice, and what the scheduler counts must be so.
//!
//! `cargo xtask sim --seeds N` runs it for more seeds than the tests do.
mod books;
mod restart;
mod seeds;

use crate::member::{Job, MODELS, Member, SLOTS};
use crate::random::Rng;
use crate::samples::ask;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;
use weir_scheduler::{
    Account, Candidate, Class, Event, Failure, FailureKind, Fastest, Finish, FromNode, Generate, Input,
    KeyId, Limits, Logprob, ModelId, ModelStatus, NodeId, Output, PRIVATE, Priority, RequestId, Scheduler,
    Status, Time, ToNode, Token, Trust, Usage, Wanted,
};

const FAULTS_END: Time = Time(30_000_000_000);
/// Happenings that are remembered for whoever looks for a fault.
const TRACE: usize = 100;
const GIVE_UP: Time = Time(600_000_000_000);

/// Nodes that a world begins with, and its requests: one world in two hundred is large.
fn size(seed: u64) -> (usize, usize) {
    if seed % 200 == 150 { (250, 800) } else { (3, 40) }
}

/// Models come and go often.
fn limits() -> Limits {
    let second = Duration::from_secs(1);
    let (settle, idle_unload, load_again) = (second / 2, 4 * second, 2 * second);
    let check_one_in = 2;
    Limits { check_one_in, settle, idle_unload, load_again, load_wait: 60 * second, ..Limits::default() }
}

/// What nodes say of a token's probability: all agree, but for noise.
fn likely(id: u32) -> Option<Logprob> {
    let candidate = |id, logprob| Candidate { id, logprob, bytes: Vec::new() };
    Some(Logprob { chosen: candidate(id, -0.1), top: vec![candidate(id, -0.1), candidate(id + 1, -9.0)] })
}

/// The token that every node computes after these.
fn truth(prompt: &[u32], output: &[u32]) -> u32 {
    let seed = prompt.iter().chain(output).fold(7u64, |a, t| a.wrapping_mul(31).wrapping_add(u64::from(*t)));
    Rng(seed).below(50_000) as u32
}

#[derive(Debug)]
enum Happening {
    Arrives(Input),
    Works(NodeId),
    Beats(NodeId),
    Reaches(NodeId, ToNode),
    Dies(NodeId),
    /// Its link is cut for a while.
    Cut(NodeId),
    /// A model is in its memory, or will not be.
    Loaded(NodeId, ModelId),
    /// A model is out of its memory.
    Unloaded(NodeId, ModelId),
    /// The scheduler's own machine sleeps.
    Sleeps,
    /// The scheduler is killed and started again.
    Restarts,
    Joins,
    Asks(u64),
    Wants(u64),
}

struct Client {
    ask: Generate,
    /// It has moved in the middle.
    resumed: bool,
    got: Vec<u32>,
    end: Option<Event>,
}

struct World {
    rng: Rng,
    now: Time,
    scheduler: Scheduler,
    nodes: BTreeMap<NodeId, Member>,
    agenda: BTreeMap<(Time, u64), Happening>,
    number: u64,
    /// How many will be asked for.
    requests: usize,
    clients: BTreeMap<RequestId, Client>,
    /// What was spent and what is reserved, by account and window, as the scheduler said of each attempt.
    books: BTreeMap<(Account, i64), (u64, u64)>,
    /// Who wants a model and hasn't heard of it.
    wants: BTreeSet<u64>,
    resumed: u64,
    /// Models loaded by order, and guests' tokens checked.
    loaded: u64,
    checks: u64,
    /// The scheduler hears nothing before this; what comes is kept.
    asleep: Time,
    mail: VecDeque<Input>,
    planted: Option<Planted>,
    /// The last that happened, where it is wanted.
    trace: Option<VecDeque<String>>,
}

/// Bugs that the world must find, as a test of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Planted {
    /// The first token after a move comes to the client twice.
    TokenTwiceOnResume,
    /// A node is told to stop twice.
    StopTwice,
    /// What a request cost is settled twice.
    SettledTwice,
}

impl World {
    /// The world of a seed, with the first so many of its requests.
    fn new(seed: u64, requests: usize) -> World {
        let mut world = World {
            rng: Rng(seed),
            now: Time::ZERO,
            scheduler: Scheduler::new(limits(), Box::new(Fastest), seed),
            nodes: BTreeMap::new(),
            agenda: BTreeMap::new(),
            number: 0,
            requests,
            clients: BTreeMap::new(),
            books: BTreeMap::new(),
            wants: BTreeSet::new(),
            resumed: 0,
            loaded: 0,
            checks: 0,
            asleep: Time::ZERO,
            mail: VecDeque::new(),
            planted: None,
            trace: None,
        };
        if world.rng.one_in(3) {
            let after = world.rng.ms(0, 25_000);
            world.plan(after, Happening::Sleeps);
        }
        if world.rng.one_in(4) {
            let after = world.rng.ms(0, 25_000);
            world.plan(after, Happening::Restarts);
        }
        world.open_accounts();
        let (nodes, all) = size(seed);
        for _ in 0..nodes {
            world.plan(Duration::ZERO, Happening::Joins);
        }
        for id in 0..all as u64 {
            let at = world.rng.ms(0, 25_000);
            if id < requests as u64 {
                world.plan(at, Happening::Asks(id));
            }
        }
        for want in 0..5 {
            let at = world.rng.ms(0, 25_000);
            world.plan(at, Happening::Wants(want));
        }
        world
    }

    fn plan(&mut self, after: Duration, what: Happening) {
        self.number += 1;
        self.agenda.insert((self.now + after, self.number), what);
    }

    /// A node's word arrives after a while, behind all it said before on the same stream; streams overtake each other.
    fn say(&mut self, node: NodeId, from: FromNode) {
        let delay = self.rng.ms(0, 30);
        let Some(speaker) = self.nodes.get_mut(&node) else { return };
        let stream = match &from {
            FromNode::Event { request, attempt, .. } => Some((*request, *attempt)),
            _ => None,
        };
        let arrives = speaker.arrives(stream, self.now.max(speaker.cut) + delay);
        self.number += 1;
        let key = (arrives, self.number);
        self.agenda.insert(key, Happening::Arrives(Input::Node { node, from }));
    }

    fn faulty(&self) -> bool {
        self.now < FAULTS_END
    }

    fn run(&mut self) {
        loop {
            let next = self.agenda.first_key_value().map(|(key, _)| key.0);
            let wake = self.scheduler.wake_at().map(|wake| wake.max(self.asleep));
            let Some(at) = next.into_iter().chain(wake).min() else { break };
            self.now = self.now.max(at);
            assert!(self.now < GIVE_UP, "work does not drain: {:?}", self.scheduler.load());
            if self.now > FAULTS_END
                && self.clients.len() == self.requests
                && self.clients.values().all(|c| c.end.is_some())
                && self.wants.is_empty()
                && self.scheduler.load().checks == 0
            {
                break;
            }
            if self.asleep > Time::ZERO && self.now >= self.asleep {
                self.asleep = Time::ZERO;
                self.tell(Input::Tick);
                for input in std::mem::take(&mut self.mail) {
                    self.tell(input);
                }
            } else if wake == Some(at) && self.asleep == Time::ZERO {
                self.tell(Input::Tick);
            } else if let Some((_, what)) = self.agenda.pop_first() {
                self.happen(what);
            }
        }
        assert_eq!((self.scheduler.load().running, self.scheduler.load().waiting), (0, 0));
    }

    fn happen(&mut self, what: Happening) {
        if let Some(trace) = &mut self.trace {
            if trace.len() == TRACE {
                trace.pop_front();
            }
            trace.push_back(format!("{:10.3} ms  {what:?}", self.now.0 as f64 / 1e6));
        }
        match what {
            Happening::Arrives(input) if self.asleep > self.now => self.mail.push_back(input),
            Happening::Arrives(input) => self.tell(input),
            Happening::Sleeps => self.asleep = self.now + self.rng.ms(1000, 30_000),
            Happening::Restarts => self.restart(),
            Happening::Loaded(id, model) => self.load(id, model),
            Happening::Unloaded(id, model) => {
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.unloaded(model);
                    self.describe(id);
                }
            }
            Happening::Wants(want) => {
                self.wants.insert(want);
                let classes = [Class::Small, Class::Medium, Class::Large, Class::Auto];
                let model = match self.rng.one_in(2) {
                    true => Wanted::Class(classes[self.rng.below(4) as usize]),
                    false => Wanted::Model(MODELS[self.rng.below(3) as usize].0),
                };
                self.happen(Happening::Arrives(Input::Want { want, model }));
            }
            Happening::Cut(id) => self.cut(id),
            Happening::Joins => self.join(),
            Happening::Asks(id) => self.submit(id),
            Happening::Works(id) => self.work(id),
            Happening::Beats(id) => self.beat(id),
            Happening::Reaches(id, message) => self.reach(id, message),
            Happening::Dies(id) => {
                if self.nodes.remove(&id).is_some() {
                    let after = self.rng.ms(0, 200);
                    self.plan(after, Happening::Arrives(Input::Lost { node: id, reason: "killed".into() }));
                    let after = self.rng.ms(0, 2000);
                    self.plan(after, Happening::Joins);
                }
            }
        }
    }

    fn join(&mut self) {
        self.number += 1;
        let id = NodeId(self.number);
        let node = Member::new(&mut self.rng, self.now);
        let (pace, profile) = (node.pace, node.profile(id));
        self.nodes.insert(id, node);
        self.happen(Happening::Arrives(Input::Connected { node: id, profile }));
        self.happen(Happening::Arrives(Input::RoundTrip { node: id, time: pace }));
        self.plan(pace, Happening::Works(id));
        self.plan(Duration::from_millis(500), Happening::Beats(id));
        if self.faulty() && self.rng.one_in(2) {
            let after = self.rng.ms(500, 15_000);
            self.plan(after, Happening::Dies(id));
        }
        if self.faulty() && self.rng.one_in(3) {
            let after = self.rng.ms(100, 15_000);
            self.plan(after, Happening::Cut(id));
        }
        if self.faulty() && self.rng.one_in(4) {
            for (from, to, on) in [(0, 5000, true), (5000, 20_000, false)] {
                let after = self.rng.ms(from, to);
                self.plan(after, Happening::Arrives(Input::Drain { node: id, on }));
            }
        }
    }

    /// What is under way in either direction comes late, in order; a link that is cut for long is given up by both ends.
    fn cut(&mut self, id: NodeId) {
        let length = self.rng.ms(50, 20_000);
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.cut = self.now + length;
        if length > Duration::from_secs(12) {
            self.plan(Duration::from_secs(12), Happening::Dies(id));
        }
    }

    fn describe(&mut self, id: NodeId) {
        let profile = self.nodes[&id].profile(id);
        self.say(id, FromNode::Profile(profile));
    }

    fn load(&mut self, id: NodeId, model: ModelId) {
        let works = !self.faulty() || !self.rng.one_in(5);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.loaded(model, works);
            self.loaded += u64::from(works);
            self.describe(id);
        }
    }

    fn submit(&mut self, id: u64) {
        let length = 1 + self.rng.below(60);
        let prompt = (0..length).map(|_| self.rng.below(1000) as u32).collect();
        let max_tokens = 1 + self.rng.below(200) as u32;
        let mut ask = ask(id, prompt, max_tokens);
        ask.key = KeyId(self.rng.below(2));
        ask.model = MODELS[if self.rng.one_in(3) { 1 + self.rng.below(2) as usize } else { 0 }].0;
        if self.rng.one_in(4) {
            ask.otherwise = MODELS.iter().map(|m| m.0).filter(|m| *m != ask.model).collect();
        }
        ask.priority =
            [Priority::Background, Priority::Normal, Priority::Interactive][self.rng.below(3) as usize];
        if self.rng.one_in(10) {
            ask.deadline = Some(self.rng.ms(1, 3000));
        }
        if self.rng.one_in(5) {
            ask.tags = vec![(PRIVATE.into(), String::new())];
        }
        if self.rng.one_in(10) {
            ask.ttft = Some(self.rng.ms(10, 5000));
        }
        let client = Client { ask: ask.clone(), resumed: false, got: Vec::new(), end: None };
        self.clients.insert(ask.request, client);
        if self.rng.one_in(6) {
            let after = self.rng.ms(0, 3000);
            self.plan(after, Happening::Arrives(Input::Cancel(ask.request)));
        }
        if self.rng.one_in(6) {
            for (from, to, behind) in [(0, 500, true), (500, 20_000, false)] {
                let after = self.rng.ms(from, to);
                self.plan(after, Happening::Arrives(Input::Reader { request: ask.request, behind }));
            }
        }
        self.tell(Input::Submit(Box::new(ask)));
    }

    fn work(&mut self, id: NodeId) {
        let faulty = self.faulty();
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.frozen > self.now {
            let rest = node.frozen.since(self.now);
            return self.plan(rest, Happening::Works(id));
        }
        if faulty && self.rng.one_in(2000) {
            node.frozen = self.now + self.rng.ms(100, 20_000);
        }
        let mut says = Vec::new();
        for ((request, attempt), job) in node.jobs.iter_mut().take(SLOTS as usize) {
            node.steps += 1;
            let position = job.ask.output.len() as u32;
            let event = if faulty && self.rng.one_in(500) {
                Event::Failed(Failure { kind: FailureKind::Internal, message: "a bit flipped".into() })
            } else if position >= job.ask.max_tokens {
                Event::Finished { reason: Finish::Length, text: String::new(), usage: Usage::default() }
            } else {
                // What comes after a cancel is rubbish, so that whoever listens to it is found out.
                let id = truth(&job.ask.prompt, &job.ask.output) + u32::from(job.cancelled);
                job.ask.output.push(id);
                Event::Token(Token { position, id, text: String::new(), logprob: likely(id) })
            };
            says.push((*request, *attempt, event));
        }
        let (pace, price, keeps_account) = (node.pace, node.price, node.trust == Trust::Provider);
        for (request, attempt, event) in says {
            if !matches!(event, Event::Token(_)) {
                if keeps_account {
                    let amount = price.of(self.rng.below(2), 0);
                    self.say(id, FromNode::Charged { request, attempt, amount });
                }
                self.nodes.get_mut(&id).expect("looked up above").jobs.remove(&(request, attempt));
            }
            let from = FromNode::Event { request, attempt, event };
            if faulty && self.rng.one_in(50) {
                self.say(id, from.clone());
            }
            self.say(id, from);
        }
        self.plan(pace, Happening::Works(id));
    }

    fn beat(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get(&id) else { return };
        if node.frozen <= self.now {
            let status = |(model, _): &(ModelId, u64)| ModelStatus {
                model: *model,
                alive: true,
                running: node.jobs.len() as u32,
                waiting: 0,
                queued_tokens: 0,
                kv_blocks_free: 1,
                steps: node.steps,
                rates: None,
            };
            let pauses = node.trust == Trust::Provider;
            let models = MODELS.iter().filter(|m| node.holds(m.0)).map(status).collect();
            self.say(id, FromNode::Status(Status { models, ..Status::default() }));
            if pauses && self.faulty() && self.rng.one_in(20) {
                let pause = self.rng.ms(1, 3000);
                self.say(id, FromNode::Pause(pause));
            }
        }
        self.plan(Duration::from_millis(500), Happening::Beats(id));
    }

    fn reach(&mut self, id: NodeId, message: ToNode) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        match message {
            ToNode::Generate(ask) => {
                let key = (ask.request, ask.attempt);
                if self.now < FAULTS_END && self.rng.one_in(20) {
                    let event = Event::Failed(Failure { kind: FailureKind::Busy, message: "full".into() });
                    return self.say(id, FromNode::Event { request: key.0, attempt: key.1, event });
                }
                if !node.holds(ask.model) {
                    let event = Event::Failed(Failure { kind: FailureKind::NoModel, message: "gone".into() });
                    return self.say(id, FromNode::Event { request: key.0, attempt: key.1, event });
                }
                let job = Job { ask: *ask, cancelled: false };
                assert!(node.jobs.insert(key, job).is_none(), "an attempt was sent twice");
                let live = node.jobs.values().filter(|job| !job.cancelled).count();
                assert!(live <= MODELS.len() * 2 * SLOTS as usize, "{live} requests on one node");
            }
            ToNode::Load { number, model, bytes } => {
                node.told_to_load(number, model, bytes);
                self.describe(id);
                let after = self.rng.ms(50, 3000);
                self.plan(after, Happening::Loaded(id, model));
            }
            ToNode::Unload { number, model } => {
                node.told_to_unload(number, model);
                let after = self.rng.ms(0, 500);
                self.plan(after, Happening::Unloaded(id, model));
            }
            ToNode::Cancel { request, attempt } => {
                if let Some(job) = node.jobs.get_mut(&(request, attempt)) {
                    assert!(!job.cancelled, "{request:?} was told to stop twice");
                    job.cancelled = true;
                }
                // It goes on for a while: late answers must not be heard.
                if self.rng.one_in(2) {
                    node.jobs.remove(&(request, attempt));
                }
            }
        }
    }

    fn tell(&mut self, input: Input) {
        self.scheduler.handle(self.now, input);
        self.obey();
        self.check_counts();
    }

    /// The scheduler's books agree with each other.
    fn check_counts(&self) {
        let load = self.scheduler.load();
        let on_nodes: u32 =
            self.scheduler.survey(self.now).iter().flat_map(|n| &n.models).map(|m| m.running).sum();
        assert_eq!(on_nodes as usize, load.running + load.hedged, "requests that run, by node and in all");
        self.scheduler.check();
        self.check_books();
        assert!(load.waiting <= Limits::default().waiting_max);
        let live = self.clients.values().filter(|c| c.end.is_none()).count();
        assert_eq!(load.running + load.waiting - load.checks, live, "requests that have not ended");
    }

    fn obey(&mut self) {
        while let Some(output) = self.scheduler.poll() {
            match output {
                Output::Send { node, message } => {
                    if let ToNode::Generate(ask) = &message {
                        let private = ask.is_private();
                        let member = self.nodes.get(&node);
                        let foreign = member.is_some_and(|node| node.trust != Trust::Own);
                        assert!(!(private && foreign), "what is private leaves the house");
                        let begins = ask.output.is_empty();
                        assert!(member.is_none_or(|node| node.resumes || begins), "it can't go on there");
                        match ask.request.is_own() {
                            true => self.checks += 1,
                            false => self.check_resume(ask),
                        }
                    }
                    let cut = self.nodes.get(&node).map_or(Duration::ZERO, |n| n.cut.since(self.now));
                    if matches!(message, ToNode::Cancel { .. }) && self.planted == Some(Planted::StopTwice) {
                        self.plan(cut + Duration::from_millis(1), Happening::Reaches(node, message.clone()));
                    }
                    self.plan(cut + Duration::from_millis(1), Happening::Reaches(node, message));
                }
                Output::Emit { request, .. } if request.is_own() => {}
                Output::Emit { request, event } => self.hear(request, event),
                Output::Reserved { entries, .. } => self.reserved(entries),
                Output::Settled { entries, .. } => self.settled(entries),
                Output::Spent { .. } => {}
                Output::Found { want, .. } => assert!(self.wants.remove(&want), "{want} was answered before"),
                Output::Disconnect { node, reason, .. } => {
                    assert!(!reason.contains("unlikely"), "an honest guest is refuted");
                    self.nodes.remove(&node);
                    self.plan(Duration::from_secs(1), Happening::Joins);
                }
            }
        }
    }

    fn check_resume(&mut self, ask: &Generate) {
        let client = &self.clients[&ask.request];
        assert_eq!(ask.output, client.got, "a node must go on from what the client has");
        assert_eq!(ask.prompt, client.ask.prompt);
        let resumed = ask.attempt > 0 && !ask.output.is_empty();
        self.resumed += u64::from(resumed);
        self.clients.get_mut(&ask.request).expect("somebody asked").resumed |= resumed;
    }

    fn hear(&mut self, request: RequestId, event: Event) {
        let resumed = self.clients[&request].resumed;
        self.listen(request, event.clone());
        if resumed && self.planted == Some(Planted::TokenTwiceOnResume) {
            self.listen(request, event);
        }
    }

    fn listen(&mut self, request: RequestId, event: Event) {
        let client = self.clients.get_mut(&request).expect("somebody asked");
        assert!(client.end.is_none(), "{request:?} heard {event:?} after its end");
        match event {
            Event::Token(token) => {
                assert_eq!(
                    token.position as usize,
                    client.got.len(),
                    "{request:?}: a position lost or repeated"
                );
                assert_eq!(token.id, truth(&client.ask.prompt, &client.got));
                client.got.push(token.id);
            }
            Event::Finished { .. } => {
                assert_eq!(client.got.len(), client.ask.max_tokens as usize, "{request:?} ended early");
                client.end = Some(event);
            }
            Event::Failed(_) => client.end = Some(event),
        }
    }
}
