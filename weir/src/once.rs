//! Saying the same thing once, however often it happens.
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The same is said again after so long.
const AGAIN: Duration = Duration::from_secs(60);
/// What is remembered to have been said, at most; beyond that nothing new is said.
const REMEMBERED_MAX: usize = 1000;

/// What has been said lately: what strangers do must not fill the log.
#[derive(Debug)]
pub(crate) struct Once<K>(Mutex<HashMap<K, Instant>>);

impl<K> Default for Once<K> {
    fn default() -> Self {
        Once(Mutex::default())
    }
}

impl<K: Eq + Hash> Once<K> {
    /// Whether this is to be said now.
    pub(crate) fn first(&self, what: K) -> bool {
        let now = Instant::now();
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.get(&what).is_some_and(|at| now.duration_since(*at) < AGAIN) {
            return false;
        }
        if said.len() >= REMEMBERED_MAX {
            said.retain(|_, at| now.duration_since(*at) < AGAIN);
        }
        said.len() < REMEMBERED_MAX && said.insert(what, now).is_none_or(|at| now.duration_since(at) >= AGAIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_and_what_is_remembered_is_bounded() {
        let once = Once::default();
        assert!(once.first(0) && !once.first(0) && once.first(1));
        assert_eq!((2..5000).filter(|n| once.first(*n)).count(), REMEMBERED_MAX - 2);
        assert!(!once.first(0) && !once.first(9000));
    }
}
