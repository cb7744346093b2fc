//! The compiler for WebAssembly: rustup's where its target is installed, else Debian's with a standard library that is
//! built here once. Threads that share memory need a standard library built for them, which nobody hands out; the compiler
//! calls that feature unstable, so it is told to allow it.
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
/// One memory for all threads, of at most 4 GiB; and what wasm-bindgen makes a thread with.
const THREADS: &str = "-Ctarget-feature=+atomics,+mutable-globals -Clink-arg=--shared-memory -Clink-arg=--import-memory \
                       -Clink-arg=--max-memory=4294967296 -Clink-arg=--export=__wasm_init_tls -Clink-arg=--export=__tls_size \
                       -Clink-arg=--export=__tls_align -Clink-arg=--export=__tls_base -Clink-arg=--export=__heap_base";

/// One of the two builds of the engine's module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// One thread, and GPUs.
    Plain,
    /// Threads that share memory.
    Threads,
}

impl Build {
    /// Where cargo builds it.
    pub fn target(self) -> PathBuf {
        root().join(match self {
            Build::Plain => "target/web",
            Build::Threads => "target/web-threads",
        })
    }

    /// How the standard library has to be built.
    fn library_features(self) -> &'static str {
        match self {
            Build::Plain => "",
            Build::Threads => "-Ctarget-feature=+atomics,+bulk-memory,+mutable-globals",
        }
    }
}

/// A cargo that builds for the target.
pub fn command(build: Build, arguments: &[&str]) -> Result<Command> {
    let mut command = cargo(arguments);
    command.args(["--target", TARGET, "--target-dir"]).arg(build.target());
    if build == Build::Plain && has_target() {
        command.env(FLAGS, FEATURES);
        return Ok(command);
    }
    let compiler = Compiler::find()?;
    let sysroot = compiler.sysroot(build)?;
    compiler.prepare(&mut command);
    let flags = match build {
        Build::Plain => FEATURES.to_owned(),
        Build::Threads => {
            command.env("RUSTC_BOOTSTRAP", "1");
            format!("{FEATURES} {THREADS}")
        }
    };
    command.env(FLAGS, format!("--sysroot {} {flags}", sysroot.display()));
    Ok(command)
}

/// Whether the compiler that builds everything else has the target's standard library.
fn has_target() -> bool {
    let library = |root: String| Path::new(root.trim()).join("lib/rustlib").join(TARGET).exists();
    output(program("rustc").args(["--print", "sysroot"])).is_ok_and(library)
}

/// A compiler that has the sources of the standard library beside it.
struct Compiler {
    rustc: PathBuf,
    /// Where rustc doesn't bring its own.
    linker: Option<String>,
}

impl Compiler {
    /// Rustup's, or Debian's.
    fn find() -> Result<Compiler> {
        let sources = |rustc: &Path| {
            let library =
                |root: String| Path::new(root.trim()).join("lib/rustlib/src/rust/library/std").exists();
            output(program(rustc).args(["--print", "sysroot"])).is_ok_and(library)
        };
        let rustups = PathBuf::from("rustc");
        if sources(&rustups) {
            return Ok(Compiler { rustc: rustups, linker: None });
        }
        let debians = PathBuf::from("/usr/bin/rustc");
        let names = (14..40).rev().map(|version| format!("wasm-ld-{version}"));
        let linker = names.chain(["wasm-ld".to_owned()]).find(|name| works(name, &["--version"]));
        match linker {
            Some(linker) if debians.exists() && sources(&debians) => {
                Ok(Compiler { rustc: debians, linker: Some(linker) })
            }
            _ => bail!(
                "the sources of the standard library aren't here; install them with\n  rustup component add rust-src\nor, on \
                 Debian,\n  apt-get install -y --no-install-recommends rustc-web rust-web-src lld-22"
            ),
        }
    }

    fn prepare(&self, command: &mut Command) {
        command.env("RUSTC", &self.rustc);
        if let Some(linker) = &self.linker {
            command.env(LINKER, linker);
        }
    }

    /// The folder with the target's standard library, built if it isn't there.
    fn sysroot(&self, build: Build) -> Result<PathBuf> {
        let version = output(program(&self.rustc).arg("--version"))?;
        let name: String =
            version.chars().map(|c| if c.is_alphanumeric() || c == '.' { c } else { '-' }).collect();
        let kind = match build {
            Build::Plain => "",
            Build::Threads => "-threads",
        };
        let folder = root().join("target/web-sysroot").join(format!("{}{kind}", name.trim_matches('-')));
        let library = folder.join("lib/rustlib").join(TARGET).join("lib");
        if library.exists() {
            return Ok(folder);
        }
        let empty = self.standard_library(build)?;
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
        link_host(&self.rustc, &folder)?;
        std::fs::create_dir_all(library.parent().context("a library has a folder")?)?;
        // Only now is it there: a build that was interrupted is begun again.
        std::fs::rename(parts, library)?;
        Ok(folder)
    }

    /// Builds it beneath a crate with nothing in it; says where that is.
    fn standard_library(&self, build: Build) -> Result<PathBuf> {
        println!("building the standard library for {TARGET} ({build:?})");
        let empty = root().join("target/web-empty").join(format!("{build:?}").to_lowercase());
        std::fs::create_dir_all(empty.join("src"))?;
        std::fs::write(empty.join("src/lib.rs"), "")?;
        let manifest = "[package]\nname = \"empty\"\nedition = \"2024\"\n[lib]\n[profile.release]\npanic = \"abort\"\n[workspace]\n";
        std::fs::write(empty.join("Cargo.toml"), manifest)?;
        let mut command =
            cargo(&["build", "--quiet", "--release", "-Zbuild-std=std,panic_abort", "--target", TARGET]);
        self.prepare(&mut command);
        command.current_dir(&empty).env("RUSTC_BOOTSTRAP", "1");
        check(command.env(FLAGS, format!("-Cembed-bitcode=yes {}", build.library_features())))?;
        Ok(empty)
    }
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
