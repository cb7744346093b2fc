//! The engine in a browser's worker: what JavaScript calls.
//!
//! `Model::load` reads a model file through JavaScript's functions, `Model::generate` takes requests, and the engine works
//! until there are none left, waking when the GPU's results come back. A `Node` offers a model to a cluster.
//! `web/ts/worker.ts` is the one caller. Elsewhere than in browsers this crate is empty.
#![cfg(target_arch = "wasm32")]
#![forbid(unsafe_code)]

mod digest;
mod host;
mod load;
mod node;
mod request;
mod running;
mod score;
#[cfg(target_feature = "atomics")]
mod threads;

pub use digest::Digest;
use host::Host;
use js_sys::Function;
use load::Started;
pub use node::Node;
use running::Running;
pub use score::Scorer;
use std::rc::Rc;
use std::sync::Arc;
use wasm_bindgen::prelude::*;
use weir_backends::engine::{Engine, EngineConfig, EngineHandle, Speculation};
use weir_backends::gguf::ModelFile;
use weir_backends::text::{ChatTemplate, Special, Tokenizer};
use weir_node::ModelText;
use weir_scheduler::{Held, ModelId, RequestId};

/// Sends what goes wrong beyond repair to the console.
#[wasm_bindgen(start)]
pub fn start() {
    std::panic::set_hook(Box::new(|panic| host::error(&panic.to_string())));
}

/// A loaded model and its engine.
#[wasm_bindgen]
pub struct Model {
    running: Rc<Running>,
    tokenizer: Arc<Tokenizer>,
    template: Arc<ChatTemplate>,
    about: String,
    numerics: String,
    /// What a node says of it, where it is to be offered.
    described: Option<(ModelFile, ModelText)>,
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
            model: ModelId(options.id()),
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
        let engine = Engine::new(program, tokenizer.clone().into(), config);
        Ok(Model {
            running: Running::new(engine, info.name == "cpu", wake, host),
            tokenizer,
            template,
            about: about.to_string(),
            numerics: info.numerics,
            described: options.is_offered().then(|| {
                let text = ModelText::of(&file);
                (file, text)
            }),
        })
    }

    /// JSON: device, description, numerics, bytes, context, vocabulary.
    pub fn about(&self) -> String {
        self.about.clone()
    }

    /// Why it can't go on, if it can't.
    pub fn trouble(&self) -> Option<String> {
        self.running.engine().status().failed
    }

    /// Fails what runs, as if the device were lost: for tests, and for an end without delay.
    pub fn fail(&self, why: &str) {
        self.running.engine().fail(why);
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
        ask.model = self.running.engine().config().model;
        ask.stop.extend(self.template.stops().iter().map(|stop| (*stop).to_owned()));
        self.running.generate(ask, tell).map_err(|failure| JsError::new(&failure.message))
    }

    /// Ends a request; its last event comes all the same.
    pub fn cancel(&self, request: u32) {
        self.running.engine().cancel(RequestId(request.into()), 0);
    }
}

impl Model {
    /// For a node that offers it.
    fn engine(&self) -> EngineHandle {
        self.running.engine().clone()
    }

    /// What a node says of it.
    fn describe(&self, name: String) -> Result<(Held, ModelText), JsError> {
        let (file, text) =
            self.described.as_ref().ok_or_else(|| JsError::new("the model was not loaded to be offered"))?;
        let engine = self.running.engine();
        let held = weir_node::describe(file, engine, name, text.id(), &self.numerics)?;
        Ok((held, text.clone()))
    }
}
