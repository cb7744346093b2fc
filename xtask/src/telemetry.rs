//! Telemetry as others see it: a real Prometheus scrapes a cluster at work and is asked everything that the dashboards and
//! alerts ask; Phoenix, a real OTLP receiver with a page for traces, shows a request's tree.
mod cluster;
mod phoenix;
mod prometheus;

use crate::run::{cargo, check, root, works};
use anyhow::{Context, Result, bail};
use cluster::Cluster;
use phoenix::Phoenix;
use prometheus::Prometheus;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};

/// Kills a program when it goes.
pub(crate) struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// Runs it all.
pub fn run() -> Result<()> {
    if !works("prometheus", &["--version"]) || !works("promtool", &["--version"]) {
        bail!("Prometheus is missing: apt-get install -y --no-install-recommends prometheus");
    }
    check(&mut cargo(&["build", "--package", "weir", "--bin", "weir"]))?;
    let folder = root().join("target/tmp/telemetry");
    _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    let phoenix = Phoenix::start(&folder)?;
    let mut cluster = Cluster::start(&folder, &phoenix.url())?;
    let prometheus = Prometheus::start(&folder, &cluster.scraped())?;
    let trace = cluster.work(Duration::from_secs(30))?;
    prometheus.check(&cluster)?;
    phoenix.check(&trace, &folder)?;
    println!("telemetry: all panels, alerts and spans are as they should be");
    Ok(())
}

pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Asks over HTTP; status and body, chunk sizes included where it comes in chunks.
pub(crate) fn ask(
    at: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n{headers}connection: close\r\n");
    let content = format!("content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(format!("{head}{content}").as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")?;
    Ok((status, body.to_owned()))
}

/// Waits until something is there.
pub(crate) fn wait_for(what: &str, limit: Duration, mut is: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + limit;
    while !is() {
        if Instant::now() > end {
            bail!("{what} did not come within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
