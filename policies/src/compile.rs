//! Checks an expression's names and types, and turns its tree into an [`Expr`].
use crate::eval::{Affix, Arithmetic, Compare, Expr};
use crate::fields::{FIELDS, Map, SUBJECTS};
use crate::near::near;
use crate::syntax::{Ast, Binary, Kind, Wrong, parse, wrong};
use crate::value::Type;

/// What an expression may ask about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// `request`, `pool` and `time`: the same for all nodes.
    Whole,
    /// And `node`.
    Node,
}

type Typed = (Expr, Type);

/// An expression that is true or false.
pub(crate) fn condition(text: &str, scope: Scope) -> Result<Expr, Wrong> {
    let tree = parse(text)?;
    let (expr, found) = compile(&tree, scope)?;
    match found {
        Type::Bool => Ok(expr),
        other => wrong(tree.at, format!("this is of type {}; a condition is a bool", other.name())),
    }
}

fn compile(tree: &Ast, scope: Scope) -> Result<Typed, Wrong> {
    let at = tree.at;
    Ok(match &tree.kind {
        Kind::Bool(value) => (Expr::Bool(*value), Type::Bool),
        Kind::Int(value) => (Expr::Int(*value), Type::Int),
        Kind::Float(value) => (Expr::Float(*value), Type::Float),
        Kind::Text(value) => (Expr::Text(value.as_str().into()), Type::Text),
        Kind::List(_) => return wrong(at, "a list stands to the right of `in` only"),
        Kind::Name(name) => return bare(at, name),
        Kind::Member(of, name) => return member(at, of, name, scope),
        Kind::Index(of, index) => return lookup(at, of, index, scope),
        Kind::Call(target, name, arguments) => return call(at, target.as_deref(), name, arguments, scope),
        Kind::Not(inner) => (Expr::Not(Box::new(must(inner, scope, Type::Bool, "`!` takes")?)), Type::Bool),
        Kind::Negative(inner) => match compile(inner, scope)? {
            (expr, found) if found.is_number() => (Expr::Negative(Box::new(expr)), found),
            (_, found) => return wrong(at, format!("`-` takes a number, not a {}", found.name())),
        },
        Kind::And(parts) => (Expr::And(bools(parts, "&&", scope)?), Type::Bool),
        Kind::Or(parts) => (Expr::Or(bools(parts, "||", scope)?), Type::Bool),
        Kind::Binary(operator, left, right) => return binary(at, *operator, left, right, scope),
        Kind::Choice(condition, yes, no) => {
            let condition = must(condition, scope, Type::Bool, "the condition of a choice is")?;
            let (yes, no, found) =
                alike(at, compile(yes, scope)?, compile(no, scope)?, "the values of a choice")?;
            (Expr::Choice(Box::new((condition, yes, no))), found)
        }
    })
}

fn bools(parts: &[Ast], sign: &str, scope: Scope) -> Result<Vec<Expr>, Wrong> {
    parts.iter().map(|part| must(part, scope, Type::Bool, &format!("`{sign}` takes"))).collect()
}

fn must(tree: &Ast, scope: Scope, expected: Type, what: &str) -> Result<Expr, Wrong> {
    let (expr, found) = compile(tree, scope)?;
    match found == expected {
        true => Ok(expr),
        false => {
            let (expected, found) = (expected.name(), found.name());
            wrong(tree.at, format!("{what} a {expected}, and this is of type {found}"))
        }
    }
}

/// Both of one type: a whole number becomes a double beside a double.
fn alike(at: usize, left: Typed, right: Typed, what: &str) -> Result<(Expr, Expr, Type), Wrong> {
    match (left.1, right.1) {
        (a, b) if a == b => Ok((left.0, right.0, a)),
        (Type::Int, Type::Float) => Ok((float(left.0), right.0, Type::Float)),
        (Type::Float, Type::Int) => Ok((left.0, float(right.0), Type::Float)),
        (a, b) => {
            wrong(at, format!("{what} are of types {} and {}; they must be of one", a.name(), b.name()))
        }
    }
}

fn float(expr: Expr) -> Expr {
    match expr {
        Expr::Int(value) => Expr::Float(value as f64),
        other => Expr::ToFloat(Box::new(other)),
    }
}

fn binary(at: usize, operator: Binary, left: &Ast, right: &Ast, scope: Scope) -> Result<Typed, Wrong> {
    if operator == Binary::In {
        return is_in(at, left, right, scope);
    }
    let what = format!("the sides of `{}`", operator.sign());
    let (left, right, found) = alike(at, compile(left, scope)?, compile(right, scope)?, &what)?;
    let how = match operator {
        Binary::Less => Compare::Less,
        Binary::LessOrEqual => Compare::LessOrEqual,
        Binary::Greater => Compare::Greater,
        Binary::GreaterOrEqual => Compare::GreaterOrEqual,
        Binary::Equal => Compare::Equal,
        Binary::NotEqual => Compare::NotEqual,
        _ => return calculate(at, operator, left, right, found),
    };
    Ok((
        match (how, left, right) {
            (Compare::Equal, Expr::Field(field), Expr::Text(text))
            | (Compare::Equal, Expr::Text(text), Expr::Field(field)) => Expr::FieldIs(field, text),
            (how, left, right) => Expr::Compare(how, Box::new((left, right))),
        },
        Type::Bool,
    ))
}

fn calculate(at: usize, operator: Binary, left: Expr, right: Expr, found: Type) -> Result<Typed, Wrong> {
    let how = match operator {
        Binary::Add => Arithmetic::Add,
        Binary::Subtract => Arithmetic::Subtract,
        Binary::Multiply => Arithmetic::Multiply,
        Binary::Divide => Arithmetic::Divide,
        _ => Arithmetic::Remainder,
    };
    let sign = operator.sign();
    match found {
        Type::Float if how == Arithmetic::Remainder => wrong(at, "`%` takes whole numbers"),
        Type::Int | Type::Float => Ok((Expr::Arithmetic(how, Box::new((left, right))), found)),
        Type::Text if how == Arithmetic::Add => {
            wrong(at, "strings can't be joined here; compare them part by part")
        }
        Type::Text | Type::Bool => {
            wrong(at, format!("`{sign}` takes numbers, not values of type {}", found.name()))
        }
    }
}

fn is_in(at: usize, one: &Ast, all: &Ast, scope: Scope) -> Result<Typed, Wrong> {
    if let Kind::Member(of, name) = &all.kind
        && let Some(map) = map(of, name, scope)?
    {
        let name = must(one, scope, Type::Text, "a map's names are of type string:")?;
        return Ok((Expr::HasKey(map, Box::new(name)), Type::Bool));
    }
    let Kind::List(parts) = &all.kind else {
        return wrong(all.at, "to the right of `in` stands a list, `request.tags` or `node.labels`");
    };
    let (mut one, mut found) = compile(one, scope)?;
    let mut compiled = Vec::with_capacity(parts.len());
    for part in parts {
        let (part_expr, part_type) = compile(part, scope)?;
        compiled.push((part.at, part_expr, part_type));
    }
    if found == Type::Int && compiled.iter().any(|(_, _, part)| *part == Type::Float) {
        (one, found) = (float(one), Type::Float);
    }
    let mut list = Vec::with_capacity(compiled.len());
    for (place, part, its) in compiled {
        list.push(match (found, its) {
            (a, b) if a == b => part,
            (Type::Float, Type::Int) => float(part),
            (a, b) => {
                let (a, b) = (a.name(), b.name());
                return wrong(place, format!("this is of type {b}, and what is looked for of type {a}"));
            }
        });
    }
    let _ = at;
    Ok((Expr::OneOf(Box::new(one), list), Type::Bool))
}

fn bare<T>(at: usize, name: &str) -> Result<T, Wrong> {
    if SUBJECTS.iter().any(|(subject, _)| *subject == name) {
        let fields = fields_of(name).take(4).collect::<Vec<_>>().join(", ");
        return wrong(at, format!("`{name}` is no value; its fields are: {fields}, ..."));
    }
    let subjects = SUBJECTS.iter().map(|(subject, _)| *subject).chain(["true", "false"]);
    let owner = FIELDS.iter().find(|field| field.name == name);
    let hint = match (owner, near(name, subjects)) {
        (Some(field), _) => format!("did you mean `{}.{name}`, or {name:?} in quotes?", field.of),
        (None, Some(close)) => format!("did you mean `{close}`?"),
        (None, None) => "there are request, node, pool and time; a string stands in quotes".into(),
    };
    wrong(at, format!("`{name}` isn't known: {hint}"))
}

fn fields_of(subject: &str) -> impl Iterator<Item = &'static str> {
    let map = match subject {
        "request" => Some("tags"),
        "node" => Some("labels"),
        _ => None,
    };
    let subject = subject.to_owned();
    map.into_iter().chain(FIELDS.iter().filter(move |field| field.of == subject).map(|field| field.name))
}

/// The map of that name, if it is one.
fn map(of: &Ast, name: &str, scope: Scope) -> Result<Option<Map>, Wrong> {
    let Kind::Name(subject) = &of.kind else { return Ok(None) };
    let found = Map::of(subject, name);
    match found {
        Some(Map::Labels) if scope == Scope::Whole => no_node(of.at),
        found => Ok(found),
    }
}

fn no_node<T>(at: usize) -> Result<T, Wrong> {
    wrong(at, "nodes can't be asked for here: this is decided once for all of them; use `that` of a rule")
}

fn member(at: usize, of: &Ast, name: &str, scope: Scope) -> Result<Typed, Wrong> {
    if let Kind::Member(inner, map_name) = &of.kind
        && let Some(map) = map(inner, map_name, scope)?
    {
        return Ok((Expr::Lookup(map, Box::new(Expr::Text(name.into()))), Type::Text));
    }
    let Kind::Name(subject) = &of.kind else {
        let (_, found) = compile(of, scope)?;
        return wrong(at, format!("a {} has no fields", found.name()));
    };
    if let Some(map) = map(of, name, scope)? {
        let what = if map == Map::Tags { "request.tags" } else { "node.labels" };
        return wrong(at, format!("`{what}` is a map; ask `'name' in {what}` or `{what}.name == 'value'`"));
    }
    let found = FIELDS.iter().position(|field| field.of == subject && field.name == name);
    let Some(index) = found.and_then(|index| u8::try_from(index).ok()) else {
        return unknown_field(at, of.at, subject, name);
    };
    if subject == "node" && scope == Scope::Whole {
        return no_node(of.at);
    }
    Ok((Expr::Field(index), FIELDS[usize::from(index)].kind))
}

fn unknown_field<T>(at: usize, subject_at: usize, subject: &str, name: &str) -> Result<T, Wrong> {
    if !SUBJECTS.iter().any(|(known, _)| *known == subject) {
        return bare(subject_at, subject);
    }
    let elsewhere =
        || FIELDS.iter().find(|field| field.name == name).map(|field| format!("{}.{name}", field.of));
    let hint =
        match near(name, fields_of(subject)).map(|close| format!("{subject}.{close}")).or_else(elsewhere) {
            Some(close) => format!("did you mean `{close}`?"),
            None => format!("there are {}", fields_of(subject).collect::<Vec<_>>().join(", ")),
        };
    wrong(at, format!("`{subject}` has no field `{name}`: {hint}"))
}

fn lookup(at: usize, of: &Ast, index: &Ast, scope: Scope) -> Result<Typed, Wrong> {
    if let Kind::Member(inner, name) = &of.kind
        && let Some(map) = map(inner, name, scope)?
    {
        let name = must(index, scope, Type::Text, "a map's names are of type string:")?;
        return Ok((Expr::Lookup(map, Box::new(name)), Type::Text));
    }
    wrong(at, "only `request.tags` and `node.labels` have entries")
}

/// Functions that texts have.
const AFFIXES: [(&str, Affix); 3] =
    [("startsWith", Affix::StartsWith), ("endsWith", Affix::EndsWith), ("contains", Affix::Contains)];
const FUNCTIONS: [&str; 4] = ["has", "size", "int", "double"];

fn call(
    at: usize,
    target: Option<&Ast>,
    name: &str,
    arguments: &[Ast],
    scope: Scope,
) -> Result<Typed, Wrong> {
    let affix = AFFIXES.iter().find(|(affix, _)| *affix == name);
    match (target, name, arguments) {
        (Some(whole), _, [part]) if affix.is_some() => {
            let whole = must(whole, scope, Type::Text, &format!("{name}() is asked of"))?;
            let part = must(part, scope, Type::Text, &format!("{name}() takes"))?;
            let how = affix.map_or(Affix::Contains, |(_, how)| *how);
            Ok((Expr::Affix(how, Box::new((whole, part))), Type::Bool))
        }
        (None, "has", [field]) => has(field, scope),
        (None, "size", [of]) | (Some(of), "size", []) => size(of, scope),
        (None, "int" | "double", [of]) => match compile(of, scope)? {
            (expr, Type::Int | Type::Float) if name == "int" => Ok((Expr::ToInt(Box::new(expr)), Type::Int)),
            (expr, Type::Int | Type::Float) => Ok((Expr::ToFloat(Box::new(expr)), Type::Float)),
            (_, found) => wrong(at, format!("{name}() takes a number, not a {}", found.name())),
        },
        (None, "has" | "size" | "int" | "double", _) => {
            wrong(at, format!("{name}() takes one value; {} are given", arguments.len()))
        }
        (_, "exists" | "all" | "map" | "filter" | "exists_one", _) => {
            wrong(at, format!("there are no loops here, so no {name}(); ask for one name or value at a time"))
        }
        (_, "matches", _) => {
            wrong(at, "there are no regular expressions here; use startsWith, endsWith, contains")
        }
        (Some(_), _, _) => unknown_function(at, name, &mut AFFIXES.iter().map(|(affix, _)| *affix)),
        (None, _, _) => unknown_function(at, name, &mut FUNCTIONS.into_iter()),
    }
}

fn unknown_function<T>(
    at: usize,
    name: &str,
    known: &mut dyn Iterator<Item = &'static str>,
) -> Result<T, Wrong> {
    let known: Vec<&str> = known.collect();
    match near(name, known.iter().copied()) {
        Some(close) => wrong(at, format!("there is no such {name}(): did you mean {close}()?")),
        None => wrong(at, format!("there is no such {name}(): there are {}", known.join(", "))),
    }
}

fn has(field: &Ast, scope: Scope) -> Result<Typed, Wrong> {
    let of_map = match &field.kind {
        Kind::Member(of, _) => {
            matches!(&of.kind, Kind::Member(inner, name) if map(inner, name, scope)?.is_some())
        }
        _ => false,
    };
    match compile(field, scope)?.0 {
        Expr::Lookup(map, name) if of_map => Ok((Expr::HasKey(map, name), Type::Bool)),
        Expr::Field(field) if FIELDS[usize::from(field)].optional => Ok((Expr::Has(field), Type::Bool)),
        Expr::Field(_) => Ok((Expr::Bool(true), Type::Bool)),
        _ => wrong(field.at, "has() takes a field, as in has(request.max_usd) or has(request.tags.team)"),
    }
}

fn size(of: &Ast, scope: Scope) -> Result<Typed, Wrong> {
    if let Kind::Member(inner, name) = &of.kind
        && let Some(map) = map(inner, name, scope)?
    {
        return Ok((Expr::Count(map), Type::Int));
    }
    let text = must(of, scope, Type::Text, "size() takes a map or")?;
    Ok((Expr::Length(Box::new(text)), Type::Int))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) {
        condition(text, Scope::Node).unwrap_or_else(|wrong| panic!("{text}: {wrong:?}"));
    }

    fn check_wrong(scope: Scope, text: &str, at: usize, part: &str) {
        let wrong = condition(text, scope).unwrap_err();
        assert!(wrong.message.contains(part) && wrong.at == at, "{text}: {wrong:?}");
    }

    #[test]
    fn what_is_right() {
        check("node.trust == 'own' && request.priority != \"background\"");
        check("node.usd * 100 + 1 < 5 || node.running + 1 <= node.slots");
        check("'private' in request.tags && request.tags.team in ['a', 'b'] && request.tags['x'] == 'y'");
        check("has(request.max_usd) ? node.usd < request.max_usd : true");
        check("has(request.tags.team) && request.model.startsWith('llama-') && size(node.labels) > 0");
        check("int(node.load * 10.0) % 3 == 1 && double(pool.queue) / 2.0 > 1.5 && -node.running < -1");
        check("time.hour in [8, 9] && time.weekday <= 5");
        check("node.load in [0, 0.5]");
    }

    #[test]
    fn what_is_wrong() {
        let check = |text, at, part| check_wrong(Scope::Node, text, at, part);
        check("node.trsut == 'own'", 5, "did you mean `node.trust`?");
        check("nod.trust == 'own'", 0, "did you mean `node`?");
        check("trust == 'own'", 0, "did you mean `node.trust`");
        check("request.queue > 3", 8, "did you mean `pool.queue`?");
        check("node.trust == own", 14, "in quotes");
        check("node.trust", 5, "this is of type string; a condition is a bool");
        check("node.trust == 3", 11, "the sides of `==` are of types string and int");
        check("node.trust && true", 5, "`&&` takes a bool, and this is of type string");
        check("node.running + 'a' > 1", 13, "types int and string");
        check("node.load % 2 == 0", 10, "whole numbers");
        check("node.trust in ['own', 1]", 22, "of type int");
        check("node.trust in 'own'", 14, "a list");
        check("node.trust + 'x' == 'ownx'", 11, "joined");
        check("request.tags == 'a'", 8, "is a map");
        check("request.tags.exists(t, t == 'x')", 13, "no loops");
        check("node.name.startswith('x')", 10, "did you mean startsWith()?");
        check("node.name.matches('x')", 10, "regular expressions");
        check("has(3)", 4, "takes a field");
        check("node", 0, "is no value");
        check("node.name.x == 'y'", 10, "a string has no fields");
        check_wrong(Scope::Whole, "node.trust == 'own'", 0, "can't be asked for here");
        check_wrong(Scope::Whole, "'x' in node.labels", 7, "can't be asked for here");
    }
}
