//! A node at work: it tells the scheduler what it holds, runs what it is given, and streams what comes out.
use crate::caches::Caches;
use crate::clock::{Instant, interval, timeout};
use crate::holdings::{Holdings, Stock};
use crate::meter::{Meter, Observed};
use crate::tasks::Tasks;
use crate::text::ModelText;
use crate::watch::{Ran, Watch};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tracing::Instrument;
use weir_backends::engine::{EngineHandle, EngineStatus};
use weir_scheduler::{
    Event, Failure, FailureKind, Generate, Held, ModelId, ModelStatus, Price, Priority, Profile, Rates,
    RequestId, Status, TextId, Token, TraceContext, Trust,
};
use weir_transport::{
    Fetch, Frame, FrameError, Hello, Link, LinkError, Message, Order, PIECE_MAX, Proof, Refusal, Replica,
    Stream, Urgency, VERSION,
};

/// Events of a request on their way from the engine, at most; beyond that its sequence rests.
const EVENTS_MAX: usize = 32;
/// Tokens in one frame, at most.
const TOKENS_MAX: usize = 64;
/// How long the other end may take to say what a stream is for, or to answer a greeting.
const GREETING: Duration = Duration::from_secs(10);
/// Schedulers of a cluster that are heeded, addresses of each, and bytes of an address or a name, at most.
const SCHEDULERS_MAX: usize = 64;
const ADDRESSES_MAX: usize = 16;
const TEXT_MAX: usize = 300;
/// A step that takes longer has hung.
const STEP_MAX: Duration = Duration::from_secs(60);

/// A model in this node's memory.
#[derive(Clone)]
pub struct Resident {
    pub(crate) held: Held,
    text: ModelText,
    engine: EngineHandle,
    meter: Arc<Mutex<Meter>>,
    running: Arc<AtomicU32>,
}

/// The machine that a node is.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Whose it is: heeded within a process only; over a network the scheduler knows better.
    pub trust: Trust,
    /// What its owner says of it.
    pub labels: Vec<(String, String)>,
    /// Its devices, for a person.
    pub devices: Vec<String>,
    /// Bytes that its models may take, all together.
    pub memory: u64,
    /// Bytes of memory that its devices read in a second; 0 where it wasn't measured.
    pub bandwidth: u64,
    /// What a token costs here.
    pub price: Price,
}

/// A node. One worker may serve several schedulers, each over a link of its own.
#[derive(Clone)]
pub struct Worker {
    name: Arc<str>,
    machine: Arc<Machine>,
    holdings: Arc<Holdings>,
    draining: watch::Sender<bool>,
    /// Schedulers that have let it in, so far.
    welcomes: watch::Sender<u64>,
    /// Is told of what has run.
    watch: Option<Arc<dyn Watch>>,
}

/// By what a scheduler knows a node, or lets it in.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// Of the node's key, over this link.
    pub proof: Option<Proof>,
    /// From a join link.
    pub token: Option<String>,
    /// Without one: a person at the scheduler may be asked.
    pub ask: bool,
}

/// What a scheduler says of those that share its cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedulers {
    /// What it is called among them; nothing where it is alone.
    pub own: Option<String>,
    /// All of them.
    pub all: Vec<Replica>,
}

/// Hears of schedulers, at the welcome and whenever there are others; whether to go on serving this one.
pub type Hears<'a> = &'a (dyn Fn(&Schedulers) -> bool + Send + Sync);

/// Why a worker stopped serving.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The other end said something unexpected.
    #[error("the scheduler did not answer as one should: {0}")]
    Greeting(&'static str),
    /// It wants a protocol version that this program doesn't speak.
    #[error("the scheduler wants protocol version {0}, this program speaks version {VERSION}")]
    Version(u16),
    /// Whoever hears of schedulers doesn't want this one: it is served by another link.
    #[error("another link leads to this scheduler already")]
    Twice,
    /// The scheduler doesn't want this node.
    #[error("{}", .0.message)]
    Refused(Refusal),
}

/// What a scheduler has been told.
#[derive(Default)]
struct Heard {
    models: HashMap<ModelId, (ModelStatus, u32)>,
    caches: Caches,
    own: Own,
}

/// Requests of one scheduler that run here, by model.
#[derive(Clone, Default)]
struct Own(Arc<Mutex<HashMap<ModelId, u32>>>);

/// Takes one from a scheduler's count when it goes.
struct Counted<'a>(&'a Own, ModelId);

impl Own {
    fn change(&self, model: ModelId, by: impl Fn(u32) -> u32) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(model).or_default();
        *count = by(*count);
    }

    fn of(&self, model: ModelId) -> u32 {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.get(&model).copied().unwrap_or(0)
    }

    fn count(&self, model: ModelId) -> Counted<'_> {
        self.change(model, |n| n + 1);
        Counted(self, model)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.change(self.1, |n| n.saturating_sub(1));
    }
}

impl From<FrameError> for WorkerError {
    fn from(error: FrameError) -> Self {
        WorkerError::Link(error.into())
    }
}

impl Resident {
    /// A model that `engine` runs.
    pub fn new(held: Held, text: ModelText, engine: EngineHandle) -> Resident {
        let meter = Arc::new(Mutex::new(Meter::new(held.rates, held.slots)));
        Resident { held, text, engine, meter, running: Arc::default() }
    }

    /// What requests call it.
    pub fn name(&self) -> &str {
        &self.held.name
    }

    /// Requests under way, for all schedulers.
    pub fn running(&self) -> u32 {
        self.running.load(Ordering::Relaxed)
    }

    /// How fast it is, as far as was seen.
    pub fn rates(&self) -> Rates {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).rates()
    }

    /// How its engine is doing.
    pub fn engine_status(&self) -> EngineStatus {
        self.engine.status()
    }

    /// What is wrong with it, if anything is.
    pub fn trouble(&self) -> Option<String> {
        let status = self.engine.status();
        if let Some(why) = status.failed {
            return Some(why);
        }
        let age = status.last_step_age;
        (age > STEP_MAX).then(|| format!("a step has been under way for {} s", age.as_secs()))
    }

    /// Ends what runs and stops its engine, after the step that is under way.
    pub fn shutdown(&self) {
        self.engine.shutdown();
    }

    /// What came of one request for it, if nothing else ran meanwhile.
    pub(crate) fn measured(&self, prompt: u32, first: Duration, tokens: u32, rest: Duration) {
        if self.running.load(Ordering::Relaxed) == 0 {
            let seen = Observed { prompt, first, tokens, rest, beside: 1 };
            self.meter.lock().unwrap_or_else(PoisonError::into_inner).observe(seen);
        }
    }

    pub(crate) fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    fn status(&self) -> ModelStatus {
        let status = self.engine.status();
        let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        ModelStatus {
            model: self.held.model,
            alive: self.trouble().is_none(),
            running: small(status.running),
            waiting: small(status.queued),
            queued_tokens: small(status.queued_prompt_tokens),
            kv_blocks_free: small(status.kv_blocks_free + status.kv_blocks_cached),
            steps: status.steps,
            rates: Some(self.rates()),
        }
    }
}

impl Worker {
    /// A node that holds these models for as long as it lives, and others of `stock` as schedulers order.
    pub fn new(name: &str, machine: Machine, mut residents: Vec<Resident>, stock: Stock) -> Worker {
        residents.iter_mut().for_each(|resident| resident.held.pinned = true);
        Worker {
            name: name.into(),
            holdings: Arc::new(Holdings::new(residents, stock, machine.memory)),
            machine: machine.into(),
            draining: watch::Sender::new(false),
            welcomes: watch::Sender::new(0),
            watch: None,
        }
    }

    /// The same, and somebody is told of what has run.
    pub fn watched(self, watch: Arc<dyn Watch>) -> Worker {
        Worker { watch: Some(watch), ..self }
    }

    /// Holds one more model for as long as it lives, and tells every scheduler.
    pub fn hold(&self, mut resident: Resident) {
        resident.held.pinned = true;
        resident.held.rates = resident.rates();
        self.holdings.hold(resident);
    }

    /// Tells every scheduler to send nothing more, and to take back what it can.
    pub fn drain(&self) {
        self.draining.send_replace(true);
    }

    /// Tells every scheduler that work is welcome again.
    pub fn resume(&self) {
        self.draining.send_replace(false);
    }

    /// Changes whenever a scheduler has let it in.
    pub fn welcomes(&self) -> watch::Receiver<u64> {
        self.welcomes.subscribe()
    }

    /// Requests under way, for all schedulers.
    pub fn running(&self) -> u32 {
        self.holdings.residents().iter().map(|r| r.running.load(Ordering::Relaxed)).sum()
    }

    /// What it holds.
    pub fn residents(&self) -> Vec<Resident> {
        self.holdings.residents()
    }

    /// Serves the scheduler at the other end until the link closes; returns why it did. What is running then, or when
    /// the future is dropped, is cancelled.
    pub async fn serve(&self, link: &Link, credentials: Credentials) -> WorkerError {
        self.serve_one(link, credentials, &|_| true).await
    }

    /// The same, where it may be one of several schedulers that share a cluster.
    pub async fn serve_one(&self, link: &Link, credentials: Credentials, hears: Hears<'_>) -> WorkerError {
        match self.greet_and_serve(link, credentials, hears).await {
            Ok(()) => LinkError::Closed("the scheduler said goodbye".into()).into(),
            Err(error) => error,
        }
    }

    async fn greet_and_serve(
        &self,
        link: &Link,
        credentials: Credentials,
        hears: Hears<'_>,
    ) -> Result<(), WorkerError> {
        let mut control = link.open().await?;
        control.send.set_urgency(Urgency::Control);
        let (every, mut schedulers) = self.greet(&mut control, credentials).await?;
        if !hears(&schedulers) {
            return Err(WorkerError::Twice);
        }
        self.welcomes.send_modify(|n| *n += 1);
        let mut orders = 0;
        let mut changed = self.holdings.changed();
        let mut first = self.profile(orders);
        let mut told = Heard::default();
        for held in &mut first.models {
            if let Some(resident) = self.holdings.find(|r| r.held.model == held.model) {
                told.caches.introduce(held, &resident).await;
            }
        }
        control.send.send(Frame::profile(&first)).await?;
        let mut draining = self.draining.subscribe();
        let mut beat = interval(every);
        let mut requests = Tasks::new();
        loop {
            tokio::select! {
                stream = link.accept() => {
                    let (stream, worker, own) = (stream?, self.clone(), told.own.clone());
                    requests.spawn(async move { worker.answer(stream, &own).await });
                }
                Ok(()) = changed.changed() => control.send.send(Frame::profile(&self.profile(orders))).await?,
                _ = beat.tick() => self.beat(&mut control, &mut told).await?,
                () = told.caches.heard() => {}
                Ok(()) = draining.changed() => self.beat(&mut control, &mut told).await?,
                () = requests.next() => {}
                frame = control.receive.next() => match frame? {
                    Some(frame) => {
                        if let Some(all) = self.obey(&frame, &mut orders)? {
                            schedulers.all = all;
                            hears(&schedulers);
                        }
                    }
                    None => return Ok(()),
                },
            }
        }
    }

    fn profile(&self, orders: u64) -> Profile {
        let Machine { trust, labels, devices, bandwidth, price, .. } = &*self.machine;
        Profile {
            name: self.name.to_string(),
            trust: *trust,
            labels: labels.clone(),
            devices: devices.clone(),
            bandwidth: *bandwidth,
            price: *price,
            orders,
            ..self.holdings.describe()
        }
    }

    /// Sends a heartbeat with what has changed since the last.
    async fn beat(&self, control: &mut Stream, told: &mut Heard) -> Result<(), WorkerError> {
        let residents = self.residents();
        let mut others = Vec::new();
        let mut models: Vec<ModelStatus> = residents.iter().map(Resident::status).collect();
        models.retain(|now| {
            let running = residents.iter().find(|r| r.held.model == now.model).map_or(0, Resident::running);
            let others_now = running.saturating_sub(told.own.of(now.model));
            if others_now > 0 {
                others.push((now.model, others_now));
            }
            let now = (now.clone(), others_now);
            told.models.insert(now.0.model, now.clone()) != Some(now)
        });
        others.retain(|(model, _)| models.iter().any(|status| status.model == *model));
        let caches = told.caches.news();
        told.caches.look(&residents);
        let status = Frame::status(Status { draining: *self.draining.borrow(), models, caches, others });
        // A scheduler that doesn't read heartbeats is gone or stuck.
        let sent = timeout(GREETING, control.send.send(status)).await;
        Ok(sent.map_err(|_| WorkerError::Greeting("it reads no heartbeats"))??)
    }

    /// `orders` is the number of the last order to load or unload. Returns the schedulers that there are, where it is about
    /// them.
    fn obey(&self, frame: &Frame, orders: &mut u64) -> Result<Option<Vec<Replica>>, WorkerError> {
        match frame.read()? {
            Message::Order(Order::Replicas { replicas }) => return Ok(Some(sensible(replicas))),
            Message::Order(order @ (Order::Load { number, .. } | Order::Unload { number, .. })) => {
                let model = order.model().ok_or(WorkerError::Greeting("an order names no model"))?;
                *orders = number;
                match order {
                    Order::Load { bytes, .. } => self.holdings.load(model, bytes),
                    _ => self.holdings.unload(model),
                }
            }
            Message::Order(Order::Drain { on: true }) => tracing::warn!("the scheduler drains this node"),
            Message::Order(Order::Drain { on: false }) => {
                tracing::warn!("the scheduler uses this node again")
            }
            Message::Order(Order::Other) => tracing::debug!("an order that this program doesn't know"),
            _ => return Err(WorkerError::Greeting("what came is no order")),
        }
        Ok(None)
    }

    /// Introduces itself; returns how often to send a heartbeat, and who shares the cluster.
    async fn greet(
        &self,
        control: &mut Stream,
        credentials: Credentials,
    ) -> Result<(Duration, Schedulers), WorkerError> {
        let hello = Hello {
            versions: vec![VERSION],
            software: env!("CARGO_PKG_VERSION").into(),
            name: self.name.to_string(),
            proof: credentials.proof,
            token: credentials.token,
            ask: credentials.ask,
        };
        control.send.send(Frame::hello(&hello)).await?;
        let answer = timeout(GREETING, control.receive.next()).await;
        let frame = answer
            .map_err(|_| WorkerError::Greeting("no welcome came"))??
            .ok_or(WorkerError::Greeting("it hung up"))?;
        match frame.read()? {
            Message::Welcome(welcome) if welcome.refused.is_some() => {
                let refusal = welcome.refused.ok_or(WorkerError::Greeting("it refuses without a reason"))?;
                Err(WorkerError::Refused(refusal))
            }
            Message::Welcome(welcome) if welcome.version == VERSION => {
                let every = Duration::from_millis(u64::from(welcome.heartbeat_ms.clamp(10, 60_000)));
                Ok((every, Schedulers { own: welcome.replica, all: sensible(welcome.replicas) }))
            }
            Message::Welcome(welcome) => Err(WorkerError::Version(welcome.version)),
            _ => Err(WorkerError::Greeting("its first word is no welcome")),
        }
    }

    /// Runs the request of a stream. A stream that says nonsense is reset.
    async fn answer(&self, mut stream: Stream, own: &Own) {
        let ask = match timeout(GREETING, stream.receive.next()).await {
            Ok(Ok(Some(frame))) => match frame.read() {
                Ok(Message::Generate(ask)) => *ask,
                Ok(Message::Fetch(fetch)) => return self.hand_out(stream, &fetch).await,
                Ok(_) => return tracing::warn!("a stream began with a {:?} frame", frame.kind()),
                Err(error) => return tracing::warn!("{error}"),
            },
            Ok(Err(LinkError::Frame(error))) => return tracing::warn!("{error}"),
            Ok(_) | Err(_) => return,
        };
        let about = about(ask.trace);
        self.carry_out(ask, stream, own).instrument(about).await;
    }

    async fn carry_out(&self, ask: Generate, mut stream: Stream, own: &Own) {
        let (request, attempt) = (ask.request, ask.attempt);
        let mut report = Report { worker: self, progress: Progress::new(&ask), resident: None };
        stream.send.set_urgency(match ask.priority {
            Priority::Background => Urgency::Background,
            Priority::Normal => Urgency::Normal,
            Priority::Interactive => Urgency::Interactive,
        });
        let failed = match self.holdings.find(|r| r.held.model == ask.model) {
            Some(resident) => {
                let resident = report.resident.insert(resident);
                let _counted = own.count(ask.model);
                resident.run(ask, &mut stream, &mut report.progress).await.err()
            }
            None => Some(Failure {
                kind: FailureKind::NoModel,
                message: format!("node {} doesn't hold model {}", self.name, ask.model),
            }),
        };
        if let Some(failure) = failed {
            (report.progress.ended, report.progress.failed) = (true, Some(failure.kind));
            // If that can't be sent either, the stream is gone and nobody waits for it.
            _ = stream.send.send(Frame::failed(request, attempt, failure)).await;
        }
        stream.send.finish();
    }
}

impl Worker {
    /// Sends a model's text, piece by piece; resets the stream where there is none.
    async fn hand_out(&self, mut stream: Stream, fetch: &Fetch) {
        let wanted = |id: TextId| self.holdings.find(|r| r.text.id() == id);
        let Some(resident) = fetch.text().and_then(wanted) else { return };
        stream.send.set_urgency(Urgency::Background);
        for piece in resident.text.bytes().chunks(PIECE_MAX) {
            if stream.send.send(Frame::piece(piece)).await.is_err() {
                return;
            }
        }
        stream.send.finish();
    }
}

/// As many schedulers, and addresses of each, as anybody needs.
fn sensible(mut replicas: Vec<Replica>) -> Vec<Replica> {
    replicas.truncate(SCHEDULERS_MAX);
    let short = |text: &String| !text.is_empty() && text.len() <= TEXT_MAX;
    replicas.retain(|replica| short(&replica.id));
    for replica in &mut replicas {
        replica.addresses.retain(short);
        replica.addresses.truncate(ADDRESSES_MAX);
    }
    replicas
}

/// What is logged within this carries the trace's ids; where there is no trace it is nothing.
fn about(trace: TraceContext) -> tracing::Span {
    if trace.trace == 0 {
        return tracing::Span::none();
    }
    let (trace_id, span_id) = (format!("{:032x}", trace.trace), format!("{:016x}", trace.span));
    tracing::error_span!("request", trace_id, span_id)
}

/// Tells whoever watches of an attempt when it is over, however that came.
struct Report<'a> {
    worker: &'a Worker,
    progress: Progress,
    /// Who runs it.
    resident: Option<Resident>,
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        let (Some(watch), Some(resident)) = (&self.worker.watch, &self.resident) else { return };
        let Progress { began, first, last, tokens, beside, trace, attempt, ended, failed, .. } =
            self.progress;
        watch.ran(&Ran {
            node: &self.worker.name,
            device: self.worker.machine.devices.first().map_or("", String::as_str),
            model: &resident.held.name,
            numerics: &resident.held.numerics,
            trace,
            attempt,
            tokens,
            beside,
            first: first.map(|first| first - began),
            last: last.map(|last| last - began),
            took: began.elapsed(),
            ended,
            failed,
        });
    }
}

/// Takes one from a count when it goes.
struct Running(Arc<AtomicU32>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Resident {
    /// Runs a request and streams what comes of it. Returning drops the events' receiver, which cancels what is left.
    async fn run(&self, ask: Generate, stream: &mut Stream, progress: &mut Progress) -> Result<(), Failure> {
        progress.beside = self.running.fetch_add(1, Ordering::Relaxed) + 1;
        let _running = Running(self.running.clone());
        let (events, mut incoming) = mpsc::channel(EVENTS_MAX);
        self.engine.generate(ask, events)?;
        loop {
            tokio::select! {
                biased;
                event = incoming.recv() => {
                    let Some(event) = event else {
                        let message = "the engine let go of the request".into();
                        return Err(Failure { kind: FailureKind::Internal, message });
                    };
                    progress.beside = progress.beside.max(self.running.load(Ordering::Relaxed));
                    if self.forward(event, &mut incoming, progress, stream).await {
                        return Ok(());
                    }
                }
                frame = stream.receive.next() => {
                    let Ok(Some(frame)) = frame else { return Ok(()) };
                    match frame.read() {
                        Ok(Message::Cancel { request, attempt }) => self.engine.cancel(request, attempt),
                        Ok(_) | Err(_) => {
                            tracing::warn!("a {:?} frame came where only a cancel could", frame.kind());
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    /// Sends an event and what has queued up behind it. True if nothing more is to be sent.
    async fn forward(
        &self,
        event: Event,
        incoming: &mut mpsc::Receiver<Event>,
        progress: &mut Progress,
        stream: &mut Stream,
    ) -> bool {
        let mut tokens: Vec<Token> = Vec::new();
        let mut next = Some(event);
        let end = loop {
            match next {
                Some(Event::Token(token)) => tokens.push(token),
                end => break end,
            }
            if tokens.len() == TOKENS_MAX {
                break None;
            }
            next = incoming.try_recv().ok();
        };
        let (request, attempt) = (progress.request, progress.attempt);
        if !tokens.is_empty() {
            progress.note(tokens.len());
            if stream.send.send(Frame::tokens(request, attempt, tokens)).await.is_err() {
                return true;
            }
        }
        let frame = match end {
            None | Some(Event::Token(_)) => return false,
            Some(Event::Finished { reason, text, usage }) => {
                let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
                self.observe(progress, computed);
                progress.ended = true;
                Frame::finished(request, attempt, reason, text, usage)
            }
            Some(Event::Failed(failure)) => {
                (progress.ended, progress.failed) = (true, Some(failure.kind));
                Frame::failed(request, attempt, failure)
            }
        };
        // A stream that is gone has nobody who waits for its end.
        _ = stream.send.send(frame).await;
        true
    }

    fn observe(&self, progress: &Progress, prompt: u32) {
        let (Some(first), Some(last)) = (progress.first, progress.last) else { return };
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).observe(Observed {
            prompt,
            first: first - progress.began,
            tokens: progress.tokens,
            rest: last - first,
            beside: progress.beside,
        });
    }
}

/// Of one request here.
struct Progress {
    request: RequestId,
    attempt: u32,
    began: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: u32,
    beside: u32,
    trace: TraceContext,
    /// Its last word was sent, and whether that is that it failed.
    ended: bool,
    failed: Option<FailureKind>,
}

impl Progress {
    fn new(ask: &Generate) -> Progress {
        Progress {
            request: ask.request,
            attempt: ask.attempt,
            began: Instant::now(),
            first: None,
            last: None,
            tokens: 0,
            beside: 0,
            trace: ask.trace,
            ended: false,
            failed: None,
        }
    }

    fn note(&mut self, tokens: usize) {
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
        self.tokens += tokens as u32;
    }
}
