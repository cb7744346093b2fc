//! Values as text, as Python writes them: `json.dumps` and `repr`. Models were trained on its spacing.
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use std::fmt::Write;

/// Values may nest this deep.
const DEPTH_MAX: usize = 128;
/// What is written is paid for in pieces of this many bytes.
const PIECE_BYTES: usize = 1 << 10;

/// What is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Notation {
    /// `json.dumps`
    Json,
    /// `repr`, which is what printing a list or a dictionary gives.
    Repr,
}

/// `json.dumps` without arguments.
pub(super) const JSON: Style =
    Style { notation: Notation::Json, indent: None, separators: None, ascii: false, sorted: false };
/// `repr`.
pub(super) const REPR: Style = Style { notation: Notation::Repr, ..JSON };

/// The keyword arguments of `json.dumps`.
pub(super) struct Style {
    pub(super) notation: Notation,
    /// Spaces a level, and a line for each element.
    pub(super) indent: Option<usize>,
    /// Between elements, and between a key and its value.
    pub(super) separators: Option<(String, String)>,
    /// Whether characters beyond ASCII are written `\uXXXX`.
    pub(super) ascii: bool,
    /// Whether keys are sorted.
    pub(super) sorted: bool,
}

/// `value` as text. Costs the rendering fuel, so that values which contain others many times stay bounded.
pub(super) fn write(state: &State, value: &Value, style: &Style) -> Result<String, Error> {
    if style.indent.is_some_and(|indent| indent > 16) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson indents by at most 16"));
    }
    let mut writer = Writer { state, style, out: String::new(), paid: 0 };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a, 'state, 'environment> {
    state: &'a State<'state, 'environment>,
    style: &'a Style,
    out: String,
    paid: usize,
}

impl Writer<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::BadSerialization, "tojson: values nest too deep"));
        }
        if self.out.len() >= self.paid {
            self.state.consume_fuel((PIECE_BYTES / 16) as u64)?;
            self.paid = self.out.len() + PIECE_BYTES;
        }
        match value.kind() {
            ValueKind::None => self.out.push_str(self.either("null", "None")),
            ValueKind::Bool if value.is_true() => self.out.push_str(self.either("true", "True")),
            ValueKind::Bool => self.out.push_str(self.either("false", "False")),
            ValueKind::Number => self.number(value),
            ValueKind::Undefined if self.style.notation == Notation::Repr => self.out.push_str("Undefined"),
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item));
                let is_tuple = value.is_tuple() && self.style.notation == Notation::Repr;
                self.container(if is_tuple { ['(', ')'] } else { ['[', ']'] }, items, depth)?;
                if is_tuple && value.len() == Some(1) {
                    self.out.insert(self.out.len() - 1, ',');
                }
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.style.sorted {
                    keys.sort();
                }
                let items = keys.into_iter().map(|key| value.get_item(&key).map(|item| (Some(key), item)));
                self.container(['{', '}'], items.collect::<Result<Vec<_>, Error>>()?.into_iter(), depth)?;
            }
            kind => {
                let why = format!("tojson: a value of kind {kind} is not JSON");
                return Err(Error::new(ErrorKind::BadSerialization, why));
            }
        }
        Ok(())
    }

    fn either(&self, json: &'static str, repr: &'static str) -> &'static str {
        if self.style.notation == Notation::Json { json } else { repr }
    }

    fn container(
        &mut self,
        brackets: [char; 2],
        items: impl Iterator<Item = (Option<Value>, Value)>,
        depth: usize,
    ) -> Result<(), Error> {
        let (between, colon) = match &self.style.separators {
            Some((between, colon)) => (between.as_str(), colon.as_str()),
            None if self.style.indent.is_some() => (",", ": "),
            None => (", ", ": "),
        };
        self.out.push(brackets[0]);
        let mut is_empty = true;
        for (key, item) in items {
            if !is_empty {
                self.out.push_str(between);
            }
            is_empty = false;
            self.line(depth + 1);
            if let Some(key) = key {
                match key.as_str() {
                    None if self.style.notation == Notation::Json => self.string(&key.to_string())?,
                    _ => self.value(&key, depth + 1)?,
                }
                self.out.push_str(colon);
            }
            self.value(&item, depth + 1)?;
        }
        if !is_empty {
            self.line(depth);
        }
        self.out.push(brackets[1]);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel(text.len() as u64 / 16)?;
        let in_json = self.style.notation == Notation::Json;
        let quote = if in_json || (text.contains('\'') && !text.contains('"')) { '"' } else { '\'' };
        self.out.push(quote);
        for c in text.chars() {
            match c {
                c if c == quote => self.out.extend(['\\', c]),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' if in_json => self.out.push_str("\\b"),
                '\u{c}' if in_json => self.out.push_str("\\f"),
                c if !in_json && c.is_ascii_control() => {
                    let _ = write!(self.out, "\\x{:02x}", u32::from(c)); // to a String: doesn't fail
                }
                c if c < ' ' || (self.style.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}"); // to a String: doesn't fail
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push(quote);
        Ok(())
    }

    /// Integers as they are; floats as Python's `repr`: the shortest digits that give the number back.
    fn number(&mut self, value: &Value) {
        match f64::try_from(value.clone()) {
            Ok(float) if !value.is_integer() => self.out.push_str(&python_float(float)),
            _ => self.out.push_str(&value.to_string()),
        }
    }
}

fn python_float(float: f64) -> String {
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if float != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{float:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::Environment;

    fn check(value: serde_json::Value, style: &Style, expected: &str) {
        let environment = Environment::new();
        let state = environment.empty_state();
        assert_eq!(
            write(&state, &Value::from(minijinja::value::Serde(value)), style).expect("is JSON"),
            expected
        );
    }

    #[test]
    fn values_are_written_as_python_does() {
        let value = serde_json::json!({"b": [1, -2.5, true, null, {}], "a": "é\u{1}\"\n\u{7f}<'", "c": []});
        let plain = r#"{"b": [1, -2.5, true, null, {}], "a": "é\u0001\"\nDEL<'", "c": []}"#;
        check(value.clone(), &JSON, &plain.replace("DEL", "\u{7f}"));
        let sorted = Style { sorted: true, ascii: true, separators: Some((",".into(), ":".into())), ..JSON };
        check(value, &sorted, r#"{"a":"\u00e9\u0001\"\n\u007f<'","b":[1,-2.5,true,null,{}],"c":[]}"#);
        let indented = Style { indent: Some(2), ..JSON };
        check(
            serde_json::json!({"a": [1, {"b": 2}]}),
            &indented,
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ]\n}",
        );
    }

    #[test]
    fn reprs_are_pythons() {
        let value = serde_json::json!({"a": [1, -2.5, true, null], "it's": "\"'\n\u{7f}é\\"});
        check(value, &REPR, r#"{'a': [1, -2.5, True, None], "it's": '"\'\n\x7fé\\'}"#);
    }

    #[test]
    fn floats_are_written_as_python_does() {
        let check = |float, expected: &str| assert_eq!(python_float(float), expected);
        check(1.0, "1.0");
        check(0.0, "0.0");
        check(-0.0, "-0.0");
        check(1e16, "1e+16");
        check(123456789012345680.0, "1.2345678901234568e+17");
        check(1e15, "1000000000000000.0");
        check(0.0001, "0.0001");
        check(0.00001, "1e-05");
        check(1.5e-300, "1.5e-300");
    }
}
