//! SentencePiece-style BPE (`tokenizer.ggml.model = llama`): characters merge to the token with the highest score.
//!
//! No list of merges is needed: two neighbours may merge if their text together is a token.
use super::merge::Merger;
use super::vocabulary::{Kind, Vocabulary};

/// How such vocabularies write a space.
pub(super) const SPACE: &str = "\u{2581}";

pub(super) struct SentencePiece {
    /// Whether a text after the start or a special token begins with a space that isn't there.
    pub(super) space_prefix: bool,
    /// The token of each byte: for characters that have none.
    bytes: [Option<u32>; 256],
}

impl SentencePiece {
    pub(super) fn new(space_prefix: bool, vocabulary: &Vocabulary) -> SentencePiece {
        let bytes = std::array::from_fn(|byte| {
            let alone = char::from(byte as u8);
            let alone = || alone.is_ascii().then(|| vocabulary.id(alone.encode_utf8(&mut [0; 4]))).flatten();
            vocabulary.id(&format!("<0x{byte:02X}>")).or_else(alone).or(vocabulary.unknown())
        });
        SentencePiece { space_prefix, bytes }
    }

    /// Appends the tokens of `text`, in which no added token is.
    pub(super) fn encode(
        &self,
        vocabulary: &Vocabulary,
        merger: &mut Merger,
        text: &str,
        out: &mut Vec<u32>,
    ) {
        const UNKNOWN: u32 = u32::MAX;
        let token = |text: &str| vocabulary.id(text).unwrap_or(UNKNOWN);
        merger.clear();
        for (at, c) in text.char_indices() {
            let end = at + c.len_utf8();
            merger.push(end as u32, token(&text[at..end]));
        }
        merger.run(|left, right| {
            let together = &text[left.start as usize..right.end as usize];
            let id =
                if together.len() <= vocabulary.longest() { vocabulary.id(together)? } else { return None };
            Some((highest_first(vocabulary.score(id)), id))
        });
        for symbol in merger.symbols() {
            match symbol.id {
                UNKNOWN => {
                    let bytes = text.as_bytes()[symbol.range()].iter();
                    out.extend(bytes.filter_map(|byte| self.bytes[usize::from(*byte)]));
                }
                id => out.push(id),
            }
        }
    }
}

/// Maps scores to numbers that ascend as scores descend. -0 counts as 0.
fn highest_first(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { !(bits | 1 << 31) } else { bits }
}

/// Appends the bytes of a token.
pub(super) fn decode(text: &str, kind: Kind, out: &mut Vec<u8>) {
    if kind == Kind::Byte {
        out.extend(text.get(3..5).and_then(|hex| u8::from_str_radix(hex, 16).ok()));
        return;
    }
    let mut parts = text.split(SPACE);
    out.extend_from_slice(parts.next().unwrap_or_default().as_bytes());
    for part in parts {
        out.push(b' ');
        out.extend_from_slice(part.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_descend() {
        let scores = [f32::INFINITY, 7.5, 1e-9, 0.0, -1e-9, -1.0, -1000.0, f32::NEG_INFINITY];
        assert!(scores.map(highest_first).windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(highest_first(-0.0), highest_first(0.0));
    }

    #[test]
    fn tokens_become_bytes() {
        let check = |text, kind, bytes: &[u8]| {
            let mut out = Vec::new();
            decode(text, kind, &mut out);
            assert_eq!(out, bytes, "{text}");
        };
        check("▁the▁", Kind::Normal, b" the ");
        check("<0xE2>", Kind::Byte, b"\xe2");
        check("<0x", Kind::Byte, b"");
        check("<0xé>", Kind::Byte, b"");
    }
}
