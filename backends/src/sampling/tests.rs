//! The rule against a naive version of itself, and its draws against softmax.
use super::*;
use crate::program::TokenCount;
use std::sync::Arc;
use weir_scheduler::Sampling;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 16_777_216.0
    }
}

fn spec(sampling: Sampling, position: u32) -> SampleSpec {
    SampleSpec { sampling: Arc::new(sampling), position, counts: Vec::new(), mask: None }
}

/// The rule, word for word: everything sorted, every g computed.
fn naive(logits: &[f32], spec: &SampleSpec) -> u32 {
    let s = &*spec.sampling;
    let mut all: Vec<(f32, u32)> = Vec::new();
    for (id, &l) in logits.iter().enumerate() {
        let mut l = if l.is_nan() { f32::NEG_INFINITY } else { l.min(1e30) };
        for bias in s.logit_bias.iter().filter(|b| b.0 == id as u32) {
            l += bias.1;
        }
        if let Some(c) = spec.counts.iter().find(|c| c.id == id as u32) {
            if s.repetition_penalty != 1.0 {
                l = if l > 0.0 { l / s.repetition_penalty } else { l * s.repetition_penalty };
            }
            if c.in_output > 0 {
                l = l - s.frequency_penalty * c.in_output as f32 - s.presence_penalty;
            }
        }
        if spec.mask.as_ref().is_some_and(|m| m[id / 32] >> (id % 32) & 1 == 0) {
            l = f32::NEG_INFINITY;
        }
        all.push((l, id as u32));
    }
    all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
    if s.temperature < GREEDY_BELOW {
        return all[0].1;
    }
    let max = all[0].0;
    let mut all: Vec<(f32, u32)> =
        all.into_iter().map(|(l, id)| ((l - max) * (1.0 / s.temperature), id)).collect();
    if s.top_k > 0 {
        all.truncate(s.top_k as usize);
    }
    if s.top_p < 1.0 {
        let mass: f64 = all.iter().map(|a| f64::from(a.0).exp()).sum();
        let mut sum = 0.0;
        let end = all.iter().position(|a| {
            sum += f64::from(a.0).exp();
            sum >= f64::from(s.top_p) * mass
        });
        all.truncate(end.map_or(all.len(), |e| e + 1));
    }
    if s.min_p > 0.0 {
        all.retain(|a| a.0 >= s.min_p.ln());
    }
    let mut best = (f32::NEG_INFINITY, u32::MAX);
    for (scaled, id) in all {
        let words = philox4x32([id / 4, spec.position, 0, 0], [s.seed as u32, (s.seed >> 32) as u32]);
        let score = scaled + gumbel(words[id as usize % 4]);
        if score > best.0 || (score == best.0 && id < best.1) {
            best = (score, id);
        }
    }
    best.1
}

fn random_case(random: &mut Random) -> (Vec<f32>, SampleSpec) {
    let vocab = 32 * (1 + random.below(40)) - random.below(20);
    let spread = [0.1, 1.0, 4.0, 20.0][random.below(4)];
    let mut logits: Vec<f32> =
        (0..vocab).map(|_| (random.unit() + random.unit() + random.unit() - 1.5) * 4.0 * spread).collect();
    if random.below(3) == 0 {
        // Many ties.
        logits.iter_mut().for_each(|l| *l = l.round());
    }
    if random.below(8) == 0 {
        let at = random.below(vocab);
        logits[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3)];
    }
    let mut s = Sampling { seed: random.next(), ..Sampling::default() };
    s.temperature = [0.0, 0.3, 1.0, 2.5][random.below(4)];
    s.top_k = [0, 0, 1, 7, 40, 5000][random.below(6)];
    s.top_p = [1.0, 1.0, 0.1, 0.9, 0.99][random.below(5)];
    s.min_p = [0.0, 0.0, 0.05, 1.0][random.below(4)];
    s.repetition_penalty = [1.0, 1.0, 1.3, 0.7][random.below(4)];
    s.frequency_penalty = [0.0, 0.5, -1.0][random.below(3)];
    s.presence_penalty = [0.0, 0.5][random.below(2)];
    for _ in 0..random.below(4) {
        s.logit_bias.push((random.below(vocab + 10) as u32, random.unit() * 20.0 - 10.0));
    }
    let mut spec = spec(s, random.below(5000) as u32);
    let step = 1 + random.below(9);
    if random.below(2) == 0 {
        spec.counts = (0..vocab as u32 + 9)
            .step_by(step)
            .map(|id| TokenCount { id, in_output: random.below(3) as u32 })
            .collect();
    }
    if random.below(3) == 0 {
        spec.mask = Some((0..vocab.div_ceil(32)).map(|_| random.next() as u32 | 1).collect());
    }
    (logits, spec)
}

#[test]
fn equals_the_naive_rule() {
    for seed in 0..4000 {
        let (logits, spec) = random_case(&mut Random(seed));
        let expected = naive(&logits, &spec);
        let chosen = sample(&mut logits.clone(), &spec).id;
        assert_eq!(chosen, expected, "seed {seed}: {spec:?}");
    }
}

#[test]
fn draws_follow_softmax() {
    let check = |seed: u64, sampling: Sampling, logits: &[f32], expected: &[f64]| {
        let draws = 40_000u32;
        let mut seen = vec![0u32; logits.len()];
        for position in 0..draws {
            let sampling = Sampling { seed, ..sampling.clone() };
            seen[sample(&mut logits.to_vec(), &spec(sampling, position)).id as usize] += 1;
        }
        let mass: f64 = expected.iter().sum();
        let mut chi = 0.0;
        let mut freedom = -1.0f64;
        for (&n, &p) in seen.iter().zip(expected) {
            let mean = p / mass * f64::from(draws);
            if mean == 0.0 {
                assert_eq!(n, 0);
            } else {
                chi += (f64::from(n) - mean).powi(2) / mean;
                freedom += 1.0;
            }
        }
        // Five standard deviations of the chi-square distribution.
        eprintln!("seed {seed}: chi-square {chi:.2} with {freedom} degrees of freedom");
        assert!(chi < freedom + 5.0 * (2.0 * freedom).sqrt(), "seed {seed}: chi-square {chi}");
    };
    let logits: Vec<f32> = (0..24).map(|i| (i * 7 % 24) as f32 / 6.0).collect();
    let soft = |t: f64| logits.iter().map(|&l| (f64::from(l) / t).exp()).collect::<Vec<_>>();
    for seed in [1, 0xdead_beef_0123] {
        check(seed, Sampling { temperature: 1.0, ..Sampling::default() }, &logits, &soft(1.0));
        check(seed, Sampling { temperature: 0.7, ..Sampling::default() }, &logits, &soft(0.7));
        let mut five = soft(1.0);
        five.iter_mut().zip(&logits).for_each(|(p, &l)| *p = if l > 18.5 / 6.0 { *p } else { 0.0 });
        check(seed, Sampling { temperature: 1.0, top_k: 5, ..Sampling::default() }, &logits, &five);
    }
}

#[test]
fn logprobs_are_the_log_softmax_of_adjusted_logits() {
    let mut logits = vec![1.0, 3.0, f32::NAN, 3.0, f32::NEG_INFINITY, 0.0];
    let sampling =
        Sampling { logprobs: Some(5), logit_bias: vec![(0, 1.0)], temperature: 0.0, ..Sampling::default() };
    let sampled = sample(&mut logits, &spec(sampling, 0));
    let mass = (2f32.exp() + 2.0 * 3f32.exp() + 1.0).ln();
    let (chosen, top) = sampled.logprobs.unwrap();
    assert_eq!(sampled.id, 1);
    assert!((chosen - (3.0 - mass)).abs() < 1e-5);
    assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 0, 5]);
    for ((_, logprob), l) in top.iter().zip([3.0, 3.0, 2.0, 0.0]) {
        assert!((logprob - (l - mass)).abs() < 1e-5);
    }
}

#[test]
fn broken_logits_do_not_panic() {
    let strange = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, 1e-40];
    for seed in 0..2000u64 {
        let mut random = Random(seed);
        let (mut logits, mut spec) = random_case(&mut random);
        let mut s = (*spec.sampling).clone();
        s.logprobs = Some(random.below(21) as u8);
        s.temperature = [0.0, 1e-30, 1e-4, 1.0, 100.0][random.below(5)];
        s.repetition_penalty = [1e-38, 1.0, 100.0][random.below(3)];
        spec.sampling = Arc::new(s);
        let kinds = 1 + random.below(strange.len());
        logits.iter_mut().for_each(|l| *l = strange[random.below(kinds)]);
        let sampled = sample(&mut logits, &spec);
        assert!((sampled.id as usize) < logits.len(), "seed {seed}");
        let (chosen, top) = sampled.logprobs.unwrap();
        assert!(!chosen.is_nan() && top.iter().all(|t| !t.1.is_nan()), "seed {seed}");
    }
    assert_eq!(sample(&mut [], &spec(Sampling::default(), 0)).id, 0);
    let mut masked = spec(Sampling { temperature: 1.0, ..Sampling::default() }, 0);
    masked.mask = Some([0, 4].into());
    assert_eq!(sample(&mut [f32::NAN; 40], &masked).id, 34);
}

#[test]
fn exp_is_close() {
    for at in 0..200_000 {
        let x = -(at as f32) * 87.0 / 200_000.0;
        let exact = f64::from(x).exp();
        assert!((f64::from(exp(x)) - exact).abs() <= 4e-7 * exact, "{x}: {} {exact}", exp(x));
    }
    assert_eq!(exp(f32::NAN), 0.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
}
