//! A thousand nodes on one scheduler, over QUIC.
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use weir::cluster::{Cluster, Invitation};
use weir::driver::{Ask, Driver, DriverConfig};
use weir_backends::null::{NULL_MODEL, Null};
use weir_node::{Credentials, LoadOptions, Resident, Worker};
use weir_scheduler::{KeyId, Priority, RequestId, Sampling, TraceContext};
use weir_transport::{Dialer, Identity};

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

/// Nodes share an engine, since it isn't what is measured; each has a key, a link and heartbeats of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it measures time and memory, which a machine that does other things doesn't tell"]
async fn a_thousand_nodes_on_one_scheduler() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Arc::new(Cluster::open(folder.path()).unwrap());
    let driver = Driver::start(DriverConfig { no_node: true, ..DriverConfig::default() }).await.unwrap();
    let port = driver.listen("127.0.0.1:0".parse().unwrap(), cluster.clone()).unwrap();
    let uses = NODES as u32;
    let token = cluster.invite(Invitation { uses, ..Invitation::default() }, SystemTime::now()).unwrap();
    let addresses = [port.address().unwrap().to_string()];
    let loaded = weir_node::null(&Null::default(), LoadOptions::default()).unwrap();
    let dialer = Dialer::new().unwrap();
    let began = Instant::now();
    let mut nodes = Vec::new();
    for n in 0..NODES {
        let resident = Resident::new(loaded.held.clone(), loaded.text.clone(), loaded.engine.clone());
        let worker = Worker::new(&format!("n{n}"), vec!["null".into()], vec![resident]);
        let link = dialer.dial(&addresses, cluster.fingerprint()).await.unwrap();
        let proof = link.binding().map(|binding| Identity::generate().unwrap().prove(&binding));
        let credentials = Credentials { proof, token: Some(token.to_string()) };
        nodes.push(tokio::spawn(async move { drop(worker.serve(&link, credentials).await) }));
    }
    let mut count = driver.nodes();
    tokio::time::timeout(Duration::from_secs(60), count.wait_for(|n| *n == NODES)).await.unwrap().unwrap();
    println!("{NODES} nodes joined in {:?}", began.elapsed());
    let (mut placed, mut ended) = (Vec::new(), Vec::new());
    for n in 0..REQUESTS {
        let start = Instant::now();
        let mut generation = driver.generate(ask(n)).await.unwrap();
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
    assert_eq!(*driver.nodes().borrow(), NODES, "none was lost");
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default();
        let kib: u64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        println!("peak memory of scheduler and nodes together: {} MiB", kib / 1024);
        assert!(kib < 1 << 20, "{kib} KiB");
    }
}
