//! Writes model files: for tests and benches, which need models of any shape with random weights.
use super::{Array, GgmlType, Value};
use std::io::{self, Write};

/// A model file in the making: declare metadata and tensors, then [`Writer::write`].
#[derive(Clone, Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Declared>,
}

/// A tensor whose bytes come later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// Its name.
    pub name: String,
    /// How its values are stored.
    pub ty: GgmlType,
    /// The fastest-running dimension first.
    pub dims: Vec<u64>,
    /// Its length.
    pub bytes: u64,
}

/// Where tensors begin; the format's default.
const ALIGNMENT: u64 = 32;

impl Writer {
    /// An empty file of that architecture.
    pub fn new(architecture: &str) -> Writer {
        let mut writer = Writer::default();
        writer.set("general.architecture", architecture);
        writer
    }

    /// Sets a metadata value.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Writer {
        self.metadata.retain(|(other, _)| other != key);
        self.metadata.push((key.to_owned(), value.into()));
        self
    }

    /// Declares a tensor, `dims` the fastest-running dimension first.
    ///
    /// # Panics
    /// If `dims` don't fill whole blocks of a known type.
    pub fn declare(&mut self, name: &str, ty: GgmlType, dims: &[u64]) -> &mut Writer {
        assert!(dims[0].is_multiple_of(ty.block_values() as u64), "{name}: rows of {} in {ty}", dims[0]);
        let bytes = ty.bytes_of(dims.iter().product()).expect("a known type");
        self.tensors.push(Declared { name: name.to_owned(), ty, dims: dims.to_vec(), bytes });
        self
    }

    /// What has been declared.
    pub fn tensors(&self) -> &[Declared] {
        &self.tensors
    }

    /// Writes the file, asking for one tensor's bytes at a time, in the order of declaration.
    ///
    /// # Panics
    /// If `data` gives another number of bytes than the tensor has.
    pub fn write(&self, out: &mut impl Write, mut data: impl FnMut(&Declared) -> Vec<u8>) -> io::Result<()> {
        let mut header = Vec::new();
        header.extend(b"GGUF");
        header.extend(3u32.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut header, key);
            put_value(&mut header, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_string(&mut header, &tensor.name);
            header.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| header.extend(dim.to_le_bytes()));
            header.extend(tensor.ty.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += tensor.bytes.next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        out.write_all(&header)?;
        for tensor in &self.tensors {
            let mut bytes = data(tensor);
            assert_eq!(bytes.len() as u64, tensor.bytes, "bytes of {}", tensor.name);
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
            out.write_all(&bytes)?;
        }
        out.flush()
    }

    /// The file in memory.
    pub fn to_bytes(&self, data: impl FnMut(&Declared) -> Vec<u8>) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write(&mut bytes, data).expect("a Vec takes all");
        bytes
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut put = |ty: u32, bytes: &[u8]| {
        out.extend(ty.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U8(v) => put(0, &v.to_le_bytes()),
        Value::I8(v) => put(1, &v.to_le_bytes()),
        Value::U16(v) => put(2, &v.to_le_bytes()),
        Value::I16(v) => put(3, &v.to_le_bytes()),
        Value::U32(v) => put(4, &v.to_le_bytes()),
        Value::I32(v) => put(5, &v.to_le_bytes()),
        Value::F32(v) => put(6, &v.to_le_bytes()),
        Value::Bool(v) => put(7, &[u8::from(*v)]),
        Value::U64(v) => put(10, &v.to_le_bytes()),
        Value::I64(v) => put(11, &v.to_le_bytes()),
        Value::F64(v) => put(12, &v.to_le_bytes()),
        Value::String(text) => {
            put(8, &[]);
            put_string(out, text);
        }
        Value::Array(array) => {
            put(9, &[]);
            put_array(out, array);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    fn all<T: Copy, const N: usize>(out: &mut Vec<u8>, ty: u32, values: &[T], bytes: fn(T) -> [u8; N]) {
        out.extend(ty.to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|&v| out.extend(bytes(v)));
    }
    match array {
        Array::U8(a) => all(out, 0, a, u8::to_le_bytes),
        Array::I8(a) => all(out, 1, a, i8::to_le_bytes),
        Array::U16(a) => all(out, 2, a, u16::to_le_bytes),
        Array::I16(a) => all(out, 3, a, i16::to_le_bytes),
        Array::U32(a) => all(out, 4, a, u32::to_le_bytes),
        Array::I32(a) => all(out, 5, a, i32::to_le_bytes),
        Array::F32(a) => all(out, 6, a, f32::to_le_bytes),
        Array::Bool(a) => all(out, 7, a, |b| [u8::from(b)]),
        Array::U64(a) => all(out, 10, a, u64::to_le_bytes),
        Array::I64(a) => all(out, 11, a, i64::to_le_bytes),
        Array::F64(a) => all(out, 12, a, f64::to_le_bytes),
        Array::String(a) => {
            out.extend(8u32.to_le_bytes());
            out.extend((a.len() as u64).to_le_bytes());
            a.iter().for_each(|text| put_string(out, text));
        }
        Array::Array(a) => {
            out.extend(9u32.to_le_bytes());
            out.extend((a.len() as u64).to_le_bytes());
            a.iter().for_each(|inner| put_array(out, inner));
        }
    }
}
