//! What guessing the next tokens is worth: the same requests with and without it, in turns; with and without a draft model.
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use std::path::{Path, PathBuf};
use std::time::Instant;
use weir_backends::cpu::{Cpu, CpuOptions};
use weir_backends::cuda::Cuda;
use weir_backends::engine::Speculation;
use weir_backends::gguf::GgmlType;
use weir_backends::load::{LoadOptions, Loaded, load_with_draft};
use weir_backends::program::Device;
use weir_backends::wgpu::Wgpu;
use weir_benches::requantise::requantise;
use weir_scheduler::{Event, Generate, ModelId, RequestId, Sampling};

const HELP: &str = "\
speculation [--device cpu|cuda|wgpu] [--repetitions N] [--tokens N] [--draft FILE] [--only REQUEST] [MODEL.gguf | NAME]...
speculation --copy TYPE FROM.gguf TO.gguf
NAME is looked for as NAME.gguf in the folder WEIR_TEST_MODELS (smollm2 where none is given). --only takes requests whose name begins so. With --draft that model guesses too; a
third column is without it, by what text repeats alone. --copy writes the same model with its matrices as F32, F16, BF16, Q8_0, Q5_0, Q4_1 or
Q4_0 (embedding and output matrix as Q8_0 at least): a larger one to guess for, or a smaller one that guesses";

/// What is asked: a name, the text, the temperature.
const ASKED: [(&str, &str, f32); 5] = [
    ("edit code", include_str!("../prompts/edit.txt"), 0.0),
    ("summarise", include_str!("../prompts/summary.txt"), 0.0),
    ("summarise, warm", include_str!("../prompts/summary.txt"), 0.7),
    ("tell a story", include_str!("../prompts/story.txt"), 0.0),
    ("tell it, warm", include_str!("../prompts/story.txt"), 1.0),
];

struct Options {
    device: String,
    repetitions: usize,
    tokens: u32,
    draft: Option<PathBuf>,
    only: String,
    models: Vec<String>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, ty, from, to] = &arguments[..]
        && flag == "--copy"
    {
        let known = [GgmlType::F32, GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0, GgmlType::Q5_0]
            .into_iter()
            .chain([GgmlType::Q4_1, GgmlType::Q4_0]);
        let ty = known.into_iter().find(|known| known.to_string().eq_ignore_ascii_case(ty)).context(HELP)?;
        return requantise(Path::new(from), ty, Path::new(to));
    }
    let Some(options) = parse()? else {
        println!("{HELP}");
        return Ok(());
    };
    let device: Box<dyn Device> = match options.device.as_str() {
        "cpu" => Box::new(Cpu::new(CpuOptions::default())),
        "cuda" => Box::new(Cuda::all().map_err(anyhow::Error::msg)?.into_iter().next().context("no GPU")?),
        "wgpu" => Box::new(Wgpu::new(Wgpu::find().first().context("no adapter")?)?),
        other => bail!("--device {other}: try cpu, cuda or wgpu"),
    };
    println!(
        "{}; answers of at most {} tokens, medians of {}",
        device.describe().description,
        options.tokens,
        options.repetitions
    );
    println!(
        "{:<10} {:<16} {:>7} {:>12} {:>12} {:>7} {:>9} {:>7} {:>12} {:>9} {:>7} {:>12}",
        "model",
        "request",
        "tokens",
        "plain tok/s",
        "with tok/s",
        "ratio",
        "guessed",
        "right",
        "tokens/step",
        "drafted",
        "right",
        "no draft"
    );
    for name in &options.models {
        model(&*device, name, &options).with_context(|| name.clone())?;
    }
    Ok(())
}

fn model(device: &dyn Device, name: &str, options: &Options) -> Result<()> {
    let folder = std::env::var_os("WEIR_TEST_MODELS").map(PathBuf::from).unwrap_or_default();
    let path =
        if name.ends_with(".gguf") { PathBuf::from(name) } else { folder.join(format!("{name}.gguf")) };
    let open = |speculation, draft: Option<&Path>| -> Result<Loaded> {
        let options = LoadOptions { slots: 1, context: Some(4096), speculation, ..LoadOptions::default() };
        Ok(load_with_draft(&path, Some(ModelId([0; 32])), draft, device, options)?)
    };
    let mut sides = vec![open(Speculation::Off, None)?, open(Speculation::Auto, options.draft.as_deref())?];
    if options.draft.is_some() {
        sides.push(open(Speculation::Auto, None)?);
    }
    for (request, text, temperature) in
        ASKED.iter().copied().filter(|asked| asked.0.starts_with(&options.only))
    {
        let prompt = prompt(&sides[0], text)?;
        let (mut rates, mut ids) = (vec![Vec::new(); sides.len()], vec![Vec::new(); sides.len()]);
        let before = sides[1].engine.status();
        for round in 0..=options.repetitions {
            for (side, loaded) in sides.iter().enumerate() {
                let (rate, found) = answer(loaded, &prompt, temperature, options.tokens)?;
                // The first brings the prompt into the cache, and the engine's knowledge of its own pace.
                if round > 0 {
                    rates[side].push(rate);
                }
                ids[side] = found;
            }
        }
        ensure!(ids.iter().all(|found| *found == ids[0]), "{request}: guessing changed the tokens");
        let after = sides[1].engine.status();
        let rates: Vec<f64> = rates.into_iter().map(median).collect();
        let (plain, with) = (rates[0], rates[1]);
        let (drafted, its) = (after.drafted - before.drafted, after.drafted_right - before.drafted_right);
        let lookup = rates.get(2).map_or_else(|| "-".to_owned(), |rate| format!("{:.2}", rate / plain));
        let (guessed, right) = (after.guessed - before.guessed, after.guessed_right - before.guessed_right);
        let tokens = after.tokens_generated - before.tokens_generated;
        println!(
            "{:<10} {request:<16} {:>7} {plain:>12.1} {with:>12.1} {:>7.2} {guessed:>9} {:>6.0}% {:>12.2} {drafted:>9} {:>6.0}% {lookup:>12}",
            Path::new(name).file_stem().unwrap_or_default().to_string_lossy(),
            ids[0].len(),
            with / plain,
            100.0 * right as f64 / guessed.max(1) as f64,
            tokens as f64 / (tokens - right).max(1) as f64,
            100.0 * its as f64 / drafted.max(1) as f64,
        );
    }
    Ok(())
}

fn prompt(loaded: &Loaded, text: &str) -> Result<Vec<u32>> {
    let messages = serde_json::json!([{ "role": "user", "content": text }]);
    Ok(loaded.template.prompt(&loaded.tokenizer, &messages, None)?)
}

/// Tokens a second after the first, and the tokens.
fn answer(loaded: &Loaded, prompt: &[u32], temperature: f32, tokens: u32) -> Result<(f64, Vec<u32>)> {
    let (sender, mut events) = tokio::sync::mpsc::channel(tokens as usize + 1);
    let ask = Generate {
        request: RequestId(1),
        sampling: Sampling { temperature, seed: 1, ..Sampling::default() },
        ..Generate::new(ModelId([0; 32]), prompt.to_vec(), tokens)
    };
    loaded.engine.generate(ask, sender).map_err(|failure| anyhow!(failure.message))?;
    let (mut ids, mut first) = (Vec::new(), Instant::now());
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Token(token) => {
                if ids.is_empty() {
                    first = Instant::now();
                }
                ids.push(token.id);
            }
            Event::Finished { .. } => {
                return Ok(((ids.len() - 1) as f64 / first.elapsed().as_secs_f64(), ids));
            }
            Event::Failed(failure) => bail!("{}", failure.message),
        }
    }
    bail!("the engine went silent")
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or_default()
}

fn parse() -> Result<Option<Options>> {
    let mut options = Options {
        device: "cpu".into(),
        repetitions: 5,
        tokens: 256,
        draft: None,
        only: String::new(),
        models: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} wants a value"));
        match argument.as_str() {
            "--help" | "-h" => return Ok(None),
            "--device" => options.device = value()?,
            "--repetitions" => options.repetitions = value()?.parse()?,
            "--only" => options.only = value()?,
            "--draft" => options.draft = Some(value()?.into()),
            "--tokens" => options.tokens = value()?.parse()?,
            flag if flag.starts_with('-') => bail!("{flag} is not known\n{HELP}"),
            _ => options.models.push(argument),
        }
    }
    if options.models.is_empty() {
        options.models.push("smollm2".into());
    }
    Ok(Some(options))
}
