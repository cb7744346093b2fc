//! Values of expressions, and what can go wrong when they are computed.
use std::fmt;

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    Bool,
    Int,
    Float,
    Text,
}

impl Type {
    /// As CEL calls it.
    pub fn name(self) -> &'static str {
        match self {
            Type::Bool => "bool",
            Type::Int => "int",
            Type::Float => "double",
            Type::Text => "string",
        }
    }

    pub fn is_number(self) -> bool {
        matches!(self, Type::Int | Type::Float)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value<'v> {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(&'v str),
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bool(value) => value.fmt(f),
            Value::Int(value) => value.fmt(f),
            Value::Float(value) => write!(f, "{value:?}"),
            Value::Text(value) => write!(f, "{value:?}"),
        }
    }
}

/// Why an expression has no value. Whoever asked takes the side of caution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A field that isn't there.
    Absent(&'static str),
    /// A tag or label that isn't there.
    NoKey,
    Overflow,
    ZeroDivisor,
    /// No number came of it, such as 0.0 / 0.0, and it can't be compared.
    NotANumber,
    /// The scheduler wasn't told what time it is.
    NoClock,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Absent(name) => write!(f, "{name} is absent"),
            Fault::NoKey => f.write_str("it asks for a tag or label that is absent"),
            Fault::Overflow => f.write_str("a number doesn't fit 64 bits"),
            Fault::ZeroDivisor => f.write_str("it divides by zero"),
            Fault::NotANumber => f.write_str("it compares with what is no number"),
            Fault::NoClock => f.write_str("the time isn't known"),
        }
    }
}
