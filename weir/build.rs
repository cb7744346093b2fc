//! Puts the pages that `cargo xtask web` has made into the program, if it has made them.
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// What `cargo xtask web` fills.
const SITE: &str = "../web/site";

fn main() -> io::Result<()> {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or(io::ErrorKind::NotFound)?);
    let site = here.join(SITE);
    println!("cargo::rerun-if-changed=build.rs");
    let mut files = Vec::new();
    if site.is_dir() {
        println!("cargo::rerun-if-changed={SITE}");
        list(&site, &site, &mut files)?;
    }
    files.sort();
    let mut text = "&[\n".to_owned();
    for (path, file) in &files {
        let packed = file.extension().is_some_and(|extension| extension == "gz");
        let plain = if packed { file.with_extension("") } else { file.clone() };
        if packed && plain.is_file() {
            continue;
        }
        let path = if packed { path.trim_end_matches(".gz") } else { path };
        let bytes = if packed { "&[]".to_owned() } else { format!("include_bytes!({file:?})") };
        let gzip = with_gz(&plain);
        let gzip = match gzip.is_file() {
            true => format!("Some(include_bytes!({gzip:?}))"),
            false => "None".to_owned(),
        };
        let mut hash = DefaultHasher::new();
        hash.write(&fs::read(file)?);
        let tag = format!("\"{:016x}\"", hash.finish());
        _ = writeln!(text, "Asset {{ path: {path:?}, bytes: {bytes}, gzip: {gzip}, tag: {tag:?} }},");
    }
    text.push(']');
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    fs::write(out.join("site.rs"), text)
}

/// The same with `.gz` behind it.
fn with_gz(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".gz");
    name.into()
}

/// Paths as pages name them, and files.
fn list(root: &Path, folder: &Path, files: &mut Vec<(String, PathBuf)>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list(root, &path, files)?;
        } else if let Some(name) = path.strip_prefix(root).ok().and_then(Path::to_str)
            && !name.starts_with('.')
        {
            files.push((format!("/{}", name.replace('\\', "/")), path.canonicalize()?));
        }
    }
    Ok(())
}
