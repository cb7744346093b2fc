//! What `cargo xtask web` makes.
use super::compiler::{self, Build, TARGET};
use crate::run::{check, program, root};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Builds `web/dist`, and the pages in `web/site`, which the next build of `weir` takes in.
pub fn build() -> Result<()> {
    let folder = root().join("web");
    install(&folder)?;
    let dist = folder.join("dist");
    if dist.exists() {
        std::fs::remove_dir_all(&dist)?;
    }
    module(&folder, Build::Plain, &dist)?;
    module(&folder, Build::Threads, &dist.join("threads"))?;
    check(node(&folder, "typescript/bin/tsc").args(["--project", "tsconfig.json"]))?;
    report(&dist)?;
    check(program("node").current_dir(&folder).arg("pack.mjs"))
}

/// The engine's module, and the JavaScript around it.
fn module(folder: &Path, build: Build, into: &Path) -> Result<()> {
    let mut compile = compiler::command(
        build,
        &["rustc", "--quiet", "--package", "weir-web", "--lib", "--profile", "web"],
    )?;
    // No other gate sees this crate.
    check(compile.args(["--crate-type", "cdylib", "--", "-Dwarnings"]))?;
    let module = build.target().join(TARGET).join("web/weir_web.wasm");
    let mut bindgen = wasm_bindgen_cli_support::Bindgen::new();
    bindgen.input_path(module).out_name("engine").typescript(true).web(true)?.generate(into)?;
    optimise(folder, build, &into.join("engine_bg.wasm"))
}

/// The npm packages that the lock names.
fn install(folder: &Path) -> Result<()> {
    let stamp = folder.join("node_modules/.package-lock.json");
    let newer =
        |a: &Path, b: &Path| -> Result<bool> { Ok(a.metadata()?.modified()? > b.metadata()?.modified()?) };
    if stamp.exists() && !newer(&folder.join("package-lock.json"), &stamp)? {
        return Ok(());
    }
    check(program("npm").current_dir(folder).args([
        "ci",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--silent",
    ]))
}

fn node(folder: &Path, script: &str) -> std::process::Command {
    let mut command = program("node");
    command.current_dir(folder).arg(PathBuf::from("node_modules").join(script));
    command
}

/// Smaller and faster; not with all features, since browsers lack some of them.
fn optimise(folder: &Path, build: Build, module: &Path) -> Result<()> {
    let features = [
        "simd",
        "bulk-memory",
        "sign-ext",
        "nontrapping-float-to-int",
        "mutable-globals",
        "reference-types",
        "multivalue",
    ];
    let mut command = node(folder, "binaryen/bin/wasm-opt");
    command.arg("-O3").args(features.map(|feature| format!("--enable-{feature}")));
    if build == Build::Threads {
        command.arg("--enable-threads");
    }
    check(command.arg(module).arg("-o").arg(module))
}

/// What a first visit fetches.
fn report(dist: &Path) -> Result<()> {
    for name in ["engine_bg.wasm", "threads/engine_bg.wasm", "engine.js", "worker.js", "index.js"] {
        println!("{:>9} bytes  web/dist/{name}", dist.join(name).metadata()?.len());
    }
    Ok(())
}
