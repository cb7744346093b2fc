//! What a scheduler is told of the KV caches here: their blocks when it lets this node in, and what changes from then on.
use crate::clock::timeout;
use crate::tasks::Tasks;
use crate::worker::Resident;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use weir_scheduler::{BlockKey, CacheStatus, Held, ModelId, PREFIXES_MAX};

/// How long an engine may take to name the blocks in its cache; without them the scheduler learns them by and by.
const NAMING: Duration = Duration::from_millis(500);
/// Models whose cached blocks are named, at most: neither a profile nor a heartbeat is to be long.
const NAMED_MAX: usize = 4;
/// Changes in a heartbeat, of one model: what is left is told by the next.
const CHANGES_MAX: usize = PREFIXES_MAX / NAMED_MAX;

/// What one scheduler knows.
pub(crate) struct Caches {
    told: HashMap<ModelId, Told>,
    /// Engines that have been asked.
    asked: Tasks<(ModelId, Option<Vec<BlockKey>>)>,
    news: Vec<CacheStatus>,
}

#[derive(Default)]
struct Told {
    blocks: HashSet<BlockKey>,
    /// Of the engine, when it was asked last; none if not all that it said then has been told.
    steps: Option<u64>,
    asked: bool,
}

impl Default for Caches {
    /// Nothing.
    fn default() -> Caches {
        Caches { told: HashMap::new(), asked: Tasks::new(), news: Vec::new() }
    }
}

impl Caches {
    /// Names the blocks of a model that the scheduler is told of for the first time.
    pub async fn introduce(&mut self, held: &mut Held, resident: &Resident) {
        if self.told.len() >= NAMED_MAX {
            return;
        }
        let steps = resident.engine().status().steps;
        held.prefixes =
            timeout(NAMING, resident.engine().cached_blocks(PREFIXES_MAX)).await.unwrap_or_default();
        let blocks = held.prefixes.iter().copied().collect();
        self.told.insert(held.model, Told { blocks, steps: Some(steps), asked: false });
    }

    /// Asks the engines that have computed something since they were last asked.
    pub fn look(&mut self, residents: &[Resident]) {
        self.told.retain(|model, _| residents.iter().any(|resident| resident.held.model == *model));
        for resident in residents {
            let model = resident.held.model;
            if !self.told.contains_key(&model) && self.told.len() >= NAMED_MAX {
                continue;
            }
            let told = self.told.entry(model).or_default();
            let steps = resident.engine().status().steps;
            if told.asked || told.steps == Some(steps) {
                continue;
            }
            (told.asked, told.steps) = (true, Some(steps));
            let engine = resident.engine().clone();
            self.asked.spawn(async move {
                (model, timeout(NAMING, engine.cached_blocks(PREFIXES_MAX)).await.ok())
            });
        }
    }

    /// Waits for an engine's answer; forever, if none was asked. Dropping the future loses nothing.
    pub async fn heard(&mut self) {
        let (model, blocks) = self.asked.next().await;
        self.note(model, blocks);
    }

    fn note(&mut self, model: ModelId, blocks: Option<Vec<BlockKey>>) {
        let Some(told) = self.told.get_mut(&model) else { return };
        told.asked = false;
        let Some(blocks) = blocks else {
            told.steps = None;
            return;
        };
        let there: HashSet<BlockKey> = blocks.iter().copied().collect();
        let mut gone: Vec<BlockKey> = told.blocks.difference(&there).copied().collect();
        let mut new: Vec<BlockKey> = blocks.into_iter().filter(|key| !told.blocks.contains(key)).collect();
        if gone.len() + new.len() > CHANGES_MAX {
            told.steps = None;
            gone.truncate(CHANGES_MAX / 2);
            new.truncate(CHANGES_MAX - gone.len());
        }
        gone.iter().for_each(|key| _ = told.blocks.remove(key));
        told.blocks.extend(&new);
        if !gone.is_empty() || !new.is_empty() {
            self.news.push(CacheStatus { model, new, gone });
        }
    }

    /// What is to be told now.
    pub fn news(&mut self) -> Vec<CacheStatus> {
        std::mem::take(&mut self.news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_once_and_piece_by_piece() {
        let (mut caches, model) = (Caches::default(), ModelId([1; 32]));
        let key = |n: u16| BlockKey([n.to_le_bytes(); 8].concat().try_into().unwrap());
        caches.told.insert(model, Told::default());
        let mut known: HashSet<BlockKey> = HashSet::new();
        let mut tell = |caches: &mut Caches, names: &[u16]| {
            caches.note(model, Some(names.iter().map(|n| key(*n)).collect()));
            let news = caches.news();
            for CacheStatus { new, gone, .. } in &news {
                assert!(new.len() + gone.len() <= CHANGES_MAX);
                assert!(gone.iter().all(|key| known.remove(key)), "it was told that they are there");
                assert!(new.iter().all(|key| known.insert(*key)), "it was not told of them before");
            }
            (news.len(), known.len())
        };
        assert_eq!(tell(&mut caches, &[1, 2, 3]), (1, 3));
        assert_eq!(tell(&mut caches, &[1, 2, 3]), (0, 3));
        assert_eq!(tell(&mut caches, &[2, 4]), (1, 2));
        let many: Vec<u16> = (100..500).collect();
        let mut beats = 0;
        while tell(&mut caches, &many) != (0, 400) {
            beats += 1;
            assert!(beats < 10, "it comes to an end");
        }
    }
}
