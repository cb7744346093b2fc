//! The driver owns the scheduler, the nodes of this process and the clock; the gateway and the CLI ask it.
//!
//! A request goes `generate` -> scheduler -> link -> node -> engine, and its events come back the same way: the
//! driver's task (`conductor`) alone touches the scheduler; a task a node (`attendant`) reads its control stream; a
//! task a request (`pump`) reads its stream, no faster than the client reads.

mod attendant;
mod conductor;
mod pump;
mod start;

use conductor::Command;
pub use start::{DeviceOptions, DriverConfig, DriverError, ModelSource, ModelSpec};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};
use weir_backends::text::{ChatTemplate, Tokenizer};
use weir_node::Resident;
use weir_scheduler::{Event, Failure, FailureKind, Generate, ModelId, RequestId};
use weir_transport::Link;

/// A model that can be asked for.
#[derive(Debug)]
pub struct ServedModel {
    /// What requests call it.
    pub name: String,
    /// By content.
    pub id: ModelId,
    /// Longest sequence, prompt and output, in tokens.
    pub context: u32,
    /// Of its file.
    pub tokenizer: Arc<Tokenizer>,
    /// Of its file; the plain one where it has none.
    pub template: Arc<ChatTemplate>,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
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
    nodes: Nodes,
    cancels: mpsc::UnboundedSender<RequestId>,
}

/// The names of the nodes that have taken part in a request.
type Nodes = Arc<Mutex<Vec<Arc<str>>>>;

impl Generation {
    /// The names of the nodes that have taken part so far, first to last.
    pub fn nodes(&self) -> Vec<Arc<str>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
    models: Vec<Arc<ServedModel>>,
    residents: Vec<(String, Resident)>,
    /// Nodes connected.
    nodes: watch::Receiver<usize>,
    next_request: AtomicU64,
    next_node: AtomicU64,
}

impl Driver {
    /// Loads the models, one after the other, and starts. Must be called within a tokio runtime; loading happens on
    /// threads of its own, so that the caller can do other things meanwhile.
    pub async fn start(config: DriverConfig) -> Result<Driver, DriverError> {
        start::start(config).await
    }

    /// What can be asked for.
    pub fn models(&self) -> Vec<Arc<ServedModel>> {
        self.inner.models.clone()
    }

    /// The model of that name.
    pub fn model(&self, name: &str) -> Option<Arc<ServedModel>> {
        self.inner.models.iter().find(|m| m.name == name).cloned()
    }

    /// Asks for a generation; fails at once where there is no room or no such model.
    pub async fn generate(&self, ask: Ask) -> Result<Generation, Failure> {
        let id = RequestId(self.inner.next_request.fetch_add(1, Ordering::Relaxed));
        let (client, events) = conductor::Client::new();
        let generation =
            Generation { id, events, nodes: client.nodes.clone(), cancels: self.inner.cancels.clone() };
        let (reply, accepted) = oneshot::channel();
        let ask = Box::new(Generate { request: id, attempt: 0, ..ask });
        let gone = |_| Failure { kind: FailureKind::Internal, message: "the scheduler has stopped".into() };
        self.inner.commands.send(Command::Submit { ask, client, reply }).await.map_err(|_| gone(()))?;
        accepted.await.map_err(|_| gone(()))??;
        Ok(generation)
    }

    /// Takes in the node at the other end of a link. Returns at once; the node serves when it has said what it holds.
    pub fn attach(&self, link: Link) {
        let number = self.inner.next_node.fetch_add(1, Ordering::Relaxed);
        attendant::spawn(link, weir_scheduler::NodeId(number), self.inner.commands.clone());
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
        let trouble =
            |(name, resident): &(String, Resident)| Some(format!("{name}: {}", resident.trouble()?));
        let troubles: Vec<String> = self.inner.residents.iter().filter_map(trouble).collect();
        let nodes = *self.inner.nodes.borrow();
        let served: Vec<&str> = self.inner.models.iter().map(|m| m.name.as_str()).collect();
        let detail = match troubles.is_empty() {
            false => troubles.join("; "),
            true if nodes == 0 => "no node is connected".into(),
            true => format!("{nodes} nodes, models here: {}", served.join(", ")),
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
        let residents = self.inner.residents.clone();
        let stop = move || residents.iter().for_each(|(_, resident)| resident.shutdown());
        if let Err(error) = tokio::task::spawn_blocking(stop).await {
            tracing::error!("stopping the engines: {error}");
        }
    }
}
