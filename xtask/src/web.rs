//! The browser's engine, SDK and pages: a WebAssembly module, the JavaScript around it, and TypeScript made into modules.
#[cfg(feature = "web")]
mod compiler;
#[cfg(feature = "web")]
mod make;

use crate::models;
use crate::run::{cargo, check, output, program, root, works};
use anyhow::{Result, bail};
#[cfg(feature = "web")]
pub use make::build;
use std::path::PathBuf;

/// What browsers call Chromium's program, in the order of preference.
const BROWSERS: [&str; 4] =
    ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome", "chromium"];

/// Builds it with what that needs, which this build of xtask lacks.
#[cfg(not(feature = "web"))]
pub fn build() -> Result<()> {
    check(&mut cargo(&["run", "--quiet", "--package", "xtask", "--features", "web", "--", "web"]))
}

/// How much is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Default,
    /// The examples of desktop programs, too, and pictures of all pages.
    Full,
}

/// What is missing for that, and the Debian packages that have it.
fn missing(scope: Scope) -> Vec<(&'static str, &'static str)> {
    let mut missing = Vec::new();
    if scope == Scope::Full {
        if !works("Xvfb", &["-help"]) {
            missing.push(("a screen that nobody sees", "xvfb"));
        }
        if !works("pkg-config", &["--exists", "webkit2gtk-4.1"]) {
            missing.push(("a web view", "libwebkit2gtk-4.1-dev"));
        }
    }
    if browser().is_none() {
        missing.push(("chromium", "chromium"));
    }
    let has_sources =
        |root: String| std::path::Path::new(root.trim()).join("lib/rustlib/src/rust/library/std").exists();
    let rustups = output(program("rustc").args(["--print", "sysroot"])).is_ok_and(has_sources);
    let debians = works("/usr/bin/rustc", &["--version"]) && works("wasm-ld-22", &["--version"]);
    if !rustups && !debians {
        missing.push(("the sources of the standard library", "rustc-web rust-web-src lld-22"));
    }
    missing
}

fn browser() -> Option<&'static str> {
    BROWSERS.into_iter().find(|browser| works(browser, &["--version"]))
}

/// Builds it, and tests it in Chromium.
pub fn test(scope: Scope) -> Result<()> {
    let missing = missing(scope);
    if !missing.is_empty() {
        let packages: Vec<&str> = missing.iter().map(|(_, packages)| *packages).collect();
        bail!(
            "the browser's tests need more; install it with\n  apt-get install -y --no-install-recommends {}",
            packages.join(" ")
        );
    }
    build()?;
    let folder = root().join("web");
    let Some(browser) = browser() else {
        bail!("there is no Chromium; install it with\n  apt-get install -y --no-install-recommends chromium");
    };
    let mut tests = program("node");
    // With the pages in it.
    check(&mut cargo(&["build", "--quiet", "--package", "weir", "--bin", "weir"]))?;
    let mut files = vec!["remote", "store", "join", "console", "examples", "engine"];
    match scope {
        Scope::Full => files.push("desktop"),
        Scope::Default => {
            eprintln!("SKIPPED: the examples of desktop programs; `cargo xtask web test --full` has them")
        }
    }
    let files = files.into_iter().map(|name| format!("test/{name}.test.mjs"));
    tests.current_dir(&folder).args(["--test", "--test-reporter=spec"]).args(files);
    tests.env("WEIR_TEST_BROWSER", browser).env("WEIR_TEST_MODELS", models::folder()?).env("CI", "true");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    tests
        .env("WEIR_TEST_PROGRAM", target.join("debug").join(format!("weir{}", std::env::consts::EXE_SUFFIX)));
    check(&mut tests)?;
    if scope == Scope::Full {
        let into = target.join("screenshots");
        let mut pictures = program("node");
        pictures.current_dir(&folder).arg("test/screenshots.mjs").arg(&into).envs(
            tests
                .get_envs()
                .filter_map(|(name, value)| value.map(|value| (name.to_owned(), value.to_owned()))),
        );
        check(&mut pictures)?;
        println!("pictures of the pages, to look at: {}", into.display());
    }
    Ok(())
}
