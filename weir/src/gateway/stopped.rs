//! At which stop string an answer ended. Nodes don't say: the text that they send ends before it.
use std::collections::VecDeque;
use std::sync::Arc;
use weir_backends::text::Tokenizer;
use weir_scheduler::{Token, Usage};

/// Looks at the last tokens of one answer.
pub(super) struct StopWatch {
    tokenizer: Arc<Tokenizer>,
    stops: Vec<String>,
    /// The last ids; a token of a stop string has at least a byte of it.
    ids: VecDeque<u32>,
    ids_max: usize,
    /// Tokens that came, those that were taken over from another node included.
    tokens: u32,
}

impl StopWatch {
    /// None of the strings is empty.
    pub(super) fn new(tokenizer: Arc<Tokenizer>, stops: Vec<String>) -> StopWatch {
        let ids_max = stops.iter().map(String::len).max().unwrap_or(0) + 1;
        StopWatch { tokenizer, stops, ids: VecDeque::new(), ids_max, tokens: 0 }
    }

    /// The next token.
    pub(super) fn take(&mut self, token: &Token) {
        self.tokens = token.position.saturating_add(1);
        // Upstreams' have no number.
        if (token.id as usize) < self.tokenizer.len() {
            if self.ids.len() == self.ids_max {
                self.ids.pop_front();
            }
            self.ids.push_back(token.id);
        }
    }

    /// The stop string at which an answer has ended that ended by itself; none if the model ended it, whose last token
    /// isn't sent but counts.
    pub(super) fn found(&self, usage: &Usage) -> Option<String> {
        if usage.output_tokens != self.tokens {
            return None;
        }
        let ids: Vec<u32> = self.ids.iter().copied().collect();
        let tail = self.tokenizer.decode(&ids);
        // The one that is complete first, of several the longest: as nodes look for them.
        let places = self.stops.iter().filter_map(|stop| Some((tail.find(stop)?, stop)));
        let first = places.min_by_key(|(at, stop)| (at + stop.len(), *at))?;
        Some(first.1.clone())
    }
}
