//! Rounds of the draft model: who is in one, what it is given, and what becomes of its guesses.
use super::{
    BEHIND, Candidate, Draft, Drafted, Drafter, FORGET, Member, Round, TRY_GUESSES, TRY_SHARE, Took, Turn,
};
use crate::engine::blocks::BlockPool;
use crate::engine::draft::{GAIN_MIN, ROWS_MAX, STEP_ROWS_MAX};
use crate::engine::sequence::Sequence;
use crate::engine::{Engine, Progress, Speculation};
use crate::program::DeviceError;
use std::sync::Arc;
use std::time::Duration;
use weir_scheduler::{BLOCK_TOKENS, Sampling, Time};

/// How often a device that computes on its own is asked before others have their turn.
const SPINS: usize = 2000;
/// A round that takes longer won't end.
pub(in crate::engine) const PATIENCE: Duration = Duration::from_secs(20);

impl Engine {
    /// Gives it a draft model, whose tokenizer must be its own; see [`Draft`]. Used as [`Speculation`] says.
    ///
    /// # Panics
    /// If the draft model was compiled for fewer blocks, slots or rows.
    pub fn with_draft(mut self, draft: Draft) -> Engine {
        let (own, its) = (self.config.layout, draft.layout);
        assert!(
            its.blocks >= own.blocks && its.slots >= own.slots && its.rows >= own.slots,
            "a draft model's layout {its:?} beside {own:?}"
        );
        self.drafter = Some(Box::new(Drafter::new(draft)));
        self
    }

    /// Notes what the round took that was done in the call before.
    pub(in crate::engine) fn time_draft(&mut self, now: Time) {
        let Some(drafter) = &mut self.drafter else { return };
        let Some(Took { since, members, rows, guesses }) = drafter.took.take() else { return };
        let time = now.since(since);
        if rows <= 2 * members && guesses > 0 {
            drafter.pace.took(members, time / guesses as u32);
        } else if rows > 2 * BEHIND {
            let known = if drafter.pace.is_known() { drafter.pace.time(members) } else { 0.0 };
            let steps = guesses.saturating_sub(1) as f32 * known;
            let row = (time.as_secs_f32() - steps).max(0.0) / rows as f32;
            drafter.row = if drafter.row == 0.0 { row } else { drafter.row + 0.25 * (row - drafter.row) };
        }
    }

    /// Goes on with the round under way, if there is one: what the engine did then.
    pub(in crate::engine) fn follow_draft(&mut self, now: Time) -> Option<Progress> {
        let mut drafter = self.drafter.take_if(|d| d.round.is_some())?;
        let late = drafter.round.as_ref().is_some_and(|round| now.since(round.since) > PATIENCE);
        let asked = if late {
            Err(DeviceError::Lost(format!("a round took longer than {} s", PATIENCE.as_secs())))
        } else {
            self.ask_draft(&mut drafter)
        };
        match asked {
            Ok(progress) => {
                self.drafter = Some(drafter);
                if progress == Progress::Worked {
                    self.last_progress = now;
                }
                Some(progress)
            }
            Err(error) => {
                drop_draft(drafter, &error);
                None
            }
        }
    }

    fn ask_draft(&mut self, drafter: &mut Drafter) -> Result<Progress, DeviceError> {
        let polled = (0..SPINS).find_map(|_| {
            let polled = drafter.draft.program.poll();
            if polled.is_none() {
                std::hint::spin_loop();
            }
            polled
        });
        let Some(output) = polled else { return Ok(Progress::Computing) };
        if drafter.take(output?)? {
            self.end_round(drafter);
        } else {
            drafter.submit()?;
        }
        Ok(Progress::Worked)
    }

    /// Hands the guesses to their sequences.
    fn end_round(&mut self, drafter: &mut Drafter) {
        let Some(round) = drafter.round.take() else { return };
        let known = drafter.draft.vocab.min(self.vocabulary.size());
        drafter.took = Some(Took {
            since: round.since,
            members: round.members.len(),
            rows: round.members.iter().map(|m| m.ids.len()).sum(),
            guesses: round.members.iter().map(|m| m.most).max().unwrap_or(0),
        });
        drafter.ready = true;
        for Member { slot, run, start, ids, most, mut guesses, .. } in round.members {
            let Some(s) = self.running[slot].as_mut().filter(|s| s.run == run) else { continue };
            let fed = start + ids.len();
            s.draft.computed = fed;
            s.draft.ahead = guesses[..most.saturating_sub(1)].to_vec();
            // Nothing comes after what isn't a token, or ends the text.
            let end = guesses.iter().position(|id| *id >= known);
            guesses.truncate(end.unwrap_or(guesses.len()));
            if let Some(last) = guesses.iter().position(|id| self.vocabulary.is_end(*id)) {
                guesses.truncate(last + 1);
            }
            s.draft.proposed = (fed, guesses);
            s.note_drafted(&mut self.pool);
        }
    }

    /// Begins a round if one is expected to pay.
    pub(in crate::engine) fn begin_draft(&mut self, now: Time) -> Turn {
        if self.config.speculation == Speculation::Off {
            return Turn::No;
        }
        let Some(mut drafter) = self.drafter.take_if(|d| !d.ready) else { return Turn::No };
        let turn = match self.members(&mut drafter) {
            None => Turn::No,
            Some(chosen) if self.waits_for(&chosen) => Turn::Wait,
            Some(chosen) => {
                let members = self.prepare(&mut drafter, chosen);
                let steps = members.iter().map(|m| m.most.max(1)).max().unwrap_or(0);
                if steps == 0 {
                    Turn::No
                } else {
                    drafter.round = Some(Round { since: now, members, steps, submitted: 0, done: 0 });
                    if let Err(error) = drafter.submit() {
                        drop_draft(drafter, &error);
                        return Turn::No;
                    }
                    Turn::Begun
                }
            }
        };
        self.drafter = Some(drafter);
        turn
    }

    /// Whether their last tokens are still on their way.
    fn waits_for(&self, chosen: &[Candidate]) -> bool {
        let pending = |c: &Candidate| self.running[c.slot].as_ref().is_some_and(|s| s.pending > 0);
        !self.in_flight.is_empty() || chosen.iter().any(pending)
    }

    /// The sequences of the next round, if one is expected to pay or is to be tried.
    fn members(&mut self, drafter: &mut Drafter) -> Option<Vec<Candidate>> {
        let ready = self.ready();
        let all = ready.len();
        let decodes = |s: &Sequence| s.rows() == 1 && !s.in_prompt();
        let slots = ready.iter().map(|(_, slot)| *slot);
        let slots: Vec<usize> =
            slots.filter(|slot| self.running[*slot].as_ref().is_some_and(|s| decodes(s))).collect();
        self.ranked = ready;
        if all == 0 || slots.len() < all {
            return None;
        }
        let rows = STEP_ROWS_MAX.min(self.config.layout.rows as usize) / all;
        let most = rows.saturating_sub(1).min(ROWS_MAX - 1);
        let always = match self.config.speculation {
            Speculation::Always(most) => Some(usize::from(most)),
            _ => None,
        };
        let (mut chosen, mut tried) = (Vec::new(), Vec::new());
        let pace = &self.pace;
        for slot in slots {
            let Some(s) = &mut self.running[slot] else { continue };
            let most = most.min(always.unwrap_or(most)).min(s.room_for_guesses());
            let most = most.min((drafter.draft.context as usize).saturating_sub(s.tokens.len()));
            if most == 0 {
                continue;
            }
            s.follow_draft();
            let known = match always {
                Some(_) => s.lookup_always(most),
                None => s.lookup_gain(most, all, pace),
            };
            let odds = s.draft.odds.unwrap_or(drafter.odds);
            let (gain, _) = drafter.best(pace, all, &vec![odds; all], most);
            let (behind, tokens) = (s.tokens.len() - s.draft.computed, s.tokens.len() - s.prompt);
            let affords = |share| drafter.affords(pace, all, (behind, tokens), share);
            let candidate = Candidate { slot, odds, behind, most };
            if always.is_some() {
                if known <= 1.0 {
                    chosen.push(candidate);
                }
            } else if gain >= GAIN_MIN && gain >= known && affords(1.0 - 1.0 / gain) {
                chosen.push(candidate);
            } else if known <= 1.0 && affords(TRY_SHARE) {
                tried.push(Candidate { most: most.min(TRY_GUESSES), ..candidate });
            }
        }
        if always.is_some() {
            return (!chosen.is_empty()).then_some(chosen);
        }
        drafter.choose(pace, all, chosen, tried)
    }

    /// What the draft model is given of each: as many blocks as its guesses need, and the tokens that it hasn't seen.
    fn prepare(&mut self, drafter: &mut Drafter, chosen: Vec<Candidate>) -> Vec<Member> {
        let layout = drafter.draft.layout;
        let budget = (self.config.prefill_chunk + self.config.layout.slots).min(layout.rows) as usize;
        let mut left = budget.saturating_sub(chosen.len());
        let others = self.running().count() - 1;
        let mut written: Vec<u32> = Vec::new();
        let mut members = Vec::new();
        for Candidate { slot, behind, most, .. } in chosen {
            let Some(s) = &mut self.running[slot] else { continue };
            let held = s.blocks.len() * BLOCK_TOKENS;
            // Nobody gives up a block for a guess.
            if held < s.tokens.len() + most && self.pool.available() > others {
                s.blocks.extend(self.pool.allocate());
            }
            let held = s.blocks.len() * BLOCK_TOKENS;
            let (start, rows) = (s.draft.computed, behind.min(1 + left));
            let most = if rows < behind { 0 } else { most.min(held.saturating_sub(s.tokens.len())) };
            let ids = s.tokens[start..start + rows].to_vec();
            let touched = start / BLOCK_TOKENS..(start + rows).div_ceil(BLOCK_TOKENS).min(s.blocks.len());
            let touched = &s.blocks[touched];
            let strange = ids.iter().any(|id| *id >= drafter.draft.vocab);
            // Two may have adopted what the draft model hasn't seen: one fills it, and the other finds it filled.
            if strange || held < start + rows || touched.iter().any(|block| written.contains(block)) {
                continue;
            }
            written.extend(touched);
            left -= rows - 1;
            let (run, sampling, blocks) = (s.run, s.draft_sampling(), s.table());
            members.push(Member { slot, run, start, ids, most, guesses: Vec::new(), sampling, blocks });
        }
        members
    }

    /// What came of a step in which `taken` tokens of a sequence came, `guessed` having been guessed.
    pub(in crate::engine) fn learn(
        drafter: &mut Option<Box<Drafter>>,
        sequence: &mut Sequence,
        guessed: usize,
        taken: usize,
        ended: bool,
    ) {
        let Some(drafter) = drafter else { return };
        drafter.rest = drafter.rest.saturating_sub(taken);
        let drafted = &mut sequence.draft;
        if std::mem::take(&mut drafted.checked) {
            let right = taken.saturating_sub(1);
            // A guess that the grammar forbids is wrong unchecked.
            drafter.learn(drafted, right, (right < guessed || guessed == 0) && !ended);
            return;
        }
        drafted.without += taken;
        if drafted.without >= FORGET {
            (drafted.odds, drafted.without) = (None, 0);
        }
    }
}

fn drop_draft(drafter: Box<Drafter>, error: &DeviceError) {
    tracing::warn!(%error, "the draft model is dropped: guesses are made without it");
    drop(drafter);
}

impl Sequence {
    /// Tokens that may be guessed: none where the host has to see each first.
    fn room_for_guesses(&self) -> usize {
        if self.is_counted() { 0 } else { (self.limit() - self.tokens.len()).saturating_sub(1) }
    }

    /// Brings up to date what the draft model has seen: what it took ahead, as far as that was right.
    fn follow_draft(&mut self) {
        if self.pending > 0 {
            return;
        }
        let Drafted { computed, ahead, .. } = &mut self.draft;
        let came = &self.tokens[(*computed).min(self.tokens.len())..];
        *computed += ahead.iter().zip(came).take_while(|(guess, token)| guess == token).count();
        ahead.clear();
        // The last token is taken in always: its row gives the next one.
        *computed = (*computed).min(self.tokens.len() - 1);
    }

    /// Tells the pool of blocks that the draft model has filled.
    fn note_drafted(&mut self, pool: &mut BlockPool) {
        let full = self.draft.computed / BLOCK_TOKENS;
        while self.draft.noted < full.min(self.blocks.len()) {
            pool.note_drafted(self.blocks[self.draft.noted]);
            self.draft.noted += 1;
        }
    }

    /// The request's rule, without what only the answer itself needs.
    fn draft_sampling(&self) -> Arc<Sampling> {
        match self.sampling().logprobs {
            None => self.sampling().clone(),
            Some(_) => Arc::new(Sampling { logprobs: None, ..Sampling::clone(self.sampling()) }),
        }
    }
}
