//! Who computes next: admission to slots, the rows of a step, and preemption.
use super::draft::{ROWS_MAX, STEP_ROWS_MAX};
use super::sequence::{Rank, Sequence};
use super::{Engine, Flight, Speculation};
use crate::program::{Batch, Want};
use std::cmp::Reverse;
use std::time::Duration;
use weir_scheduler::{BLOCK_TOKENS, Priority, Time};

/// A sequence whose reader has been behind for this long gives up its slot if another one wants it.
pub(super) const STALL_MAX: Duration = Duration::from_millis(250);

impl Engine {
    /// Gives slots and cached blocks to the most urgent of the queue, as long as there are both.
    pub(super) fn admit(&mut self, now: Time) {
        while let Some(at) = self.waiting.iter().position(|s| s.stalled.is_none()) {
            let Some(mut sequence) = self.waiting.remove(at) else { break };
            let Some((slot, hits)) = self.room_for(&mut sequence, now) else {
                self.enqueue(sequence);
                break;
            };
            hits.iter().for_each(|&id| self.pool.adopt(id));
            self.runs += 1;
            sequence.begin(self.runs, hits, &self.pool);
            self.running[slot] = Some(sequence);
        }
    }

    /// A slot, and the blocks that hold the sequence's beginning already. Those that have to yield to it are preempted
    /// until there is room.
    fn room_for(&mut self, sequence: &mut Sequence, now: Time) -> Option<(usize, Vec<u32>)> {
        loop {
            if let Some(slot) = self.running.iter().position(Option::is_none) {
                let (hits, in_use) = self.hits(sequence);
                // Room for all that is known and a token more, and a block for each of the others.
                let others = self.running().filter(|s| s.stalled.is_none()).count();
                let needed = (sequence.tokens.len() + 1).div_ceil(BLOCK_TOKENS) - in_use;
                if self.pool.available() >= needed + others {
                    return Some((slot, hits));
                }
            }
            let yields = |s: &Sequence| {
                s.rank.0 > sequence.rank.0 || s.stalled.is_some_and(|since| now.since(since) >= STALL_MAX)
            };
            let victim = self.least_urgent(yields)?;
            self.preempt(victim);
        }
    }

    /// Named blocks that hold the beginning of a sequence, and how many of them somebody uses. The last token is never
    /// among them: its row gives the next one.
    fn hits(&self, sequence: &mut Sequence) -> (Vec<u32>, usize) {
        let most = (sequence.tokens.len() - 1).min(sequence.sharable()) / BLOCK_TOKENS;
        let keys = sequence.keys(self.config.model, self.config.layout.kv);
        let mut in_use = 0;
        let found = keys.iter().take(most).map_while(|&key| self.pool.find(key));
        let hits = found.inspect(|&(_, used)| in_use += usize::from(used)).map(|(id, _)| id).collect();
        (hits, in_use)
    }

    /// The running sequence that goes first where one has to: a stalled one, else the least important youngest.
    fn least_urgent(&self, which: impl Fn(&Sequence) -> bool) -> Option<usize> {
        let running = self.running.iter().enumerate();
        let candidates = running.filter_map(|(slot, s)| s.as_ref().filter(|s| which(s)).map(|s| (slot, s)));
        candidates.max_by_key(|(_, s)| (s.stalled.is_some(), s.rank)).map(|(slot, _)| slot)
    }

    /// Back to the queue, without blocks.
    fn preempt(&mut self, slot: usize) {
        if let Some(mut sequence) = self.running[slot].take() {
            sequence.release(&mut self.pool, self.config.model, self.config.layout.kv);
            self.enqueue(sequence);
        }
    }

    /// Slots whose sequences can be in the next step, the most urgent first.
    pub(super) fn ready(&mut self) -> Vec<(Rank, usize)> {
        let mut ranked = std::mem::take(&mut self.ranked);
        ranked.clear();
        let running = self.running.iter().enumerate();
        let ready = running.filter_map(|(slot, s)| s.as_ref().map(|s| (slot, s)));
        ranked.extend(
            ready.filter(|(_, s)| s.stalled.is_none() && s.rows() > 0).map(|(slot, s)| (s.rank, slot)),
        );
        ranked.sort_unstable();
        if ranked.first().is_some_and(|(rank, _)| rank.0 != Reverse(Priority::Background)) {
            ranked.retain(|(rank, _)| rank.0 != Reverse(Priority::Background));
        }
        ranked
    }

    /// The rows of the next step, and how many, where all of them decode; none if nobody has any.
    pub(super) fn schedule(&mut self) -> Option<(Batch, Vec<Flight>, Option<usize>)> {
        let ranked = self.ready();
        let decoding =
            ranked.iter().filter(|(_, slot)| self.running[*slot].as_ref().is_some_and(|s| s.rows() == 1));
        let decoding = decoding.count();
        let mut prefill =
            (self.config.prefill_chunk as usize).min(self.config.layout.rows as usize - decoding);
        let all_decode = decoding == ranked.len();
        let mut expected = decoding;
        let mut batch = Batch { segments: Vec::with_capacity(ranked.len()) };
        let mut flights = Vec::with_capacity(ranked.len());
        for &(rank, slot) in &ranked {
            let Some(rows) = self.running[slot].as_ref().filter(|s| s.rank == rank).map(|s| s.rows()) else {
                continue;
            };
            let (rows, of_prefill) = if rows == 1 { (1, 0) } else { (rows.min(prefill), rows.min(prefill)) };
            if rows == 0 || !self.extend(slot, rows) {
                continue;
            }
            let in_prompt = self.running[slot].as_ref().is_some_and(|s| s.in_prompt());
            let guesses =
                if all_decode && !in_prompt { self.guess(slot, expected) } else { Some(Vec::new()) };
            let (Some(sequence), Some(guesses)) = (&mut self.running[slot], guesses) else { continue };
            let of_prompt = sequence.prompt.saturating_sub(sequence.computed).min(rows) as u64;
            let segment = match sequence.segment(slot, rows, guesses) {
                Ok(segment) => segment,
                Err(error) => {
                    self.end_slot(slot, Err(error.into()));
                    continue;
                }
            };
            expected += sequence.guessed.len();
            prefill -= of_prefill;
            self.prompt_tokens += of_prompt;
            flights.push(Flight { slot, run: sequence.run, sampled: segment.want != Want::Nothing });
            batch.segments.push(segment);
        }
        self.ranked = ranked;
        let rows = batch.segments.iter().map(|s| s.want.rows()).sum();
        (!flights.is_empty()).then_some((batch, flights, all_decode.then_some(rows)))
    }

    /// What is guessed to come after a sequence's last token, as far as it pays in a step that has so many rows without; none
    /// where that token is still on its way, and worth waiting for.
    fn guess(&mut self, slot: usize, rows: usize) -> Option<Vec<u32>> {
        let others = self.running().count() - 1;
        let sequence = self.running[slot].as_mut()?;
        let room = STEP_ROWS_MAX.min(self.config.layout.rows as usize).saturating_sub(rows).min(ROWS_MAX - 1);
        let pace = &self.pace;
        let mut guesses = sequence.draft.take(sequence.tokens.len());
        guesses.truncate(room);
        sequence.draft.checked = !guesses.is_empty();
        if guesses.is_empty() {
            guesses = match self.config.speculation {
                Speculation::Off => Vec::new(),
                Speculation::Always(most) => {
                    sequence.guess(room.min(most.into()), |expected, _| expected * 1e3)
                }
                Speculation::Auto => {
                    sequence.guess(room, |expected, guesses| pace.gain(rows, expected, guesses))
                }
            };
        }
        if sequence.pending > 0 && !guesses.is_empty() {
            return None;
        }
        let free = sequence.blocks.len() * BLOCK_TOKENS - sequence.computed - 1;
        if guesses.len() > free {
            // Nobody gives up a block for a guess.
            match (self.pool.available() > others).then(|| self.pool.allocate()).flatten() {
                Some(id) => sequence.blocks.push(id),
                None => guesses.truncate(free),
            }
        }
        Some(guesses)
    }

    /// Sees to blocks for `rows` more positions. Where there are none, the least urgent sequence is preempted; false if
    /// that is this one. Sequences that are in the step already are more urgent than this one.
    fn extend(&mut self, slot: usize, rows: usize) -> bool {
        loop {
            let Some(sequence) = &mut self.running[slot] else { return false };
            if sequence.blocks.len() * BLOCK_TOKENS >= sequence.computed + rows {
                return true;
            }
            if let Some(id) = self.pool.allocate() {
                sequence.blocks.push(id);
            } else if let Some(victim) = self.least_urgent(|_| true) {
                self.preempt(victim);
            }
        }
    }
}
