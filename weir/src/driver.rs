//! The driver owns the scheduler, the nodes of this process and the clock; the gateway and the CLI ask it.
//!
//! A request goes `generate` -> scheduler -> link -> node -> engine, and its events come back the same way.
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;
use weir_scheduler::{Event, Failure, FailureKind, Generate, KvType, ModelId, RequestId};

/// What a driver serves and how.
#[derive(Clone, Debug, Default)]
pub struct DriverConfig {
    /// The models that this process holds.
    pub models: Vec<ModelSpec>,
    /// How they are loaded.
    pub device: DeviceOptions,
    /// Schedule only: hold no model here.
    pub no_node: bool,
}

/// A model to serve.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// What requests call it.
    pub name: String,
    /// Where it comes from.
    pub source: ModelSource,
}

impl ModelSpec {
    /// The name under which [`ModelSpec::null`] is asked for and served.
    pub const NULL: &'static str = "null";

    /// A model of the file `path`.
    pub fn file(name: impl Into<String>, path: impl Into<PathBuf>) -> ModelSpec {
        ModelSpec { name: name.into(), source: ModelSource::File(path.into()) }
    }

    /// The null model: made-up tokens at a modelled pace, for load tests. It needs no file.
    pub fn null() -> ModelSpec {
        ModelSpec { name: ModelSpec::NULL.into(), source: ModelSource::Null }
    }
}

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// A .gguf, the first file of a split one.
    File(PathBuf),
    /// No file: made-up tokens.
    Null,
}

/// How models are loaded onto this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceOptions {
    /// Threads that compute; one a physical core where none.
    pub threads: Option<usize>,
    /// How keys and values are stored.
    pub kv: KvType,
    /// Longest sequence in tokens; the model's own, but no more than 8192, where none.
    pub context: Option<u32>,
    /// Sequences that run at once; 16 where none.
    pub slots: Option<u32>,
}

/// A model that can be asked for.
#[derive(Debug)]
pub struct ServedModel {
    /// What requests call it.
    pub name: String,
    /// By content.
    pub id: ModelId,
    /// Longest sequence, prompt and output, in tokens.
    pub context: u32,
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
    /// What comes out; after `Finished` or `Failed` there is nothing more.
    pub events: mpsc::Receiver<Event>,
    nodes: Arc<Mutex<Vec<Arc<str>>>>,
}

impl Generation {
    /// The names of the nodes that have taken part so far, first to last.
    pub fn nodes(&self) -> Vec<Arc<str>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

/// Why a driver did not start.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A model could not be loaded.
    #[error("model `{name}`: {reason}")]
    Model {
        /// Its name.
        name: String,
        /// What failed and what to try.
        reason: String,
    },
}

/// Owns the scheduler. Cheap to clone; all clones are the same driver.
#[derive(Clone, Debug)]
pub struct Driver {
    models: Arc<[Arc<ServedModel>]>,
}

impl Driver {
    /// Loads the models and starts. Must be called within a tokio runtime; loading happens on threads of its own.
    pub async fn start(config: DriverConfig) -> Result<Driver, DriverError> {
        match config.models.first() {
            Some(spec) => Err(DriverError::Model {
                name: spec.name.clone(),
                reason: "this build has no device that could hold it".into(),
            }),
            None => Ok(Driver { models: Arc::new([]) }),
        }
    }

    /// What can be asked for.
    pub fn models(&self) -> Vec<Arc<ServedModel>> {
        self.models.to_vec()
    }

    /// The model of that name.
    pub fn model(&self, name: &str) -> Option<Arc<ServedModel>> {
        self.models.iter().find(|m| m.name == name).cloned()
    }

    /// Asks for a generation; fails at once where there is no room or no such model.
    pub async fn generate(&self, ask: Ask) -> Result<Generation, Failure> {
        Err(Failure { kind: FailureKind::NoModel, message: format!("no node holds model {}", ask.model) })
    }

    /// Looks at the engines.
    pub fn health(&self) -> Health {
        Health { live: true, ready: !self.models.is_empty(), detail: "no model is loaded".into() }
    }

    /// Ends all requests and waits for the engines to stop.
    pub async fn shutdown(&self) {}
}
