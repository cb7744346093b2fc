//! Nodes that fail again and again are rested.
use crate::Time;
use std::collections::BTreeMap;
use std::time::Duration;

/// Failures in a row before a node is rested.
const FAILURES: u32 = 3;
/// Its first rest; each further failure doubles it.
const REST_FIRST: Duration = Duration::from_secs(5);
const REST_MAX: Duration = Duration::from_secs(300);
/// A failure is forgotten after so long without another.
const MEMORY: Duration = Duration::from_secs(120);
/// Nodes that are remembered, at most.
const REMEMBERED_MAX: usize = 4096;

/// By identity, so that it outlives connections.
#[derive(Debug, Default)]
pub(crate) struct Breaker(BTreeMap<u64, Record>);

#[derive(Clone, Copy, Debug)]
struct Record {
    failures: u32,
    last: Time,
}

impl Breaker {
    /// A node failed. Returns until when it is to rest, if it is.
    pub fn failed(&mut self, now: Time, identity: u64) -> Option<Time> {
        if self.0.len() >= REMEMBERED_MAX {
            self.0.retain(|_, record| now.since(record.last) < MEMORY);
        }
        if self.0.len() >= REMEMBERED_MAX && !self.0.contains_key(&identity) {
            return None;
        }
        let record = self.0.entry(identity).or_insert(Record { failures: 0, last: now });
        if now.since(record.last) > MEMORY + REST_MAX {
            record.failures = 0;
        }
        record.failures = record.failures.saturating_add(1);
        record.last = now;
        self.rests(identity)
    }

    /// A node did its work.
    pub fn worked(&mut self, identity: u64) {
        self.0.remove(&identity);
    }

    /// Until when a node rests, if it has reason to.
    pub fn rests(&self, identity: u64) -> Option<Time> {
        let record = self.0.get(&identity)?;
        let beyond = record.failures.checked_sub(FAILURES)?;
        Some(record.last + (REST_FIRST * 2u32.saturating_pow(beyond.min(10))).min(REST_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_and_work_ends_them() {
        let mut breaker = Breaker::default();
        let second = |s: u64| Time(s * 1_000_000_000);
        assert_eq!(breaker.failed(second(0), 7), None);
        assert_eq!(breaker.failed(second(1), 7), None);
        assert_eq!(breaker.failed(second(2), 7), Some(second(7)));
        assert_eq!(breaker.failed(second(8), 7), Some(second(18)));
        assert_eq!((breaker.rests(7), breaker.rests(8)), (Some(second(18)), None));
        breaker.worked(7);
        assert_eq!(breaker.failed(second(19), 7), None);
        for n in 0..10_000 {
            breaker.failed(second(20), n);
        }
        assert!(breaker.0.len() <= REMEMBERED_MAX);
    }
}
