//! The models that can be asked for: those whose tokenizer is known and that some node holds. And those that nodes could
//! load.
use super::ServedModel;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use weir_scheduler::{Held, ModelId, NodeId, Profile};

/// Models that are known, at most.
const KNOWN_MAX: usize = 256;

/// Shared by those who ask for models and those who bring them.
#[derive(Debug)]
pub(super) struct Shelf(Mutex<Inside>);

#[derive(Debug, Default)]
struct Inside {
    known: Vec<Arc<ServedModel>>,
    /// The longest context that each node offers.
    holders: HashMap<ModelId, BTreeMap<NodeId, u32>>,
    /// What nodes could load, by name, and which nodes.
    offers: BTreeMap<ModelId, (String, BTreeSet<NodeId>)>,
    /// Whose tokenizers are on their way.
    coming: HashSet<ModelId>,
    /// There are upstreams, or may be.
    upstreams: bool,
    /// What may stand in for models, by names.
    stand_ins: BTreeMap<String, Vec<String>>,
}

impl Shelf {
    /// With the models of this process.
    pub fn new(known: Vec<ServedModel>) -> Shelf {
        Shelf(Mutex::new(Inside { known: known.into_iter().map(Arc::new).collect(), ..Inside::default() }))
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What can be asked for.
    pub fn models(&self) -> Vec<Arc<ServedModel>> {
        let inside = self.inside();
        inside.known.iter().filter(|m| inside.holders.contains_key(&m.id)).cloned().collect()
    }

    /// The model of that name.
    pub fn model(&self, name: &str) -> Option<Arc<ServedModel>> {
        let inside = self.inside();
        inside.known.iter().find(|m| m.name == name && inside.holders.contains_key(&m.id)).cloned()
    }

    /// The model of that id, if a node holds it.
    pub fn by_id(&self, id: ModelId) -> Option<Arc<ServedModel>> {
        let inside = self.inside();
        inside.known.iter().find(|m| m.id == id && inside.holders.contains_key(&m.id)).cloned()
    }

    /// What a model is called, whether a node holds it or not.
    pub fn name_of(&self, id: ModelId) -> String {
        let inside = self.inside();
        inside.known.iter().find(|m| m.id == id).map(|m| m.name.clone()).unwrap_or_default()
    }

    /// Upstreams are looked after from now on.
    pub fn expect_upstreams(&self) {
        self.inside().upstreams = true;
    }

    pub fn set_stand_ins(&self, stand_ins: BTreeMap<String, Vec<String>>) {
        self.inside().stand_ins = stand_ins;
    }

    pub fn stand_ins(&self, model: &str) -> Vec<String> {
        self.inside().stand_ins.get(model).cloned().unwrap_or_default()
    }

    /// Requests may go to upstreams, or to models with other tokens.
    pub fn may_reword(&self) -> bool {
        let inside = self.inside();
        inside.upstreams || !inside.stand_ins.is_empty()
    }

    /// A model of an upstream, which needs no tokenizer; its name is nobody else's.
    pub fn know(&self, model: ServedModel) {
        let mut inside = self.inside();
        inside.known.retain(|known| known.id != model.id);
        if inside.known.len() < KNOWN_MAX {
            inside.known.push(Arc::new(model));
        }
    }

    /// Names of models that no node holds and some could load.
    pub fn offers(&self) -> Vec<(String, ModelId)> {
        let inside = self.inside();
        let absent = inside.offers.iter().filter(|(id, _)| !inside.holders.contains_key(id));
        absent.map(|(id, (name, _))| (name.clone(), *id)).collect()
    }

    /// A node holds these models from now on, and no others.
    pub fn hold(&self, node: NodeId, profile: &Profile) {
        let mut inside = self.inside();
        inside.forget(node);
        for held in &profile.models {
            inside.holders.entry(held.model).or_default().insert(node, held.context);
        }
        for offer in &profile.offers {
            let entry = inside.offers.entry(offer.model);
            entry.or_insert_with(|| (offer.name.clone(), BTreeSet::new())).1.insert(node);
        }
        inside.measure();
    }

    /// A node is gone.
    pub fn release(&self, node: NodeId) {
        let mut inside = self.inside();
        inside.forget(node);
        inside.measure();
    }

    /// Those of a profile whose tokenizers are to be fetched, by whoever calls: nobody else is told the same until
    /// [`Shelf::came`].
    pub fn missing(&self, profile: &Profile) -> Vec<Held> {
        let mut inside = self.inside();
        let Inside { known, coming, .. } = &mut *inside;
        let room = KNOWN_MAX.saturating_sub(known.len() + coming.len());
        let wanted = |held: &&Held| {
            held.text.is_some() && !known.iter().any(|m| m.id == held.model) && coming.insert(held.model)
        };
        profile.models.iter().filter(wanted).take(room).cloned().collect()
    }

    /// What came of a fetch. A name that is taken gets the beginning of the model's id behind it.
    pub fn came(&self, id: ModelId, model: Option<ServedModel>) {
        let mut inside = self.inside();
        inside.coming.remove(&id);
        if let Some(mut model) = model {
            if inside.known.iter().any(|m| m.name == model.name) {
                model.name = format!("{}@{}", model.name, &id.to_string()[..8]);
            }
            inside.known.push(Arc::new(model));
            inside.measure();
        }
    }
}

impl Inside {
    fn forget(&mut self, node: NodeId) {
        self.holders.retain(|_, nodes| {
            nodes.remove(&node);
            !nodes.is_empty()
        });
        self.offers.retain(|_, (_, nodes)| {
            nodes.remove(&node);
            !nodes.is_empty()
        });
    }

    /// A model's context is the longest on offer.
    fn measure(&mut self) {
        for model in &mut self.known {
            let longest = self.holders.get(&model.id).and_then(|nodes| nodes.values().max());
            if let Some(longest) = longest.filter(|longest| **longest != model.context) {
                *model = Arc::new(ServedModel { context: *longest, ..(**model).clone() });
            }
        }
    }
}
