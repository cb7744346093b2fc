//! Keeps what a template builds small however it is looked at.
//!
//! A list that contains another one twice, that one another twice, and so on, takes little memory and few instructions
//! to build; but to compare it, sort it, hash it or write it out is one instruction that takes time in the power of the
//! depth. And a namespace that contains itself has no end. The engine doesn't charge for either. So before a template
//! is compiled, a call is put around each expression that can nest values: it counts what is inside, every time that it
//! is inside, and refuses what is too much. Names can then only hold what has been counted.
use minijinja::functions;
use minijinja::machinery::ast::{Call, CallArg, Expr, Macro, Stmt};
use minijinja::machinery::{Span, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State};
use std::ops::Range;

/// Around what may nest values.
const COUNTED: &str = "weir_counted";
/// Around what becomes an attribute of a namespace.
const STORABLE: &str = "weir_storable";
/// Values in a value, itself included: so many ...
const VALUES_MAX: u64 = 4096;
/// ... and one for so much fuel that is left, which depends on the messages.
const FUEL_PER_VALUE: u64 = 8;
/// Fuel beyond which more doesn't help.
const FUEL_MAX: u64 = 1 << 17;
/// Values that are counted for one fuel.
const VALUES_PER_FUEL: u64 = 8;
/// Values may nest this deep; JSON may as well.
const DEPTH_MAX: usize = 128;

/// Adds what [`guarded`] calls. Functions that nest values count what they give by themselves: `namespace` and `dict`
/// here, methods by [`count`].
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_function(COUNTED, counted);
    environment.add_filter(COUNTED, counted);
    environment.add_function(STORABLE, |state: &State, value: Value| match is_namespace(&value) {
        true => Err(endless()),
        false => counted(state, value),
    });
    environment.add_function("namespace", |state: &State, values: Option<ValueOrKwargs>| {
        counted(state, functions::namespace(values)?)
    });
    environment.add_function("dict", |state: &State, value: Option<Value>, update: Kwargs| {
        counted(state, functions::dict(value, update)?)
    });
}

fn counted(state: &State, value: Value) -> Result<Value, Error> {
    count(state, &value).map(|()| value)
}

/// The source with calls around what may nest values.
pub(super) fn guarded(source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    if [COUNTED, STORABLE].iter().any(|name| source.contains(name)) {
        return Err(Error::new(ErrorKind::SyntaxError, "it uses a name that is not its own"));
    }
    let unclear = || Error::new(ErrorKind::SyntaxError, "the place of an expression is unclear");
    let mut found = Finder { source, bare: Vec::new() };
    found.statement(&parse(source, "chat", syntax.clone())?);
    let mut inserts: Vec<(usize, Insert)> = Vec::with_capacity(2 * found.bare.len());
    for place in found.bare {
        match place {
            Place::Around(range) => {
                inserts.push((range.start, Insert::Call(COUNTED)));
                inserts.push((range.end, Insert::End));
            }
            Place::Stored(range) => {
                let range = range.ok_or_else(unclear)?;
                inserts.push((range.start, Insert::Call(STORABLE)));
                inserts.push((range.end, Insert::End));
            }
            Place::After(at) => inserts.push((at, Insert::Filter)),
        }
    }
    // at one place filters go first, then ends, then beginnings, of which the outermost was found first
    inserts.sort();
    let mut out = String::with_capacity(source.len() + 16 * inserts.len());
    let mut copied = 0;
    for (at, insert) in inserts {
        out.push_str(source.get(copied..at).ok_or_else(unclear)?);
        copied = at;
        match insert {
            Insert::Filter => out.extend(["|", COUNTED]),
            Insert::End => out.push(')'),
            Insert::Call(name) => out.extend([name, "("]),
        }
    }
    out.push_str(&source[copied..]);
    let mut left = Finder { source: &out, bare: Vec::new() };
    left.statement(&parse(&out, "chat", syntax)?);
    match left.bare.is_empty() {
        true => Ok(out),
        false => Err(unclear()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Insert {
    Filter,
    End,
    Call(&'static str),
}

/// Where something has to be counted.
enum Place {
    /// A literal.
    Around(Range<usize>),
    /// What an attribute is set to; none where that can't be told.
    Stored(Option<Range<usize>>),
    /// A filter's result.
    After(usize),
}

fn range(span: Span) -> Range<usize> {
    span.start_offset as usize..span.end_offset as usize
}

/// Finds the expressions that may nest values and are not counted, outer ones before inner ones.
struct Finder<'a> {
    source: &'a str,
    bare: Vec<Place>,
}

impl Finder<'_> {
    fn statements(&mut self, statements: &[Stmt<'_>]) {
        statements.iter().for_each(|statement| self.statement(statement));
    }

    fn statement(&mut self, statement: &Stmt<'_>) {
        match statement {
            Stmt::Template(s) => self.statements(&s.children),
            Stmt::EmitExpr(s) => self.expression(&s.expr),
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => {}
            Stmt::ForLoop(s) => {
                self.expression(&s.iter);
                s.filter_expr.iter().for_each(|e| self.expression(e));
                self.statements(&s.body);
                self.statements(&s.else_body);
            }
            Stmt::IfCond(s) => {
                self.expression(&s.expr);
                self.statements(&s.true_body);
                self.statements(&s.false_body);
            }
            Stmt::WithBlock(s) => {
                s.assignments.iter().for_each(|(target, e)| self.assignment(target, e, None));
                self.statements(&s.body);
            }
            Stmt::Set(s) => self.assignment(&s.target, &s.expr, Some(s.span().end_offset as usize)),
            Stmt::SetBlock(s) => {
                s.filter.iter().for_each(|e| self.inside(e));
                self.statements(&s.body);
            }
            Stmt::AutoEscape(s) => {
                self.expression(&s.enabled);
                self.statements(&s.body);
            }
            Stmt::FilterBlock(s) => {
                self.inside(&s.filter);
                self.statements(&s.body);
            }
            Stmt::Macro(s) => self.definition(s),
            Stmt::CallBlock(s) => {
                self.call(&s.call);
                self.definition(&s.macro_decl);
            }
            Stmt::Do(s) => self.call(&s.call),
        }
    }

    fn definition(&mut self, s: &Macro<'_>) {
        s.defaults.iter().for_each(|e| self.expression(e));
        self.statements(&s.body);
    }

    /// `end` is where the expression ends, if that is known.
    fn assignment(&mut self, target: &Expr<'_>, e: &Expr<'_>, end: Option<usize>) {
        match (has_attribute(target), called(e)) {
            (true, Some((STORABLE, inner))) => self.expression(inner),
            (true, _) => {
                let after = target.span().end_offset as usize;
                let start = self.source.get(after..).and_then(|rest| {
                    let rest = rest.trim_start().strip_prefix('=')?;
                    Some(self.source.len() - rest.len())
                });
                self.bare.push(Place::Stored(start.zip(end).map(|(start, end)| start..end)));
                self.expression(e);
            }
            (false, _) => self.expression(e),
        }
    }

    fn expression(&mut self, e: &Expr<'_>) {
        match (e, called(e)) {
            (_, Some((COUNTED | STORABLE, inner))) => return self.inside(inner),
            (Expr::Filter(filter), _) if filter.name == COUNTED => {
                return filter.expr.iter().for_each(|e| self.inside(e));
            }
            (Expr::Filter(filter), _) => self.bare.push(Place::After(filter.span().end_offset as usize)),
            // a constant is as small as its source
            (Expr::List(_) | Expr::Tuple(_) | Expr::Map(_), _) if e.as_const().is_none() => {
                self.bare.push(Place::Around(range(e.span())));
            }
            _ => {}
        }
        self.inside(e);
    }

    /// What `e` is made of.
    fn inside(&mut self, e: &Expr<'_>) {
        match e {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::Slice(e) => {
                self.expression(&e.expr);
                [&e.start, &e.stop, &e.step].into_iter().flatten().for_each(|e| self.expression(e));
            }
            Expr::UnaryOp(e) => self.expression(&e.expr),
            Expr::BinOp(e) => {
                self.expression(&e.left);
                self.expression(&e.right);
            }
            Expr::Compare(e) => {
                self.expression(&e.expr);
                e.ops.iter().for_each(|op| self.expression(&op.expr));
            }
            Expr::IfExpr(e) => {
                self.expression(&e.test_expr);
                self.expression(&e.true_expr);
                e.false_expr.iter().for_each(|e| self.expression(e));
            }
            Expr::Filter(e) => {
                e.expr.iter().for_each(|e| self.expression(e));
                self.arguments(&e.args);
            }
            Expr::Test(e) => {
                self.expression(&e.expr);
                self.arguments(&e.args);
            }
            Expr::GetAttr(e) => self.expression(&e.expr),
            Expr::GetItem(e) => {
                self.expression(&e.expr);
                self.expression(&e.subscript_expr);
            }
            Expr::Call(e) => self.call(e),
            Expr::List(e) => e.items.iter().for_each(|e| self.expression(e)),
            Expr::Tuple(e) => e.items.iter().for_each(|e| self.expression(e)),
            Expr::Map(e) => e.keys.iter().chain(&e.values).for_each(|e| self.expression(e)),
        }
    }

    fn call(&mut self, call: &Call<'_>) {
        self.expression(&call.expr);
        self.arguments(&call.args);
    }

    fn arguments(&mut self, arguments: &[CallArg<'_>]) {
        for argument in arguments {
            match argument {
                CallArg::Pos(e) | CallArg::Kwarg(_, e) | CallArg::PosSplat(e) | CallArg::KwargSplat(e) => {
                    self.expression(e);
                }
            }
        }
    }
}

/// Whether an assignment sets an attribute of something.
fn has_attribute(target: &Expr<'_>) -> bool {
    match target {
        Expr::Var(_) => false,
        Expr::List(e) => e.items.iter().any(has_attribute),
        _ => true,
    }
}

/// The function that `e` calls by name with one argument, and that.
fn called<'a, 'source>(e: &'a Expr<'source>) -> Option<(&'source str, &'a Expr<'source>)> {
    let Expr::Call(call) = e else { return None };
    match (&call.expr, &call.args[..]) {
        (Expr::Var(name), [CallArg::Pos(inner)]) => Some((name.id, inner)),
        _ => None,
    }
}

/// Fails where a value has too many values inside.
pub(super) fn count(state: &State, value: &Value) -> Result<(), Error> {
    if value.as_object().is_none() {
        return Ok(());
    }
    let fuel = state.fuel_levels().map_or(FUEL_MAX, |(used, left)| (used + left).min(FUEL_MAX));
    let most = VALUES_MAX + fuel / FUEL_PER_VALUE;
    let mut left = most;
    let outcome = take(value, 0, &mut left);
    state.consume_fuel((most - left) / VALUES_PER_FUEL)?;
    outcome
}

fn take(value: &Value, depth: usize, left: &mut u64) -> Result<(), Error> {
    *left = left.checked_sub(1).ok_or_else(too_much)?;
    if depth > DEPTH_MAX {
        return Err(too_much());
    }
    match value.kind() {
        // of unknown length: made when it is walked, perhaps only once
        ValueKind::Iterable if value.len().is_none() => Ok(()),
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.try_for_each(|item| inner(&item, depth, left))
        }
        ValueKind::Map => value.try_iter()?.try_for_each(|key| {
            inner(&key, depth, left)?;
            inner(&value.get_item(&key)?, depth, left)
        }),
        _ => Ok(()),
    }
}

fn inner(value: &Value, depth: usize, left: &mut u64) -> Result<(), Error> {
    match is_namespace(value) {
        true => Err(endless()),
        false => take(value, depth + 1, left),
    }
}

/// The one kind of value that can be changed, and so be made to contain itself. Its type is private.
fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

fn endless() -> Error {
    Error::new(ErrorKind::InvalidOperation, "a namespace can't be part of another value")
}

fn too_much() -> Error {
    Error::new(ErrorKind::OutOfFuel, "a value has too many others inside")
}
