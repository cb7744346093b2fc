//! Accounts that several schedulers spend from. They are in etcd, and each scheduler leases a part of each ahead.
//!
//! For each window of an account etcd has one entry: by replica, how much of it that one may spend in all. It is changed by
//! transactions that fail if somebody was quicker, and always says what shall be there, so that a transaction whose answer
//! got lost does no harm. A replica reserves within what it has leased, without asking anybody; when a transaction has
//! succeeded it may use more, and what it gives back it stops using before it says so. So all together never pass a limit,
//! whatever is lost, late or repeated.
//!
//! A thread looks after it twice a second: sees what others have leased, leases ahead ([`View::share`]), gives back what has
//! become too much. While etcd is away, whoever fits into what is leased is served, and others are told why not.
//!
//! What a dead replica had leased counts as taken. Its own state folder remembers what of that was reserved
//! ([`Disk`]): when it comes back with that folder it gives back the rest.
use super::share::View;
use super::vault::{Disk, Grant, Slice, Told, Vault, VaultError, lasts, row, window_of};
use crate::etcd::{Etcd, EtcdError, Found, Op};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use weir_scheduler::Account;

/// Where the entries are.
const BOOKS: &str = "books/";
/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(500);
/// Times that a transaction is tried which others were quicker than.
const TRIES: u32 = 20;

type At = (Account, i64);

/// How a scheduler takes part in shared accounts.
#[derive(Clone, Debug)]
pub struct Sharing {
    /// Where they are.
    pub etcd: Etcd,
    /// What this scheduler is called there: the same as long as it has its state folder, and nobody else's.
    pub replica: String,
    /// Schedulers that are there now, this one included.
    pub replicas: Arc<AtomicUsize>,
}

/// Shared accounts.
pub(super) struct Leased {
    journal: Disk,
    leases: Arc<Leases>,
}

/// A window of an account.
#[derive(Clone, Debug, Default)]
struct Lease {
    limit: Option<u64>,
    /// Spent by this replica before this process began.
    before: u64,
    /// Spent by this replica in all.
    spent: u64,
    /// What it would like to have reserved, and of that what it may.
    wish: u64,
    held: u64,
    /// It may spend so much in all: nothing that is under way can make it less.
    leased: u64,
    /// The entry, as last seen, and when it was changed; 0 where there is none.
    parts: BTreeMap<String, u64>,
    revision: i64,
    /// What was told of others last.
    told: Option<u64>,
}

impl Lease {
    fn others(&self, replica: &str) -> u64 {
        let others = self.parts.iter().filter(|(name, _)| *name != replica);
        others.fold(0, |sum, (_, part)| sum.saturating_add(*part))
    }

    fn used(&self) -> u64 {
        self.spent.saturating_add(self.held)
    }

    /// What is reserved and has room is granted. What was granted before has room: it becomes spent, or less, and what is
    /// leased is never made less than both together.
    fn grant(&mut self) {
        self.held = self.wish.min(self.leased.saturating_sub(self.spent));
    }

    fn see(&mut self, found: Option<&Found>, replica: &str) -> Result<(), EtcdError> {
        let (parts, revision) = match found {
            None => (BTreeMap::new(), 0),
            Some(found) => {
                let odd = |_| EtcdError::Refused(format!("what is in {} can't be read", found.key));
                (serde_json::from_slice(&found.value).map_err(odd)?, found.revision)
            }
        };
        if revision < self.revision && found.is_some() {
            return Ok(());
        }
        (self.parts, self.revision) = (parts, revision);
        // It can't be more than what is there, if somebody should have put back an older state.
        self.leased = self.leased.min(self.parts.get(replica).copied().unwrap_or(0));
        Ok(())
    }
}

struct Leases {
    sharing: Sharing,
    /// Held while an entry is being changed: so each change is made in sight of the one before.
    changing: Mutex<()>,
    inside: Mutex<Inside>,
    /// Nothing is leased ahead any more.
    closing: AtomicBool,
}

#[derive(Default)]
struct Inside {
    accounts: BTreeMap<At, Lease>,
    /// Entries changed before this have been seen.
    seen: i64,
    /// Etcd can't be asked: why.
    away: Option<String>,
    told: Option<Told>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

impl Leased {
    /// With what this replica remembers; fails if etcd doesn't answer.
    pub fn open(mut journal: Disk, sharing: Sharing) -> Result<Leased, EtcdError> {
        let mut inside = Inside::default();
        for slice in journal.taken() {
            let before = slice.elsewhere;
            let lease = Lease { before, spent: before, ..Lease::default() };
            inside.accounts.insert((slice.account, slice.window), lease);
        }
        let leases = Leases {
            sharing,
            changing: Mutex::default(),
            inside: Mutex::new(inside),
            closing: AtomicBool::new(false),
        };
        let leases = Arc::new(leases);
        leases.look()?;
        let failed = |error: std::io::Error| EtcdError::Config(error.to_string());
        let watched = Arc::downgrade(&leases);
        let thread = std::thread::Builder::new().name("weir-leases".into());
        thread.spawn(move || look_after(&watched)).map_err(failed)?;
        Ok(Leased { journal, leases })
    }
}

/// Until nobody has them any more.
fn look_after(leases: &Weak<Leases>) {
    loop {
        std::thread::sleep(LOOK);
        let Some(leases) = leases.upgrade() else { return };
        let looked = leases.look().and_then(|()| leases.adjust());
        leases.note_away(looked.err());
    }
}

impl Leases {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        lock(&self.inside)
    }

    fn replica(&self) -> &str {
        &self.sharing.replica
    }

    fn note_away(&self, error: Option<EtcdError>) {
        let why = error.map(|error| error.to_string());
        let mut inside = self.inside();
        match (&inside.away, &why) {
            (None, Some(why)) => tracing::warn!("{why}; budgets go on with what is leased"),
            (Some(_), None) => tracing::warn!("etcd answers again"),
            _ => {}
        }
        inside.away = why;
    }

    /// Sees what has changed.
    fn look(&self) -> Result<(), EtcdError> {
        let since = self.inside().seen + 1;
        let (found, at) = self.sharing.etcd.list(BOOKS, since)?;
        let mut inside = self.inside();
        // An older state was put back: all of it is news.
        inside.seen = if at + 1 < since { 0 } else { at };
        for entry in &found {
            let name = entry.key.strip_prefix(BOOKS).unwrap_or_default();
            let Some((window, account)) = window_of(name) else { continue };
            if lasts(&account, window, now_s()) {
                let lease = inside.accounts.entry((account, window)).or_default();
                // Nothing more of it is leased; the others are none the worse.
                if let Err(error) = lease.see(Some(entry), self.replica()) {
                    tracing::warn!("{error}");
                }
            }
        }
        self.tell(&mut inside);
        Ok(())
    }

    /// Tells what others have taken, where that has changed.
    fn tell(&self, inside: &mut Inside) {
        let Inside { accounts, told, .. } = inside;
        let Some(told) = told else { return };
        let mut news = Vec::new();
        for ((account, window), lease) in accounts {
            let elsewhere = lease.others(self.replica()).saturating_add(lease.before);
            if lease.told.replace(elsewhere) != Some(elsewhere) {
                news.push((account.clone(), *window, elsewhere));
            }
        }
        if !news.is_empty() {
            told(news);
        }
    }

    fn share(&self, lease: &Lease, held: u64) -> u64 {
        let Lease { limit, spent, .. } = *lease;
        let limit = limit.filter(|_| !self.closing.load(Ordering::Relaxed));
        let replicas = self.sharing.replicas.load(Ordering::Relaxed) as u64;
        let view = View { limit, others: lease.others(self.replica()), spent, held, replicas };
        // What is granted is never taken back.
        view.share().max(lease.used())
    }

    /// Leases ahead where little is left, and gives back what is too much.
    fn adjust(&self) -> Result<(), EtcdError> {
        let needs = |lease: &Lease| {
            let (used, share) = (lease.used(), self.share(lease, lease.held));
            let ahead = share - used;
            let there = lease.parts.get(self.replica()).copied().unwrap_or(0).max(lease.leased);
            lease.leased < used.saturating_add(ahead / 2)
                || there > used.saturating_add(ahead.saturating_mul(2))
        };
        let changed: Vec<At> = {
            let inside = self.inside();
            inside.accounts.iter().filter(|(_, lease)| needs(lease)).map(|(at, _)| at.clone()).collect()
        };
        let _changing = lock(&self.changing);
        changed.iter().try_for_each(|at| self.lease(at))
    }

    /// Leases what this replica should have of one window. The caller holds `changing`.
    fn lease(&self, at: &At) -> Result<(), EtcdError> {
        let key = format!("{BOOKS}{}", row(&at.0, at.1));
        for _ in 0..TRIES {
            let (parts, revision, target, changes) = {
                let mut inside = self.inside();
                let Some(lease) = inside.accounts.get_mut(at) else { return Ok(()) };
                let target = self.share(lease, lease.wish);
                lease.leased = lease.leased.min(target);
                let mut parts = lease.parts.clone();
                let before = parts.insert(self.replica().to_owned(), target);
                (parts, lease.revision, target, before != Some(target) || lease.leased < target)
            };
            let value = serde_json::to_vec(&parts).expect("strings and numbers always serialise");
            let put = Op::Put { key: key.clone(), value, lease: None };
            // Where nothing more is to be had it is only asked whether that is still so.
            let then: &[Op] = if changes { &[put] } else { &[] };
            let done = self.sharing.etcd.transact(&[(&key, revision)], then, &[Op::Get(key.clone())])?;
            let mut inside = self.inside();
            let Some(lease) = inside.accounts.get_mut(at) else { return Ok(()) };
            if done.succeeded && !changes {
                return Ok(());
            }
            if done.succeeded {
                (lease.parts, lease.revision, lease.leased) = (parts, done.revision, target);
                lease.grant();
                return Ok(());
            }
            // It may have been taken out, too.
            lease.revision = 0;
            lease.see(done.found.into_iter().next().flatten().as_ref(), self.replica())?;
        }
        Err(EtcdError::Away(format!("others change {key} all the time")))
    }

    /// Leases what these want beyond what there is, if etcd is there.
    fn fetch(&self, lacking: &[At]) {
        if lacking.is_empty() || self.inside().away.is_some() {
            return;
        }
        let fetched = {
            let _changing = lock(&self.changing);
            lacking.iter().try_for_each(|at| self.lease(at))
        };
        if let Err(error) = fetched {
            self.note_away(Some(error));
        }
        self.tell(&mut self.inside());
    }

    /// Takes in what is wanted; returns what there is not enough leased for.
    fn wish(&self, slices: &[Slice]) -> Vec<At> {
        let mut inside = self.inside();
        let mut lacking = Vec::new();
        for slice in slices {
            let at = (slice.account.clone(), slice.window);
            let lease = inside.accounts.entry(at.clone()).or_default();
            lease.limit = slice.limit.or(lease.limit);
            lease.spent = lease.before.saturating_add(slice.spent);
            lease.wish = slice.held;
            lease.grant();
            if lease.held < lease.wish || lease.spent > lease.leased {
                lacking.push(at);
            }
        }
        lacking
    }
}

impl Vault for Leased {
    fn taken(&mut self) -> Vec<Slice> {
        let inside = self.leases.inside();
        let slice = |((account, window), lease): (&At, &Lease)| {
            let elsewhere = lease.others(self.leases.replica()).saturating_add(lease.before);
            Slice { elsewhere, ..Slice::new(account.clone(), *window) }
        };
        inside.accounts.iter().map(slice).collect()
    }

    fn follow(&mut self, told: Told) {
        self.leases.inside().told = Some(told);
    }

    fn hold(&mut self, slices: &[Slice]) -> Result<Vec<Grant>, VaultError> {
        let lacking = self.leases.wish(slices);
        self.leases.fetch(&lacking);
        let (mut grants, mut written) = (Vec::with_capacity(slices.len()), Vec::with_capacity(slices.len()));
        {
            let inside = self.leases.inside();
            for slice in slices {
                let lease = inside.accounts.get(&(slice.account.clone(), slice.window));
                let (held, before) = lease.map_or((0, 0), |lease| (lease.held, lease.before));
                let unsure = if held < slice.held { inside.away.clone() } else { None };
                grants.push(Grant { held, unsure });
                written.push(Slice { elsewhere: before, held, ..slice.clone() });
            }
        }
        self.journal.hold(&written)?;
        Ok(grants)
    }

    fn forget(&mut self, over: &[(Account, i64)]) -> Result<(), VaultError> {
        self.journal.forget(over)?;
        let failed = |error: EtcdError| VaultError(error.to_string());
        if self.leases.inside().away.is_some() {
            return Ok(());
        }
        for at in over {
            self.leases.inside().accounts.remove(at);
            let key = format!("{BOOKS}{}", row(&at.0, at.1));
            self.leases.sharing.etcd.transact(&[], &[Op::Delete(key)], &[]).map_err(failed)?;
        }
        Ok(())
    }

    fn release(&mut self) {
        self.leases.closing.store(true, Ordering::Relaxed);
        if self.leases.inside().away.is_none()
            && let Err(error) = self.leases.adjust()
        {
            tracing::warn!("what was leased ahead stays taken until this replica is back: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
