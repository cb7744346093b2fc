//! The one task that touches the scheduler.
use super::bill::{Bills, Ran};
use super::conversation::{Conversation, Talk};
use super::course::Course;
use super::news::{News, Newsroom, NodeInfo};
use super::pump::{Delivery, Pump};
use super::shelf::Shelf;
use crate::books::Books;
use crate::cluster::{Cluster, Member};
use crate::telemetry::{self, Telemetry, Trail, Whither};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Sleep, sleep_until};
use tracing::Instrument;
use weir_scheduler::{
    Account, Allowance, Clock, Event, Failure, FailureKind, FromNode, Generate, Input, KeyId, Load, ModelId,
    NodeId, Output, Policy, Profile, RequestId, Scheduler, Time, ToNode, Wanted,
};
use weir_transport::{Link, Order, PublicKey};
use weir_upstream::{Upstream, Whose};

/// Events that a client hasn't read yet, at most.
const EVENTS_MAX: usize = 64;
/// Commands taken at once.
const BATCH: usize = 64;

/// What the conductor is told.
pub(super) enum Command {
    /// A client asks. It is answered as soon as the scheduler has seen the request.
    Submit { ask: Box<Generate>, client: Client, reply: oneshot::Sender<Result<(), Failure>> },
    /// A client is gone.
    Cancel(RequestId),
    /// A client is behind, or no longer.
    Reader { request: RequestId, behind: bool },
    /// A node has introduced itself.
    Connected {
        node: NodeId,
        member: Option<Member>,
        /// Which it is a member of.
        cluster: Option<Arc<Cluster>>,
        profile: Profile,
        link: Arc<Link>,
        orders: mpsc::Sender<Order>,
    },
    /// How long a word takes to a node and back.
    RoundTrip { node: NodeId, time: Duration },
    /// A model of an upstream can be had, by its name there.
    Upstream { node: NodeId, profile: Profile, upstream: Box<Counter> },
    /// A node said something.
    FromNode { node: NodeId, from: FromNode },
    /// A node sent tokens.
    Tokens { node: NodeId, request: RequestId, attempt: u32, deliveries: Vec<Delivery> },
    /// An attempt's stream broke.
    Broken { node: NodeId, request: RequestId, attempt: u32, reason: String },
    /// A node's link broke.
    Lost { node: NodeId, reason: String },
    /// A node with this key may not stay.
    Expel { key: PublicKey, reason: String },
    /// A node with this key gets nothing new, or does again.
    Drain { key: PublicKey, on: bool },
    /// Somebody is about to ask for a model.
    Want { model: Wanted, reply: oneshot::Sender<Result<ModelId, Failure>> },
    /// Another policy holds from now on.
    Policy(Box<dyn Policy>),
    /// What time it is for people.
    Clock(Clock),
    /// The names of keys.
    Keys(BTreeMap<KeyId, Arc<str>>),
    /// What may be spent.
    Allow(Vec<Allowance>),
    /// What others have taken of accounts in windows.
    Booked(Vec<(Account, i64, u64)>),
    /// Who is connected.
    Survey(oneshot::Sender<Vec<NodeInfo>>),
    /// The same, and how much there is of everything.
    Measure(oneshot::Sender<(Vec<NodeInfo>, Load)>),
    /// What happens from now on.
    Watch(mpsc::Sender<News>),
    /// Cancel everything and stop.
    Shutdown(oneshot::Sender<()>),
}

/// Where a request's events go.
pub(super) struct Client {
    events: mpsc::Sender<Event>,
    /// Kept free for the end.
    last: OwnedPermit<Event>,
    /// The last node that took part.
    node: Option<NodeId>,
    pub course: Course,
    trail: Trail,
    /// What it said, and what it has heard of the answer: for upstreams, and for models with other tokens.
    conversation: Option<Arc<Conversation>>,
    so_far: String,
    /// The model in whose tokens its prompt and output are; none, once some of its output is of no vocabulary.
    tokens_of: Option<ModelId>,
    /// By attempt: one, or two while two nodes race to begin.
    pumps: Vec<(u32, AbortHandle)>,
}

impl Client {
    pub fn new(
        model: ModelId,
        conversation: Option<Arc<Conversation>>,
        trail: Trail,
    ) -> (Client, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(EVENTS_MAX + 1);
        let last = events.clone().try_reserve_owned().expect("a new channel has room");
        let client = Client {
            events,
            last,
            course: Course::default(),
            trail,
            conversation,
            so_far: String::new(),
            tokens_of: Some(model),
            node: None,
            pumps: Vec::new(),
        };
        (client, receiver)
    }

    /// What an attempt needs to know beside the token ids; none where nothing more is known.
    fn talk(&self) -> Option<Talk> {
        let conversation = self.conversation.clone()?;
        Some(Talk { conversation, so_far: self.so_far.clone(), course: self.course.clone() })
    }
}

struct Node {
    name: Arc<str>,
    key: Option<PublicKey>,
    cluster: Option<Arc<Cluster>>,
    line: Line,
}

/// How a node is reached.
enum Line {
    Link { link: Arc<Link>, orders: mpsc::Sender<Order> },
    Upstream(Box<Counter>),
}

/// Where a model of an upstream can be had.
pub(super) struct Counter {
    pub upstream: Upstream,
    /// Its name there.
    pub model: String,
    /// Gone when the node is.
    pub _open: Arc<()>,
}

impl Line {
    fn close(&self, reason: &str) {
        match self {
            Line::Link { link, .. } => link.close(reason),
            // It isn't ours to close.
            Line::Upstream(_) => {}
        }
    }

    /// Says whether it is on its way.
    fn order(&self, order: Order) -> bool {
        match self {
            Line::Link { orders, .. } => orders.try_send(order).is_ok(),
            // It holds what it holds.
            Line::Upstream(_) => true,
        }
    }
}

impl Node {
    /// To whom an attempt at a request for `model` goes.
    fn whither(&self, shelf: &Shelf, model: ModelId) -> Whither {
        let node = self.name.clone();
        match &self.line {
            Line::Upstream(counter) => {
                let provider = counter.upstream.provider();
                let (name, url) = (provider.name.clone(), provider.url.clone());
                let upstream = telemetry::Whose { name, url, foreign: provider.whose == Whose::Provider };
                Whither { node, model: counter.model.clone(), upstream: Some(upstream) }
            }
            Line::Link { .. } => {
                let model = shelf.by_id(model).map(|model| model.name.clone()).unwrap_or_default();
                Whither { node, model, upstream: None }
            }
        }
    }

    /// A guest whose tokens can't be true stays out, across restarts.
    fn refute(&self) {
        let (Some(key), Some(cluster)) = (self.key, self.cluster.clone()) else { return };
        tracing::warn!("guest {} is refuted: a node of ours finds its tokens too unlikely", self.name);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = cluster.refute(&key) {
                tracing::error!("a refuted guest could not be kept out: {error}");
            }
        });
    }
}

struct Conductor {
    scheduler: Scheduler,
    origin: Instant,
    clients: HashMap<RequestId, Client>,
    /// Events of the scheduler's own requests.
    unread: HashMap<RequestId, mpsc::Receiver<Event>>,
    nodes: HashMap<NodeId, Node>,
    /// Who waits for models, and how many have.
    wants: HashMap<u64, oneshot::Sender<Result<ModelId, Failure>>>,
    wants_so_far: u64,
    shelf: Arc<Shelf>,
    news: Newsroom,
    count: watch::Sender<usize>,
    commands: mpsc::WeakSender<Command>,
    bills: Bills,
    telemetry: Telemetry,
    /// Whose word is being taken in.
    speaker: Option<NodeId>,
}

/// Starts the task. It ends when nobody can send commands any more, or is told to. Returns how many nodes there are.
pub(super) fn spawn(
    scheduler: Scheduler,
    shelf: Arc<Shelf>,
    inbox: mpsc::Receiver<Command>,
    cancelled: mpsc::UnboundedReceiver<RequestId>,
    commands: mpsc::WeakSender<Command>,
    (books, telemetry): (Option<Arc<Books>>, Telemetry),
) -> watch::Receiver<usize> {
    let (count, nodes) = watch::channel(0);
    let origin = Instant::now();
    let taken = books.as_ref().map(|books| books.taken()).unwrap_or_default();
    let mut conductor = Conductor {
        scheduler,
        origin,
        clients: HashMap::new(),
        unread: HashMap::new(),
        nodes: HashMap::new(),
        wants: HashMap::new(),
        wants_so_far: 0,
        shelf,
        news: Newsroom::default(),
        count,
        commands,
        bills: Bills::new(books),
        telemetry,
        speaker: None,
    };
    for slice in taken {
        let taken = slice.taken();
        let (account, window) = (slice.account, slice.window);
        conductor.scheduler.handle(Time::ZERO, Input::Booked { account, window, taken });
    }
    tokio::spawn(conductor.run(inbox, cancelled));
    nodes
}

impl Conductor {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Command>,
        mut cancelled: mpsc::UnboundedReceiver<RequestId>,
    ) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut alarm: std::pin::Pin<Box<Sleep>> = Box::pin(sleep_until(self.origin.into()));
        loop {
            let wake = self.scheduler.wake_at();
            if let Some(wake) = wake {
                let at = self.origin + Duration::from_nanos(wake.0);
                if alarm.deadline() != at.into() {
                    alarm.as_mut().reset(at.into());
                }
            }
            tokio::select! {
                biased;
                Some(request) = cancelled.recv() => self.handle(Input::Cancel(request)),
                taken = inbox.recv_many(&mut batch, BATCH) => {
                    if taken == 0 {
                        break;
                    }
                    for command in batch.drain(..) {
                        if let Command::Shutdown(done) = command {
                            self.close();
                            // Whoever asked may have stopped waiting.
                            _ = done.send(());
                            return;
                        }
                        self.obey(command);
                    }
                }
                () = &mut alarm, if wake.is_some() => self.handle(Input::Tick),
            }
        }
        self.close();
    }

    fn now(&self) -> Time {
        Time::ZERO + self.origin.elapsed()
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { ask, client, reply } => self.submit(ask, client, reply),
            Command::Cancel(request) => self.handle(Input::Cancel(request)),
            Command::Reader { request, behind } => self.handle(Input::Reader { request, behind }),
            Command::Connected { node, member, cluster, profile, link, orders } => {
                let key = member.as_ref().map(|m| m.key);
                let line = Line::Link { link, orders };
                let here = Node { name: profile.name.as_str().into(), key, cluster, line };
                self.connected(node, here, profile, member.is_some_and(|m| m.drained));
            }
            Command::Upstream { node, profile, upstream } => {
                let (name, line) = (profile.name.as_str().into(), Line::Upstream(upstream));
                self.connected(node, Node { name, key: None, cluster: None, line }, profile, false);
            }
            Command::RoundTrip { node, time } => self.handle(Input::RoundTrip { node, time }),
            Command::FromNode { node, from } => {
                if let FromNode::Profile(profile) = &from
                    && self.nodes.contains_key(&node)
                {
                    self.shelf.hold(node, profile);
                }
                if let FromNode::Event { request, attempt, event: Event::Failed(failure) } = &from
                    && let Some(client) = self.clients.get_mut(request)
                {
                    client.trail.attempt_failed(*attempt, failure.kind);
                }
                self.speaker = Some(node);
                self.handle(Input::Node { node, from });
                self.speaker = None;
            }
            Command::Expel { key, reason } => {
                for node in self.with_key(key) {
                    if let Some(node) = self.nodes.get(&node) {
                        node.line.close(&reason);
                    }
                    self.lost(node, reason.clone());
                }
            }
            Command::Drain { key, on } => {
                for node in self.with_key(key) {
                    self.drain(node, on);
                }
            }
            Command::Want { model, reply } => {
                self.wants_so_far += 1;
                self.wants.insert(self.wants_so_far, reply);
                self.handle(Input::Want { want: self.wants_so_far, model });
            }
            Command::Policy(policy) => {
                self.scheduler.set_policy(self.now(), policy);
                self.act(None);
            }
            Command::Clock(clock) => self.scheduler.set_clock(self.now(), clock),
            Command::Keys(names) => {
                self.bills.names.clone_from(&names);
                self.handle(Input::Keys(names));
            }
            Command::Allow(allowances) => self.handle(Input::Allow(allowances)),
            Command::Booked(news) => {
                for (account, window, taken) in news {
                    self.handle(Input::Booked { account, window, taken });
                }
            }
            // Whoever asked may have stopped waiting.
            Command::Survey(reply) => _ = reply.send(self.survey()),
            Command::Measure(reply) => _ = reply.send((self.survey(), self.scheduler.load())),
            Command::Watch(reader) => self.news.add(reader),
            Command::Tokens { node, request, attempt, deliveries } => {
                self.speaker = Some(node);
                let foreign = matches!(self.nodes.get(&node), Some(Node { line: Line::Upstream(_), .. }));
                if let Some(client) = self.clients.get_mut(&request) {
                    client.trail.tokens(attempt, deliveries.len() as u32);
                    if foreign {
                        client.tokens_of = None;
                    }
                }
                for (token, place) in deliveries {
                    let from = FromNode::Event { request, attempt, event: Event::Token(token) };
                    self.scheduler.handle(self.now(), Input::Node { node, from });
                    self.act(Some((request, place)));
                }
                self.speaker = None;
            }
            Command::Broken { node, request, attempt, reason } => {
                if let Some(client) = self.clients.get_mut(&request) {
                    client.trail.attempt_broke(attempt);
                }
                self.handle(Input::Broken { node, request, attempt, reason });
            }
            Command::Lost { node, reason } => self.lost(node, reason),
            Command::Shutdown(_) => unreachable!("the loop takes it"),
        }
    }

    fn lost(&mut self, node: NodeId, reason: String) {
        if let Some(gone) = self.nodes.remove(&node) {
            tracing::info!("node {} is gone: {reason}", gone.name);
            self.clients.values_mut().for_each(|client| client.trail.lost(&gone.name));
            self.shelf.release(node);
            self.news.tell(News::Left { name: gone.name.to_string(), key: gone.key, reason: reason.clone() });
            self.count.send_replace(self.nodes.len());
        }
        self.handle(Input::Lost { node, reason });
    }

    fn connected(&mut self, node: NodeId, here: Node, profile: Profile, drained: bool) {
        let (key, name) = (here.key, here.name.clone());
        // A node whose old link is not known to be dead yet: the new one counts.
        for old in key.map(|key| self.with_key(key)).unwrap_or_default() {
            let reason = "the node has connected anew";
            if let Some(old) = self.nodes.get(&old) {
                old.line.close(reason);
            }
            self.lost(old, reason.into());
        }
        tracing::info!("node {name} is here with {} models", profile.models.len());
        self.shelf.hold(node, &profile);
        self.nodes.insert(node, here);
        self.handle(Input::Connected { node, profile });
        if drained {
            self.drain(node, true);
        }
        self.news.tell(News::Joined { name: name.to_string(), key });
        self.count.send_replace(self.nodes.len());
    }

    fn with_key(&self, key: PublicKey) -> Vec<NodeId> {
        self.nodes.iter().filter(|(_, node)| node.key == Some(key)).map(|(id, _)| *id).collect()
    }

    fn drain(&mut self, id: NodeId, on: bool) {
        if let Some(node) = self.nodes.get(&id) {
            // It is only told for its person's sake.
            _ = node.line.order(Order::Drain { on });
            self.news.tell(News::Drained { name: node.name.to_string(), key: node.key, on });
        }
        self.handle(Input::Drain { node: id, on });
    }

    fn survey(&self) -> Vec<NodeInfo> {
        let all = self.scheduler.survey(self.now());
        all.into_iter()
            .map(|view| NodeInfo { key: self.nodes.get(&view.node).and_then(|n| n.key), view })
            .collect()
    }

    fn submit(&mut self, ask: Box<Generate>, client: Client, reply: oneshot::Sender<Result<(), Failure>>) {
        let request = ask.request;
        self.clients.insert(request, client);
        self.bills.begin(&ask);
        self.scheduler.handle(self.now(), Input::Submit(ask));
        let mut refused = None;
        while let Some(output) = self.scheduler.poll() {
            match output {
                Output::Emit { request: id, event: Event::Failed(failure) } if id == request => {
                    if let Some(mut client) = self.clients.remove(&request) {
                        client.trail.refused(failure.kind);
                    }
                    self.bills.refused(request);
                    refused = Some(failure);
                }
                output => self.perform(output, &mut None),
            }
        }
        // Whoever asked may be gone; then its events are too, and the pump finds out.
        _ = reply.send(refused.map_or(Ok(()), Err));
    }

    fn handle(&mut self, input: Input) {
        self.scheduler.handle(self.now(), input);
        self.act(None);
    }

    /// Does what the scheduler says. `place` is where a token of that request goes, if it is to be delivered.
    fn act(&mut self, mut place: Option<(RequestId, OwnedPermit<Event>)>) {
        while let Some(output) = self.scheduler.poll() {
            self.perform(output, &mut place);
        }
    }

    fn perform(&mut self, output: Output, place: &mut Option<(RequestId, OwnedPermit<Event>)>) {
        match output {
            Output::Send { node, message: ToNode::Generate(ask) } => self.send(node, *ask),
            // Dropping the pump's stream tells the node.
            Output::Send { message: ToNode::Cancel { request, attempt }, .. } => {
                if let Some(client) = self.clients.get_mut(&request) {
                    client.trail.left(attempt);
                    let stopped = client.pumps.extract_if(.., |(of, _)| *of == attempt);
                    stopped.for_each(|(_, pump)| pump.abort());
                }
            }
            Output::Send { node, message } => self.order(node, &message),
            Output::Reserved { request, attempt, entries } => self.bills.reserve(request, attempt, entries),
            Output::Settled { request, attempt, entries } => self.bills.settle(request, attempt, entries),
            Output::Spent { key, request, attempt, amount, worst, .. } => {
                if let Some(client) = self.clients.get_mut(&request) {
                    client.trail.spent(attempt, amount);
                    client.course.spent(amount);
                }
                self.bills.spent(request, amount);
                if amount > worst {
                    tracing::warn!(
                        "{request:?} cost {amount} billionths of a dollar, and {worst} was the most that its provider's \
                         prices allow; more will be reserved there from now on"
                    );
                }
                tracing::debug!("{request:?} cost {key:?} {amount} billionths of a dollar");
            }
            Output::Found { want, found } => {
                if let Some(reply) = self.wants.remove(&want) {
                    // Whoever asked may have stopped waiting.
                    _ = reply.send(found);
                }
            }
            Output::Emit { request, event: Event::Token(token) } => match place.take() {
                Some((owner, place)) if owner == request => {
                    self.takes_part(request);
                    self.bills.token(request);
                    if let Some(client) = self.clients.get_mut(&request).filter(|c| c.conversation.is_some())
                    {
                        client.so_far.push_str(&token.text);
                    }
                    _ = place.send(Event::Token(token));
                }
                _ => tracing::error!("a token of {request:?} has no place; this is a bug"),
            },
            Output::Emit { request, event } => {
                self.unread.remove(&request);
                if matches!(event, Event::Finished { .. }) {
                    self.takes_part(request);
                }
                if let Some(mut client) = self.clients.remove(&request) {
                    let ran = Ran { nodes: client.course.nodes(), estimated: client.course.cost().estimated };
                    self.bills.end(request, &event, ran, |model| self.shelf.name_of(model));
                    let node = self.speaker.and_then(|node| self.nodes.get(&node)).map(|node| &*node.name);
                    match &event {
                        Event::Finished { reason, usage, .. } => client.trail.finished(node, *reason, usage),
                        Event::Failed(failure) => client.trail.refused(failure.kind),
                        Event::Token(_) => {}
                    }
                    client.pumps.iter().for_each(|(_, pump)| pump.abort());
                    client.last.send(event);
                }
            }
            Output::Disconnect { node, reason, refuted } => {
                if let Some(gone) = self.nodes.remove(&node) {
                    tracing::info!("node {} is given up: {reason}", gone.name);
                    self.clients.values_mut().for_each(|client| client.trail.lost(&gone.name));
                    if refuted {
                        gone.refute();
                    }
                    gone.line.close(&reason);
                    self.shelf.release(node);
                    self.news.tell(News::Left { name: gone.name.to_string(), key: gone.key, reason });
                    self.count.send_replace(self.nodes.len());
                }
            }
        }
    }

    /// What is told to a client of a request comes from a node: the one that speaks.
    fn takes_part(&mut self, request: RequestId) {
        let (Some(speaker), Some(client)) = (self.speaker, self.clients.get_mut(&request)) else { return };
        if client.node.replace(speaker) != Some(speaker)
            && let Some(node) = self.nodes.get(&speaker)
        {
            client.course.joined(node.name.clone());
        }
    }

    /// Orders may not be lost: a node that doesn't take them is no good.
    fn order(&mut self, id: NodeId, message: &ToNode) {
        let (Some(node), Some(order)) = (self.nodes.get(&id), Order::of(message)) else { return };
        if !node.line.order(order) {
            node.line.close("it takes no orders");
        }
    }

    fn send(&mut self, id: NodeId, mut ask: Generate) {
        if ask.request.is_own() {
            // Nobody waits for it; what comes is kept until it has ended.
            self.clients.entry(ask.request).or_insert_with(|| {
                let trail = self.telemetry.follow(&ask, telemetry::Operation::default(), None);
                let (client, events) = Client::new(ask.model, None, trail);
                self.unread.insert(ask.request, events);
                client
            });
        }
        let Some(client) = self.clients.get_mut(&ask.request) else { return };
        let (Some(node), Some(commands)) = (self.nodes.get(&id), self.commands.upgrade()) else { return };
        let (request, attempt) = (ask.request, ask.attempt);
        let whither = node.whither(&self.shelf, ask.model);
        client.trail.placed(&mut ask, whither);
        let about = telemetry::about(ask.trace);
        let pump = Pump { node: id, request, attempt, client: client.events.clone(), commands };
        let receipt = self.bills.receipt(request, attempt);
        let task = match &node.line {
            Line::Upstream(upstream) => {
                let (upstream, model, talk) =
                    (upstream.upstream.clone(), upstream.model.clone(), client.talk());
                tokio::spawn(
                    async move {
                        if pump.is_paid(receipt).await {
                            pump.consult(upstream, model, ask, talk).await;
                        }
                    }
                    .instrument(about),
                )
            }
            Line::Link { link, .. } => {
                let reword = client.tokens_of != Some(ask.model);
                let reword = reword.then(|| self.shelf.by_id(ask.model).zip(client.talk()));
                let link = link.clone();
                tokio::spawn(
                    async move {
                        if pump.is_paid(receipt).await {
                            pump.run(link, ask, reword).await;
                        }
                    }
                    .instrument(about),
                )
            }
        };
        let task = task.abort_handle();
        client.pumps.retain(|(_, pump)| !pump.is_finished());
        client.pumps.push((attempt, task));
    }

    /// Ends all requests and links.
    fn close(&mut self) {
        let failure =
            || Failure { kind: FailureKind::Cancelled, message: "the scheduler is shutting down".into() };
        for (_, client) in self.clients.drain() {
            client.pumps.iter().for_each(|(_, pump)| pump.abort());
            client.last.send(Event::Failed(failure()));
        }
        for (_, node) in self.nodes.drain() {
            node.line.close("the scheduler is shutting down");
        }
    }
}
