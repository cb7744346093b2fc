//! The nodes: what they hold, how busy they are, and how long a request would take on each.
use crate::{
    Generate, Held, ModelId, ModelView, NodeId, NodeView, Offer, Policy, Priority, Profile, RequestId,
    Status, Time, Trust,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Weight of the newest observation in a moving average.
const NEWEST: f64 = 0.2;
/// Corrections of a node's own figures stay within this factor either way.
const CORRECTION_MAX: f64 = 32.0;
/// How long a node that had no room isn't asked again.
pub(crate) const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// A node of the pool.
#[derive(Debug)]
pub(crate) struct Node {
    pub name: String,
    trust: Trust,
    /// When it last said anything.
    pub heard: Time,
    /// By its own word.
    draining: bool,
    /// By ours.
    drained: bool,
    models: BTreeMap<ModelId, Serving>,
    pub requests: BTreeSet<RequestId>,
}

/// A model on a node.
#[derive(Debug)]
struct Serving {
    held: Held,
    alive: bool,
    /// Our requests there, by priority.
    running: [u32; 3],
    /// Prompt tokens of our requests there that have no token yet.
    queued_tokens: u64,
    /// Observed over stated time, of prefill and of decode.
    prefill_ratio: f64,
    decode_ratio: f64,
    steps: u64,
    /// That came from there.
    tokens: u64,
    progress: Time,
    busy_until: Time,
}

/// What was expected of a request when it was placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prediction {
    pub ttft: Duration,
    pub token_time: Duration,
}

/// What a search for a node came to.
#[derive(Debug)]
pub(crate) enum Place {
    /// There.
    On(NodeId, Prediction),
    /// Somebody could, but not now; ask again then, if nothing happens before.
    Wait(Option<Time>),
    /// Nobody can: why.
    Never(Refusal),
}

#[derive(Debug)]
pub(crate) enum Refusal {
    NoModel,
    TooLong {
        longest: u32,
    },
    Policy(String),
    /// All that could have been tried.
    Exhausted,
}

/// What a search must know beside the request itself.
pub(crate) struct Search<'a> {
    pub now: Time,
    /// Nodes heard of before this are not asked.
    pub heard_since: Time,
    pub policy: &'a dyn Policy,
    /// Nodes that failed it.
    pub tried: &'a [NodeId],
    /// Where its earlier tokens came from.
    pub numerics: Option<&'a str>,
    /// Tokens of output yet to come, by experience.
    pub expected_output: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Pool {
    nodes: BTreeMap<NodeId, Node>,
    holders: BTreeMap<ModelId, BTreeSet<NodeId>>,
}

impl Node {
    /// It gets nothing new.
    pub fn is_draining(&self) -> bool {
        self.draining || self.drained
    }
}

impl Serving {
    fn new(now: Time, held: Held) -> Serving {
        Serving {
            alive: true,
            running: [0; 3],
            queued_tokens: 0,
            prefill_ratio: 1.0,
            decode_ratio: 1.0,
            steps: 0,
            tokens: 0,
            progress: now,
            busy_until: now,
            held,
        }
    }

    fn total(&self) -> u32 {
        self.running.iter().sum()
    }

    /// A slot is free, or would be if those of lesser priority stepped aside; what waits there is bounded.
    fn has_room(&self, now: Time, priority: Priority) -> bool {
        let ahead: u32 = self.running[priority as usize..].iter().sum();
        now >= self.busy_until && ahead < self.held.slots && self.total() < 2 * self.held.slots
    }

    /// DESIGN: `ttft = (queued + prompt) / prefill rate`, corrected by what was observed.
    fn predict(&self, tokens: u64) -> Prediction {
        let rates = &self.held.rates;
        let rate = f64::from(rates.prefill_tokens_per_s.max(1e-3));
        let prefill_s = (self.queued_tokens + tokens) as f64 / rate;
        let token_time = rates.token_time(self.total() + 1, self.held.slots).mul_f64(self.decode_ratio);
        let ttft = Duration::from_secs_f64((prefill_s * self.prefill_ratio).min(1e6)) + token_time;
        Prediction { ttft, token_time }
    }
}

fn correct(ratio: &mut f64, predicted: Duration, observed: Duration) {
    let seen = *ratio * observed.as_secs_f64() / predicted.as_secs_f64().max(1e-9);
    *ratio = (*ratio + NEWEST * (seen - *ratio)).clamp(1.0 / CORRECTION_MAX, CORRECTION_MAX);
}

impl Pool {
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    pub fn ids(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.nodes.keys().copied()
    }

    /// A node connects, or says that it holds other models than before.
    pub fn profile(&mut self, now: Time, id: NodeId, profile: Profile) {
        let node = self.nodes.entry(id).or_insert_with(|| Node {
            name: String::new(),
            trust: Trust::Own,
            heard: now,
            draining: false,
            drained: false,
            models: BTreeMap::new(),
            requests: BTreeSet::new(),
        });
        let mut before = std::mem::take(&mut node.models);
        node.name = profile.name;
        node.trust = profile.trust;
        node.heard = now;
        for mut held in profile.models {
            held.slots = held.slots.max(1);
            let model = held.model;
            let serving = match before.remove(&model) {
                Some(old) => Serving { held, alive: true, ..old },
                None => Serving::new(now, held),
            };
            self.holders.entry(model).or_default().insert(id);
            node.models.insert(model, serving);
        }
        for model in before.keys() {
            self.unhold(*model, id);
        }
    }

    fn unhold(&mut self, model: ModelId, id: NodeId) {
        if let Some(holders) = self.holders.get_mut(&model) {
            holders.remove(&id);
            if holders.is_empty() {
                self.holders.remove(&model);
            }
        }
    }

    /// A node doesn't hold a model that it was thought to hold.
    pub fn drop_model(&mut self, id: NodeId, model: ModelId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.models.remove(&model);
            self.unhold(model, id);
        }
    }

    /// A heartbeat. Returns the models whose engine has died since the last.
    pub fn status(&mut self, now: Time, id: NodeId, status: Status) -> Vec<ModelId> {
        let Some(node) = self.nodes.get_mut(&id) else { return Vec::new() };
        node.draining = status.draining;
        let mut died = Vec::new();
        for news in status.models {
            let Some(serving) = node.models.get_mut(&news.model) else { continue };
            if serving.alive && !news.alive {
                died.push(news.model);
            }
            serving.alive = news.alive;
            if news.steps != serving.steps {
                serving.steps = news.steps;
                serving.progress = now;
            }
            if let Some(rates) = news.rates {
                serving.held.rates = rates;
            }
        }
        died
    }

    /// A node said something.
    pub fn heard(&mut self, now: Time, id: NodeId) -> bool {
        self.nodes.get_mut(&id).map(|node| node.heard = now).is_some()
    }

    /// A node is gone. Returns it with what it was running.
    pub fn remove(&mut self, id: NodeId) -> Option<Node> {
        let node = self.nodes.remove(&id)?;
        for model in node.models.keys() {
            self.unhold(*model, id);
        }
        Some(node)
    }

    /// The models that a node holds.
    pub fn models_of(&self, id: NodeId) -> Vec<ModelId> {
        self.nodes.get(&id).map(|n| n.models.keys().copied().collect()).unwrap_or_default()
    }

    fn serving(&mut self, id: NodeId, model: ModelId) -> Option<&mut Serving> {
        self.nodes.get_mut(&id)?.models.get_mut(&model)
    }

    /// The numerics id of a model on a node.
    pub fn numerics(&self, id: NodeId, model: ModelId) -> Option<&str> {
        Some(self.nodes.get(&id)?.models.get(&model)?.held.numerics.as_str())
    }

    /// When the model last got anything done there, for anybody.
    pub fn progress(&self, id: NodeId, model: ModelId) -> Time {
        self.nodes.get(&id).and_then(|n| n.models.get(&model)).map_or(Time::ZERO, |s| s.progress)
    }

    /// Gives a request to a node. The caller has found that there is room.
    pub fn take(&mut self, id: NodeId, ask: &Generate, tokens: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.requests.insert(ask.request);
        if let Some(serving) = node.models.get_mut(&ask.model) {
            serving.running[ask.priority as usize] += 1;
            serving.queued_tokens += tokens;
        }
    }

    /// Its prompt is done, after `observed`.
    pub fn first_token(
        &mut self,
        id: NodeId,
        model: ModelId,
        tokens: u64,
        predicted: Duration,
        observed: Duration,
    ) {
        if let Some(serving) = self.serving(id, model) {
            serving.queued_tokens = serving.queued_tokens.saturating_sub(tokens);
            correct(&mut serving.prefill_ratio, predicted, observed);
        }
    }

    /// Tokens came `observed` apart.
    pub fn observe_pace(&mut self, id: NodeId, model: ModelId, predicted: Duration, observed: Duration) {
        if let Some(serving) = self.serving(id, model) {
            correct(&mut serving.decode_ratio, predicted, observed);
        }
    }

    /// The model got something done there.
    pub fn progressed(&mut self, now: Time, id: NodeId, model: ModelId, tokens: u64) {
        if let Some(serving) = self.serving(id, model) {
            serving.progress = now;
            serving.tokens += tokens;
        }
    }

    /// Whether a node is to get nothing new.
    pub fn drain(&mut self, id: NodeId, on: bool) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.drained = on;
        }
    }

    /// All nodes, for a person.
    pub fn survey(&self, now: Time) -> Vec<NodeView> {
        let model = |(id, serving): (&ModelId, &Serving)| ModelView {
            model: *id,
            name: serving.held.name.clone(),
            alive: serving.alive,
            running: serving.total(),
            slots: serving.held.slots,
            tokens: serving.tokens,
            token_time: serving.held.rates.token_time_alone.mul_f64(serving.decode_ratio),
        };
        let node = |(id, node): (&NodeId, &Node)| NodeView {
            node: *id,
            name: node.name.clone(),
            trust: node.trust,
            draining: node.is_draining(),
            silent: now.since(node.heard),
            models: node.models.iter().map(model).collect(),
        };
        self.nodes.iter().map(node).collect()
    }

    /// It had no room: don't ask again at once.
    pub fn busy(&mut self, now: Time, id: NodeId, model: ModelId) {
        if let Some(serving) = self.serving(id, model) {
            serving.busy_until = now + BUSY_PAUSE;
        }
    }

    /// Takes a request from a node; `tokens` of its prompt were still to be done.
    pub fn release(&mut self, id: NodeId, ask: &Generate, tokens: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.requests.remove(&ask.request);
        if let Some(serving) = node.models.get_mut(&ask.model) {
            let running = &mut serving.running[ask.priority as usize];
            *running = running.saturating_sub(1);
            serving.queued_tokens = serving.queued_tokens.saturating_sub(tokens);
        }
    }

    /// The best node for a request.
    pub fn place(&self, ask: &Generate, search: &Search<'_>) -> Place {
        let Some(holders) = self.holders.get(&ask.model) else { return Place::Never(Refusal::NoModel) };
        let tokens = (ask.prompt.len() + ask.output.len()) as u64;
        let mut best: Option<(f64, NodeId, Prediction)> = None;
        let mut wait: Option<Option<Time>> = None;
        let mut longest = 0;
        let mut refusal = None;
        for (id, node) in holders.iter().filter_map(|id| Some((*id, self.nodes.get(id)?))) {
            let Some(serving) = node.models.get(&ask.model) else { continue };
            longest = longest.max(serving.held.context);
            if tokens >= u64::from(serving.held.context)
                || search.tried.contains(&id)
                || node.is_draining()
                || !serving.alive
            {
                continue;
            }
            let prediction = serving.predict(tokens);
            let offer = Offer {
                node: id,
                name: &node.name,
                trust: node.trust,
                held: &serving.held,
                running: serving.total(),
                ttft: prediction.ttft,
                total: prediction.ttft + prediction.token_time.saturating_mul(search.expected_output),
                same_numerics: search.numerics.is_none_or(|n| n == serving.held.numerics),
            };
            if let Err(reason) = search.policy.admits(ask, &offer) {
                refusal = Some(reason);
            } else if node.heard < search.heard_since || !serving.has_room(search.now, ask.priority) {
                let pause = Some(serving.busy_until).filter(|until| *until > search.now);
                wait = Some(pause.into_iter().chain(wait.flatten()).min());
            } else {
                let cost = search.policy.cost(ask, &offer);
                if best.is_none_or(|(least, ..)| cost < least) {
                    best = Some((cost, id, prediction));
                }
            }
        }
        match (best, refusal) {
            (Some((_, id, prediction)), _) => Place::On(id, prediction),
            _ if wait.is_some() => Place::Wait(wait.flatten()),
            _ if tokens >= u64::from(longest) => Place::Never(Refusal::TooLong { longest }),
            (None, Some(reason)) => Place::Never(Refusal::Policy(reason)),
            (None, None) => Place::Never(Refusal::Exhausted),
        }
    }
}
