//! What may be spent: reserved before a request is sent, for the worst case, and settled when it is known.
use crate::{KeyId, RequestId};
use std::collections::BTreeMap;

/// What a key has and may spend, in billionths of a dollar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    /// No more than this, in all; without a limit where none.
    pub limit: Option<u64>,
    /// Settled.
    pub spent: u64,
    /// For what is under way.
    pub reserved: u64,
}

impl Balance {
    /// What can still be reserved.
    pub fn left(&self) -> u64 {
        let limit = self.limit.unwrap_or(u64::MAX);
        limit.saturating_sub(self.spent).saturating_sub(self.reserved)
    }
}

/// Accounts by key, and what is reserved by attempt at a request.
///
/// Each [`Ledger::reserve`] is followed by exactly one [`Ledger::settle`], of no more than was reserved unless a node
/// [`charge`](Ledger::charge)s more. So
/// `spent <= spent + reserved <= limit` always, however requests overlap.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    accounts: BTreeMap<KeyId, Balance>,
    reserved: BTreeMap<(RequestId, u32), Reserved>,
}

/// For an attempt under way.
#[derive(Debug)]
struct Reserved {
    key: KeyId,
    worst: u64,
    charged: Option<u64>,
}

impl Ledger {
    /// What a key may spend in all, and what it has spent before.
    pub fn open(&mut self, key: KeyId, limit: Option<u64>, spent: u64) {
        let account = self.accounts.entry(key).or_default();
        (account.limit, account.spent) = (limit, spent);
    }

    pub fn balance(&self, key: KeyId) -> Balance {
        self.accounts.get(&key).copied().unwrap_or_default()
    }

    /// Sets aside what an attempt may cost at worst; false, and nothing is set aside, where so much isn't left.
    pub fn reserve(&mut self, key: KeyId, request: RequestId, attempt: u32, worst: u64) -> bool {
        let account = self.accounts.entry(key).or_default();
        if worst > account.left() {
            return false;
        }
        account.reserved = account.reserved.saturating_add(worst);
        let before = self.reserved.insert((request, attempt), Reserved { key, worst, charged: None });
        assert!(before.is_none(), "an attempt is reserved for once");
        true
    }

    /// What an attempt did cost by its node's own account: that counts, even if it should be more than what was reserved.
    pub fn charge(&mut self, request: RequestId, attempt: u32, cost: u64) {
        if let Some(reserved) = self.reserved.get_mut(&(request, attempt)) {
            reserved.charged = Some(cost);
        }
    }

    /// What an attempt did cost by our own count, which counts where the node keeps no account; the rest is free again.
    /// Returns what was spent.
    pub fn settle(&mut self, request: RequestId, attempt: u32, cost: u64) -> Option<(KeyId, u64)> {
        let Reserved { key, worst, charged } = self.reserved.remove(&(request, attempt))?;
        let account = self.accounts.get_mut(&key)?;
        let cost = charged.unwrap_or(cost.min(worst));
        account.reserved -= worst;
        account.spent = account.spent.saturating_add(cost);
        Some((key, cost))
    }

    /// Panics unless what is reserved is what is under way, and no limit is passed.
    pub fn check(&self, under_way: usize) {
        assert_eq!(self.reserved.len(), under_way, "reservations");
        for (key, account) in &self.accounts {
            let sum: u64 = self.reserved.values().filter(|r| r.key == *key).map(|r| r.worst).sum();
            assert_eq!(sum, account.reserved, "{key:?}");
            let total = account.spent.saturating_add(account.reserved);
            assert!(account.limit.is_none_or(|limit| total <= limit), "{key:?} overspends: {account:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn concurrent_requests_cannot_overspend() {
        let mut ledger = Ledger::default();
        let key = KeyId(7);
        ledger.open(key, Some(100), 10);
        assert!(ledger.reserve(key, RequestId(1), 0, 60));
        assert!(!ledger.reserve(key, RequestId(2), 0, 31), "30 are left");
        assert!(ledger.reserve(key, RequestId(2), 0, 30));
        ledger.check(2);
        assert_eq!(ledger.settle(RequestId(1), 0, 20), Some((key, 20)));
        assert_eq!(ledger.settle(RequestId(1), 0, 20), None, "once");
        assert_eq!(ledger.settle(RequestId(2), 0, 99), Some((key, 30)), "no more than was reserved");
        assert_eq!(ledger.balance(key), Balance { limit: Some(100), spent: 60, reserved: 0 });
        assert!(ledger.reserve(KeyId(8), RequestId(3), 0, u64::MAX), "no limit");
        ledger.check(1);
    }
}
