//! Fuzzing what reads bytes from outside (model files, frames, policies, providers' streams) with libFuzzer, on the
//! stable toolchain. See fuzz/README.md.
use crate::run::{cargo, check, output, program};
use anyhow::{Result, bail};

/// LLVM's coverage pass, asked for directly: the flags that cargo-fuzz would set, without a sanitizer.
const COVERAGE: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
const BUILD: [&str; 5] =
    ["run", "--release", "--quiet", "--manifest-path=fuzz/Cargo.toml", "--target-dir=target/fuzz"];
const CORPUS: &str = "target/fuzz/corpus";
/// The targets, and the longest inputs that they are given.
const TARGETS: [(&str, u32); 4] =
    [("reader", 16_384), ("frames", 4096), ("policies", 4096), ("streams", 4096)];

/// Fuzzes all targets, or one, for so many seconds altogether; an error if an input was found that panics, hangs, or takes
/// much memory.
pub fn run(only: Option<&str>, seconds: u32) -> Result<()> {
    let chosen: Vec<_> = TARGETS.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)).collect();
    if chosen.is_empty() {
        bail!("there is no such target; there are {}", TARGETS.map(|(name, _)| name).join(", "));
    }
    check(cargo(&BUILD).args(["--bin", "seeds", "--", CORPUS]))?;
    for (target, length) in &chosen {
        fuzz(target, *length, seconds / chosen.len() as u32)?;
    }
    Ok(())
}

fn fuzz(target: &str, length: u32, seconds: u32) -> Result<()> {
    // Naming the machine keeps the flags away from build scripts.
    let host = output(program("rustc").args(["--print", "host-tuple"]))?;
    let mut fuzz = cargo(&BUILD);
    fuzz.args(["--target", host.trim(), "--features", "fuzz", "--bin", target, "--"]);
    fuzz.arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={length}"));
    fuzz.args(["-rss_limit_mb=512", "-timeout=5", "-verbosity=0", "-print_final_stats=1"]);
    fuzz.args(["-artifact_prefix=target/fuzz/", &format!("{CORPUS}/{target}")]);
    check(fuzz.env("RUSTFLAGS", COVERAGE))
}
