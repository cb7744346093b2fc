//! Where in a file something is wrong.
use serde::Serialize;
use std::fmt;
use std::ops::Range;

/// A mistake in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// What is wrong, and what was expected.
    pub message: String,
}

/// All mistakes of a file that were found; at least one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{}", shown(.0))]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: {}", self.line, self.column, self.message)
    }
}

fn shown(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

impl Problem {
    /// At a byte of a text.
    pub(crate) fn at(text: &str, byte: usize, message: impl Into<String>) -> Problem {
        let mut byte = byte.min(text.len());
        while !text.is_char_boundary(byte) {
            byte -= 1;
        }
        let before = &text[..byte];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Problem {
            line: 1 + before.matches('\n').count(),
            column: 1 + before[line_start..].chars().count(),
            message: message.into(),
        }
    }

    /// What a TOML parser has to say.
    pub(crate) fn of_toml(text: &str, error: &toml::de::Error) -> Problem {
        let byte = error.span().map_or(0, |span| span.start);
        let message = error.message().trim().replace('\n', "; ");
        let meant = unknown_name(&message);
        let message = match meant {
            Some(close) => format!("{message}; did you mean `{close}`?"),
            None => message,
        };
        Problem::at(text, byte, message)
    }
}

/// Of "unknown field `x`, expected `y` or `z`", the expected name that is close to the unknown one.
fn unknown_name(message: &str) -> Option<&str> {
    let rest = message.strip_prefix("unknown field ").or_else(|| message.strip_prefix("unknown variant "))?;
    let mut names = rest.split('`').skip(1).step_by(2);
    let unknown = names.next()?;
    crate::near::near(unknown, names)
}

/// The byte of the file that a byte of a string's value comes from; `span` is that of the string with its quotes.
pub(crate) fn byte_of_value(text: &str, span: &Range<usize>, at: usize) -> usize {
    let raw = text.get(span.clone()).unwrap_or("");
    let triple = raw.starts_with("\"\"\"") || raw.starts_with("'''");
    let mut here = if triple { 3 } else { 1 };
    if triple {
        here += if raw[here..].starts_with("\r\n") { 2 } else { usize::from(raw[here..].starts_with('\n')) };
    }
    if raw.starts_with('\'') {
        return span.start + here + at;
    }
    let mut value = 0;
    while value < at {
        let Some(rest) = raw.get(here..).filter(|rest| !rest.is_empty()) else { break };
        let (bytes, means) = match rest.as_bytes() {
            [b'\\', b'u', ..] => (6, code(rest, 4)),
            [b'\\', b'U', ..] => (10, code(rest, 8)),
            [b'\\', next, ..] if next.is_ascii_whitespace() => {
                (1 + rest[1..].len() - rest[1..].trim_start().len(), 0)
            }
            [b'\\', ..] => (2, 1),
            _ => (1, 1),
        };
        here += bytes;
        value += means;
    }
    span.start + here
}

/// Bytes of the character that an escape stands for.
fn code(rest: &str, digits: usize) -> usize {
    let value = rest.get(2..2 + digits).and_then(|digits| u32::from_str_radix(digits, 16).ok());
    value.and_then(char::from_u32).map_or(1, char::len_utf8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(raw: &str, at: usize, expected: usize) {
        let text = format!("x = {raw}");
        assert_eq!(byte_of_value(&text, &(4..text.len()), at), 4 + expected, "{raw}");
    }

    #[test]
    fn values_have_places() {
        check("'abc'", 1, 2);
        check("\"abc\"", 1, 2);
        check(r#""a\"c""#, 2, 4);
        check(r#""\u00e9c""#, 2, 7);
        check("'''\nabc'''", 1, 5);
        check("\"\"\"\na \\\n   bc\"\"\"", 3, 12);
    }

    #[test]
    fn lines_and_columns_count_characters() {
        assert_eq!(Problem::at("a\né = 'x'", 7, ""), Problem { line: 2, column: 5, message: String::new() });
        assert_eq!(Problem::at("", 9, "").line, 1);
    }
}
