//! Finding added tokens (control and user-defined ones) in text before it is tokenized.
//!
//! Longer tokens go first: every place of the longest one is taken, from left to right, then those of the next in what
//! is left, as llama.cpp does it token by token. Here all are looked for in one pass, and time doesn't depend on how
//! many there are: Gemma has 6,414.
use super::vocabulary::Vocabulary;
use std::ops::Range;

/// A set of added tokens.
pub(super) struct SpecialSet {
    /// Sorted by text.
    entries: Vec<Entry>,
    /// The entries whose text starts with each byte.
    first: Vec<Range<u32>>,
    /// Lengths that occur, descending.
    lengths: Vec<u32>,
}

struct Entry {
    id: u32,
    length: u32,
    /// The longest entry that is a proper prefix of this one.
    shorter: Option<u32>,
}

/// A part of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Ordinary text.
    Text(Range<usize>),
    /// An added token.
    Token(u32),
}

/// A place where the token `entry` may be.
#[derive(Clone, Copy)]
struct Candidate {
    at: u32,
    entry: u32,
}

/// A place that is a token.
#[derive(Clone, Copy)]
struct Taken {
    start: u32,
    end: u32,
    id: u32,
}

impl SpecialSet {
    /// `ids` are of tokens with different texts, none empty.
    pub(super) fn new(vocabulary: &Vocabulary, ids: impl Iterator<Item = u32>) -> SpecialSet {
        let mut ids: Vec<u32> = ids.collect();
        ids.sort_unstable_by_key(|id| vocabulary.text(*id));
        let mut entries: Vec<Entry> = Vec::with_capacity(ids.len());
        for id in ids {
            let text = vocabulary.text(id);
            let mut shorter = entries.len().checked_sub(1).map(|last| last as u32);
            while let Some(entry) = shorter.map(|at| &entries[at as usize]) {
                if text.starts_with(vocabulary.text(entry.id)) {
                    break;
                }
                shorter = entry.shorter;
            }
            entries.push(Entry { id, length: text.len() as u32, shorter });
        }
        let starts = |byte: usize| {
            entries.partition_point(|e| usize::from(vocabulary.text(e.id).as_bytes()[0]) < byte)
        };
        let first = (0..256).map(|byte| starts(byte) as u32..starts(byte + 1) as u32).collect();
        let mut lengths: Vec<u32> = entries.iter().map(|entry| entry.length).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.dedup();
        SpecialSet { entries, first, lengths }
    }

    /// Cuts `text` at its added tokens.
    pub(super) fn partition(&self, vocabulary: &Vocabulary, text: &str) -> Vec<Part> {
        let candidates = self.candidates(vocabulary, text.as_bytes());
        let mut parts = Vec::new();
        let mut at = 0;
        for Taken { start, end, id } in self.choose(candidates) {
            if at < start as usize {
                parts.push(Part::Text(at..start as usize));
            }
            parts.push(Part::Token(id));
            at = end as usize;
        }
        if at < text.len() {
            parts.push(Part::Text(at..text.len()));
        }
        parts
    }

    /// Bytes of the longest token with which `text` starts.
    pub(super) fn length_at(&self, vocabulary: &Vocabulary, text: &str) -> Option<usize> {
        self.longest(vocabulary, text.as_bytes()).map(|entry| self.entries[entry as usize].length as usize)
    }

    /// The longest token at each place that has one.
    fn candidates(&self, vocabulary: &Vocabulary, text: &[u8]) -> Vec<Candidate> {
        let places = text.iter().enumerate().filter(|(_, byte)| !self.first[usize::from(**byte)].is_empty());
        let found = places.filter_map(|(at, _)| {
            let entry = self.longest(vocabulary, &text[at..])?;
            Some(Candidate { at: at as u32, entry })
        });
        found.collect()
    }

    /// The longest token with which `text` starts, by narrowing down the sorted entries byte by byte.
    fn longest(&self, vocabulary: &Vocabulary, text: &[u8]) -> Option<u32> {
        let Range { start, end } = self.first[usize::from(*text.first()?)].clone();
        let (mut start, mut end) = (start as usize, end as usize);
        let mut found = None;
        let mut depth = 1;
        while start < end {
            if self.entries[start].length as usize == depth {
                found = Some(start as u32);
                start += 1;
            }
            let Some(next) = text.get(depth) else { break };
            let byte = |entry: &Entry| vocabulary.text(entry.id).as_bytes()[depth];
            let left = &self.entries[start..end];
            let (from, to) =
                (left.partition_point(|e| byte(e) < *next), left.partition_point(|e| byte(e) <= *next));
            (start, end) = (start + from, start + to);
            depth += 1;
        }
        found
    }

    /// Takes places, longest tokens first, then from left to right. In ascending order.
    fn choose(&self, mut candidates: Vec<Candidate>) -> Vec<Taken> {
        let mut taken: Vec<Taken> = Vec::new();
        let longest = candidates.iter().map(|c| self.entries[c.entry as usize].length).max().unwrap_or(0);
        for length in self.lengths.iter().copied().skip_while(|length| *length > longest) {
            if candidates.is_empty() {
                break;
            }
            let mut fresh: Vec<Taken> = Vec::new();
            let mut older = taken.iter().peekable();
            candidates.retain_mut(|Candidate { at, entry }| {
                while older.next_if(|t| t.end <= *at).is_some() {}
                let limit = older.peek().map_or(u32::MAX, |t| t.start);
                if limit <= *at || fresh.last().is_some_and(|t| *at < t.end) {
                    return false; // within a token
                }
                while self.entries[*entry as usize].length > length {
                    match self.entries[*entry as usize].shorter {
                        Some(shorter) => *entry = shorter,
                        None => return false,
                    }
                }
                let Entry { id, length: found, .. } = self.entries[*entry as usize];
                let fits = found == length && *at + length <= limit;
                if fits {
                    fresh.push(Taken { start: *at, end: *at + length, id });
                }
                !fits
            });
            if !fresh.is_empty() {
                taken.append(&mut fresh);
                taken.sort_by_key(|t| t.start); // two ascending runs: linear
            }
        }
        taken
    }
}
