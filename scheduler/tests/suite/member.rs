//! A made-up node of the world: what it holds and loads, and what runs there.
use crate::random::Rng;
use crate::samples::{MODEL, profile};
use std::collections::BTreeMap;
use std::time::Duration;
use weir_scheduler::{
    Generate, Held, Loading, ModelId, NodeId, Offered, Price, Profile, RequestId, Time, Trust,
};

pub(crate) const SLOTS: u32 = 4;

/// Models that there are, and the memory that each takes.
pub(crate) const MODELS: [(ModelId, u64); 3] =
    [(MODEL, 40), (ModelId([10; 32]), 30), (ModelId([11; 32]), 50)];

pub(crate) fn bytes_of(model: ModelId) -> u64 {
    MODELS.iter().find(|m| m.0 == model).map_or(0, |m| m.1)
}

/// An attempt's stream, or the control stream.
pub(crate) type Stream = Option<(RequestId, u32)>;

pub(crate) struct Job {
    pub ask: Generate,
    pub cancelled: bool,
}

pub(crate) struct Member {
    pub jobs: BTreeMap<(RequestId, u32), Job>,
    /// Nothing happens there before this.
    pub frozen: Time,
    /// Nothing comes from there, or gets there, before this.
    pub cut: Time,
    pub pace: Duration,
    pub steps: u64,
    /// What it says arrives after this, and in order on each stream.
    pub connected: Time,
    arrivals: BTreeMap<Stream, Time>,
    pub identity: u64,
    /// It holds the first model from the beginning, for good.
    pinned: bool,
    pub price: Price,
    pub trust: Trust,
    /// It goes on after the beginning of an answer.
    pub resumes: bool,
    memory: u64,
    held: Vec<ModelId>,
    loading: Vec<ModelId>,
    failures: Vec<(ModelId, String)>,
    orders: u64,
}

impl Member {
    pub fn new(rng: &mut Rng, now: Time) -> Member {
        let pinned = !rng.one_in(4);
        let trust = [Trust::Guest, Trust::Provider, Trust::Own, Trust::Own][rng.below(4) as usize];
        Member {
            resumes: trust != Trust::Provider || rng.one_in(2),
            jobs: BTreeMap::new(),
            frozen: now,
            cut: now,
            pace: rng.ms(2, 40),
            steps: 0,
            connected: now,
            arrivals: BTreeMap::new(),
            // A few identities, so that some of them flap.
            identity: 1 + rng.below(4),
            pinned,
            price: Price { prompt: rng.below(2), output: rng.below(4) },
            trust,
            memory: [45, 80, 100][rng.below(3) as usize],
            held: if pinned { vec![MODEL] } else { Vec::new() },
            loading: Vec::new(),
            failures: Vec::new(),
            orders: 0,
        }
    }

    /// Its link is a new one.
    pub fn reconnects(&mut self, now: Time) {
        self.jobs.clear();
        self.orders = 0;
        self.connected = now;
        self.arrivals.clear();
    }

    /// When a word on a stream arrives that would without others.
    pub fn arrives(&mut self, stream: Stream, at: Time) -> Time {
        let last = self.arrivals.entry(stream).or_insert(self.connected);
        *last = (*last).max(at);
        *last
    }

    pub fn profile(&self, id: NodeId) -> Profile {
        let mut profile = profile(&format!("n{}", id.0), SLOTS);
        let sample = profile.models.remove(0);
        let held = |model: &ModelId| Held {
            model: *model,
            bytes: bytes_of(*model),
            pinned: self.pinned && *model == MODEL,
            resumes: self.resumes,
            grammars: true,
            ..sample.clone()
        };
        let offer = |(model, bytes): &(ModelId, u64)| Offered {
            model: *model,
            name: format!("{model:?}"),
            weights: *bytes,
            bytes: *bytes,
        };
        let loading = |model: &ModelId| Loading { model: *model, bytes: bytes_of(*model) };
        Profile {
            identity: self.identity,
            price: self.price,
            trust: self.trust,
            memory_free: self.memory - self.taken(),
            models: self.held.iter().map(held).collect(),
            offers: MODELS.iter().map(offer).collect(),
            loading: self.loading.iter().map(loading).collect(),
            failures: self.failures.clone(),
            orders: self.orders,
            ..profile
        }
    }

    fn taken(&self) -> u64 {
        self.held.iter().chain(&self.loading).map(|model| bytes_of(*model)).sum()
    }

    pub fn holds(&self, model: ModelId) -> bool {
        self.held.contains(&model)
    }

    pub fn told_to_load(&mut self, number: u64, model: ModelId, bytes: u64) {
        self.next_order(number);
        assert!(!self.held.contains(&model) && !self.loading.contains(&model), "{model:?} is there");
        self.failures.retain(|(failed, _)| *failed != model);
        self.loading.push(model);
        assert!(bytes == bytes_of(model) && self.taken() <= self.memory, "memory is over-committed");
    }

    pub fn loaded(&mut self, model: ModelId, works: bool) {
        self.loading.retain(|loading| *loading != model);
        match works {
            true => self.held.push(model),
            false => self.failures.push((model, "out of luck".into())),
        }
    }

    /// It takes its time: see [`Member::unloaded`].
    pub fn told_to_unload(&mut self, number: u64, model: ModelId) {
        let live = self.jobs.values().any(|job| job.ask.model == model && !job.cancelled);
        assert!(!(live || self.pinned && model == MODEL), "{model:?} is of use");
        self.next_order(number);
    }

    pub fn unloaded(&mut self, model: ModelId) {
        self.held.retain(|held| *held != model);
        self.jobs.retain(|_, job| job.ask.model != model);
    }

    fn next_order(&mut self, number: u64) {
        assert_eq!(number, self.orders + 1, "orders come in order");
        self.orders = number;
    }
}
