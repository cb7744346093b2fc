//! A node's memory: what its models take, and what is on its way in and out.
use crate::{ModelId, Offered, Profile, Time};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Bytes of a model that a node takes into memory in a second, before it has loaded any: a plain desktop's disk.
const LOAD_GUESS_BYTES_PER_S: f64 = 500e6;
/// Weight of the newest observation.
const NEWEST: f64 = 0.5;

/// What a node could hold, and what it has been told to.
///
/// A node numbers in its profile the last order that it has taken: its own word counts for all orders up to that one,
/// and ours for those behind it. So memory is never given away twice, however late its word comes.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// By its own word.
    free: u64,
    /// What its models, there and on their way, take by its own word, and what is free.
    total: u64,
    offers: BTreeMap<ModelId, Offered>,
    /// On their way in.
    coming: BTreeMap<ModelId, Coming>,
    /// On their way out.
    leaving: BTreeSet<ModelId>,
    /// What didn't work, and when.
    failed: BTreeMap<ModelId, (Time, String)>,
    /// Orders so far, and of those the ones that it has taken.
    orders: u64,
    heard: u64,
    /// Bytes of models that it loads in a second, as observed.
    load_bytes_per_s: Option<f64>,
}

#[derive(Clone, Copy, Debug)]
struct Coming {
    bytes: u64,
    order: u64,
    since: Time,
}

impl Memory {
    /// The node says what it holds.
    pub fn told(&mut self, now: Time, profile: &Profile) {
        let holds = |model: ModelId| profile.models.iter().any(|held| held.model == model);
        let loads = |model: ModelId| profile.loading.iter().any(|loading| loading.model == model);
        let taken = profile.models.iter().map(|m| m.bytes).chain(profile.loading.iter().map(|l| l.bytes));
        self.total = taken.fold(profile.memory_free, u64::saturating_add);
        self.free = profile.memory_free;
        self.heard = profile.orders.min(self.orders);
        self.offers = profile.offers.iter().map(|offer| (offer.model, offer.clone())).collect();
        for (model, coming) in std::mem::take(&mut self.coming) {
            if coming.order > self.heard || loads(model) {
                self.coming.insert(model, coming);
            } else if holds(model) {
                self.observe_load(model, now.since(coming.since));
            } else {
                let why = profile.failures.iter().find(|(failed, _)| *failed == model);
                let why = why.map_or_else(|| "it was let go".into(), |(_, why)| why.clone());
                self.failed.insert(model, (now, why));
            }
        }
        for loading in &profile.loading {
            let coming = Coming { bytes: loading.bytes, order: 0, since: now };
            self.coming.entry(loading.model).or_insert(coming);
        }
        self.leaving.retain(|model| holds(*model));
    }

    fn observe_load(&mut self, model: ModelId, took: Duration) {
        let Some(offer) = self.offers.get(&model).filter(|offer| offer.weights > 0) else { return };
        let rate = offer.weights as f64 / took.as_secs_f64().max(1e-3);
        let old = self.load_bytes_per_s.unwrap_or(rate);
        self.load_bytes_per_s = Some(old + NEWEST * (rate - old));
    }

    /// How long it takes to load a model that it offers, by what was observed; what is left of that, where it loads it.
    pub fn load_time(&self, now: Time, model: ModelId) -> Option<Duration> {
        let offer = self.offers.get(&model)?;
        let rate = self.load_bytes_per_s.unwrap_or(LOAD_GUESS_BYTES_PER_S);
        let whole = Duration::from_secs_f64((offer.weights as f64 / rate.max(1.0)).min(1e6));
        let passed = self.coming.get(&model).map_or(Duration::ZERO, |coming| now.since(coming.since));
        Some(whole.saturating_sub(passed))
    }

    /// Bytes that may be given away now.
    pub fn free(&self) -> u64 {
        let promised = self.coming.values().filter(|c| c.order > self.heard).map(|c| c.bytes);
        promised.fold(self.free, u64::saturating_sub)
    }

    /// Bytes for models in all.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// What it could load of this model.
    pub fn offer(&self, model: ModelId) -> Option<&Offered> {
        self.offers.get(&model)
    }

    /// All that it could load.
    pub fn offers(&self) -> impl Iterator<Item = &Offered> {
        self.offers.values()
    }

    /// What it loads.
    pub fn coming(&self) -> impl Iterator<Item = ModelId> + '_ {
        self.coming.keys().copied()
    }

    /// Whether it loads this model.
    pub fn is_coming(&self, model: ModelId) -> bool {
        self.coming.contains_key(&model)
    }

    /// Whether it lets go of this model.
    pub fn is_leaving(&self, model: ModelId) -> bool {
        self.leaving.contains(&model)
    }

    /// Why it couldn't load this model, if that was less than `ago`.
    pub fn failed(&self, now: Time, model: ModelId, ago: Duration) -> Option<&str> {
        self.failed.get(&model).filter(|(at, _)| now.since(*at) < ago).map(|(_, why)| why.as_str())
    }

    /// It is told to load a model for which there is room. Returns the order's number.
    pub fn load(&mut self, now: Time, model: ModelId, bytes: u64) -> u64 {
        assert!(bytes <= self.free(), "memory is given away twice");
        self.orders += 1;
        self.failed.remove(&model);
        self.coming.insert(model, Coming { bytes, order: self.orders, since: now });
        self.orders
    }

    /// It is told to let go of a model. Returns the order's number.
    pub fn unload(&mut self, model: ModelId) -> u64 {
        self.orders += 1;
        self.leaving.insert(model);
        self.orders
    }
}

/// Bytes for a person: `4.6 GB`.
pub(crate) fn human(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
