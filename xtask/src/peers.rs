//! Chores that build llama.cpp: the bench beside it, and the golden logits that it makes.
use crate::models;
use crate::run::{cargo, check, program, root, works};
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::Command;

/// Positions of golden logits. Gemma's window is 512, so it needs more.
const POSITIONS: [(&str, &str); 3] = [("smollm2", "512"), ("qwen2", "512"), ("gemma3", "1536")];

/// Builds the benches with llama.cpp and runs `bench` with `flags`.
pub fn bench_cpu(flags: &[&str]) -> Result<()> {
    let bin = build("bench")?;
    let models = models::folder()?;
    check(program(bin).arg("cpu").args(flags).env("WEIR_TEST_MODELS", models))
}

/// Builds a bench that needs no peer, and runs it with `flags`.
pub fn bench_plain(device: &str, flags: &[&str]) -> Result<()> {
    check(&mut cargo(&["build", "--release", "--package", "weir-benches", "--bin", device]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let models = models::folder()?;
    check(program(target.join("release").join(device)).args(flags).env("WEIR_TEST_MODELS", models))
}

/// Makes the golden logits again.
pub fn golden() -> Result<()> {
    let bin = build("golden")?;
    let models = models::folder()?;
    for (name, positions) in POSITIONS {
        let model = models.join(format!("{name}.gguf"));
        let out = root().join(format!("backends/tests/golden/{name}.logits"));
        let mut command = program(&bin);
        command.arg("logits").arg("--model").arg(model).args(["--text", "benches/golden.txt"]);
        check(command.args(["--positions", positions]).arg("--out").arg(out))?;
    }
    Ok(())
}

fn build(bin: &str) -> Result<PathBuf> {
    for (tool, package) in [("cmake", "cmake"), ("clang", "clang libclang-dev"), ("c++", "g++")] {
        if !works(tool, &["--version"]) {
            bail!("llama.cpp needs {tool}: `apt-get install -y {package}`, or your system's like of it");
        }
    }
    let target = root().join("target/peers");
    check(native(&mut cargo(&["build", "--release", "--package", "weir-benches"])).args([
        "--features",
        "peers",
        "--bin",
        bin,
        "--target-dir",
        "target/peers",
    ]))?;
    Ok(target.join("release").join(bin))
}

/// The bindings' own build is native only if all Rust code is built for this processor too, which ours isn't when we
/// ship it. So only the C and C++ compilers hear of it, in a target folder of its own.
fn native(command: &mut Command) -> &mut Command {
    let flag = if cfg!(target_arch = "x86_64") { "-march=native" } else { "-mcpu=native" };
    command.env("CFLAGS", flag).env("CXXFLAGS", flag).env("LLAMA_LIB_PROFILE", "Release")
}
