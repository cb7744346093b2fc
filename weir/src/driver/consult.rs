//! Carries one attempt at a request to an upstream: its words go out, and what comes back becomes events.
use super::conductor::Command;
use super::conversation::Talk;
use super::course::Extra;
use super::pump::{Pump, Stop};
use crate::telemetry::traceparent;
use std::time::Instant;
use weir_scheduler::{Event, Failure, FailureKind, Finish, FromNode, Generate, Token, Usage};
use weir_upstream::{Ask, Cost, End, Piece, Upstream, UpstreamError};

/// The id of what is no token of a vocabulary.
pub const NO_TOKEN: u32 = u32::MAX;

impl Pump {
    /// Runs until the attempt has ended. Dropping the future closes the connection, which cancels the attempt.
    pub async fn consult(self, upstream: Upstream, model: String, ask: Generate, talk: Option<Talk>) {
        let Some(talk) = talk else {
            let message = "only its token ids are known, and no upstream takes those".into();
            return self.tell_end(Event::Failed(Failure { kind: FailureKind::Invalid, message })).await;
        };
        let asked = self.attend(&upstream, &model, &ask, &talk).await;
        match asked {
            Ok(()) | Err(Stop::Told) => {}
            Err(Stop::ReaderGone) => self.tell(Command::Cancel(self.request)).await,
            Err(Stop::Broke(reason)) => {
                let message = Failure { kind: FailureKind::Internal, message: reason };
                self.tell_end(Event::Failed(message)).await;
            }
        }
    }

    async fn attend(
        &self,
        upstream: &Upstream,
        model: &str,
        ask: &Generate,
        talk: &Talk,
    ) -> Result<(), Stop> {
        let bound = talk.course.has_more_than_text() || ask.grammar.is_some();
        if bound && !ask.output.is_empty() {
            return Err(self
                .fail(FailureKind::Invalid, "what came so far is more than text: it can't be gone on with")
                .await);
        }
        let left = ask.max_tokens.saturating_sub(ask.output.len() as u32).max(1);
        let traceparent = traceparent(ask.trace);
        let so_far = format!("{}{}", talk.conversation.begun, talk.so_far);
        let question = Ask {
            api: talk.conversation.api,
            fields: &talk.conversation.fields,
            model,
            max_tokens: left,
            native: talk.conversation.native.as_ref(),
            so_far: &so_far,
            seed: talk.conversation.seeded.then_some(ask.sampling.seed),
            traceparent: traceparent.as_deref(),
            first_by: ask.ttft.into_iter().chain(ask.deadline).min().map(|left| Instant::now() + left),
        };
        let asked = tokio::select! {
            asked = upstream.ask(&question) => asked,
            () = self.client.closed() => return Err(Stop::ReaderGone),
        };
        let mut answer = match asked {
            Ok(answer) => answer,
            Err(error) => return Err(self.fail_by(&error, ask, talk).await),
        };
        let first = ask.output.len() as u32;
        talk.course.begin(first);
        let mut spoken = Spoken { position: first, last: first + left - 1, kept: None };
        loop {
            // A place first: what can't be delivered isn't read.
            let place = self.place().await?;
            let next = tokio::select! {
                biased;
                next = answer.next() => next,
                () = self.client.closed() => return Err(Stop::ReaderGone),
            };
            match next {
                Ok(Some(piece)) => {
                    if let Some((token, extra)) = spoken.say(piece) {
                        extra.into_iter().for_each(|extra| talk.course.put(token.position, extra));
                        self.deliver(vec![(token, place)]).await;
                    }
                }
                Ok(None) => {
                    if let Some((token, extra)) = spoken.rest() {
                        extra.into_iter().for_each(|extra| talk.course.put(token.position, extra));
                        self.deliver(vec![(token, place)]).await;
                    }
                    self.settle(answer.cost(), talk).await;
                    self.end(&answer.end(), first, talk).await;
                    return Ok(());
                }
                Err(error) => {
                    // What has come was used, whatever becomes of the rest.
                    self.settle(answer.cost(), talk).await;
                    return Err(self.fail_by(&error, ask, talk).await);
                }
            }
        }
    }

    async fn settle(&self, cost: Cost, talk: &Talk) {
        if cost.estimated && cost.nano_usd > 0 {
            talk.course.estimates();
        }
        let (request, attempt) = (self.request, self.attempt);
        let from = FromNode::Charged { request, attempt, amount: cost.nano_usd };
        self.tell(Command::FromNode { node: self.node, from }).await;
    }

    async fn end(&self, end: &End, before: u32, talk: &Talk) {
        let reason = match &end.finish {
            weir_upstream::Finish::Stop => Finish::Stop,
            weir_upstream::Finish::Length => Finish::Length,
            weir_upstream::Finish::Other(word) => {
                talk.course.finished(word.clone());
                Finish::Stop
            }
        };
        let usage = Usage {
            prompt_tokens: end.usage.prompt_tokens.saturating_sub(before),
            cached_tokens: end.usage.cached_tokens,
            output_tokens: end.usage.output_tokens.saturating_add(before),
        };
        self.tell_end(Event::Finished { reason, text: String::new(), usage }).await;
    }

    /// Tells why there is no answer, and what the scheduler had better do about it.
    async fn fail_by(&self, error: &UpstreamError, ask: &Generate, talk: &Talk) -> Stop {
        let kind = match error {
            // Another may take it as it is.
            UpstreamError::Invalid { .. } | UpstreamError::NoModel { .. } if !ask.otherwise.is_empty() => {
                FailureKind::Upstream
            }
            UpstreamError::Invalid { .. } | UpstreamError::NoModel { .. } => FailureKind::Invalid,
            UpstreamError::Busy { after, .. } => {
                self.tell(Command::FromNode { node: self.node, from: FromNode::Pause(*after) }).await;
                FailureKind::Busy
            }
            _ => FailureKind::Upstream,
        };
        if let UpstreamError::Key { provider, status, remedy, .. } = error {
            // What it says is told to the client; it may repeat what was asked.
            tracing::error!("{provider} refuses its key ({status}); check {remedy}");
        }
        // Never what was said.
        tracing::debug!(
            request = self.request.0,
            said_bytes = talk.so_far.len(),
            ?kind,
            "an upstream failed"
        );
        self.fail(kind, &error.to_string()).await
    }

    async fn fail(&self, kind: FailureKind, message: &str) -> Stop {
        self.tell_end(Event::Failed(Failure { kind, message: message.to_owned() })).await;
        Stop::Told
    }
}

/// Numbers pieces as tokens. There may be no more of them than were asked for; what is beyond goes with the last.
struct Spoken {
    position: u32,
    last: u32,
    kept: Option<Piece>,
}

impl Spoken {
    fn say(&mut self, piece: Piece) -> Option<(Token, Option<Extra>)> {
        if self.position < self.last {
            return Some(self.token(piece));
        }
        match &mut self.kept {
            Some(kept) => kept.merge(piece),
            none => *none = Some(piece),
        }
        None
    }

    fn rest(&mut self) -> Option<(Token, Option<Extra>)> {
        self.kept.take().map(|piece| self.token(piece))
    }

    fn token(&mut self, piece: Piece) -> (Token, Option<Extra>) {
        let Piece { text, rest, logprobs } = piece;
        let extra = (!rest.is_empty() || logprobs.is_some()).then_some(Extra { rest, logprobs });
        let token = Token { position: self.position, id: NO_TOKEN, text, logprob: None };
        self.position += 1;
        (token, extra)
    }
}
