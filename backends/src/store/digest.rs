//! SHA-256 of files, remembered by path, size and time of change, so that a start doesn't read a whole model.
use super::catalog::{from_hex, to_hex};
use super::part;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Remembered {
    path: PathBuf,
    size: u64,
    modified_ns: u64,
    sha256: String,
}

/// SHA-256 of `path`, from `folder` if it is known there, else computed and remembered.
pub(super) fn sha256_of(folder: &Path, path: &Path) -> io::Result<[u8; 32]> {
    let path = fs::canonicalize(path)?;
    let mut file = File::open(&path)?;
    let note = note_of(folder, &path);
    if let Some(known) = recall(&note, &path, &file)? {
        return Ok(known);
    }
    let digest: [u8; 32] = part::hash(&mut file, |_| ())?.finalize().into();
    remember(folder, &path, &digest)?;
    Ok(digest)
}

/// Notes that `path` as it is now has this digest. A cache that can't be written is no error.
pub(super) fn remember(folder: &Path, path: &Path, digest: &[u8; 32]) -> io::Result<()> {
    let path = fs::canonicalize(path)?;
    let (size, modified_ns) = stamp(&File::open(&path)?)?;
    let note = note_of(folder, &path);
    let text = Remembered { path, size, modified_ns, sha256: to_hex(digest) };
    let written = fs::create_dir_all(folder).and_then(|()| {
        let new = part::beside(&note, &format!("{}.new", std::process::id()));
        fs::write(&new, serde_json::to_vec(&text)?)?;
        fs::rename(&new, &note)
    });
    if let Err(e) = written {
        tracing::debug!("digest not remembered in {}: {e}", folder.display());
    }
    Ok(())
}

fn recall(note: &Path, path: &Path, file: &File) -> io::Result<Option<[u8; 32]>> {
    let (size, modified_ns) = stamp(file)?;
    let known = fs::read(note).ok().and_then(|text| serde_json::from_slice::<Remembered>(&text).ok());
    let known = known.filter(|k| k.path == path && k.size == size && k.modified_ns == modified_ns);
    Ok(known.and_then(|k| from_hex(&k.sha256)))
}

fn stamp(file: &File) -> io::Result<(u64, u64)> {
    let about = file.metadata()?;
    let modified = about.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok((about.len(), u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX)))
}

fn note_of(folder: &Path, path: &Path) -> PathBuf {
    let key = Sha256::digest(path.as_os_str().as_encoded_bytes());
    folder.join(format!("{}.json", to_hex(&key[..16])))
}
