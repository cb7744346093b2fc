//! The compiler for WebAssembly: rustup's where its target is installed, else Debian's with a standard library that is
//! built here once.
use crate::run::{cargo, check, output, program, root, works};
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target's name.
pub const TARGET: &str = "wasm32-unknown-unknown";
const LINKER: &str = "CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER";
const FLAGS: &str = "CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS";
/// Browsers have had these since 2023.
const FEATURES: &str = "-Ctarget-feature=+simd128,+bulk-memory,+sign-ext,+nontrapping-fptoint";

/// A cargo that builds for the target.
pub fn command(arguments: &[&str]) -> Result<Command> {
    let mut command = cargo(arguments);
    command.args(["--target", TARGET, "--target-dir"]).arg(root().join("target/web"));
    if has_target() {
        command.env(FLAGS, FEATURES);
        return Ok(command);
    }
    let (rustc, linker) = debian()?;
    let sysroot = sysroot(&rustc, &linker)?;
    command.env("RUSTC", rustc).env(LINKER, linker);
    command.env(FLAGS, format!("--sysroot {} {FEATURES}", sysroot.display()));
    Ok(command)
}

/// Whether the compiler that builds everything else has the target's standard library.
fn has_target() -> bool {
    let library = |root: String| Path::new(root.trim()).join("lib/rustlib").join(TARGET).exists();
    output(program("rustc").args(["--print", "sysroot"])).is_ok_and(library)
}

/// Debian's compiler, which has the sources of the standard library beside it, and its linker.
fn debian() -> Result<(PathBuf, String)> {
    let rustc = PathBuf::from("/usr/bin/rustc");
    let linker = || {
        let names = (14..40).rev().map(|version| format!("wasm-ld-{version}"));
        names.chain(["wasm-ld".to_owned()]).find(|name| works(name, &["--version"]))
    };
    let sources = |rustc: &Path| -> Result<bool> {
        let root = output(program(rustc).args(["--print", "sysroot"]))?;
        Ok(Path::new(root.trim()).join("lib/rustlib/src/rust/library/std").exists())
    };
    match linker() {
        Some(linker) if rustc.exists() && sources(&rustc)? => Ok((rustc, linker)),
        _ => bail!(
            "there is no standard library for {TARGET}; install it with\n  rustup target add {TARGET}\nor, on Debian,\n  \
             apt-get install -y --no-install-recommends rustc-web rust-web-src lld-22"
        ),
    }
}

/// The folder with the target's standard library, built if it isn't there.
fn sysroot(rustc: &Path, linker: &str) -> Result<PathBuf> {
    let version = output(program(rustc).arg("--version"))?;
    let name: String =
        version.chars().map(|c| if c.is_alphanumeric() || c == '.' { c } else { '-' }).collect();
    let folder = root().join("target/web-sysroot").join(name.trim_matches('-'));
    let library = folder.join("lib/rustlib").join(TARGET).join("lib");
    if library.exists() {
        return Ok(folder);
    }
    println!("building the standard library for {TARGET}");
    let empty = root().join("target/web-empty");
    std::fs::create_dir_all(empty.join("src"))?;
    std::fs::write(empty.join("src/lib.rs"), "")?;
    let manifest = "[package]\nname = \"empty\"\nedition = \"2024\"\n[lib]\n[profile.release]\npanic = \"abort\"\n[workspace]\n";
    std::fs::write(empty.join("Cargo.toml"), manifest)?;
    let mut build =
        cargo(&["build", "--quiet", "--release", "-Zbuild-std=std,panic_abort", "--target", TARGET]);
    build.current_dir(&empty).env("RUSTC_BOOTSTRAP", "1").env("RUSTC", rustc).env(LINKER, linker);
    check(build.env(FLAGS, "-Cembed-bitcode=yes"))?;
    let built = empty.join("target").join(TARGET).join("release/deps");
    let parts = folder.join("parts");
    std::fs::create_dir_all(&parts)?;
    for entry in std::fs::read_dir(&built).with_context(|| built.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".rlib") && !name.starts_with("libempty-") {
            std::fs::copy(&path, parts.join(&name))?;
        }
    }
    link_host(rustc, &folder)?;
    std::fs::create_dir_all(library.parent().context("a library has a folder")?)?;
    // Only now is it there: a build that was interrupted is begun again.
    std::fs::rename(parts, library)?;
    Ok(folder)
}

/// Build scripts and macros run here, and need this machine's own standard library.
fn link_host(rustc: &Path, folder: &Path) -> Result<()> {
    let about = output(program(rustc).arg("-vV"))?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let root = output(program(rustc).args(["--print", "sysroot"]))?;
    let from = Path::new(root.trim()).join("lib/rustlib").join(host);
    let to = folder.join("lib/rustlib").join(host);
    std::fs::create_dir_all(folder.join("lib/rustlib"))?;
    if to.symlink_metadata().is_err() {
        #[cfg(unix)]
        std::os::unix::fs::symlink(&from, &to)?;
        #[cfg(not(unix))]
        bail!("{} has to be copied to {}", from.display(), to.display());
    }
    Ok(())
}
