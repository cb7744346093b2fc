//! Who holds which block of the KV cache.
use std::collections::HashMap;
use weir_scheduler::BlockKey;

/// No block.
const NONE: u32 = u32::MAX;

/// Every block of a program's KV cache. A block is free (nothing in it), cached (nobody's, but its contents have a name
/// and can be adopted), or in use (by one or several sequences).
///
/// [`BlockPool::allocate`] and [`BlockPool::adopt`] put a block in use, [`BlockPool::release`] undoes either, and
/// [`BlockPool::register`] names a full block's contents. The cached block that was released first is evicted first.
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    named: HashMap<BlockKey, u32>,
    free: Vec<u32>,
    /// Ends of the list of cached blocks.
    oldest: u32,
    newest: u32,
    cached: usize,
}

#[derive(Clone, Debug)]
struct Block {
    users: u32,
    key: Option<BlockKey>,
    /// A draft model has filled it too.
    drafted: bool,
    /// Neighbours in the list of cached blocks.
    older: u32,
    newer: u32,
}

impl BlockPool {
    /// `count` free blocks.
    pub(crate) fn new(count: u32) -> Self {
        let block = Block { users: 0, key: None, drafted: false, older: NONE, newer: NONE };
        BlockPool {
            blocks: vec![block; count as usize],
            named: HashMap::new(),
            free: (0..count).rev().collect(),
            oldest: NONE,
            newest: NONE,
            cached: 0,
        }
    }

    /// All blocks.
    pub(crate) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks with nothing in them.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that nobody uses but somebody may adopt.
    pub(crate) fn cached(&self) -> usize {
        self.cached
    }

    /// Blocks that [`BlockPool::allocate`] can give.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.cached
    }

    /// The block of that name, and whether somebody uses it.
    pub(crate) fn find(&self, key: BlockKey) -> Option<(u32, bool)> {
        self.named.get(&key).map(|&id| (id, self.blocks[id as usize].users > 0))
    }

    /// Names of blocks, those in use first, then those released last; at most so many.
    pub(crate) fn names(&self, most: usize) -> Vec<BlockKey> {
        let block = |id: &u32| self.blocks.get(*id as usize);
        let older = |id: &u32| block(id).map(|block| block.older);
        let cached = std::iter::successors(Some(self.newest), older).map_while(|id| block(&id));
        let used = self.blocks.iter().filter(|block| block.users > 0);
        used.chain(cached).filter_map(|block| block.key).take(most).collect()
    }

    /// A block for new contents: a free one, else the oldest cached one.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.oldest != NONE => {
                let id = self.oldest;
                self.unlink(id);
                if let Some(key) = self.blocks[id as usize].key.take() {
                    self.named.remove(&key);
                }
                id
            }
            None => return None,
        };
        self.blocks[id as usize].users = 1;
        self.blocks[id as usize].drafted = false;
        Some(id)
    }

    /// A draft model has filled a block in use.
    pub(crate) fn note_drafted(&mut self, id: u32) {
        self.blocks[id as usize].drafted = true;
    }

    /// How many of these, from the first on, a draft model has filled.
    pub(crate) fn drafted(&self, ids: &[u32]) -> usize {
        ids.iter().take_while(|id| self.blocks[**id as usize].drafted).count()
    }

    /// One more user of a named block.
    pub(crate) fn adopt(&mut self, id: u32) {
        if self.blocks[id as usize].users == 0 {
            self.unlink(id);
        }
        self.blocks[id as usize].users += 1;
    }

    /// Names the contents of a full block in use. Where another block has that name already, this one stays nameless.
    pub(crate) fn register(&mut self, id: u32, key: BlockKey) {
        let block = &mut self.blocks[id as usize];
        if block.key.is_none() {
            self.named.entry(key).or_insert_with(|| {
                block.key = Some(key);
                id
            });
        }
    }

    /// One user less.
    pub(crate) fn release(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        assert!(block.users > 0, "block {id} is released by nobody");
        block.users -= 1;
        if block.users > 0 {
            return;
        }
        if block.key.is_none() {
            self.free.push(id);
            return;
        }
        (block.older, block.newer) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = id,
            newest => self.blocks[newest as usize].newer = id,
        }
        self.newest = id;
        self.cached += 1;
    }

    fn unlink(&mut self, id: u32) {
        let Block { older, newer, .. } = self.blocks[id as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.cached -= 1;
    }

    /// Panics unless every block is free, cached or in use, and used exactly as often as `used` names it.
    pub(crate) fn check<'a>(&self, used: impl Iterator<Item = &'a u32>) {
        let mut users = vec![0u32; self.blocks.len()];
        used.for_each(|&id| users[id as usize] += 1);
        for (id, (block, &users)) in self.blocks.iter().zip(&users).enumerate() {
            assert_eq!(block.users, users, "users of block {id}");
            if let Some(key) = block.key {
                assert_eq!(self.named.get(&key), Some(&(id as u32)), "name of block {id}");
            }
        }
        let mut idle = vec![0u32; self.blocks.len()];
        self.free.iter().for_each(|&id| idle[id as usize] += 1);
        let mut cached = 0;
        let mut at = self.oldest;
        while at != NONE {
            assert!(self.blocks[at as usize].key.is_some(), "block {at} is cached without a name");
            idle[at as usize] += 1;
            cached += 1;
            at = self.blocks[at as usize].newer;
        }
        assert_eq!(cached, self.cached, "length of the list of cached blocks");
        for (id, (&users, &idle)) in users.iter().zip(&idle).enumerate() {
            assert_eq!(
                u32::from(users == 0),
                idle,
                "block {id} has {users} users and {idle} places among the idle"
            );
        }
        let in_use = users.iter().filter(|&&users| users > 0).count();
        assert_eq!(
            self.free.len() + self.cached + in_use,
            self.blocks.len(),
            "free + cached + in use = total"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> BlockKey {
        BlockKey([n; 16])
    }

    #[test]
    fn the_block_released_first_is_evicted_first() {
        let mut pool = BlockPool::new(3);
        let ids: Vec<u32> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(pool.allocate(), None);
        ids.iter().for_each(|&id| pool.register(id, key(id as u8)));
        [ids[1], ids[2], ids[0]].iter().for_each(|&id| pool.release(id));
        assert_eq!((pool.free(), pool.cached()), (0, 3));
        pool.adopt(ids[2]);
        pool.check([ids[2]].iter());
        assert_eq!(pool.allocate(), Some(ids[1]));
        assert_eq!(pool.find(key(ids[1] as u8)), None);
        assert_eq!(pool.find(key(ids[2] as u8)), Some((ids[2], true)));
        assert_eq!(pool.find(key(ids[0] as u8)), Some((ids[0], false)));
        pool.check([ids[1], ids[2]].iter());
    }

    #[test]
    fn one_name_names_one_block() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.register(a, key(1));
        pool.register(b, key(1));
        pool.release(a);
        pool.release(b);
        assert_eq!((pool.free(), pool.cached()), (1, 1));
        assert_eq!(pool.find(key(1)), Some((a, false)));
        pool.check([].iter());
    }

    #[test]
    fn names_are_of_blocks_in_use_and_then_of_those_released_last() {
        let mut pool = BlockPool::new(4);
        let key = |n: u8| BlockKey([n; 16]);
        let ids: Vec<u32> = (1..4).map(|_| pool.allocate().unwrap()).collect();
        ids.iter().zip(1..).for_each(|(id, n)| pool.register(*id, key(n)));
        assert_eq!(pool.names(9), [key(1), key(2), key(3)]);
        pool.release(ids[0]);
        pool.release(ids[1]);
        assert_eq!(pool.names(9), [key(3), key(2), key(1)]);
        assert_eq!(pool.names(2), [key(3), key(2)]);
        assert_eq!(BlockPool::new(2).names(9), []);
    }
}
