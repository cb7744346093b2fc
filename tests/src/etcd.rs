//! A real etcd.
use crate::{Connection, free_address, skip};
use std::fs::File;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// An etcd of one member, from `etcd` on the path (Debian's `etcd-server`); killed when dropped.
pub struct EtcdServer {
    /// Where clients ask.
    pub address: SocketAddr,
    peers: SocketAddr,
    folder: TempDir,
    child: Option<Child>,
}

impl EtcdServer {
    /// Starts one, and waits until it answers; says loudly that a test is skipped where there is none.
    ///
    /// # Panics
    /// If it doesn't answer within half a minute.
    pub fn start() -> Option<EtcdServer> {
        let there =
            Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !there.is_ok_and(|status| status.success()) {
            skip("there is no etcd (apt-get install etcd-server)");
            return None;
        }
        let (address, peers) = (free_address(), free_address());
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut server = EtcdServer { address, peers, folder, child: None };
        server.run();
        Some(server)
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Starts it with the data that it had.
    ///
    /// # Panics
    /// If it doesn't answer within half a minute.
    pub fn run(&mut self) {
        let (clients, peers) = (self.url(), format!("http://{}", self.peers));
        let log = File::create(self.folder.path().join("log")).expect("a file");
        let child = Command::new("etcd")
            .args(["--name", "one", "--log-level", "error", "--initial-cluster", &format!("one={peers}")])
            .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
            .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
            .arg("--data-dir")
            .arg(self.folder.path().join("data"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log)
            .spawn()
            .expect("etcd starts");
        self.child = Some(child);
        let end = Instant::now() + Duration::from_secs(30);
        let healthy = || Connection::open(self.address, "GET", "/health", "")?.reply();
        while !healthy().is_ok_and(|reply| reply.body.contains("true")) {
            assert!(Instant::now() < end, "etcd doesn't answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Sends a signal: `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        if let Some(child) = &self.child {
            crate::process::signal(child, name);
        }
    }

    /// Kills it outright.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}
