//! Model files: a bounds-checked reader of GGUF versions 2 and 3 (little-endian), whole or split.
//!
//! The format is specified at <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>: a header of metadata and
//! tensor infos, then the tensors' bytes. Only the header is read on opening; a tensor's bytes are read when asked
//! for, by position, into the caller's buffer. Nothing is mapped, so that a file cut short while in use is an error
//! and not a signal, and resident memory is what the caller chose to keep.
#![forbid(unsafe_code)]

mod error;
mod header;
mod source;
#[cfg(test)]
mod tests;
mod types;
mod value;
pub mod write;

pub use error::GgufError;
pub use source::ReadAt;
pub use types::GgmlType;
pub use value::{Array, FromValue, Strings, Value};

use header::Header;
use source::Source;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model file that has been opened and whose header has been checked: every tensor lies within the file, aligned,
/// and overlaps no other. Reading is thread-safe and takes `&self`.
#[derive(Debug)]
pub struct ModelFile {
    parts: Vec<Source>,
    metadata: HashMap<String, Value>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

/// Where a tensor is and what it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, unique in the model.
    pub name: String,
    /// How its values are stored.
    pub ty: GgmlType,
    /// GGUF's `ne`: the fastest-running dimension first, so a matrix is `[cols, rows]`. One to four, none zero.
    pub dims: Vec<u64>,
    /// Of the first byte, from the start of its file.
    pub offset: u64,
    /// Its length; 0 where the type is unknown.
    pub bytes: u64,
    /// Which file of a split model, from 0.
    pub part: usize,
}

impl TensorInfo {
    /// Number of values.
    pub fn values(&self) -> u64 {
        self.dims.iter().product()
    }
}

impl ModelFile {
    /// Opens a file and reads its header. Of a split model (`NAME-00001-of-00003.gguf`), give the first file; the
    /// others are looked for beside it.
    pub fn open(path: &Path) -> Result<ModelFile, GgufError> {
        let within = |cause: GgufError| cause.within(path.display());
        let first = Source::open(path).map_err(within)?;
        let header = header::read(&first, 0).map_err(within)?;
        let mut file = ModelFile { parts: vec![first], ..ModelFile::new(header) };
        let count = file.split_count().map_err(within)?;
        for part in 1..count {
            let path = part_path(path, part, count)
                .ok_or_else(|| {
                    GgufError::malformed(format!(
                        "is part 1 of {count}, but its name doesn't end in -00001-of-{count:05}.gguf"
                    ))
                })
                .map_err(within)?;
            let source = Source::open(&path);
            source
                .and_then(|source| file.add_part(source, part, count))
                .map_err(|cause| cause.within(path.display()))?;
        }
        file.check_split_total(count).map_err(within)?;
        Ok(file)
    }

    /// A whole file that is in memory. Split models can't be read this way.
    pub fn from_bytes(bytes: impl Into<Arc<[u8]>>) -> Result<ModelFile, GgufError> {
        let source = Source::Memory(bytes.into());
        let header = header::read(&source, 0)?;
        let file = ModelFile { parts: vec![source], ..ModelFile::new(header) };
        match file.split_count()? {
            1 => Ok(file),
            count => Err(GgufError::malformed(format!("is one of {count} parts; only a path can be opened"))),
        }
    }

    /// All parts of a model, in order; one for a whole file.
    pub fn from_sources(sources: Vec<Box<dyn ReadAt>>) -> Result<ModelFile, GgufError> {
        let given = sources.len();
        let mut sources = sources.into_iter().map(Source::Other);
        let first = sources.next().ok_or_else(|| GgufError::malformed("has no parts"))?;
        let header = header::read(&first, 0)?;
        let mut file = ModelFile { parts: vec![first], ..ModelFile::new(header) };
        let count = file.split_count()?;
        if count as usize != given {
            return Err(GgufError::malformed(format!("has {count} parts; {given} were given")));
        }
        for (source, part) in sources.zip(1..) {
            file.add_part(source, part, count)
                .map_err(|cause| cause.within(format_args!("part {}", part + 1)))?;
        }
        file.check_split_total(count)?;
        Ok(file)
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// Reads `range`, in bytes from the tensor's start, into `out`, which has the range's length.
    pub fn read(&self, tensor: &TensorInfo, range: Range<u64>, out: &mut [u8]) -> Result<(), GgufError> {
        let within = |cause: GgufError| cause.within(format_args!("tensor {}", tensor.name));
        if let GgmlType::Unknown(_) = tensor.ty {
            return Err(within(GgufError::UnknownType(tensor.ty)));
        }
        let length = range.end.checked_sub(range.start);
        let (Some(part), Some(offset)) =
            (self.parts.get(tensor.part), tensor.offset.checked_add(range.start))
        else {
            return Err(within(GgufError::malformed("isn't of this file")));
        };
        if range.end > tensor.bytes || length != Some(out.len() as u64) {
            let why = format!("bytes {range:?} of {} asked for, into {}", tensor.bytes, out.len());
            return Err(within(GgufError::malformed(why)));
        }
        part.read_at(offset, out).map_err(within)
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All metadata, in no particular order.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// A metadata value of type `T`, or none where the file hasn't the key. A value of another type is an error.
    pub fn optional<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        self.get(key)
            .map(|value| {
                T::from_value(value).ok_or_else(|| GgufError::WrongType {
                    key: key.to_owned(),
                    expected: T::NAME,
                    found: value.describe(),
                })
            })
            .transpose()
    }

    /// A metadata value of type `T` that the file must have.
    pub fn required<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        self.optional(key)?.ok_or_else(|| GgufError::MissingKey { key: key.to_owned() })
    }

    /// An integer of any width that fits.
    pub fn u32(&self, key: &str) -> Result<u32, GgufError> {
        self.required(key)
    }

    /// A number; an f64 is rounded.
    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.required(key)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        self.required(key)
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<bool, GgufError> {
        self.required(key)
    }

    /// An array of any type.
    pub fn array(&self, key: &str) -> Result<&Array, GgufError> {
        self.required(key)
    }

    /// Length of the file; of all its parts, for a split model.
    pub fn total_bytes(&self) -> u64 {
        self.parts.iter().map(Source::len).sum()
    }

    fn new(header: Header) -> ModelFile {
        let by_name = header.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        ModelFile { parts: Vec::new(), metadata: header.metadata, tensors: header.tensors, by_name }
    }

    /// 1 for a whole file. An error where this is not the first part.
    fn split_count(&self) -> Result<u32, GgufError> {
        let count = self.optional::<u32>("split.count")?.unwrap_or(1).max(1);
        match self.optional::<u32>("split.no")?.unwrap_or(0) {
            0 if count <= PARTS_MAX => Ok(count),
            0 => Err(GgufError::malformed(format!("has {count} parts; at most {PARTS_MAX} are read"))),
            no => Err(GgufError::malformed(format!("is part {} of {count}; open the first", no + 1))),
        }
    }

    fn add_part(&mut self, source: Source, part: u32, count: u32) -> Result<(), GgufError> {
        let header = header::read(&source, self.parts.len())?;
        let other = ModelFile::new(header);
        let (no, of) = (other.required::<u32>("split.no")?, other.required::<u32>("split.count")?);
        if (no, of) != (part, count) {
            let why = format!("says it is part {} of {of}, not {} of {count}", u64::from(no) + 1, part + 1);
            return Err(GgufError::malformed(why));
        }
        for tensor in other.tensors {
            if self.by_name.insert(tensor.name.clone(), self.tensors.len()).is_some() {
                return Err(GgufError::malformed(format!(
                    "tensor {} is in an earlier part too",
                    tensor.name
                )));
            }
            self.tensors.push(tensor);
        }
        self.parts.push(source);
        Ok(())
    }

    fn check_split_total(&self, count: u32) -> Result<(), GgufError> {
        let expected = self.optional::<u32>("split.tensors.count")?;
        match expected {
            Some(n) if count > 1 && n as usize != self.tensors.len() => Err(GgufError::malformed(format!(
                "its {count} parts have {} tensors together, not the {n} they should",
                self.tensors.len()
            ))),
            _ => Ok(()),
        }
    }
}

/// Most files of a split model.
const PARTS_MAX: u32 = 4096;

/// The path of part `part` (from 0) beside the first one's.
fn part_path(first: &Path, part: u32, count: u32) -> Option<PathBuf> {
    let name = first.file_name()?.to_str()?;
    let stem = name.strip_suffix(&format!("-00001-of-{count:05}.gguf"))?;
    Some(first.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", part + 1)))
}
