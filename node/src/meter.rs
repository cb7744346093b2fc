//! How fast a model runs here, measured on the work itself.
use std::time::Duration;
use weir_scheduler::Rates;

/// Bytes of weights read in a second, before anything has been measured: a plain desktop's memory.
const GUESS_BYTES_PER_S: f64 = 10e9;
/// Weight of the newest observation; the first counts alone.
const NEWEST: f64 = 0.25;
/// How much slower each sequence is with all slots running than alone, before that has been measured.
const FULL_GUESS: f64 = 3.0;
/// Fewer tokens say nothing of a rate.
const TOKENS_MIN: u32 = 8;

/// What can be said of a model that has not run yet. Each token of output reads all weights; a prompt shares them.
pub(crate) fn guess(weight_bytes: u64) -> Rates {
    let alone = Duration::from_secs_f64((weight_bytes as f64 / GUESS_BYTES_PER_S).max(1e-5));
    Rates {
        prefill_tokens_per_s: (8.0 / alone.as_secs_f64()) as f32,
        token_time_alone: alone,
        token_time_full: alone.mul_f64(FULL_GUESS),
    }
}

/// Moving averages of what was observed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meter {
    rates: Rates,
    slots: u32,
    /// Which of them were measured: the others are guesses.
    prefill: bool,
    alone: bool,
    full: bool,
}

/// A finished generation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Observed {
    /// Tokens of the prompt (and of earlier output) that were computed, not found in the cache.
    pub prompt: u32,
    /// From the request to its first token.
    pub first: Duration,
    /// Tokens that came, the first included.
    pub tokens: u32,
    /// From the first to the last.
    pub rest: Duration,
    /// Requests that ran at the same time, at most, itself included.
    pub beside: u32,
}

impl Meter {
    pub fn new(rates: Rates, slots: u32) -> Meter {
        Meter { rates, slots: slots.max(2), prefill: false, alone: false, full: false }
    }

    pub fn rates(&self) -> Rates {
        self.rates
    }

    pub fn observe(&mut self, seen: Observed) {
        // Beside others the prompt may have waited: that is queueing, which the scheduler accounts for.
        if seen.beside == 1 && seen.prompt >= TOKENS_MIN && !seen.first.is_zero() {
            let rate = f64::from(seen.prompt) / seen.first.as_secs_f64();
            let old = f64::from(self.rates.prefill_tokens_per_s);
            let weight = weight(&mut self.prefill);
            self.rates.prefill_tokens_per_s = (old + weight * (rate - old)).max(1e-3) as f32;
        }
        if seen.tokens < TOKENS_MIN {
            return;
        }
        let pace = seen.rest / (seen.tokens - 1);
        let rates = &mut self.rates;
        let average =
            |old: Duration, new: Duration, weight: f64| old.mul_f64(1.0 - weight) + new.mul_f64(weight);
        let share = f64::from(seen.beside.min(self.slots) - 1) / f64::from(self.slots - 1);
        // A node that is never idle doesn't see how fast it would be alone; that it is no faster than that, it does.
        let guess = pace.div_f64(1.0 + (FULL_GUESS - 1.0) * share);
        if seen.beside == 1 {
            rates.token_time_alone = average(rates.token_time_alone, pace, weight(&mut self.alone));
        } else if !self.alone {
            let weight = if self.full { NEWEST } else { 1.0 };
            rates.token_time_alone = average(rates.token_time_alone, guess, weight);
        }
        if seen.beside > 1 {
            let more = pace.saturating_sub(rates.token_time_alone);
            let full = rates.token_time_alone + more.div_f64(share);
            rates.token_time_full = average(rates.token_time_full, full, weight(&mut self.full));
        } else if !self.full {
            rates.token_time_full = rates.token_time_alone.mul_f64(FULL_GUESS);
        }
        self.rates.token_time_full = self.rates.token_time_full.max(self.rates.token_time_alone);
    }
}

/// Of an observation: the first of its kind replaces the guess.
fn weight(measured: &mut bool) -> f64 {
    if std::mem::replace(measured, true) { NEWEST } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_never_idle_finds_its_pace() {
        let pace = Duration::from_millis(15);
        for beside in [1, 5, 20, 100] {
            let mut meter = Meter::new(guess(0), 16);
            let seen = Observed { prompt: 5, first: pace, tokens: 101, rest: pace * 100, beside };
            meter.observe(seen);
            let found = |meter: &Meter| meter.rates().token_time(beside, 16);
            assert!(
                found(&meter).abs_diff(pace) < Duration::from_micros(10),
                "{beside}: {:?}",
                meter.rates()
            );
            (0..100).for_each(|_| meter.observe(seen));
            assert!(
                found(&meter).abs_diff(pace) < Duration::from_micros(10),
                "{beside}: {:?}",
                meter.rates()
            );
        }
    }

    #[test]
    fn it_finds_the_true_rates() {
        let (alone, full) = (Duration::from_millis(10), Duration::from_millis(40));
        let mut meter = Meter::new(guess(1 << 30), 16);
        for _ in 0..40 {
            let first = Duration::from_millis(100);
            meter.observe(Observed { prompt: 200, first, tokens: 101, rest: alone * 100, beside: 1 });
            let pace = alone + (full - alone) / 15 * 7;
            meter.observe(Observed { prompt: 200, first, tokens: 101, rest: pace * 100, beside: 8 });
        }
        let rates = meter.rates();
        assert!((rates.prefill_tokens_per_s - 2000.0).abs() < 20.0, "{rates:?}");
        assert!(rates.token_time_alone.abs_diff(alone) < Duration::from_micros(100), "{rates:?}");
        assert!(rates.token_time_full.abs_diff(full) < Duration::from_millis(1), "{rates:?}");
    }
}
