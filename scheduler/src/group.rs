//! The nodes that hold one model, indexed so that the cost of a decision hardly grows with their number.
use crate::{BlockKey, NodeId, Priority, Time};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Of a node in a group: where it stands in the order of those that have room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Its numerics, by [`Group::class`].
    pub class: u16,
    /// When it would be done with a common request, from now on; microseconds.
    pub cost_us: u64,
    /// Whether it takes one, by priority.
    pub open: [bool; 3],
    /// It would take one if it had room.
    pub fit: bool,
    /// It is ours.
    pub own: bool,
}

/// The holders of a model.
#[derive(Debug, Default)]
pub(crate) struct Group {
    /// In no order, to be drawn from.
    holders: Vec<NodeId>,
    /// Where each is in `holders`, and how it stands.
    standings: BTreeMap<NodeId, (usize, Standing)>,
    /// Numerics ids that have been seen.
    classes: Vec<String>,
    /// Those with room, by priority: by class, then the soonest done.
    open: [BTreeSet<(u16, u64, NodeId)>; 3],
    /// Those without, likewise.
    full: [BTreeSet<(u16, u64, NodeId)>; 3],
    /// Those of our own, and of those the ones with room, by priority.
    own: usize,
    own_open: [usize; 3],
    /// Those that have no room until then.
    paused: BTreeSet<(Time, NodeId)>,
    /// Who has which beginnings of prompts in its cache, as far as we know.
    pub prefixes: HashMap<BlockKey, Vec<NodeId>>,
}

impl Group {
    /// The number of a numerics id here.
    pub fn class(&mut self, numerics: &str) -> u16 {
        let at = self.classes.iter().position(|c| c == numerics).unwrap_or_else(|| {
            self.classes.push(numerics.to_owned());
            self.classes.len() - 1
        });
        u16::try_from(at).unwrap_or(u16::MAX)
    }

    /// A node holds the model, or stands otherwise than before.
    pub fn set(&mut self, node: NodeId, standing: Standing) {
        let at = match self.standings.get(&node) {
            Some((_, old)) if *old == standing => return,
            Some((at, _)) => *at,
            None => {
                self.holders.push(node);
                self.holders.len() - 1
            }
        };
        self.close(node);
        self.own += usize::from(standing.own);
        for priority in 0..3 {
            self.own_open[priority] += usize::from(standing.own && standing.open[priority]);
            let entry = (standing.class, standing.cost_us, node);
            if standing.open[priority] {
                self.open[priority].insert(entry);
            } else if standing.fit {
                self.full[priority].insert(entry);
            }
        }
        self.standings.insert(node, (at, standing));
    }

    fn close(&mut self, node: NodeId) {
        if let Some((_, old)) = self.standings.get(&node) {
            self.own -= usize::from(old.own);
            for priority in 0..3 {
                self.own_open[priority] -= usize::from(old.own && old.open[priority]);
                self.open[priority].remove(&(old.class, old.cost_us, node));
                self.full[priority].remove(&(old.class, old.cost_us, node));
            }
        }
    }

    /// A node doesn't hold the model any more.
    pub fn remove(&mut self, node: NodeId) {
        self.close(node);
        if let Some((at, _)) = self.standings.remove(&node) {
            self.holders.swap_remove(at);
            if let Some(moved) = self.holders.get(at)
                && let Some((place, _)) = self.standings.get_mut(moved)
            {
                *place = at;
            }
        }
    }

    /// How many of our own hold it, and how many of those have room.
    pub fn own(&self, priority: Priority) -> (usize, usize) {
        (self.own, self.own_open[priority as usize])
    }

    /// All holders, if there aren't more; else so many that stand side by side, from where a draw falls on.
    pub fn some(&self, draw: u64, most: usize) -> impl Iterator<Item = NodeId> + '_ {
        let start = usize::try_from(draw % self.holders.len().max(1) as u64).unwrap_or(0);
        self.holders[start..].iter().chain(&self.holders[..start]).take(most).copied()
    }

    /// How many hold it.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Nobody holds it.
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }

    /// A node will stand otherwise then, by time alone.
    pub fn pause(&mut self, node: NodeId, until: Time) {
        self.paused.insert((until, node));
    }

    /// Nodes whose pause is over.
    pub fn resumed(&mut self, now: Time) -> Vec<NodeId> {
        let mut over = Vec::new();
        while let Some((at, node)) = self.paused.first().copied().filter(|(at, _)| *at <= now) {
            self.paused.remove(&(at, node));
            over.push(node);
        }
        over
    }

    /// All holders, in the order of their numbers.
    pub fn holders(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.standings.keys().copied()
    }

    /// The soonest done of each class.
    pub fn best(&self, priority: Priority, of_each: usize) -> impl Iterator<Item = NodeId> + '_ {
        self.first(&self.open[priority as usize], of_each)
    }

    /// The soonest done of each class, among those without room.
    pub fn best_full(&self, priority: Priority, of_each: usize) -> impl Iterator<Item = NodeId> + '_ {
        self.first(&self.full[priority as usize], of_each)
    }

    fn first<'a>(
        &'a self,
        set: &'a BTreeSet<(u16, u64, NodeId)>,
        of_each: usize,
    ) -> impl Iterator<Item = NodeId> + 'a {
        let classes = u16::try_from(self.classes.len()).unwrap_or(u16::MAX);
        (0..classes).flat_map(move |class| {
            set.range((class, 0, NodeId(0))..=(class, u64::MAX, NodeId(u64::MAX))).take(of_each).map(|e| e.2)
        })
    }

    /// All with room.
    pub fn open(&self, priority: Priority) -> impl Iterator<Item = NodeId> + '_ {
        self.open[priority as usize].iter().map(|entry| entry.2)
    }

    /// The holder that a draw falls on.
    pub fn drawn(&self, draw: u64) -> Option<NodeId> {
        self.holders.get(usize::try_from(draw % self.holders.len().max(1) as u64).ok()?).copied()
    }

    /// Some of those who have the longest known beginning of these keys in their caches.
    pub fn with_prefix(&self, keys: &[BlockKey], draw: u64, most: usize) -> Vec<NodeId> {
        // Who has a block has had all before it.
        let known = keys.partition_point(|key| self.prefixes.contains_key(key));
        let Some(nodes) = known.checked_sub(1).and_then(|last| self.prefixes.get(&keys[last])) else {
            return Vec::new();
        };
        let start = usize::try_from(draw % nodes.len().max(1) as u64).unwrap_or(0);
        nodes.iter().cycle().skip(start).take(most.min(nodes.len())).copied().collect()
    }
}
