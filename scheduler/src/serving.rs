//! A model on a node: how busy it is there, how fast, and which beginnings of prompts it still has.
use crate::{BLOCK_TOKENS, BlockKey, Held, Priority, Rates, Time};
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// Weight of the newest observation in a moving average.
const NEWEST: f64 = 0.2;
/// Corrections of a node's own figures stay within this factor either way.
const CORRECTION_MAX: f64 = 32.0;
/// KV blocks that are remembered of a model on a node, at most.
const KEPT_MAX: usize = 2048;
/// A request counts for a third as much, in what a model is worth, after so long.
const DEMAND_S: f64 = 600.0;
/// A common request, for the order of nodes: tokens of its prompt.
pub(crate) const COMMON_PROMPT: u64 = 256;

/// What was expected of a request when it was placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prediction {
    pub ttft: Duration,
    pub token_time: Duration,
    /// What observations are compared with is what the node's own figures would have said: tokens that are computed before
    /// the first one comes, and sequences that run, itself included. Comparing with what had been corrected already would
    /// correct twice for all that were under way meanwhile; and a node may have corrected its figures itself.
    to_compute: u64,
    beside: u32,
    round_trip: Duration,
    /// What a token of it costs those that run there already, all together.
    token_burden: Duration,
    /// And what its prompt costs them: they wait meanwhile.
    prompt_burden: Duration,
    /// Tokens of its prompt that are in the cache already.
    pub cached: u64,
}

impl Prediction {
    /// The same as seen from here, where a word takes so long to the node and back.
    pub fn at_distance(self, round_trip: Duration) -> Prediction {
        Prediction { ttft: self.ttft + round_trip, round_trip, ..self }
    }

    /// To the last of so many tokens.
    pub fn total(&self, output: u32) -> Duration {
        self.ttft + self.token_time.saturating_mul(output)
    }

    /// What those that run there already lose by it, all together. They are half done on average.
    pub fn burden(&self, output: u32) -> Duration {
        self.prompt_burden + self.token_burden.saturating_mul(output / 2)
    }
}

/// A model on a node.
#[derive(Debug)]
pub(crate) struct Serving {
    pub held: Held,
    pub alive: bool,
    /// The node has been told to let go of it.
    pub leaving: bool,
    /// When something last ran there, or when it came.
    pub used: Time,
    /// Requests, each counting for less as it recedes; as of [`Serving::used`].
    demand: f64,
    pub kv_blocks_free: u32,
    /// Our requests there, by priority.
    pub running: [u32; 3],
    /// Requests there of other schedulers, by its last heartbeat.
    pub others: u32,
    /// Prompt tokens of our requests there that have no token yet.
    pub queued_tokens: u64,
    /// Observed over stated time, of prefill and of decode.
    prefill_ratio: f64,
    pub decode_ratio: f64,
    pub steps: u64,
    /// That came from there.
    pub tokens: u64,
    pub progress: Time,
    pub busy_until: Time,
    pub kept: Kept,
}

impl Serving {
    pub fn new(now: Time, held: Held) -> Serving {
        Serving {
            alive: true,
            leaving: false,
            used: now,
            demand: 1.0,
            kv_blocks_free: held.kv_blocks,
            running: [0; 3],
            others: 0,
            queued_tokens: 0,
            prefill_ratio: 1.0,
            decode_ratio: 1.0,
            steps: 0,
            tokens: 0,
            progress: now,
            busy_until: now,
            kept: Kept::new(held.kv_blocks),
            held,
        }
    }

    /// The same, as the node describes it now.
    pub fn again(self, held: Held) -> Serving {
        Serving { held, alive: true, ..self }
    }

    /// So many requests are given to it, or one has ended.
    pub fn note_use(&mut self, now: Time, requests: f64) {
        (self.demand, self.used) = (self.demand(now) + requests, now);
    }

    /// How much it is asked for.
    pub fn demand(&self, now: Time) -> f64 {
        self.demand * (-now.since(self.used).as_secs_f64() / DEMAND_S).exp()
    }

    /// Prompt tokens a second, as observed.
    pub fn prefill_rate(&self) -> f64 {
        f64::from(self.held.rates.prefill_tokens_per_s) / self.prefill_ratio
    }

    /// From one token to the next with what runs now, as observed.
    pub fn token_time(&self) -> Duration {
        self.held.rates.token_time(self.busy(), self.held.slots).mul_f64(self.decode_ratio)
    }

    /// Our requests there.
    pub fn total(&self) -> u32 {
        self.running.iter().sum()
    }

    /// All requests there, as far as is known.
    pub fn busy(&self) -> u32 {
        self.total().saturating_add(self.others)
    }

    /// A slot is free, or would be if those of lesser priority stepped aside; what waits there is bounded.
    pub fn has_room(&self, now: Time, priority: Priority) -> bool {
        // of what priority others' are isn't known
        let ahead = self.running[priority as usize..].iter().sum::<u32>().saturating_add(self.others);
        now >= self.busy_until && ahead < self.held.slots && self.busy() < 2 * self.held.slots
    }

    /// DESIGN: `ttft = (queued + prompt - cached) / prefill rate`, corrected by what was observed.
    pub fn predict(&self, tokens: u64, keys: &[BlockKey]) -> Prediction {
        let cached = (self.kept.leading(keys) * BLOCK_TOKENS) as u64;
        let cached = cached.min(tokens.saturating_sub(1));
        let rates = &self.held.rates;
        let rate = f64::from(rates.prefill_tokens_per_s.max(1e-3));
        let to_compute = self.queued_tokens + tokens - cached;
        let prefill_s = to_compute as f64 / rate;
        let stated_token_time = rates.token_time(self.busy().saturating_add(1), self.held.slots);
        let token_time = stated_token_time.mul_f64(self.decode_ratio);
        let seconds = |s: f64| Duration::from_secs_f64(s.min(1e6));
        let others = self.busy();
        let slower = stated_token_time.saturating_sub(rates.token_time(others.max(1), self.held.slots));
        let own_prefill_s = (tokens - cached) as f64 / rate * self.prefill_ratio;
        Prediction {
            ttft: seconds(prefill_s * self.prefill_ratio) + token_time,
            token_time,
            to_compute,
            beside: others + 1,
            round_trip: Duration::ZERO,
            token_burden: slower.mul_f64(self.decode_ratio * f64::from(others)),
            prompt_burden: seconds(own_prefill_s * f64::from(others)),
            cached,
        }
    }

    /// When it would be done with a common request, from now on; microseconds.
    pub fn common_cost_us(&self, output: u32) -> u64 {
        let prediction = self.predict(COMMON_PROMPT, &[]);
        let cost = prediction.total(output) + prediction.burden(output);
        u64::try_from(cost.as_micros()).unwrap_or(u64::MAX)
    }

    /// A prompt was done after `observed`.
    pub fn observe_prefill(&mut self, predicted: &Prediction, observed: Duration) {
        let Rates { prefill_tokens_per_s, .. } = self.held.rates;
        let prefill_s = predicted.to_compute as f64 / f64::from(prefill_tokens_per_s.max(1e-3));
        let others = self.held.rates.token_time(predicted.beside, self.held.slots) + predicted.round_trip;
        correct(&mut self.prefill_ratio, Duration::from_secs_f64(prefill_s.min(1e6)) + others, observed);
    }

    /// Tokens came `observed` apart.
    pub fn observe_pace(&mut self, predicted: &Prediction, observed: Duration) {
        let stated = self.held.rates.token_time(predicted.beside, self.held.slots);
        correct(&mut self.decode_ratio, stated, observed);
    }

    /// The node has measured anew.
    pub fn restate(&mut self, rates: Rates) {
        let old = std::mem::replace(&mut self.held.rates, rates);
        let slower = rates.token_time_alone.as_secs_f64() / old.token_time_alone.as_secs_f64();
        take_back(&mut self.decode_ratio, slower);
        take_back(&mut self.prefill_ratio, f64::from(old.prefill_tokens_per_s / rates.prefill_tokens_per_s));
    }
}

/// As far as a node has corrected its own figures, which are so many times as slow now, ours needn't any more.
fn take_back(ratio: &mut f64, slower: f64) {
    if slower.is_finite() && slower > 0.0 && (slower > 1.0) == (*ratio > 1.0) {
        let left = *ratio / slower;
        *ratio = if *ratio > 1.0 { left.max(1.0) } else { left.min(1.0) };
    }
}

fn correct(ratio: &mut f64, stated: Duration, observed: Duration) {
    let seen = observed.as_secs_f64() / stated.as_secs_f64().max(1e-9);
    *ratio = (*ratio + NEWEST * (seen - *ratio)).clamp(1.0 / CORRECTION_MAX, CORRECTION_MAX);
}

/// Which KV blocks a node has by our reckoning: the ones used last, as many as fit.
#[derive(Debug)]
pub(crate) struct Kept {
    /// By key, when it was used last.
    stamps: HashMap<BlockKey, u64>,
    /// Uses, oldest first; those that are not the last of their key count for nothing.
    uses: VecDeque<(BlockKey, u64)>,
    next: u64,
    most: usize,
}

impl Kept {
    fn new(kv_blocks: u32) -> Kept {
        let most = (kv_blocks as usize).min(KEPT_MAX);
        Kept { stamps: HashMap::new(), uses: VecDeque::new(), next: 0, most }
    }

    /// How many of these, from the first, are there. Who has a block has had all before it.
    pub fn leading(&self, keys: &[BlockKey]) -> usize {
        keys.partition_point(|key| self.stamps.contains_key(key))
    }

    /// They were used. Returns those that are new, and those that had to go.
    pub fn used(&mut self, keys: &[BlockKey]) -> (Vec<BlockKey>, Vec<BlockKey>) {
        let (mut new, mut gone) = (Vec::new(), Vec::new());
        // The last block first, so that the beginnings of prompts outlive their ends.
        for key in keys[..keys.len().min(self.most)].iter().rev() {
            self.next += 1;
            if self.stamps.insert(*key, self.next).is_none() {
                new.push(*key);
            }
            self.uses.push_back((*key, self.next));
        }
        while self.stamps.len() > self.most || self.uses.len() > 4 * self.most.max(1) {
            let Some((key, stamp)) = self.uses.pop_front() else { break };
            match self.stamps.get(&key) {
                Some(last) if *last == stamp && self.stamps.len() > self.most => {
                    self.stamps.remove(&key);
                    gone.push(key);
                }
                // The last use of what stays.
                Some(last) if *last == stamp => {
                    self.next += 1;
                    self.stamps.insert(key, self.next);
                    self.uses.push_back((key, self.next));
                }
                _ => {}
            }
        }
        (new, gone)
    }

    /// It turned out that they are not there. Returns those that we thought were.
    pub fn forget(&mut self, keys: &[BlockKey]) -> Vec<BlockKey> {
        keys.iter().filter(|key| self.stamps.remove(key).is_some()).copied().collect()
    }

    /// All of them.
    pub fn keys(&self) -> impl Iterator<Item = &BlockKey> {
        self.stamps.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> BlockKey {
        BlockKey([n; 16])
    }

    #[test]
    fn the_oldest_blocks_go_first_and_the_record_is_bounded() {
        let mut kept = Kept::new(4);
        assert_eq!(kept.used(&[key(1), key(2)]).0.len(), 2);
        kept.used(&[key(3), key(4)]);
        assert_eq!(kept.used(&[key(1)]), (vec![], vec![]));
        let (new, gone) = kept.used(&[key(5)]);
        assert_eq!((new, gone), (vec![key(5)], vec![key(2)]), "2 is older than 1, which was used again");
        assert_eq!(kept.leading(&[key(1), key(2)]), 1);
        for _ in 0..1000 {
            kept.used(&[key(1), key(5)]);
        }
        assert!(kept.uses.len() <= 16 && kept.stamps.len() == 4);
        assert_eq!(
            kept.used(&(0..100).map(key).collect::<Vec<_>>()).0.len(),
            2,
            "no more than fit: 0 and 2 are new"
        );
        assert_eq!(kept.forget(&[key(0), key(99)]), [key(0)]);
    }
}
