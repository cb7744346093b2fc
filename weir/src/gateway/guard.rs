//! Keeps the names of control tokens in what people typed from becoming the tokens.
use serde_json::{Map, Value};
use weir_backends::text::{Special, Tokenizer};

/// Stands inside a name that must stay text. A noncharacter: Unicode reserves it for a program's own use, so that text
/// from outside has no business with it.
const MARK: char = '\u{FDD0}';

/// The names of one model's control tokens.
///
/// [`Guard::mark`] the messages, render them, then tokenize the [`Guard::pieces`] of the result. A template that
/// escapes or cuts a mark leaves the name broken, which is safe too.
#[derive(Debug)]
pub(super) struct Guard {
    /// Longest first.
    names: Vec<String>,
    /// Bytes that some name begins with.
    first: [bool; 256],
}

impl Guard {
    /// Looks at the whole vocabulary: once a model, not once a request.
    pub(super) fn new(tokenizer: &Tokenizer) -> Guard {
        let ids = (0..tokenizer.len() as u32).filter(|id| tokenizer.is_control(*id));
        Guard::of(ids.map(|id| tokenizer.name(id).to_owned()))
    }

    fn of(names: impl Iterator<Item = String>) -> Guard {
        let mut names: Vec<String> = names.filter(|n| !n.is_empty()).collect();
        names.sort_unstable_by_key(|n| std::cmp::Reverse(n.len()));
        let mut first = [false; 256];
        names.iter().for_each(|n| first[usize::from(n.as_bytes()[0])] = true);
        Guard { names, first }
    }

    /// Marks every name in the strings of `value`; whether there was one.
    pub(super) fn mark(&self, value: &mut Value) -> bool {
        match value {
            Value::String(text) => match self.marked(text) {
                Some((marked, found)) => {
                    *text = marked;
                    found
                }
                None => false,
            },
            // Not `any`: all of them must be marked.
            Value::Array(items) => items.iter_mut().fold(false, |found, item| self.mark(item) | found),
            Value::Object(map) => {
                let mut found = map.values_mut().fold(false, |found, item| self.mark(item) | found);
                if map.keys().any(|key| self.marked(key).is_some()) {
                    found = true;
                    let renamed = std::mem::take(map).into_iter();
                    *map = renamed
                        .map(|(key, item)| (self.marked(&key).map_or(key, |(marked, _)| marked), item))
                        .collect::<Map<_, _>>();
                }
                found
            }
            _ => false,
        }
    }

    /// The text with its names marked, and whether there was one; none if nothing had to change.
    fn marked(&self, text: &str) -> Option<(String, bool)> {
        let foreign = text.contains(MARK).then(|| text.replace(MARK, "\u{FFFD}"));
        let text = foreign.as_deref().unwrap_or(text);
        let mut out = String::new();
        let mut copied = 0;
        let mut at = 0;
        while at < text.len() {
            let name = match self.first[usize::from(text.as_bytes()[at])] {
                true => self.names.iter().find(|n| text.as_bytes()[at..].starts_with(n.as_bytes())),
                false => None,
            };
            let Some(name) = name else {
                at += 1;
                continue;
            };
            let head = at + name.chars().next().map_or(0, char::len_utf8);
            out.push_str(&text[copied..head]);
            out.push(MARK);
            copied = head;
            at += name.len();
        }
        if copied == 0 {
            return foreign.map(|text| (text, false));
        }
        out.push_str(&text[copied..]);
        Some((out, true))
    }

    /// A rendered prompt, cut where names were marked, without the marks.
    pub(super) fn pieces<'a>(&'a self, rendered: &'a str) -> Vec<(&'a str, Special)> {
        let mut pieces = Vec::new();
        let mut rest = rendered;
        while let Some(at) = rest.find(MARK) {
            let after = &rest[at + MARK.len_utf8()..];
            let start = rest[..at].char_indices().next_back().map_or(at, |(start, _)| start);
            let head = &rest[start..at];
            let is_here = |n: &&String| n.strip_prefix(head).is_some_and(|tail| after.starts_with(tail));
            match self.names.iter().find(is_here) {
                Some(name) => {
                    pieces.push((&rest[..start], Special::Parse));
                    pieces.push((name.as_str(), Special::AsText));
                    rest = &after[name.len() - head.len()..];
                }
                None => {
                    pieces.push((&rest[..at], Special::Parse));
                    rest = after;
                }
            }
        }
        pieces.push((rest, Special::Parse));
        pieces.retain(|(text, _)| !text.is_empty());
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn guard() -> Guard {
        Guard::of(["<|a|>", "<|a|>b", "<s>", "é!"].map(str::to_owned).into_iter())
    }

    /// What stays of `text` after marking and cutting: `[x]` is a piece that stays text.
    fn check(text: &str, expected: &str) {
        let guard = guard();
        let mut value = json!(text);
        guard.mark(&mut value);
        let marked = value.as_str().unwrap();
        for name in &guard.names {
            assert!(!marked.contains(name.as_str()), "{marked:?} still has {name}");
        }
        let shown: String = guard
            .pieces(marked)
            .iter()
            .map(
                |(text, special)| {
                    if *special == Special::Parse { text.to_string() } else { format!("[{text}]") }
                },
            )
            .collect();
        assert_eq!(shown, expected);
    }

    #[test]
    fn names_stay_text() {
        check("", "");
        check("plain <text|>", "plain <text|>");
        check("<|a|>", "[<|a|>]");
        check("x<|a|>y", "x[<|a|>]y");
        check("<|a|>b<s><s>", "[<|a|>b][<s>][<s>]");
        check("<<s>é!é", "<[<s>][é!]é");
        check("\u{FDD0}<\u{FDD0}s>", "\u{FFFD}<\u{FFFD}s>");
    }

    #[test]
    fn every_string_is_marked() {
        let mut value = json!([{ "content": "<s>", "n": 1 }, [{ "<s>": ["ok", "<|a|>"] }]]);
        assert!(guard().mark(&mut value));
        let text = value.to_string();
        assert!(!text.contains("<s>") && !text.contains("<|a|>"), "{text}");
        assert!(!guard().mark(&mut json!({ "content": "nothing here", "tools": null })));
    }

    #[test]
    fn a_mark_that_a_template_tore_off_is_only_dropped() {
        let guard = guard();
        assert_eq!(guard.pieces("<\u{FDD0}s"), [("<", Special::Parse), ("s", Special::Parse)]);
        assert_eq!(guard.pieces("\u{FDD0}"), []);
    }
}
