//! What the way through the gateway costs, beside a peer.
use crate::run::{cargo, check, output, program, root};
use anyhow::Result;
use std::path::PathBuf;

const PEER: &str = "smg==1.13.0";

/// Builds the program and the bench and runs it with `flags`. The peer comes from PyPI; where it can't be had, that is said.
pub fn bench(flags: &[&str]) -> Result<()> {
    check(&mut cargo(&["build", "--release", "--package", "weir", "--package", "weir-benches", "--bins"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let mut bench = program(target.join("release/gateway"));
    bench.arg("--weir").arg(target.join("release/weir"));
    match peer() {
        Ok(peer) => _ = bench.arg("--peer").arg(peer),
        Err(error) => eprintln!("NOTE: without a peer to compare with, {PEER} can't be had: {error:#}"),
    }
    check(bench.args(flags))
}

fn peer() -> Result<PathBuf> {
    let folder = root().join("target/tools").join(PEER.replace("==", "-"));
    let peer = folder.join("bin/smg");
    if !peer.exists() {
        output(program("python3").args(["-m", "venv"]).arg(&folder))?;
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PEER];
        output(program(folder.join("bin/python")).args(pip))?;
    }
    Ok(peer)
}
