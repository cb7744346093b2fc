//! Two schedulers that share a cluster by a real etcd, by processes: one dies, etcd goes away, and clients, nodes and budgets
//! go on.
use super::cluster::ask;
use crate::mock::{Mock, Script};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use weir_tests::{Connection, EtcdServer, Node, Serve, free_address, weir};

/// What the provider charges for each answer, in billionths of a dollar, and what is reserved: see the tests of keys.
const COST: u64 = 10 * 1000 + 2 * 2000;
const WORST: u64 = 4 * 6 * 1000 + 40 * 2000;

/// One of several schedulers, and what outlives it.
struct Replica {
    serve: Option<Serve>,
    state: TempDir,
    http: SocketAddr,
    listen: SocketAddr,
    etcd: String,
    config: String,
}

impl Replica {
    fn open(etcd: &EtcdServer, config: &str) -> Replica {
        let (http, listen, state) = (free_address(), free_address(), tempfile::tempdir().unwrap());
        let config = config.to_owned();
        let mut replica = Replica { serve: None, state, http, listen, etcd: etcd.url(), config };
        replica.start();
        replica
    }

    fn start(&mut self) {
        let (listen, state) = (self.listen.to_string(), self.state.path().to_str().unwrap().to_owned());
        let arguments = ["--no-node", "--listen", &listen, "--state", &state, "--etcd", &self.etcd];
        self.serve = Some(Serve::awake_with(self.http, &arguments, &[("WEIR_CONFIG", &self.config)]));
    }

    fn kill(&mut self) {
        self.serve = None;
    }

    /// What `weir WORDS --state DIR` writes.
    fn run(&self, words: &[&str]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let out = weir(folder.path()).args(words).arg("--state").arg(self.state.path()).output().unwrap();
        assert!(out.status.success(), "weir {words:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    }

    fn states(&self) -> Vec<(String, String)> {
        let nodes: Value = serde_json::from_str(&self.run(&["nodes", "--json"])).unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let nodes = nodes.as_array().unwrap().iter().filter(|node| node["trust"] != "provider");
        let mut all: Vec<_> = nodes.map(|n| (text(&n["name"]), text(&n["state"]))).collect();
        all.sort();
        all
    }

    fn wait_for(&self, wanted: &[(&str, &str)]) {
        let wanted: Vec<(String, String)> = wanted.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
        within(40, &format!("{wanted:?}"), || self.states() == wanted);
    }

    /// The status and the body of an answer; 0 where there was none.
    fn post(&self, path: &str, body: &str, key: &str) -> (u16, Value) {
        post(self.http, path, body, key)
    }
}

fn post(at: SocketAddr, path: &str, body: &str, key: &str) -> (u16, Value) {
    let headers = if key.is_empty() { String::new() } else { format!("authorization: Bearer {key}\r\n") };
    let reply = Connection::open_as(at, "POST", path, body, &headers).and_then(Connection::reply);
    let Ok(reply) = reply else { return (0, Value::Null) };
    (reply.status, serde_json::from_str(&reply.body).unwrap_or_default())
}

fn within(seconds: u64, what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !is() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Two schedulers, and a configuration that names a provider which costs.
struct House {
    etcd: EtcdServer,
    mock: Mock,
    replicas: [Replica; 2],
    _folder: TempDir,
}

impl House {
    fn open() -> Option<House> {
        let etcd = EtcdServer::start()?;
        let mock = Mock::start(vec![Script::chat(&["It ", "scatters."]).slow(Duration::from_millis(15))]);
        let folder = tempfile::tempdir().unwrap();
        let (key, config) = (folder.path().join("key"), folder.path().join("weir.toml"));
        std::fs::write(&key, "sk-secret-123\n").unwrap();
        let url = &mock.url;
        let models =
            "models = [{ name = \"m\", context = 4000, usd_per_mtok = { prompt = 1.0, output = 2.0 } }]";
        let text = format!(
            "[[provider]]\nname = \"mock\"\nurl = \"{url}\"\nslots = 200\nkey_file = {key:?}\n{models}\n"
        );
        std::fs::write(&config, text).unwrap();
        let replicas = [(); 2].map(|()| Replica::open(&etcd, config.to_str().unwrap()));
        Some(House { etcd, mock, replicas, _folder: folder })
    }

    fn nodes(&self, names: &[&str], model: &str) -> Vec<Node> {
        let link = self.replicas[0].run(&["link", "--uses", &names.len().to_string()]);
        let nodes = names.iter().map(|name| Node::join(name, &link, model)).collect();
        let wanted: Vec<_> = names.iter().map(|name| (*name, "connected")).collect();
        self.replicas.iter().for_each(|replica| replica.wait_for(&wanted));
        nodes
    }

    /// A key with room for so many requests, made at the first scheduler and good at the second.
    fn key(&self, room: u64) -> (String, u64) {
        let limit = room * WORST;
        let key =
            self.replicas[0].run(&["key", "add", "alice", "--budget", &format!("0.{limit:09}usd/month")]);
        within(5, "the other scheduler knows the key", || {
            let status = |key: &str| self.replicas[1].post("/v1/chat/completions", "{}", key).0;
            status(&key) != 401 && status("") == 401
        });
        (key, limit)
    }

    fn charged(&self) -> u64 {
        self.mock.seen().len() as u64 * COST
    }

    /// What the books say is taken of the first limit of the first key.
    fn taken(&self, at: usize) -> u64 {
        let keys: Value = serde_json::from_str(&self.replicas[at].run(&["key", "list", "--json"])).unwrap();
        let limit = &keys[0]["limits"][0];
        limit["spent"].as_u64().unwrap() + limit["reserved"].as_u64().unwrap()
    }
}

fn question() -> String {
    json!({ "model": "mock/m", "messages": [{ "role": "user", "content": "Why?" }], "max_tokens": 40 })
        .to_string()
}

#[test]
fn two_schedulers_are_one_cluster() {
    let Some(mut house) = House::open() else { return };
    let mut nodes = house.nodes(&["a", "b"], "null");
    for replica in &house.replicas {
        let (status, body) = replica.post("/v1/completions", &ask("Grüß Gott", 20).to_string(), "");
        assert_eq!((status, &body["usage"]["completion_tokens"]), (200, &json!(20)), "{body}");
    }
    // A token counts at both.
    let link = house.replicas[0].run(&["link"]);
    assert!(link.contains(&house.replicas[1].listen.to_string()), "a link knows both: {link}");
    nodes.push(Node::join("c", &link, "null"));
    house.replicas[1].wait_for(&[("a", "connected"), ("b", "connected"), ("c", "connected")]);
    let (_, rest) = link.strip_prefix("weir://").unwrap().split_once('/').unwrap();
    let mut late = Node::join("late", &format!("weir://{}/{rest}", house.replicas[1].listen), "null");
    assert_eq!(late.ended(Duration::from_secs(30)).code(), Some(1));
    assert!(late.stderr().contains("used up"), "{}", late.stderr());
    // What is decided at one holds at the other.
    house.replicas[0].run(&["drain", "b"]);
    house.replicas[1].wait_for(&[("a", "connected"), ("b", "draining"), ("c", "connected")]);
    house.replicas[1].run(&["revoke", "c"]);
    house.replicas[0].wait_for(&[("a", "connected"), ("b", "draining"), ("c", "revoked")]);
    assert_eq!(nodes.pop().unwrap().ended(Duration::from_secs(20)).code(), Some(1), "it is out for good");
    let bob = house.replicas[1].run(&["key", "add", "bob"]);
    let carol = house.replicas[0].run(&["key", "add", "carol"]);
    let status =
        |at: usize, key: &str| house.replicas[at].post("/v1/completions", &ask("x", 3).to_string(), key).0;
    for key in [&bob, &carol] {
        within(3, "a key is good at both", || status(0, key) == 200 && status(1, key) == 200);
    }
    within(3, "and nobody comes in without", || status(0, "") == 401 && status(1, "") == 401);
    house.replicas[0].run(&["key", "revoke", "bob"]);
    within(3, "a revoked one is good at none", || status(0, &bob) == 401 && status(1, &bob) == 401);
    // A node whose first scheduler is dead finds the other by what it remembers; and so does that, when it is back.
    house.replicas[0].kill();
    let b = nodes.pop().unwrap();
    let a = nodes.pop().unwrap().again("a", "null");
    house.replicas[1].wait_for(&[("a", "connected"), ("b", "draining"), ("c", "revoked")]);
    house.replicas[0].start();
    house.replicas[0].wait_for(&[("a", "connected"), ("b", "draining"), ("c", "revoked")]);
    assert_eq!(status_of(&house.replicas[0], &carol), 200);
    drop((a, b));
}

fn status_of(replica: &Replica, key: &str) -> u16 {
    replica.post("/v1/completions", &ask("x", 3).to_string(), key).0
}

#[test]
fn a_scheduler_dies_and_its_clients_go_on_with_the_other() {
    let Some(mut house) = House::open() else { return };
    let _nodes = house.nodes(&["a", "b", "c"], "null:step_us=5000,vocab=1000");
    let body = |n: usize| ask(&format!("Story number {n}:"), 60).to_string();
    let text = |reply: &Value| reply["choices"][0]["text"].as_str().unwrap_or_default().to_owned();
    let addresses = house.replicas.each_ref().map(|replica| replica.http);
    let expected: Vec<String> =
        (0..12).map(|n| text(&post(addresses[1], "/v1/completions", &body(n), "").1)).collect();
    let (calm, retried) = (AtomicBool::new(false), AtomicUsize::new(0));
    let done: usize = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..12)
            .map(|n| {
                let (calm, retried, expected) = (&calm, &retried, &expected[n]);
                scope.spawn(move || {
                    let (mut done, mut at) = (0, n % 2);
                    while done == 0 || !calm.load(Ordering::SeqCst) {
                        let began = Instant::now();
                        let answer = loop {
                            match post(addresses[at], "/v1/completions", &body(n), "") {
                                (200, answer) => break answer,
                                // As a client does that knows both.
                                _ => at = 1 - at,
                            }
                            retried.fetch_add(1, Ordering::SeqCst);
                            assert!(began.elapsed() < Duration::from_secs(20), "client {n} is not answered");
                            std::thread::sleep(Duration::from_millis(50));
                        };
                        assert_eq!(text(&answer), *expected, "client {n}");
                        done += 1;
                    }
                    done
                })
            })
            .collect();
        std::thread::sleep(Duration::from_secs(2));
        house.replicas[0].kill();
        std::thread::sleep(Duration::from_secs(3));
        let here = [("a", "connected"), ("b", "connected"), ("c", "connected")];
        house.replicas[1].wait_for(&here);
        house.replicas[0].start();
        house.replicas[0].wait_for(&here);
        house.replicas[1].kill();
        std::thread::sleep(Duration::from_secs(2));
        calm.store(true, Ordering::SeqCst);
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    println!("{done} answers, {} tried again", retried.into_inner());
    let status = |at: SocketAddr| post(at, "/v1/completions", &body(0), "").0;
    assert_eq!((status(addresses[0]), status(addresses[1])), (200, 0));
}

#[test]
fn five_hundred_over_two_schedulers_do_not_pass_a_budget_with_room_for_fifty() {
    let Some(mut house) = House::open() else { return };
    let (key, limit) = house.key(50);
    let addresses = house.replicas.each_ref().map(|replica| replica.http);
    let (good, refused, died) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for n in 0..500 {
            let (key, good, refused, died) = (&key, &good, &refused, &died);
            scope.spawn(move || {
                // Over some seconds, so that what is given back is leased again.
                std::thread::sleep(Duration::from_millis(n / 50 * 200));
                let at = n as usize % 2;
                let (mut status, mut body) = post(addresses[at], "/v1/chat/completions", &question(), key);
                if status == 0 {
                    died.fetch_add(1, Ordering::SeqCst);
                    (status, body) = post(addresses[1 - at], "/v1/chat/completions", &question(), key);
                }
                match status {
                    200 => _ = good.fetch_add(1, Ordering::SeqCst),
                    429 => {
                        assert_eq!(body["error"]["type"], "insufficient_quota", "{body}");
                        refused.fetch_add(1, Ordering::SeqCst);
                    }
                    _ => panic!("{status}: {body}"),
                }
            });
        }
        std::thread::sleep(Duration::from_millis(700));
        house.replicas[0].kill();
    });
    let (good, refused, died) = (good.into_inner() as u64, refused.into_inner(), died.into_inner() as u64);
    let charged = house.charged();
    println!("{good} answered, {refused} refused, {died} met a dead scheduler; {charged} of {limit} spent");
    assert!(charged <= limit, "{charged} of {limit}");
    assert!(good * COST <= charged && charged <= (good + died) * COST);
    assert!(good >= 25, "a dead scheduler keeps no more than its share: {good}");
    assert!((charged..=limit).contains(&house.taken(1)), "{charged}, {}, {limit}", house.taken(1));
    // It gives back what it had not reserved; then the rest is used up, over both.
    house.replicas[0].start();
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_secs(3) {
        for at in addresses {
            match post(at, "/v1/chat/completions", &question(), &key).0 {
                200 => last = Instant::now(),
                429 => std::thread::sleep(Duration::from_millis(50)),
                other => panic!("{other}"),
            }
        }
    }
    let (charged, taken) = (house.charged(), house.taken(0));
    println!("in the end {charged} charged, {taken} taken of {limit}");
    assert!(charged <= taken && taken <= limit && limit - taken < 2 * WORST, "{charged} {taken} {limit}");
    assert!(taken <= charged + died * WORST, "no more is lost than what was in flight when it died");
}

/// Etcd is away for some seconds, by `away` and `back`, while clients ask.
fn check_without_etcd(away: impl FnOnce(&mut EtcdServer), back: impl FnOnce(&mut EtcdServer)) {
    let long = match std::env::var_os("WEIR_TEST_FULL") {
        Some(_) => Duration::from_secs(30),
        None => Duration::from_secs(5),
    };
    let Some(mut house) = House::open() else { return };
    let _nodes = house.nodes(&["a", "b"], "null:step_us=2000,vocab=1000");
    let (key, limit) = house.key(400);
    let owner = house.replicas[0].run(&["key", "add", "owner"]);
    within(5, "both keys are known", || house.replicas.iter().all(|r| status_of(r, &owner) == 200));
    let addresses = house.replicas.each_ref().map(|replica| replica.http);
    let (calm, gone) = (AtomicBool::new(false), AtomicBool::new(false));
    let [free, paid, meanwhile, refused] = [(); 4].map(|()| AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for n in 0..4 {
            let (calm, gone, free, owner) = (&calm, &gone, &free, &owner);
            scope.spawn(move || {
                while !calm.load(Ordering::SeqCst) {
                    let (status, body) =
                        post(addresses[n % 2], "/v1/completions", &ask("on and on", 20).to_string(), owner);
                    assert_eq!(status, 200, "who has no budget is served (away: {gone:?}): {body}");
                    free.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for n in 0..4 {
            let (calm, gone, key) = (&calm, &gone, &key);
            let (paid, meanwhile, refused) = (&paid, &meanwhile, &refused);
            scope.spawn(move || {
                while !calm.load(Ordering::SeqCst) {
                    let (status, body) = post(addresses[n % 2], "/v1/chat/completions", &question(), key);
                    match status {
                        200 => {
                            let counted = if gone.load(Ordering::SeqCst) { meanwhile } else { paid };
                            counted.fetch_add(1, Ordering::SeqCst);
                        }
                        429 => _ = refused.fetch_add(1, Ordering::SeqCst),
                        503 => {
                            assert_eq!(body["error"]["code"], "accounts_unavailable", "{body}");
                            assert!(body["error"]["message"].as_str().unwrap().contains("etcd"), "{body}");
                            refused.fetch_add(1, Ordering::SeqCst);
                        }
                        _ => panic!("{status}: {body}"),
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        }
        std::thread::sleep(Duration::from_secs(2));
        away(&mut house.etcd);
        gone.store(true, Ordering::SeqCst);
        std::thread::sleep(long);
        let here = [("a", "connected"), ("b", "connected")];
        house.replicas.iter().for_each(|replica| replica.wait_for(&here));
        gone.store(false, Ordering::SeqCst);
        back(&mut house.etcd);
        std::thread::sleep(Duration::from_secs(3));
        calm.store(true, Ordering::SeqCst);
    });
    let [free, paid, meanwhile, refused] = [free, paid, meanwhile, refused].map(AtomicUsize::into_inner);
    let charged = house.charged();
    println!(
        "etcd was away for {long:?}: {free} answers for nothing, {paid} paid, {meanwhile} of them meanwhile, \
         {refused} refused; {charged} of {limit} spent"
    );
    assert!(meanwhile >= 20, "what was leased is served");
    assert!(charged <= limit && charged == (paid + meanwhile) as u64 * COST);
    within(5, "the books say what was spent, and a little ahead", || {
        let taken = house.taken(0);
        charged <= taken && taken <= limit
    });
    let bob = house.replicas[1].run(&["key", "add", "bob"]);
    within(5, "what is decided is shared again", || status_of(&house.replicas[0], &bob) == 200);
}

#[test]
fn etcd_stops_for_a_while_and_serving_goes_on() {
    check_without_etcd(|etcd| etcd.signal("STOP"), |etcd| etcd.signal("CONT"));
}

#[test]
fn etcd_is_killed_and_comes_back_and_serving_goes_on() {
    check_without_etcd(EtcdServer::kill, EtcdServer::run);
}
