//! Asking a model in this process: file, plan, device, engine. No scheduler, no HTTP.
use crate::answer::{End, Finish, Out, Piece, Usage};
use crate::{Ask, ClientError, Options};
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{OnceCell, mpsc};
use weir_backends::engine::{Engine, EngineConfig, EngineHandle};
use weir_backends::gguf::ModelFile;
use weir_backends::models;
use weir_backends::program::{Device, KvLayout};
use weir_backends::store::{Store, StoreConfig, StoreError};
use weir_backends::text::{ChatTemplate, Special, Tokenizer};
use weir_scheduler::{
    BLOCK_TOKENS, Event, Generate, KeyId, KvType, ModelId, Priority, RequestId, Sampling, TraceContext,
};

/// Where options say nothing: lively, without the tail that small models stumble over.
const TEMPERATURE: f32 = 0.7;
const TOP_P: f32 = 0.95;
/// Rows of a prompt in one step.
const PREFILL_CHUNK: u32 = 256;
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
    /// On this device: 4 requests at once, 4096 tokens each; names looked up where this environment (`std::env::var`,
    /// as a rule) says.
    pub fn new(
        device: Arc<dyn Device>,
        var: impl Fn(&str) -> Option<String>,
    ) -> Result<LocalOptions, StoreError> {
        Ok(LocalOptions {
            store: StoreConfig::from_env(var)?,
            device,
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
    engine: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
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
        loaded.engine.generate(generate, sender).map_err(|f| ClientError::Failed(f.message))?;
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
    let (id, path): (_, &Path) = (ModelId(found.sha256), &found.path);
    let file = ModelFile::open(path).map_err(failed)?;
    let plan = models::plan(&file).map_err(failed)?;
    let own = u32::try_from(plan.context).unwrap_or(u32::MAX);
    let (context, slots) = (options.context.min(own).max(1), options.slots.max(1));
    let block = BLOCK_TOKENS as u32;
    let blocks = context.div_ceil(block).saturating_add(1).saturating_mul(slots);
    let layout = KvLayout { blocks, kv: options.kv, slots, rows: PREFILL_CHUNK + slots };
    let (program, text) = std::thread::scope(|scope| {
        let text = scope.spawn(|| {
            let tokenizer = Tokenizer::from_gguf(&file)?;
            let template = ChatTemplate::from_gguf(&file, &tokenizer)?;
            Ok::<_, weir_backends::text::TextError>((tokenizer, template))
        });
        (options.device.compile(&file, &plan, 0..plan.layers.len(), layout), text.join())
    });
    let text = text.map_err(|_| ClientError::Failed("the tokenizer could not be made".into()))?;
    let (tokenizer, template) = text.map_err(failed)?;
    let template = template.unwrap_or_else(|| ChatTemplate::fallback(&tokenizer));
    let tokenizer = Arc::new(tokenizer);
    let config = EngineConfig { model: id, layout, context, prefill_chunk: PREFILL_CHUNK };
    let engine = Engine::spawn(program.map_err(failed)?, tokenizer.clone(), config);
    Ok(Loaded { name: found.name, id, engine, tokenizer, template })
}

fn failed(error: impl std::fmt::Display) -> ClientError {
    ClientError::Failed(error.to_string())
}

impl Loaded {
    fn request(&self, request: RequestId, ask: Ask, options: Options) -> Result<Generate, ClientError> {
        let mut stop = options.stop;
        let prompt = match ask {
            Ask::Complete(prompt) => prompt,
            Ask::Chat(messages) => {
                stop.extend(self.template.stops().iter().map(|s| (*s).to_owned()));
                let messages = serde_json::to_value(messages).map_err(failed)?;
                self.template.render(&messages, None, true).map_err(failed)?
            }
        };
        let prompt = self.tokenizer.encode_prompt(&prompt, Special::Parse);
        let room = (self.engine.config().context as usize).saturating_sub(prompt.len());
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        let any_seed = || RandomState::new().hash_one(request);
        let sampling = Sampling {
            temperature: options.temperature.unwrap_or(TEMPERATURE),
            top_p: options.top_p.unwrap_or(TOP_P),
            seed: options.seed.unwrap_or_else(any_seed),
            ..Sampling::default()
        };
        Ok(Generate {
            request,
            attempt: 0,
            model: self.id,
            prompt,
            output: Vec::new(),
            sampling,
            // where there is no room at all the engine says so
            max_tokens: options.max_tokens.unwrap_or(u32::MAX).min(room.max(1)),
            stop,
            ignore_eos: false,
            priority: Priority::Interactive,
            deadline: None,
            salt: 0,
            key: KeyId(0),
            tags: Vec::new(),
            trace: TraceContext::default(),
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
        }
    }
}
