//! `weir top`
use super::ending::asked_to_stop;
use super::output::table;
use super::serving::Serving;
use super::{Interrupted, runtime};
use crate::config::Config;
use anyhow::Context;
use console::Term;
use serde_json::Value;
use std::collections::{HashMap, VecDeque};
use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Seconds of the past that are shown.
const PAST: usize = 60;
/// What happened to nodes lately.
const NEWS_MAX: usize = 5;
/// Own screen, and back.
const OPEN: &str = "\x1b[?1049h\x1b[?25l";
const CLOSE: &str = "\x1b[?25h\x1b[?1049l";

/// Watch a running scheduler: nodes, queues, tokens a second, latencies
#[derive(clap::Args)]
#[command(after_help = "\
Shown once a second until Ctrl-C. Where standard output is no terminal, or with --once, one table is printed after two seconds.

Examples:
  weir top
  watch -n 10 weir top --once
  weir top --once --json | jq .requests")]
pub(super) struct Top {
    /// Print one table and end
    #[arg(long)]
    once: bool,
    /// As JSON, once
    #[arg(long)]
    json: bool,
    /// The scheduler's state folder
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// What was seen so far.
#[derive(Default)]
struct Seen {
    /// The newest of the events that come every second, and when.
    now: Value,
    at: Option<Instant>,
    /// Tokens of each node, by name and id, at the event before.
    tokens: HashMap<String, u64>,
    rates: HashMap<String, f64>,
    tokens_per_s: f64,
    answers_per_s: f64,
    past: VecDeque<f64>,
    news: VecDeque<String>,
    pulses: usize,
}

impl Top {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let serving = Serving::find(config, self.state.as_deref())?;
        runtime()?.block_on(async {
            let once = self.once || self.json || !stdout().is_terminal();
            let mut events = serving.events().await?;
            let mut seen = Seen::default();
            let _screen = (!once).then(Screen::open);
            let mut stop = std::pin::pin!(asked_to_stop());
            loop {
                let event = tokio::select! {
                    event = events.next() => event?.context("the scheduler has stopped")?,
                    _ = &mut stop => return Err(Interrupted.into()),
                };
                let is_pulse = event.0 == "nodes";
                seen.take(event);
                match once {
                    false => Screen::show(&seen.lines())?,
                    true if is_pulse && seen.pulses == 2 => return self.print(&seen),
                    true => {}
                }
            }
        })
    }

    fn print(&self, seen: &Seen) -> anyhow::Result<()> {
        match self.json {
            true => writeln!(stdout(), "{}", serde_json::to_string_pretty(&seen.now)?)?,
            false => seen.lines().iter().try_for_each(|line| writeln!(stdout(), "{line}"))?,
        }
        Ok(())
    }
}

/// A terminal's second screen, until it is dropped.
struct Screen;

impl Screen {
    fn open() -> Screen {
        // A terminal that doesn't take this shows it all the same.
        _ = write!(stdout(), "{OPEN}");
        Screen
    }

    fn show(lines: &[String]) -> anyhow::Result<()> {
        let (rows, columns) = Term::stdout().size();
        let mut out = String::from("\x1b[H");
        for line in lines.iter().take(usize::from(rows).saturating_sub(1)) {
            out.extend(line.chars().take(usize::from(columns)));
            out += "\x1b[K\r\n";
        }
        out += "\x1b[J";
        let mut stdout = stdout().lock();
        stdout.write_all(out.as_bytes())?;
        Ok(stdout.flush()?)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        _ = write!(stdout(), "{CLOSE}");
        _ = stdout().flush();
    }
}

impl Seen {
    fn take(&mut self, (kind, data): (String, Value)) {
        if kind != "nodes" {
            let why = data["reason"].as_str().map(|why| format!(": {}", clean(why))).unwrap_or_default();
            let drained = if data["on"] == false { " no longer" } else { "" };
            self.news.push_front(format!("{} {}{drained}{why}", text(&data["name"]), clean(&kind)));
            self.news.truncate(NEWS_MAX);
            return;
        }
        let now = Instant::now();
        let passed = self.at.map(|at| now.duration_since(at).max(Duration::from_millis(1)));
        let rate = |new: u64, old: Option<u64>| match (passed, old) {
            (Some(passed), Some(old)) => new.saturating_sub(old) as f64 / passed.as_secs_f64(),
            _ => 0.0,
        };
        let total = |value: &Value, what: &str| value["requests"][what].as_u64();
        let grown = |what: &str| rate(total(&data, what).unwrap_or(0), total(&self.now, what));
        (self.tokens_per_s, self.answers_per_s) = (grown("tokens"), grown("ended"));
        let tokens = |node: &Value| models(node).iter().filter_map(|m| m["tokens"].as_u64()).sum::<u64>();
        let counted: HashMap<String, u64> = nodes(&data).iter().map(|n| (name(n), tokens(n))).collect();
        self.rates = counted
            .iter()
            .map(|(name, n)| (name.clone(), rate(*n, self.tokens.get(name).copied())))
            .collect();
        if passed.is_some() {
            self.past.push_back(self.tokens_per_s);
            if self.past.len() > PAST {
                self.past.pop_front();
            }
        }
        (self.tokens, self.now, self.at) = (counted, data, Some(now));
        self.pulses += 1;
    }

    fn lines(&self) -> Vec<String> {
        let requests = &self.now["requests"];
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let waiting = ["interactive", "normal", "background"]
            .map(|priority| format!("{} {priority}", number(&requests["waiting"][priority])));
        let connected = nodes(&self.now).iter().filter(|n| n["state"] == "connected").count();
        let mut lines = vec![
            format!(
                "{connected} of {} nodes   {} running   waiting: {}",
                nodes(&self.now).len(),
                number(&requests["running"]),
                waiting.join(", ")
            ),
            format!(
                "{:.0} tokens/s   {:.1} answers/s   first token {}   whole answer {}",
                self.tokens_per_s,
                self.answers_per_s,
                latency(&requests["ttft_ms"]),
                latency(&requests["total_ms"])
            ),
            spark(&self.past),
            String::new(),
        ];
        let mut out = Vec::new();
        // Writing to memory doesn't fail.
        _ = table(&mut out, &self.rows());
        lines.extend(String::from_utf8_lossy(&out).lines().map(str::to_owned));
        if !self.news.is_empty() {
            lines.push(String::new());
            lines.extend(self.news.iter().cloned());
        }
        lines
    }

    /// Of all nodes, the busiest first.
    fn rows(&self) -> Vec<Vec<String>> {
        let head = ["NAME", "STATE", "RUNNING", "", "TOKENS/S", "MS/TOKEN", "HEARD", "MODELS"];
        let rate = |node: &Value| self.rates.get(&name(node)).copied().unwrap_or(0.0);
        let mut nodes: Vec<&Value> = nodes(&self.now).iter().collect();
        nodes.sort_by(|a, b| rate(b).total_cmp(&rate(a)).then_with(|| name(a).cmp(&name(b))));
        let row = |node: &&Value| {
            let sum = |field: &str| models(node).iter().filter_map(|m| m[field].as_u64()).sum::<u64>();
            let slow = models(node).iter().filter_map(|m| m["token_ms"].as_f64()).fold(0.0, f64::max);
            let names: Vec<String> = models(node).iter().map(|m| text(&m["name"])).collect();
            let guest = if node["guest"] == true { " (guest)" } else { "" };
            let state = match node["code"].as_str() {
                Some(code) => format!("asks ({})", clean(code)),
                None => format!("{}{guest}", text(&node["state"])),
            };
            let heard = node["silent_ms"].as_u64().map(|ms| format!("{:.1} s", ms as f64 / 1e3));
            vec![
                text(&node["name"]),
                state,
                format!("{}/{}", sum("running"), sum("slots")),
                bar(sum("running"), sum("slots")),
                format!("{:.0}", rate(node)),
                if slow > 0.0 { format!("{slow:.1}") } else { String::new() },
                heard.unwrap_or_default(),
                names.join(", "),
            ]
        };
        [head.map(str::to_owned).to_vec()].into_iter().chain(nodes.iter().map(row)).collect()
    }
}

fn nodes(event: &Value) -> &[Value] {
    event["nodes"].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn models(node: &Value) -> &[Value] {
    node["models"].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Nodes may share a name, but not with an id.
fn name(node: &Value) -> String {
    format!("{} {}", text(&node["name"]), node["id"].as_str().unwrap_or_default())
}

/// Fit for a terminal, whatever a node calls itself.
fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(100).collect()
}

fn text(value: &Value) -> String {
    clean(value.as_str().unwrap_or("-"))
}

fn latency(times: &Value) -> String {
    let shown = |ms: &Value| match ms.as_f64() {
        None => "-".to_owned(),
        Some(ms) if ms < 10.0 => format!("{ms:.1} ms"),
        Some(ms) if ms < 1000.0 => format!("{ms:.0} ms"),
        Some(ms) => format!("{:.1} s", ms / 1e3),
    };
    format!("p50 {}, p99 {}", shown(&times["p50"]), shown(&times["p99"]))
}

/// How full, in ten steps.
fn bar(part: u64, whole: u64) -> String {
    if whole == 0 {
        return String::new();
    }
    let full = (part.min(whole) * 10).div_ceil(whole) as usize;
    format!("{}{}", "█".repeat(full), "░".repeat(10 - full))
}

/// The past as a line, oldest first, the highest of it full.
fn spark(past: &VecDeque<f64>) -> String {
    const STEPS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = past.iter().copied().fold(1.0, f64::max);
    let step = |rate: &f64| STEPS[((rate / most * 7.0).round() as usize).min(7)];
    past.iter().map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pulse(tokens: u64) -> (String, Value) {
        let model = json!({ "name": "m", "running": 3, "slots": 16, "tokens": tokens, "token_ms": 12.34 });
        let busy = json!({ "name": "b\u{1b}[2Jad", "id": "1", "state": "connected", "silent_ms": 120, "models": [model] });
        let away = json!({ "name": "away", "id": "2", "state": "away", "models": [] });
        let asks = json!({ "name": "new", "id": "3", "state": "asking", "code": "AAAA-BBBB", "models": [] });
        let requests = json!({
            "waiting": { "interactive": 1, "normal": 0, "background": 7 }, "running": 3, "ended": 2,
            "tokens": tokens, "ttft_ms": { "p50": 3.21, "p99": 1500.0 }, "total_ms": { "p50": null, "p99": null },
        });
        ("nodes".into(), json!({ "nodes": [away, asks, busy], "requests": requests }))
    }

    #[test]
    fn what_is_shown() {
        let mut seen = Seen::default();
        seen.take(pulse(100));
        seen.at = seen.at.map(|at| at - Duration::from_secs(1));
        seen.take(pulse(150));
        seen.take(("left".into(), json!({ "name": "old", "id": "9", "reason": "it hung up" })));
        let shown = seen.lines().join("\n");
        for part in [
            "1 of 3 nodes   3 running   waiting: 1 interactive, 0 normal, 7 background",
            "50 tokens/s",
            "first token p50 3.2 ms, p99 1.5 s   whole answer p50 -, p99 -",
            "██░░░░░░░░",
            "3/16",
            "asks (AAAA-BBBB)",
            "old left: it hung up",
        ] {
            assert!(shown.contains(part), "{part:?} is not in\n{shown}");
        }
        assert!(!shown.contains('\u{1b}'), "a name moves no cursor");
        assert!(seen.rows()[1][0].contains("ad"), "the busiest is first");
        seen.take(("nodes".into(), json!(null)));
        assert!(seen.lines()[0].starts_with("0 of 0 nodes"), "whatever comes");
    }

    #[test]
    fn bars_and_lines_fit() {
        assert_eq!((bar(0, 4), bar(9, 4), bar(0, 0)), ("░".repeat(10), "█".repeat(10), String::new()));
        assert_eq!(spark(&VecDeque::from([0.0, 50.0, 100.0])), "▁▅█");
    }
}
