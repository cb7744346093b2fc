//! From token ids to text, for a real tokenizer and for the made-up one of the null device.
use crate::text::{Pushed, TextStream, Tokenizer};
use std::sync::Arc;

/// What the engine knows of a model's tokens.
#[derive(Clone, Debug)]
pub enum Vocabulary {
    /// A model's.
    Text(Arc<Tokenizer>),
    /// Made up: the text of id 7 is `" t7"`.
    Numbers {
        /// Ids are below it.
        size: u32,
        /// Ends the generation.
        end: u32,
    },
}

impl From<Arc<Tokenizer>> for Vocabulary {
    fn from(tokenizer: Arc<Tokenizer>) -> Self {
        Vocabulary::Text(tokenizer)
    }
}

impl Vocabulary {
    /// Ids are below it.
    pub fn size(&self) -> u32 {
        match self {
            Vocabulary::Text(tokenizer) => u32::try_from(tokenizer.len()).unwrap_or(u32::MAX),
            Vocabulary::Numbers { size, .. } => *size,
        }
    }

    /// Whether a generation ends with this token.
    pub fn is_end(&self, id: u32) -> bool {
        match self {
            Vocabulary::Text(tokenizer) => tokenizer.is_end(id),
            Vocabulary::Numbers { end, .. } => id == *end,
        }
    }

    /// A token's bytes.
    pub fn bytes(&self, id: u32) -> Vec<u8> {
        match self {
            Vocabulary::Text(tokenizer) => tokenizer.bytes(id).into_owned(),
            Vocabulary::Numbers { .. } => format!(" t{id}").into_bytes(),
        }
    }

    /// The text of one generation.
    pub(crate) fn stream(&self, stop: &[String]) -> Text {
        match self {
            Vocabulary::Text(tokenizer) => Text::Real(Box::new(TextStream::new(tokenizer.clone(), stop))),
            Vocabulary::Numbers { .. } => {
                Text::Numbers { stop: stop.into(), held: String::new(), stopped: false }
            }
        }
    }
}

/// Text of one generation, up to a stop string.
#[derive(Debug)]
pub(crate) enum Text {
    /// Of a tokenizer.
    Real(Box<TextStream>),
    /// Of [`Vocabulary::Numbers`].
    Numbers { stop: Box<[String]>, held: String, stopped: bool },
}

impl Text {
    /// Adds a token: gives text that became certain.
    pub(crate) fn push(&mut self, id: u32) -> Pushed {
        let (stop, held, stopped) = match self {
            Text::Real(stream) => return stream.push(id),
            Text::Numbers { stop, held, stopped } => (stop, held, stopped),
        };
        if *stopped {
            return Pushed { text: String::new(), stopped: true };
        }
        held.push_str(&format!(" t{id}"));
        // The one complete first; of several, the longest.
        let complete = stop.iter().filter_map(|s| held.find(s.as_str()).map(|at| (at + s.len(), at))).min();
        if let Some((_, at)) = complete {
            held.truncate(at);
            *stopped = true;
            return Pushed { text: std::mem::take(held), stopped: true };
        }
        let begins = |tail: &str| stop.iter().any(|s| s.starts_with(tail));
        let certain = (0..held.len()).find(|&at| begins(&held[at..])).unwrap_or(held.len());
        Pushed { text: held.drain(..certain).collect(), stopped: false }
    }

    /// Ends the text: what was held back.
    pub(crate) fn finish(&mut self) -> String {
        match self {
            Text::Real(stream) => stream.finish(),
            Text::Numbers { held, stopped, .. } => {
                *stopped = true;
                std::mem::take(held)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stop_at_a_stop_string() {
        let check = |ids: &[u32], stop: &[&str], pieces: &[&str], rest: &str| {
            let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
            let mut text = Vocabulary::Numbers { size: 100, end: 0 }.stream(&stop);
            let pushed: Vec<Pushed> = ids.iter().map(|&id| text.push(id)).collect();
            assert_eq!(pushed.iter().map(|p| p.text.as_str()).collect::<Vec<_>>(), pieces);
            assert_eq!(text.finish(), rest);
            pushed.iter().any(|p| p.stopped)
        };
        assert!(!check(&[1, 2], &[], &[" t1", " t2"], ""));
        assert!(!check(&[1, 2], &["t2 t3"], &[" t1", " "], "t2"));
        assert!(check(&[1, 2, 3], &["t2 t3"], &[" t1", " ", ""], ""));
        assert!(check(&[1, 2, 4, 3], &["t2 t3", "4"], &[" t1", " ", "t2 t", ""], ""));
    }
}
