//! Compiled expressions: a small typed tree of our own.
//!
//! Types are known, so evaluating checks none; no value is allocated. That is some hundred times as fast as a general
//! CEL interpreter, which the tests compare it with.
use crate::fields::{FIELDS, Facts, Map, Read, lookup};
use crate::value::{Fault, Value};
use std::cmp::Ordering;

/// An expression, compiled.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Expr {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Box<str>),
    /// By its place in [`FIELDS`].
    Field(u8),
    /// Whether an optional field is there.
    Has(u8),
    Lookup(Map, Box<Expr>),
    HasKey(Map, Box<Expr>),
    /// How many entries a map has.
    Count(Map),
    /// Characters of a string.
    Length(Box<Expr>),
    Not(Box<Expr>),
    And(Vec<Expr>),
    Or(Vec<Expr>),
    Choice(Box<(Expr, Expr, Expr)>),
    /// Of two values of one type.
    Compare(Compare, Box<(Expr, Expr)>),
    /// The commonest comparison: a field with a text.
    FieldIs(u8, Box<str>),
    /// One of these, of its own type.
    OneOf(Box<Expr>, Vec<Expr>),
    Arithmetic(Arithmetic, Box<(Expr, Expr)>),
    Negative(Box<Expr>),
    ToFloat(Box<Expr>),
    ToInt(Box<Expr>),
    /// Of two texts.
    Affix(Affix, Box<(Expr, Expr)>),
    /// Evaluated already, for the whole decision.
    Slot(u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Equal,
    NotEqual,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Affix {
    StartsWith,
    EndsWith,
    Contains,
}

type Evaluated<'v> = Result<Value<'v>, Fault>;

impl Expr {
    /// Its value.
    pub fn eval<'v>(&'v self, facts: &Facts<'v>) -> Evaluated<'v> {
        match self {
            Expr::Bool(value) => Ok(Value::Bool(*value)),
            Expr::Int(value) => Ok(Value::Int(*value)),
            Expr::Float(value) => Ok(Value::Float(*value)),
            Expr::Text(value) => Ok(Value::Text(value)),
            Expr::Slot(slot) => facts.slots[usize::from(*slot)],
            Expr::Field(field) => read(*field, facts),
            Expr::FieldIs(field, text) => Ok(Value::Bool(read(*field, facts)? == Value::Text(text))),
            Expr::Has(field) => Ok(Value::Bool(!matches!(read(*field, facts), Err(Fault::Absent(_))))),
            Expr::Lookup(map, name) => {
                lookup(map.entries(facts), name.text(facts)?).map(Value::Text).ok_or(Fault::NoKey)
            }
            Expr::HasKey(map, name) => {
                Ok(Value::Bool(lookup(map.entries(facts), name.text(facts)?).is_some()))
            }
            Expr::Count(map) => Ok(Value::Int(count_names(map.entries(facts)))),
            Expr::Length(text) => Ok(Value::Int(text.text(facts)?.chars().count() as i64)),
            Expr::Not(inner) => Ok(Value::Bool(!inner.test(facts)?)),
            Expr::And(parts) => all(parts, facts, true),
            Expr::Or(parts) => all(parts, facts, false),
            Expr::Choice(parts) => match parts.0.test(facts)? {
                true => parts.1.eval(facts),
                false => parts.2.eval(facts),
            },
            Expr::Compare(how, sides) => {
                compare(*how, sides.0.eval(facts)?, sides.1.eval(facts)?).map(Value::Bool)
            }
            Expr::OneOf(one, all) => one_of(one.eval(facts)?, all, facts),
            Expr::Arithmetic(how, sides) => arithmetic(*how, sides.0.eval(facts)?, sides.1.eval(facts)?),
            Expr::Negative(inner) => match inner.eval(facts)? {
                Value::Int(value) => value.checked_neg().map(Value::Int).ok_or(Fault::Overflow),
                value => Ok(Value::Float(-value.float())),
            },
            Expr::ToFloat(inner) => Ok(Value::Float(inner.eval(facts)?.float())),
            Expr::ToInt(inner) => to_int(inner.eval(facts)?),
            Expr::Affix(how, sides) => {
                let (whole, part) = (sides.0.text(facts)?, sides.1.text(facts)?);
                Ok(Value::Bool(match how {
                    Affix::StartsWith => whole.starts_with(part),
                    Affix::EndsWith => whole.ends_with(part),
                    Affix::Contains => whole.contains(part),
                }))
            }
        }
    }

    /// Its truth, for one of type bool.
    pub fn test(&self, facts: &Facts<'_>) -> Result<bool, Fault> {
        match self.eval(facts)? {
            Value::Bool(value) => Ok(value),
            other => unreachable!("the compiler let {other} through for a bool"),
        }
    }

    fn text<'v>(&'v self, facts: &Facts<'v>) -> Result<&'v str, Fault> {
        match self.eval(facts)? {
            Value::Text(text) => Ok(text),
            other => unreachable!("the compiler let {other} through for a string"),
        }
    }

    /// Whether its value may differ from node to node.
    pub fn of_node(&self) -> bool {
        match self {
            Expr::Bool(_) | Expr::Int(_) | Expr::Float(_) | Expr::Text(_) | Expr::Slot(_) => false,
            Expr::Field(field) | Expr::Has(field) | Expr::FieldIs(field, _) => {
                matches!(FIELDS[usize::from(*field)].read, Read::Node(_))
            }
            Expr::Lookup(map, name) | Expr::HasKey(map, name) => *map == Map::Labels || name.of_node(),
            Expr::Count(map) => *map == Map::Labels,
            Expr::Length(e) | Expr::Not(e) | Expr::Negative(e) | Expr::ToFloat(e) | Expr::ToInt(e) => {
                e.of_node()
            }
            Expr::And(parts) | Expr::Or(parts) => parts.iter().any(Expr::of_node),
            Expr::Choice(p) => p.0.of_node() || p.1.of_node() || p.2.of_node(),
            Expr::Compare(_, p) | Expr::Arithmetic(_, p) | Expr::Affix(_, p) => {
                p.0.of_node() || p.1.of_node()
            }
            Expr::OneOf(one, all) => one.of_node() || all.iter().any(Expr::of_node),
        }
    }

    /// Whether a field is asked for in it.
    pub fn asks(&self, wanted: &dyn Fn(&str, &str) -> bool) -> bool {
        match self {
            Expr::Bool(_) | Expr::Int(_) | Expr::Float(_) | Expr::Text(_) | Expr::Slot(_) => false,
            Expr::Field(field) | Expr::Has(field) | Expr::FieldIs(field, _) => {
                let field = &FIELDS[usize::from(*field)];
                wanted(field.of, field.name)
            }
            Expr::Lookup(_, name) | Expr::HasKey(_, name) => name.asks(wanted),
            Expr::Count(_) => false,
            Expr::Length(e) | Expr::Not(e) | Expr::Negative(e) | Expr::ToFloat(e) | Expr::ToInt(e) => {
                e.asks(wanted)
            }
            Expr::And(parts) | Expr::Or(parts) => parts.iter().any(|e| e.asks(wanted)),
            Expr::Choice(p) => p.0.asks(wanted) || p.1.asks(wanted) || p.2.asks(wanted),
            Expr::Compare(_, p) | Expr::Arithmetic(_, p) | Expr::Affix(_, p) => {
                p.0.asks(wanted) || p.1.asks(wanted)
            }
            Expr::OneOf(one, all) => one.asks(wanted) || all.iter().any(|e| e.asks(wanted)),
        }
    }

    /// Takes out what is the same for all nodes: it is evaluated once for a decision, into a slot.
    pub fn hoist(&mut self, slots: &mut Vec<Expr>) {
        if !self.of_node() {
            let trivial =
                matches!(self, Expr::Bool(_) | Expr::Int(_) | Expr::Float(_) | Expr::Text(_) | Expr::Slot(_));
            if let (false, Ok(slot)) = (trivial, u16::try_from(slots.len())) {
                slots.push(std::mem::replace(self, Expr::Slot(slot)));
            }
            return;
        }
        match self {
            Expr::Lookup(_, e) | Expr::HasKey(_, e) | Expr::Length(e) => e.hoist(slots),
            Expr::Not(e) | Expr::Negative(e) | Expr::ToFloat(e) | Expr::ToInt(e) => e.hoist(slots),
            Expr::And(parts) | Expr::Or(parts) => parts.iter_mut().for_each(|e| e.hoist(slots)),
            Expr::Choice(p) => [&mut p.0, &mut p.1, &mut p.2].into_iter().for_each(|e| e.hoist(slots)),
            Expr::Compare(_, p) | Expr::Arithmetic(_, p) | Expr::Affix(_, p) => {
                p.0.hoist(slots);
                p.1.hoist(slots);
            }
            Expr::OneOf(one, all) => {
                one.hoist(slots);
                all.iter_mut().for_each(|e| e.hoist(slots));
            }
            _ => {}
        }
    }
}

impl Value<'_> {
    fn float(self) -> f64 {
        match self {
            Value::Int(value) => value as f64,
            Value::Float(value) => value,
            other => unreachable!("the compiler let {other} through for a number"),
        }
    }
}

fn read<'v>(field: u8, facts: &Facts<'v>) -> Evaluated<'v> {
    let field = &FIELDS[usize::from(field)];
    match (field.read, facts.offer) {
        (Read::Whole(read), _) => read(facts),
        (Read::Node(read), Some(offer)) => read(facts, offer),
        (Read::Node(_), None) => Err(Fault::Absent("node")),
    }
}

/// `&&` (or `||`, where `all` is false): a part that decides does so whatever the others' faults.
fn all<'v>(parts: &[Expr], facts: &Facts<'_>, all: bool) -> Evaluated<'v> {
    let mut fault = None;
    for part in parts {
        match part.test(facts) {
            Ok(value) if value != all => return Ok(Value::Bool(!all)),
            Ok(_) => {}
            Err(why) => fault = fault.or(Some(why)),
        }
    }
    fault.map_or(Ok(Value::Bool(all)), Err)
}

fn count_names(entries: &[(String, String)]) -> i64 {
    let first = |at: usize| !entries[..at].iter().any(|(name, _)| *name == entries[at].0);
    (0..entries.len()).filter(|at| first(*at)).count() as i64
}

fn compare(how: Compare, left: Value<'_>, right: Value<'_>) -> Result<bool, Fault> {
    let order = match (left, right) {
        (Value::Int(a), Value::Int(b)) => Some(a.cmp(&b)),
        (Value::Float(a), Value::Float(b)) => a.partial_cmp(&b),
        (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(&b)),
        (a, b) => unreachable!("the compiler let {a} be compared with {b}"),
    };
    let order_or_fault = order.ok_or(Fault::NotANumber);
    Ok(match how {
        Compare::Less => order_or_fault?.is_lt(),
        Compare::LessOrEqual => order_or_fault?.is_le(),
        Compare::Greater => order_or_fault?.is_gt(),
        Compare::GreaterOrEqual => order_or_fault?.is_ge(),
        Compare::Equal => order == Some(Ordering::Equal),
        Compare::NotEqual => order != Some(Ordering::Equal),
    })
}

fn one_of<'v>(one: Value<'v>, all: &'v [Expr], facts: &Facts<'v>) -> Evaluated<'v> {
    let mut found = false;
    // A list is made before it is looked into: a fault of any of its parts is its own.
    for other in all {
        found |= compare(Compare::Equal, one, other.eval(facts)?)?;
    }
    Ok(Value::Bool(found))
}

fn arithmetic<'v>(how: Arithmetic, left: Value<'v>, right: Value<'v>) -> Evaluated<'v> {
    if let (Value::Int(a), Value::Int(b)) = (left, right) {
        let value = match how {
            Arithmetic::Add => a.checked_add(b),
            Arithmetic::Subtract => a.checked_sub(b),
            Arithmetic::Multiply => a.checked_mul(b),
            Arithmetic::Divide | Arithmetic::Remainder if b == 0 => return Err(Fault::ZeroDivisor),
            Arithmetic::Divide => a.checked_div(b),
            Arithmetic::Remainder => a.checked_rem(b),
        };
        return value.map(Value::Int).ok_or(Fault::Overflow);
    }
    let (a, b) = (left.float(), right.float());
    Ok(Value::Float(match how {
        Arithmetic::Add => a + b,
        Arithmetic::Subtract => a - b,
        Arithmetic::Multiply => a * b,
        Arithmetic::Divide => a / b,
        Arithmetic::Remainder => a % b,
    }))
}

/// Towards zero, as CEL has it.
fn to_int<'v>(value: Value<'v>) -> Evaluated<'v> {
    match value {
        Value::Int(_) => Ok(value),
        other => {
            let whole = other.float().trunc();
            let fits = whole > i64::MIN as f64 && whole < i64::MAX as f64;
            if fits { Ok(Value::Int(whole as i64)) } else { Err(Fault::Overflow) }
        }
    }
}
