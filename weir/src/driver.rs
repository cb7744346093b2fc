//! The driver owns the scheduler, the nodes of this process and the clock; the gateway and the CLI ask it.
//!
//! A request goes `generate` -> scheduler -> link -> node -> engine, and its events come back the same way: the
//! driver's task (`conductor`) alone touches the scheduler; a task a node (`attendant`) reads its control stream; a
//! task a request (`pump`) reads its stream, no faster than the client reads.

mod attendant;
mod bill;
mod conductor;
mod consult;
mod conversation;
mod course;
mod news;
mod port;
mod provider;
mod pump;
mod shelf;
mod start;
mod stock;

use crate::cluster::Cluster;
use crate::keys::Keys;
use crate::telemetry::{Operation, Telemetry};
use attendant::Gate;
use conductor::Command;
pub use consult::NO_TOKEN;
pub use conversation::{Conversation, Words};
use course::Course;
pub use course::{Cost, Extra};
pub use news::{News, NodeInfo};
pub use port::Port;
use shelf::Shelf;
pub use start::{
    DeviceChoice, DeviceOptions, DriverConfig, DriverError, ModelSource, ModelSpec, load_all, worker,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
pub use stock::{stock, stock_here};
use tokio::sync::{mpsc, oneshot, watch};
use weir_backends::text::{ChatTemplate, Tokenizer};
use weir_node::{Machine, Resident, Stock, Worker};
use weir_scheduler::{
    Allowance, Clock, Event, Failure, FailureKind, Generate, Load, ModelId, Policy, RequestId, Wanted,
};
use weir_transport::{Link, PublicKey};

/// A model that can be asked for.
#[derive(Clone, Debug)]
pub struct ServedModel {
    /// What requests call it.
    pub name: String,
    /// By content.
    pub id: ModelId,
    /// Longest sequence, prompt and output, in tokens.
    pub context: u32,
    /// Who runs it.
    pub source: Source,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
}

/// Who runs a model.
#[derive(Clone, Debug)]
pub enum Source {
    /// Nodes, from its file.
    Nodes {
        /// Of its file.
        tokenizer: Arc<Tokenizer>,
        /// Of its file; the plain one where it has none.
        template: Arc<ChatTemplate>,
    },
    /// An upstream, which takes messages and text.
    Upstream {
        /// Its name.
        provider: Arc<str>,
        /// It is an engine of our own.
        own: bool,
        /// Longest answer, in tokens.
        output_max: Option<u32>,
    },
}

impl ServedModel {
    /// Its tokenizer and template; an upstream's are its own business.
    pub fn text(&self) -> Option<(&Arc<Tokenizer>, &Arc<ChatTemplate>)> {
        match &self.source {
            Source::Nodes { tokenizer, template } => Some((tokenizer, template)),
            Source::Upstream { .. } => None,
        }
    }

    /// Whether it is a company's: it is meant only where it is named in full.
    pub fn is_foreign(&self) -> bool {
        matches!(self.source, Source::Upstream { own: false, .. })
    }
}

/// A request as the gateway makes it: `request` and `attempt` are the scheduler's and may be anything.
pub type Ask = Generate;

/// A request under way. Dropping it cancels what still runs.
#[derive(Debug)]
pub struct Generation {
    /// Its number, unique for the life of this process.
    pub id: RequestId,
    /// What comes out; after `Finished` or `Failed` there is nothing more. Whoever reads slowly slows this request
    /// down, and no other.
    pub events: mpsc::Receiver<Event>,
    course: Course,
    cancels: mpsc::UnboundedSender<RequestId>,
}

impl Generation {
    /// The names of the nodes that have taken part so far, first to last.
    pub fn nodes(&self) -> Vec<Arc<str>> {
        self.course.nodes()
    }

    /// What it has cost so far; all of it, once its last event is here.
    pub fn cost(&self) -> Cost {
        self.course.cost()
    }

    /// What came with the text at a position, once.
    pub fn extra(&self, position: u32) -> Option<Extra> {
        self.course.take(position)
    }

    /// An upstream's own word for why it ended, where ours don't say it: `tool_calls`, `content_filter`, ...
    pub fn finish(&self) -> Option<String> {
        self.course.finish()
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // The conductor drops its end of the events when a request has ended.
        if !self.events.is_closed() {
            _ = self.cancels.send(self.id);
        }
    }
}

/// Whether this process can do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Nothing is dead or stuck: else restart it.
    pub live: bool,
    /// Requests can be served now.
    pub ready: bool,
    /// For a person: what is wrong, or what is served.
    pub detail: String,
}

/// Owns the scheduler. Cheap to clone; all clones are the same driver, which ends with the last of them.
#[derive(Clone)]
pub struct Driver {
    inner: Arc<Inner>,
}

struct Inner {
    commands: mpsc::Sender<Command>,
    cancels: mpsc::UnboundedSender<RequestId>,
    shelf: Arc<Shelf>,
    /// What this process holds.
    local: Worker,
    /// Nodes connected.
    nodes: watch::Receiver<usize>,
    allowed: tokio::sync::Mutex<Allowed>,
    telemetry: Telemetry,
    next_request: AtomicU64,
    next_node: Arc<AtomicU64>,
}

/// What may be spent, by who says so.
#[derive(Default)]
struct Allowed {
    keys: Vec<Allowance>,
    policy: Vec<Allowance>,
}

impl Driver {
    /// Loads the models, one after the other, and starts. Must be called within a tokio runtime; loading happens on
    /// threads of its own, so that the caller can do other things meanwhile.
    pub async fn start(config: DriverConfig) -> Result<Driver, DriverError> {
        start::start(config, Machine::default(), Stock::none()).await
    }

    /// The same, where the node of this process can be told to load others of `stock`, as the memory of `machine` allows.
    pub async fn start_with(
        config: DriverConfig,
        machine: Machine,
        stock: Stock,
    ) -> Result<Driver, DriverError> {
        let driver = start::start(config, machine, stock).await?;
        let local = driver.inner.local.clone();
        tokio::spawn(async move { local.try_out().await });
        Ok(driver)
    }

    /// What can be asked for.
    pub fn models(&self) -> Vec<Arc<ServedModel>> {
        self.inner.shelf.models()
    }

    /// The model of that name.
    pub fn model(&self, name: &str) -> Option<Arc<ServedModel>> {
        self.inner.shelf.model(name)
    }

    /// The model of that id, if a node holds it.
    pub fn model_by_id(&self, id: ModelId) -> Option<Arc<ServedModel>> {
        self.inner.shelf.by_id(id)
    }

    /// Names of models that no node holds and some node could load.
    pub fn offers(&self) -> Vec<(String, ModelId)> {
        self.inner.shelf.offers()
    }

    /// A model that can be asked for, once a node holds it: one loads it if none does. Fails if none will.
    pub async fn bring(&self, model: Wanted) -> Result<Arc<ServedModel>, Failure> {
        let gone = |_| Failure { kind: FailureKind::Busy, message: "the scheduler has stopped".into() };
        let (reply, found) = oneshot::channel();
        self.inner.commands.send(Command::Want { model, reply }).await.map_err(|_| gone(()))?;
        let id = found.await.map_err(|_| gone(()))??;
        self.inner.shelf.by_id(id).ok_or_else(|| Failure {
            kind: FailureKind::NoModel,
            message: "the model is there, but the node that holds it hands out no tokenizer".into(),
        })
    }

    /// Asks for a generation; fails at once where there is no room or no such model.
    pub async fn generate(&self, ask: Ask) -> Result<Generation, Failure> {
        self.converse(ask, None).await
    }

    /// The same of what upstreams and other models can be told, too.
    pub async fn converse(
        &self,
        ask: Ask,
        conversation: Option<Arc<Conversation>>,
    ) -> Result<Generation, Failure> {
        self.answer(ask, conversation, Operation::default()).await
    }

    /// The same, for whom telemetry says what is asked for.
    pub async fn answer(
        &self,
        ask: Ask,
        conversation: Option<Arc<Conversation>>,
        operation: Operation,
    ) -> Result<Generation, Failure> {
        let id = RequestId(self.inner.next_request.fetch_add(1, Ordering::Relaxed));
        let trail = self.inner.telemetry.follow(&ask, operation, self.inner.shelf.by_id(ask.model));
        let (client, events) = conductor::Client::new(ask.model, conversation, trail);
        let generation =
            Generation { id, events, course: client.course.clone(), cancels: self.inner.cancels.clone() };
        let (reply, accepted) = oneshot::channel();
        let ask = Box::new(Generate { request: id, attempt: 0, ..ask });
        let gone = |_| Failure { kind: FailureKind::Busy, message: "the scheduler has stopped".into() };
        self.inner.commands.send(Command::Submit { ask, client, reply }).await.map_err(|_| gone(()))?;
        accepted.await.map_err(|_| gone(()))??;
        Ok(generation)
    }

    /// Takes in the node of this process at the other end of a link. Returns at once; the node serves when it has said
    /// what it holds.
    pub fn attach(&self, link: Link) {
        self.attend(link, Gate::Open);
    }

    /// Takes in an upstream: each of its models is a node, for as long as it is there.
    pub fn attach_upstream(&self, upstream: weir_upstream::Upstream) {
        let inner = &self.inner;
        inner.shelf.expect_upstreams();
        provider::spawn(upstream, inner.next_node.clone(), inner.shelf.clone(), &inner.commands);
    }

    /// Takes in whoever is at the other end of a link, if the gate lets it.
    fn attend(&self, link: Link, gate: Gate) {
        let number = self.inner.next_node.fetch_add(1, Ordering::Relaxed);
        let shelf = self.inner.shelf.clone();
        attendant::spawn(link, gate, weir_scheduler::NodeId(number), shelf, self.inner.commands.clone());
    }

    /// Cuts the links of the node with this key.
    pub async fn expel(&self, key: PublicKey, reason: &str) {
        // Without a conductor there are no links.
        _ = self.inner.commands.send(Command::Expel { key, reason: reason.to_owned() }).await;
    }

    /// Sends nothing new to the node with this key, and moves what runs there; or uses it again.
    pub async fn drain(&self, key: PublicKey, on: bool) {
        // Without a conductor nothing is sent anyway.
        _ = self.inner.commands.send(Command::Drain { key, on }).await;
    }

    /// Another policy holds from now on.
    pub async fn set_policy(&self, policy: Box<dyn Policy>) {
        // Without a conductor nothing is placed anyway.
        _ = self.inner.commands.send(Command::Policy(policy)).await;
    }

    /// The names of keys, and what may be spent by them, from now on.
    pub async fn set_keys(&self, keys: &Keys) {
        let mut allowed = self.inner.allowed.lock().await;
        // Without a conductor nothing is spent anyway.
        _ = self.inner.commands.send(Command::Keys(keys.names())).await;
        allowed.keys = keys.allowances();
        self.allow(&allowed).await;
    }

    /// What may be spent by the policy, from now on.
    pub async fn set_policy_allowances(&self, allowances: Vec<Allowance>) {
        let mut allowed = self.inner.allowed.lock().await;
        allowed.policy = allowances;
        self.allow(&allowed).await;
    }

    /// Sent while they are held, so that the last to change them is the last to be heard.
    async fn allow(&self, allowed: &Allowed) {
        let all = allowed.keys.iter().chain(&allowed.policy).cloned().collect();
        _ = self.inner.commands.send(Command::Allow(all)).await;
    }

    /// What may stand in for a model, by names, from now on: whether it does, the policy says each time.
    pub fn set_stand_ins(&self, stand_ins: BTreeMap<String, Vec<String>>) {
        self.inner.shelf.set_stand_ins(stand_ins);
    }

    /// The names of what may stand in for a model, first choice first.
    pub fn stand_ins(&self, model: &str) -> Vec<String> {
        self.inner.shelf.stand_ins(model)
    }

    /// Whether a request may go to a model whose tokens aren't its own's: then what it says must be kept.
    pub fn may_reword(&self) -> bool {
        self.inner.shelf.may_reword()
    }

    /// What time it is, for policies that ask.
    pub async fn set_clock(&self, clock: Clock) {
        _ = self.inner.commands.send(Command::Clock(clock)).await;
    }

    /// The nodes that are connected.
    pub async fn survey(&self) -> Vec<NodeInfo> {
        let (reply, nodes) = oneshot::channel();
        // Without a conductor there are no nodes.
        _ = self.inner.commands.send(Command::Survey(reply)).await;
        nodes.await.unwrap_or_default()
    }

    /// The same, and how much there is of everything.
    pub async fn measure(&self) -> (Vec<NodeInfo>, Load) {
        let (reply, measured) = oneshot::channel();
        // Without a conductor there is nothing.
        _ = self.inner.commands.send(Command::Measure(reply)).await;
        measured.await.unwrap_or_default()
    }

    /// What it counts, and what leaves.
    pub fn telemetry(&self) -> &Telemetry {
        &self.inner.telemetry
    }

    /// The models in this process's memory.
    pub fn residents(&self) -> Vec<Resident> {
        self.inner.local.residents()
    }

    /// What happens to nodes from now on. Who doesn't read is dropped.
    pub async fn news(&self) -> mpsc::Receiver<News> {
        let (sender, news) = mpsc::channel(news::BACKLOG);
        // Without a conductor there is no news, and the channel closes.
        _ = self.inner.commands.send(Command::Watch(sender)).await;
        news
    }

    /// Lets nodes of the cluster connect at `address` (UDP), until the port is dropped.
    pub fn listen(
        &self,
        address: std::net::SocketAddr,
        cluster: Arc<Cluster>,
    ) -> Result<Port, weir_transport::EndpointError> {
        Port::open(self.clone(), address, cluster)
    }

    /// How many nodes are connected, to look at and to wait for.
    pub fn nodes(&self) -> watch::Receiver<usize> {
        self.inner.nodes.clone()
    }

    /// Looks at the engines of this process, and at the scheduler.
    pub fn health(&self) -> Health {
        if self.inner.commands.is_closed() {
            return Health { live: false, ready: false, detail: "the scheduler has stopped".into() };
        }
        let trouble = |resident: &Resident| Some(format!("{}: {}", resident.name(), resident.trouble()?));
        let troubles: Vec<String> = self.inner.local.residents().iter().filter_map(trouble).collect();
        let nodes = *self.inner.nodes.borrow();
        let served: Vec<String> = self.models().iter().map(|m| m.name.clone()).collect();
        let detail = match troubles.is_empty() {
            false => troubles.join("; "),
            true if nodes == 0 => "no node is connected".into(),
            true => format!("{nodes} nodes, models: {}", served.join(", ")),
        };
        Health { live: troubles.is_empty(), ready: troubles.is_empty() && nodes > 0, detail }
    }

    /// Ends all requests and waits for the engines to stop.
    pub async fn shutdown(&self) {
        let (done, stopped) = oneshot::channel();
        if self.inner.commands.send(Command::Shutdown(done)).await.is_ok() {
            // An error means that it stopped before it could say so.
            _ = stopped.await;
        }
        let residents = self.inner.local.residents();
        let stop = move || residents.iter().for_each(Resident::shutdown);
        if let Err(error) = tokio::task::spawn_blocking(stop).await {
            tracing::error!("stopping the engines: {error}");
        }
    }
}
