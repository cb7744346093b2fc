//! What is spent, kept where it outlives this process: accounts with limits, and a row for each request that has ended.
//!
//! A request whose attempt is reserved for isn't sent before the reservation is on disk; requests that come at the same time
//! share one commit. Settlements are written with the next commit, which begins as soon as the one before has ended. So for
//! each account, what was spent is never more than what the books say, and that never more than what was spent and what is
//! reserved; after a crash, what was reserved counts as spent. Whoever reserves nothing never waits for the disk.
//!
//! Rows of ended requests are written twice a second; a crash may lose those of the last half. They are for people: limits
//! don't depend on them.
mod leases;
mod named;
mod share;
mod usage;
mod vault;

use crate::state::{KeptError, State, StateError};
pub use leases::Sharing;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{oneshot, watch};
pub use usage::{By, Row, Sum};
use vault::Vault;
pub use vault::{Grant, Slice};
use weir_scheduler::{Account, Entry};

/// Notes taken into one commit, at most.
const BATCH: usize = 4096;
/// Notes that wait for the disk, at most: then nothing more is reserved, and rows are dropped. Settlements always wait.
const WAITING_MAX: usize = 100_000;
/// How long rows wait.
const ROWS_WAIT: Duration = Duration::from_millis(500);

/// How often windows that are over are forgotten.
const TIDIED_EVERY: Duration = Duration::from_secs(600);

/// Why something can't be reserved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Others have taken what was left, or may have.
    #[error("what is left of a budget can't be reserved now; try again")]
    Taken,
    /// It can't be written down now: why.
    #[error("{0}")]
    Unwritten(String),
}

/// What the clerk is told.
enum Note {
    Reserve(Vec<Entry>, oneshot::Sender<Result<(), Refused>>),
    Settle(Vec<Entry>),
    Ended(Box<Row>),
    Flush(Sender<()>),
    Release(Sender<()>),
}

/// A reservation, and who waits for it.
type Wanted = (Vec<Entry>, oneshot::Sender<Result<(), Refused>>);

type Ledger = BTreeMap<(Account, i64), Slice>;

/// The books of a scheduler. One thread, the clerk's, writes; it ends with this.
pub struct Books {
    notes: Sender<Note>,
    waiting: Arc<AtomicUsize>,
    ledger: Arc<Mutex<Ledger>>,
    changed: watch::Receiver<()>,
    log: usage::Log,
}

impl fmt::Debug for Books {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Books")
    }
}

impl Books {
    /// Those in a state. What was reserved when the process before this one ended counts as spent.
    pub fn open(state: State, unix_s: i64) -> Result<Books, StateError> {
        let vault = vault::Disk::open(state.clone(), unix_s)?;
        let log = usage::Log::open(state, unix_s)?;
        Ok(Books::with(Box::new(vault), log))
    }

    /// The same, where accounts are shared with other schedulers: the state keeps what this one has spent of them.
    pub fn open_shared(state: State, sharing: Sharing, unix_s: i64) -> Result<Books, KeptError> {
        let journal = vault::Disk::open(state.clone(), unix_s)?;
        let vault = leases::Leased::open(journal, sharing)?;
        let log = usage::Log::open(state, unix_s)?;
        Ok(Books::with(Box::new(vault), log))
    }

    fn with(mut vault: Box<dyn Vault>, log: usage::Log) -> Books {
        let taken = vault.taken().into_iter();
        let ledger: Ledger = taken.map(|slice| ((slice.account.clone(), slice.window), slice)).collect();
        let ledger = Arc::new(Mutex::new(ledger));
        let (change, changed) = watch::channel(());
        let heard = ledger.clone();
        vault.follow(Box::new(move |news| {
            let mut ledger = lock(&heard);
            for (account, window, elsewhere) in news {
                let slice = ledger.entry((account.clone(), window));
                slice.or_insert_with(|| Slice::new(account, window)).elsewhere = elsewhere;
            }
            drop(ledger);
            // Perhaps nobody wants to know.
            _ = change.send(());
        }));
        let waiting = Arc::new(AtomicUsize::new(0));
        let (notes, told) = channel();
        let clerk = Clerk {
            vault,
            log: log.clone(),
            ledger: ledger.clone(),
            rows: Vec::new(),
            written: Instant::now(),
            tidied: Instant::now(),
        };
        let behind = waiting.clone();
        let work = move || clerk.run(&told, &behind);
        // Without the thread nothing is reserved, and that is said each time.
        if let Err(error) = std::thread::Builder::new().name("weir-books".into()).spawn(work) {
            tracing::error!("the books can't be kept: {error}");
        }
        Books { notes, waiting, ledger, changed, log }
    }

    /// What has been taken of each account in windows that may last.
    pub fn taken(&self) -> Vec<Slice> {
        lock(&self.ledger).values().cloned().collect()
    }

    /// Changes whenever others have taken something, or given it back.
    pub fn changed(&self) -> watch::Receiver<()> {
        self.changed.clone()
    }

    /// Puts a reservation on disk; the answer comes when it is there.
    pub fn reserve(&self, entries: Vec<Entry>) -> oneshot::Receiver<Result<(), Refused>> {
        let (reply, done) = oneshot::channel();
        if self.waiting.load(Ordering::Relaxed) >= WAITING_MAX {
            // Whoever asks is there.
            _ = reply.send(Err(Refused::Unwritten("too much waits for the disk; try again".into())));
            return done;
        }
        self.tell(Note::Reserve(entries, reply));
        done
    }

    /// Writes down what came of a reservation.
    pub fn settle(&self, entries: Vec<Entry>) {
        self.tell(Note::Settle(entries));
    }

    /// Writes down a request that has ended.
    pub fn ended(&self, row: Row) {
        if self.waiting.load(Ordering::Relaxed) < WAITING_MAX {
            self.tell(Note::Ended(Box::new(row)));
        }
    }

    /// Waits until all that was told before is on disk. Blocks.
    pub fn flush(&self) {
        let (reply, done) = channel();
        self.tell(Note::Flush(reply));
        // An error means that the clerk is gone, and nothing will be written.
        _ = done.recv();
    }

    /// The same; and what this scheduler could still have spent is everybody's again. Blocks.
    pub fn close(&self) {
        self.flush();
        let (reply, done) = channel();
        self.tell(Note::Release(reply));
        // As above.
        _ = done.recv();
    }

    /// Requests that ended from `since_ms` on (milliseconds since 1970), added up. Blocks.
    pub fn usage(&self, since_ms: u64, by: By) -> Result<Vec<Sum>, StateError> {
        self.flush();
        self.log.sums(since_ms, by)
    }

    fn tell(&self, note: Note) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // Without a clerk, replies are dropped, and whoever waits for one learns that.
        _ = self.notes.send(note);
    }
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whoever writes.
struct Clerk {
    vault: Box<dyn Vault>,
    log: usage::Log,
    ledger: Arc<Mutex<Ledger>>,
    rows: Vec<Row>,
    /// When rows were written last, and when windows were forgotten.
    written: Instant,
    tidied: Instant,
}

impl Clerk {
    fn run(mut self, told: &Receiver<Note>, behind: &AtomicUsize) {
        loop {
            let wait = ROWS_WAIT.saturating_sub(self.written.elapsed());
            let first = match self.rows.is_empty() {
                true => told.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => told.recv_timeout(wait),
            };
            match first {
                Ok(first) => {
                    let batch: Vec<Note> =
                        std::iter::once(first).chain(told.try_iter().take(BATCH - 1)).collect();
                    behind.fetch_sub(batch.len(), Ordering::Relaxed);
                    self.take_in(batch);
                }
                Err(RecvTimeoutError::Timeout) => self.write_rows(),
                Err(RecvTimeoutError::Disconnected) => return self.write_rows(),
            }
            if !self.rows.is_empty() && self.written.elapsed() >= ROWS_WAIT {
                self.write_rows();
            }
            if self.tidied.elapsed() >= TIDIED_EVERY {
                self.tidied = Instant::now();
                self.tidy(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64));
            }
        }
    }

    fn take_in(&mut self, batch: Vec<Note>) {
        let (mut wanted, mut flushes, mut changed) = (Vec::new(), Vec::new(), BTreeMap::new());
        for note in batch {
            match note {
                Note::Reserve(entries, reply) => {
                    self.apply(&entries, &mut changed, |slice, entry| {
                        slice.held = slice.held.saturating_add(entry.reserved);
                    });
                    wanted.push((entries, reply));
                }
                Note::Settle(entries) => self.settled(&entries, &mut changed),
                Note::Ended(row) => self.rows.push(*row),
                Note::Flush(reply) => flushes.push(reply),
                Note::Release(reply) => {
                    self.vault.release();
                    flushes.push(reply);
                }
            }
        }
        self.commit(wanted, changed);
        if !flushes.is_empty() {
            self.write_rows();
            // Whoever waited may have gone.
            flushes.into_iter().for_each(|flush| _ = flush.send(()));
        }
    }

    fn settled(&self, entries: &[Entry], changed: &mut Ledger) {
        self.apply(entries, changed, |slice, entry| {
            slice.held = slice.held.saturating_sub(entry.reserved);
            slice.spent = slice.spent.saturating_add(entry.spent);
        });
    }

    fn apply(&self, entries: &[Entry], changed: &mut Ledger, change: impl Fn(&mut Slice, &Entry)) {
        let mut ledger = lock(&self.ledger);
        for entry in entries {
            let at = (entry.account.clone(), entry.window);
            let slice =
                ledger.entry(at.clone()).or_insert_with(|| Slice::new(entry.account.clone(), entry.window));
            slice.limit = Some(entry.limit);
            change(slice, entry);
            changed.insert(at, slice.clone());
        }
    }

    /// Writes what has changed; whoever reserved hears of it.
    fn commit(&mut self, wanted: Vec<Wanted>, changed: Ledger) {
        if changed.is_empty() {
            return;
        }
        let slices: Vec<Slice> = changed.into_values().collect();
        let granted = self.vault.hold(&slices).unwrap_or_else(|why| {
            tracing::error!("the books can't be written: {why}");
            let unsure = Some(format!("the books can't be written: {why}"));
            slices.iter().map(|_| Grant { held: 0, unsure: unsure.clone() }).collect()
        });
        // What each slice has been granted too little, and why nobody knows whether there is more.
        let mut short: BTreeMap<(Account, i64), (u64, Option<String>)> = BTreeMap::new();
        for (slice, grant) in slices.into_iter().zip(granted) {
            if grant.held < slice.held {
                short.insert((slice.account, slice.window), (slice.held - grant.held, grant.unsure));
            }
        }
        // Who came last goes first.
        for (entries, reply) in wanted.into_iter().rev() {
            let mut lacks = None;
            for entry in &entries {
                let at = (entry.account.clone(), entry.window);
                if let Some((_, unsure)) = short.get(&at) {
                    let why = unsure.clone().map_or(Refused::Taken, Refused::Unwritten);
                    lacks = lacks.or(Some(why));
                }
            }
            if lacks.is_some() {
                for entry in &entries {
                    let at = (entry.account.clone(), entry.window);
                    if let Some((lack, _)) = short.get_mut(&at) {
                        *lack = lack.saturating_sub(entry.reserved);
                        if *lack == 0 {
                            short.remove(&at);
                        }
                    }
                }
            }
            // Whoever asked may have gone: it settles what it had reserved.
            _ = reply.send(lacks.map_or(Ok(()), Err));
        }
    }

    /// Forgets windows in which nothing can be spent any more.
    fn tidy(&mut self, unix_s: i64) {
        let mut over = Vec::new();
        lock(&self.ledger).retain(|(account, window), slice| {
            let keep = slice.held > 0 || vault::lasts(account, *window, unix_s);
            if !keep {
                over.push((account.clone(), *window));
            }
            keep
        });
        if let Err(error) = self.vault.forget(&over) {
            tracing::warn!("windows that are over stay in the books: {error}");
        }
    }

    fn write_rows(&mut self) {
        self.written = Instant::now();
        if self.rows.is_empty() {
            return;
        }
        if let Err(error) = self.log.append(&self.rows) {
            tracing::error!("{} requests that have ended are not in the books: {error}", self.rows.len());
        }
        self.rows.clear();
    }
}

#[cfg(test)]
mod tests;
