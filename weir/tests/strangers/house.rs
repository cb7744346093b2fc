//! A scheduler that nodes join over QUIC: for tests, and for `benches/nodes.rs`.
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use weir::cluster::{Cluster, Invitation};
use weir::driver::{Ask, Driver, DriverConfig, Port};
use weir_backends::null::NULL_MODEL;
use weir_node::{Credentials, Loaded, Machine, Resident, Stock, Worker};
use weir_transport::{Dialer, Identity, Link};

/// A request of 64 tokens, for 4.
pub(crate) fn ask(n: u32) -> Ask {
    let prompt = (0..64).map(|i| (i * 7 + n) % 1000 + 1).collect();
    Ask { ignore_eos: true, ..Ask::new(NULL_MODEL, prompt, 4) }
}

/// A scheduler that nodes can join, and one that has.
pub(crate) struct House {
    pub(crate) driver: Driver,
    cluster: Arc<Cluster>,
    address: [String; 1],
    dialer: Dialer,
    port: Port,
    _folder: tempfile::TempDir,
}

impl House {
    pub(crate) async fn open() -> House {
        let folder = tempfile::tempdir().unwrap();
        let cluster = Arc::new(Cluster::open(folder.path()).unwrap());
        let config = DriverConfig { no_node: true, ..DriverConfig::default() };
        let driver = Driver::start(config).await.unwrap();
        let port = driver.listen("127.0.0.1:0".parse().unwrap(), cluster.clone()).unwrap();
        let address = [port.address().unwrap().to_string()];
        let dialer = Dialer::new().unwrap();
        House { driver, cluster, address, dialer, port, _folder: folder }
    }

    pub(crate) async fn dial(&self) -> Link {
        self.dialer.dial(&self.address, self.cluster.fingerprint()).await.unwrap()
    }

    pub(crate) fn token(&self, uses: usize) -> String {
        let invitation = Invitation { uses: uses as u32, ..Invitation::default() };
        self.cluster.invite(invitation, SystemTime::now()).unwrap().to_string()
    }

    /// As a page does.
    pub(crate) async fn dial_web(&self) -> Link {
        let certificate = self.port.web_certificate().hash(SystemTime::now());
        self.dialer.dial_web(&self.address[0], certificate).await.unwrap()
    }

    /// A node with a key and a link of its own; the engine may be shared.
    pub(crate) async fn join(&self, name: &str, loaded: &Loaded, token: &str) {
        self.join_by(self.dial().await, name, loaded, token);
    }

    pub(crate) fn join_by(&self, link: Link, name: &str, loaded: &Loaded, token: &str) {
        let resident = Resident::new(loaded.held.clone(), loaded.text.clone(), loaded.engine.clone());
        let worker = Worker::new(name, Machine::default(), vec![resident], Stock::none());
        let proof = link.binding().map(|binding| Identity::generate().unwrap().prove(&binding));
        let credentials = Credentials { proof, token: Some(token.to_owned()), ask: false };
        tokio::spawn(async move { drop(worker.serve(&link, credentials).await) });
    }

    pub(crate) async fn wait_for(&self, nodes: usize) {
        let mut count = self.driver.nodes();
        let here = count.wait_for(|n| *n == nodes);
        tokio::time::timeout(Duration::from_secs(60), here).await.expect("in time").unwrap();
    }
}
