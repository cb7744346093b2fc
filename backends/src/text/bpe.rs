//! Byte-level BPE (`tokenizer.ggml.model = gpt2`): words are bytes, and pairs merge in the order of a list.
//!
//! Files write a token's bytes as printable characters: 0x21..=0x7e, 0xa1..=0xac and 0xae..=0xff stand for themselves,
//! the other bytes in order for U+0100 and up (GPT-2's `bytes_to_unicode`).
use super::TextError;
use super::index::{Merge, MergeIndex};
use super::merge::Merger;
use super::split::{Rules, Splitter};
use super::vocabulary::Vocabulary;
use crate::gguf::Strings;
use std::collections::HashMap;

/// The character that stands for `byte`.
fn byte_to_char(byte: u8) -> char {
    let hidden = |byte: u8| !matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if !hidden(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| hidden(*b)).count();
    char::from_u32(256 + before as u32).expect("68 bytes are hidden, and U+0100..U+0144 are characters")
}

/// The byte that `c` stands for.
fn char_to_byte(c: char) -> Option<u8> {
    Some(match c as u32 {
        c @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => c as u8,
        c @ 0x100..=0x120 => (c - 0x100) as u8,
        c @ 0x121..=0x142 => (c - 0x121 + 0x7f) as u8,
        0x143 => 0xad,
        _ => return None,
    })
}

/// Appends the bytes that a token's text stands for. A character that stands for no byte is taken as itself.
pub(super) fn decode(text: &str, out: &mut Vec<u8>) {
    for c in text.chars() {
        match char_to_byte(c) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// Symbols are token ids, or above them for texts that only occur in merges.
pub(super) struct ByteLevelBpe {
    splitter: Splitter,
    whole_words: bool,
    merges: MergeIndex,
    /// The symbol of each byte.
    bytes: [u32; 256],
    chars: [char; 256],
}

impl ByteLevelBpe {
    pub(super) fn new(rules: Rules, merges: &Strings, vocabulary: &Vocabulary) -> Result<Self, TextError> {
        let mut symbols = Symbols { vocabulary, others: HashMap::new() };
        let chars: [char; 256] = std::array::from_fn(|byte| byte_to_char(byte as u8));
        let bytes = chars.map(|c| symbols.of(c.encode_utf8(&mut [0; 4])));
        let mut index = MergeIndex::with_capacity(merges.len());
        let mut joined = String::new();
        for (rank, text) in merges.iter().enumerate() {
            // the left part has at least one character, which may be a space
            let first = text.chars().next().map_or(0, char::len_utf8);
            let Some((left, right)) = text[first..].find(' ').map(|at| text.split_at(first + at)) else {
                continue;
            };
            let right = &right[1..];
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let merge = Merge { rank: rank as u32, into: symbols.of(&joined) };
            index.insert(symbols.of(left), symbols.of(right), merge);
        }
        if vocabulary.len() + symbols.others.len() >= (u32::MAX - 2) as usize {
            return Err(TextError::BadVocabulary("more symbols than 32 bits can count".into()));
        }
        Ok(ByteLevelBpe {
            splitter: rules.splitter,
            whole_words: rules.whole_words,
            merges: index,
            bytes,
            chars,
        })
    }

    /// Appends the tokens of `text`, in which no added token is.
    pub(super) fn encode(
        &self,
        vocabulary: &Vocabulary,
        merger: &mut Merger,
        text: &str,
        out: &mut Vec<u32>,
    ) {
        let mut spelled = String::new();
        self.splitter.split(text, &mut |word| {
            if self.whole_words && word.len() <= vocabulary.longest() {
                spelled.clear();
                spelled.extend(word.bytes().map(|byte| self.chars[usize::from(byte)]));
                if let Some(id) = vocabulary.id(&spelled) {
                    out.push(id);
                    return;
                }
            }
            merger.clear();
            word.bytes().zip(1..).for_each(|(byte, end)| merger.push(end, self.bytes[usize::from(byte)]));
            merger
                .run(|left, right| self.merges.get(left.id, right.id).map(|merge| (merge.rank, merge.into)));
            for symbol in merger.symbols() {
                if (symbol.id as usize) < vocabulary.len() {
                    out.push(symbol.id);
                } else {
                    out.extend(
                        word.as_bytes()[symbol.range()]
                            .iter()
                            .filter_map(|byte| self.alone(vocabulary, *byte)),
                    );
                }
            }
        });
    }

    /// The token of a byte in a symbol that isn't a token. As in llama.cpp, bytes that the file writes as characters
    /// beyond ASCII are lost: such vocabularies aren't made in earnest.
    fn alone(&self, vocabulary: &Vocabulary, byte: u8) -> Option<u32> {
        let symbol = self.bytes[usize::from(byte)];
        (self.chars[usize::from(byte)].is_ascii() && (symbol as usize) < vocabulary.len()).then_some(symbol)
    }
}

/// Numbers the texts of merges.
struct Symbols<'a> {
    vocabulary: &'a Vocabulary,
    others: HashMap<Box<str>, u32>,
}

impl Symbols<'_> {
    fn of(&mut self, text: &str) -> u32 {
        if let Some(id) = self.vocabulary.id(text).or_else(|| self.others.get(text).copied()) {
            return id;
        }
        let id = (self.vocabulary.len() + self.others.len()) as u32;
        self.others.insert(text.into(), id);
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_their_characters() {
        assert_eq!(byte_to_char(b' '), 'Ġ');
        assert_eq!(byte_to_char(b'\n'), 'Ċ');
        assert_eq!(byte_to_char(0xad), '\u{143}');
        for byte in 0..=255 {
            assert_eq!(char_to_byte(byte_to_char(byte)), Some(byte));
        }
        let mut bytes = Vec::new();
        decode("Ġhé\u{200b}", &mut bytes);
        assert_eq!(bytes, b" h\xe9\xe2\x80\x8b");
    }
}
