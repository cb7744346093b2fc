//! How often an upstream may be asked: by its own word, by what it has taken so far, and not at all while it fails.
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What an upstream that wants to be left alone doesn't say: how long.
const REST: Duration = Duration::from_secs(1);
/// Longer rests than this are asked about again all the same.
const REST_MAX: Duration = Duration::from_secs(600);
/// Requests are counted over this.
const WINDOW: Duration = Duration::from_secs(10);
/// What is left of the rate at which an upstream had enough, and how fast it is tried anew, a request.
const LESS: f64 = 0.7;
const MORE: f64 = 1.02;
/// A rate is forgotten when nothing was refused for so long.
const MEMORY: Duration = Duration::from_secs(300);
/// Slower than this nothing is ever learned: requests a second.
const RATE_MIN: f64 = 1.0 / 60.0;
/// Failures in a row before it is left alone, for how long first, and how long at most.
const FAILURES: u32 = 5;
const BREAK_FIRST: Duration = Duration::from_secs(2);
const BREAK_MAX: Duration = Duration::from_secs(60);
/// One request tries whether it works again; if nothing is heard of it for so long, another may.
const PROBE: Duration = Duration::from_secs(30);
/// Requests that are counted, at most: beyond, rates are those of the last ones.
const COUNTED_MAX: usize = 4096;

/// Says when the next request may be sent. Time is an argument.
#[derive(Debug, Default)]
pub struct Limiter {
    rests_until: Option<Instant>,
    /// When requests were sent, within the window.
    sent: VecDeque<Instant>,
    /// Requests a second that it takes, once that has been learned.
    rate: Option<f64>,
    refused: Option<Instant>,
    /// By the rate.
    next: Option<Instant>,
    failures: u32,
    probe: Option<Instant>,
}

impl Limiter {
    /// A request is about to be sent: now, or else after this long.
    pub fn admit(&mut self, now: Instant) -> Result<(), Duration> {
        if let Some(until) = self.rests_until {
            if now < until {
                return Err(until - now);
            }
            self.rests_until = None;
        }
        if self.failures >= FAILURES {
            if let Some(probe) = self.probe.filter(|at| now < *at + PROBE) {
                return Err((probe + PROBE - now).min(BREAK_FIRST));
            }
            self.probe = Some(now);
        }
        if self.refused.is_some_and(|at| now.saturating_duration_since(at) > MEMORY) {
            (self.rate, self.refused, self.next) = (None, None, None);
        }
        if let Some(rate) = self.rate {
            let next = self.next.unwrap_or(now);
            if now < next {
                return Err(next - now);
            }
            self.next = Some(now + Duration::from_secs_f64(1.0 / rate));
        }
        while self.sent.front().is_some_and(|at| now.saturating_duration_since(*at) > WINDOW) {
            self.sent.pop_front();
        }
        if self.sent.len() >= COUNTED_MAX {
            self.sent.pop_front();
        }
        self.sent.push_back(now);
        Ok(())
    }

    /// It said 429. Returns how long it is to be left alone.
    pub fn refused(&mut self, now: Instant, after: Option<Duration>) -> Duration {
        let rest = after.unwrap_or(REST).min(REST_MAX);
        self.rests_until = self.rests_until.max(Some(now + rest));
        // Those that were sent together are refused together: that is learned once.
        if self.refused.is_none_or(|at| now.saturating_duration_since(at) > Duration::from_secs(1)) {
            let since = self.sent.front().map_or(WINDOW, |at| now.saturating_duration_since(*at));
            let seen = self.sent.len() as f64 / since.as_secs_f64().max(1.0);
            let before = self.rate.unwrap_or(f64::MAX);
            self.rate = Some((LESS * seen.min(before)).max(RATE_MIN));
        }
        self.refused = Some(now);
        rest
    }

    /// It failed, by its own fault. Returns how long it is to be left alone, if it is.
    pub fn failed(&mut self, now: Instant) -> Option<Duration> {
        self.probe = None;
        self.failures = self.failures.saturating_add(1);
        let beyond = self.failures.checked_sub(FAILURES)?;
        let rest = (BREAK_FIRST * 2u32.saturating_pow(beyond.min(10))).min(BREAK_MAX);
        self.rests_until = self.rests_until.max(Some(now + rest));
        Some(rest)
    }

    /// It answered.
    pub fn worked(&mut self) {
        (self.failures, self.probe) = (0, None);
        if let Some(rate) = &mut self.rate {
            *rate *= MORE;
        }
    }

    /// The rate that was learned, in requests a second.
    pub fn rate(&self) -> Option<f64> {
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn retry_after_is_kept_to_and_a_rate_is_learned() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        // Ten a second until it has enough.
        for n in 0..50 {
            assert_eq!(limiter.admit(start + n * SECOND / 10), Ok(()));
            limiter.worked();
        }
        let now = start + 5 * SECOND;
        assert_eq!(limiter.refused(now, Some(3 * SECOND)), 3 * SECOND);
        assert_eq!(limiter.refused(now, Some(3 * SECOND)), 3 * SECOND, "sent together, learned once");
        let rate = limiter.rate().unwrap();
        assert!((6.5..7.5).contains(&rate), "{rate}");
        assert_eq!(limiter.admit(now + SECOND), Err(2 * SECOND));
        assert_eq!(limiter.admit(now + 3 * SECOND), Ok(()));
        let wait = limiter.admit(now + 3 * SECOND).unwrap_err();
        assert!(wait > SECOND / 10 && wait < SECOND / 5, "{wait:?}");
        for _ in 0..50 {
            limiter.worked();
        }
        assert!(limiter.rate().unwrap() > 2.0 * rate, "it is tried anew");
        assert_eq!(limiter.admit(now + 1000 * SECOND), Ok(()));
        assert_eq!(limiter.rate(), None, "forgotten");
    }

    #[test]
    fn whoever_fails_again_and_again_is_left_alone_and_tried_by_one() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        for _ in 0..FAILURES - 1 {
            assert_eq!(limiter.admit(start), Ok(()));
            assert_eq!(limiter.failed(start), None);
        }
        assert_eq!(limiter.failed(start), Some(BREAK_FIRST));
        assert_eq!(limiter.admit(start), Err(BREAK_FIRST));
        let later = start + BREAK_FIRST;
        assert_eq!(limiter.admit(later), Ok(()), "one");
        assert!(limiter.admit(later).is_err(), "and no other");
        assert_eq!(limiter.failed(later), Some(2 * BREAK_FIRST));
        let last = later + 2 * BREAK_FIRST;
        assert_eq!(limiter.admit(last), Ok(()));
        limiter.worked();
        assert_eq!(limiter.admit(last), Ok(()));
    }
}
