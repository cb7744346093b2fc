//! What goes through the gateway, counted: for whoever watches.
use crate::telemetry::Served;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use weir_scheduler::{FailureKind, Priority, Usage};

/// Times are of the last minute, and of at most so many requests.
const RECENT: Duration = Duration::from_secs(60);
const RECENT_MAX: usize = 2000;

/// Counts of all requests for tokens.
#[derive(Debug, Default)]
pub(super) struct Stats {
    /// Without a token yet, by priority.
    waiting: [AtomicUsize; 3],
    /// With one, and not ended.
    running: AtomicUsize,
    ended: AtomicU64,
    tokens: AtomicU64,
    times: Mutex<Times>,
}

#[derive(Debug, Default)]
struct Times {
    to_first: Recent,
    to_last: Recent,
}

/// When, and how long it took.
#[derive(Debug, Default)]
struct Recent(VecDeque<(Instant, Duration)>);

impl Recent {
    fn add(&mut self, now: Instant, time: Duration) {
        if self.0.len() == RECENT_MAX {
            self.0.pop_front();
        }
        self.0.push_back((now, time));
    }

    /// p50 and p99 in milliseconds; null where nothing happened.
    fn percentiles(&mut self, now: Instant) -> Value {
        self.0.retain(|(at, _)| now.duration_since(*at) < RECENT);
        let mut times: Vec<f64> = self.0.iter().map(|(_, time)| time.as_secs_f64() * 1e3).collect();
        times.sort_by(f64::total_cmp);
        let at = |percent: usize| times.get(times.len() * percent / 100).copied();
        json!({ "p50": at(50), "p99": at(99) })
    }
}

impl Stats {
    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As the event stream tells it.
    pub(super) fn to_json(&self) -> Value {
        let now = Instant::now();
        let count = |priority: Priority| self.waiting[priority as usize].load(Ordering::Relaxed);
        let mut times = self.times();
        json!({
            "waiting": {
                "interactive": count(Priority::Interactive),
                "normal": count(Priority::Normal),
                "background": count(Priority::Background),
            },
            "running": self.running.load(Ordering::Relaxed),
            "ended": self.ended.load(Ordering::Relaxed),
            "tokens": self.tokens.load(Ordering::Relaxed),
            "ttft_ms": times.to_first.percentiles(now),
            "total_ms": times.to_last.percentiles(now),
        })
    }
}

/// A request that is counted for as long as it lives.
pub(super) struct Counted {
    stats: Arc<Stats>,
    priority: Priority,
    arrived: Instant,
    begun: bool,
    served: Option<Served>,
}

impl Counted {
    /// A request that arrived then.
    pub(super) fn new(stats: &Arc<Stats>, priority: Priority, arrived: Instant) -> Counted {
        stats.waiting[priority as usize].fetch_add(1, Ordering::Relaxed);
        Counted { stats: stats.clone(), priority, arrived, begun: false, served: None }
    }

    /// The same, and telemetry hears of it.
    pub(super) fn told(mut self, served: Served) -> Counted {
        self.served = Some(served);
        self
    }

    /// An answer is whole.
    pub(super) fn finished(&self, usage: &Usage) {
        if let Some(served) = &self.served {
            served.finished(usage.prompt_tokens, usage.output_tokens);
        }
    }

    /// An answer won't come.
    pub(super) fn failed(&self, kind: FailureKind) {
        if let Some(served) = &self.served {
            served.failed(kind);
        }
    }

    /// A token came.
    pub(super) fn token(&mut self) {
        self.stats.tokens.fetch_add(1, Ordering::Relaxed);
        self.begin();
    }

    /// All of it has come.
    pub(super) fn done(&mut self) {
        self.begin();
        self.stats.ended.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        self.stats.times().to_last.add(now, now.duration_since(self.arrived));
    }

    fn begin(&mut self) {
        if !std::mem::replace(&mut self.begun, true) {
            self.stats.waiting[self.priority as usize].fetch_sub(1, Ordering::Relaxed);
            self.stats.running.fetch_add(1, Ordering::Relaxed);
            if let Some(served) = &self.served {
                served.first();
            }
            let now = Instant::now();
            self.stats.times().to_first.add(now, now.duration_since(self.arrived));
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let counter = match self.begun {
            true => &self.stats.running,
            false => &self.stats.waiting[self.priority as usize],
        };
        counter.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_where_it_is() {
        let stats = Arc::new(Stats::default());
        let counts = || {
            let json = stats.to_json();
            let waiting = json["waiting"]["background"].as_u64().unwrap();
            (waiting, json["running"].as_u64().unwrap(), json["ended"].as_u64().unwrap())
        };
        let new = || Counted::new(&stats, Priority::Background, Instant::now());
        let (mut one, other) = (new(), new());
        assert_eq!(counts(), (2, 0, 0));
        one.token();
        one.token();
        assert_eq!(counts(), (1, 1, 0));
        one.done();
        drop(one);
        assert_eq!(counts(), (1, 0, 1));
        drop(other);
        assert_eq!(counts(), (0, 0, 1));
        let json = stats.to_json();
        assert_eq!(json["tokens"], 2);
        assert!(json["ttft_ms"]["p50"].is_number() && json["total_ms"]["p99"].is_number());
    }
}
