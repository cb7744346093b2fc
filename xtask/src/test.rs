//! The gates: everything that a change has to pass.
use crate::run::{cargo, check, program, watch, works};
use crate::{deny, deploy, fuzz, models, telemetry};
use anyhow::{Result, bail};
use std::time::Instant;

const FUZZ_SECONDS: u32 = 60;

/// How much to test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// What continuous integration runs.
    Default,
    /// Golden logits of every model on the reference device, and on every instruction set, too.
    Full,
}

/// Tests that ran.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// Runs all gates, the quick ones first, and stops at the first that fails.
pub fn run(scope: Scope) -> Result<()> {
    let began = Instant::now();
    tools()?;
    step("format", || check(&mut cargo(&["fmt", "--all", "--check"])))?;
    step("licences", deny::run)?;
    step("lints", || {
        check(&mut cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-Dwarnings"]))
    })?;
    step("docs", || {
        let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--quiet"]);
        check(doc.env("RUSTDOCFLAGS", "-Dwarnings"))
    })?;
    let mut tally = Tally::default();
    step("tests", || tests(scope, &mut tally))?;
    match scope {
        Scope::Full => {
            step("deploy", deploy::run)?;
            step("telemetry", telemetry::run)?;
        }
        Scope::Default => {
            println!(
                "SKIPPED: a real Prometheus, Phoenix and Helm look at it with --full, or `cargo xtask telemetry` and `deploy`"
            );
        }
    }
    step("emulated GPU", || emulated(&mut tally))?;
    step("fuzz", || fuzz::run(None, FUZZ_SECONDS))?;
    let Tally { passed, failed, ignored } = tally;
    println!("\nall gates passed in {} s", began.elapsed().as_secs());
    println!("{passed} passed, {failed} failed, {ignored} ignored");
    Ok(())
}

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    println!("== {name}");
    work()?;
    println!("== {name}: ok, {:.1} s", began.elapsed().as_secs_f32());
    Ok(())
}

/// The tools that the gates need: a program that shows that one is there, and how to get it.
fn tools() -> Result<()> {
    let needed: [(&str, &[&str], &str); 7] = [
        ("rustfmt", &["--version"], "rustup component add rustfmt"),
        ("cargo-clippy", &["--version"], "rustup component add clippy"),
        ("python3", &["-c", "import venv, ensurepip, pip"], "python3 python3-pip python3-venv"),
        ("node", &["--version"], "nodejs"),
        ("npm", &["--version"], "npm"),
        ("c++", &["--version"], "g++"),
        // Two schedulers share a cluster by it.
        ("etcd", &["--version"], "etcd-server"),
    ];
    let mut missing: Vec<_> = needed
        .iter()
        .filter(|(tool, arguments, _)| !works(tool, arguments))
        .map(|(tool, _, how)| (*tool, *how))
        .collect();
    // The GPU's tests run on a program that imitates one. Other systems have an adapter by themselves.
    if cfg!(target_os = "linux") && !has_lavapipe() {
        missing.push(("lavapipe", "mesa-vulkan-drivers libvulkan1"));
    }
    let packages: Vec<&str> = missing
        .iter()
        .filter(|(_, how)| !how.starts_with("rustup"))
        .flat_map(|(_, how)| how.split(' '))
        .collect();
    if !packages.is_empty() && is_root() && works("apt-get", &["--version"]) {
        println!("installing {}", packages.join(" "));
        _ = check(program("apt-get").args(["update", "-qq"]));
        let install = ["install", "-y", "-qq", "--no-install-recommends"];
        check(program("apt-get").args(install).args(&packages).env("DEBIAN_FRONTEND", "noninteractive"))?;
        missing.retain(|(_, how)| how.starts_with("rustup"));
    }
    if missing.is_empty() {
        return Ok(());
    }
    let line = |(tool, how): &(&str, &str)| match how.starts_with("rustup") {
        true => format!("  {tool}: {how}"),
        false => format!("  {tool}: apt-get install -y {how}"),
    };
    let lines: Vec<String> = missing.iter().map(line).collect();
    bail!("these tools are missing; install them with\n{}", lines.join("\n"))
}

fn is_root() -> bool {
    std::process::Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout.trim_ascii() == b"0")
}

fn has_lavapipe() -> bool {
    let folders = ["/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d"];
    let files = folders.into_iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten();
    let mut names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    names.any(|name| name.starts_with("lvp_icd"))
}

/// The tests of one kind of device, on real hardware.
pub fn run_gpu(device: &str) -> Result<()> {
    let mut tally = Tally::default();
    let mut command = cargo(&["test", "--release", "--package", "weir-backends", "--test", "all"]);
    command.args(["--", &format!("{device}::"), "--nocapture", "--include-ignored"]);
    command.env("WEIR_TEST_MODELS", models::folder()?);
    if device == "wgpu" && std::env::var_os("WEIR_TEST_GPU").is_none() {
        // The fastest kind, whatever it is.
        command.env("WEIR_TEST_GPU", "");
    }
    let ok = watch(&mut command, |line| tally.count(line))?;
    if !ok || tally.passed == 0 {
        bail!("{} tests failed, {} passed", tally.failed, tally.passed);
    }
    Ok(())
}

/// All tests of the workspace. Everything they need has been set up, so a test that would skip fails instead.
fn tests(scope: Scope, tally: &mut Tally) -> Result<()> {
    let mut command = cargo(&["test", "--workspace", "--no-fail-fast"]);
    command.env("WEIR_TEST_MODELS", models::folder()?).env("CI", "true");
    if scope == Scope::Full {
        command.env("WEIR_TEST_FULL", "1");
    }
    let ok = watch(&mut command, |line| tally.count(line))?;
    if !ok {
        bail!("{} tests failed, {} passed", tally.failed, tally.passed);
    }
    Ok(())
}

/// The CUDA device's tests on its emulator: the kernels themselves, built by the C++ compiler.
fn emulated(tally: &mut Tally) -> Result<()> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        println!("SKIPPED: kernels are emulated on x86-64 Linux alone");
        return Ok(());
    }
    let mut command =
        cargo(&["test", "--package", "weir-backends", "--features", "cuda-emulator", "--test", "all"]);
    let ok = watch(command.args(["--", "cuda::"]), |line| tally.count(line))?;
    if !ok {
        bail!("{} tests failed, {} passed", tally.failed, tally.passed);
    }
    Ok(())
}

impl Tally {
    /// Adds a line like `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
    fn count(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        for part in result.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(Ok(n)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else {
                continue;
            };
            match what {
                "passed" => self.passed += n,
                "failed" => self.failed += n,
                "ignored" => self.ignored += n,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_summed() {
        let mut tally = Tally::default();
        tally.count(
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s",
        );
        tally.count("test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        tally.count("test golden::passed ... ok");
        assert_eq!((tally.passed, tally.failed, tally.ignored), (7, 2, 1));
    }
}
