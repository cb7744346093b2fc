//! Upstreams as nodes: one for each model, since each has its own price.
use super::conductor::{Command, Counter};
use super::shelf::Shelf;
use super::{ServedModel, Source, start};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep};
use weir_scheduler::{FromNode, Held, KvType, ModelId, NodeId, Price, Profile, Rates, Status, Trust};
use weir_upstream::{Engine, Model, Prefill, Upstream, Whose};

/// How often its nodes send a heartbeat, as other nodes do.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Heartbeats between two looks at an engine of ours, and failed looks in a row that mean that it is gone.
const LOOK_BEATS: u64 = 10;
const LOOKS_MAX: u32 = 3;
/// Heartbeats between two looks at whether a connection is open.
const WARM_BEATS: u64 = 60;
/// An engine that isn't there is looked for so often.
const ABSENT: Duration = Duration::from_secs(5);
/// Work that others have given to an engine: nothing is added for so long.
const CROWDED: Duration = Duration::from_secs(5);

/// Whoever tends to the nodes of one upstream.
struct Tender {
    upstream: Upstream,
    numbers: Arc<AtomicU64>,
    shelf: Arc<Shelf>,
    commands: mpsc::WeakSender<Command>,
}

/// The conductor is gone.
struct Stopped;

/// Makes nodes of an upstream's models, for as long as it is there. The task holds no driver alive.
pub(super) fn spawn(
    upstream: Upstream,
    numbers: Arc<AtomicU64>,
    shelf: Arc<Shelf>,
    commands: &mpsc::Sender<Command>,
) {
    let tender = Tender { upstream, numbers, shelf, commands: commands.downgrade() };
    tokio::spawn(async move {
        // Without a conductor there is nothing to tend to.
        let Err(Stopped) = tender.run().await;
    });
}

/// A model of an upstream by name, since its file is nobody's business.
pub(super) fn model_id(provider: &str, model: &str) -> ModelId {
    ModelId(Sha256::digest(format!("upstream/{provider}/{model}")).into())
}

impl Tender {
    async fn run(&self) -> Result<std::convert::Infallible, Stopped> {
        let listed = self.upstream.provider().models.clone();
        let asks = self.asks_what_there_is();
        let mut said = false;
        loop {
            let models = match asks {
                false => listed.clone(),
                true => match self.discover().await {
                    Ok(models) => models,
                    Err(why) => {
                        if !std::mem::replace(&mut said, true) {
                            tracing::warn!("{why}; it will be used when it is there");
                        }
                        sleep(ABSENT).await;
                        self.commands.upgrade().ok_or(Stopped)?;
                        continue;
                    }
                },
            };
            said = false;
            self.serve(models, asks).await?;
        }
    }

    /// An engine of ours may come and go, and its models with it; what a company has, weir.toml says.
    fn asks_what_there_is(&self) -> bool {
        let provider = self.upstream.provider();
        provider.whose == Whose::Own && (provider.models.is_empty() || provider.engine != Engine::Any)
    }

    /// Its models: those that weir.toml names, if it names any, of those that are there.
    async fn discover(&self) -> Result<Vec<Model>, String> {
        let found = self.upstream.models().await.map_err(|error| error.to_string())?;
        let listed = &self.upstream.provider().models;
        let mut models = Vec::new();
        for one in found {
            let model = match listed.iter().find(|model| model.name == one.name) {
                Some(model) => model.clone(),
                None if listed.is_empty() => Model::named(&one.name),
                None => continue,
            };
            let context = one.context.unwrap_or(model.context);
            models.push(Model { context, ..model });
        }
        Ok(models)
    }

    /// Until it is gone, or has other models.
    async fn serve(&self, models: Vec<Model>, asks: bool) -> Result<(), Stopped> {
        let (mut nodes, open) = (BTreeMap::new(), Arc::new(()));
        for model in &models {
            let node = NodeId(self.numbers.fetch_add(1, Ordering::Relaxed));
            let profile = self.profile(model);
            self.shelf.know(self.served(model, &profile));
            let upstream = self.upstream.clone();
            let upstream = Box::new(Counter { upstream, model: model.name.clone(), _open: open.clone() });
            self.tell(Command::Upstream { node, profile, upstream }).await?;
            nodes.insert(model.name.clone(), node);
        }
        let reason = self.tend(&models, &nodes, &open, asks).await?;
        for node in nodes.into_values() {
            self.tell(Command::Lost { node, reason: reason.clone() }).await?;
        }
        Ok(())
    }

    /// Returns why it can't go on as it is.
    async fn tend(
        &self,
        models: &[Model],
        nodes: &BTreeMap<String, NodeId>,
        open: &Arc<()>,
        asks: bool,
    ) -> Result<String, Stopped> {
        let mut beats = interval(HEARTBEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failed = 0;
        for beat in 0u64.. {
            beats.tick().await;
            if Arc::strong_count(open) <= nodes.len() {
                return Ok("it was given up".into());
            }
            for node in nodes.values() {
                self.say(*node, FromNode::Status(Status::default())).await?;
            }
            if beat % WARM_BEATS == 0 && self.upstream.is_in_use() {
                let upstream = self.upstream.clone();
                // If it can't be reached, the next request says so.
                tokio::spawn(async move { _ = upstream.warm().await });
            }
            if asks && beat % LOOK_BEATS == LOOK_BEATS - 1 {
                match tokio::time::timeout(2 * HEARTBEAT, self.discover()).await {
                    Ok(Ok(now)) if now == models => failed = 0,
                    Ok(Ok(_)) => return Ok("it has other models now".into()),
                    Ok(Err(why)) if failed + 1 >= LOOKS_MAX => return Ok(why),
                    Err(_) if failed + 1 >= LOOKS_MAX => return Ok("it doesn't say how it is".into()),
                    Ok(Err(_)) | Err(_) => failed += 1,
                }
                let queue = tokio::time::timeout(HEARTBEAT, self.upstream.queue()).await;
                if queue.ok().flatten().is_some_and(|queue| queue.waiting > 0) {
                    for node in nodes.values() {
                        self.say(*node, FromNode::Pause(CROWDED)).await?;
                    }
                }
            }
        }
        Ok(String::new())
    }

    async fn say(&self, node: NodeId, from: FromNode) -> Result<(), Stopped> {
        self.tell(Command::FromNode { node, from }).await
    }

    async fn tell(&self, command: Command) -> Result<(), Stopped> {
        let commands = self.commands.upgrade().ok_or(Stopped)?;
        commands.send(command).await.map_err(|_| Stopped)
    }

    fn profile(&self, model: &Model) -> Profile {
        let provider = self.upstream.provider();
        let name = format!("{}/{}", provider.name, model.name);
        let id = model_id(&provider.name, &model.name);
        let identity = id.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)).max(1);
        let own = provider.whose == Whose::Own;
        let label = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let kind = label("kind", if own { "upstream" } else { "provider" });
        let mut labels = provider.labels.clone();
        labels.extend([kind, label("provider", &provider.name)]);
        Profile {
            name: name.clone(),
            identity,
            trust: if own { Trust::Own } else { Trust::Provider },
            labels,
            devices: vec![provider.url.clone()],
            price: price(model),
            models: vec![held(id, name, model, provider.slots, provider.prefill(model))],
            ..Profile::default()
        }
    }

    fn served(&self, model: &Model, profile: &Profile) -> ServedModel {
        let provider = self.upstream.provider();
        ServedModel {
            name: profile.name.clone(),
            id: model_id(&provider.name, &model.name),
            context: model.context,
            source: Source::Upstream {
                provider: provider.name.as_str().into(),
                own: provider.whose == Whose::Own,
                output_max: model.output_max,
            },
            created: start::since_1970(),
        }
    }
}

fn held(model: ModelId, name: String, described: &Model, slots: u32, prefill: Prefill) -> Held {
    Held {
        model,
        numerics: format!("upstream/{name}"),
        name,
        text: None,
        context: described.context,
        kv: KvType::F16,
        kv_blocks: 0,
        slots,
        // Where the scheduler begins to learn.
        rates: Rates {
            prefill_tokens_per_s: 2000.0,
            token_time_alone: Duration::from_millis(15),
            token_time_full: Duration::from_millis(15),
        },
        weights: 0,
        bytes: 0,
        pinned: true,
        resumes: prefill != Prefill::None,
        // It is asked in the client's own words.
        grammars: true,
        prefixes: Vec::new(),
    }
}

/// The worst that a token may cost, in whole billionths of a dollar; what it did cost, the upstream says.
fn price(model: &Model) -> Price {
    let Some(prices) = model.usd_per_mtok else { return Price::default() };
    let nano = |usd_per_mtok: f64| (usd_per_mtok * 1e3).ceil() as u64;
    let prompt = prices.cache_write.unwrap_or(0.0).max(prices.prompt);
    Price { prompt: nano(prompt), output: nano(prices.output) }
}
