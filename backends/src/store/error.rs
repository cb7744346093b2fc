//! What can go wrong while a model is looked up or fetched.
use super::human;
use std::io;
use std::path::{Path, PathBuf};

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Neither a catalog name nor a file.
    #[error("no model is called `{name}`; did you mean {}? (`weir models` lists them; a path to a .gguf works too)", nearest.join(", "))]
    Unknown {
        /// As it was given.
        name: String,
        /// Best first.
        nearest: Vec<String>,
    },
    /// In the catalog, but not on this machine.
    #[error("{name} is not on this machine; `weir pull {name}` fetches it ({})", human(*size))]
    NotPulled {
        /// Canonical name.
        name: String,
        /// Bytes to fetch.
        size: u64,
    },
    /// A path to nothing.
    #[error("there is no file {}", .0.display())]
    NoFile(PathBuf),
    /// A path to a folder, a pipe or a device.
    #[error("{} is no regular file; name the .gguf itself", .0.display())]
    NotAFile(PathBuf),
    /// The file in the cache is not the one that the catalog promises.
    #[error("{} is damaged (its SHA-256 is not the catalog's); `weir pull {name}` fetches it again", path.display())]
    Damaged {
        /// Canonical name.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// Every source failed.
    #[error("could not fetch {name}:{}", tried.iter().map(|(s, e)| format!("\n  {s}: {e}")).collect::<String>())]
    NoSource {
        /// Canonical name.
        name: String,
        /// What was tried, in order, and why it failed.
        tried: Vec<(String, SourceError)>,
    },
    /// No room. What has been fetched stays, and the next pull goes on from there.
    #[error("the disk is full: {} more needed in {}; free some space and pull again, or set WEIR_CACHE to a folder on another disk", human(*needs), folder.display())]
    DiskFull {
        /// Bytes still to be written.
        needs: u64,
        /// Where.
        folder: PathBuf,
    },
    /// A file or folder of the cache could not be used.
    #[error("could not {doing} {}: {source}", path.display())]
    Io {
        /// A verb.
        doing: &'static str,
        /// Of what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A catalog file is wrong.
    #[error("{}: {message}", path.display())]
    Catalog {
        /// Which.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
    /// The environment doesn't say where caches go.
    #[error("don't know where to keep models: set WEIR_CACHE to a folder (HOME is not set either)")]
    NoCacheDir,
    /// A proxy's address makes no sense.
    #[error("`{0}` is not the address of a proxy; it looks like http://host:port")]
    Proxy(String),
}

/// Why one source failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No answer, or the connection broke more often than is worth trying.
    #[error("{0}")]
    Network(String),
    /// The server said no.
    #[error("{url} answered {status}{}", hint(*status))]
    Status {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// It has a file, but not this one.
    #[error("it has a different file: {0}")]
    Different(String),
    /// An external program failed or is missing.
    #[error("{0}")]
    Tool(String),
    /// A local file could not be read.
    #[error("{0}")]
    File(String),
    /// Nothing is wrong with the source: the disk or the cache is.
    #[error(transparent)]
    Here(Box<StoreError>),
}

fn hint(status: u16) -> &'static str {
    match status {
        401 | 403 => " (a gated model needs HF_TOKEN, of an account that accepted its terms)",
        429 => " (too many requests; try again later)",
        _ => "",
    }
}

impl StoreError {
    pub(super) fn io(doing: &'static str, path: &Path, source: io::Error) -> StoreError {
        StoreError::Io { doing, path: path.into(), source }
    }
}

impl From<StoreError> for SourceError {
    fn from(e: StoreError) -> SourceError {
        SourceError::Here(Box::new(e))
    }
}
