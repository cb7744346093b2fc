//! How much of a budget one of several schedulers leases ahead.

/// A window of an account, as one replica sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    /// What all together may take; without a limit where none is known.
    pub limit: Option<u64>,
    /// Leased by others, the dead among them.
    pub others: u64,
    /// Spent by this replica: a fact, even if it should be past the limit.
    pub spent: u64,
    /// What it wants to have reserved beyond that.
    pub held: u64,
    /// Schedulers that share it, this one included.
    pub replicas: u64,
}

impl View {
    /// What this replica should have leased in all: what it has spent and wants to hold, and ahead of that a share of what is
    /// left then. Of two replicas each takes a third of it, so that a third stays for whoever is asked next, and a replica
    /// that can't reach etcd has something to go on with. The nearer the limit, the smaller the share: at last nothing is
    /// leased ahead, and whoever asks gets the rest.
    pub fn share(&self) -> u64 {
        let wanted = self.spent.saturating_add(self.held);
        // Without a limit nobody has to be told how much may be taken.
        let Some(limit) = self.limit else { return wanted };
        let room = limit.saturating_sub(self.others);
        if wanted >= room {
            return room.max(self.spent);
        }
        wanted + (room - wanted) / (self.replicas.max(1) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) % n.max(1)
        }
    }

    fn fresh_seed() -> u64 {
        std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64
    }

    #[test]
    fn a_share_is_within_the_limit_and_no_less_than_what_is_wanted_and_there() {
        let seed = fresh_seed();
        println!("seed {seed}");
        let mut random = Random(seed);
        for _ in 0..20_000 {
            let most = 1 << random.below(64);
            let mut any = || random.below(most);
            let view = View {
                limit: Some(any()),
                others: any(),
                spent: any(),
                held: any(),
                replicas: random.below(6),
            };
            let (share, limit) = (view.share(), view.limit.unwrap());
            let room = limit.saturating_sub(view.others);
            assert!(share <= room.max(view.spent), "{view:?}: {share} is past the limit");
            assert!(share >= view.spent, "{view:?}: what is spent is spent");
            assert!(
                share >= room.min(view.spent.saturating_add(view.held)),
                "{view:?}: {share} is too little"
            );
            assert_eq!(View { limit: None, ..view }.share(), view.spent.saturating_add(view.held));
        }
    }

    /// Replicas that lease, reserve and settle in any order, of which some fall silent with all that they have.
    fn check(seed: u64, replicas: usize) {
        let mut random = Random(seed);
        let limit = 1000 + random.below(1_000_000);
        let most = 1 + limit / 40;
        let mut leased = vec![0_u64; replicas];
        let mut spent = vec![0_u64; replicas];
        let mut dead = vec![false; replicas];
        let mut refused_in_a_row = 0;
        while refused_in_a_row < 40 {
            let at = random.below(replicas as u64) as usize;
            if dead[at] {
                refused_in_a_row += 1;
                continue;
            }
            // Not all of them, and none near the end, where what it leased would be left over.
            if random.below(400) == 0 && dead.iter().filter(|d| !**d).count() > 1 {
                dead[at] = true;
                continue;
            }
            let others = leased.iter().sum::<u64>() - leased[at];
            let need = 1 + random.below(most);
            let view =
                View { limit: Some(limit), others, spent: spent[at], held: need, replicas: replicas as u64 };
            leased[at] = view.share();
            let all: u64 = leased.iter().sum();
            assert!(all <= limit, "seed {seed}: {all} of {limit} leased");
            if spent[at] + need <= leased[at] {
                spent[at] += random.below(need + 1);
                refused_in_a_row = 0;
            } else {
                refused_in_a_row += 1;
            }
        }
        let lost: u64 = (0..replicas).filter(|at| dead[*at]).map(|at| leased[at] - spent[at]).sum();
        let left = limit - spent.iter().sum::<u64>() - lost;
        // Each of the others may hold back as much as a request may want.
        assert!(
            left <= most * (replicas as u64 + 1),
            "seed {seed}: {left} of {limit} left over, {most} a request"
        );
    }

    #[test]
    fn together_they_use_a_budget_up_and_never_pass_it() {
        let seed = fresh_seed();
        println!("seed {seed}");
        for n in 0..300 {
            check(seed.wrapping_add(n), 1 + (n % 4) as usize);
        }
    }
}
