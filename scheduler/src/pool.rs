//! The nodes: what they hold, how busy they are, and how long a request would take on each.
mod placing;
mod residency;

use crate::breaker::Breaker;
use crate::group::{Group, Standing};
use crate::memory::Memory;
use crate::serving::{Prediction, Serving};
use crate::{
    BlockKey, Decision, Generate, ModelId, ModelView, NodeId, NodeView, PREFIXES_MAX, PoolView, Price,
    Priority, Profile, RequestId, Status, Time, Trust,
};
pub(crate) use residency::Bring;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a node that had no room isn't asked again.
pub(crate) const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// Output of a common request, for the order of nodes.
const COMMON_OUTPUT: u32 = 128;
/// A node that is lost so soon after it came has failed.
const FLAP: Duration = Duration::from_secs(60);
/// Requests of other schedulers that a node is believed to have, at most.
const OTHERS_MAX: u32 = 1 << 20;

/// A node of the pool.
#[derive(Debug)]
pub(crate) struct Node {
    pub name: String,
    /// Who it is, across connections.
    identity: u64,
    pub trust: Trust,
    labels: Vec<(String, String)>,
    connected: Time,
    /// When it last said anything.
    pub heard: Time,
    /// It has said nothing for long.
    suspect: bool,
    /// By its own word.
    draining: bool,
    /// By ours.
    drained: bool,
    /// It fails too often: only if there is nobody else.
    rests_until: Time,
    /// A word there and back.
    round_trip: Duration,
    devices: Vec<String>,
    bandwidth: u64,
    price: Price,
    /// By how much it has charged more than was reserved, at most.
    overcharge_percent: u64,
    memory: Memory,
    models: BTreeMap<ModelId, Serving>,
    pub requests: BTreeSet<RequestId>,
}

/// What a search for a node came to.
#[derive(Debug)]
pub(crate) enum Place {
    /// There.
    On(NodeId, Prediction),
    /// Somebody could, but not now; ask again then, if nothing happens before.
    Wait(Option<Time>),
    /// Somebody could now, but by then a faster one is likely to.
    Later(Time),
    /// Nobody can: why.
    Never(Refusal),
}

impl Place {
    /// When to look again, if it is known.
    pub fn until(&self) -> Option<Time> {
        match self {
            Place::Wait(until) => *until,
            Place::Later(at) => Some(*at),
            Place::On(..) | Place::Never(_) => None,
        }
    }
}

#[derive(Debug)]
pub(crate) enum Refusal {
    NoModel,
    TooLong {
        longest: u32,
    },
    Policy(String),
    /// It may cost too much, wherever it could go: so much where it is cheapest.
    Budget {
        worst: u64,
        others: String,
    },
    /// All that could have been tried.
    Exhausted,
}

/// What a search must know beside the request itself.
pub(crate) struct Search<'a> {
    pub now: Time,
    pub decision: &'a dyn Decision,
    /// Offers to consider beside the soonest done.
    pub breadth: usize,
    /// Nodes that failed it.
    pub tried: &'a [NodeId],
    /// Where its earlier tokens came from.
    pub numerics: Option<&'a str>,
    /// Tokens of output yet to come, by experience.
    pub expected_output: u32,
    /// Of its prompt's blocks.
    pub keys: &'a [BlockKey],
    /// No use in a first token after this.
    pub first_by: Option<Time>,
    /// What may be spent, in billionths of a dollar.
    pub budget: u64,
    /// Random.
    pub draw: u64,
    /// Requests that wait for the same model, before it.
    pub ahead: usize,
    /// It may wait for a faster node.
    pub patient: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Pool {
    nodes: BTreeMap<NodeId, Node>,
    groups: BTreeMap<ModelId, Group>,
    breaker: Breaker,
    /// How many there are, by [`Trust`].
    trusts: [usize; 3],
    providers: BTreeSet<NodeId>,
}

impl Node {
    /// It gets nothing new.
    pub fn is_draining(&self) -> bool {
        self.draining || self.drained
    }
}

impl Pool {
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// Who a node is, if it is somebody else's.
    pub fn guest(&self, id: NodeId) -> Option<u64> {
        self.nodes.get(&id).filter(|node| node.trust == Trust::Guest).map(|node| node.identity)
    }

    /// Whether some node has a place for a model, if only for the most urgent.
    pub fn has_room(&self, model: ModelId) -> bool {
        self.groups.get(&model).is_some_and(|group| group.best(Priority::Interactive, 1).next().is_some())
    }

    /// Whether a node is a provider: some of their models think for minutes, and whoever asks one knows when to give up.
    pub fn is_provider(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.trust == Trust::Provider)
    }

    /// The connections of a node.
    pub fn with_identity(&self, identity: u64) -> Vec<NodeId> {
        self.nodes.iter().filter(|(_, node)| node.identity == identity).map(|(id, _)| *id).collect()
    }

    /// Whether a node of our own holds a model.
    pub fn is_held_by_us(&self, model: ModelId) -> bool {
        let ours = |id: NodeId| self.nodes.get(&id).is_some_and(|node| node.trust == Trust::Own);
        self.groups.get(&model).is_some_and(|group| group.holders().any(ours))
    }

    /// What a token costs on a node.
    pub fn price(&self, id: NodeId) -> Price {
        self.nodes.get(&id).map(|node| node.price).unwrap_or_default()
    }

    /// What policies see of the nodes; of requests the caller knows more.
    pub fn view(&self, model: ModelId, priority: Priority) -> PoolView {
        let [own, guests, providers] = self.trusts;
        let (own_holding, own_free) = self.groups.get(&model).map_or((0, 0), |group| group.own(priority));
        let spilling =
            self.providers.iter().filter_map(|id| self.nodes.get(id)).map(|node| node.requests.len());
        let (nodes, spilling) = (self.nodes.len(), spilling.sum());
        PoolView { nodes, own, guests, providers, own_holding, own_free, spilling, ..PoolView::default() }
    }

    /// What a holder of a model calls it, and the bytes of its file.
    pub fn known_as(&self, model: ModelId) -> Option<(&str, u64)> {
        let id = self.groups.get(&model)?.holders().next()?;
        let held = &self.nodes.get(&id)?.models.get(&model)?.held;
        Some((&held.name, held.weights))
    }

    /// Whether less than half of a model's slots on a node are used.
    pub fn has_spare_room(&self, id: NodeId, model: ModelId) -> bool {
        let serving = self.nodes.get(&id).and_then(|node| node.models.get(&model));
        serving.is_some_and(|s| 2 * s.busy() < s.held.slots)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A node connects, or says that it holds other models than before.
    pub fn profile(&mut self, now: Time, id: NodeId, profile: Profile) {
        let identity = if profile.identity == 0 { id.0 } else { profile.identity };
        let rests_until = self.breaker.rests(identity).unwrap_or(Time::ZERO);
        if !self.nodes.contains_key(&id) {
            self.trusts[Trust::Own as usize] += 1;
        }
        let node = self.nodes.entry(id).or_insert_with(|| Node {
            name: String::new(),
            identity,
            trust: Trust::Own,
            labels: Vec::new(),
            connected: now,
            heard: now,
            suspect: false,
            draining: false,
            drained: false,
            rests_until,
            round_trip: Duration::ZERO,
            devices: Vec::new(),
            bandwidth: 0,
            price: Price::default(),
            overcharge_percent: 0,
            memory: Memory::default(),
            models: BTreeMap::new(),
            requests: BTreeSet::new(),
        });
        let mut before = std::mem::take(&mut node.models);
        node.memory.told(now, &profile);
        node.name = profile.name;
        self.trusts[node.trust as usize] -= 1;
        self.trusts[profile.trust as usize] += 1;
        match profile.trust {
            Trust::Provider => _ = self.providers.insert(id),
            Trust::Own | Trust::Guest => _ = self.providers.remove(&id),
        }
        node.trust = profile.trust;
        // Anybody can say anything of himself, and nobody pays for it.
        (node.labels, node.price) = match profile.trust {
            Trust::Guest => (Vec::new(), Price::default()),
            Trust::Own | Trust::Provider => (profile.labels, profile.price),
        };
        (node.devices, node.bandwidth) = (profile.devices, profile.bandwidth);
        node.heard = now;
        let mut new = Vec::new();
        for mut held in profile.models {
            held.slots = held.slots.max(1);
            let model = held.model;
            let mut serving = match before.remove(&model) {
                Some(old) => old.again(held),
                None => {
                    new.push((model, std::mem::take(&mut held.prefixes)));
                    Serving::new(now, held)
                }
            };
            serving.leaving = node.memory.is_leaving(model);
            self.groups.entry(model).or_default();
            node.models.insert(model, serving);
        }
        for (model, serving) in before {
            self.unhold(id, model, &serving);
        }
        for (model, prefixes) in new {
            self.remember(id, model, &prefixes[..prefixes.len().min(PREFIXES_MAX)]);
        }
        self.touch_all(now, id);
    }

    /// Whether a node holds a model, of use or not.
    pub fn is_held(&self, model: ModelId) -> bool {
        self.groups.contains_key(&model)
    }

    fn unhold(&mut self, id: NodeId, model: ModelId, serving: &Serving) {
        if let Some(group) = self.groups.get_mut(&model) {
            serving.kept.keys().for_each(|key| forget_prefix(group, id, key));
            group.remove(id);
            if group.is_empty() {
                self.groups.remove(&model);
            }
        }
    }

    /// Where a node stands among the holders of a model, as of now.
    fn touch(&mut self, now: Time, id: NodeId, model: ModelId) {
        let (Some(node), Some(group)) = (self.nodes.get(&id), self.groups.get_mut(&model)) else { return };
        let Some(serving) = node.models.get(&model) else { return };
        let fit = serving.alive
            && !serving.leaving
            && !node.suspect
            && !node.is_draining()
            && now >= node.rests_until;
        let priorities = [Priority::Background, Priority::Normal, Priority::Interactive];
        let class = group.class(&serving.held.numerics);
        for until in [serving.busy_until, node.rests_until].into_iter().filter(|until| now < *until) {
            group.pause(id, until);
        }
        let open = priorities.map(|priority| fit && serving.has_room(now, priority));
        let fit = fit && now >= serving.busy_until;
        let cost_us = micros(node.round_trip).saturating_add(serving.common_cost_us(COMMON_OUTPUT));
        let own = node.trust == Trust::Own;
        group.set(id, Standing { class, cost_us, open, fit, own });
    }

    fn touch_all(&mut self, now: Time, id: NodeId) {
        for model in self.models_of(id) {
            self.touch(now, id, model);
        }
    }

    /// A node doesn't hold a model that it was thought to hold.
    pub fn drop_model(&mut self, id: NodeId, model: ModelId) {
        if let Some(serving) = self.nodes.get_mut(&id).and_then(|node| node.models.remove(&model)) {
            self.unhold(id, model, &serving);
        }
    }

    /// A heartbeat. Returns the models whose engine has died since the last.
    pub fn status(&mut self, now: Time, id: NodeId, status: Status) -> Vec<ModelId> {
        let Some(node) = self.nodes.get_mut(&id) else { return Vec::new() };
        let mut all = node.draining != status.draining;
        node.draining = status.draining;
        let (mut died, mut changed) = (Vec::new(), Vec::new());
        let mut room = PREFIXES_MAX;
        for news in status.models {
            let Some(serving) = node.models.get_mut(&news.model) else { continue };
            if serving.alive && !news.alive {
                died.push(news.model);
            }
            let others = status
                .others
                .iter()
                .find(|(model, _)| *model == news.model)
                .map_or(0, |(_, n)| (*n).min(OTHERS_MAX));
            if std::mem::replace(&mut serving.others, others) != others {
                changed.push(news.model);
            }
            all |= serving.alive != news.alive;
            serving.alive = news.alive;
            serving.kv_blocks_free = news.kv_blocks_free;
            if news.steps != serving.steps {
                serving.steps = news.steps;
                serving.progress = now;
            }
            if let Some(rates) = news.rates.filter(|rates| *rates != serving.held.rates) {
                serving.restate(rates);
                changed.push(news.model);
            }
        }
        for cache in status.caches {
            let (gone, new) = (cache.gone.len().min(room), cache.new.len());
            room -= gone;
            self.forget(id, cache.model, &cache.gone[..gone]);
            self.remember(id, cache.model, &cache.new[..new.min(room)]);
            room -= new.min(room);
        }
        match all {
            true => self.touch_all(now, id),
            false => changed.into_iter().for_each(|model| self.touch(now, id, model)),
        }
        died
    }

    /// How long a word takes to a node and back.
    pub fn round_trip(&mut self, now: Time, id: NodeId, time: Duration) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.round_trip = time;
            self.touch_all(now, id);
        }
    }

    /// A node said something.
    pub fn heard(&mut self, now: Time, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.heard = now;
        if std::mem::take(&mut node.suspect) {
            self.touch_all(now, id);
        }
    }

    /// A node has said nothing for long.
    pub fn suspect(&mut self, now: Time, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.suspect = true;
            self.touch_all(now, id);
        }
    }

    /// A node failed a request, by its own fault.
    pub fn failed(&mut self, now: Time, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if let Some(until) = self.breaker.failed(now, node.identity) {
            node.rests_until = until;
            self.touch_all(now, id);
        }
    }

    /// A node finished a request.
    pub fn worked(&mut self, now: Time, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        self.breaker.worked(node.identity);
        if std::mem::replace(&mut node.rests_until, Time::ZERO) > now {
            self.touch_all(now, id);
        }
    }

    /// A node is gone. Returns it with what it was running.
    pub fn remove(&mut self, now: Time, id: NodeId) -> Option<Node> {
        let mut node = self.nodes.remove(&id)?;
        self.trusts[node.trust as usize] -= 1;
        self.providers.remove(&id);
        for (model, serving) in std::mem::take(&mut node.models) {
            self.unhold(id, model, &serving);
        }
        if now.since(node.connected) < FLAP {
            self.breaker.failed(now, node.identity);
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
    pub fn take(&mut self, now: Time, id: NodeId, ask: &Generate, tokens: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.requests.insert(ask.request);
        if let Some(serving) = node.models.get_mut(&ask.model) {
            serving.running[ask.priority as usize] += 1;
            serving.queued_tokens += tokens;
            serving.note_use(now, 1.0);
        }
        self.touch(now, id, ask.model);
    }

    /// A request's prompt is done, after `observed`: `tokens` of it were still to be done, and its blocks are there now.
    pub fn first_token(
        &mut self,
        now: Time,
        id: NodeId,
        model: ModelId,
        tokens: u64,
        predicted: &Prediction,
        observed: Duration,
    ) {
        if let Some(serving) = self.serving(id, model) {
            serving.queued_tokens = serving.queued_tokens.saturating_sub(tokens);
            serving.observe_prefill(predicted, observed);
            self.touch(now, id, model);
        }
    }

    /// A node has these blocks in its cache now.
    pub fn remember(&mut self, id: NodeId, model: ModelId, keys: &[BlockKey]) {
        let Some(serving) = self.nodes.get_mut(&id).and_then(|n| n.models.get_mut(&model)) else { return };
        let (new, gone) = serving.kept.used(keys);
        let Some(group) = self.groups.get_mut(&model) else { return };
        new.into_iter().for_each(|key| group.prefixes.entry(key).or_default().push(id));
        gone.iter().for_each(|key| forget_prefix(group, id, key));
    }

    /// It turned out that a node has not these blocks.
    pub fn forget(&mut self, id: NodeId, model: ModelId, keys: &[BlockKey]) {
        let Some(serving) = self.nodes.get_mut(&id).and_then(|n| n.models.get_mut(&model)) else { return };
        let gone = serving.kept.forget(keys);
        let Some(group) = self.groups.get_mut(&model) else { return };
        gone.iter().for_each(|key| forget_prefix(group, id, key));
    }

    /// Tokens came `observed` apart.
    pub fn observe_pace(
        &mut self,
        now: Time,
        id: NodeId,
        model: ModelId,
        predicted: &Prediction,
        observed: Duration,
    ) {
        if let Some(serving) = self.serving(id, model) {
            serving.observe_pace(predicted, observed);
            self.touch(now, id, model);
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
    pub fn drain(&mut self, now: Time, id: NodeId, on: bool) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.drained = on;
            self.touch_all(now, id);
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
            token_time: serving.token_time(),
            prefill_tokens_per_s: serving.prefill_rate() as f32,
            numerics: serving.held.numerics.clone(),
            bytes: serving.held.bytes,
            weights: serving.held.weights,
            pinned: serving.held.pinned,
            kv_blocks: (serving.kv_blocks_free, serving.held.kv_blocks),
        };
        let node = |(id, node): (&NodeId, &Node)| NodeView {
            node: *id,
            name: node.name.clone(),
            trust: node.trust,
            labels: node.labels.clone(),
            draining: node.is_draining(),
            silent: now.since(node.heard),
            rests: node.rests_until.since(now),
            devices: node.devices.clone(),
            memory_free: node.memory.free(),
            bandwidth: node.bandwidth,
            price: node.price,
            loading: node.memory.coming().collect(),
            models: node.models.iter().map(model).collect(),
        };
        self.nodes.iter().map(node).collect()
    }

    /// It had no room: don't ask again at once.
    pub fn busy(&mut self, now: Time, id: NodeId, model: ModelId) {
        if let Some(serving) = self.serving(id, model) {
            serving.busy_until = serving.busy_until.max(now + BUSY_PAUSE);
            self.touch(now, id, model);
        }
    }

    /// It takes nothing new for so long.
    pub fn pause(&mut self, now: Time, id: NodeId, pause: Duration) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.models.values_mut().for_each(|serving| serving.busy_until = serving.busy_until.max(now + pause));
        self.touch_all(now, id);
    }

    /// Takes a request from a node; `tokens` of its prompt were still to be done.
    pub fn release(&mut self, now: Time, id: NodeId, ask: &Generate, tokens: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.requests.remove(&ask.request);
        if let Some(serving) = node.models.get_mut(&ask.model) {
            let running = &mut serving.running[ask.priority as usize];
            *running = running.saturating_sub(1);
            serving.note_use(now, 0.0);
            serving.queued_tokens = serving.queued_tokens.saturating_sub(tokens);
        }
        self.touch(now, id, ask.model);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn forget_prefix(group: &mut Group, id: NodeId, key: &BlockKey) {
    if let Some(nodes) = group.prefixes.get_mut(key) {
        nodes.retain(|node| *node != id);
        if nodes.is_empty() {
            group.prefixes.remove(key);
        }
    }
}
