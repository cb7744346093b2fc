//! The header: metadata and tensor infos. Every count and length is checked against the bytes that are left before
//! anything is allocated for it.
use super::source::Source;
use super::{Array, GgmlType, GgufError, Strings, TensorInfo, Value};
use std::collections::HashMap;

/// What a header holds.
pub(super) struct Header {
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: Vec<TensorInfo>,
}

/// Longest header that is read; those of the largest vocabularies have some 20 MiB.
const HEADER_BYTES_MAX: u64 = 128 << 20;
/// Longest key or tensor name.
const NAME_BYTES_MAX: u64 = 65_535;
/// Deepest array within arrays.
const NESTING_MAX: u32 = 4;
/// Shortest metadata entry: an empty key, a type, a byte.
const ENTRY_BYTES_MIN: u64 = 8 + 4 + 1;
/// Shortest tensor info: an empty name, one dimension, a type, an offset.
const TENSOR_BYTES_MIN: u64 = 8 + 4 + 8 + 4 + 8;

/// Reads and checks the header of the `part`-th file of a model.
pub(super) fn read(source: &Source, part: usize) -> Result<Header, GgufError> {
    let mut cursor = Cursor::new(source);
    let magic = cursor.bytes::<4>()?;
    if magic != *b"GGUF" {
        return Err(GgufError::Magic(magic));
    }
    let version = u32::from_le_bytes(cursor.bytes()?);
    if version != 2 && version != 3 {
        return Err(GgufError::Version(version));
    }
    let tensor_count = u64::from_le_bytes(cursor.bytes()?);
    let entry_count = u64::from_le_bytes(cursor.bytes()?);
    cursor.expect(entry_count, ENTRY_BYTES_MIN)?;
    let mut metadata = HashMap::new();
    for _ in 0..entry_count {
        let key = cursor.name()?;
        let value = read_value(&mut cursor).map_err(|cause| cause.within(format_args!("key {key}")))?;
        if let Some(earlier) = metadata.insert(key, value) {
            return Err(GgufError::malformed(format!("a key occurs twice, once as {}", earlier.describe())));
        }
    }
    cursor.expect(tensor_count, TENSOR_BYTES_MIN)?;
    let mut tensors = Vec::with_capacity(tensor_count as usize);
    for _ in 0..tensor_count {
        tensors.push(read_tensor(&mut cursor, part)?);
    }
    place(&mut tensors, cursor.position(), alignment(&metadata)?, source.len())?;
    Ok(Header { metadata, tensors })
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<u64, GgufError> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::U32(n)) if n.is_power_of_two() => Ok(u64::from(*n)),
        Some(other) => Err(GgufError::malformed(format!(
            "general.alignment is {}, not a 32-bit power of two",
            other.describe()
        ))),
    }
}

/// One tensor's info, its offset still counted from the start of the data.
fn read_tensor(cursor: &mut Cursor<'_>, part: usize) -> Result<TensorInfo, GgufError> {
    let name = cursor.name()?;
    let wrong = |why: String| GgufError::malformed(why).within(format_args!("tensor {name}"));
    let rank = u32::from_le_bytes(cursor.bytes()?);
    if !(1..=4).contains(&rank) {
        return Err(wrong(format!("has {rank} dimensions, not 1 to 4")));
    }
    let mut dims = Vec::with_capacity(rank as usize);
    for _ in 0..rank {
        dims.push(u64::from_le_bytes(cursor.bytes()?));
    }
    let ty = GgmlType::from_id(u32::from_le_bytes(cursor.bytes()?));
    let offset = u64::from_le_bytes(cursor.bytes()?);
    let values = dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
    let bytes = match (values, ty) {
        (None | Some(0), _) => return Err(wrong(format!("its dimensions {dims:?} are zero or overflow"))),
        (Some(_), GgmlType::Unknown(_)) => 0,
        (Some(values), _) if dims[0].is_multiple_of(ty.block_values() as u64) => {
            ty.bytes_of(values).ok_or_else(|| wrong(format!("its dimensions {dims:?} overflow")))?
        }
        _ => return Err(wrong(format!("its rows of {} values don't fill blocks of {ty}", dims[0]))),
    };
    Ok(TensorInfo { name, ty, dims, offset, bytes, part })
}

/// Makes the offsets absolute and checks that every tensor is aligned, within the file, alone in its place and
/// under a name of its own.
fn place(tensors: &mut [TensorInfo], header_end: u64, alignment: u64, length: u64) -> Result<(), GgufError> {
    let data = header_end.next_multiple_of(alignment);
    for tensor in tensors.iter_mut() {
        let within = |cause: GgufError| cause.within(format_args!("tensor {}", tensor.name));
        if tensor.offset % alignment != 0 {
            let why = format!("its offset {} isn't a multiple of {alignment}", tensor.offset);
            return Err(within(GgufError::malformed(why)));
        }
        let start = data.checked_add(tensor.offset).filter(|&start| start <= length);
        let left = length.saturating_sub(start.unwrap_or(length));
        match start {
            Some(start) if tensor.bytes <= left => tensor.offset = start,
            _ => {
                let at = data.saturating_add(tensor.offset);
                return Err(within(GgufError::Truncated { at, needed: tensor.bytes, left }));
            }
        }
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_unstable_by_key(|t| (t.offset, t.bytes));
    if let Some(pair) = order.windows(2).find(|pair| pair[1].offset - pair[0].offset < pair[0].bytes) {
        return Err(GgufError::malformed(format!("tensors {} and {} overlap", pair[0].name, pair[1].name)));
    }
    order.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    match order.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) => Err(GgufError::malformed(format!("tensor {} occurs twice", pair[0].name))),
        None => Ok(()),
    }
}

/// A value with its type before it.
fn read_value(cursor: &mut Cursor<'_>) -> Result<Value, GgufError> {
    Ok(match u32::from_le_bytes(cursor.bytes()?) {
        0 => Value::U8(u8::from_le_bytes(cursor.bytes()?)),
        1 => Value::I8(i8::from_le_bytes(cursor.bytes()?)),
        2 => Value::U16(u16::from_le_bytes(cursor.bytes()?)),
        3 => Value::I16(i16::from_le_bytes(cursor.bytes()?)),
        4 => Value::U32(u32::from_le_bytes(cursor.bytes()?)),
        5 => Value::I32(i32::from_le_bytes(cursor.bytes()?)),
        6 => Value::F32(f32::from_le_bytes(cursor.bytes()?)),
        7 => Value::Bool(boolean(cursor.bytes()?)?),
        8 => Value::String(cursor.string(u64::MAX)?),
        9 => Value::Array(read_array(cursor, NESTING_MAX)?),
        10 => Value::U64(u64::from_le_bytes(cursor.bytes()?)),
        11 => Value::I64(i64::from_le_bytes(cursor.bytes()?)),
        12 => Value::F64(f64::from_le_bytes(cursor.bytes()?)),
        other => return Err(GgufError::malformed(format!("has unknown type {other}"))),
    })
}

fn read_array(cursor: &mut Cursor<'_>, nesting: u32) -> Result<Array, GgufError> {
    let ty = u32::from_le_bytes(cursor.bytes()?);
    let count = u64::from_le_bytes(cursor.bytes()?);
    Ok(match ty {
        0 => Array::U8(cursor.many(count, u8::from_le_bytes)?),
        1 => Array::I8(cursor.many(count, i8::from_le_bytes)?),
        2 => Array::U16(cursor.many(count, u16::from_le_bytes)?),
        3 => Array::I16(cursor.many(count, i16::from_le_bytes)?),
        4 => Array::U32(cursor.many(count, u32::from_le_bytes)?),
        5 => Array::I32(cursor.many(count, i32::from_le_bytes)?),
        6 => Array::F32(cursor.many(count, f32::from_le_bytes)?),
        7 => {
            let bytes = cursor.many(count, u8::from_le_bytes)?;
            Array::Bool(bytes.into_iter().map(|b| boolean([b])).collect::<Result<_, _>>()?)
        }
        8 => Array::String(read_strings(cursor, count)?),
        9 => {
            let nesting = nesting
                .checked_sub(1)
                .ok_or_else(|| GgufError::malformed(format!("nests arrays over {NESTING_MAX} deep")))?;
            cursor.expect(count, 4 + 8)?;
            Array::Array((0..count).map(|_| read_array(cursor, nesting)).collect::<Result<_, _>>()?)
        }
        10 => Array::U64(cursor.many(count, u64::from_le_bytes)?),
        11 => Array::I64(cursor.many(count, i64::from_le_bytes)?),
        12 => Array::F64(cursor.many(count, f64::from_le_bytes)?),
        other => return Err(GgufError::malformed(format!("is an array of unknown type {other}"))),
    })
}

fn read_strings(cursor: &mut Cursor<'_>, count: u64) -> Result<Strings, GgufError> {
    cursor.expect(count, 8)?;
    let mut ends = Vec::with_capacity(count as usize);
    let mut text = Vec::new();
    for _ in 0..count {
        cursor.append_string(u64::MAX, &mut text)?;
        ends.push(text.len() as u32); // below HEADER_BYTES_MAX
    }
    Strings::new(text, ends).ok_or_else(|| GgufError::malformed("has strings that aren't UTF-8"))
}

fn boolean([byte]: [u8; 1]) -> Result<bool, GgufError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(GgufError::malformed(format!("has a bool of value {byte}"))),
    }
}

/// Reads forward through a buffer.
struct Cursor<'a> {
    source: &'a Source,
    buffer: Vec<u8>,
    /// Offset in the file of the buffer's first byte.
    start: u64,
    /// Next byte in the buffer.
    at: usize,
    /// Where reading stops, in the file.
    end: u64,
}

const BUFFER_BYTES: u64 = 256 << 10;

impl<'a> Cursor<'a> {
    fn new(source: &'a Source) -> Cursor<'a> {
        Cursor { source, buffer: Vec::new(), start: 0, at: 0, end: source.len().min(HEADER_BYTES_MAX) }
    }

    fn position(&self) -> u64 {
        self.start + self.at as u64
    }

    /// That `count` items of at least `bytes` bytes can follow.
    fn expect(&self, count: u64, bytes: u64) -> Result<(), GgufError> {
        let left = self.end - self.position();
        let needed = count.saturating_mul(bytes);
        if needed <= left {
            Ok(())
        } else if needed <= self.source.len() - self.position() {
            Err(GgufError::malformed(format!("has a header of over {} MiB", HEADER_BYTES_MAX >> 20)))
        } else {
            Err(GgufError::Truncated { at: self.position(), needed, left })
        }
    }

    fn read(&mut self, mut out: &mut [u8]) -> Result<(), GgufError> {
        self.expect(out.len() as u64, 1)?;
        loop {
            let ready = &self.buffer[self.at..];
            let n = ready.len().min(out.len());
            out[..n].copy_from_slice(&ready[..n]);
            self.at += n;
            out = &mut out[n..];
            if out.is_empty() {
                return Ok(());
            }
            self.start += self.at as u64;
            self.at = 0;
            self.buffer.resize((self.end - self.start).min(BUFFER_BYTES) as usize, 0);
            self.source.read_at(self.start, &mut self.buffer)?;
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        match self.buffer.get(self.at..self.at + N) {
            Some(ready) => {
                bytes.copy_from_slice(ready);
                self.at += N;
            }
            None => self.read(&mut bytes)?,
        }
        Ok(bytes)
    }

    fn many<T, const N: usize>(&mut self, count: u64, from: fn([u8; N]) -> T) -> Result<Vec<T>, GgufError> {
        self.expect(count, N as u64)?;
        (0..count).map(|_| Ok(from(self.bytes()?))).collect()
    }

    fn append_string(&mut self, most: u64, text: &mut Vec<u8>) -> Result<(), GgufError> {
        let length = u64::from_le_bytes(self.bytes()?);
        if length > most {
            return Err(GgufError::malformed(format!(
                "has a name of {length} bytes; at most {most} are read"
            )));
        }
        self.expect(length, 1)?;
        let from = text.len();
        text.resize(from + length as usize, 0);
        self.read(&mut text[from..])
    }

    fn string(&mut self, most: u64) -> Result<String, GgufError> {
        let mut text = Vec::new();
        self.append_string(most, &mut text)?;
        String::from_utf8(text).map_err(|_| GgufError::malformed("has a string that isn't UTF-8"))
    }

    fn name(&mut self) -> Result<String, GgufError> {
        self.string(NAME_BYTES_MAX)
    }
}
