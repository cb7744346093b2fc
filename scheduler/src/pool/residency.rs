//! Which models nodes hold, which they could, and which they had better let go of.
use super::{COMMON_OUTPUT, Node, Pool};
use crate::memory::human;
use crate::serving::{COMMON_PROMPT, Serving};
use crate::{Class, Limits, ModelId, NodeId, Priority, Time, ToNode, Trust};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

/// Faster than people read.
const READING: Duration = Duration::from_millis(50);
/// Bytes that a machine reads in a second, if it doesn't say: a plain desktop's memory.
const BANDWIDTH_GUESS: f64 = 10e9;

/// Tokens of a prompt that are computed in the time of one of output.
const PREFILL_SHARES: f64 = 8.0;

/// What is to be done so that some node holds a model.
#[derive(Debug, PartialEq)]
pub(crate) enum Bring {
    /// Nothing: a node does.
    Here,
    /// To wait: a node loads it, or will when there is room.
    Coming,
    /// This node is to load it.
    Load(NodeId),
    /// This node is to let go of these first.
    Unload(NodeId, Vec<ModelId>),
    /// None can: why.
    Never(String),
}

impl Pool {
    /// Whether a node holds a model and may be used.
    fn is_here(&self, model: ModelId) -> bool {
        let usable = |node: &Node| {
            !node.is_draining() && node.models.get(&model).is_some_and(|s| s.alive && !s.leaving)
        };
        let holders = self.groups.get(&model).into_iter().flat_map(|group| group.holders());
        holders.filter_map(|id| self.nodes.get(&id)).any(usable)
    }

    /// How a model gets into the pool. `awaited` says of others whether somebody waits for them.
    pub fn bring(
        &self,
        now: Time,
        model: ModelId,
        limits: &Limits,
        awaited: &dyn Fn(ModelId) -> bool,
    ) -> Bring {
        if self.is_here(model) {
            return Bring::Here;
        }
        if self.nodes.values().any(|node| node.memory.is_coming(model) && !node.is_draining()) {
            return Bring::Coming;
        }
        let (mut load, mut later) = (None, false);
        let mut unload: Option<(f64, NodeId, Vec<ModelId>)> = None;
        let (mut failed, mut nearest) = (None, None);
        for (id, node) in self.nodes.iter().filter(|(_, node)| !node.is_draining()) {
            let Some(offer) = node.memory.offer(model) else { continue };
            if let Some(why) = node.memory.failed(now, model, limits.load_again) {
                failed = Some(format!("node {} could not load {}: {why}", node.name, offer.name));
                continue;
            }
            let room = node.room();
            if offer.bytes > room {
                nearest = nearest.max(Some((room, Reverse(*id))));
                continue;
            }
            let free = node.memory.free();
            let soonest = node.prospect(now, model, COMMON_PROMPT).map(|p| Reverse(p.total(COMMON_OUTPUT)));
            let rank = (node.trust == Trust::Own, soonest, free, Reverse(*id));
            if node.suspect || node.leaving_bytes() > 0 {
                later = true;
            } else if free >= offer.bytes {
                load = load.max(Some(rank));
            } else if let Some((worth, models)) =
                self.least_worth(now, node, offer.bytes - free, limits, awaited)
            {
                if unload.as_ref().is_none_or(|(least, ..)| worth < *least) {
                    unload = Some((worth, *id, models));
                }
            } else {
                later = true;
            }
        }
        match (load, unload) {
            (Some((.., Reverse(id))), _) => Bring::Load(id),
            (None, Some((_, id, models))) if !later => Bring::Unload(id, models),
            (None, None) if !later => Bring::Never(self.no_room(model, failed, nearest)),
            _ => Bring::Coming,
        }
    }

    /// A further node that has memory to spare for a model that is asked for more than its holders can take, and would have
    /// begun with a request before `wait` is over.
    pub fn spare_for(&self, now: Time, model: ModelId, wait: Duration, limits: &Limits) -> Option<NodeId> {
        if self.nodes.values().any(|node| node.memory.is_coming(model)) {
            return None;
        }
        let fits = |node: &Node| {
            let unused = !node.is_draining() && !node.suspect && !node.models.contains_key(&model);
            let fits = node.memory.offer(model).is_some_and(|offer| offer.bytes <= node.memory.free());
            unused && fits && node.memory.failed(now, model, limits.load_again).is_none()
        };
        let spare = self.nodes.iter().filter(|(_, node)| fits(node));
        let prospects = spare.filter_map(|(id, node)| {
            let prospect = node.prospect(now, model, COMMON_PROMPT).filter(|p| p.ttft < wait)?;
            Some((node.trust == Trust::Own, Reverse(prospect.total(COMMON_OUTPUT)), Reverse(*id)))
        });
        prospects.max().map(|(.., Reverse(id))| id)
    }

    /// When the first token of a request for a model that no node holds could be there, at the earliest.
    pub fn soonest_loaded(&self, now: Time, model: ModelId, tokens: u64) -> Option<Duration> {
        let able = self.nodes.values().filter(|node| !node.is_draining());
        able.filter_map(|node| Some(node.prospect(now, model, tokens)?.ttft)).min()
    }

    /// How long the last of so many requests waits for a slot of a model's holders, as far as we know.
    pub fn wait(&self, model: ModelId, waiting: usize, output: u32) -> Duration {
        let holders = self.groups.get(&model).into_iter().flat_map(|group| group.holders());
        let serving = holders.filter_map(|id| self.nodes.get(&id)?.models.get(&model));
        let a_second = |s: &Serving| {
            f64::from(s.held.slots) / (s.token_time().as_secs_f64() * f64::from(output.max(1))).max(1e-6)
        };
        let places_per_s: f64 = serving.filter(|s| s.alive && !s.leaving).map(a_second).sum();
        Duration::from_secs_f64((waiting as f64 / places_per_s.max(1e-9)).min(1e6))
    }

    fn no_room(
        &self,
        model: ModelId,
        failed: Option<String>,
        nearest: Option<(u64, Reverse<NodeId>)>,
    ) -> String {
        let nearest = nearest.and_then(|(room, Reverse(id))| {
            let node = self.nodes.get(&id)?;
            let offer = node.memory.offer(model)?;
            Some(format!(
                "{} needs {}; the closest is {} with {} free of {}",
                offer.name,
                human(offer.bytes),
                node.name,
                human(room),
                human(node.memory.total())
            ))
        });
        failed.or(nearest).unwrap_or_else(|| "no node holds this model or can load it".into())
    }

    /// The idle models of a node that are worth least, as many as must go to free `need` bytes, and what they are worth
    /// all together.
    fn least_worth(
        &self,
        now: Time,
        node: &Node,
        need: u64,
        limits: &Limits,
        awaited: &dyn Fn(ModelId) -> bool,
    ) -> Option<(f64, Vec<ModelId>)> {
        let mut idle: Vec<(f64, u64, ModelId)> = Vec::new();
        for (id, serving) in &node.models {
            let quiet = serving.busy() == 0 && now.since(serving.used) >= limits.settle;
            if quiet && !serving.held.pinned && !serving.leaving && !awaited(*id) {
                let holders = self.groups.get(id).map_or(1, |group| group.holders().take(8).count().max(1));
                idle.push((serving.demand(now) / holders as f64, serving.held.bytes, *id));
            }
        }
        idle.sort_by(|a, b| (a.0 / a.1.max(1) as f64).total_cmp(&(b.0 / b.1.max(1) as f64)));
        let enough = (1..=idle.len()).find(|n| idle[..*n].iter().map(|i| i.1).sum::<u64>() >= need)?;
        idle.truncate(enough);
        let mut sum: u64 = idle.iter().map(|i| i.1).sum();
        // Of those worth more, the ones that turned out not to be needed.
        for at in (0..idle.len()).rev() {
            if sum - idle[at].1 >= need {
                sum -= idle.remove(at).1;
            }
        }
        Some((idle.iter().map(|i| i.0).sum(), idle.into_iter().map(|i| i.2).collect()))
    }

    /// The order for a node to load a model that it offers and has room for.
    pub fn load(&mut self, now: Time, id: NodeId, model: ModelId) -> Option<ToNode> {
        let memory = &mut self.nodes.get_mut(&id)?.memory;
        let bytes = memory.offer(model)?.bytes;
        let number = memory.load(now, model, bytes);
        Some(ToNode::Load { number, model, bytes })
    }

    /// The order for a node to let go of a model, which gets nothing new from now on.
    pub fn unload(&mut self, now: Time, id: NodeId, model: ModelId) -> Option<ToNode> {
        let node = self.nodes.get_mut(&id)?;
        node.models.get_mut(&model)?.leaving = true;
        let number = node.memory.unload(model);
        self.touch(now, id, model);
        Some(ToNode::Unload { number, model })
    }

    /// Models that nobody has asked for in a long time and that nobody wants to keep.
    pub fn idle(&self, now: Time, limits: &Limits) -> Vec<(NodeId, ModelId)> {
        let of_node = |(id, node): (&NodeId, &Node)| {
            let idle = node.models.iter().filter(|(_, s)| {
                let quiet = s.busy() == 0 && now.since(s.used) >= limits.idle_unload;
                quiet && !s.held.pinned && !s.leaving
            });
            idle.map(|(model, _)| (*id, *model)).collect::<Vec<_>>()
        };
        self.nodes.iter().flat_map(of_node).collect()
    }

    /// Whether any node holds a model that may be unloaded.
    pub fn may_idle(&self) -> bool {
        self.nodes.values().any(|node| node.models.values().any(|s| !s.held.pinned && !s.leaving))
    }

    /// The model that a class stands for: of those that nodes hold; of those that they could, if they hold none.
    pub fn of_class(&self, class: Class) -> Option<ModelId> {
        let mut models: Vec<(u64, ModelId, Duration)> =
            self.groups.keys().filter_map(|m| self.held(*m)).collect();
        if models.is_empty() {
            models = self.loadable();
        }
        models.sort_unstable();
        let by_speed = || {
            let fluent = models.iter().rev().find(|(.., token_time)| *token_time <= READING);
            fluent.or_else(|| models.iter().min_by_key(|(.., token_time)| *token_time))
        };
        let chosen = match class {
            Class::Small => models.first(),
            Class::Medium => models.get(models.len() / 2),
            Class::Large => models.last(),
            Class::Auto => by_speed(),
        };
        chosen.map(|(_, model, _)| *model)
    }

    /// A model's size, and its pace on the best node that holds it, if one that may be used does.
    fn held(&self, model: ModelId) -> Option<(u64, ModelId, Duration)> {
        let group = self.groups.get(&model)?;
        let priority = Priority::Interactive;
        let best = group.best(priority, 1).chain(group.best_full(priority, 1)).next()?;
        let node = self.nodes.get(&best).filter(|node| node.trust != Trust::Provider)?;
        let serving = node.models.get(&model)?;
        let token_time = serving.held.rates.token_time_alone.mul_f64(serving.decode_ratio);
        Some((serving.held.weights, model, token_time))
    }

    /// The first of these models that a node holds; else the first that one could load.
    pub fn named(&self, names: &[String]) -> Option<ModelId> {
        let called =
            |model: &ModelId, name: &str| self.known_as(*model).is_some_and(|(known, _)| known == name);
        let held = |name: &String| self.groups.keys().copied().find(|m| called(m, name) && self.is_here(*m));
        let offers =
            || self.nodes.values().filter(|node| !node.is_draining()).flat_map(|n| n.memory.offers());
        let offered = |name: &String| offers().find(|offer| offer.name == *name).map(|offer| offer.model);
        names.iter().find_map(held).or_else(|| names.iter().find_map(offered))
    }

    /// The same of what nodes could load, by the reckoning that a token reads all weights.
    fn loadable(&self) -> Vec<(u64, ModelId, Duration)> {
        let mut best: BTreeMap<ModelId, (u64, Duration)> = BTreeMap::new();
        for node in self.nodes.values().filter(|node| !node.is_draining()) {
            for offer in node.memory.offers().filter(|offer| offer.bytes <= node.room()) {
                let token_time = node.reads(offer.weights);
                let entry = best.entry(offer.model).or_insert((offer.weights, token_time));
                entry.1 = entry.1.min(token_time);
            }
        }
        best.into_iter().map(|(model, (weights, token_time))| (weights, model, token_time)).collect()
    }
}

/// What a node would take for a request for a model that it has to load first.
struct Prospect {
    /// DESIGN: `rtt + load_time + prompt / prefill rate`.
    ttft: Duration,
    token_time: Duration,
}

impl Prospect {
    fn total(&self, output: u32) -> Duration {
        self.ttft + self.token_time.saturating_mul(output)
    }
}

impl Node {
    /// By the reckoning that a token reads all weights, and a prompt's share them.
    fn prospect(&self, now: Time, model: ModelId, tokens: u64) -> Option<Prospect> {
        let (offer, load) = (self.memory.offer(model)?, self.memory.load_time(now, model)?);
        let token_time = self.reads(offer.weights);
        let prefill = token_time.mul_f64(tokens as f64 / PREFILL_SHARES);
        Some(Prospect { ttft: self.round_trip + load + prefill, token_time })
    }

    /// How long it takes to read so many bytes of weights.
    fn reads(&self, bytes: u64) -> Duration {
        let bandwidth = if self.bandwidth == 0 { BANDWIDTH_GUESS } else { self.bandwidth as f64 };
        Duration::from_secs_f64((bytes as f64 / bandwidth).min(1e6))
    }

    /// Bytes that models which may be unloaded take, and those that are free.
    fn room(&self) -> u64 {
        let pinned = self.models.values().filter(|s| s.held.pinned).map(|s| s.held.bytes);
        pinned.fold(self.memory.total(), u64::saturating_sub)
    }

    /// Bytes of models on their way out.
    fn leaving_bytes(&self) -> u64 {
        self.models.values().filter(|s| s.leaving).map(|s| s.held.bytes).sum()
    }
}
