//! Fuzzing the reader of model files with libFuzzer, on the stable toolchain. See fuzz/README.md.
use crate::run::{cargo, check, output, program};
use anyhow::Result;

/// LLVM's coverage pass, asked for directly: the flags that cargo-fuzz would set, without a sanitizer.
const COVERAGE: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
const BUILD: [&str; 5] =
    ["run", "--release", "--quiet", "--manifest-path=fuzz/Cargo.toml", "--target-dir=target/fuzz"];
const CORPUS: &str = "target/fuzz/corpus";

/// Fuzzes for that long; an error if an input was found that panics, hangs, or takes much memory.
pub fn run(seconds: u32) -> Result<()> {
    check(cargo(&BUILD).args(["--bin", "seeds", "--", CORPUS]))?;
    // Naming the target keeps the flags away from build scripts.
    let host = output(program("rustc").args(["--print", "host-tuple"]))?;
    let mut fuzz = cargo(&BUILD);
    fuzz.args(["--target", host.trim(), "--features", "fuzz", "--bin", "reader", "--"]);
    fuzz.arg(format!("-max_total_time={seconds}")).args([
        "-rss_limit_mb=512",
        "-timeout=5",
        "-max_len=16384",
    ]);
    fuzz.args(["-verbosity=0", "-print_final_stats=1", "-artifact_prefix=target/fuzz/", CORPUS]);
    check(fuzz.env("RUSTFLAGS", COVERAGE))
}
