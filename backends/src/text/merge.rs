//! Merging adjacent symbols, best pair first: what both kinds of BPE do.
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// A part of the text that is one symbol.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol {
    /// Where it starts, in bytes.
    pub(super) start: u32,
    /// Where it ends, in bytes.
    pub(super) end: u32,
    /// What it is; the caller's meaning.
    pub(super) id: u32,
    next: u32,
    previous: u32,
}

impl Symbol {
    pub(super) fn range(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

const NONE: u32 = u32::MAX;
/// In `next`: this symbol is part of another one now.
const MERGED: u32 = u32::MAX - 1;

/// A pair that can be merged. Ordered by priority, then from left to right.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    priority: u32,
    left: u32,
    right: u32,
    end: u32,
    into: u32,
}

/// Merges the symbols of one word after another, with its buffers kept between words. Time is `n log n` in a word's
/// symbols, whatever they are.
#[derive(Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Candidate>>,
}

impl Merger {
    /// Starts a new word.
    pub(super) fn clear(&mut self) {
        self.symbols.clear();
        self.queue.clear();
    }

    /// Adds a symbol that starts where the last one ended.
    pub(super) fn push(&mut self, end: u32, id: u32) {
        let at = self.symbols.len() as u32;
        let mut symbol = Symbol { start: 0, end, id, next: NONE, previous: NONE };
        if let Some(last) = self.symbols.last_mut() {
            last.next = at;
            symbol.start = last.end;
            symbol.previous = at - 1;
        }
        self.symbols.push(symbol);
    }

    /// Merges until no pair can be. `merge` says what two neighbours become and with which priority: the lowest goes
    /// first, of equal ones the leftmost.
    pub(super) fn run(&mut self, merge: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>) {
        for left in 1..self.symbols.len() as u32 {
            self.consider(left - 1, left, &merge);
        }
        while let Some(Reverse(Candidate { left, right, end, into, .. })) = self.queue.pop() {
            let after = self.symbols[right as usize].next;
            if self.symbols[left as usize].next != right || self.symbols[right as usize].end != end {
                continue; // one of the two has been merged with another neighbour since
            }
            self.symbols[right as usize].next = MERGED;
            let symbol = &mut self.symbols[left as usize];
            (symbol.end, symbol.id, symbol.next) = (end, into, after);
            let before = symbol.previous;
            if after != NONE {
                self.symbols[after as usize].previous = left;
                self.consider(left, after, &merge);
            }
            if before != NONE {
                self.consider(before, left, &merge);
            }
        }
    }

    fn consider(&mut self, left: u32, right: u32, merge: &impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>) {
        let (l, r) = (&self.symbols[left as usize], &self.symbols[right as usize]);
        if let Some((priority, into)) = merge(l, r) {
            self.queue.push(Reverse(Candidate { priority, left, right, end: r.end, into }));
        }
    }

    /// The symbols that are left, in order.
    pub(super) fn symbols(&self) -> impl Iterator<Item = &Symbol> {
        self.symbols.iter().filter(|symbol| symbol.next != MERGED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the queue must find: the best pair, again and again.
    fn naive(text: &str, merge: impl Fn(&str) -> Option<u32>) -> Vec<String> {
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        while let Some((_, at)) =
            (1..parts.len()).filter_map(|i| merge(&parts[i - 1..=i].concat()).map(|p| (p, i))).min()
        {
            let right = parts.remove(at);
            parts[at - 1].push_str(&right);
        }
        parts
    }

    fn check(text: &str, merge: impl Fn(&str) -> Option<u32>) {
        let mut merger = Merger::default();
        merger.clear();
        text.char_indices().for_each(|(at, c)| merger.push((at + c.len_utf8()) as u32, 0));
        merger.run(|l, r| merge(&text[l.start as usize..r.end as usize]).map(|priority| (priority, 0)));
        let found: Vec<&str> = merger.symbols().map(|symbol| &text[symbol.range()]).collect();
        assert_eq!(found, naive(text, merge), "{text:?}");
    }

    #[test]
    fn the_best_pair_goes_first() {
        check("", |_| None);
        check("aaaaaaa", |pair| (pair.len() <= 4).then_some(0));
        check("aaaaaaa", |pair| Some(100 - pair.len() as u32));
        let mut seed = 7u64;
        for _ in 0..300 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let text: String =
                (0..seed >> 59).map(|i| ['a', 'b', 'c', 'é'][(seed >> (2 * i) & 3) as usize]).collect();
            check(&text, |pair| {
                let hash = pair.bytes().fold(seed as u32, |h, b| (h ^ u32::from(b)).wrapping_mul(16777619));
                (hash >> 8 & 3 != 0).then_some(hash >> 28)
            });
        }
    }
}
