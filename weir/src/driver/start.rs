//! What a driver serves, and how it comes up.
use super::conductor::{self, Command};
use super::shelf::Shelf;
use super::{Driver, Inner, ServedModel, Source};
use crate::books::Books;
use crate::telemetry::{Telemetry, Watcher};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use weir_backends::cpu::{Cpu, CpuOptions};
use weir_backends::engine::Speculation;
use weir_backends::null::Null;
use weir_backends::program::{Device, DeviceError};
use weir_backends::wgpu::Wgpu;
use weir_node::{Credentials, LoadError, LoadOptions, Loaded, Machine, Resident, Stock, Worker};
use weir_scheduler::{Account, Fastest, KvType, Limits, ModelId, Scheduler};
use weir_transport::Link;

/// Commands on their way to the conductor, at most.
const COMMANDS_MAX: usize = 1024;
/// How long the node of this process may take to introduce itself.
const GREETING: Duration = Duration::from_secs(10);

/// What a driver serves and how.
#[derive(Clone, Debug, Default)]
pub struct DriverConfig {
    /// The models that this process holds.
    pub models: Vec<ModelSpec>,
    /// How they are loaded.
    pub device: DeviceOptions,
    /// What is said of the node of this process.
    pub labels: Vec<(String, String)>,
    /// Schedule only: hold no model here.
    pub no_node: bool,
    /// Whom requests may be sent on to.
    pub upstreams: Vec<weir_upstream::Upstream>,
    /// Where it is kept what is spent; nowhere, if none.
    pub books: Option<Arc<Books>>,
    /// What is counted, and what of it leaves.
    pub telemetry: Telemetry,
}

/// A model to serve.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// What requests call it.
    pub name: String,
    /// Where it comes from.
    pub source: ModelSource,
}

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// A .gguf.
    File {
        /// The file; the first of a split one.
        path: PathBuf,
        /// Its SHA-256, if known; else it is read whole once more.
        id: Option<ModelId>,
        /// A smaller model of the same tokenizer, which guesses for it.
        draft: Option<PathBuf>,
    },
    /// No file: made-up tokens.
    Null(Null),
}

impl ModelSpec {
    /// The name under which the null model is asked for and served.
    pub const NULL: &'static str = "null";

    /// The model in the file at `path`.
    pub fn file(name: impl Into<String>, path: impl Into<PathBuf>) -> ModelSpec {
        ModelSpec {
            name: name.into(),
            source: ModelSource::File { path: path.into(), id: None, draft: None },
        }
    }

    /// The same with a smaller model of the same tokenizer that guesses for it; none where either has no file.
    pub fn with_draft(self, draft: &ModelSpec) -> Option<ModelSpec> {
        match (self.source, &draft.source) {
            (ModelSource::File { path, id, .. }, ModelSource::File { path: small, .. }) => {
                let source = ModelSource::File { path, id, draft: Some(small.clone()) };
                Some(ModelSpec { source, ..self })
            }
            _ => None,
        }
    }

    /// The null model: made-up tokens as fast as they can be carried, for load tests. It needs no file.
    pub fn null() -> ModelSpec {
        ModelSpec { name: ModelSpec::NULL.into(), source: ModelSource::Null(Null::default()) }
    }

    /// The null model that `model` names, if it names one: `null`, or at a modelled pace
    /// `null:step_us=10000,prefill_us=50,decode_us=100,end=200`.
    pub fn parse_null(model: &str) -> Option<Result<ModelSpec, String>> {
        let pace = match model.split_once(':') {
            None => (model == ModelSpec::NULL).then_some("")?,
            Some((name, pace)) => (name == ModelSpec::NULL).then_some(pace)?,
        };
        let null = pace.parse::<Null>().map_err(|error| format!("{model}: {error}"));
        Some(null.map(|null| ModelSpec { source: ModelSource::Null(null), ..ModelSpec::null() }))
    }
}

impl From<weir_backends::store::Resolved> for ModelSpec {
    fn from(found: weir_backends::store::Resolved) -> Self {
        let source = ModelSource::File { path: found.path, id: Some(ModelId(found.sha256)), draft: None };
        ModelSpec { name: found.name, source }
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first NVIDIA GPU that can hold the model, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(usize),
    /// A GPU through Vulkan, Metal or Direct3D 12, by its number.
    Wgpu(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceChoice, String> {
        let (kind, number) = text.split_once(':').unwrap_or((text, "0"));
        match (kind, number.parse()) {
            ("auto", _) if kind == text => Ok(DeviceChoice::Auto),
            ("cpu", _) if kind == text => Ok(DeviceChoice::Cpu),
            ("cuda", Ok(n)) => Ok(DeviceChoice::Cuda(n)),
            ("wgpu", Ok(n)) => Ok(DeviceChoice::Wgpu(n)),
            _ => Err(format!(
                "`{text}` is no device; try auto, cpu, cuda, cuda:1, wgpu, wgpu:1 (see `weir devices`)"
            )),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<DeviceChoice, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> String {
        match choice {
            DeviceChoice::Auto => "auto".into(),
            DeviceChoice::Cpu => "cpu".into(),
            DeviceChoice::Cuda(n) => format!("cuda:{n}"),
            DeviceChoice::Wgpu(n) => format!("wgpu:{n}"),
        }
    }
}

/// How models are loaded onto this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceOptions {
    /// What computes.
    pub device: DeviceChoice,
    /// Threads that compute; one a processor where none.
    pub threads: Option<usize>,
    /// How keys and values are stored.
    pub kv: KvType,
    /// Longest sequence in tokens; the model's own, but no more than 8192, where none.
    pub context: Option<u32>,
    /// Sequences that run at once; 16 where none.
    pub slots: Option<u32>,
    /// Bytes that weights and KV caches may take; what is free, where none.
    pub memory: Option<u64>,
    /// Whether the next tokens are guessed where that pays.
    pub speculation: Speculation,
}

/// Why a driver did not start.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A model could not be loaded.
    #[error("model `{name}`: {error}")]
    Model {
        /// Its name.
        name: String,
        /// What failed and what to try.
        error: LoadError,
    },
    /// Two models have one name, or one file is named twice.
    #[error("model `{0}` is listed twice; leave one out, or rename a file")]
    Twice(String),
    /// A thread of ours panicked while loading.
    #[error("loading `{0}` panicked; this is a bug, and the log has its place")]
    Panicked(String),
    /// The node of this process did not introduce itself.
    #[error("the node of this process did not come up; this is a bug, and the log has more")]
    Node,
}

impl DeviceOptions {
    /// Whether the processor is what computes, as far as can be said before a model is loaded.
    pub fn on_processor(&self) -> bool {
        match self.device {
            DeviceChoice::Auto => cuda().is_err(),
            choice => choice == DeviceChoice::Cpu,
        }
    }

    fn cpu(&self) -> Box<dyn Device> {
        Box::new(Cpu::new(CpuOptions { threads: self.threads, ..CpuOptions::default() }))
    }

    /// What may compute, the first choice first.
    fn devices(&self) -> Result<Vec<Box<dyn Device>>, DeviceError> {
        let missing = |why: String| DeviceError::Unsupported(why);
        Ok(match self.device {
            DeviceChoice::Cpu => vec![self.cpu()],
            DeviceChoice::Auto => {
                let found = cuda().inspect_err(|why| tracing::info!("no CUDA: {why}")).unwrap_or_default();
                found.into_iter().chain([self.cpu()]).collect()
            }
            DeviceChoice::Cuda(n) => {
                let found = cuda().map_err(missing)?;
                let count = found.len();
                let none = || {
                    missing(format!("there is no cuda:{n}; this machine has {count} (see `weir devices`)"))
                };
                vec![found.into_iter().nth(n).ok_or_else(none)?]
            }
            DeviceChoice::Wgpu(n) => {
                let found = Wgpu::find();
                let none = || missing(format!("there is no wgpu:{n}; this machine has {}", found.len()));
                vec![Box::new(Wgpu::new(found.get(n).ok_or_else(none)?)?)]
            }
        })
    }

    /// The first of the devices, for a person, and the memory that models may take there: what is free now, unless told.
    pub fn survey(&self) -> Result<(String, u64), DeviceError> {
        let found = self.devices()?.first().map(|device| device.describe());
        let (name, free) = found.map(|about| (about.description, about.memory_free)).unwrap_or_default();
        Ok((name, self.memory.unwrap_or(free)))
    }

    fn load(&self) -> LoadOptions {
        let default = LoadOptions::default();
        LoadOptions {
            context: self.context,
            slots: self.slots.unwrap_or(default.slots),
            kv: self.kv,
            memory: self.memory,
            speculation: self.speculation,
            ..default
        }
    }
}

/// Loads the models one after the other, on threads of their own. Dropping the future leaves a load that is under way
/// to its end.
pub async fn load_all(models: Vec<ModelSpec>, device: DeviceOptions) -> Result<Vec<Loaded>, DriverError> {
    let mut loaded: Vec<Loaded> = Vec::new();
    for spec in models {
        let name = spec.name.clone();
        let load = tokio::task::spawn_blocking(move || load(&spec, device)).await;
        let mut new: Loaded = load
            .map_err(|_| DriverError::Panicked(name.clone()))?
            .map_err(|error| DriverError::Model { name: name.clone(), error })?;
        if loaded.iter().any(|old| old.held.name == name || old.held.model == new.held.model) {
            return Err(DriverError::Twice(name));
        }
        new.held.name = name;
        loaded.push(new);
    }
    Ok(loaded)
}

/// A node that holds these models on this machine, and others of `stock` as the scheduler orders.
pub fn worker(name: &str, mut machine: Machine, loaded: Vec<Loaded>, stock: Stock) -> Worker {
    machine.devices.extend(loaded.iter().map(|l| l.device.clone()));
    machine.devices.dedup();
    let residents = loaded.into_iter().map(|l| Resident::new(l.held, l.text, l.engine)).collect();
    Worker::new(name, machine, residents, stock)
}

pub(super) async fn start(
    config: DriverConfig,
    machine: Machine,
    stock: Stock,
) -> Result<Driver, DriverError> {
    let models = if config.no_node { Vec::new() } else { config.models };
    let loaded = load_all(models, config.device).await?;
    let shelf = Shelf::new(loaded.iter().map(served).collect());
    let machine = Machine { labels: config.labels, ..machine };
    let telemetry = config.telemetry;
    let worker = worker("local", machine, loaded, stock).watched(Arc::new(Watcher::new(&telemetry)));
    let has_node = !worker.residents().is_empty();
    let driver = bring_up(shelf, worker.clone(), config.books, telemetry);
    if has_node {
        let (ours, theirs) = Link::in_memory();
        tokio::spawn(async move {
            let why = worker.serve(&theirs, Credentials::default()).await;
            tracing::debug!("the local node stopped: {why}");
        });
        driver.attach(ours);
        let mut nodes = driver.nodes();
        let up = timeout(GREETING, nodes.wait_for(|nodes| *nodes > 0)).await;
        up.map_err(|_| DriverError::Node)?.map_err(|_| DriverError::Node)?;
    }
    config.upstreams.into_iter().for_each(|upstream| driver.attach_upstream(upstream));
    Ok(driver)
}

pub(super) fn load(spec: &ModelSpec, options: DeviceOptions) -> Result<Loaded, LoadError> {
    match &spec.source {
        ModelSource::File { path, id, draft } => {
            let devices = options.devices()?;
            let last = devices.len().saturating_sub(1);
            for device in &devices[..last] {
                match weir_node::load(path, *id, draft.as_deref(), device.as_ref(), options.load()) {
                    Ok(loaded) => return Ok(loaded),
                    Err(error) => {
                        let device = device.describe().name;
                        tracing::warn!(%error, "{device} can't run {}; trying the next device", path.display());
                    }
                }
            }
            weir_node::load(path, *id, draft.as_deref(), devices[last].as_ref(), options.load())
        }
        ModelSource::Null(null) => weir_node::null(null, options.load()),
    }
}

/// NVIDIA's GPUs, or why there are none.
#[cfg(any(target_os = "linux", target_os = "windows"))]
fn cuda() -> Result<Vec<Box<dyn Device>>, String> {
    let found = weir_backends::cuda::Cuda::all()?;
    Ok(found.into_iter().map(|gpu| Box::new(gpu) as Box<dyn Device>).collect())
}

#[cfg(not(any(target_os = "linux", target_os = "windows")))]
fn cuda() -> Result<Vec<Box<dyn Device>>, String> {
    Err("CUDA is there on Linux and Windows alone".into())
}

fn served(loaded: &Loaded) -> ServedModel {
    ServedModel {
        name: loaded.held.name.clone(),
        id: loaded.held.model,
        context: loaded.held.context,
        source: Source::Nodes { tokenizer: loaded.tokenizer.clone(), template: loaded.template.clone() },
        created: since_1970(),
    }
}

/// Different each time: the standard library's hash keys are the system's randomness.
fn seed() -> u64 {
    RandomState::new().hash_one(0)
}

/// Now, in seconds.
pub(super) fn since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Tells the scheduler what other schedulers take of accounts that are shared.
async fn hear_of_others(
    books: Weak<Books>,
    mut changed: watch::Receiver<()>,
    commands: mpsc::WeakSender<Command>,
) {
    let mut told: HashMap<(Account, i64), u64> = HashMap::new();
    while changed.changed().await.is_ok() {
        let (Some(books), Some(commands)) = (books.upgrade(), commands.upgrade()) else { return };
        let now: HashMap<(Account, i64), u64> =
            books.taken().into_iter().map(|slice| ((slice.account, slice.window), slice.elsewhere)).collect();
        let fresh = now.iter().filter(|(at, elsewhere)| told.get(at) != Some(*elsewhere));
        let news =
            fresh.map(|((account, window), elsewhere)| (account.clone(), *window, *elsewhere)).collect();
        told = now;
        if commands.send(Command::Booked(news)).await.is_err() {
            return;
        }
    }
}

fn bring_up(shelf: Shelf, local: Worker, books: Option<Arc<Books>>, telemetry: Telemetry) -> Driver {
    let (commands, inbox) = mpsc::channel::<Command>(COMMANDS_MAX);
    let (cancels, cancelled) = mpsc::unbounded_channel();
    let scheduler = Scheduler::new(Limits::default(), Box::new(Fastest), seed());
    let shelf = Arc::new(shelf);
    if let Some(books) = &books {
        tokio::spawn(hear_of_others(Arc::downgrade(books), books.changed(), commands.downgrade()));
    }
    let told = (books, telemetry.clone());
    let nodes = conductor::spawn(scheduler, shelf.clone(), inbox, cancelled, commands.downgrade(), told);
    let inner = Inner {
        commands,
        cancels,
        shelf,
        local,
        nodes,
        allowed: tokio::sync::Mutex::default(),
        telemetry,
        next_request: AtomicU64::new(1),
        next_node: Arc::new(AtomicU64::new(1)),
    };
    Driver { inner: Arc::new(inner) }
}
