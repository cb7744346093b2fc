//! Metadata values.

/// A metadata value, in the type that the file gives it.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the variants are the format's types
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of metadata values of one type.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the variants are the format's types
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Strings),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Many strings in one buffer: vocabularies have hundreds of thousands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    text: String,
    /// Where each string ends in `text`, always between characters.
    ends: Vec<u32>,
}

impl Strings {
    /// None where the bytes aren't UTF-8, or a string ends within a character. `ends` ascend, the last one being the
    /// length of `bytes`.
    pub(super) fn new(bytes: Vec<u8>, ends: Vec<u32>) -> Option<Strings> {
        let text = String::from_utf8(bytes).ok()?;
        ends.iter().all(|&end| text.is_char_boundary(end as usize)).then_some(Strings { text, ends })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The `index`-th.
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)? as usize;
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        self.text.get(start..end)
    }

    /// First to last.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|i| self.get(i).unwrap_or_default())
    }
}

impl<S: AsRef<str>> FromIterator<S> for Strings {
    /// # Panics
    /// If they have 4 GiB or more together.
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Strings {
        let mut all = Strings::default();
        for string in strings {
            all.text.push_str(string.as_ref());
            all.ends.push(u32::try_from(all.text.len()).expect("vocabularies have less than 4 GiB"));
        }
        all
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(a) => a.len(),
            Array::I8(a) => a.len(),
            Array::U16(a) => a.len(),
            Array::I16(a) => a.len(),
            Array::U32(a) => a.len(),
            Array::I32(a) => a.len(),
            Array::F32(a) => a.len(),
            Array::Bool(a) => a.len(),
            Array::String(a) => a.len(),
            Array::Array(a) => a.len(),
            Array::U64(a) => a.len(),
            Array::I64(a) => a.len(),
            Array::F64(a) => a.len(),
        }
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements, where they are strings.
    pub fn strings(&self) -> Option<&Strings> {
        match self {
            Array::String(a) => Some(a),
            _ => None,
        }
    }

    /// The elements, where they are 32-bit floats.
    pub fn f32s(&self) -> Option<&[f32]> {
        match self {
            Array::F32(a) => Some(a),
            _ => None,
        }
    }

    /// The elements, where they are signed 32-bit integers.
    pub fn i32s(&self) -> Option<&[i32]> {
        match self {
            Array::I32(a) => Some(a),
            _ => None,
        }
    }

    /// The elements, where they are unsigned 32-bit integers.
    pub fn u32s(&self) -> Option<&[u32]> {
        match self {
            Array::U32(a) => Some(a),
            _ => None,
        }
    }

    fn type_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "u8",
            Array::I8(_) => "i8",
            Array::U16(_) => "u16",
            Array::I16(_) => "i16",
            Array::U32(_) => "u32",
            Array::I32(_) => "i32",
            Array::F32(_) => "f32",
            Array::Bool(_) => "bool",
            Array::String(_) => "string",
            Array::Array(_) => "array",
            Array::U64(_) => "u64",
            Array::I64(_) => "i64",
            Array::F64(_) => "f64",
        }
    }
}

impl Value {
    /// Its type and, if it is short, what it is: for error messages.
    pub fn describe(&self) -> String {
        match self {
            Value::String(s) if s.chars().count() <= 40 => format!("the string {s:?}"),
            Value::String(s) => format!("a string of {} bytes", s.len()),
            Value::Array(a) => format!("an array of {} {}", a.len(), a.type_name()),
            Value::U8(v) => format!("u8 {v}"),
            Value::I8(v) => format!("i8 {v}"),
            Value::U16(v) => format!("u16 {v}"),
            Value::I16(v) => format!("i16 {v}"),
            Value::U32(v) => format!("u32 {v}"),
            Value::I32(v) => format!("i32 {v}"),
            Value::F32(v) => format!("f32 {v}"),
            Value::Bool(v) => format!("bool {v}"),
            Value::U64(v) => format!("u64 {v}"),
            Value::I64(v) => format!("i64 {v}"),
            Value::F64(v) => format!("f64 {v}"),
        }
    }

    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }
}

/// A Rust type that a metadata value can be read as.
pub trait FromValue<'a>: Sized {
    /// For error messages: `a string`.
    const NAME: &'static str;
    /// None where the value is of another type or out of range.
    fn from_value(value: &'a Value) -> Option<Self>;
}

impl FromValue<'_> for u32 {
    const NAME: &'static str = "a 32-bit unsigned integer";
    fn from_value(value: &Value) -> Option<u32> {
        value.integer()?.try_into().ok()
    }
}

impl FromValue<'_> for u64 {
    const NAME: &'static str = "a 64-bit unsigned integer";
    fn from_value(value: &Value) -> Option<u64> {
        value.integer()?.try_into().ok()
    }
}

impl FromValue<'_> for f32 {
    const NAME: &'static str = "a floating-point number";
    fn from_value(value: &Value) -> Option<f32> {
        match *value {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        }
    }
}

impl FromValue<'_> for bool {
    const NAME: &'static str = "a bool";
    fn from_value(value: &Value) -> Option<bool> {
        match *value {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const NAME: &'static str = "a string";
    fn from_value(value: &'a Value) -> Option<&'a str> {
        match value {
            Value::String(v) => Some(v),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a Array {
    const NAME: &'static str = "an array";
    fn from_value(value: &'a Value) -> Option<&'a Array> {
        match value {
            Value::Array(v) => Some(v),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a Strings {
    const NAME: &'static str = "an array of strings";
    fn from_value(value: &'a Value) -> Option<&'a Strings> {
        <&Array>::from_value(value)?.strings()
    }
}

impl<'a> FromValue<'a> for &'a [f32] {
    const NAME: &'static str = "an array of 32-bit floats";
    fn from_value(value: &'a Value) -> Option<&'a [f32]> {
        <&Array>::from_value(value)?.f32s()
    }
}

impl<'a> FromValue<'a> for &'a [i32] {
    const NAME: &'static str = "an array of signed 32-bit integers";
    fn from_value(value: &'a Value) -> Option<&'a [i32]> {
        <&Array>::from_value(value)?.i32s()
    }
}

macro_rules! into_value {
    ($($t:ty => $variant:ident),*) => {$(
        impl From<$t> for Value {
            fn from(value: $t) -> Value {
                Value::$variant(value)
            }
        }
        impl From<Vec<$t>> for Value {
            fn from(values: Vec<$t>) -> Value {
                Value::Array(Array::$variant(values))
            }
        }
    )*};
}
into_value!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, bool => Bool,
    u64 => U64, i64 => I64, f64 => F64);

impl From<&str> for Value {
    fn from(value: &str) -> Value {
        Value::String(value.to_owned())
    }
}

impl From<Strings> for Value {
    fn from(values: Strings) -> Value {
        Value::Array(Array::String(values))
    }
}
