//! Keeps the names of control tokens in what people wrote from becoming the tokens.
//!
//! Before a template renders them, names in messages and tools get a mark inside; after, the marks tell which places of
//! the prompt must stay text.
use serde_json::{Map, Value};
use std::ops::Range;

/// Stands inside a name that must stay text. A noncharacter: Unicode reserves it for a program's own use, so that text
/// from outside has no business with it.
const MARK: char = '\u{FDD0}';

/// Knows the names: how many bytes the longest one has with which a text starts.
pub(super) struct Guard<F: Fn(&str) -> Option<usize>>(pub(super) F);

impl<F: Fn(&str) -> Option<usize>> Guard<F> {
    /// Marks every name in the strings of `value`.
    pub(super) fn mark(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Some(marked) = self.marked(text) {
                    *text = marked;
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.mark(item)),
            Value::Object(map) => {
                map.values_mut().for_each(|item| self.mark(item));
                if map.keys().any(|key| self.marked(key).is_some()) {
                    let renamed = std::mem::take(map).into_iter();
                    *map = renamed
                        .map(|(key, item)| (self.marked(&key).unwrap_or(key), item))
                        .collect::<Map<_, _>>();
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// The text with its names marked; none if nothing had to change.
    fn marked(&self, text: &str) -> Option<String> {
        let foreign = text.contains(MARK).then(|| text.replace(MARK, "\u{FFFD}"));
        let text = foreign.as_deref().unwrap_or(text);
        let mut out = String::new();
        let mut copied = 0;
        let mut end = 0;
        for (at, head) in text.char_indices() {
            if at < end {
                continue;
            }
            let Some(length) = self.0(&text[at..]) else { continue };
            let after = at + head.len_utf8();
            out.push_str(&text[copied..after]);
            out.push(MARK);
            (copied, end) = (after, at + length);
        }
        if copied == 0 {
            return foreign;
        }
        out.push_str(&text[copied..]);
        Some(out)
    }

    /// A rendered prompt without the marks, and the ranges of names that must stay text, ascending. A template that
    /// tore a name apart left no name, which is safe too.
    pub(super) fn unmark(&self, rendered: &str) -> (String, Vec<Range<usize>>) {
        let mut text = String::with_capacity(rendered.len());
        let mut heads = Vec::new();
        for part in rendered.split_inclusive(MARK) {
            match part.strip_suffix(MARK) {
                Some(part) => {
                    text.push_str(part);
                    heads.extend(text.char_indices().next_back().map(|(at, _)| at));
                }
                None => text.push_str(part),
            }
        }
        let mut ranges: Vec<Range<usize>> = Vec::with_capacity(heads.len());
        for at in heads {
            let is_new = ranges.last().is_none_or(|last| last.end <= at);
            if let Some(length) = self.0(&text[at..]).filter(|_| is_new) {
                ranges.push(at..at + length);
            }
        }
        (text, ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn guard() -> Guard<impl Fn(&str) -> Option<usize>> {
        let names = ["<|a|>b", "<|a|>", "<s>", "é!"];
        Guard(move |text: &str| names.iter().find(|name| text.starts_with(**name)).map(|name| name.len()))
    }

    /// `text` after marking and unmarking, what must stay text in brackets.
    fn check(text: &str, expected: &str) {
        let guard = guard();
        let mut value = json!(text);
        guard.mark(&mut value);
        let marked = value.as_str().unwrap();
        let is_free = marked.char_indices().all(|(at, _)| guard.0(&marked[at..]).is_none());
        assert!(is_free, "{marked:?} still has a name");
        let (mut shown, ranges) = guard.unmark(marked);
        for range in ranges.iter().rev() {
            shown.insert(range.end, ']');
            shown.insert(range.start, '[');
        }
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
        guard().mark(&mut value);
        let text = value.to_string();
        assert!(!text.contains("<s>") && !text.contains("<|a|>"), "{text}");
        let mut plain = json!({ "content": "nothing here", "tools": null });
        guard().mark(&mut plain);
        assert_eq!(plain, json!({ "content": "nothing here", "tools": null }));
    }

    #[test]
    fn a_mark_that_a_template_tore_off_is_only_dropped() {
        assert_eq!(guard().unmark("<\u{FDD0}s"), ("<s".into(), vec![]));
        assert_eq!(guard().unmark("\u{FDD0}"), (String::new(), vec![]));
        let (text, ranges) = guard().unmark("<\u{FDD0}\u{FDD0}s>");
        assert_eq!((text.as_str(), ranges.len(), &ranges[0]), ("<s>", 1, &(0..3)));
    }
}
