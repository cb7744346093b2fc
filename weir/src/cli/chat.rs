//! `weir chat`: one answer. Conversations are in [`super::session`].
use super::ending::Heed;
use super::output::note;
use super::speaker::{Reply, Speaker, Wishes};
use super::{Interrupted, session};
use crate::config::Config;
use anyhow::{Context, bail};
use std::borrow::Cow;
use std::io::{self, IsTerminal, Read, Write};
use std::time::{Duration, Instant};
use weir_client::{End, Finish, Message, Piece};

/// Bytes of standard input that are taken as part of a prompt.
const INPUT_BYTES_MAX: u64 = 8 << 20;

/// What runs on after the last answer is of no interest for longer than this.
const LINGER: Duration = Duration::from_millis(200);

/// Ask a model: one answer, or a conversation
#[derive(clap::Args)]
#[command(after_help = "\
Without a prompt, on a terminal, it is a conversation: /help there lists its commands. The answer goes to standard
output as it comes. Ctrl-C stops it.

Examples:
  weir chat \"Why is the sky blue?\"
  weir chat --model qwen2.5-coder-0.5b --temperature 0 \"Reverse a string in Rust\"
  cat notes.txt | weir chat \"Summarise this\"
  weir chat --model ./own.gguf
  weir chat --model big.gguf --draft small.gguf \"Tell me more\"
  weir chat --url http://127.0.0.1:8484 \"Hello\"     asks a gateway; nothing runs here")]
pub(super) struct Chat {
    /// A catalog name or a path to a .gguf; with --url, a name that the gateway knows
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// A smaller model of the same tokenizer: what it guesses is checked by the other in one step, and the answer is the
    /// same. Whether it pays is found out, and where it doesn't it rests
    #[arg(long, value_name = "MODEL", conflicts_with = "url")]
    draft: Option<String>,
    /// Ask this OpenAI-compatible gateway
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The gateway's key
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// How adventurous: 0 always takes the likeliest token
    #[arg(long, value_name = "T", value_parser = temperature)]
    temperature: Option<f32>,
    /// Only the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", value_parser = top_p)]
    top_p: Option<f32>,
    /// Same seed, same answer
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Instructions for the whole conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// What to ask; standard input, if it isn't a terminal, is added
    #[arg(value_name = "PROMPT")]
    prompt: Vec<String>,
}

fn temperature(text: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=100.0).contains(&value) { Ok(value) } else { Err("must be in 0..=100".into()) }
}

fn top_p(text: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| "not a number".to_owned())?;
    if value > 0.0 && value <= 1.0 { Ok(value) } else { Err("must be above 0 and at most 1".into()) }
}

impl Chat {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let prompt = self.prompt()?;
        let runtime = super::runtime()?;
        let url = self.url.as_deref().or(config.url.as_deref());
        let speaker = match url {
            Some(url) => {
                let key = self.key.clone().or_else(|| config.key.clone());
                Speaker::there(url, key, self.model.clone().or_else(|| config.model.clone()))
            }
            None => runtime.block_on(Speaker::here(config, self.model.as_deref(), self.draft.clone()))?,
        };
        let wishes = Wishes {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed,
        };
        let mut messages: Vec<Message> = self.system.map(Message::system).into_iter().collect();
        let Some(prompt) = prompt else {
            let outcome = session::run(config, &runtime, speaker, messages, &wishes);
            runtime.shutdown_timeout(LINGER);
            return outcome;
        };
        messages.push(Message::user(prompt));
        let outcome = runtime.block_on(async {
            let reply = speaker.ask(&messages, &wishes).await?;
            show(reply).await
        });
        runtime.shutdown_timeout(LINGER);
        let shown = outcome?;
        shown.remark();
        if shown.end.is_none() { Err(Interrupted.into()) } else { Ok(()) }
    }

    /// The argument and standard input; none for a conversation.
    fn prompt(&self) -> anyhow::Result<Option<String>> {
        let mut prompt = self.prompt.join(" ");
        if !io::stdin().is_terminal() {
            let mut piped = Vec::new();
            io::stdin().lock().take(INPUT_BYTES_MAX + 1).read_to_end(&mut piped).context("standard input")?;
            if piped.len() as u64 > INPUT_BYTES_MAX {
                bail!("standard input has more than {} MiB", INPUT_BYTES_MAX >> 20);
            }
            let piped = String::from_utf8(piped).context("standard input is not text")?;
            let both = !prompt.is_empty() && !piped.trim().is_empty();
            prompt = format!("{prompt}{}{}", if both { "\n\n" } else { "" }, piped.trim_end());
            if prompt.trim().is_empty() {
                bail!("nothing to ask: give a prompt, or pipe one in");
            }
        }
        Ok(Some(prompt).filter(|p| !p.trim().is_empty()))
    }
}

/// An answer that was printed.
pub(super) struct Shown {
    pub(super) text: String,
    /// None if it was interrupted.
    pub(super) end: Option<End>,
    /// From the question to the first text.
    first: Option<Duration>,
    /// From the first text to the last.
    flowing: Duration,
}

impl Shown {
    /// Says, on a terminal, what it took; and anywhere, that it is cut off.
    pub(super) fn remark(&self) {
        let Some(end) = &self.end else { return };
        let mut parts = Vec::new();
        let tokens = end.usage.output_tokens;
        if tokens > 0 {
            parts.push(format!("{tokens} tokens"));
        }
        if tokens > 1 && !self.flowing.is_zero() {
            parts.push(format!("{:.0} tokens/s", f64::from(tokens - 1) / self.flowing.as_secs_f64()));
        }
        if let Some(first) = self.first {
            parts.push(format!("first after {:.0} ms", first.as_secs_f64() * 1e3));
        }
        match &end.finish {
            Finish::Stop => {}
            Finish::Length => parts.push("cut off at the limit".into()),
            Finish::Other(why) => parts.push(format!("ended: {why}")),
            _ => {}
        }
        note(&format!("[{}]", parts.join(", ")));
    }
}

/// Text for a terminal: a model's words must not move its cursor, set its title or fill its clipboard.
fn printable(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
    match text.contains(steers) {
        true => text.replace(steers, "\u{fffd}").into(),
        false => text.into(),
    }
}

/// Prints an answer as it comes, until its end or Ctrl-C.
pub(super) async fn show(mut reply: Reply) -> anyhow::Result<Shown> {
    let asked = Instant::now();
    let mut shown = Shown { text: String::new(), end: None, first: None, flowing: Duration::ZERO };
    let _heed = Heed::new();
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    let outcome = loop {
        let piece = tokio::select! {
            biased;
            _ = &mut interrupted => break Ok(()),
            piece = reply.next() => piece,
        };
        match piece {
            Ok(Piece::Text(text)) => {
                let since = asked.elapsed();
                shown.flowing = since - *shown.first.get_or_insert(since);
                let mut out = io::stdout().lock();
                match out.is_terminal() {
                    true => out.write_all(printable(&text).as_bytes())?,
                    false => out.write_all(text.as_bytes())?,
                }
                out.flush()?;
                shown.text += &text;
            }
            Ok(Piece::End(end)) => {
                shown.end = Some(end);
                break Ok(());
            }
            Err(error) => break Err(error),
        }
    };
    if !shown.text.is_empty() && !shown.text.ends_with('\n') {
        writeln!(io::stdout())?;
    }
    outcome.map(|()| shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_steered() {
        assert_eq!(printable("größe\t1\n"), "größe\t1\n");
        assert_eq!(printable("a\u{1b}[2Jb\r\u{9b}c\u{7}"), "a\u{fffd}[2Jb\u{fffd}\u{fffd}c\u{fffd}");
    }
}
