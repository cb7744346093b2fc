//! By a real etcd.
use super::*;
use crate::books::{Books, Refused};
use crate::etcd::EtcdConfig;
use crate::state::State;
use std::path::Path;
use std::time::Instant;
use weir_scheduler::{Entry, Holder, Period, Unit};
use weir_tests::EtcdServer;

fn account() -> Account {
    Account { holder: Holder::Key("alice".into()), unit: Unit::NanoUsd, period: Period::Month }
}

fn entry(limit: u64, reserved: u64, spent: u64) -> Vec<Entry> {
    let account = account();
    let window = account.period.window(now_s());
    vec![Entry { account, window, limit, reserved, spent }]
}

/// A replica of two, with its own state.
fn replica(server: &EtcdServer, folder: &Path) -> Books {
    let config = EtcdConfig { endpoints: vec![server.url()], prefix: "/weir/".into(), user: None, ca: None };
    let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
    let sharing =
        Sharing { etcd: Etcd::new(&config).unwrap(), replica: name, replicas: Arc::new(AtomicUsize::new(2)) };
    // The clerk of the process before has the file open for a moment longer.
    let state = loop {
        match State::open(folder) {
            Ok(state) => break state,
            Err(error) => assert!(error.in_use, "{error}"),
        }
    };
    Books::open_shared(state, sharing, now_s()).unwrap()
}

fn reserve(books: &Books, limit: u64, amount: u64) -> Result<(), Refused> {
    let answer = books.reserve(entry(limit, amount, 0)).blocking_recv().unwrap();
    if answer.is_err() {
        // As the scheduler does.
        books.settle(entry(limit, amount, 0));
    }
    answer
}

/// What etcd says of each replica.
fn parts(server: &EtcdServer) -> BTreeMap<String, u64> {
    let config = EtcdConfig { endpoints: vec![server.url()], prefix: "/weir/".into(), user: None, ca: None };
    let (found, _) = Etcd::new(&config).unwrap().list(BOOKS, 0).unwrap();
    found.first().map(|found| serde_json::from_slice(&found.value).unwrap()).unwrap_or_default()
}

fn wait_for(what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn two_replicas_use_a_budget_up_and_never_pass_it() {
    let Some(server) = EtcdServer::start() else { return };
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let books = folders.each_ref().map(|folder| replica(&server, folder.path()));
    let limit = 10_000;
    let spent: u64 = std::thread::scope(|scope| {
        let spend = |books| {
            move || {
                let (mut spent, mut refused) = (0, Instant::now());
                // Nothing was to be had for two seconds: it is used up.
                while refused.elapsed() < Duration::from_secs(2) {
                    match reserve(books, limit, 30) {
                        Ok(()) => {
                            books.settle(entry(limit, 30, 20));
                            (spent, refused) = (spent + 20, Instant::now());
                        }
                        Err(why) => {
                            assert_eq!(why, Refused::Taken);
                            std::thread::sleep(Duration::from_millis(20));
                        }
                    }
                }
                spent
            }
        };
        let clients: Vec<_> = books.iter().flat_map(|one| (0..4).map(|_| scope.spawn(spend(one)))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    println!("{spent} of {limit} spent");
    assert!(spent <= limit && limit - spent < 100, "{spent}");
    books.iter().for_each(Books::close);
    let leased: u64 = parts(&server).values().sum();
    assert_eq!(leased, spent, "once it is over the entry says what was spent");
}

#[test]
fn what_a_dead_replica_had_leased_counts_until_it_is_back() {
    let Some(server) = EtcdServer::start() else { return };
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let name = |n: usize| folders[n].path().file_name().unwrap().to_str().unwrap().to_owned();
    let [a, b] = folders.each_ref().map(|folder| replica(&server, folder.path()));
    reserve(&a, 1000, 100).unwrap();
    wait_for("a share of what is left is leased ahead", || parts(&server)[&name(0)] == 400);
    // Not settled: it is dead.
    drop(a);
    reserve(&b, 1000, 600).unwrap();
    assert_eq!(reserve(&b, 1000, 1), Err(Refused::Taken));
    b.flush();
    let seen = b.taken();
    assert_eq!((seen[0].elsewhere, seen[0].held), (400, 600));
    let a = replica(&server, folders[0].path());
    wait_for("it gives back what it had not reserved", || parts(&server)[&name(0)] == 100);
    wait_for("the other one hears of that", || b.taken()[0].elsewhere == 100);
    reserve(&b, 1000, 300).unwrap();
    assert_eq!(reserve(&a, 1000, 1), Err(Refused::Taken));
}

#[test]
fn while_etcd_is_away_what_is_leased_is_good_and_nothing_else() {
    let Some(mut server) = EtcdServer::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let books = replica(&server, folder.path());
    reserve(&books, 900, 30).unwrap();
    wait_for("a third of the rest", || parts(&server).values().sum::<u64>() == 320);
    let spend_up = |books: &Books, most: u64| {
        let began = Instant::now();
        let mut held = 0;
        let why = loop {
            match reserve(books, 900, 40) {
                Ok(()) => held += 40,
                Err(why) => break why,
            }
        };
        assert!(held <= most && began.elapsed() < Duration::from_secs(8), "{held} in {:?}", began.elapsed());
        (held, why)
    };
    server.signal("STOP");
    let (held, why) = spend_up(&books, 290);
    assert!(held >= 280 && matches!(why, Refused::Unwritten(_)), "{held}: {why}");
    let began = Instant::now();
    assert!(reserve(&books, 900, 40).is_err());
    assert!(began.elapsed() < Duration::from_millis(200), "nobody waits twice: {:?}", began.elapsed());
    server.signal("CONT");
    wait_for("etcd is found again", || reserve(&books, 900, 40).is_ok());
    server.kill();
    server.run();
    wait_for("and after a restart", || reserve(&books, 900, 40).is_ok());
    books.flush();
    let taken: u64 = books.taken().iter().map(Slice::taken).sum();
    assert!(parts(&server).values().sum::<u64>() >= taken && taken <= 900, "{taken}");
}
