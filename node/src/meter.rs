//! How fast a model runs here, measured on the work itself.
use std::time::Duration;
use weir_scheduler::Rates;

/// Bytes of weights read in a second, before anything has been measured: a plain desktop's memory.
const GUESS_BYTES_PER_S: f64 = 10e9;
/// Weight of the newest observation.
const NEWEST: f64 = 0.25;
/// Fewer tokens say nothing of a rate.
const TOKENS_MIN: u32 = 8;

/// What can be said of a model that has not run yet. Each token of output reads all weights; a prompt shares them.
pub(crate) fn guess(weight_bytes: u64) -> Rates {
    let alone = Duration::from_secs_f64((weight_bytes as f64 / GUESS_BYTES_PER_S).max(1e-5));
    Rates {
        prefill_tokens_per_s: (8.0 / alone.as_secs_f64()) as f32,
        token_time_alone: alone,
        token_time_full: alone * 3,
    }
}

/// Moving averages of what was observed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meter {
    rates: Rates,
    slots: u32,
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
        Meter { rates, slots: slots.max(2) }
    }

    pub fn rates(&self) -> Rates {
        self.rates
    }

    pub fn observe(&mut self, seen: Observed) {
        // Beside others the prompt may have waited: that is queueing, which the scheduler accounts for.
        if seen.beside == 1 && seen.prompt >= TOKENS_MIN && !seen.first.is_zero() {
            let rate = f64::from(seen.prompt) / seen.first.as_secs_f64();
            let old = f64::from(self.rates.prefill_tokens_per_s);
            self.rates.prefill_tokens_per_s = (old + NEWEST * (rate - old)).max(1e-3) as f32;
        }
        if seen.tokens < TOKENS_MIN {
            return;
        }
        let pace = seen.rest / (seen.tokens - 1);
        let average = |old: Duration, new: Duration| old.mul_f64(1.0 - NEWEST) + new.mul_f64(NEWEST);
        if seen.beside == 1 {
            self.rates.token_time_alone = average(self.rates.token_time_alone, pace);
        } else {
            let more = pace.saturating_sub(self.rates.token_time_alone);
            let share = f64::from(self.slots - 1) / f64::from(seen.beside.min(self.slots) - 1);
            let full = self.rates.token_time_alone + more.mul_f64(share);
            self.rates.token_time_full = average(self.rates.token_time_full, full);
        }
        self.rates.token_time_full = self.rates.token_time_full.max(self.rates.token_time_alone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
