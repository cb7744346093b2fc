//! Puts the page and the SDK where Tauri takes them in.
use std::path::Path;
use std::{fs, io};

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, into) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &into)?;
        } else if path.extension().is_some_and(|kind| kind == "js" || kind == "wasm" || kind == "html") {
            fs::copy(&path, &into)?;
        }
    }
    Ok(())
}

fn main() {
    let (page, sdk) = (Path::new("page"), Path::new("../../dist"));
    assert!(sdk.join("index.js").exists(), "the SDK isn't there: make it with `cargo xtask web`");
    for part in [page, sdk] {
        println!("cargo:rerun-if-changed={}", part.display());
    }
    copy(page, Path::new("site")).expect("the page can be copied");
    copy(sdk, Path::new("site/dist")).expect("the SDK can be copied");
    tauri_build::build();
}
