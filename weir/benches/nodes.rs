//! What a thousand nodes on one scheduler cost: `cargo bench -p weir --bench nodes`.
//!
//! Nodes share an engine, since it isn't what is measured; each has a key, a link over QUIC and heartbeats of its own,
//! all in this process. Fails if a node is lost, or if all of it takes more than 1 GiB.
#![allow(clippy::unwrap_used)] // a bench that panics has failed
#[allow(dead_code)] // tests use more of it
#[path = "../tests/strangers/house.rs"]
mod house;

use house::{House, ask};
use std::time::{Duration, Instant};
use weir_backends::null::Null;
use weir_node::LoadOptions;

const NODES: usize = 1000;
const REQUESTS: u32 = 5000;

#[tokio::main(worker_threads = 2)]
async fn main() {
    let house = House::open().await;
    let token = house.token(NODES);
    let loaded = weir_node::null(&Null::default(), LoadOptions::default()).unwrap();
    let began = Instant::now();
    for n in 0..NODES {
        house.join(&format!("n{n}"), &loaded, &token).await;
        // One address holds few places of those who have not introduced themselves.
        if n % 64 == 63 {
            house.wait_for(n + 1).await;
        }
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
