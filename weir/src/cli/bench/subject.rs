//! What is measured: a model of this process, through the whole path, or a peer behind its HTTP API.
use crate::driver::{Driver, ServedModel};
use anyhow::{Context, anyhow, bail};
use std::sync::Arc;
use std::time::{Duration, Instant};
use weir_backends::text::Special;
use weir_client::{Endpoint, Options, Piece, Weir};
use weir_scheduler::{Event, Generate};

/// Asks for `output_tokens` after a prompt.
pub(super) enum Subject {
    Here { driver: Driver, model: Arc<ServedModel> },
    There { weir: Weir, model: String },
}

/// A prompt that no cache knows.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    pub(super) text: String,
}

/// One request, from when it was sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timed {
    pub(super) prompt_tokens: u32,
    pub(super) output_tokens: u32,
    pub(super) sent: Instant,
    pub(super) first: Instant,
    pub(super) last: Instant,
}

impl Timed {
    pub(super) fn ttft(&self) -> Duration {
        self.first - self.sent
    }

    /// After the first token. None where there was only one.
    pub(super) fn decode_rate(&self) -> Option<f64> {
        let seconds = (self.last - self.first).as_secs_f64();
        (self.output_tokens > 1 && seconds > 0.0).then(|| f64::from(self.output_tokens - 1) / seconds)
    }

    pub(super) fn prefill_rate(&self) -> f64 {
        f64::from(self.prompt_tokens) / self.ttft().as_secs_f64()
    }
}

impl Subject {
    /// An OpenAI-compatible server: the model of that name if it has one, else its first.
    pub(super) async fn there(url: &str, key: Option<String>, wanted: &str) -> anyhow::Result<Subject> {
        let mut weir = Weir::new();
        weir.add("peer", Endpoint::gateway(url, key));
        let models = weir.models(None).await?;
        let found = models.iter().find(|m| *m == wanted).or(models.first());
        let model = found.with_context(|| format!("{url} serves no model"))?.clone();
        Ok(Subject::There { weir, model })
    }

    /// Made of random ordinary tokens of the model's vocabulary.
    pub(super) fn prompt(model: &ServedModel, tokens: u32, seed: u64) -> Prompt {
        let Some((tokenizer, _)) = model.text() else {
            return Prompt { ids: Vec::new(), text: String::new() };
        };
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut any = || {
            // xorshift64*
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as u32 % tokenizer.len().max(1) as u32
        };
        let plain = |id: &u32| {
            let bytes = tokenizer.bytes(*id);
            !tokenizer.is_control(*id)
                && bytes.len() > 1
                && bytes.iter().all(|b| b.is_ascii_lowercase() || *b == b' ')
        };
        let mut words = || (0..1000).map(|_| any()).find(plain);
        let mut next = || {
            words().unwrap_or_else(|| tokenizer.encode("a", Special::AsText).first().copied().unwrap_or(0))
        };
        let ids: Vec<u32> = (0..tokens).map(|_| next()).collect();
        let text = tokenizer.decode(&ids);
        Prompt { ids, text }
    }

    /// Sends one request and times its answer.
    pub(super) async fn run(&self, prompt: Prompt, output_tokens: u32) -> anyhow::Result<Timed> {
        match self {
            Subject::Here { driver, model } => here(driver, model, prompt.ids, output_tokens).await,
            Subject::There { weir, model } => there(weir, model, prompt.text, output_tokens).await,
        }
    }
}

async fn here(driver: &Driver, model: &ServedModel, prompt: Vec<u32>, most: u32) -> anyhow::Result<Timed> {
    let ask = Generate { ignore_eos: true, ..Generate::new(model.id, prompt, most) };
    let sent = Instant::now();
    let mut generation = driver.generate(ask).await.map_err(|f| anyhow!(f.message))?;
    let (mut first, mut last) = (None, sent);
    loop {
        match generation.events.recv().await.context("the engine is gone")? {
            Event::Token(_) => {
                last = Instant::now();
                first.get_or_insert(last);
            }
            Event::Failed(failure) => bail!(failure.message),
            Event::Finished { usage, .. } => {
                let first = first.context("no token came")?;
                let (prompt_tokens, output_tokens) = (usage.prompt_tokens, usage.output_tokens);
                return Ok(Timed { prompt_tokens, output_tokens, sent, first, last });
            }
        }
    }
}

async fn there(weir: &Weir, model: &str, prompt: String, most: u32) -> anyhow::Result<Timed> {
    let options = Options {
        model: Some(model.to_owned()),
        max_tokens: Some(most),
        temperature: Some(0.0),
        ..Options::default()
    };
    let sent = Instant::now();
    let mut answer = weir.complete(prompt, options)?;
    let (mut first, mut last) = (None, sent);
    loop {
        match answer.next().await.context("the answer has no end")?? {
            Piece::Text(_) => {
                last = Instant::now();
                first.get_or_insert(last);
            }
            Piece::End(end) => {
                let first = first.context("no text came")?;
                if end.usage.output_tokens == 0 {
                    bail!("the server doesn't say how many tokens it made (`usage` in the last event)");
                }
                let (prompt_tokens, output_tokens) = (end.usage.prompt_tokens, end.usage.output_tokens);
                return Ok(Timed { prompt_tokens, output_tokens, sent, first, last });
            }
        }
    }
}
