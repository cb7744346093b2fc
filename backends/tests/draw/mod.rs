//! Random numbers for tests.

/// SplitMix64: the same numbers from the same seed everywhere, and every seed is as good as another, 0 too.
pub struct Draw(u64);

impl Draw {
    /// From this seed.
    pub fn new(seed: u64) -> Draw {
        Draw(seed)
    }

    /// Below `n`, which is at least 1.
    pub fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % u64::from(n)) as u32
    }
}

#[test]
fn no_seed_is_stuck() {
    for seed in [0, 1, u64::MAX] {
        let mut draw = Draw::new(seed);
        let drawn: Vec<u32> = (0..100).map(|_| draw.below(6)).collect();
        assert!((0..6).all(|n| drawn.contains(&n)), "seed {seed}: {drawn:?}");
    }
}
