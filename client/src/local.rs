//! Asking a model in this process: file, plan, device, engine. No scheduler, no HTTP.
use crate::answer::{End, Finish, Out, Piece, Usage};
use crate::{Ask, ClientError, Options};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{OnceCell, mpsc};
use weir_backends::cpu::{Cpu, CpuOptions};
use weir_backends::load::{self, LoadOptions};
use weir_backends::program::Device;
use weir_backends::store::{Store, StoreConfig, StoreError};
use weir_backends::text::Special;
use weir_scheduler::{Event, Generate, KvType, ModelId, Priority, RequestId, Sampling};

/// Where options say nothing: lively, without the tail that small models stumble over.
const TEMPERATURE: f32 = 0.7;
const TOP_P: f32 = 0.95;
/// Events that may lie ready before the engine lets a sequence rest.
const AHEAD: usize = 64;

/// How a model is held in this process.
#[derive(Clone)]
pub struct LocalOptions {
    /// Where names are looked up. Nothing is fetched: [`Store::pull`] does that.
    pub store: StoreConfig,
    /// What computes.
    pub device: Arc<dyn Device>,
    /// Longest sequence in tokens; the model's own where that is shorter.
    pub context: u32,
    /// Requests that are answered at once; further ones wait.
    pub slots: u32,
    /// How keys and values are stored.
    pub kv: KvType,
}

impl LocalOptions {
    /// On the CPU: 4 requests at once, 4096 tokens each; names looked up where this environment
    /// (`|name| std::env::var(name).ok()`, as a rule) says.
    pub fn new(var: impl Fn(&str) -> Option<String>) -> Result<LocalOptions, StoreError> {
        Ok(LocalOptions {
            store: StoreConfig::from_env(var)?,
            device: Arc::new(Cpu::new(CpuOptions::default())),
            context: 4096,
            slots: 4,
            kv: KvType::F16,
        })
    }
}

/// A model that is loaded when it is first asked.
pub(crate) struct Local {
    model: String,
    options: LocalOptions,
    loaded: OnceCell<Arc<Loaded>>,
    requests: AtomicU64,
}

struct Loaded {
    name: String,
    id: ModelId,
    model: weir_backends::load::Loaded,
}

impl Local {
    pub(crate) fn new(model: String, options: LocalOptions) -> Local {
        Local { model, options, loaded: OnceCell::new(), requests: AtomicU64::new(0) }
    }

    /// The one model, if it is here.
    pub(crate) fn models(&self) -> Result<Vec<String>, ClientError> {
        let store = Store::new(self.options.store.clone()).map_err(failed)?;
        Ok(vec![store.resolve(&self.model).map_err(failed)?.name])
    }

    /// Asks, and passes on the answer's text as it comes.
    pub(crate) async fn answer(&self, ask: Ask, options: Options, out: Out) -> Result<End, ClientError> {
        let loaded = self.loaded.get_or_try_init(|| self.load()).await?;
        if options.model.as_ref().is_some_and(|m| *m != loaded.name && *m != self.model) {
            let wanted = options.model.unwrap_or_default();
            return Err(ClientError::Invalid(format!("this endpoint holds {}, not {wanted}", loaded.name)));
        }
        let request = RequestId(self.requests.fetch_add(1, Ordering::Relaxed));
        let generate = loaded.request(request, ask, options)?;
        let (sender, mut events) = mpsc::channel(AHEAD);
        loaded.model.engine.generate(generate, sender).map_err(|f| ClientError::Failed(f.message))?;
        let gone = || ClientError::Failed("the engine is gone".into());
        loop {
            let (text, end) = match events.recv().await.ok_or_else(gone)? {
                Event::Token(token) => (token.text, None),
                Event::Failed(failure) => return Err(ClientError::Failed(failure.message)),
                Event::Finished { reason, text, usage } => (text, Some(loaded.end(reason, usage))),
            };
            if !text.is_empty() && out.send(Ok(Piece::Text(text))).await.is_err() {
                return Err(ClientError::Cancelled);
            }
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    async fn load(&self) -> Result<Arc<Loaded>, ClientError> {
        let (model, options) = (self.model.clone(), self.options.clone());
        let loading = tokio::task::spawn_blocking(move || load(&model, &options));
        Ok(Arc::new(loading.await.map_err(failed)??))
    }
}

fn load(model: &str, options: &LocalOptions) -> Result<Loaded, ClientError> {
    let store = Store::new(options.store.clone()).map_err(failed)?;
    let found = store.resolve(model).map_err(failed)?;
    let id = ModelId(found.sha256);
    let wanted = LoadOptions {
        context: Some(options.context),
        slots: options.slots,
        kv: options.kv,
        ..LoadOptions::default()
    };
    let model = load::load(&found.path, Some(id), &*options.device, wanted).map_err(failed)?;
    Ok(Loaded { name: found.name, id, model })
}

fn failed(error: impl std::fmt::Display) -> ClientError {
    ClientError::Failed(error.to_string())
}

impl Loaded {
    fn request(&self, request: RequestId, ask: Ask, options: Options) -> Result<Generate, ClientError> {
        let mut stop = options.stop;
        let load::Loaded { tokenizer, template, engine, .. } = &self.model;
        let prompt = match ask {
            Ask::Complete(prompt) => tokenizer.encode_prompt(&prompt, Special::Parse),
            Ask::Chat(messages) => {
                stop.extend(template.stops().iter().map(|s| (*s).to_owned()));
                let messages = serde_json::to_value(messages).map_err(failed)?;
                template.prompt(tokenizer, &messages, None).map_err(failed)?
            }
        };
        let room = (engine.config().context as usize).saturating_sub(prompt.len());
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        let any_seed = || RandomState::new().hash_one(request);
        let sampling = Sampling {
            temperature: options.temperature.unwrap_or(TEMPERATURE),
            top_p: options.top_p.unwrap_or(TOP_P),
            seed: options.seed.unwrap_or_else(any_seed),
            ..Sampling::default()
        };
        // where there is no room at all the engine says so
        let max_tokens = options.max_tokens.unwrap_or(u32::MAX).min(room.max(1));
        Ok(Generate {
            request,
            sampling,
            stop,
            priority: options.priority.unwrap_or(Priority::Interactive),
            ..Generate::new(self.id, prompt, max_tokens)
        })
    }

    fn end(&self, reason: weir_scheduler::Finish, usage: weir_scheduler::Usage) -> End {
        End {
            finish: match reason {
                weir_scheduler::Finish::Stop => Finish::Stop,
                weir_scheduler::Finish::Length => Finish::Length,
            },
            usage: Usage {
                prompt_tokens: usage.prompt_tokens,
                cached_tokens: usage.cached_tokens,
                output_tokens: usage.output_tokens,
            },
            model: self.name.clone(),
            nodes: Vec::new(),
        }
    }
}
