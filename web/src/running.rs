//! An engine at work: driven for as long as there is something to do, its events handed to JavaScript.
use crate::host::{self, Host};
use js_sys::Function;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::sync::mpsc::{Receiver, channel};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::spawn_local;
use weir_backends::engine::{Engine, EngineHandle, Progress};
use weir_scheduler::{Event, Failure, Finish, Generate};

/// Events of a request that wait to be handed over; all are, after each step.
const EVENTS: usize = 64;
/// How often readers that are behind are tried.
const RETRY_MS: f64 = 2.0;

/// An engine and those who wait for what it makes.
pub struct Running {
    engine: EngineHandle,
    readers: RefCell<Vec<Reader>>,
    /// Whether a step computes at once, so that others must be let in between.
    computes: bool,
    wake: Arc<Notify>,
    working: Cell<bool>,
    host: Host,
}

/// Somebody who waits for a request's events.
struct Reader {
    events: Receiver<Event>,
    tell: Function,
    ended: bool,
}

impl Running {
    /// `wake` rings when results of the device have come.
    pub fn new(engine: Engine, computes: bool, wake: Arc<Notify>, host: Host) -> Rc<Running> {
        Rc::new_cyclic(|running: &std::rc::Weak<Running>| {
            let running = running.clone();
            let ring = move || {
                if let Some(running) = running.upgrade() {
                    running.ring();
                }
            };
            Running {
                engine: EngineHandle::new(engine, host::time, ring),
                readers: RefCell::default(),
                computes,
                wake,
                working: Cell::new(false),
                host,
            }
        })
    }

    /// The engine, for others who ask it.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Takes a request whose events `tell` hears.
    pub fn generate(&self, ask: Generate, tell: Function) -> Result<(), Failure> {
        let (sink, events) = channel(EVENTS);
        // What it says at once is delivered before it says more.
        self.engine.generate(ask, sink)?;
        self.readers.borrow_mut().push(Reader { events, tell, ended: false });
        Ok(())
    }

    fn ring(self: Rc<Self>) {
        self.wake.notify_one();
        if !self.working.replace(true) {
            spawn_local(self.work());
        }
    }

    /// Until there is nothing left to do.
    async fn work(self: Rc<Self>) {
        loop {
            let progress = self.engine.step();
            self.deliver();
            match progress {
                Progress::Worked if self.computes => self.host.breathe().await,
                Progress::Worked => {}
                Progress::Computing => self.wake.notified().await,
                Progress::Blocked => host::pause(RETRY_MS).await,
                Progress::Idle => break,
            }
        }
        self.working.set(false);
    }

    /// Hands over what has come.
    fn deliver(&self) {
        // A reader may ask for more at once.
        let mut readers = self.readers.take();
        readers.retain_mut(|reader| {
            while let Ok(event) = reader.events.try_recv() {
                reader.tell(event);
            }
            !reader.ended
        });
        let mut since = self.readers.replace(readers);
        self.readers.borrow_mut().append(&mut since);
    }
}

impl Reader {
    fn tell(&mut self, event: Event) {
        let (kind, text, detail) = match event {
            Event::Token(token) => ("token", token.text, JsValue::from(token.id)),
            Event::Finished { reason, text, usage } => {
                self.ended = true;
                let reason = if reason == Finish::Stop { "stop" } else { "length" };
                let detail = serde_json::json!({
                    "reason": reason,
                    "promptTokens": usage.prompt_tokens,
                    "cachedTokens": usage.cached_tokens,
                    "outputTokens": usage.output_tokens,
                });
                ("end", text, JsValue::from(detail.to_string()))
            }
            Event::Failed(failure) => {
                self.ended = true;
                ("failed", failure.message, JsValue::from(format!("{:?}", failure.kind)))
            }
        };
        let call = self.tell.call3(&JsValue::NULL, &kind.into(), &text.into(), &detail);
        if let Err(error) = call {
            host::error(&format!("a reader failed: {error:?}"));
        }
    }
}
