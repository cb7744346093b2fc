//! What requests may take, and what they took.
use super::{Phase, Request, Run, Scheduler};
use crate::ledger::{Amount, Applies, Lack};
use crate::{FailureKind, Generate, Output, RequestId, Time, Trust};

impl Scheduler {
    /// The accounts that apply to a request. The scheduler's own have none.
    pub(super) fn accounts(&self, request: &Request) -> Vec<Applies> {
        match request.ask.request.is_own() {
            true => Vec::new(),
            false => self.ledger.accounts_of(request.ask.key, &request.ask.tags),
        }
    }

    /// Counts a request that has come, where rates want that.
    pub(super) fn count(&mut self, now: Time, id: RequestId) -> Result<(), Lack> {
        let Some(request) = self.requests.get(&id) else { return Ok(()) };
        let accounts = self.accounts(request);
        if accounts.is_empty() {
            return Ok(());
        }
        let unix_s = self.unix_s(now);
        // What can't begin for lack of tokens isn't counted, either.
        match self.lacks_tokens(now, id) {
            Some(lack) => Err(lack),
            None => self.ledger.count(&accounts, unix_s),
        }
    }

    /// Which account has too few tokens left for a request that waits, wherever it goes.
    pub(super) fn lacks_tokens(&self, now: Time, id: RequestId) -> Option<Lack> {
        let request = self.requests.get(&id).filter(|r| matches!(r.phase, Phase::Waiting { .. }))?;
        let accounts = self.accounts(request);
        if accounts.is_empty() {
            return None;
        }
        let ask = &request.ask;
        let prompt = if request.tokens_counted > 0 { 0 } else { ask.prompt.len() as u64 };
        let tokens = prompt + u64::from(ask.max_tokens).saturating_sub(ask.output.len() as u64);
        self.ledger.lack(&accounts, &Amount { nano_usd: 0, tokens }, self.unix_s(now))
    }

    /// Ends a request that an account has too little for.
    pub(super) fn end_lacking(&mut self, now: Time, id: RequestId, lack: &Lack) {
        let (kind, message) = refusal(lack);
        self.end_failed(now, id, kind, message);
    }

    /// Why a request that costs so much where it is cheapest can't be afforded.
    pub(super) fn too_dear(
        &self,
        now: Time,
        id: RequestId,
        worst: u64,
        others: &str,
    ) -> (FailureKind, String) {
        let accounts = self.requests.get(&id).map(|request| self.accounts(request)).unwrap_or_default();
        let amount = Amount { nano_usd: worst, tokens: 0 };
        let (kind, mut message) = match self.ledger.lack(&accounts, &amount, self.unix_s(now)) {
            Some(lack) => refusal(&lack),
            None => (FailureKind::Busy, "a budget was used up a moment ago; try again".into()),
        };
        if !others.is_empty() {
            message = format!("{message}; and elsewhere: {others}");
        }
        (kind, message)
    }

    /// A run is over: what it took is spent, the rest of what was reserved is free. `before`: tokens of the request that were
    /// settled before.
    pub(super) fn settle(&mut self, ask: &Generate, run: &Run, before: u64) {
        let trust = self.pool.node(run.node).map(|node| node.trust);
        let provider = trust == Some(Trust::Provider);
        let believed = provider || trust == Some(Trust::Own);
        // Whoever is stopped at a provider's before its first word has been read all the same.
        let read = run.first.is_some() || (run.stopped && provider);
        let nano_usd = run.price.of(if read { run.given } else { 0 }, u64::from(run.tokens));
        let prompt_due = if before > 0 { 0 } else { ask.prompt.len() as u64 };
        let own = if run.first.is_some() { prompt_due + u64::from(run.tokens) } else { 0 };
        let tokens = if run.said > 0 && believed { u64::from(run.said).saturating_sub(before) } else { own };
        if let Some(request) = self.requests.get_mut(&ask.request) {
            request.tokens_counted += tokens;
        }
        let (request, attempt) = (ask.request, run.attempt);
        let counted = Amount { nano_usd, tokens };
        let Some(settled) = self.ledger.settle(request, attempt, counted) else { return };
        if !settled.entries.is_empty() {
            self.outputs.push_back(Output::Settled { request, attempt, entries: settled.entries });
        }
        if settled.nano_usd > 0 {
            let (key, amount, worst) = (settled.key, settled.nano_usd, settled.reserved_nano_usd);
            self.outputs.push_back(Output::Spent { key, request, attempt, amount, worst });
        }
    }
}

fn refusal(lack: &Lack) -> (FailureKind, String) {
    let after_s = lack.after_s();
    match lack.is_rate() {
        true => (FailureKind::Rate { after_s }, format!("Rate limit reached: {lack}.")),
        false => (FailureKind::Budget { after_s }, format!("You exceeded your current quota: {lack}.")),
    }
}
