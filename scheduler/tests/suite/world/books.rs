//! What keys and tags spend.
use super::{Planted, World};
use weir_scheduler::{Allowance, Entry, Input, KeyId, Limit, PRIVATE, Period, Unit, Who};

/// What one of the keys may spend, and what all together may take: now and then not enough.
const BUDGET: u64 = 4000;
const TOKENS: u64 = 12_000;
const REQUESTS: u64 = 38;

impl World {
    /// Tells the scheduler what keys may spend and have spent: what was under way when it was killed is spent.
    pub(super) fn open_accounts(&mut self) {
        let allow = |who, amount, unit, period| Allowance { who, limit: Limit { amount, unit, period } };
        let allowances = vec![
            allow(Who::Key("one".into()), BUDGET, Unit::NanoUsd, Period::Hour),
            allow(Who::Tag(PRIVATE.into(), None), TOKENS / 4, Unit::Tokens, Period::Day),
            allow(Who::Everybody, TOKENS, Unit::Tokens, Period::Hour),
            allow(Who::Everybody, TOKENS / 2, Unit::Tokens, Period::Minute),
            allow(Who::Everybody, REQUESTS, Unit::Requests, Period::Minute),
        ];
        self.scheduler.handle(self.now, Input::Keys([(KeyId(1), "one".into())].into()));
        self.scheduler.handle(self.now, Input::Allow(allowances));
        for ((account, window), (spent, held)) in &mut self.books {
            (*spent, *held) = (*spent + *held, 0);
            let (account, window) = (account.clone(), *window);
            self.scheduler.handle(self.now, Input::Booked { account, window, taken: *spent });
        }
    }

    pub(super) fn reserved(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.books.entry((entry.account, entry.window)).or_default().1 += entry.reserved;
        }
    }

    pub(super) fn settled(&mut self, entries: Vec<Entry>) {
        let times = if self.planted == Some(Planted::SettledTwice) { 2 } else { 1 };
        for entry in entries {
            let (spent, held) = self.books.entry((entry.account, entry.window)).or_default();
            (*spent, *held) = (*spent + times * entry.spent, *held - entry.reserved);
        }
    }

    /// What the scheduler has counted is what it has said.
    pub(super) fn check_books(&self) {
        for ((account, window), (spent, held)) in &self.books {
            let balance = self.scheduler.balance(account);
            let now = (balance.before + balance.spent, balance.reserved);
            assert!(
                balance.window != *window || now == (*spent, *held),
                "{account:?}: {balance:?}, {spent} {held}"
            );
        }
    }
}
