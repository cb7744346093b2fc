//! What an upstream answers.
use crate::ask::estimate_text;
use crate::catalog::Prices;
use crate::error::UpstreamError;
use crate::http::{HttpError, Reply};
use crate::sse::Events;
use crate::told::{Cost, End, Finish, Piece, Reader, Told, Usage};
use crate::upstream::Upstream;
use std::time::{Duration, Instant};

/// Bytes of text and of other fields that an answer may have.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// An upstream that shows signs of life but sends nothing of the answer is given up after so many times the patience
/// between pieces.
const IDLE_TIMES: u32 = 5;

/// An answer under way. Dropping it cancels what is still to come.
///
/// [`Answer::next`] gives its pieces, and none after the last; then [`Answer::end`] says how it ended. After an error
/// there is nothing more, and [`Answer::cost`] says what has come until then.
pub struct Answer {
    upstream: Upstream,
    reply: Reply,
    reader: Reader,
    events: Events,
    told: Told,
    /// It is no good from here on; what came before is.
    failed: Option<UpstreamError>,
    prices: Prices,
    /// Tokens of the prompt, by our estimate.
    prompt_estimate: u32,
    so_far: Seam,
    /// Estimated tokens and bytes of what came.
    output_estimate: u32,
    bytes: usize,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("provider", &self.upstream.name()).finish_non_exhaustive()
    }
}

/// What an answer is begun with.
pub(crate) struct Opening {
    pub reader: Reader,
    pub prices: Prices,
    pub prompt_estimate: u32,
    /// White space at the end of the text so far that could not be sent.
    pub owed: String,
}

impl Answer {
    pub(crate) fn new(upstream: Upstream, reply: Reply, opening: Opening) -> Answer {
        Answer {
            upstream,
            reply,
            reader: opening.reader,
            events: Events::default(),
            told: Told::default(),
            failed: None,
            prices: opening.prices,
            prompt_estimate: opening.prompt_estimate,
            so_far: Seam(opening.owed),
            output_estimate: 0,
            bytes: 0,
        }
    }

    /// The next piece; none when it has ended.
    pub async fn next(&mut self) -> Result<Option<Piece>, UpstreamError> {
        let patience = self.upstream.times().between;
        let next = self.step(patience).await;
        if next.as_ref().is_err_and(UpstreamError::is_fault) {
            self.upstream.note_fault();
        }
        next
    }

    /// As [`Answer::next`]; `patience` is for each sign of life.
    async fn step(&mut self, patience: Duration) -> Result<Option<Piece>, UpstreamError> {
        let started = Instant::now();
        loop {
            if let Some(mut piece) = self.told.pieces.pop_front() {
                self.so_far.join(&mut piece.text);
                if !piece.is_empty() {
                    self.output_estimate += estimate_text(&piece.text).max(1);
                    return Ok(Some(piece));
                }
                continue;
            }
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            if self.told.done {
                self.drain().await;
                return Ok(None);
            }
            if started.elapsed() > patience * IDLE_TIMES {
                return Err(self.silent("nothing of its answer", started.elapsed()));
            }
            self.read(patience).await?;
        }
    }

    /// All of it is here.
    pub(crate) fn already(self, told: Told) -> Answer {
        Answer { told, ..self }
    }

    /// Reads until the first piece is there, or the end, for no longer than `left` of `patience`.
    pub(crate) async fn begin(&mut self, left: Duration, patience: Duration) -> Result<(), UpstreamError> {
        let (started, all) = (Instant::now(), left);
        while self.told.pieces.iter().all(Piece::is_empty) && !self.told.done {
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            let left = all.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(self.silent("no first token", patience));
            }
            match self.read(left).await {
                Err(UpstreamError::Silent { .. }) => return Err(self.silent("no first token", patience)),
                read => read?,
            }
        }
        Ok(())
    }

    /// Reads on until a line has ended: bytes alone are no sign of life.
    async fn read(&mut self, patience: Duration) -> Result<(), UpstreamError> {
        let deadline = tokio::time::Instant::now() + patience;
        let before = self.events.lines();
        while self.events.lines() == before && !self.told.done {
            let next = tokio::time::timeout_at(deadline, self.reply.next(patience)).await;
            let bytes = match next.unwrap_or(Err(HttpError::Silent)) {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return self.close(),
                Err(HttpError::Silent) => return Err(self.silent("nothing", patience)),
                Err(HttpError::Broken(why) | HttpError::Unsent(why) | HttpError::Unreachable(why)) => {
                    return Err(self.cut(why));
                }
            };
            self.bytes += bytes.len();
            if self.bytes > ANSWER_BYTES_MAX {
                return Err(self.nonsense(format!("an answer of more than {ANSWER_BYTES_MAX} bytes")));
            }
            let Answer { events, reader, told, .. } = self;
            let taken = events.push(&bytes, |data| reader.take(data, told));
            let most = crate::sse::EVENT_BYTES_MAX;
            self.failed = match taken {
                Ok(Ok(())) => continue,
                Ok(Err(crate::sse::TooLong)) => {
                    Some(self.nonsense(format!("an event of more than {most} bytes")))
                }
                Err(fault) => Some(self.upstream.fault(fault)),
            };
            return Ok(());
        }
        Ok(())
    }

    /// The body has ended.
    fn close(&mut self) -> Result<(), UpstreamError> {
        match self.told.finish {
            Some(_) => {
                self.told.done = true;
                Ok(())
            }
            None => Err(self.cut("it ended without a reason".into())),
        }
    }

    /// What follows the end is nothing; reading it lets the connection be used again.
    async fn drain(&mut self) {
        for _ in 0..4 {
            if !matches!(self.reply.next(Duration::from_millis(50)).await, Ok(Some(_))) {
                return;
            }
        }
    }

    /// How it ended, once [`Answer::next`] has given none.
    pub fn end(&self) -> End {
        let finish = self.told.finish.clone().unwrap_or(Finish::Stop);
        End { finish, usage: self.usage().0, cost: self.cost() }
    }

    /// What has been used until now, and whether that is an estimate.
    fn usage(&self) -> (Usage, bool) {
        let ended = self.told.done;
        let guess = Usage {
            prompt_tokens: self.prompt_estimate,
            output_tokens: self.output_estimate,
            ..Usage::default()
        };
        match self.told.usage {
            Some(usage) if ended => (usage, false),
            // What it has told so far may lag behind.
            Some(usage) => {
                let output_tokens = usage.output_tokens.max(guess.output_tokens);
                let prompt_tokens =
                    if usage.prompt_tokens > 0 { usage.prompt_tokens } else { guess.prompt_tokens };
                (Usage { output_tokens, prompt_tokens, ..usage }, true)
            }
            None => (guess, true),
        }
    }

    /// What it has cost until now; for one that broke off, by our own count.
    pub fn cost(&self) -> Cost {
        if let Some(usd) = self.told.usd.filter(|_| self.told.done) {
            return Cost { nano_usd: (usd * 1e9).ceil() as u64, estimated: false };
        }
        let (usage, estimated) = self.usage();
        Cost { nano_usd: self.prices.of(&usage), estimated }
    }

    fn cut(&self, message: String) -> UpstreamError {
        UpstreamError::Cut { provider: self.upstream.name().into(), message }
    }

    fn silent(&self, what: &'static str, after: Duration) -> UpstreamError {
        UpstreamError::Silent { provider: self.upstream.name().into(), what, after }
    }

    fn nonsense(&self, message: String) -> UpstreamError {
        UpstreamError::Nonsense { provider: self.upstream.name().into(), message }
    }
}

/// White space at the end of the text so far, which some providers refuse to be sent, and which the model may or may not
/// write again.
struct Seam(String);

impl Seam {
    /// Takes off the beginning of what follows what has been there already.
    fn join(&mut self, text: &mut String) {
        if self.0.is_empty() || text.is_empty() {
            return;
        }
        let same: usize =
            self.0.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        text.drain(..same);
        self.0.drain(..same);
        if !text.is_empty() {
            self.0.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_is_not_written_twice() {
        let check = |owed: &str, pieces: &[&str], expected: &str| {
            let mut seam = Seam(owed.into());
            let mut out = String::new();
            for piece in pieces {
                let mut piece = (*piece).to_owned();
                seam.join(&mut piece);
                out.push_str(&piece);
            }
            assert_eq!(out, expected, "{owed:?} {pieces:?}");
        };
        check("", &[" a"], " a");
        check(" ", &[" a", " b"], "a b");
        check(" ", &["a", " b"], "a b");
        check("\n\n", &["\n", "\n", "x"], "x");
        check("\n ", &["\nx"], "x");
    }
}
