//! Guesses of a draft model: a smaller one of the same tokenizer, beside the engine's own, whose next tokens are cheap.
//!
//! A round is made between two steps of the engine's own program: the draft model takes in what it hasn't seen yet of each
//! sequence and then chooses a few tokens, one after the other, by the request's own noise, so that it agrees with the
//! larger model about chance too. The step that follows checks them as it checks any guess (`draft.rs`), so the tokens are
//! those of plain decoding, whatever the draft model says.
//!
//! The two programs share block tables: a position's keys and values lie in the same block of either cache, so that
//! prefixes, preemption and eviction need no second account; blocks remember whether the draft model has filled them. It sees a
//! prompt only once a sequence has come so far that it is worth it.
//!
//! Rounds are made where they are expected to pay, by how often guesses were right, of this sequence and of all, and by what
//! steps of both programs take. Where they don't, a few are tried now and then, ever more rarely. A draft model that
//! fails is dropped, and everything goes on without it.
mod round;

#[cfg(test)]
pub(super) use round::PATIENCE;

use super::draft::{GAIN_MIN, Pace, ROW_GUESS};
use crate::program::{
    Batch, DeviceError, Input, KvLayout, Program, SampleSpec, Sampled, Segment, SegmentOutput, StepOutput,
    Want,
};
use std::sync::Arc;
use weir_scheduler::{BLOCK_TOKENS, Sampling, Time};

/// How often a guess is thought right before that is known.
const ODDS: f32 = 0.6;
/// How fast a sequence's odds, and those of all, follow what is seen.
const RATE: f32 = 1.0 / 16.0;
const RATE_OF_ALL: f32 = 1.0 / 64.0;
/// Tokens without a guess after which a sequence is thought to be like all others again.
const FORGET: usize = 128;
/// Rounds of a try, and their guesses.
const TRY_ROUNDS: u32 = 6;
const TRY_GUESSES: usize = 3;
/// Tokens between tries: at first, at most.
const REST_MIN: usize = 128;
const REST_MAX: usize = 8192;
/// Rows that are taken in with a round at no cost to speak of.
const BEHIND: usize = 8;
/// What taking in a prompt may cost of the time that a sequence has had so far, where nothing is known to be gained.
const TRY_SHARE: f32 = 0.05;

/// A smaller model for guesses, and what it was compiled for.
pub struct Draft {
    /// Runs it, with the engine's own number of blocks and slots.
    pub program: Box<dyn Program>,
    /// As it was compiled.
    pub layout: KvLayout,
    /// Most tokens of a sequence that it can take.
    pub context: u32,
    /// Token ids that it knows are below it.
    pub vocab: u32,
    /// What a step of it takes, of one of the engine's own, until that has been measured.
    pub cost: f32,
}

/// What the draft model knows of one sequence.
#[derive(Debug, Default)]
pub(super) struct Drafted {
    /// Leading positions whose keys and values it has.
    computed: usize,
    /// What it took behind them, which may be wrong.
    ahead: Vec<u32>,
    /// Its guesses at what comes after so many tokens.
    proposed: (usize, Vec<u32>),
    /// Blocks whose pool knows that they are filled.
    noted: usize,
    /// How often its guesses were right.
    odds: Option<f32>,
    /// Tokens since its last guess.
    without: usize,
    /// The step in flight checks its guesses.
    pub(super) checked: bool,
}

impl Drafted {
    /// The guesses at what comes after `tokens` tokens, once.
    pub(super) fn take(&mut self, tokens: usize) -> Vec<u32> {
        let (at, guesses) = std::mem::take(&mut self.proposed);
        if at == tokens { guesses } else { Vec::new() }
    }

    /// At the begin of a run on so many adopted blocks that it has filled.
    pub(super) fn begin(&mut self, filled: usize) {
        (self.computed, self.noted) = (filled * BLOCK_TOKENS, filled);
        self.ahead.clear();
        self.proposed.1.clear();
        self.checked = false;
    }
}

/// An engine's draft model at work.
pub(super) struct Drafter {
    draft: Draft,
    pace: Pace,
    /// Seconds that a row of a prompt takes; 0 where that isn't known.
    row: f32,
    /// Of all guesses.
    odds: f32,
    /// Tokens until the next try, and from that to the one after it.
    rest: usize,
    interval: usize,
    tries: u32,
    paid: bool,
    /// A round is done, and the step that checks it comes next.
    pub(super) ready: bool,
    round: Option<Round>,
    took: Option<Took>,
}

/// Steps of the draft model under way.
struct Round {
    since: Time,
    members: Vec<Member>,
    /// Steps in all, submitted, done.
    steps: usize,
    submitted: usize,
    done: usize,
}

/// A sequence in a round.
struct Member {
    slot: usize,
    run: u64,
    /// Tokens to take in, and where they begin.
    start: usize,
    ids: Vec<u32>,
    /// Guesses wanted.
    most: usize,
    guesses: Vec<u32>,
    sampling: Arc<Sampling>,
    blocks: Arc<[u32]>,
}

/// A round that is done, until the time is known.
struct Took {
    since: Time,
    members: usize,
    rows: usize,
    guesses: usize,
}

/// Whether the draft model has its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// No.
    No,
    /// Once what is in flight is done.
    Wait,
    /// Now.
    Begun,
}

/// A sequence that could be in a round.
struct Candidate {
    slot: usize,
    odds: f32,
    behind: usize,
    most: usize,
}

/// Tokens that a step is expected to give with `guesses` guesses.
fn expected(odds: f32, guesses: usize) -> f32 {
    (0..guesses).fold((1.0, 1.0), |(sum, likely), _| (sum + likely * odds, likely * odds)).0
}

impl Drafter {
    fn new(draft: Draft) -> Drafter {
        Drafter {
            draft,
            pace: Pace::default(),
            row: 0.0,
            odds: ODDS,
            rest: 0,
            interval: REST_MIN,
            tries: 0,
            paid: false,
            ready: false,
            round: None,
            took: None,
        }
    }

    /// What a step of so many rows takes, as `pace` counts.
    fn time(&self, pace: &Pace, rows: usize) -> f32 {
        match self.pace.is_known() && pace.is_known() {
            true => self.pace.time(rows),
            false => self.draft.cost * pace.time(rows),
        }
    }

    /// What taking in `rows` rows takes.
    fn time_behind(&self, pace: &Pace, rows: usize) -> f32 {
        let row = if self.row > 0.0 { self.row } else { ROW_GUESS * self.time(pace, 1) };
        rows as f32 * row
    }

    /// How many times as many tokens in the same time come of a round for `members` of `all` sequences, whose steps are
    /// expected to give `tokens` together with so many guesses each.
    fn gain(&self, pace: &Pace, (all, members): (usize, usize), tokens: f32, guesses: usize) -> f32 {
        let tokens = tokens + (all - members) as f32;
        let time = pace.time(all + members * guesses) + guesses as f32 * self.time(pace, members);
        tokens / all as f32 * pace.time(all) / time
    }

    /// The number of guesses that gains most, and what.
    fn best(&self, pace: &Pace, all: usize, odds: &[f32], most: usize) -> (f32, usize) {
        let gain = |guesses: usize| {
            let tokens = odds.iter().map(|odds| expected(*odds, guesses)).sum();
            (self.gain(pace, (all, odds.len()), tokens, guesses), guesses)
        };
        (1..=most).map(gain).fold((1.0, 0), |best, one| if one.0 > best.0 { one } else { best })
    }

    /// Whether a sequence that has got `tokens` tokens may have the draft model take in `behind`, where a share of its time is
    /// expected to be gained: what is spent is bounded by what would have been saved.
    fn affords(&self, pace: &Pace, all: usize, (behind, tokens): (usize, usize), share: f32) -> bool {
        behind <= BEHIND || self.time_behind(pace, behind) <= pace.time(all) * (2.0 + share * tokens as f32)
    }

    /// What came of a sequence's guesses: so many were right, and whether one was wrong.
    fn learn(&mut self, drafted: &mut Drafted, right: usize, wrong: bool) {
        let own = drafted.odds.get_or_insert(self.odds);
        for i in 0..right + usize::from(wrong) {
            let seen = f32::from(u8::from(i < right));
            *own += RATE * (seen - *own);
            self.odds += RATE_OF_ALL * (seen - self.odds);
        }
        drafted.without = 0;
        self.interval = self.interval.saturating_sub(16 * right).max(REST_MIN);
    }

    /// The next step of the round, once it may be submitted.
    fn batch(round: &Round) -> Batch {
        let step = round.submitted;
        let of_step = round.members.iter().filter(|m| step == 0 || m.most > step);
        let segment = |m: &Member| {
            let fed = m.start + m.ids.len();
            let (start, input) = match step {
                0 => (m.start, Input::Ids(m.ids.clone())),
                _ => (fed + step - 1, Input::LastSampled),
            };
            let spec = SampleSpec {
                sampling: m.sampling.clone(),
                position: (fed + step) as u32,
                counts: Vec::new(),
                mask: None,
            };
            let want = if m.most > step { Want::Sample(vec![spec]) } else { Want::Nothing };
            // Many rows go by the faster arithmetic, where there are two: it is a guess.
            let prompt = step == 0 && m.ids.len() > 2 * BEHIND;
            Segment {
                slot: m.slot as u32,
                start: start as u32,
                prompt,
                input,
                blocks: m.blocks.clone(),
                want,
            }
        };
        Batch { segments: of_step.map(segment).collect() }
    }

    fn submit(&mut self) -> Result<(), DeviceError> {
        let Some(round) = &mut self.round else { return Ok(()) };
        let depth = self.draft.program.depth().max(1);
        while round.submitted < round.steps && round.submitted - round.done < depth {
            self.draft.program.submit(Drafter::batch(round))?;
            round.submitted += 1;
        }
        Ok(())
    }

    /// The results of a step. True if it was the round's last one.
    fn take(&mut self, output: StepOutput) -> Result<bool, DeviceError> {
        let Some(round) = &mut self.round else { return Ok(false) };
        let step = round.done;
        let mut segments = output.segments.into_iter();
        for member in round.members.iter_mut().filter(|m| step == 0 || m.most > step) {
            match (segments.next(), member.most > step) {
                (Some(SegmentOutput::Nothing), false) => {}
                (Some(SegmentOutput::Sampled(ids)), true) if ids.len() == 1 => {
                    member.guesses.extend(ids.into_iter().map(|Sampled { id, .. }| id));
                }
                _ => {
                    return Err(DeviceError::Lost(
                        "a step came back with other than it was asked for".into(),
                    ));
                }
            }
        }
        round.done += 1;
        Ok(round.done == round.steps)
    }
}

impl Drafter {
    /// Those for whom it pays, with the number of guesses that is best for all; or those with whom it is tried again.
    fn choose(
        &mut self,
        pace: &Pace,
        all: usize,
        mut chosen: Vec<Candidate>,
        tried: Vec<Candidate>,
    ) -> Option<Vec<Candidate>> {
        let odds: Vec<f32> = chosen.iter().map(|c| c.odds).collect();
        let most = chosen.iter().map(|c| c.most).max().unwrap_or(0);
        let (gain, guesses) = self.best(pace, all, &odds, most);
        if gain > 1.0 + (GAIN_MIN - 1.0) * chosen.len() as f32 / all as f32 {
            chosen.iter_mut().for_each(|c| c.most = c.most.min(guesses));
            (self.paid, self.tries) = (true, 0);
            return Some(chosen);
        }
        if self.paid || self.tries >= TRY_ROUNDS {
            (self.paid, self.tries) = (false, 0);
            self.rest = self.interval;
            self.interval = (2 * self.interval).min(REST_MAX);
        }
        if self.rest > 0 || tried.is_empty() {
            return None;
        }
        self.tries += u32::from(tried.iter().any(|c| c.behind <= BEHIND));
        Some(tried)
    }
}
