//! `weir bench`
mod machine;
mod subject;

use super::output::{note, table};
use super::speaker::{Drafts, device_options, start};
use crate::config::Config;
use crate::driver::{ModelSource, ModelSpec};
use anyhow::Context;
use machine::Machine;
use serde_json::{Value, json};
use std::io::{Write, stdout};
use std::path::Path;
use std::sync::Arc;
use subject::{Subject, Timed};
use weir_backends::engine::Speculation;
use weir_backends::gguf::ModelFile;
use weir_backends::models;
use weir_backends::store::human;

/// Words of 8 bytes that each thread reads for [`memory_bandwidth`].
const GLANCE_WORDS: usize = 4 << 20;

/// Bytes a second that this machine reads from memory, at a glance: it takes some 50 ms. All processors read where no
/// number of threads is given.
pub(super) fn memory_bandwidth(threads: Option<usize>) -> u64 {
    let threads = threads.or_else(|| std::thread::available_parallelism().ok().map(usize::from));
    machine::bandwidth(threads.unwrap_or(1), GLANCE_WORDS) as u64
}

/// Measure tokens a second, and what share of this machine's memory bandwidth that is
#[derive(clap::Args)]
#[command(after_help = "\
Prompts are random words, new for each run, so no cache helps. Figures are medians. `share` is the bytes of weights
read for a token, times tokens a second, over the read bandwidth measured in the same run. `ceiling` is what decoding
could reach if only memory and barriers cost: 1 / (bytes / (0.92 bandwidth) + steps * barrier).

Examples:
  weir bench
  weir bench --model smollm2-135m --model qwen2.5-coder-0.5b --streams 8
  weir bench --model big.gguf --draft small.gguf     small guesses, big decides
  weir bench --vs http://127.0.0.1:8080      an OpenAI-compatible server, in turns with ours")]
pub(super) struct Bench {
    /// A catalog name or a path to a .gguf; may be given several times
    #[arg(short, long, value_name = "MODEL")]
    model: Vec<String>,
    #[command(flatten)]
    draft: Drafts,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_tokens: u32,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    output_tokens: u32,
    /// Requests at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    streams: u32,
    /// Runs that count, after one that doesn't
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Measure this OpenAI-compatible server too
    #[arg(long, value_name = "URL")]
    vs: Option<String>,
    /// Its key
    #[arg(long, value_name = "KEY", requires = "vs")]
    key: Option<String>,
    /// Guess tokens where text repeats itself; otherwise each is computed in a step of its own
    #[arg(long)]
    speculation: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Medians over runs.
#[derive(Clone, Debug, Default)]
struct Figures {
    ttft_ms: f64,
    prefill_tok_s: f64,
    /// One stream's.
    decode_tok_s: f64,
    /// All streams', from the first token of any to the last of all.
    total_tok_s: f64,
}

/// What is known of a model besides its figures.
struct Weights {
    /// Bytes read for a token.
    bytes: u64,
    /// Fused steps for a token.
    steps: usize,
}

impl Bench {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let names = match self.model.as_slice() {
            [] => vec![None],
            named => named.iter().map(|n| Some(n.as_str())).collect(),
        };
        let models = self.draft.find(config, &names)?;
        let threads = config.threads.or_else(|| std::thread::available_parallelism().ok().map(usize::from));
        note("measuring the memory's bandwidth");
        let machine = Machine::measure(threads.unwrap_or(1));
        let runtime = super::runtime()?;
        let mut results = Vec::new();
        for model in models {
            results.push(runtime.block_on(self.model(config, model, &machine))?);
        }
        let mut out = stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&self.report(config, &machine, results))?)?;
            return Ok(());
        }
        writeln!(
            out,
            "{} threads, {:.1} GB/s read, barrier {:.2} us; {} prompt and {} output tokens, {} at once, median of {}",
            machine.threads,
            machine.bandwidth / 1e9,
            machine.sync.as_secs_f64() * 1e6,
            self.prompt_tokens,
            self.output_tokens,
            self.streams,
            self.runs,
        )?;
        let head =
            ["MODEL", "WEIGHTS", "FIRST TOKEN", "PREFILL", "DECODE", "ALL STREAMS", "SHARE", "CEILING"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(results.iter().flat_map(rows_of));
        table(&mut out, &rows)?;
        Ok(())
    }

    /// Measures one model and, in turns with it, the peer.
    async fn model(&self, config: &Config, spec: ModelSpec, machine: &Machine) -> anyhow::Result<Value> {
        let name = spec.name.clone();
        let weights = match &spec.source {
            ModelSource::File { path, .. } => Some(weights(path)?),
            _ => None,
        };
        let mut device = device_options(config);
        device.slots = Some(self.streams.max(1));
        device.speculation =
            if self.speculation || !self.draft.is_empty() { Speculation::Auto } else { Speculation::Off };
        let driver = start(vec![spec], device).await?;
        let model = driver.model(&name).context("the driver lost the model")?;
        let mut subjects = vec![Arc::new(Subject::Here { driver: driver.clone(), model: model.clone() })];
        if let Some(url) = &self.vs {
            subjects.push(Arc::new(Subject::there(url, self.key.clone(), &name).await?));
        }
        let mut runs: Vec<Vec<Vec<Timed>>> = vec![Vec::new(); subjects.len()];
        let mut seed = u64::from(std::process::id());
        for run in 0..=self.runs {
            note(&format!("{name}: run {run} of {}", self.runs));
            for (subject, runs) in subjects.iter().zip(&mut runs) {
                let mut under_way = Vec::new();
                for _ in 0..self.streams {
                    seed += 1;
                    let prompt = Subject::prompt(&model, self.prompt_tokens, seed);
                    let (subject, most) = (subject.clone(), self.output_tokens);
                    under_way.push(tokio::spawn(async move { subject.run(prompt, most).await }));
                }
                let mut timed = Vec::new();
                for task in under_way {
                    timed.push(task.await??);
                }
                // the first run warms up
                if run > 0 {
                    runs.push(timed);
                }
            }
        }
        driver.shutdown().await;
        let all: Vec<Figures> = runs.iter().map(|runs| figures(runs)).collect();
        // another device's memory isn't what was measured
        let machine = device.on_processor().then_some(machine);
        Ok(result(&name, weights.as_ref(), machine, self.streams, &all))
    }

    fn report(&self, config: &Config, machine: &Machine, results: Vec<Value>) -> Value {
        json!({
            "device": String::from(config.device),
            "threads": machine.threads,
            "read_bandwidth_gb_s": machine.bandwidth / 1e9,
            "barrier_us": machine.sync.as_secs_f64() * 1e6,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "streams": self.streams,
            "runs": self.runs,
            "models": results,
        })
    }
}

fn weights(path: &Path) -> anyhow::Result<Weights> {
    let file = ModelFile::open(path)?;
    let plan = models::plan(&file)?;
    // of an embedding that isn't the output matrix too, a token reads one row
    let tied = plan.embed.table == plan.head.linear.weight;
    let table = file.tensor(&plan.embed.table).map_or(0, |t| t.bytes);
    let bytes = file.total_bytes() - if tied { 0 } else { table };
    Ok(Weights { bytes, steps: plan.layers.iter().map(Vec::len).sum::<usize>() + 2 })
}

/// Medians over runs and their streams.
fn figures(runs: &[Vec<Timed>]) -> Figures {
    let each = |f: &dyn Fn(&Timed) -> Option<f64>| {
        let mut values: Vec<f64> = runs.iter().flatten().filter_map(f).collect();
        median(&mut values)
    };
    let total = |run: &Vec<Timed>| {
        let first = run.iter().map(|t| t.first).min()?;
        let last = run.iter().map(|t| t.last).max()?;
        let tokens: u32 = run.iter().map(|t| t.output_tokens).sum();
        Some(f64::from(tokens.saturating_sub(1)) / (last - first).as_secs_f64())
    };
    let mut totals: Vec<f64> = runs.iter().filter_map(total).collect();
    Figures {
        ttft_ms: each(&|t| Some(t.ttft().as_secs_f64() * 1e3)),
        prefill_tok_s: each(&|t| Some(t.prefill_rate())),
        decode_tok_s: each(&Timed::decode_rate),
        total_tok_s: median(&mut totals),
    }
}

fn result(
    name: &str,
    weights: Option<&Weights>,
    machine: Option<&Machine>,
    streams: u32,
    all: &[Figures],
) -> Value {
    let as_json = |f: &Figures| {
        json!({
            "ttft_ms": f.ttft_ms,
            "prefill_tok_s": f.prefill_tok_s,
            "decode_tok_s": f.decode_tok_s,
            "total_tok_s": f.total_tok_s,
        })
    };
    let Some((ours, peers)) = all.split_first() else { return Value::Null };
    let mut value = json!({ "model": name, "weir": as_json(ours) });
    if let Some(weights) = weights {
        value["weight_bytes"] = json!(weights.bytes);
        value["steps"] = json!(weights.steps);
    }
    if let Some((weights, machine)) = weights.zip(machine) {
        value["ceiling_tok_s"] = json!(1.0 / machine.roofline(weights.bytes, weights.steps));
        // several streams share what is read
        let reads = if streams == 1 { ours.decode_tok_s } else { f64::NAN };
        value["bandwidth_share"] = json!(weights.bytes as f64 * reads / machine.bandwidth);
    }
    if let Some(peer) = peers.first() {
        value["peer"] = as_json(peer);
        value["decode_ratio"] = json!(ours.total_tok_s / peer.total_tok_s);
        value["prefill_ratio"] = json!(ours.prefill_tok_s / peer.prefill_tok_s);
    }
    value
}

/// Ours and, below it, the peer's.
fn rows_of(result: &Value) -> Vec<Vec<String>> {
    let number = |v: &Value, digits: usize, unit: &str| match v.as_f64() {
        Some(x) => format!("{x:.digits$}{unit}"),
        None => "-".to_owned(),
    };
    let figures = |f: &Value| {
        [
            number(&f["ttft_ms"], 1, " ms"),
            number(&f["prefill_tok_s"], 0, " tok/s"),
            number(&f["decode_tok_s"], 1, " tok/s"),
            number(&f["total_tok_s"], 1, " tok/s"),
        ]
    };
    let name = result["model"].as_str().unwrap_or_default();
    let mut ours = vec![name.to_owned(), result["weight_bytes"].as_u64().map_or("-".into(), human)];
    ours.extend(figures(&result["weir"]));
    let share = result["bandwidth_share"].as_f64().map(|s| json!(100.0 * s)).unwrap_or_default();
    ours.extend([number(&share, 0, "%"), number(&result["ceiling_tok_s"], 0, " tok/s")]);
    if result["peer"].is_null() {
        return vec![ours];
    }
    let mut peers = vec![format!("{name} (peer)"), String::new()];
    peers.extend(figures(&result["peer"]));
    let ratio = |name: &str, what: &str| number(&result[name], 2, &format!("x {what}"));
    peers.extend([ratio("decode_ratio", "decode"), ratio("prefill_ratio", "prefill")]);
    vec![ours, peers]
}

/// Of any order; NaN of nothing.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }

    #[test]
    fn rates_count_what_came_after_the_first_token() {
        let sent = Instant::now();
        let at = |ms| sent + Duration::from_millis(ms);
        let timed = |first, last| Timed {
            prompt_tokens: 100,
            output_tokens: 11,
            sent,
            first: at(first),
            last: at(last),
        };
        let one = figures(&[vec![timed(50, 150)]]);
        assert_eq!(
            (one.ttft_ms.round(), one.prefill_tok_s.round(), one.decode_tok_s.round()),
            (50.0, 2000.0, 100.0)
        );
        let two = figures(&[vec![timed(50, 150), timed(60, 260)]]);
        assert_eq!((two.total_tok_s.round(), two.decode_tok_s.round()), (100.0, 75.0));
    }
}
