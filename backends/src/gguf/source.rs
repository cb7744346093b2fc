//! Bytes by position, from a file or from memory.
use super::GgufError;
use std::fmt::Debug;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// Somewhere else that a model file can be read from: a browser's private files, say.
pub trait ReadAt: Debug + Send + Sync {
    /// Bytes in all.
    fn size(&self) -> u64;
    /// Fills `out` with the bytes from `offset` on; an error where there are fewer.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()>;
}

/// Where a model file's bytes come from.
#[derive(Debug)]
pub(super) enum Source {
    /// An open file and its length when it was opened.
    File(File, u64),
    /// A whole file in memory.
    Memory(Arc<[u8]>),
    /// Elsewhere.
    Other(Box<dyn ReadAt>),
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Source, GgufError> {
        // Before opening, which would wait for the other end of a pipe.
        if !std::fs::metadata(path)?.is_file() {
            return Err(GgufError::malformed("is not a regular file"));
        }
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Source::File(file, length))
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Source::File(_, length) => *length,
            Source::Memory(bytes) => bytes.len() as u64,
            Source::Other(source) => source.size(),
        }
    }

    /// Fills `out` with the bytes from `offset` on.
    pub(super) fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), GgufError> {
        match self {
            Source::File(file, _) => Ok(read_exact_at(file, offset, out)?),
            Source::Other(source) => {
                let left = self.len().saturating_sub(offset);
                if left < out.len() as u64 {
                    return Err(GgufError::Truncated { at: offset, needed: out.len() as u64, left });
                }
                Ok(source.read_at(offset, out)?)
            }
            Source::Memory(bytes) => {
                let from = usize::try_from(offset).ok();
                let found = from.and_then(|from| bytes.get(from..from.checked_add(out.len())?));
                let left = self.len().saturating_sub(offset);
                out.copy_from_slice(found.ok_or(GgufError::Truncated {
                    at: offset,
                    needed: out.len() as u64,
                    left,
                })?);
                Ok(())
            }
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> std::io::Result<()> {
    use std::io::ErrorKind;
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                out = &mut out[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(not(any(unix, windows)))]
fn read_exact_at(_: &File, _: u64, _: &mut [u8]) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}
