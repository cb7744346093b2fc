//! The engine in a browser's worker: what JavaScript calls.
//!
//! [`Model::load`] reads a model file through JavaScript's functions, [`Model::generate`] takes requests, and
//! [`Model::run`] works until there are none left, waking when the GPU's results come back. `web/ts/worker.ts` is the
//! one caller.
#![forbid(unsafe_code)]

mod digest;
mod host;
mod load;
mod request;
mod score;

pub use digest::Digest;
use host::Host;
use js_sys::Function;
use load::Started;
pub use score::Scorer;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::sync::mpsc::{Receiver, channel};
use wasm_bindgen::prelude::*;
use weir_backends::engine::{Engine, EngineConfig, Progress, Speculation};
use weir_backends::text::{ChatTemplate, Special, Tokenizer};
use weir_scheduler::{Event, Finish, ModelId, RequestId};

/// Events of a request that wait to be handed over; all are, after each step.
const EVENTS: usize = 64;

/// Sends what goes wrong beyond repair to the console.
#[wasm_bindgen(start)]
pub fn start() {
    std::panic::set_hook(Box::new(|panic| host::error(&panic.to_string())));
}

/// A loaded model and its engine.
#[wasm_bindgen]
pub struct Model {
    engine: RefCell<Engine>,
    readers: RefCell<Vec<Reader>>,
    tokenizer: Arc<Tokenizer>,
    template: Arc<ChatTemplate>,
    about: String,
    /// Whether a step computes at once, so that others must be let in between.
    computes: bool,
    wake: Arc<Notify>,
    running: Cell<bool>,
    host: Host,
}

/// Somebody who waits for a request's events.
struct Reader {
    events: Receiver<Event>,
    tell: Function,
    ended: bool,
}

#[wasm_bindgen]
impl Model {
    /// Loads a model from its parts, in order: each has `size` and `read(offset, into)`, which fills a Uint8Array and
    /// returns how many bytes it had. `options` is JSON: see `load.rs`.
    pub async fn load(parts: js_sys::Array, options: String, host: Host) -> Result<Model, JsError> {
        let Started { program, file, info, layout, context, options, plan, wake } =
            load::start(parts, &options).await?;
        let (tokenizer, template) = weir_backends::load::text(&file, &plan)?;
        let config = EngineConfig {
            model: ModelId([0; 32]),
            layout,
            context,
            prefill_chunk: options.prefill_chunk,
            speculation: Speculation::Auto,
        };
        let about = serde_json::json!({
            "device": info.name,
            "description": info.description,
            "numerics": info.numerics,
            "bytes": file.total_bytes(),
            "context": context,
            "vocabulary": plan.vocab,
        });
        Ok(Model {
            engine: RefCell::new(Engine::new(program, tokenizer.clone().into(), config)),
            readers: RefCell::default(),
            tokenizer,
            template,
            about: about.to_string(),
            computes: info.name == "cpu",
            wake,
            running: Cell::new(false),
            host,
        })
    }

    /// JSON: device, description, numerics, bytes, context, vocabulary.
    pub fn about(&self) -> String {
        self.about.clone()
    }

    /// The tokens of a conversation: a JSON list of OpenAI's chat messages, and perhaps one of tools.
    pub fn prompt(&self, messages: &str, tools: Option<String>) -> Result<Vec<u32>, JsError> {
        let messages = serde_json::from_str(messages)?;
        let tools = tools.map(|tools| serde_json::from_str(&tools)).transpose()?;
        self.template
            .prompt(&self.tokenizer, &messages, tools.as_ref())
            .map_err(|error| JsError::new(&error.to_string()))
    }

    /// The tokens of a text that the model goes on from.
    pub fn tokens(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode_prompt(text, Special::Parse)
    }

    /// Takes a request: `tell(kind, text, detail)` is called with `"token"` and its text and id, and at the end with
    /// `"end"`, the last text and JSON of `reason` and `usage`, or with `"failed"`, a message and the kind of failure.
    /// Options are JSON: see `request.rs`.
    pub fn generate(
        &self,
        request: u32,
        prompt: Vec<u32>,
        options: &str,
        tell: Function,
    ) -> Result<(), JsError> {
        let mut ask = request::parse(options)?.generate(RequestId(request.into()), prompt);
        ask.stop.extend(self.template.stops().iter().map(|stop| (*stop).to_owned()));
        let (sink, events) = channel(EVENTS);
        let taken = self.engine.borrow_mut().generate(host::time(), ask, sink);
        taken.map_err(|failure| JsError::new(&failure.message))?;
        self.readers.borrow_mut().push(Reader { events, tell, ended: false });
        self.wake.notify_one();
        Ok(())
    }

    /// Ends a request; its last event comes all the same.
    pub fn cancel(&self, request: u32) {
        self.engine.borrow_mut().cancel(RequestId(request.into()), 0);
        self.wake.notify_one();
    }

    /// Works until there is nothing left to do; returns at once where that is being done already.
    pub async fn run(&self) {
        if self.running.replace(true) {
            return;
        }
        loop {
            let progress = self.engine.borrow_mut().step(host::time());
            self.deliver();
            match progress {
                Progress::Worked if self.computes => self.host.breathe().await,
                Progress::Worked => {}
                Progress::Computing => self.wake.notified().await,
                // Readers are never behind for longer than a step.
                Progress::Blocked => self.host.breathe().await,
                Progress::Idle => break,
            }
        }
        self.running.set(false);
    }
}

impl Model {
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
