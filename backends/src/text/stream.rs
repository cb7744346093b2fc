//! A stream's text: from token ids to whole characters, up to a stop string.
use super::tokenizer::Tokenizer;
use std::sync::Arc;

/// Turns the tokens of one generation into text, piece by piece.
///
/// [`TextStream::push`] each token, append what it gives, stop when it says so; else, at the end, append what
/// [`TextStream::finish`] gives. Together that is the text of all tokens, with invalid UTF-8 replaced as
/// [`String::from_utf8_lossy`] does, cut before the first stop string: the one that is complete first, of several the
/// longest. Pieces are whole characters, and never contain what may turn out to be the beginning of a stop string.
/// Time is linear in the text, for each stop string.
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    stops: Vec<Stop>,
    /// The beginning of a character.
    partial: Vec<u8>,
    /// Text, of which the first `given` bytes have been given away. The rest may be the beginning of a stop string.
    held: String,
    given: usize,
    stopped: bool,
}

/// What a token added to the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// More text, often none.
    pub text: String,
    /// A stop string has been met: nothing follows.
    pub stopped: bool,
}

impl TextStream {
    /// A stream at its beginning. Empty stop strings stop nothing.
    pub fn new(tokenizer: Arc<Tokenizer>, stop: &[String]) -> TextStream {
        let stops = stop.iter().filter(|stop| !stop.is_empty()).map(|stop| Stop::new(stop)).collect();
        TextStream { tokenizer, stops, partial: Vec::new(), held: String::new(), given: 0, stopped: false }
    }

    /// Adds a token.
    pub fn push(&mut self, id: u32) -> Pushed {
        let mut bytes = std::mem::take(&mut self.partial);
        self.tokenizer.append_bytes(id, &mut bytes);
        self.partial = bytes;
        let text = self.whole_characters();
        self.advance(&text)
    }

    /// Ends the stream: what was held back. A character that stayed incomplete becomes U+FFFD. Calling it again gives
    /// nothing.
    pub fn finish(&mut self) -> String {
        let rest = if self.partial.is_empty() { "" } else { "\u{fffd}" };
        self.partial.clear();
        let mut text = self.advance(rest).text;
        text.push_str(&self.held[self.given..]);
        self.held = String::new();
        self.given = 0;
        self.stopped = true;
        text
    }

    /// Takes the whole characters out of `partial`.
    fn whole_characters(&mut self) -> String {
        let mut text = String::new();
        let mut rest: &[u8] = &self.partial;
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, invalid) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    rest = invalid;
                    let Some(length) = error.error_len() else { break };
                    text.push('\u{fffd}');
                    rest = &invalid[length..];
                }
            }
        }
        self.partial = rest.to_vec();
        text
    }

    /// Adds text: gives what can't be part of a stop string any more.
    fn advance(&mut self, text: &str) -> Pushed {
        if self.stopped {
            return Pushed { text: String::new(), stopped: true };
        }
        for (at, byte) in text.bytes().enumerate() {
            let complete = self.stops.iter_mut().filter_map(|stop| stop.advance(byte)).max();
            if let Some(length) = complete {
                self.stopped = true;
                let whole = std::mem::take(&mut self.held) + &text[..=at];
                let given = std::mem::take(&mut self.given);
                return Pushed { text: whole[given..whole.len() - length].to_owned(), stopped: true };
            }
        }
        self.held.push_str(text);
        let hold = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let end = self.held.len() - hold;
        let text = self.held[self.given..end].to_owned();
        self.given = end;
        if self.given > self.held.len() / 2 {
            self.held.drain(..self.given); // moves less than was given since the last time
            self.given = 0;
        }
        Pushed { text, stopped: false }
    }
}

/// Looks for one stop string, byte by byte (Knuth, Morris and Pratt).
#[derive(Debug)]
struct Stop {
    bytes: Box<[u8]>,
    /// For each prefix: the length of its longest proper prefix that is also its suffix.
    borders: Box<[u32]>,
    /// The text so far ends with this many bytes of the stop string.
    matched: usize,
}

impl Stop {
    fn new(text: &str) -> Stop {
        let bytes: Box<[u8]> = text.as_bytes().into();
        let mut borders = vec![0; bytes.len()];
        let mut border = 0;
        for at in 1..bytes.len() {
            while border > 0 && bytes[border] != bytes[at] {
                border = borders[border - 1] as usize;
            }
            border += usize::from(bytes[border] == bytes[at]);
            borders[at] = border as u32;
        }
        Stop { bytes, borders: borders.into(), matched: 0 }
    }

    /// The stop string's length, if it ends with `byte`.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.borders[self.matched - 1] as usize;
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        (self.matched == self.bytes.len()).then_some(self.matched)
    }
}
