//! Several machines as one, by processes: a scheduler, and nodes that join it.
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use weir_tests::{Connection, Node, Serve, Wire, free_address, model, weir};

/// A null model that takes its time, so that there is a middle to interrupt.
const PACED: &str = "null:step_us=5000,vocab=1000";

/// A scheduler without a model, and what outlives it.
pub(crate) struct House {
    serve: Option<Serve>,
    state: TempDir,
    http: SocketAddr,
    pub(crate) listen: SocketAddr,
}

impl House {
    pub(crate) fn open() -> House {
        let (state, http, listen) = (tempfile::tempdir().unwrap(), free_address(), free_address());
        let mut house = House { serve: None, state, http, listen };
        house.start();
        house
    }

    fn start(&mut self) {
        let (listen, state) = (self.listen.to_string(), self.state.path().to_str().unwrap().to_owned());
        let arguments = ["--no-node", "--listen", &listen, "--state", &state];
        self.serve = Some(Serve::awake(self.http, &arguments));
    }

    /// Killed, not asked: nothing is saved at the end.
    pub(crate) fn restart(&mut self) {
        self.serve = None;
        std::thread::sleep(Duration::from_millis(500));
        self.start();
    }

    pub(crate) fn serve(&self) -> &Serve {
        self.serve.as_ref().unwrap()
    }

    /// Runs `weir WORDS --state DIR`: its exit code, what it wrote and what it said.
    fn weir(&self, words: &[&str]) -> (i32, String, String) {
        let folder = tempfile::tempdir().unwrap();
        let mut command = weir(folder.path());
        let out = command.args(words).arg("--state").arg(self.state.path()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        (out.status.code().unwrap_or(-1), text(&out.stdout), text(&out.stderr))
    }

    pub(crate) fn link(&self, flags: &[&str]) -> String {
        let (code, link, said) = self.weir(&[&["link"], flags].concat());
        assert_eq!(code, 0, "{said}");
        assert!(link.starts_with("weir://") && !link.contains('\n'), "{link}");
        link
    }

    pub(crate) fn nodes(&self) -> Vec<Value> {
        let (code, out, said) = self.weir(&["nodes", "--json"]);
        assert_eq!(code, 0, "{said}");
        serde_json::from_str(&out).unwrap()
    }

    /// Waits until the nodes are those, by name and state, whatever their order.
    pub(crate) fn wait_for(&self, wanted: &[(&str, &str)]) {
        let mut wanted: Vec<(String, String)> =
            wanted.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
        wanted.sort();
        let end = Instant::now() + Duration::from_secs(40);
        loop {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let mut now: Vec<_> =
                self.nodes().iter().map(|n| (text(&n["name"]), text(&n["state"]))).collect();
            now.sort();
            if now == wanted {
                return;
            }
            assert!(Instant::now() < end, "{now:?} instead of {wanted:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn complete(&self, body: &Value) -> Value {
        let reply = self.serve().post("/v1/completions", &body.to_string()).unwrap();
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()
    }
}

pub(crate) fn ask(prompt: &str, tokens: u32) -> Value {
    json!({ "model": "null", "prompt": prompt, "max_tokens": tokens, "ignore_eos": true, "temperature": 0 })
}

fn text(reply: &Value) -> String {
    reply["choices"][0]["text"].as_str().unwrap_or_default().to_owned()
}

/// The text of a stream, piece by piece, and the nodes that took part.
struct Stream {
    connection: Connection,
    raw: String,
}

impl Stream {
    fn open(house: &House, body: &Value) -> Stream {
        let mut body = body.clone();
        body["stream"] = true.into();
        let connection = Connection::open(house.http, "POST", "/v1/completions", &body.to_string()).unwrap();
        Stream { connection, raw: String::new() }
    }

    /// Reads until so much text has come.
    fn read(&mut self, bytes: usize) {
        while self.text().len() < bytes {
            let some = self.connection.some().unwrap();
            assert!(!some.is_empty(), "the stream ended early: {}", self.raw);
            self.raw += &some;
        }
    }

    fn chunks(&self) -> impl Iterator<Item = Value> + '_ {
        self.raw.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
    }

    fn text(&self) -> String {
        self.chunks().map(|chunk: Value| text(&chunk)).collect()
    }

    /// Reads to the end: the text, and the names of the nodes that took part.
    fn end(mut self) -> (String, Vec<String>) {
        loop {
            let some = self.connection.some().unwrap();
            if some.is_empty() {
                break;
            }
            self.raw += &some;
        }
        assert!(self.raw.contains("[DONE]"), "{}", &self.raw[self.raw.len().saturating_sub(2000)..]);
        let nodes = self.chunks().filter_map(|c: Value| c["weir"]["nodes"].as_array().cloned()).last();
        let names =
            nodes.unwrap_or_default().iter().map(|n| n.as_str().unwrap_or_default().to_owned()).collect();
        (self.text(), names)
    }
}

#[test]
fn a_machine_joins_by_link_and_answers() {
    let house = House::open();
    let _node = Node::join("attic", &house.link(&[]), "null");
    house.wait_for(&[("attic", "connected")]);
    let models = house.serve().get("/v1/models").unwrap().json();
    assert_eq!(models["data"][0]["id"], "null", "the tokenizer came from the node: {models}");
    let reply = house.complete(&ask("Grüß Gott", 20));
    assert_eq!(reply["usage"]["completion_tokens"], 20, "{reply}");
    let (code, shown, _) = house.weir(&["nodes"]);
    assert!(code == 0 && shown.contains("attic") && shown.contains("connected"), "{shown}");
}

#[test]
fn who_may_not_join_is_told_why() {
    let mut house = House::open();
    let used = house.link(&["--uses", "1"]);
    let _first = Node::join("first", &used, "null");
    house.wait_for(&[("first", "connected")]);
    let refused = |link: &str, words: &str| {
        let mut node = Node::join("stranger", link, "null");
        assert_eq!(node.ended(Duration::from_secs(30)).code(), Some(1));
        assert!(node.stderr().contains(words), "{words:?} in: {}", node.stderr());
    };
    refused(&used, "used up");
    let expired = house.link(&["--expires", "1s"]);
    std::thread::sleep(Duration::from_millis(2100));
    refused(&expired, "expired");
    let (front, token) = used.rsplit_once('/').unwrap();
    refused(&format!("{front}/{}", "0".repeat(token.len())), "not valid");
    let (front, pinned) = front.rsplit_once('/').unwrap();
    refused(&format!("{front}/{}/{token}", "0".repeat(pinned.len())), "another cluster");
    house.wait_for(&[("first", "connected")]);
    let logged = house.serve().stderr();
    assert_eq!(logged.matches("turned away").count(), 1, "three refusals for one reason: {logged}");
    house.serve = None;
    let (code, _, said) = house.weir(&["nodes"]);
    assert!(code == 1 && said.contains("killed"), "{said}");
}

#[test]
fn a_revoked_node_is_cut_at_once_and_stays_out() {
    let house = House::open();
    let link = house.link(&["--uses", "2"]);
    let mut bad = Node::join("bad", &link, PACED);
    house.wait_for(&[("bad", "connected")]);
    let mut stream = Stream::open(&house, &ask("on and on", 400));
    stream.read(20);
    let _good = Node::join("good", &link, PACED);
    house.wait_for(&[("bad", "connected"), ("good", "connected")]);
    let (code, _, said) = house.weir(&["revoke", "bad"]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(bad.ended(Duration::from_secs(20)).code(), Some(1));
    assert!(bad.stderr().contains("revoked"), "{}", bad.stderr());
    let (moved, nodes) = stream.end();
    assert_eq!(nodes, ["bad", "good"]);
    assert_eq!(moved, text(&house.complete(&ask("on and on", 400))));
    house.wait_for(&[("bad", "revoked"), ("good", "connected")]);
    let mut bad = bad.again("bad", PACED);
    assert_eq!(bad.ended(Duration::from_secs(20)).code(), Some(1), "{}", bad.stderr());
    let (code, _, said) = house.weir(&["revoke", "nobody"]);
    assert!(code == 1 && said.contains("weir nodes"), "{said}");
}

#[test]
fn nodes_come_back_to_a_restarted_scheduler() {
    let mut house = House::open();
    let link = house.link(&["--uses", "2"]);
    let nodes = [Node::join("a", &link, "null"), Node::join("b", &link, "null")];
    house.wait_for(&[("a", "connected"), ("b", "connected")]);
    let (code, _, said) = house.weir(&["drain", "b"]);
    assert_eq!(code, 0, "{said}");
    house.restart();
    house.wait_for(&[("a", "connected"), ("b", "draining")]);
    assert_eq!(house.complete(&ask("x", 5))["usage"]["completion_tokens"], 5);
    let (code, _, said) = house.weir(&["drain", "b", "--off"]);
    assert_eq!(code, 0, "{said}");
    house.wait_for(&[("a", "connected"), ("b", "connected")]);
    let [a, b] = nodes;
    let _a = a.again("a", "null");
    house.wait_for(&[("a", "connected"), ("b", "connected")]);
    drop(b);
    house.wait_for(&[("a", "connected"), ("b", "away")]);
}

#[test]
fn a_drained_node_and_one_that_leaves_hand_their_streams_on() {
    let house = House::open();
    let link = house.link(&["--uses", "2"]);
    let mut a = Node::join("a", &link, PACED);
    house.wait_for(&[("a", "connected")]);
    let mut stream = Stream::open(&house, &ask("far", 1600));
    stream.read(50);
    let mut b = Node::join("b", &link, PACED);
    house.wait_for(&[("a", "connected"), ("b", "connected")]);
    house.weir(&["drain", "a"]);
    let seen = stream.text().len();
    stream.read(seen + 200);
    house.weir(&["drain", "a", "--off"]);
    b.signal("TERM");
    assert_eq!(b.ended(Duration::from_secs(5)).code(), Some(0), "it leaves long before the stream's end");
    let (moved, nodes) = stream.end();
    assert_eq!(nodes, ["a", "b"]);
    assert_eq!(moved, text(&house.complete(&ask("far", 1600))));
    a.signal("INT");
    assert_eq!(a.ended(Duration::from_secs(10)).code(), Some(130));
    house.wait_for(&[("a", "away"), ("b", "away")]);
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// Disturbs nodes until `calm`: kills them, pauses them, cuts them off, each time while the others go on, and lets new
/// ones join. Returns how often.
fn disturb(house: &House, model: &str, nodes: &mut Vec<(Node, Wire)>, every: Duration, calm: Instant) -> u32 {
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let (mut rng, mut done) = (Rng(seed), 0);
    let first = rng.below(3);
    while Instant::now() < calm {
        std::thread::sleep(every);
        let victim = rng.below(nodes.len() as u64) as usize;
        // Each kind in turn, so that none is left out.
        let what = (first + u64::from(done)) % 3;
        println!("{} to one of {}", ["kill", "pause", "cut"][what as usize], nodes.len());
        match what {
            0 => drop(nodes.remove(victim)),
            1 => nodes[victim].0.signal("STOP"),
            _ => nodes[victim].1.cut(true),
        }
        std::thread::sleep(every);
        match what {
            0 => nodes.push(join_by_wire(house, &format!("new{done}"), model)),
            1 => nodes[victim].0.signal("CONT"),
            _ => nodes[victim].1.cut(false),
        }
        done += 1;
    }
    done
}

fn join_by_wire(house: &House, name: &str, model: &str) -> (Node, Wire) {
    let wire = Wire::to(house.listen);
    let link = house.link(&[]).replace(&house.listen.to_string(), &wire.address.to_string());
    (Node::join(name, &link, model), wire)
}

/// Streams of `tokens` each, all at once, over nodes that are disturbed: each must equal the undisturbed one.
fn check_nothing_lost(
    model: &str,
    nodes: usize,
    streams: u32,
    tokens: u32,
    every: Duration,
    for_so_long: Duration,
) {
    let house = House::open();
    let mut crew: Vec<_> = (0..nodes).map(|n| join_by_wire(&house, &format!("n{n}"), model)).collect();
    let names: Vec<String> = (0..nodes).map(|n| format!("n{n}")).collect();
    house.wait_for(&names.iter().map(|n| (n.as_str(), "connected")).collect::<Vec<_>>());
    let id = house.serve().get("/v1/models").unwrap().json()["data"][0]["id"].clone();
    let body = |n: u32| {
        let mut body = ask(&format!("Story number {n}:"), tokens);
        body["model"] = id.clone();
        body
    };
    let expected: Vec<String> = std::thread::scope(|scope| {
        let whole = |n| text(&house.complete(&body(n)));
        let running: Vec<_> = (0..streams).map(|n| scope.spawn(move || whole(n))).collect();
        running.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let calm = Instant::now() + for_so_long;
    let (house, body, expected) = (&house, &body, &expected);
    let moved = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..streams)
            .map(|n| {
                scope.spawn(move || {
                    let (mut runs, mut moved) = (0, 0);
                    while runs == 0 || Instant::now() < calm {
                        let (got, nodes) = Stream::open(house, &body(n)).end();
                        assert_eq!(got, expected[n as usize], "stream {n}, by {nodes:?}");
                        (runs, moved) = (runs + 1, moved + usize::from(nodes.len() > 1));
                    }
                    (runs, moved)
                })
            })
            .collect();
        let disturbances = disturb(house, model, &mut crew, every, calm);
        let all: Vec<(usize, usize)> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        let (runs, moved) = all.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        println!("{runs} streams of {tokens} tokens, {disturbances} disturbances, {moved} streams moved");
        moved
    });
    assert!(moved > 0, "nothing was disturbed");
}

#[test]
fn nothing_is_lost_when_nodes_are_killed_paused_and_cut_off() {
    let (every, long) = (Duration::from_millis(3500), Duration::from_secs(35));
    check_nothing_lost("null:step_us=20000,vocab=1000", 5, 100, 500, every, long);
}

/// The same with a real model.
#[test]
fn nothing_is_lost_with_a_real_model() {
    let Some(path) = model("smollm2.gguf") else { return };
    if std::env::var_os("WEIR_TEST_FULL").is_none() {
        eprintln!("runs with WEIR_TEST_FULL only: it takes minutes");
        return;
    }
    let (every, long) = (Duration::from_secs(8), Duration::from_secs(60));
    check_nothing_lost(path.to_str().unwrap(), 3, 12, 150, every, long);
}

/// A real model: the stream of a killed node equals the one that nothing disturbed.
#[test]
fn a_killed_nodes_stream_goes_on_with_the_same_tokens() {
    let Some(path) = model("smollm2.gguf") else { return };
    let house = House::open();
    let link = house.link(&["--uses", "2"]);
    let path = path.to_str().unwrap();
    let mut first = Node::join("first", &link, path);
    let _second = Node::join("second", &link, path);
    house.wait_for(&[("first", "connected"), ("second", "connected")]);
    let mut body = ask("Once upon a time", 200);
    body["model"] = house.serve().get("/v1/models").unwrap().json()["data"][0]["id"].clone();
    let undisturbed = text(&house.complete(&body));
    house.weir(&["drain", "second"]);
    let mut stream = Stream::open(&house, &body);
    stream.read(20);
    house.weir(&["drain", "second", "--off"]);
    first.kill();
    let (moved, nodes) = stream.end();
    assert_eq!(moved, undisturbed);
    assert_eq!(nodes, ["first", "second"]);
}

#[test]
fn the_admin_api_changes_nothing_for_strangers() {
    let house = House::open();
    let serve = house.serve();
    assert_eq!(serve.get("/weir/v1/nodes").unwrap().json(), json!({ "nodes": [] }));
    for path in ["links", "nodes/x/revoke", "nodes/x/drain"] {
        let reply = serve.post(&format!("/weir/v1/{path}"), "{}").unwrap();
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (403, &"admin_only".into()), "{path}");
        assert_eq!(serve.get(&format!("/weir/v1/{path}")).unwrap().status, 405, "{path}");
    }
    assert_eq!(serve.get("/weir/v1/other").unwrap().status, 404);
    let web = serve.get("/weir/v1/webtransport").unwrap().json();
    assert_eq!(web["urls"], json!([format!("https://{}/weir/1", house.listen)]));
    assert_eq!(web["certificate_sha256"].as_str().unwrap().len(), 64);
    let mut events = Connection::open(house.http, "GET", "/weir/v1/events", "").unwrap();
    let _node = Node::join("seen", &house.link(&[]), "null");
    let mut seen = String::new();
    while !seen.contains("event: joined") || !seen.contains("event: nodes") {
        let some = events.some().unwrap();
        assert!(!some.is_empty(), "{seen}");
        seen += &some;
    }
    assert!(seen.contains(r#""name":"seen""#), "{seen}");
    let without = Serve::start(&["--model", "null"], &[]);
    let reply = without.post("/weir/v1/links", "{}").unwrap();
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (404, &"no_cluster".into()));
    assert_eq!(without.get("/weir/v1/nodes").unwrap().json()["nodes"][0]["name"], "local");
}

/// What `weir top` and `weir nodes` say of a node's pace is so, though it never works for one alone.
#[test]
fn a_nodes_pace_is_told_as_it_is() {
    let house = House::open();
    let _node = Node::join("n", &house.link(&[]), "null:step_us=15000");
    house.wait_for(&[("n", "connected")]);
    std::thread::scope(|scope| {
        for n in 0..5 {
            let (house, prompt) = (&house, format!("question {n}"));
            scope.spawn(move || house.complete(&ask(&prompt, 60)));
        }
    });
    let pace = || house.nodes()[0]["models"][0]["token_ms"].as_f64().unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    // Its own figures come with the next heartbeat. With one sequence it is guessed to be up to three times as fast.
    while !(4.0..40.0).contains(&pace()) {
        assert!(Instant::now() < end, "{} ms a token", pace());
        std::thread::sleep(Duration::from_millis(100));
    }
    house.complete(&ask("alone", 60));
    let end = Instant::now() + Duration::from_secs(5);
    while !(13.0..40.0).contains(&pace()) {
        assert!(Instant::now() < end, "{} ms a token", pace());
        std::thread::sleep(Duration::from_millis(100));
    }
}
