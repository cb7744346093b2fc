//! Hash tables of indices: from texts to token ids, and from pairs of ids to merges.
//!
//! A vocabulary has hundreds of thousands of entries that are already in one buffer; a `HashMap<String, u32>` would
//! copy each of them. Both tables are keyed at random, so that no file can make them slow.
use crate::gguf::Strings;
use std::hash::{BuildHasher, RandomState};

const EMPTY: u64 = u64::MAX;

/// Slots for `entries` at a load of at most a half, a power of two.
fn slots(entries: usize) -> usize {
    (entries * 2).next_power_of_two().max(16)
}

/// From texts to their positions in a list of texts. The list isn't kept: who asks brings it along.
pub(super) struct TextIndex {
    /// Upper half: hash; lower half: position. Linear probing.
    slots: Vec<u64>,
    keys: RandomState,
}

impl TextIndex {
    /// Of equal texts the last one counts; empty ones aren't found.
    pub(super) fn new(texts: &Strings) -> TextIndex {
        let mut index = TextIndex { slots: vec![EMPTY; slots(texts.len())], keys: RandomState::new() };
        for (id, text) in texts.iter().enumerate() {
            if !text.is_empty() {
                let (slot, hash) = index.find(texts, text);
                index.slots[slot] = u64::from(hash) << 32 | id as u64;
            }
        }
        index
    }

    pub(super) fn get(&self, texts: &Strings, text: &str) -> Option<u32> {
        match self.slots[self.find(texts, text).0] {
            EMPTY => None,
            slot => Some(slot as u32),
        }
    }

    /// The slot where `text` is or belongs, and its hash.
    fn find(&self, texts: &Strings, text: &str) -> (usize, u32) {
        let hash = self.keys.hash_one(text);
        let tag = (hash >> 32) as u32;
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.slots[at];
            let is_it = || (slot >> 32) as u32 == tag && texts.get(slot as u32 as usize) == Some(text);
            if slot == EMPTY || is_it() {
                return (at, tag);
            }
            at = (at + 1) & mask;
        }
    }
}

/// What two adjacent symbols of byte-level BPE become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Merge {
    /// Position in the list of merges: lower ranks go first.
    pub(super) rank: u32,
    /// The symbol that they become.
    pub(super) into: u32,
}

/// From pairs of symbols to their merges.
pub(super) struct MergeIndex {
    slots: Vec<(u64, Merge)>,
    keys: [u64; 2],
}

impl MergeIndex {
    /// Room for `merges` of them.
    pub(super) fn with_capacity(merges: usize) -> MergeIndex {
        let random = RandomState::new();
        let keys = [random.hash_one(0u8), random.hash_one(1u8) | 1];
        MergeIndex { slots: vec![(EMPTY, Merge { rank: 0, into: 0 }); slots(merges)], keys }
    }

    /// Adds a merge, unless the pair has one already. At most as many as there is room for.
    pub(super) fn insert(&mut self, left: u32, right: u32, merge: Merge) {
        let at = self.find(left, right);
        if self.slots[at].0 == EMPTY {
            self.slots[at] = (pair(left, right), merge);
        }
    }

    pub(super) fn get(&self, left: u32, right: u32) -> Option<Merge> {
        let (key, merge) = self.slots[self.find(left, right)];
        (key != EMPTY).then_some(merge)
    }

    fn find(&self, left: u32, right: u32) -> usize {
        let key = pair(left, right);
        let product = u128::from(key ^ self.keys[0]) * u128::from(self.keys[1]);
        let mask = self.slots.len() - 1;
        let mut at = (product as u64 ^ (product >> 64) as u64) as usize & mask;
        while self.slots[at].0 != EMPTY && self.slots[at].0 != key {
            at = (at + 1) & mask;
        }
        at
    }
}

/// Never [`EMPTY`]: symbols are below `u32::MAX`.
fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_found() {
        let texts: Strings = (0..3000).map(|i| format!("t{i}")).chain(["".into(), "t7".into()]).collect();
        let index = TextIndex::new(&texts);
        for i in 0..3000 {
            assert_eq!(index.get(&texts, &format!("t{i}")), Some(if i == 7 { 3001 } else { i }));
        }
        assert_eq!(index.get(&texts, ""), None);
        assert_eq!(index.get(&texts, "t3000"), None);
        assert_eq!(TextIndex::new(&Strings::default()).get(&Strings::default(), "x"), None);
    }

    #[test]
    fn the_first_merge_of_a_pair_counts() {
        let mut index = MergeIndex::with_capacity(1000);
        for rank in 0..1000 {
            index.insert(rank % 500, rank % 7, Merge { rank, into: rank });
        }
        for rank in 0..1000u32 {
            let found = index.get(rank % 500, rank % 7).expect("was added").rank;
            assert!(found <= rank && found % 500 == rank % 500 && found % 7 == rank % 7);
        }
        assert_eq!(index.get(500, 0), None);
    }
}
