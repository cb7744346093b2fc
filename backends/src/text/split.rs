//! Pre-tokenizers: cut text into the words within which byte-level BPE merges.
//!
//! Each is a regular expression over Unicode categories in the models' own files; here they are hand-written scanners,
//! each reading a word's characters at most twice, so that no input takes more than linear time.
use super::categories::CHANGES;

/// Which expression cuts the text. Relatives that cut alike share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Splitter {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// Every `\p{N}` alone, and [`Splitter::Gpt2`] between them.
    SmolLm,
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    Llama3,
    /// [`Splitter::Llama3`] with one digit a word.
    Qwen2,
    /// [`Splitter::Qwen2`] with marks (`\p{M}`) counted as letters.
    Qwen35,
    /// Runs of `[\p{P}$+<=>^~|]`, then [`Splitter::Gpt2`], then runs of `\p{N}`, then three ASCII digits.
    Default,
}

/// What `tokenizer.ggml.pre` stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rules {
    /// What cuts the text.
    pub(super) splitter: Splitter,
    /// Whether a word that is a token as a whole becomes that token, whatever the merges say.
    pub(super) whole_words: bool,
    /// Whether prompts begin with BOS where the file doesn't say.
    pub(super) adds_bos: bool,
}

impl Rules {
    /// The rules that go by `name`.
    pub(super) fn named(name: &str) -> Option<Rules> {
        let (splitter, whole_words, adds_bos) = match name {
            "gpt-2" | "phi-2" | "roberta-bpe" | "jina-es" | "jina-de" | "jina-v1-en" | "jina-v2-es"
            | "jina-v2-de" | "jina-v2-code" | "gigachat" | "a.x-4.0" | "mellum" | "modern-bert" | "mpt"
            | "olmo" | "jais" | "exaone4" | "trillion" | "granite-docling" => (Splitter::Gpt2, false, false),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b"
            | "mellum2" => (Splitter::SmolLm, false, false),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0"
            | "lfm2" | "jina-v5-nano" => (Splitter::Llama3, true, true),
            "glm4" | "glm5" => (Splitter::Llama3, true, false),
            "dbrx" | "smaug-bpe" | "chatglm-bpe" => (Splitter::Llama3, false, false),
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "megrez" | "stablelm2" | "hunyuan"
            | "solar-open" | "grok-2" => (Splitter::Qwen2, false, false),
            "qwen35" => (Splitter::Qwen35, false, false),
            "default" | "" => (Splitter::Default, false, false),
            _ => return None,
        };
        Some(Rules { splitter, whole_words, adds_bos })
    }
}

impl Splitter {
    /// Calls `word` with each word, in order; together they are `text`.
    pub(super) fn split(self, text: &str, word: &mut impl FnMut(&str)) {
        match self {
            Splitter::Gpt2 => each(text, gpt2, word),
            Splitter::Llama3 => each(text, |rest| llama3(rest, 3, is_letter), word),
            Splitter::Qwen2 => each(text, |rest| llama3(rest, 1, is_letter), word),
            Splitter::Qwen35 => {
                each(text, |rest| llama3(rest, 1, |class| is_letter(class) || class == Class::Mark), word)
            }
            Splitter::SmolLm => each(text, smollm_piece, &mut |piece| each(piece, gpt2, word)),
            Splitter::Default => each(text, |rest| alternate(rest, is_default_punctuation), &mut |piece| {
                each(piece, gpt2, &mut |piece| {
                    each(piece, |rest| alternate(rest, |c| class(c) == Class::Number), &mut |piece| {
                        each(piece, three_digits, word)
                    })
                })
            }),
        }
    }
}

/// Cuts `text` into the words whose lengths `next` tells from what is left.
fn each(mut text: &str, next: impl Fn(&str) -> usize, word: &mut impl FnMut(&str)) {
    while !text.is_empty() {
        let (head, rest) = text.split_at(next(text));
        word(head);
        text = rest;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Other,
    Letter,
    Number,
    Mark,
    Punctuation,
    Symbol,
    White,
}

const CLASSES: [Class; 8] = [
    Class::Other,
    Class::Letter,
    Class::Number,
    Class::Mark,
    Class::Punctuation,
    Class::Symbol,
    Class::White,
    Class::Other,
];

fn search(c: char) -> Class {
    let after = CHANGES.partition_point(|change| change >> 3 <= c as u32);
    CLASSES[(CHANGES[after - 1] & 7) as usize]
}

fn class(c: char) -> Class {
    match c {
        'a'..='z' | 'A'..='Z' => Class::Letter,
        ' ' | '\t'..='\r' => Class::White,
        '0'..='9' => Class::Number,
        _ => search(c),
    }
}

fn is_letter(class: Class) -> bool {
    class == Class::Letter
}

fn first_class(text: &str) -> Option<Class> {
    text.chars().next().map(class)
}

/// Bytes of the characters at the start of `text` for which `holds`.
fn run(text: &str, holds: impl Fn(char) -> bool) -> usize {
    text.find(|c| !holds(c)).unwrap_or(text.len())
}

/// Length of an English contraction (`'s`, `'re`, ...) at the start of `text`.
fn contraction(text: &str, any_case: bool) -> Option<usize> {
    let rest = text.as_bytes().strip_prefix(b"'")?;
    let letter = |i: usize| rest.get(i).map(|b| if any_case { b.to_ascii_lowercase() } else { *b });
    match (letter(0)?, letter(1)) {
        (b's' | b't' | b'm' | b'd', _) => Some(2),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => Some(3),
        _ => None,
    }
}

/// `\s+(?!\S)|\s+`: all the white space, less its last character where something follows more than one.
fn white_space(text: &str) -> usize {
    let end = run(text, |c| class(c) == Class::White);
    let last = text[..end].chars().next_back().map_or(0, char::len_utf8);
    if end < text.len() && last < end { end - last } else { end }
}

fn gpt2(text: &str) -> usize {
    if let Some(length) = contraction(text, false) {
        return length;
    }
    let lead = usize::from(text.starts_with(' '));
    let body = &text[lead..];
    let same_kind = |kind: Class| {
        lead + match kind {
            Class::Letter | Class::Number => run(body, |c| class(c) == kind),
            _ => run(body, |c| !matches!(class(c), Class::Letter | Class::Number | Class::White)),
        }
    };
    match first_class(body) {
        None | Some(Class::White) => white_space(text),
        Some(kind) => same_kind(kind),
    }
}

fn llama3(text: &str, digits: usize, in_word: impl Fn(Class) -> bool) -> usize {
    if let Some(length) = contraction(text, true) {
        return length;
    }
    let Some(first) = text.chars().next() else { return 0 };
    let kind = class(first);
    let after = first.len_utf8();
    if kind == Class::Number {
        let end = text.char_indices().take(digits).take_while(|(_, c)| class(*c) == Class::Number).last();
        return end.map_or(after, |(at, c)| at + c.len_utf8());
    }
    if !matches!(first, '\r' | '\n') && (in_word(kind) || first_class(&text[after..]).is_some_and(&in_word)) {
        return after + run(&text[after..], |c| in_word(class(c)));
    }
    let is_other = |c: char| {
        let class = class(c);
        !in_word(class) && !matches!(class, Class::Letter | Class::Number | Class::White)
    };
    let lead = usize::from(first == ' ');
    let others = run(&text[lead..], is_other);
    if others > 0 {
        let end = lead + others;
        return end + run(&text[end..], |c| matches!(c, '\r' | '\n'));
    }
    let white = run(text, |c| class(c) == Class::White);
    text[..white].rfind(['\r', '\n']).map_or_else(|| white_space(text), |newline| newline + 1)
}

/// One number, or everything up to the next.
fn smollm_piece(text: &str) -> usize {
    let is_number = |c: char| class(c) == Class::Number;
    match text.chars().next() {
        Some(c) if is_number(c) => c.len_utf8(),
        _ => run(text, |c| !is_number(c)),
    }
}

/// A run of characters for which `holds`, or one of characters for which it doesn't.
fn alternate(text: &str, holds: impl Fn(char) -> bool) -> usize {
    match text.chars().next() {
        Some(c) if holds(c) => run(text, holds),
        _ => run(text, |c| !holds(c)),
    }
}

fn is_default_punctuation(c: char) -> bool {
    matches!(c, '$' | '+' | '<' | '=' | '>' | '^' | '~' | '|') || class(c) == Class::Punctuation
}

/// Three ASCII digits, or everything up to the next three.
fn three_digits(text: &str) -> usize {
    let are_digits = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_digit);
    match text.as_bytes().windows(3).position(are_digits) {
        Some(0) => 3,
        Some(at) => at,
        None => text.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(splitter: Splitter, text: &str, words: &[&str]) {
        let mut found = Vec::new();
        splitter.split(text, &mut |word| found.push(word.to_owned()));
        assert_eq!(found.concat(), text, "{splitter:?}");
        assert_eq!(found, words, "{splitter:?} of {text:?}");
    }

    #[test]
    fn gpt2_words() {
        let check = |text, words: &[&str]| check(Splitter::Gpt2, text, words);
        check("", &[]);
        check("Hello world", &["Hello", " world"]);
        check("I'll SAY'S don't", &["I", "'ll", " SAY", "'", "S", " don", "'t"]);
        check("a  b\t\tc\n", &["a", " ", " b", "\t", "\t", "c", "\n"]);
        check("x = 12345;", &["x", " =", " 12345", ";"]);
        check("   ", &["   "]);
        check(" \u{3000}é½²", &[" ", "\u{3000}", "é", "½²"]);
        check("e\u{301}\u{0}!", &["e", "\u{301}\u{0}!"]);
    }

    #[test]
    fn smollm_words() {
        let check = |text, words: &[&str]| check(Splitter::SmolLm, text, words);
        check("in 2024,", &["in", " ", "2", "0", "2", "4", ","]);
        check("a  1", &["a", "  ", "1"]);
        check("½x", &["½", "x"]);
    }

    #[test]
    fn llama3_words() {
        let check = |text, words: &[&str]| check(Splitter::Llama3, text, words);
        check("It'S 1234567 €5", &["It", "'S", " ", "123", "456", "7", " €", "5"]);
        check("f(x)\n\n  y", &["f", "(x", ")\n\n", " ", " y"]);
        check(" \n \n  z", &[" \n \n", " ", " z"]);
        check("\tid\r\n", &["\tid", "\r\n"]);
        check("a ", &["a", " "]);
        check("नमस्ते", &["नमस", "\u{94d}त", "\u{947}"]);
    }

    #[test]
    fn qwen_words() {
        check(Splitter::Qwen2, "v1.25's", &["v", "1", ".", "2", "5", "'s"]);
        check(Splitter::Qwen2, "नम\u{94d}ते", &["नम", "\u{94d}त", "\u{947}"]);
        check(Splitter::Qwen35, "नम\u{94d}ते \u{94d}!", &["नम\u{94d}ते", " \u{94d}", "!"]);
    }

    #[test]
    fn default_words() {
        let check = |text, words: &[&str]| check(Splitter::Default, text, words);
        check("a, b", &["a", ",", " b"]);
        check(" 1234567", &[" ", "123", "456", "7"]);
        check("x += `y` ½12", &["x", " ", "+=", " `", "y", "`", " ", "½12"]);
        check("12½345", &["12½", "345"]);
    }

    #[test]
    fn hostile_text_takes_linear_time() {
        for unit in [" ", "a", "1", "'", "\n", " \n", "\u{301}", "\u{3000}", "! ", "\t "] {
            let text = unit.repeat((1 << 20) / unit.len());
            for splitter in
                [Splitter::Gpt2, Splitter::SmolLm, Splitter::Llama3, Splitter::Qwen35, Splitter::Default]
            {
                let mut bytes = 0;
                splitter.split(&text, &mut |word| bytes += word.len());
                assert_eq!(bytes, text.len());
            }
        }
    }

    #[test]
    fn classes_agree_with_the_standard_library() {
        for c in '\0'..=char::MAX {
            assert_eq!(class(c), search(c), "{c:?}");
            assert_eq!(class(c) == Class::White, c.is_whitespace(), "{c:?}");
            if class(c) == Class::Letter {
                assert!(c.is_alphabetic(), "{c:?}");
            }
            if class(c) == Class::Number {
                assert!(c.is_numeric(), "{c:?}");
            }
        }
    }
}
