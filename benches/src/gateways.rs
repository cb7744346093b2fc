//! Gateways under test as processes, and figures of what the way through each costs.
use crate::load::{self, Load};
use anyhow::{Context as _, Result, bail, ensure};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For a program to be up.
pub const UP: Duration = Duration::from_secs(120);

/// A program under test, killed when dropped.
pub struct Gateway {
    /// As it is called in tables.
    pub name: &'static str,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its process.
    pub child: Child,
    /// What it needs as long as it runs.
    pub folders: Vec<tempfile::TempDir>,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It may have ended by itself.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// A loopback address whose port is free, for TCP and for UDP.
pub fn free() -> Result<SocketAddr> {
    loop {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        if UdpSocket::bind(address).is_ok() {
            return Ok(address);
        }
    }
}

/// Starts a program in a folder of its own; nobody reads what it says.
pub fn started(name: &'static str, command: &mut Command, address: SocketAddr) -> Result<Gateway> {
    let folder = tempfile::tempdir()?;
    let log = || std::fs::File::create(folder.path().join("log"));
    let child = command.current_dir(folder.path()).stdin(Stdio::null()).stdout(log()?).stderr(Stdio::null());
    let child = child.spawn().with_context(|| format!("can't start {name}"))?;
    Ok(Gateway { name, address, child, folders: vec![folder] })
}

/// Waits until it answers a request.
pub fn ready(gateway: &mut Gateway, request: &[u8]) -> Result<()> {
    let end = Instant::now() + UP;
    loop {
        let answered = load::connect(gateway.address).and_then(|mut c| load::exchange(&mut c, request));
        let Err(error) = answered else { return Ok(()) };
        if let Some(status) = gateway.child.try_wait()? {
            bail!("{} ended: {status}", gateway.name);
        }
        ensure!(Instant::now() < end, "{} doesn't answer: {error:#}", gateway.name);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Figures of one gateway, or of the upstream alone: a load a round, for 1 and for 64 connections.
#[derive(Default)]
pub struct Figures {
    /// By [`CONNECTIONS`].
    pub rounds: [Vec<Load>; 2],
}

/// How many clients ask at once.
pub const CONNECTIONS: [usize; 2] = [1, 64];

impl Figures {
    /// A round: `requests` over many connections, a quarter of them over one.
    pub fn measure(&mut self, to: SocketAddr, request: &[u8], requests: usize) -> Result<()> {
        for (connections, rounds) in CONNECTIONS.into_iter().zip(&mut self.rounds) {
            let count = if connections == 1 { requests / 4 } else { requests };
            rounds.push(load::run(to, request, connections, count)?);
        }
        Ok(())
    }

    /// The median over the rounds, of those with [`CONNECTIONS`]' number `which`.
    pub fn median(&self, which: usize, figure: impl Fn(&Load) -> f64) -> f64 {
        let mut all: Vec<f64> = self.rounds[which].iter().map(figure).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// A percentile of the times, in microseconds.
    pub fn percentile_us(&self, which: usize, percent: usize) -> f64 {
        self.median(which, |load| load.percentile(percent).as_secs_f64() * 1e6)
    }

    /// Requests a second.
    pub fn rate(&self, which: usize) -> f64 {
        self.median(which, |load| load.requests_per_s)
    }
}

/// Prints a line for the way straight to the upstream and for each gateway, and number of connections.
pub fn print_table<'a>(direct: &'a Figures, gateways: impl Iterator<Item = (&'static str, &'a Figures)>) {
    println!(
        "{:<10}{:>12}{:>12}{:>12}{:>14}{:>14}{:>14}",
        "", "CONNECTIONS", "p50 us", "p99 us", "ADDED p50 us", "ADDED p99 us", "REQUESTS/s"
    );
    for (name, row) in [("upstream", direct)].into_iter().chain(gateways) {
        for (which, connections) in CONNECTIONS.into_iter().enumerate() {
            let (p50, p99) = (row.percentile_us(which, 50), row.percentile_us(which, 99));
            let added = [p50 - direct.percentile_us(which, 50), p99 - direct.percentile_us(which, 99)];
            println!(
                "{name:<10}{connections:>12}{p50:>12.0}{p99:>12.0}{:>14.0}{:>14.0}{:>14.0}",
                added[0],
                added[1],
                row.rate(which)
            );
        }
    }
}

/// Memory of a process and its children.
pub fn resident_bytes(process: u32) -> u64 {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{process}/{file}")).unwrap_or_default();
    let status = read("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    let own = line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10;
    let children = read(&format!("task/{process}/children"));
    own + children.split_whitespace().filter_map(|c| c.parse().ok()).map(resident_bytes).sum::<u64>()
}
