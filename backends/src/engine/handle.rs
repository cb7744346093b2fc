//! An engine on a thread of its own.
use super::{Engine, EngineConfig, EngineStatus, Progress, QUEUE_MAX, Vocabulary, busy};
use crate::grammar::{Grammars, Masks};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use weir_scheduler::{BlockKey, Event, Failure, FailureKind, Generate, RequestId, Time};

/// How often a device that computes on its own is asked.
const POLL: Duration = Duration::from_micros(30);
/// How often readers that are behind are tried.
const RETRY: Duration = Duration::from_millis(2);

/// A running engine. Clones are the same engine; it ends, and its thread with it, when the last one is dropped or by
/// [`EngineHandle::shutdown`].
#[derive(Clone)]
pub struct EngineHandle {
    owner: Arc<Owner>,
}

/// The last of them joins the thread.
struct Owner {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    config: EngineConfig,
    vocabulary: Vocabulary,
    /// What comes with a grammar goes by way of the thread that compiles them.
    compiler: OnceLock<Sender<Command>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the thread and its handles both see.
struct Shared {
    origin: Instant,
    /// Requests that were accepted and haven't ended.
    live: AtomicUsize,
    /// Requests, and tokens of their prompts, on their way to the thread.
    arriving: AtomicUsize,
    arriving_tokens: AtomicUsize,
    /// As of the last step, and when that was.
    status: Mutex<(EngineStatus, Time)>,
}

enum Command {
    Generate(Box<(Generate, Option<Box<Masks>>, mpsc::Sender<Event>)>),
    Cancel(RequestId, u32),
    Names(usize, oneshot::Sender<Vec<BlockKey>>),
    Shutdown,
}

impl EngineHandle {
    /// Starts the engine on a thread named `weir-engine`.
    pub(super) fn new(engine: Engine) -> EngineHandle {
        let (config, vocabulary) = (engine.config, engine.vocabulary.clone());
        let shared = Arc::new(Shared {
            origin: Instant::now(),
            live: AtomicUsize::new(0),
            arriving: AtomicUsize::new(0),
            arriving_tokens: AtomicUsize::new(0),
            status: Mutex::new((engine.status(Time::ZERO), Time::ZERO)),
        });
        let (commands, inbox) = channel();
        let driver = Driver { engine, inbox, shared: shared.clone(), ended: 0 };
        let thread = std::thread::Builder::new().name("weir-engine".into()).spawn(move || driver.run());
        if let Err(error) = &thread {
            let why = format!("the engine's thread could not be started: {error}");
            shared.status.lock().unwrap_or_else(PoisonError::into_inner).0.failed = Some(why);
        }
        let thread = Mutex::new(thread.ok());
        EngineHandle {
            owner: Arc::new(Owner {
                commands,
                shared,
                config,
                vocabulary,
                compiler: OnceLock::new(),
                thread,
            }),
        }
    }

    /// Asks for a generation. Its events go through `events`: while that is full the sequence rests, and when its
    /// receiver is dropped the request is cancelled. Fails at once if the request can't be served here at all
    /// ([`FailureKind::Invalid`], [`FailureKind::NoModel`]), if the queue is full ([`FailureKind::Busy`]), or if the
    /// engine has failed or was shut down ([`FailureKind::Internal`]); no event comes then.
    pub fn generate(&self, ask: Generate, events: mpsc::Sender<Event>) -> Result<(), Failure> {
        let Owner { shared, config, vocabulary, .. } = &*self.owner;
        config.check(&ask, vocabulary)?;
        if let Some(why) = &shared.status().0.failed {
            return Err(Failure { kind: FailureKind::Internal, message: why.clone() });
        }
        let most = config.layout.slots as usize + QUEUE_MAX;
        let one_more = |live| (live < most).then_some(live + 1);
        shared.live.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).map_err(busy)?;
        let tokens = ask.prompt.len();
        shared.arriving.fetch_add(1, Ordering::Relaxed);
        shared.arriving_tokens.fetch_add(tokens, Ordering::Relaxed);
        let way = if ask.grammar.is_some() { self.owner.compiler() } else { &self.owner.commands };
        way.send(Command::Generate(Box::new((ask, None, events)))).map_err(|_| {
            shared.live.fetch_sub(1, Ordering::Relaxed);
            shared.arrived(tokens);
            Failure { kind: FailureKind::Internal, message: "the engine was shut down".into() }
        })
    }

    /// Ends a request with [`FailureKind::Cancelled`]; nothing happens if it has ended already.
    pub fn cancel(&self, request: RequestId, attempt: u32) {
        // It may be on its way there still.
        if let Some(compiler) = self.owner.compiler.get() {
            _ = compiler.send(Command::Cancel(request, attempt));
        }
        // An engine that has ended has no requests either.
        _ = self.owner.commands.send(Command::Cancel(request, attempt));
    }

    /// Names of blocks in its KV cache, at most so many: those in use, and those used last. It answers between two steps;
    /// one that has ended has none.
    pub async fn cached_blocks(&self, most: usize) -> Vec<BlockKey> {
        let (reply, names) = oneshot::channel();
        _ = self.owner.commands.send(Command::Names(most, reply));
        names.await.unwrap_or_default()
    }

    /// How it is doing.
    pub fn status(&self) -> EngineStatus {
        let shared = &self.owner.shared;
        let (mut status, at) = shared.status();
        if status.running + status.queued > 0 {
            status.last_step_age += shared.now().since(at);
        }
        status.queued += shared.arriving.load(Ordering::Relaxed);
        status.queued_prompt_tokens += shared.arriving_tokens.load(Ordering::Relaxed);
        status
    }

    /// What it runs, its bounds brought within what the layout can do.
    pub fn config(&self) -> EngineConfig {
        self.owner.config
    }

    /// Fails what is running and ends the thread, after the step that is under way.
    pub fn shutdown(&self) {
        self.owner.shutdown();
    }
}

impl Owner {
    /// Starts it where it is needed first. It ends with the last handle.
    fn compiler(&self) -> &Sender<Command> {
        self.compiler.get_or_init(|| {
            let (sender, inbox) = channel();
            let compiler = Compiler {
                inbox,
                commands: self.commands.clone(),
                shared: self.shared.clone(),
                vocabulary: self.vocabulary.clone(),
            };
            let thread = std::thread::Builder::new().name("weir-grammars".into());
            if let Err(error) = thread.spawn(move || compiler.run()) {
                // Whoever sends to it hears that nobody is there.
                tracing::error!("the thread that compiles grammars could not be started: {error}");
            }
            sender
        })
    }

    fn shutdown(&self) {
        _ = self.commands.send(Command::Shutdown);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The driver catches panics of the device; what is left has been printed.
            _ = thread.join();
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Shared {
    fn now(&self) -> Time {
        Time::ZERO + self.origin.elapsed()
    }

    fn status(&self) -> (EngineStatus, Time) {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn arrived(&self, tokens: usize) {
        self.arriving.fetch_sub(1, Ordering::Relaxed);
        self.arriving_tokens.fetch_sub(tokens, Ordering::Relaxed);
    }
}

/// Compiles the grammars of requests on their way to the engine.
struct Compiler {
    inbox: Receiver<Command>,
    commands: Sender<Command>,
    shared: Arc<Shared>,
    vocabulary: Vocabulary,
}

impl Compiler {
    fn run(self) {
        let mut grammars: Option<Grammars> = None;
        while let Ok(command) = self.inbox.recv() {
            let command = match command {
                Command::Generate(asked) => match self.compile(&mut grammars, *asked) {
                    Some(asked) => Command::Generate(Box::new(asked)),
                    None => continue,
                },
                other => other,
            };
            if let Err(unsent) = self.commands.send(command)
                && let Command::Generate(asked) = unsent.0
            {
                let why = "the engine was shut down".into();
                self.refuse(&asked.0, &asked.2, Failure { kind: FailureKind::Internal, message: why });
            }
        }
    }

    fn compile(
        &self,
        grammars: &mut Option<Grammars>,
        (ask, _, events): (Generate, Option<Box<Masks>>, mpsc::Sender<Event>),
    ) -> Option<(Generate, Option<Box<Masks>>, mpsc::Sender<Event>)> {
        if events.is_closed() {
            self.shared.live.fetch_sub(1, Ordering::Relaxed);
            self.shared.arrived(ask.prompt.len());
            return None;
        }
        let made = match grammars {
            Some(made) => Ok(made),
            none => Grammars::new(&self.vocabulary).map(|made| none.insert(made)),
        };
        let text = ask.grammar.as_deref().unwrap_or_default();
        match made.and_then(|made| made.begin(text, &ask.output)) {
            Ok(masks) => Some((ask, Some(Box::new(masks)), events)),
            Err(error) => {
                self.refuse(&ask, &events, error.into());
                None
            }
        }
    }

    fn refuse(&self, ask: &Generate, events: &mpsc::Sender<Event>, failure: Failure) {
        self.shared.live.fetch_sub(1, Ordering::Relaxed);
        self.shared.arrived(ask.prompt.len());
        _ = events.try_send(Event::Failed(failure));
    }
}

/// The thread's.
struct Driver {
    engine: Engine,
    inbox: Receiver<Command>,
    shared: Arc<Shared>,
    /// Of [`Engine::ended`], subtracted from [`Shared::live`].
    ended: u64,
}

impl Driver {
    fn run(mut self) {
        while self.obey(None) {
            let now = self.shared.now();
            let step = catch_unwind(AssertUnwindSafe(|| self.engine.step(now)));
            let progress = step.unwrap_or_else(|panic| {
                let why = panic.downcast_ref::<&str>().map(|s| s.to_string());
                let why = why.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                tracing::error!(why, "the engine or its device panicked");
                self.engine.fail(&format!("the engine or its device panicked: {why}"));
                Progress::Worked
            });
            self.publish();
            let wait = match progress {
                Progress::Worked => continue,
                Progress::Computing => POLL,
                Progress::Blocked => RETRY,
                Progress::Idle => Duration::MAX,
            };
            let command = match self.inbox.recv_timeout(wait) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if command.is_some() && !self.obey(command) {
                break;
            }
        }
        self.engine.fail("the engine was shut down");
        while let Ok(command) = self.inbox.try_recv() {
            self.obey_one(command);
        }
        self.publish();
    }

    /// Does `first` and all that has arrived; false for the end.
    fn obey(&mut self, first: Option<Command>) -> bool {
        if first.is_some_and(|command| !self.obey_one(command)) {
            return false;
        }
        loop {
            match self.inbox.try_recv() {
                Ok(command) => {
                    if !self.obey_one(command) {
                        return false;
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey_one(&mut self, command: Command) -> bool {
        match command {
            Command::Generate(ask) => {
                let (ask, masks, events) = *ask;
                self.shared.arrived(ask.prompt.len());
                let now = self.shared.now();
                if let Err(failure) = self.engine.follow(now, ask, masks, events.clone()) {
                    // The handle has checked the request, so the engine has failed since.
                    self.shared.live.fetch_sub(1, Ordering::Relaxed);
                    _ = events.try_send(Event::Failed(failure));
                }
                true
            }
            Command::Cancel(request, attempt) => {
                self.engine.cancel(request, attempt);
                true
            }
            Command::Names(most, reply) => {
                // Whoever asked may have stopped waiting.
                _ = reply.send(self.engine.pool.names(most));
                true
            }
            Command::Shutdown => false,
        }
    }

    fn publish(&mut self) {
        let ended = self.engine.ended - self.ended;
        self.ended = self.engine.ended;
        self.shared.live.fetch_sub(ended as usize, Ordering::Relaxed);
        let now = self.shared.now();
        let status = (self.engine.status(now), now);
        *self.shared.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }
}
