use super::*;
use weir_scheduler::{Holder, Period, Unit};

fn account() -> Account {
    Account { holder: Holder::Everybody, unit: Unit::NanoUsd, period: Period::Day }
}

fn entry(reserved: u64, spent: u64) -> Vec<Entry> {
    vec![Entry { account: account(), window: 20_000, limit: 100, reserved, spent }]
}

/// 20,000 days after 1970.
const NOON: i64 = 20_000 * 86_400 + 43_200;

fn taken(books: &Books) -> Vec<(u64, u64, u64)> {
    books.flush();
    books.taken().iter().map(|s| (s.elsewhere, s.spent, s.held)).collect()
}

#[test]
fn what_was_reserved_when_a_process_died_is_spent() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Books::open(State::open(folder.path()).unwrap(), NOON).unwrap();
    let books = open();
    assert_eq!(books.reserve(entry(60, 0)).blocking_recv().unwrap(), Ok(()));
    assert_eq!(books.reserve(entry(30, 0)).blocking_recv().unwrap(), Ok(()));
    books.settle(entry(60, 20));
    assert_eq!(taken(&books), [(0, 20, 30)]);
    // The clerk has the file open for a moment longer.
    let again = |folder: &std::path::Path, unix_s| loop {
        match State::open(folder) {
            Ok(state) => return Books::open(state, unix_s).unwrap(),
            Err(error) => assert!(error.in_use, "{error}"),
        }
    };
    drop(books);
    let books = again(folder.path(), NOON);
    assert_eq!(taken(&books), [(50, 0, 0)]);
    assert_eq!(books.reserve(entry(10, 0)).blocking_recv().unwrap(), Ok(()));
    books.settle(entry(10, 7));
    assert_eq!(taken(&books), [(50, 7, 0)]);
    drop(books);
    let books = again(folder.path(), NOON);
    assert_eq!(taken(&books), [(57, 0, 0)]);
    drop(books);
    assert_eq!(taken(&again(folder.path(), NOON + 3 * 86_400)), [], "windows long past are forgotten");
}

#[test]
fn windows_that_are_over_are_forgotten_unless_something_is_reserved_there() {
    let folder = tempfile::tempdir().unwrap();
    let state = State::open(folder.path()).unwrap();
    let mut clerk = Clerk {
        vault: Box::new(vault::Disk::open(state.clone(), NOON).unwrap()),
        log: usage::Log::open(state.clone(), NOON).unwrap(),
        ledger: Arc::default(),
        rows: Vec::new(),
        written: Instant::now(),
        tidied: Instant::now(),
    };
    let (reply, _done) = oneshot::channel();
    clerk.take_in(vec![Note::Reserve(entry(60, 0), reply)]);
    clerk.tidy(NOON + 5 * 86_400);
    assert_eq!(lock(&clerk.ledger).len(), 1);
    clerk.take_in(vec![Note::Settle(entry(60, 20))]);
    clerk.tidy(NOON + 86_400);
    assert_eq!(lock(&clerk.ledger).len(), 1, "the day before is kept");
    clerk.tidy(NOON + 5 * 86_400);
    assert_eq!(lock(&clerk.ledger).len(), 0);
    assert!(vault::Disk::open(state, NOON).unwrap().taken().is_empty(), "on disk, too");
}

/// What several schedulers share: grants what is left.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<BTreeMap<usize, (u64, u64)>>>);

struct Mine(usize, Shared, bool);

impl Vault for Mine {
    fn taken(&mut self) -> Vec<Slice> {
        Vec::new()
    }

    fn hold(&mut self, slices: &[Slice]) -> Result<Vec<Grant>, vault::VaultError> {
        if self.2 {
            return Err(vault::VaultError("the disk is full".into()));
        }
        let mut all = self.1.0.lock().unwrap();
        let slice = &slices[0];
        let elsewhere =
            all.iter().filter(|(who, _)| **who != self.0).map(|(_, (spent, held))| spent + held).sum();
        let room = slice.limit.unwrap().saturating_sub(elsewhere).saturating_sub(slice.spent);
        let held = slice.held.min(room);
        all.insert(self.0, (slice.spent, held));
        Ok(vec![Grant { held, unsure: None }])
    }

    fn forget(&mut self, _: &[(Account, i64)]) -> Result<(), vault::VaultError> {
        Ok(())
    }
}

fn books(vault: Mine) -> (Books, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let log = usage::Log::open(State::open(folder.path()).unwrap(), 0).unwrap();
    (Books::with(Box::new(vault), log), folder)
}

#[test]
fn schedulers_that_share_a_budget_pass_it_together_no_more_than_one_alone() {
    let shared = Shared::default();
    let ours: Vec<_> = (0..2).map(|n| books(Mine(n, shared.clone(), false))).collect();
    let mut held = 0;
    for round in 0..20 {
        let (books, _) = &ours[round % 2];
        match books.reserve(entry(30, 0)).blocking_recv().unwrap() {
            Ok(()) => held += 30,
            // Whoever is refused settles.
            Err(_) => books.settle(entry(30, 0)),
        }
        books.flush();
        let all: u64 = shared.0.lock().unwrap().values().map(|(spent, held)| spent + held).sum();
        assert!(all <= 100 && held <= all, "round {round}: {held} of {all}");
    }
    assert_eq!(held, 90);
}

#[test]
fn what_cannot_be_written_is_not_reserved() {
    let (books, _folder) = books(Mine(0, Shared::default(), true));
    assert!(books.reserve(entry(1, 0)).blocking_recv().unwrap().is_err());
}
