//! A file on its way: written piece by piece, hashed as it grows, kept if the process dies.
use super::catalog::to_hex;
use super::error::{SourceError, StoreError};
use super::{CHUNK, Progress};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The first `len()` bytes of a file of known size, in `NAME.gguf.part`, beside a note of where they came from.
///
/// Opened under the model's lock. Sources call [`Part::append`] until [`Part::missing`] is 0; then [`Part::seal`]
/// gives the file its name, if its contents are the promised ones.
pub(super) struct Part {
    file: File,
    path: PathBuf,
    len: u64,
    size: u64,
    hasher: Sha256,
    note: Note,
    /// Bytes that an earlier process, or an earlier source, left behind.
    pub(super) inherited: u64,
}

/// Where the bytes came from, so that a changed file on the server is noticed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) url: String,
    pub(super) etag: Option<String>,
}

impl Part {
    /// What is there of `path` (the final name), or nothing yet. Bytes that are there are hashed again.
    pub(super) fn open(
        path: &Path,
        size: u64,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Part, StoreError> {
        let part = beside(path, "part");
        let mut open = || {
            let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&part)?;
            if file.metadata()?.len() > size {
                file.set_len(0)?;
            }
            let len = file.metadata()?.len();
            let hasher = hash(&mut file, |done| progress(Progress::Checking { done, total: len }))?;
            Ok((file, len, hasher))
        };
        let (file, len, hasher) = open().map_err(|e| StoreError::io("open", &part, e))?;
        let note = fs::read(beside(path, "part.json")).ok();
        let note = note.and_then(|n| serde_json::from_slice(&n).ok()).unwrap_or_default();
        Ok(Part { file, path: path.into(), len, size, hasher, note, inherited: len })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn missing(&self) -> u64 {
        self.size - self.len
    }

    pub(super) fn note(&self) -> &Note {
        &self.note
    }

    /// Remembers, across processes, where the bytes come from.
    pub(super) fn set_note(&mut self, note: Note) -> Result<(), StoreError> {
        if note != self.note {
            let path = beside(&self.path, "part.json");
            let text = serde_json::to_vec(&note).unwrap_or_default();
            fs::write(&path, text).map_err(|e| self.write_error(&path, e))?;
            self.note = note;
        }
        Ok(())
    }

    /// Back to nothing.
    pub(super) fn restart(&mut self) -> Result<(), StoreError> {
        let restart = |file: &mut File| file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0)));
        restart(&mut self.file).map_err(|e| StoreError::io("empty", &beside(&self.path, "part"), e))?;
        (self.len, self.inherited, self.hasher) = (0, 0, Sha256::new());
        Ok(())
    }

    /// The next bytes. More than the file's size is refused.
    pub(super) fn append(&mut self, mut bytes: &[u8]) -> Result<(), SourceError> {
        if bytes.len() as u64 > self.missing() {
            return Err(SourceError::Different(format!("more than {} bytes", self.size)));
        }
        while !bytes.is_empty() {
            let taken = match self.file.write(bytes) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
                other => other,
            };
            let taken = taken.map_err(|e| self.write_error(&beside(&self.path, "part"), e))?;
            self.hasher.update(&bytes[..taken]);
            self.len += taken as u64;
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    /// All that `reader` has, up to the file's size.
    pub(super) fn append_all(
        &mut self,
        reader: &mut dyn Read,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), SourceError> {
        let mut buffer = vec![0; CHUNK];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => self.append(&buffer[..n])?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(SourceError::Network(e.to_string())),
            }
            progress(Progress::Bytes { done: self.len, total: self.size });
        }
    }

    /// Checks the digest and gives the file its name, safely on the disk.
    /// Otherwise the bytes are worthless: they are thrown away.
    pub(super) fn seal(&mut self, sha256: &[u8; 32]) -> Result<(), SourceError> {
        let found: [u8; 32] = self.hasher.clone().finalize().into();
        if found != *sha256 {
            let wanted = to_hex(sha256);
            self.restart()?;
            return Err(SourceError::Different(format!("SHA-256 {} instead of {wanted}", to_hex(&found))));
        }
        self.file.sync_all().map_err(|e| self.write_error(&beside(&self.path, "part"), e))?;
        let part = beside(&self.path, "part");
        fs::rename(&part, &self.path).map_err(|e| StoreError::io("rename", &part, e))?;
        let _ = fs::remove_file(beside(&self.path, "part.json"));
        if let Some(folder) = self.path.parent().filter(|_| cfg!(unix)) {
            // so that the new name survives a power cut; the contents are safe already
            let _ = File::open(folder).and_then(|f| f.sync_all());
        }
        Ok(())
    }

    /// The error of a failed write: a full disk is worth a message of its own.
    pub(super) fn write_error(&self, path: &Path, e: io::Error) -> StoreError {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        match e.kind() {
            StorageFull | QuotaExceeded => self.disk_full(),
            _ => StoreError::io("write", path, e),
        }
    }

    pub(super) fn disk_full(&self) -> StoreError {
        let folder = self.path.parent().unwrap_or(Path::new(".")).to_owned();
        StoreError::DiskFull { needs: self.missing(), folder }
    }
}

/// The name of a companion: `x.gguf` and `part` give `x.gguf.part`.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// SHA-256 of the rest of `file`, which is left at its end.
pub(super) fn hash(file: &mut File, mut progress: impl FnMut(u64)) -> io::Result<Sha256> {
    let (mut hasher, mut buffer, mut done) = (Sha256::new(), vec![0; CHUNK], 0);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                done += n as u64;
                progress(done);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
