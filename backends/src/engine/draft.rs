//! Guesses at what comes next, so that a step computes several tokens of a sequence: text repeats its prompt, and itself.
//!
//! A guess is what followed when the last few tokens stood here before. The program chooses a token behind every guessed
//! one, by the arithmetic and the noise of plain decoding, and what was chosen counts as far as the guesses were right:
//! the tokens are those of plain decoding, only their number a step differs.
//!
//! Every guess is held against what does come, whether it was computed or not, so that whether guessing pays is known
//! without paying: [`Lookup`] knows how often guesses come true, [`Pace`] what a step of so many rows takes.
use std::collections::HashMap;
use std::time::Duration;

/// Rows of one sequence in a step, at most; the first is no guess.
pub(super) const ROWS_MAX: usize = 16;
/// Guesses are made where no step gets more rows than this, all sequences together.
pub(super) const STEP_ROWS_MAX: usize = 32;
/// Tokens that must have stood together before.
const RUN: usize = 3;
/// What a step must gain by guesses.
pub(super) const GAIN_MIN: f32 = 1.1;
/// How fast the odds follow what is seen: the weight of the newest.
const RATE: f32 = 1.0 / 16.0;

/// What followed the last tokens of one sequence when they stood there before, and how far that is to be trusted.
#[derive(Debug)]
pub(super) struct Lookup {
    /// Where each run of tokens ended last.
    ends: HashMap<[u32; RUN], u32>,
    /// Tokens that have been looked at.
    seen: usize,
    /// Where the guess at the next token stands.
    at: Option<usize>,
    /// Tokens before it that agree with those before the next one.
    agreed: usize,
    /// How often a guess was right, by how many tokens agreed.
    odds: [f32; 5],
}

impl Lookup {
    pub(super) fn new() -> Lookup {
        Lookup { ends: HashMap::new(), seen: 0, at: None, agreed: 0, odds: [0.4, 0.5, 0.6, 0.7, 0.8] }
    }

    /// Looks at tokens that have been added; those of the prompt tell nothing of the odds.
    pub(super) fn follow(&mut self, tokens: &[u32], prompt: usize) {
        for (i, &token) in tokens.iter().enumerate().skip(self.seen) {
            if let Some(at) = self.at {
                let right = tokens[at] == token;
                if i >= prompt {
                    let odds = &mut self.odds[grade(self.agreed)];
                    *odds += RATE * (f32::from(u8::from(right)) - *odds);
                }
                (self.at, self.agreed) = if right { (Some(at + 1), self.agreed + 1) } else { (None, 0) };
            }
            let Some(run) = tokens[..=i].last_chunk::<RUN>() else { continue };
            let before = self.ends.insert(*run, i as u32);
            if let (None, Some(end)) = (self.at, before) {
                (self.at, self.agreed) = (Some(end as usize + 1), RUN);
            }
        }
        self.seen = tokens.len();
    }

    /// Guesses at the next tokens, at most so many, as far as they pay. `gain(expected, guesses)`: what a step gains that is
    /// expected to give so many tokens for so many guesses.
    pub(super) fn guess(&self, tokens: &[u32], most: usize, gain: impl Fn(f32, usize) -> f32) -> Vec<u32> {
        let Some(at) = self.at else { return Vec::new() };
        let best = self.best(most, gain);
        let mut guesses = Vec::with_capacity(best.1);
        for place in at..at + best.1 {
            // What repeats a piece that has just begun to repeat runs into its own guesses.
            guesses.push(match tokens.get(place) {
                Some(&token) => token,
                None => guesses[place - tokens.len()],
            });
        }
        guesses
    }

    /// What is gained by as many guesses as pay best, and their number; less than nothing counts as nothing.
    pub(super) fn best(&self, most: usize, gain: impl Fn(f32, usize) -> f32) -> (f32, usize) {
        let most = if self.at.is_some() { most } else { 0 };
        let (mut likely, mut expected, mut best) = (1.0, 1.0, (GAIN_MIN, 0));
        for guesses in 1..=most {
            likely *= self.odds[grade(self.agreed + guesses - 1)];
            expected += likely;
            let gain = gain(expected, guesses);
            if gain > best.0 {
                best = (gain, guesses);
            }
        }
        if best.1 == 0 { (1.0, 0) } else { best }
    }
}

/// The place of the odds.
fn grade(agreed: usize) -> usize {
    match agreed {
        0..=3 => 0,
        4..=5 => 1,
        6..=9 => 2,
        10..=19 => 3,
        _ => 4,
    }
}

/// How long a step of decoding takes, by its rows.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Seconds; 0 where nothing is known yet.
    times: [f32; CLASSES.len()],
    /// Steps seen of each class, as far as that matters.
    seen: [u8; CLASSES.len()],
}

/// Most rows of each class of steps.
const CLASSES: [usize; 9] = [1, 2, 4, 6, 8, 12, 16, 24, STEP_ROWS_MAX];
/// What a row is thought to add before that is known: of the time of the largest step that is known.
pub(super) const ROW_GUESS: f32 = 0.12;
/// The first steps of a class, which a device may prepare itself for: they tell nothing.
const FIRST: u8 = 2;
/// Steps after those of which the quickest counts.
const TRIED: u8 = FIRST + 2;

impl Pace {
    fn class(rows: usize) -> Option<usize> {
        CLASSES.iter().position(|most| rows <= *most)
    }

    /// A step of so many rows took so long. Other work of the machine only ever adds, so less is believed sooner than
    /// more; and devices take long over what they do for the first time, which must not be what a class is judged by for ever.
    pub(super) fn took(&mut self, rows: usize, time: Duration) {
        let (Some(class), true) = (Pace::class(rows), time > Duration::ZERO) else { return };
        let (known, seen, time) = (&mut self.times[class], &mut self.seen[class], time.as_secs_f32());
        *seen = seen.saturating_add(1);
        let weight = if time < *known { 0.25 } else { 1.0 / 32.0 };
        if *seen > TRIED {
            *known += weight * (time - *known);
        } else if *seen > FIRST {
            *known = if *known == 0.0 { time } else { known.min(time) };
        }
    }

    /// How many times as long a step of `more` rows takes as one of `rows`.
    pub(super) fn ratio(&self, rows: usize, more: usize) -> f32 {
        self.time(more) / self.time(rows)
    }

    /// What a step gains that has `rows` rows without the guesses for one of them, which is expected to give so many tokens.
    pub(super) fn gain(&self, rows: usize, expected: f32, guesses: usize) -> f32 {
        let tokens = (rows as f32 - 1.0 + expected) / rows as f32;
        tokens / self.ratio(rows, rows + guesses)
    }

    /// Whether any step has been timed.
    pub(super) fn is_known(&self) -> bool {
        self.times.iter().any(|time| *time > 0.0)
    }

    /// Seconds of a step of so many rows; where none is known, of those of one row.
    pub(super) fn time(&self, rows: usize) -> f32 {
        let class = Pace::class(rows).unwrap_or(CLASSES.len() - 1);
        let known = |class: &usize| self.times[*class] > 0.0;
        let (below, above) = ((0..=class).rfind(known), (class..CLASSES.len()).find(known));
        let (time, rows_of) = (|class: usize| self.times[class], |class: usize| CLASSES[class] as f32);
        match (below, above) {
            (Some(below), Some(above)) if below < above => {
                let share = (rows as f32 - rows_of(below)) / (rows_of(above) - rows_of(below));
                time(below) + share.clamp(0.0, 1.0) * (time(above) - time(below))
            }
            (Some(same), Some(_)) => time(same),
            (Some(below), None) => time(below) * (1.0 + ROW_GUESS * (rows as f32 - rows_of(below)).max(0.0)),
            (None, Some(above)) => time(above) / (1.0 + ROW_GUESS * (rows_of(above) - rows as f32).max(0.0)),
            (None, None) => 1.0 + ROW_GUESS * (rows as f32 - 1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guesses(tokens: &[u32], most: usize) -> Vec<u32> {
        let mut lookup = Lookup::new();
        lookup.follow(tokens, tokens.len());
        lookup.guess(tokens, most, |expected, _| expected)
    }

    #[test]
    fn what_followed_before_is_guessed() {
        assert_eq!(guesses(&[1, 2, 3, 4, 5, 6, 1, 2, 3], 3), [4, 5, 6]);
        assert_eq!(guesses(&[1, 2, 3, 9, 1, 2, 3, 4, 1, 2, 3], 1), [4], "the last time counts");
        assert_eq!(guesses(&[1, 2, 3, 1, 2, 3, 1], 8), [2, 3, 1, 2, 3, 1, 2, 3], "on and on");
        assert_eq!(guesses(&[7, 7, 7, 7], 3), [7, 7, 7]);
        assert_eq!(guesses(&[1, 2, 3, 4, 1, 2], 3), [0; 0], "two tokens are too few");
        assert_eq!(guesses(&[], 3), [0; 0]);
    }

    #[test]
    fn tokens_one_by_one_or_at_once() {
        let tokens: Vec<u32> = (0..200u32).map(|i| (i * i / 7) % 5).collect();
        let mut one = Lookup::new();
        (1..=tokens.len()).for_each(|n| one.follow(&tokens[..n], 50));
        let mut all = Lookup::new();
        all.follow(&tokens, 50);
        assert_eq!(
            format!("{:?}", (one.at, one.agreed, one.odds)),
            format!("{:?}", (all.at, all.agreed, all.odds))
        );
    }

    #[test]
    fn guesses_end_where_they_do_not_pay() {
        let tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3];
        let mut lookup = Lookup::new();
        lookup.follow(&tokens, 0);
        lookup.odds = [0.9; 5];
        let cost = |each: f32| move |expected: f32, guesses: usize| expected / (1.0 + each * guesses as f32);
        assert_eq!(lookup.guess(&tokens, 8, cost(0.0)).len(), 8);
        assert_eq!(lookup.guess(&tokens, 8, cost(0.9)).len(), 0);
        let some = lookup.guess(&tokens, 8, cost(0.4)).len();
        assert!((1..8).contains(&some), "{some}");
        lookup.odds = [0.02; 5];
        assert_eq!(lookup.guess(&tokens, 8, cost(0.1)).len(), 0, "hardly ever right");
    }

    #[test]
    fn odds_follow_what_comes() {
        // The same run is followed by something else each time.
        let tokens: Vec<u32> = (0..400).flat_map(|i| [1, 2, 3, 100 + i]).collect();
        let mut lookup = Lookup::new();
        lookup.follow(&tokens, 0);
        assert!(lookup.odds[0] < 0.05, "{:?}", lookup.odds);
    }

    #[test]
    fn paces_are_learnt() {
        let ms = |n: u64| Duration::from_millis(n);
        let mut pace = Pace::default();
        assert!(pace.ratio(1, 5) > 1.2);
        // a device prepares itself for what is new
        for time in [900, 800, 11, 10] {
            pace.took(1, ms(time));
        }
        for time in [700, 600, 30] {
            pace.took(5, ms(time));
        }
        assert!((pace.ratio(1, 6) - 3.0).abs() < 0.01);
        assert!((pace.ratio(1, 3) - 1.8).abs() < 0.01, "in between: {}", pace.ratio(1, 3));
        (0..50).for_each(|_| pace.took(5, ms(12)));
        assert!((pace.ratio(1, 6) - 1.2).abs() < 0.01);
        pace.took(1, Duration::ZERO);
        pace.took(1000, ms(1));
        assert!((pace.ratio(1, 6) - 1.2).abs() < 0.01, "what tells nothing changes nothing");
    }
}
