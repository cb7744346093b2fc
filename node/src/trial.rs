//! Trying out a model before somebody asks for it, so that predictions begin with what was measured.
use crate::clock::{Instant, timeout};
use crate::worker::{Resident, Worker};
use std::time::Duration;
use tokio::sync::mpsc;
use weir_scheduler::{Event, Generate, Priority, RequestId};

/// Tokens of the prompt, and of the answer.
const PROMPT: u32 = 64;
const OUTPUT: u32 = 9;
/// A model that takes longer isn't tried to the end.
const PATIENCE: Duration = Duration::from_secs(3);
/// What is cached of it is nobody else's.
const SALT: u64 = 0x7472_6961_6c00_0000;

impl Worker {
    /// Runs a short prompt on each model that it holds and that has not run yet. What others ask for meanwhile goes first.
    pub async fn try_out(&self) {
        for resident in self.residents() {
            resident.try_out().await;
        }
    }
}

impl Resident {
    /// Runs a short prompt, unless it has run one.
    pub async fn try_out(&self) {
        if self.engine().status().steps == 0 && timeout(PATIENCE, self.trial()).await.is_err() {
            tracing::debug!("{} was too slow to be tried out", self.name());
        }
    }

    async fn trial(&self) {
        // Ids that every vocabulary has.
        let prompt: Vec<u32> = (1..=PROMPT).collect();
        let ask = Generate {
            request: RequestId(RequestId::OWN),
            ignore_eos: true,
            priority: Priority::Background,
            salt: SALT,
            ..Generate::new(self.held.model, prompt, OUTPUT)
        };
        let (sink, mut events) = mpsc::channel(OUTPUT as usize + 1);
        let began = Instant::now();
        if let Err(failure) = self.engine().generate(ask, sink) {
            return tracing::debug!("{} can't be tried out: {}", self.name(), failure.message);
        }
        let mut times = Vec::new();
        while let Some(Event::Token(_)) = events.recv().await {
            times.push(began.elapsed());
        }
        if let (Some(first), Some(last)) = (times.first(), times.last()) {
            self.measured(PROMPT, *first, times.len() as u32, *last - *first);
        }
    }
}
