//! What may be spent: reserved before a request is sent, for the worst case, and settled when it is known.
mod account;

use crate::{KeyId, RequestId};
pub use account::{Account, Allowance, Holder, Limit, Period, Unit, Who};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// Accounts that are kept, at most: values of tags come from outside. Further ones of a tag share one.
const ACCOUNTS_MAX: usize = 20_000;
/// The value of a tag whose account they share.
const OTHERS: &str = "(others)";
/// Whoever lacks only what others give back soon may come again after so many seconds.
const SOON_S: u32 = 2;

/// What an account may have and has spent in its present window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    /// The window's number, by [`Period::window`].
    pub window: i64,
    /// No more than this, in all; without a limit where none.
    pub limit: Option<u64>,
    /// Taken by others, or before this scheduler began.
    pub before: u64,
    /// Settled.
    pub spent: u64,
    /// For what is under way.
    pub reserved: u64,
    /// What the limit was passed by through no reservation of ours: a provider charged more, or the limit was lowered.
    pub excused: u64,
}

impl Balance {
    /// What can still be reserved.
    pub fn left(&self) -> u64 {
        self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.taken()))
    }

    fn taken(&self) -> u64 {
        self.before.saturating_add(self.spent).saturating_add(self.reserved)
    }

    fn excuse(&mut self) {
        let over = self.limit.map_or(0, |limit| self.taken().saturating_sub(limit));
        self.excused = self.excused.max(over);
    }

    /// Begins anew, if it is time. A clock that is put back changes nothing.
    fn turn(&mut self, window: i64) {
        if window > self.window {
            *self = Balance { window, limit: self.limit, ..Balance::default() };
        }
    }
}

/// What happens to an account: so much is reserved; or so much of what was reserved is free again, and this was spent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which.
    pub account: Account,
    /// In which of its windows.
    pub window: i64,
    /// What it may have there, in all.
    pub limit: u64,
    /// What is reserved, or was.
    pub reserved: u64,
    /// What was spent; 0 as long as it is reserved.
    pub spent: u64,
}

/// What an attempt at a request may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub nano_usd: u64,
    pub tokens: u64,
}

impl Amount {
    fn of(&self, unit: Unit) -> u64 {
        match unit {
            Unit::NanoUsd => self.nano_usd,
            Unit::Tokens => self.tokens,
            // They are counted when they come.
            Unit::Requests => 0,
        }
    }
}

/// An account that applies to a request, and its limit.
pub(crate) type Applies = (Account, u64);

/// Why something can't be reserved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lack {
    pub account: Account,
    limit: u64,
    left: u64,
    reserved: u64,
    needed: u64,
    turns_s: u32,
}

impl Lack {
    pub fn is_rate(&self) -> bool {
        self.account.period == Period::Minute
    }

    /// When it may work.
    pub fn after_s(&self) -> u32 {
        let soon = self.needed <= self.left.saturating_add(self.reserved);
        if soon { self.turns_s.min(SOON_S) } else { self.turns_s }
    }
}

/// Accounts of keys and tags, and what is reserved by attempt at a request.
///
/// Each [`Ledger::reserve`] is followed by exactly one [`Ledger::settle`], of no more than was reserved unless a node
/// [`charge`](Ledger::charge)s more. So `before + spent + reserved <= limit` in each window, however requests overlap. What
/// is reserved in one window is settled in that one, even if it ends in a later.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    names: BTreeMap<KeyId, Arc<str>>,
    keys: BTreeMap<Arc<str>, Vec<Limit>>,
    tags: Vec<(Arc<str>, Option<Arc<str>>, Limit)>,
    everybody: Vec<Limit>,
    accounts: BTreeMap<Account, Balance>,
    under_way: BTreeMap<(RequestId, u32), UnderWay>,
    /// The minute in which accounts whose windows are over were forgotten last.
    swept: i64,
}

/// An attempt.
#[derive(Debug)]
struct UnderWay {
    key: KeyId,
    worst: Amount,
    charged: Option<u64>,
    entries: Vec<Entry>,
}

/// What came of an attempt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Settled {
    pub key: KeyId,
    pub nano_usd: u64,
    pub reserved_nano_usd: u64,
    pub entries: Vec<Entry>,
}

impl Ledger {
    /// The names of keys.
    pub fn name(&mut self, names: BTreeMap<KeyId, Arc<str>>) {
        self.names = names;
    }

    /// Its key's name; empty where it has none.
    pub fn name_of(&self, key: KeyId) -> &str {
        self.names.get(&key).map_or("", |name| name)
    }

    /// These limits hold from now on, instead of those before.
    pub fn allow(&mut self, allowances: Vec<Allowance>) {
        (self.keys, self.tags, self.everybody) = Default::default();
        for Allowance { who, limit } in allowances {
            match who {
                Who::Key(name) => self.keys.entry(name).or_default().push(limit),
                Who::Tag(name, value) => self.tags.push((name, value, limit)),
                Who::Everybody => self.everybody.push(limit),
            }
        }
        let mut accounts = std::mem::take(&mut self.accounts);
        for (account, balance) in &mut accounts {
            balance.limit = self.limit(account);
            balance.excuse();
        }
        self.accounts = accounts;
    }

    fn limit(&self, account: &Account) -> Option<u64> {
        let fits = |limit: &&Limit| (limit.unit, limit.period) == (account.unit, account.period);
        let least = |limits: &[Limit]| limits.iter().filter(fits).map(|limit| limit.amount).min();
        match &account.holder {
            Holder::Key(name) => least(self.keys.get(name)?),
            Holder::Everybody => least(&self.everybody),
            Holder::Tag(name, value) => {
                let of =
                    self.tags.iter().filter(|(n, v, _)| n == name && v.as_ref().is_none_or(|v| v == value));
                of.map(|(.., limit)| limit).filter(fits).map(|limit| limit.amount).min()
            }
        }
    }

    /// What others have taken of an account in one of its windows, or was taken before.
    pub fn book(&mut self, account: Account, window: i64, before: u64) {
        let limit = self.limit(&account);
        let balance = self.accounts.entry(account).or_insert(Balance { window, limit, ..Balance::default() });
        balance.turn(window);
        if balance.window == window {
            balance.before = before;
            balance.excuse();
        }
    }

    /// The accounts that apply to requests of a key with these tags.
    pub fn accounts_of(&self, key: KeyId, tags: &[(String, String)]) -> Vec<Applies> {
        let mut found = Vec::new();
        if self.keys.is_empty() && self.tags.is_empty() && self.everybody.is_empty() {
            return found;
        }
        let mut add = |holder: Holder, limit: &Limit| {
            let account = Account { holder, unit: limit.unit, period: limit.period };
            match found.iter_mut().find(|(known, _): &&mut Applies| *known == account) {
                Some((_, least)) => *least = limit.amount.min(*least),
                None => found.push((account, limit.amount)),
            }
        };
        if let Some((name, limits)) = self.names.get(&key).and_then(|name| self.keys.get_key_value(name)) {
            limits.iter().for_each(|limit| add(Holder::Key(name.clone()), limit));
        }
        for (name, wanted, limit) in &self.tags {
            // The first of a name counts.
            let Some((_, value)) = tags.iter().find(|(tag, _)| **tag == **name) else { continue };
            match wanted {
                Some(wanted) if **wanted != **value => {}
                Some(wanted) => add(Holder::Tag(name.clone(), wanted.clone()), limit),
                None => {
                    let holder = Holder::Tag(name.clone(), value.as_str().into());
                    let account = Account { holder, unit: limit.unit, period: limit.period };
                    let known = self.accounts.len() < ACCOUNTS_MAX || self.accounts.contains_key(&account);
                    add(if known { account.holder } else { Holder::Tag(name.clone(), OTHERS.into()) }, limit);
                }
            }
        }
        self.everybody.iter().for_each(|limit| add(Holder::Everybody, limit));
        found
    }

    fn now(&self, (account, limit): &Applies, unix_s: i64) -> Balance {
        let mut balance = self.accounts.get(account).copied().unwrap_or_default();
        balance.turn(account.period.window(unix_s));
        Balance { limit: Some(*limit), ..balance }
    }

    /// What is left of all these accounts in this unit.
    pub fn left(&self, accounts: &[Applies], unit: Unit, unix_s: i64) -> u64 {
        let of = accounts.iter().filter(|(account, _)| account.unit == unit);
        of.map(|one| self.now(one, unix_s).left()).min().unwrap_or(u64::MAX)
    }

    /// The account that has least to do with so much; none, if all have it.
    pub fn lack(&self, accounts: &[Applies], amount: &Amount, unix_s: i64) -> Option<Lack> {
        accounts.iter().find_map(|one| self.lack_of(one, amount.of(one.0.unit), unix_s))
    }

    fn lack_of(&self, one: &Applies, needed: u64, unix_s: i64) -> Option<Lack> {
        let (account, limit) = one;
        let balance = self.now(one, unix_s);
        let turns = account.period.begins(balance.window.saturating_add(1)).saturating_sub(unix_s);
        (needed > balance.left()).then(|| Lack {
            account: account.clone(),
            limit: *limit,
            left: balance.left(),
            reserved: balance.reserved,
            needed,
            turns_s: u32::try_from(turns.max(1)).unwrap_or(u32::MAX),
        })
    }

    /// Counts a request in accounts of requests.
    pub fn count(&mut self, accounts: &[Applies], unix_s: i64) -> Result<(), Lack> {
        let of_requests = || accounts.iter().filter(|(account, _)| account.unit == Unit::Requests);
        if let Some(lack) = of_requests().find_map(|one| self.lack_of(one, 1, unix_s)) {
            return Err(lack);
        }
        for (account, limit) in of_requests() {
            let window = account.period.window(unix_s);
            self.open(account, *limit, window, unix_s).spent += 1;
        }
        Ok(())
    }

    fn open(&mut self, account: &Account, limit: u64, window: i64, unix_s: i64) -> &mut Balance {
        // Once a minute: windows don't end more often.
        let minute = unix_s.div_euclid(60);
        if self.accounts.len() >= ACCOUNTS_MAX && self.swept != minute {
            self.swept = minute;
            self.accounts.retain(|account, balance| {
                balance.reserved > 0 || balance.window >= account.period.window(unix_s)
            });
        }
        let fresh = Balance { window, limit: Some(limit), ..Balance::default() };
        let balance = self.accounts.entry(account.clone()).or_insert(fresh);
        balance.turn(window);
        balance.limit = Some(limit);
        balance.excuse();
        balance
    }

    /// Sets aside what an attempt may take at worst, in all its accounts or in none. Returns what is to be remembered of it.
    pub fn reserve(
        &mut self,
        (key, request, attempt): (KeyId, RequestId, u32),
        accounts: &[Applies],
        worst: Amount,
        unix_s: i64,
    ) -> Result<Vec<Entry>, Lack> {
        if let Some(lack) = self.lack(accounts, &worst, unix_s) {
            return Err(lack);
        }
        let mut entries = Vec::new();
        for (account, limit) in accounts {
            let reserved = worst.of(account.unit);
            if reserved > 0 {
                let balance = self.open(account, *limit, account.period.window(unix_s), unix_s);
                balance.reserved = balance.reserved.saturating_add(reserved);
                let (account, window) = (account.clone(), balance.window);
                entries.push(Entry { account, window, limit: *limit, reserved, spent: 0 });
            }
        }
        let durable = entries.iter().filter(|e| e.account.period != Period::Minute).cloned().collect();
        let before =
            self.under_way.insert((request, attempt), UnderWay { key, worst, charged: None, entries });
        assert!(before.is_none(), "an attempt is reserved for once");
        Ok(durable)
    }

    /// What an attempt did cost by its node's own account: that counts, even if it should be more than what was reserved.
    /// Returns what was.
    pub fn charge(&mut self, request: RequestId, attempt: u32, nano_usd: u64) -> Option<u64> {
        let under_way = self.under_way.get_mut(&(request, attempt))?;
        under_way.charged = Some(nano_usd);
        Some(under_way.worst.nano_usd)
    }

    /// What an attempt did take by our own count, which counts where the node keeps no account; the rest is free again.
    pub fn settle(&mut self, request: RequestId, attempt: u32, counted: Amount) -> Option<Settled> {
        let UnderWay { key, worst, charged, mut entries } = self.under_way.remove(&(request, attempt))?;
        let nano_usd = charged.unwrap_or(counted.nano_usd.min(worst.nano_usd));
        let took = Amount { nano_usd, tokens: counted.tokens };
        for entry in &mut entries {
            entry.spent = took.of(entry.account.unit);
            let Some(balance) = self.accounts.get_mut(&entry.account) else { continue };
            if balance.window == entry.window {
                balance.reserved -= entry.reserved;
                balance.spent = balance.spent.saturating_add(entry.spent);
                balance.excuse();
            }
        }
        entries.retain(|entry| entry.account.period != Period::Minute);
        Some(Settled { key, nano_usd, reserved_nano_usd: worst.nano_usd, entries })
    }

    pub fn balance(&self, account: &Account) -> Balance {
        self.accounts.get(account).copied().unwrap_or_default()
    }

    /// Panics unless what is reserved is what is under way, and no limit is passed.
    pub fn check(&self, under_way: usize) {
        assert_eq!(self.under_way.len(), under_way, "attempts");
        let mut reserved: BTreeMap<(&Account, i64), u64> = BTreeMap::new();
        for entry in self.under_way.values().flat_map(|attempt| &attempt.entries) {
            *reserved.entry((&entry.account, entry.window)).or_default() += entry.reserved;
        }
        for (account, balance) in &self.accounts {
            let sum = reserved.get(&(account, balance.window)).copied().unwrap_or(0);
            assert_eq!(sum, balance.reserved, "{account:?}");
            let most = balance.limit.map_or(u64::MAX, |limit| limit.saturating_add(balance.excused));
            assert!(balance.taken() <= most, "{account:?} overspends: {balance:?}");
        }
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lack { account, limit, left, reserved, needed, turns_s } = self;
        let (unit, period) = (account.unit, account.period);
        write!(f, "{} may have {} in any {}", account.holder, unit.say(*limit), period.name())?;
        write!(f, ", of which {} are left", unit.say(*left))?;
        if *reserved > 0 {
            write!(f, " ({} are reserved for requests under way)", unit.say(*reserved))?;
        }
        match unit {
            Unit::NanoUsd => write!(f, ", and this one may cost up to {}", unit.say(*needed))?,
            Unit::Tokens => {
                write!(f, ", and this one may take up to {}, prompt and answer", unit.say(*needed))?;
            }
            Unit::Requests => {}
        }
        match turns_s {
            0..120 => write!(f, "; the next {} begins in {turns_s} s", period.name()),
            120..7200 => write!(f, "; the next {} begins in {} min", period.name(), turns_s / 60),
            7200..172_800 => write!(f, "; the next {} begins in {} h", period.name(), turns_s / 3600),
            _ => write!(f, "; the next {} begins in {} days", period.name(), turns_s / 86_400),
        }
    }
}

#[cfg(test)]
mod tests;
