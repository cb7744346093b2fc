//! Whoever answers in a chat: a model on this machine, or a gateway.
use super::pull::pull;
use crate::config::{Config, Kv};
use crate::driver::{DeviceOptions, Driver, DriverConfig, Generation, ModelSpec, ServedModel};
use anyhow::{Context, anyhow};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use weir_backends::engine::Speculation;
use weir_client::{Answer, End, Endpoint, Finish, Message, Options, Piece, Usage, Weir};
use weir_scheduler::{Event, Generate, KvType, Priority, Sampling};

/// How to answer, as far as flags say.
#[derive(Clone, Debug, Default)]
pub(super) struct Wishes {
    pub(super) max_tokens: Option<u32>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) seed: Option<u64>,
}

/// For chats on this machine where no flag says otherwise: lively, without the tail that small models stumble over.
const TEMPERATURE: f32 = 0.7;
const TOP_P: f32 = 0.95;

/// Answers.
pub(super) enum Speaker {
    /// A scheduler and a node in this process.
    Here(Here),
    /// The OpenAI API.
    There { weir: Weir, model: Option<String>, url: String },
}

/// A model of this process.
pub(super) struct Here {
    driver: Driver,
    model: Arc<ServedModel>,
}

impl Speaker {
    /// A gateway.
    pub(super) fn there(url: &str, key: Option<String>, model: Option<String>) -> Speaker {
        let mut weir = Weir::new();
        weir.add("gateway", Endpoint::gateway(url, key));
        Speaker::There { weir, model, url: url.to_owned() }
    }

    /// A model on this machine, fetched first if need be; the default one where none is named.
    pub(super) async fn here(
        config: &Config,
        model: Option<&str>,
        draft: Option<String>,
    ) -> anyhow::Result<Speaker> {
        let (searched, name) = (config.clone(), model.map(str::to_owned));
        let drafts = Drafts { draft: draft.into_iter().collect() };
        // fetching blocks, and somebody may lose patience
        let found = tokio::task::spawn_blocking(move || drafts.find(&searched, &[name.as_deref()])).await??;
        let found = found.into_iter().next().context("no model was found")?;
        let driver = start(vec![found.clone()], device_options(config)).await?;
        let model = driver.model(&found.name).context("the driver lost the model")?;
        Ok(Speaker::Here(Here { driver, model }))
    }

    /// For a person: who answers.
    pub(super) fn describe(&self) -> String {
        match self {
            Speaker::Here(here) => format!("{}, on this machine", here.model.name),
            Speaker::There { model, url, .. } => {
                format!("{} at {url}", model.as_deref().unwrap_or("the first model"))
            }
        }
    }

    /// The same place, but another model.
    pub(super) async fn with_model(&self, config: &Config, model: &str) -> anyhow::Result<Speaker> {
        match self {
            Speaker::Here(_) => Speaker::here(config, Some(model), None).await,
            Speaker::There { weir, url, .. } => {
                Ok(Speaker::There { weir: weir.clone(), model: Some(model.to_owned()), url: url.clone() })
            }
        }
    }

    /// The next turn. Dropping the reply cancels it.
    pub(super) async fn ask(&self, messages: &[Message], wishes: &Wishes) -> anyhow::Result<Reply> {
        match self {
            Speaker::Here(here) => here.ask(messages, wishes).await,
            Speaker::There { weir, model, .. } => {
                let options = Options {
                    model: model.clone(),
                    max_tokens: wishes.max_tokens,
                    temperature: wishes.temperature,
                    top_p: wishes.top_p,
                    seed: wishes.seed,
                    ..Options::default()
                };
                Ok(Reply::There(weir.chat(messages.to_vec(), options)?))
            }
        }
    }
}

impl Here {
    async fn ask(&self, messages: &[Message], wishes: &Wishes) -> anyhow::Result<Reply> {
        let (tokenizer, template) = self.model.text().context("the model hands out no tokenizer")?;
        let prompt = template.prompt(tokenizer, &serde_json::to_value(messages)?, None)?;
        let room = (self.model.context as usize).saturating_sub(prompt.len());
        if room == 0 {
            let (length, context) = (prompt.len(), self.model.context);
            return Err(anyhow!(
                "that is {length} tokens, {} takes {context} with its answer; shorten it (in a conversation, /clear \
                 forgets what was said)",
                self.model.name
            ));
        }
        let sampling = Sampling {
            temperature: wishes.temperature.unwrap_or(TEMPERATURE),
            top_p: wishes.top_p.unwrap_or(TOP_P),
            seed: wishes.seed.unwrap_or_else(any_seed),
            ..Sampling::default()
        };
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        let max_tokens = wishes.max_tokens.unwrap_or(u32::MAX).min(room);
        let ask = Generate {
            sampling,
            stop: template.stops().iter().map(|s| (*s).to_owned()).collect(),
            priority: Priority::Interactive,
            ..Generate::new(self.model.id, prompt, max_tokens)
        };
        let generation = self.driver.generate(ask).await.map_err(|f| anyhow!(f.message))?;
        Ok(Reply::Here { generation, model: self.model.name.clone(), end: None })
    }
}

/// An answer under way.
pub(super) enum Reply {
    Here {
        generation: Generation,
        model: String,
        /// Known, but text that had been held back came with it and goes first.
        end: Option<End>,
    },
    There(Answer),
}

impl Reply {
    /// The next piece; after [`Piece::End`] or an error nothing more is to be expected.
    pub(super) async fn next(&mut self) -> anyhow::Result<Piece> {
        let (generation, model, end) = match self {
            Reply::There(answer) => return Ok(answer.next().await.context("the answer has no end")??),
            Reply::Here { generation, model, end } => (generation, model, end),
        };
        if let Some(end) = end.take() {
            return Ok(Piece::End(end));
        }
        loop {
            match generation.events.recv().await.context("the engine is gone")? {
                Event::Token(token) if token.text.is_empty() => {}
                Event::Token(token) => return Ok(Piece::Text(token.text)),
                Event::Failed(failure) => return Err(anyhow!(failure.message)),
                Event::Finished { reason, text, usage } => {
                    let finish = match reason {
                        weir_scheduler::Finish::Stop => Finish::Stop,
                        weir_scheduler::Finish::Length => Finish::Length,
                    };
                    let usage = Usage {
                        prompt_tokens: usage.prompt_tokens,
                        cached_tokens: usage.cached_tokens,
                        output_tokens: usage.output_tokens,
                    };
                    let last = End { finish, usage, model: model.clone(), nodes: Vec::new() };
                    if text.is_empty() {
                        return Ok(Piece::End(last));
                    }
                    *end = Some(last);
                    return Ok(Piece::Text(text));
                }
            }
        }
    }
}

/// The model of that name or path, fetched if it isn't here; the configuration's, or else the catalog's, default where
/// none is named.
pub(super) fn find(config: &Config, model: Option<&str>) -> anyhow::Result<ModelSpec> {
    let model = model.or(config.model.as_deref());
    if let Some(null) = model.and_then(ModelSpec::parse_null) {
        return null.map_err(|why| anyhow!(why));
    }
    let store = super::store(config)?;
    Ok(pull(&store, model.unwrap_or(store.catalog().default_name()))?.into())
}

/// Smaller models that guess for others.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Drafts {
    /// A smaller model of the same tokenizer: what it guesses is checked by the other in one step, and the answers are the
    /// same. Whether it pays is found out, and where it doesn't it rests. The first goes with the first --model, a second with the second
    #[arg(long, value_name = "MODEL")]
    draft: Vec<String>,
}

impl Drafts {
    /// Whether none is named.
    pub(super) fn is_empty(&self) -> bool {
        self.draft.is_empty()
    }

    /// The models of these names ([`find`]), each with its draft model. The configuration's goes with the configuration's
    /// model.
    pub(super) fn find(&self, config: &Config, models: &[Option<&str>]) -> anyhow::Result<Vec<ModelSpec>> {
        if self.draft.len() > models.len() {
            let (drafts, models) = (self.draft.len(), models.len());
            return Err(anyhow!("--draft names {drafts} models for {models}; each goes with a --model"));
        }
        let drafts = self.draft.iter().map(Some).chain(std::iter::repeat(None));
        let both = models.iter().zip(drafts).map(|(name, draft)| {
            let model = find(config, *name)?;
            let own = name.is_none_or(|name| config.model.as_deref() == Some(name));
            let draft = draft.or(config.draft.as_ref().filter(|_| own));
            let Some(draft) = draft else { return Ok(model) };
            let name = model.name.clone();
            let draft = find(config, Some(draft))?;
            let none = || anyhow!("{} can't guess for {name}: both must be files", draft.name);
            model.with_draft(&draft).ok_or_else(none)
        });
        both.collect()
    }
}

/// A driver that holds these models.
pub(super) async fn start(models: Vec<ModelSpec>, device: DeviceOptions) -> anyhow::Result<Driver> {
    Ok(Driver::start(DriverConfig { models, device, ..DriverConfig::default() }).await?)
}

/// What the configuration says of the device.
pub(super) fn device_options(config: &Config) -> DeviceOptions {
    DeviceOptions {
        device: config.device,
        threads: config.threads,
        kv: match config.kv {
            Kv::F16 => KvType::F16,
            Kv::Q8_0 => KvType::Q8_0,
        },
        context: config.context,
        memory: config.memory,
        speculation: if config.speculation { Speculation::Auto } else { Speculation::Off },
        ..DeviceOptions::default()
    }
}

/// Different each time: the standard library's hash keys are the system's randomness.
fn any_seed() -> u64 {
    RandomState::new().hash_one(std::process::id())
}
