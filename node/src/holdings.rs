//! What a node holds, and what it can be told to load.
use crate::clock::{interval, timeout};
use crate::load::Loaded;
use crate::tasks::{beside, go};
use crate::worker::Resident;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use weir_scheduler::{Loading, ModelId, Offered, Profile};

/// How long what other schedulers run on a model may go on when one orders to let go of it.
const OTHERS_WORK: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);
/// Models offered, at most.
const OFFERS_MAX: usize = 256;

/// Loads an offered model into so many bytes of memory, from wherever this machine gets it; blocks meanwhile. Fails with
/// words for a person.
pub type Load = dyn Fn(&Offered, u64) -> Result<Loaded, String> + Send + Sync;

/// What a node can be told to load.
pub struct Stock {
    offers: Vec<Offered>,
    load: Box<Load>,
}

impl Stock {
    /// These models (the first 256 of them), loaded by `load`.
    pub fn new(mut offers: Vec<Offered>, load: Box<Load>) -> Stock {
        offers.truncate(OFFERS_MAX);
        Stock { offers, load }
    }

    /// Nothing.
    pub fn none() -> Stock {
        Stock::new(Vec::new(), Box::new(|_, _| Err("this node loads nothing by order".into())))
    }
}

/// What a node holds, for all schedulers that it serves.
pub(crate) struct Holdings {
    stock: Stock,
    /// Bytes for all models together.
    memory: u64,
    inside: Mutex<Inside>,
    changed: watch::Sender<()>,
}

struct Inside {
    residents: Vec<Resident>,
    loading: Vec<Loading>,
    failures: BTreeMap<ModelId, String>,
}

impl Holdings {
    pub fn new(residents: Vec<Resident>, stock: Stock, memory: u64) -> Holdings {
        let inside = Inside { residents, loading: Vec::new(), failures: BTreeMap::new() };
        Holdings { stock, memory, inside: Mutex::new(inside), changed: watch::Sender::new(()) }
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn residents(&self) -> Vec<Resident> {
        self.inside().residents.clone()
    }

    pub fn find(&self, which: impl Fn(&Resident) -> bool) -> Option<Resident> {
        self.inside().residents.iter().find(|r| which(r)).cloned()
    }

    /// Takes in a model that was loaded elsewhere.
    pub fn hold(&self, resident: Resident) {
        self.inside().residents.push(resident);
        self.changed.send_replace(());
    }

    /// Changes with what it holds and loads.
    pub fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Its part of a profile.
    pub fn describe(&self) -> Profile {
        let inside = self.inside();
        Profile {
            memory_free: self.memory.saturating_sub(inside.taken()),
            models: inside.residents.iter().map(|r| r.held.clone()).collect(),
            offers: self.stock.offers.clone(),
            loading: inside.loading.clone(),
            failures: inside.failures.iter().map(|(model, why)| (*model, why.clone())).collect(),
            ..Profile::default()
        }
    }

    /// Begins to load a model, as a scheduler orders. What comes of it is seen in [`Holdings::describe`].
    pub fn load(self: &Arc<Self>, model: ModelId, bytes: u64) {
        match self.begin(model, bytes) {
            Ok(true) => {}
            // Another scheduler was quicker, or it doesn't know yet that it is here: it will see.
            Ok(false) => {
                self.changed.send_replace(());
                return;
            }
            Err(why) => return self.failed(model, why),
        }
        let holdings = self.clone();
        beside(move || {
            let offer = holdings.stock.offers.iter().find(|offer| offer.model == model);
            let loaded = offer.ok_or_else(|| "it is not offered".to_owned());
            let loaded = loaded.and_then(|offer| {
                tracing::info!("loading {} as the scheduler asks", offer.name);
                let loaded = (holdings.stock.load)(offer, bytes)?;
                match loaded.held.model == model {
                    true => Ok((offer.name.clone(), loaded)),
                    false => Err("its file holds another model".into()),
                }
            });
            match loaded {
                Ok((name, mut loaded)) => {
                    loaded.held.name = name;
                    let resident = Resident::new(loaded.held, loaded.text, loaded.engine);
                    let mut inside = holdings.inside();
                    inside.loading.retain(|loading| loading.model != model);
                    inside.residents.push(resident.clone());
                    drop(inside);
                    holdings.changed.send_replace(());
                    go(async move { resident.try_out().await });
                }
                Err(why) => holdings.failed(model, why),
            }
        });
        self.changed.send_replace(());
    }

    /// Sets memory aside, unless the model has some already. Fails where others have taken it: this is the only place that
    /// knows what all schedulers have ordered.
    fn begin(&self, model: ModelId, bytes: u64) -> Result<bool, String> {
        let mut inside = self.inside();
        let known = inside.residents.iter().any(|r| r.held.model == model)
            || inside.loading.iter().any(|loading| loading.model == model);
        if known {
            return Ok(false);
        }
        let free = self.memory.saturating_sub(inside.taken());
        if bytes > free {
            return Err(format!("{bytes} bytes of memory are wanted, {free} are free"));
        }
        inside.failures.remove(&model);
        inside.loading.push(Loading { model, bytes });
        Ok(true)
    }

    fn failed(&self, model: ModelId, why: String) {
        tracing::warn!("a model could not be loaded: {why}");
        let mut inside = self.inside();
        inside.loading.retain(|loading| loading.model != model);
        inside.failures.insert(model, why);
        // Orders come from schedulers, of which one may be wrong in the head.
        while inside.failures.len() > OFFERS_MAX {
            inside.failures.pop_first();
        }
        drop(inside);
        self.changed.send_replace(());
    }

    /// Lets go of a model, as a scheduler orders, when what other schedulers run there has ended, or has had its time. It is
    /// described as held until its memory is free.
    pub fn unload(self: &Arc<Self>, model: ModelId) {
        let Some(resident) = self.find(|r| r.held.model == model && !r.held.pinned) else {
            // What the order is about is not so: the scheduler shall know better.
            self.changed.send_replace(());
            return;
        };
        tracing::info!("letting go of {}, as the scheduler asks", resident.held.name);
        let holdings = self.clone();
        go(async move {
            // Whoever ordered it has nothing there; another scheduler may, and would have to run it again elsewhere.
            let idle = async {
                let mut look = interval(LOOK);
                while resident.running() > 0 {
                    look.tick().await;
                }
            };
            _ = timeout(OTHERS_WORK, idle).await;
            beside(move || {
                resident.shutdown();
                drop(resident);
                holdings.inside().residents.retain(|r| r.held.model != model);
                holdings.changed.send_replace(());
            });
        });
    }
}

impl Inside {
    /// Bytes that models take, there and on their way.
    fn taken(&self) -> u64 {
        let held = self.residents.iter().map(|r| r.held.bytes);
        held.chain(self.loading.iter().map(|l| l.bytes)).fold(0, u64::saturating_add)
    }
}
