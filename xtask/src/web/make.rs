//! What `cargo xtask web` makes.
use super::compiler::{self, TARGET};
use crate::run::{check, program, root};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Builds `web/dist`, and the pages in `web/site`, which the next build of `weir` takes in.
pub fn build() -> Result<()> {
    let folder = root().join("web");
    install(&folder)?;
    let mut compile =
        compiler::command(&["rustc", "--quiet", "--package", "weir-web", "--lib", "--profile", "web"])?;
    // No other gate sees this crate.
    check(compile.args(["--crate-type", "cdylib", "--", "-Dwarnings"]))?;
    let dist = folder.join("dist");
    if dist.exists() {
        std::fs::remove_dir_all(&dist)?;
    }
    let module = root().join("target/web").join(TARGET).join("web/weir_web.wasm");
    let mut bindgen = wasm_bindgen_cli_support::Bindgen::new();
    bindgen.input_path(module).out_name("engine").typescript(true).web(true)?.generate(&dist)?;
    optimise(&folder, &dist.join("engine_bg.wasm"))?;
    check(node(&folder, "typescript/bin/tsc").args(["--project", "tsconfig.json"]))?;
    report(&dist)?;
    check(program("node").current_dir(&folder).arg("pack.mjs"))
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
fn optimise(folder: &Path, module: &Path) -> Result<()> {
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
    check(command.arg(module).arg("-o").arg(module))
}

/// What a first visit fetches.
fn report(dist: &Path) -> Result<()> {
    for name in ["engine_bg.wasm", "engine.js", "worker.js", "index.js"] {
        println!("{:>9} bytes  web/dist/{name}", dist.join(name).metadata()?.len());
    }
    Ok(())
}
