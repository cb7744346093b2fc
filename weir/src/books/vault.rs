//! Where accounts are kept: on the disk of one scheduler, or wherever several share them.
use super::named;
use crate::state::{State, StateError, Table};
use redb::TableDefinition;
use serde::{Deserialize, Serialize};
use std::fmt;
use weir_scheduler::Account;

const BOOKS: Table<&str> = TableDefinition::new("books");
/// Windows before the present one that are kept.
const WINDOWS_KEPT: i64 = 1;

/// A window of an account, as this process knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Which.
    pub account: Account,
    /// Which of its windows.
    pub window: i64,
    /// What may be taken in all, by whomever; without a limit where none is known.
    pub limit: Option<u64>,
    /// Taken by others, or before this process began. What others have leased counts as taken.
    pub elsewhere: u64,
    /// Spent by this process.
    pub spent: u64,
    /// What this process may spend beyond that: what it has reserved.
    pub held: u64,
}

impl Slice {
    /// Nothing taken yet.
    pub fn new(account: Account, window: i64) -> Slice {
        Slice { account, window, limit: None, elsewhere: 0, spent: 0, held: 0 }
    }

    /// All that is taken.
    pub fn taken(&self) -> u64 {
        self.elsewhere.saturating_add(self.spent).saturating_add(self.held)
    }
}

/// What a process has been granted of what it wanted to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// It may spend so much beyond what it has; if it dies, this counts as spent.
    pub held: u64,
    /// Whether more can be had nobody can say now: why.
    pub unsure: Option<String>,
}

/// Hears what others have taken of accounts in windows, whenever that changes.
pub(super) type Told = Box<dyn Fn(Vec<(Account, i64, u64)>) + Send>;

/// Keeps accounts so that they outlive a process, and, where several schedulers spend from them, so that all together stay
/// within their limits: each leases a slice of what is left by holding it, and settles by holding less and having spent more.
pub(super) trait Vault: Send {
    /// What has been taken of each account in windows that may last, by others and before.
    fn taken(&mut self) -> Vec<Slice>;

    /// From when this returns, this process has spent and holds so much, whatever becomes of it. For each slice, what it was
    /// granted: what it holds already is never taken from it.
    fn hold(&mut self, slices: &[Slice]) -> Result<Vec<Grant>, VaultError>;

    /// These windows are over, and nothing is held in them.
    fn forget(&mut self, over: &[(Account, i64)]) -> Result<(), VaultError>;

    /// Who wants to hear of others. Called once, if at all.
    fn follow(&mut self, _told: Told) {}

    /// This process ends: what it could have spent and hasn't is everybody's.
    fn release(&mut self) {}
}

/// Whether a window is of interest yet.
pub(super) fn lasts(account: &Account, window: i64, unix_s: i64) -> bool {
    window >= account.period.window(unix_s) - WINDOWS_KEPT
}

/// What a window of an account is called on disk and between schedulers.
pub(super) fn row(account: &Account, window: i64) -> String {
    format!("{window} {}", named::name(account))
}

/// The window that is called so.
pub(super) fn window_of(row: &str) -> Option<(i64, Account)> {
    let (window, name) = row.split_once(' ')?;
    Some((window.parse().ok()?, named::account(name)?))
}

/// Why nothing was written.
#[derive(Debug)]
pub(super) struct VaultError(pub String);

impl fmt::Display for VaultError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is on disk of a slice: nobody else spends from it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Kept {
    spent: u64,
    held: u64,
}

/// The state's redb.
pub(super) struct Disk {
    state: State,
    found: Vec<Slice>,
}

impl Disk {
    pub fn open(state: State, unix_s: i64) -> Result<Disk, StateError> {
        let mut found = Vec::new();
        for (name, kept) in state.all::<_, Kept, _>(BOOKS, str::to_owned)? {
            match window_of(&name).filter(|(window, account)| lasts(account, *window, unix_s)) {
                Some((window, account)) => {
                    let elsewhere = kept.spent.saturating_add(kept.held);
                    found.push(Slice { elsewhere, ..Slice::new(account, window) });
                }
                None => state.set::<_, Kept>(BOOKS, name.as_str(), None)?,
            }
        }
        Ok(Disk { state, found })
    }
}

impl Vault for Disk {
    fn taken(&mut self) -> Vec<Slice> {
        std::mem::take(&mut self.found)
    }

    fn hold(&mut self, slices: &[Slice]) -> Result<Vec<Grant>, VaultError> {
        let write = || {
            let write = self.state.database().begin_write()?;
            {
                let mut table = write.open_table(BOOKS)?;
                for slice in slices {
                    let name = row(&slice.account, slice.window);
                    let kept = Kept { spent: slice.elsewhere.saturating_add(slice.spent), held: slice.held };
                    let json = serde_json::to_vec(&kept).expect("numbers always serialise");
                    table.insert(name.as_str(), json.as_slice())?;
                }
            }
            Ok(write.commit()?)
        };
        self.state.told(write).map_err(|error| VaultError(error.to_string()))?;
        Ok(slices.iter().map(|s| Grant { held: s.held, unsure: None }).collect())
    }

    fn forget(&mut self, over: &[(Account, i64)]) -> Result<(), VaultError> {
        if over.is_empty() {
            return Ok(());
        }
        let write = || {
            let write = self.state.database().begin_write()?;
            {
                let mut table = write.open_table(BOOKS)?;
                for (account, window) in over {
                    table.remove(row(account, *window).as_str())?;
                }
            }
            Ok(write.commit()?)
        };
        self.state.told(write).map_err(|error| VaultError(error.to_string()))
    }
}
