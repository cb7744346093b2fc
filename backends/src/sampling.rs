//! The sampling rule: from logits to the next token's id. Every device follows it, so that the same seed gives the
//! same tokens wherever the logits are the same.
//!
//! **Logits.** NaN counts as -inf, and anything above 1e30 as 1e30. Where no token is left with a logit above -inf, the
//! lowest id that the mask allows is chosen (0 where it allows none).
//!
//! **Adjusted**, in this order; ids outside the vocabulary are passed over:
//! 1. `logit_bias`: added, entry by entry.
//! 2. `repetition_penalty` r, for each token of [`SampleSpec::counts`]: `l / r` if `l > 0`, else `l * r`.
//! 3. `frequency_penalty` and `presence_penalty`, for each of them with `in_output > 0`:
//!    `l - frequency * in_output - presence`.
//! 4. `mask`: what it does not allow becomes -inf.
//!
//! **Log-probabilities**, where asked for, are the log-softmax of the adjusted logits: neither temperature nor truncation
//! is in them. Candidates come likeliest first, equal ones by id; impossible ones are left out.
//!
//! **Greedy** if `temperature < 1e-5`: the largest adjusted logit, ties to the lowest id.
//!
//! **Else** `scaled = (l - max) * (1 / temperature)` in f32, then truncation, always in this order:
//! 1. `top_k`: the first k in the order (larger `l`, then lower id); 0 is all.
//! 2. `top_p`: of these, the shortest beginning in the same order whose share of their probability mass
//!    (`exp(scaled)`, summed in f64 here) is at least p; 1 is all.
//! 3. `min_p`: of these, the ones with `scaled >= ln(min_p)`, all ties in; 0 is all.
//!
//! Then **Gumbel-max**: the id with the largest f32 sum `scaled + g(seed, position, id)`, ties to the lowest id.
//! `g = -ln(-ln u)`, `u = ((word >> 8) + 0.5) * 2^-24`, where `word` is word `id % 4` of Philox4x32-10 with key
//! `(seed, seed >> 32)` and counter `(id / 4, position, 0, 0)`. `u` needs 25 bits: in f32, take `1 - u` where u > 1/2 and
//! the series of `ln(1 - v)`. g lies in -2.86 ..= 17.33, so a token more than `17.33 - g(best)` behind the best can't
//! win, and its g is never computed.
use crate::philox::{philox4x32, philox4x32_run};
use crate::program::{SampleSpec, Sampled};

/// Below this temperature the choice is greedy.
pub const GREEDY_BELOW: f32 = 1e-5;
/// Logits are held at or below this, so that no difference of two overflows.
const LOGIT_MAX: f32 = 1e30;
/// The largest g: `-ln(-ln(1 - 2^-25))`, rounded up.
const GUMBEL_MAX: f32 = 17.328_69;
/// Values looked at together, so that they vectorise.
const LANES: usize = 32;
/// Ids whose random words are drawn together.
const RUN: usize = 64;

/// Chooses the next token. `logits` is `[vocab]`; afterwards it holds the adjusted logits.
pub fn sample(logits: &mut [f32], spec: &SampleSpec) -> Sampled {
    adjust(logits, spec);
    let max = finite_max(logits);
    let sampling = &*spec.sampling;
    let id = if max == f32::NEG_INFINITY {
        first_allowed(logits.len(), spec.mask.as_deref())
    } else if sampling.temperature < GREEDY_BELOW {
        position_of(logits, max)
    } else {
        let draw = Draw {
            max,
            inverse: 1.0 / sampling.temperature,
            floor: if sampling.min_p > 0.0 { sampling.min_p.ln() } else { f32::NEG_INFINITY },
            key: [spec.sampling.seed as u32, (spec.sampling.seed >> 32) as u32],
            position: spec.position,
        };
        draw.choose(logits, sampling.top_k as usize, sampling.top_p)
    };
    let logprobs = sampling.logprobs.map(|top| logprobs(logits, max, id, usize::from(top)));
    Sampled { id, logprobs }
}

/// Bias, penalties and mask.
fn adjust(logits: &mut [f32], spec: &SampleSpec) {
    let s = &*spec.sampling;
    for &(id, bias) in &s.logit_bias {
        if let Some(l) = logits.get_mut(id as usize) {
            *l = clean(*l) + bias;
        }
    }
    for count in &spec.counts {
        let Some(l) = logits.get_mut(count.id as usize) else { continue };
        if s.repetition_penalty != 1.0 {
            *l = if *l > 0.0 { *l / s.repetition_penalty } else { *l * s.repetition_penalty };
        }
        if count.in_output > 0 {
            *l = clean(*l) - s.frequency_penalty * count.in_output as f32 - s.presence_penalty;
        }
    }
    if let Some(mask) = &spec.mask {
        for (at, chunk) in logits.chunks_mut(32).enumerate() {
            let word = mask.get(at).copied().unwrap_or(0);
            if word != u32::MAX {
                for (bit, l) in chunk.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *l = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// The largest logit; NaN counts as -inf, and what exceeds [`LOGIT_MAX`] is cut down to it first.
fn finite_max(logits: &mut [f32]) -> f32 {
    let max = max_of(logits);
    if max <= LOGIT_MAX {
        return max;
    }
    logits.iter_mut().for_each(|l| *l = clean(*l));
    LOGIT_MAX
}

fn clean(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(LOGIT_MAX) }
}

#[inline]
fn max_of(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder().iter();
    for chunk in chunks {
        for (lane, &l) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, l);
        }
    }
    rest.fold(largest(lanes), |a, &b| larger(a, b))
}

/// `b` if it is larger; a NaN in `b` is passed over.
#[inline]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// The largest lane, halving, so that it vectorises.
#[inline]
fn largest<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = larger(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

fn position_of(logits: &[f32], value: f32) -> u32 {
    logits.iter().position(|&l| l == value).unwrap_or(0) as u32
}

fn first_allowed(vocab: usize, mask: Option<&[u32]>) -> u32 {
    let Some(mask) = mask else { return 0 };
    let first = mask.iter().enumerate().find(|(_, word)| **word != 0);
    first
        .map(|(at, word)| at as u32 * 32 + word.trailing_zeros())
        .filter(|&id| (id as usize) < vocab)
        .unwrap_or(0)
}

/// A token and its adjusted logit, as a number whose order is the rule's: larger logit first, then lower id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry(u64);

impl Entry {
    #[inline]
    fn new(logit: f32, id: u32) -> Self {
        // Adding zero turns -0.0 into 0.0, which must tie with it.
        let bits = (logit + 0.0).to_bits();
        let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
        Entry(u64::from(!ascending) << 32 | u64::from(id))
    }

    #[inline]
    fn logit(self) -> f32 {
        let ascending = !(self.0 >> 32) as u32;
        f32::from_bits(if ascending >> 31 == 1 { ascending & !(1 << 31) } else { !ascending })
    }

    #[inline]
    fn id(self) -> u32 {
        self.0 as u32
    }
}

/// The first `k` entries, in no order; impossible tokens are left out.
fn top(logits: &[f32], k: usize) -> Vec<Entry> {
    let room = (2 * k).max(64);
    let mut kept: Vec<Entry> = Vec::with_capacity(room.min(logits.len()));
    let mut threshold = f32::NEG_INFINITY;
    for_each_above(
        logits,
        |l, threshold| l > *threshold,
        &mut threshold,
        |entry, threshold| {
            kept.push(entry);
            if kept.len() == room {
                // Later ids lose ties, so from here on only larger logits matter.
                kept.select_nth_unstable(k);
                kept.truncate(k);
                *threshold = kept.iter().max().map_or(f32::NEG_INFINITY, |last| last.logit());
            }
        },
    );
    if kept.len() > k {
        kept.select_nth_unstable(k);
        kept.truncate(k);
    }
    kept
}

/// Calls `take` for every logit for which `wanted` holds, by ascending id. `state` is what both look at.
#[inline]
fn for_each_above<S>(
    logits: &[f32],
    wanted: impl Fn(f32, &S) -> bool,
    state: &mut S,
    mut take: impl FnMut(Entry, &mut S),
) {
    for (at, chunk) in logits.chunks(LANES).enumerate() {
        if chunk.iter().fold(false, |any, &l| any | wanted(l, state)) {
            for (lane, &logit) in chunk.iter().enumerate() {
                if wanted(logit, state) {
                    take(Entry::new(logit, (at * LANES + lane) as u32), state);
                }
            }
        }
    }
}

/// One random choice.
struct Draw {
    /// Largest adjusted logit, finite.
    max: f32,
    /// 1 / temperature.
    inverse: f32,
    /// Smallest scaled logit that `min_p` allows.
    floor: f32,
    key: [u32; 2],
    position: u32,
}

impl Draw {
    #[inline]
    fn scaled(&self, logit: f32) -> f32 {
        (logit - self.max) * self.inverse
    }

    fn choose(&self, logits: &[f32], top_k: usize, top_p: f32) -> u32 {
        let top_k = if top_k == 0 { logits.len() } else { top_k };
        if top_k < logits.len() {
            let mut kept = top(logits, top_k);
            if top_p < 1.0 {
                let mass = kept.iter().map(|e| f64::from(exp(self.scaled(e.logit())))).sum::<f64>();
                self.truncate_mass(&mut kept, f64::from(top_p) * mass);
            }
            return self.race(&kept);
        }
        if top_p < 1.0 {
            return self.race(&self.nucleus(logits, top_p));
        }
        self.race_all(logits)
    }

    /// The tokens that `top_p` leaves of the whole vocabulary.
    fn nucleus(&self, logits: &[f32], top_p: f32) -> Vec<Entry> {
        let goal = f64::from(top_p) * self.mass(logits);
        // Everything above a threshold is likelier than everything below, so if it holds enough mass, the rest is out.
        for depth in [6.0f32, 12.0, 24.0, 100.0] {
            let mut kept = Vec::new();
            let mut mass = 0.0f64;
            for_each_above(
                logits,
                |l, _| self.scaled(l) >= -depth,
                &mut mass,
                |entry, mass| {
                    *mass += f64::from(exp(self.scaled(entry.logit())));
                    kept.push(entry);
                },
            );
            if mass >= goal || depth == 100.0 {
                self.truncate_mass(&mut kept, goal);
                return kept;
            }
        }
        Vec::new()
    }

    /// Sum of `exp(scaled)`, in a fixed order.
    fn mass(&self, logits: &[f32]) -> f64 {
        let mut total = 0.0f64;
        for block in logits.chunks(64 * LANES) {
            let mut lanes = [0.0f32; LANES];
            let chunks = block.chunks_exact(LANES);
            let rest: f32 = chunks.remainder().iter().map(|&l| exp(self.scaled(l))).sum();
            for chunk in chunks {
                for (lane, &l) in lanes.iter_mut().zip(chunk) {
                    *lane += exp(self.scaled(l));
                }
            }
            total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>() + f64::from(rest);
        }
        total
    }

    /// Keeps the shortest beginning with at least `goal` of mass: halves the range that holds the border.
    fn truncate_mass(&self, kept: &mut Vec<Entry>, goal: f64) {
        let mass =
            |entries: &[Entry]| entries.iter().map(|e| f64::from(exp(self.scaled(e.logit())))).sum::<f64>();
        let (mut from, mut to, mut before) = (0, kept.len(), 0.0f64);
        while to - from > 32 {
            let middle = (to - from) / 2;
            kept[from..to].select_nth_unstable(middle);
            let upper = mass(&kept[from..from + middle]);
            if before + upper >= goal {
                to = from + middle;
            } else {
                from += middle;
                before += upper;
            }
        }
        kept[from..to].sort_unstable();
        let reached = kept[from..to].iter().position(|e| {
            before += f64::from(exp(self.scaled(e.logit())));
            before >= goal
        });
        kept.truncate(reached.map_or(to, |at| from + at + 1).max(1));
    }

    /// Gumbel-max over a list.
    fn race(&self, entries: &[Entry]) -> u32 {
        let mut race = Race { best: f32::NEG_INFINITY, id: u32::MAX };
        let likeliest = entries.iter().min();
        for &entry in likeliest.into_iter().chain(entries) {
            let (scaled, id) = (self.scaled(entry.logit()), entry.id());
            if scaled >= self.floor && scaled + GUMBEL_MAX >= race.best {
                race.enter(scaled, id, self.words(id / 4)[id as usize % 4]);
            }
        }
        race.id
    }

    /// Gumbel-max over the vocabulary.
    fn race_all(&self, logits: &[f32]) -> u32 {
        let mut race = Race { best: f32::NEG_INFINITY, id: u32::MAX };
        // The likeliest token first: it sets how far behind another may be. It comes a second time, without effect.
        let likeliest = position_of(logits, self.max);
        race.enter(0.0, likeliest, self.words(likeliest / 4)[likeliest as usize % 4]);
        for depth in [2.0, f32::INFINITY] {
            for (at, chunk) in logits.chunks(RUN).enumerate() {
                let nearest = self.scaled(max_of(chunk));
                if nearest < (race.best - GUMBEL_MAX).max(self.floor).max(-depth) {
                    continue;
                }
                let first = (at * RUN) as u32;
                let words = philox4x32_run::<{ RUN / 4 }>([first / 4, self.position, 0, 0], self.key);
                let mut bounds = [[0.0; RUN / 4]; 4];
                for (bounds, words) in bounds.iter_mut().zip(&words) {
                    for (bound, &word) in bounds.iter_mut().zip(words) {
                        *bound = gumbel_bound(word);
                    }
                }
                if nearest + bounds.iter().fold(0.0, |a, &bounds| larger(a, largest(bounds))) < race.best {
                    continue;
                }
                for (lane, &l) in chunk.iter().enumerate() {
                    let scaled = self.scaled(l);
                    if scaled >= self.floor {
                        race.enter(scaled, first + lane as u32, words[lane % 4][lane / 4]);
                    }
                }
            }
        }
        race.id
    }

    /// The words of ids `4 * quarter ..`.
    #[inline]
    fn words(&self, quarter: u32) -> [u32; 4] {
        philox4x32([quarter, self.position, 0, 0], self.key)
    }
}

/// The best of the tokens seen so far.
struct Race {
    best: f32,
    id: u32,
}

impl Race {
    #[inline]
    fn enter(&mut self, scaled: f32, id: u32, word: u32) {
        if scaled + gumbel_bound(word) < self.best {
            return;
        }
        let score = scaled + gumbel(word);
        if score > self.best || (score == self.best && id < self.id) {
            (self.best, self.id) = (score, id);
        }
    }
}

/// At least `-ln(-ln u)`, without a logarithm: `1 - u <= -ln u`, and `1 - u >= 2^-n` for its exponent `-n`.
#[inline]
fn gumbel_bound(word: u32) -> f32 {
    let rest = ((!word >> 8) as i32 as f32 + 0.5) * (1.0 / 16_777_216.0);
    (127 - (rest.to_bits() >> 23) as i32) as f32 * 0.693_148
}

/// `-ln(-ln u)`.
fn gumbel(word: u32) -> f32 {
    let u = (f64::from(word >> 8) + 0.5) / 16_777_216.0;
    (-(-u.ln()).ln()) as f32
}

/// Log-softmax of the chosen token and the `n` likeliest.
fn logprobs(logits: &[f32], max: f32, id: u32, n: usize) -> (f32, Vec<(u32, f32)>) {
    if max == f32::NEG_INFINITY {
        return (f32::MIN, Vec::new());
    }
    let draw = Draw { max, inverse: 1.0, floor: 0.0, key: [0; 2], position: 0 };
    let log_mass = draw.mass(logits).ln();
    let of = |l: f32| (f64::from(l - max) - log_mass) as f32;
    let mut likeliest = if n == 0 { Vec::new() } else { top(logits, n) };
    likeliest.sort_unstable();
    let chosen = logits.get(id as usize).map_or(f32::MIN, |&l| of(l).max(f32::MIN));
    (chosen, likeliest.into_iter().map(|e| (e.id(), of(e.logit()))).collect())
}

/// `e^x` for x <= 0 within 2e-7 of it, 0 below -87 and for NaN; plain multiplications, so that it vectorises.
#[inline]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let n = clamped * std::f32::consts::LOG2_E + ROUND;
    let exponent = (n.to_bits() << 23).wrapping_add(0x3f80_0000);
    let n = n - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.0
        + r * (1.0
            + r * (0.5 + r * (0.166_666_55 + r * (0.041_665_795 + r * (0.008_333_452 + r * 0.001_398_2)))));
    let value = p * f32::from_bits(exponent);
    if x > -87.0 { value } else { 0.0 }
}

#[cfg(test)]
mod tests;
