//! Many at once on one scheduler, over QUIC: a thousand nodes, and strangers who want no good.
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use weir::cluster::{Cluster, Invitation};
use weir::driver::{Ask, Driver, DriverConfig, Port};
use weir_backends::null::{NULL_MODEL, Null};
use weir_node::{Credentials, LoadOptions, Loaded, Resident, Worker};
use weir_scheduler::{Event, KeyId, Priority, RequestId, Sampling, TraceContext};
use weir_transport::{Dialer, Frame, Hello, Identity, Link, LinkError, Message, RefusalCode, VERSION};

const NODES: usize = 1000;
const REQUESTS: u32 = 5000;

fn ask(n: u32) -> Ask {
    Ask {
        request: RequestId(0),
        attempt: 0,
        model: NULL_MODEL,
        prompt: (0..64).map(|i| (i * 7 + n) % 1000 + 1).collect(),
        output: Vec::new(),
        sampling: Sampling::default(),
        max_tokens: 4,
        stop: Vec::new(),
        ignore_eos: true,
        priority: Priority::Normal,
        deadline: None,
        salt: 0,
        key: KeyId(0),
        tags: Vec::new(),
        trace: TraceContext::default(),
    }
}

/// A scheduler that nodes can join, and one that has.
struct House {
    driver: Driver,
    cluster: Arc<Cluster>,
    address: [String; 1],
    dialer: Dialer,
    _port: Port,
    _folder: tempfile::TempDir,
}

impl House {
    async fn open() -> House {
        let folder = tempfile::tempdir().unwrap();
        let cluster = Arc::new(Cluster::open(folder.path()).unwrap());
        let config = DriverConfig { no_node: true, ..DriverConfig::default() };
        let driver = Driver::start(config).await.unwrap();
        let port = driver.listen("127.0.0.1:0".parse().unwrap(), cluster.clone()).unwrap();
        let address = [port.address().unwrap().to_string()];
        let dialer = Dialer::new().unwrap();
        House { driver, cluster, address, dialer, _port: port, _folder: folder }
    }

    async fn dial(&self) -> Link {
        self.dialer.dial(&self.address, self.cluster.fingerprint()).await.unwrap()
    }

    fn token(&self, uses: usize) -> String {
        let invitation = Invitation { uses: uses as u32, ..Invitation::default() };
        self.cluster.invite(invitation, SystemTime::now()).unwrap().to_string()
    }

    /// A node with a key and a link of its own; the engine may be shared.
    async fn join(&self, name: &str, loaded: &Loaded, token: &str) {
        let resident = Resident::new(loaded.held.clone(), loaded.text.clone(), loaded.engine.clone());
        let worker = Worker::new(name, vec!["null".into()], vec![resident]);
        let link = self.dial().await;
        let proof = link.binding().map(|binding| Identity::generate().unwrap().prove(&binding));
        let credentials = Credentials { proof, token: Some(token.to_owned()) };
        tokio::spawn(async move { drop(worker.serve(&link, credentials).await) });
    }

    async fn wait_for(&self, nodes: usize) {
        let mut count = self.driver.nodes();
        let here = count.wait_for(|n| *n == nodes);
        tokio::time::timeout(Duration::from_secs(60), here).await.expect("in time").unwrap();
    }

    async fn answers(&self, n: u32) {
        let mut generation = self.driver.generate(ask(n)).await.unwrap();
        let mut events = Vec::new();
        while let Some(event) = generation.events.recv().await {
            events.push(event);
        }
        assert!(matches!(events.last(), Some(Event::Finished { .. })), "{events:?}");
    }
}

/// Links that say nothing, nonsense, or something out of place: each is cut, and a node at work notices nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_disturb_nobody() {
    let house = House::open().await;
    let loaded = weir_node::null(&Null::default(), LoadOptions::default()).unwrap();
    house.join("good", &loaded, &house.token(1)).await;
    house.wait_for(1).await;

    // What a stranger may say first, and what it is told.
    let generate = Frame::generate(ask(1)).unwrap();
    for (first, told) in [(generate, "Generate"), (Frame::cancel(RequestId(1), 0), "Cancel")] {
        let link = house.dial().await;
        let mut stream = link.open().await.unwrap();
        stream.send.send(first).await.unwrap();
        let Err(LinkError::Closed(why)) = stream.receive.next().await else { panic!("{told}") };
        assert!(why.contains(told), "{why}");
    }
    // A hello without a key, and one replayed from another link.
    let node = Identity::generate().unwrap();
    let other = house.dial().await;
    let replayed = node.prove(&other.binding().unwrap());
    for proof in [None, Some(replayed)] {
        let link = house.dial().await;
        let mut stream = link.open().await.unwrap();
        let token = Some(house.token(1));
        let hello = Hello { versions: vec![VERSION], name: "bad".into(), proof, token, ..Hello::default() };
        stream.send.send(Frame::hello(&hello)).await.unwrap();
        let frame = stream.receive.next().await.unwrap().unwrap();
        let Message::Welcome(welcome) = frame.read().unwrap() else { panic!("{frame:?}") };
        assert_eq!(welcome.refused.unwrap().code, RefusalCode::Proof);
    }
    // Those who only hold places: not all of them get one, and those who do lose it.
    let mut idle = Vec::new();
    for n in 0..200 {
        idle.push(house.dial().await);
        if n % 20 == 0 {
            house.answers(n).await;
        }
    }
    let turned_away = tokio::time::timeout(Duration::from_secs(5), idle[199].closed()).await;
    assert!(turned_away.is_ok(), "an address has not so many places");
    for link in &idle {
        tokio::time::timeout(Duration::from_secs(20), link.closed()).await.expect("it is cut");
    }
    house.join("late", &loaded, &house.token(1)).await;
    house.wait_for(2).await;
    house.answers(7).await;
}

/// Nodes share an engine, since it isn't what is measured; each has a key, a link and heartbeats of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it measures time and memory, which a machine that does other things doesn't tell"]
async fn a_thousand_nodes_on_one_scheduler() {
    let house = House::open().await;
    let token = house.token(NODES);
    let loaded = weir_node::null(&Null::default(), LoadOptions::default()).unwrap();
    let began = Instant::now();
    for n in 0..NODES {
        house.join(&format!("n{n}"), &loaded, &token).await;
    }
    house.wait_for(NODES).await;
    println!("{NODES} nodes joined in {:?}", began.elapsed());
    let (mut placed, mut ended) = (Vec::new(), Vec::new());
    for n in 0..REQUESTS {
        let start = Instant::now();
        let mut generation = house.driver.generate(ask(n)).await.unwrap();
        placed.push(start.elapsed());
        while generation.events.recv().await.is_some() {}
        ended.push(start.elapsed());
    }
    placed.sort();
    ended.sort();
    let at = |times: &[Duration], share: f64| times[(times.len() as f64 * share) as usize];
    println!(
        "accepted and placed: p50 {:?}, p99 {:?}; 4 tokens over QUIC: p50 {:?}, p99 {:?}",
        at(&placed, 0.5),
        at(&placed, 0.99),
        at(&ended, 0.5),
        at(&ended, 0.99)
    );
    assert_eq!(*house.driver.nodes().borrow(), NODES, "none was lost");
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default();
        let kib: u64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        println!("peak memory of scheduler and nodes together: {} MiB", kib / 1024);
        assert!(kib < 1 << 20, "{kib} KiB");
    }
}
