//! What a GPU makes of a model through wgpu: tokens a second, beside what its bandwidth and its dispatches allow.
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::time::Instant;
use weir_backends::program::{Device, StepTime};
use weir_backends::wgpu::{Found, Wgpu};
use weir_benches::ours::{Model, Ours};
use weir_benches::roofline::Cost;
use weir_benches::shapes;
use weir_benches::workload::{Side, Workload};

const HELP: &str = "\
wgpu [--adapter PART] [--repetitions N] [--profile] [MODEL.gguf | SHAPE | NAME]...
SHAPE (1b-q8_0) has random weights: 135m, 0.6b, 1b or 8b, and q4_0, q4_1, q8_0, q4_k_m or bf16; NAME is looked for as NAME.gguf in the folder WEIR_TEST_MODELS (smollm2 where none is given); PART is a part of an adapter's
description (the fastest kind where none is given); --profile also measures each fused step, by the GPU's clock, in runs of its own";

struct Options {
    adapter: String,
    repetitions: usize,
    profile: bool,
    models: Vec<String>,
}

fn main() -> Result<()> {
    let Some(options) = parse()? else {
        println!("{HELP}");
        return Ok(());
    };
    let all = Wgpu::find();
    let fits = |found: &&Found| found.description.contains(&options.adapter);
    let found = all.iter().find(fits).context("no such adapter")?;
    let gpu = Wgpu::new(found)?;
    let (read, dispatch) = (gpu.read_bytes_per_s()?, gpu.dispatch_s()?);
    println!("{}", gpu.describe().description);
    println!("reads {:.0} GB/s, a dependent dispatch {:.2} us", read / 1e9, dispatch * 1e6);
    println!("medians of {}", options.repetitions);
    let timed = Wgpu::new(found)?.with_profile(true);
    for name in &options.models {
        let model = match shapes::model(name) {
            Some(file) => Model::of(file?)?,
            None => Model::open(&find(name))?,
        };
        run(&gpu, (name, &model), &options, read, dispatch).with_context(|| name.clone())?;
        if options.profile {
            profile(&timed, &model).with_context(|| name.clone())?;
        }
    }
    Ok(())
}

fn parse() -> Result<Option<Options>> {
    let mut options = Options { adapter: String::new(), repetitions: 5, profile: false, models: Vec::new() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value\n{HELP}"));
        match word.as_str() {
            "--adapter" => options.adapter = value()?,
            "--repetitions" => options.repetitions = value()?.parse::<usize>()?.max(1),
            "--profile" => options.profile = true,
            "--help" | "-h" => return Ok(None),
            flag if flag.starts_with('-') => bail!("unknown: {flag}\n{HELP}"),
            model => options.models.push(model.into()),
        }
    }
    if options.models.is_empty() {
        options.models.push("smollm2".into());
    }
    Ok(Some(options))
}

fn find(model: &str) -> PathBuf {
    match std::env::var_os("WEIR_TEST_MODELS") {
        Some(folder) if !model.ends_with(".gguf") => Path::new(&folder).join(format!("{model}.gguf")),
        _ => model.into(),
    }
}

fn run(gpu: &Wgpu, (name, model): (&str, &Model), options: &Options, read: f64, dispatch: f64) -> Result<()> {
    let cost = Cost::of(&model.file, &model.plan)?;
    let began = Instant::now();
    let mut ours = Ours::new(gpu, model)?;
    let bytes = cost.weight_bytes as f64;
    println!("{name}: {:.2} GB a token, loaded in {:.2?}", bytes / 1e9, began.elapsed());
    for workload in Workload::ALL {
        ours.run(workload)?;
        let mut figures =
            (0..options.repetitions).map(|_| ours.run(workload)).collect::<Result<Vec<f64>>>()?;
        figures.sort_by(f64::total_cmp);
        let figure = figures[figures.len() / 2];
        print!("{name}: {:<12} {figure:>9.1} tok/s", workload.name());
        if workload == Workload::Decode {
            let dispatches = ours.dispatches_of_a_token()?;
            let least = bytes / (0.92 * read) + dispatches as f64 * dispatch;
            print!(
                ", {:.0}% of bandwidth, {dispatches} dispatches a token, roofline {:.0}",
                100.0 * figure * bytes / read,
                1.0 / least
            );
        }
        println!();
    }
    Ok(())
}

/// Where the time of each workload goes, on a device that reads its clock between dispatches.
fn profile(timed: &Wgpu, model: &Model) -> Result<()> {
    let mut ours = Ours::new(timed, model)?;
    for workload in Workload::ALL {
        ours.run(workload)?;
        let before = ours.profile();
        let figure = ours.run(workload)?;
        println!("  {:<12} {figure:>9.1} tok/s, timed:", workload.name());
        report(&before, &ours.profile());
    }
    Ok(())
}

/// Time in each kind of fused step between two profiles.
fn report(before: &[StepTime], after: &[StepTime]) {
    for now in after {
        let earlier = before.iter().find(|step| step.name == now.name);
        let since = |of: fn(&StepTime) -> u64| of(now) - earlier.map_or(0, of);
        let (count, nanos, bytes) =
            (since(|s| s.count), since(|s| s.nanos) as f64, since(|s| s.bytes) as f64);
        if count > 0 {
            let bytes = if nanos > 0.0 { bytes / nanos } else { 0.0 };
            let each = nanos / count as f64 / 1e3;
            println!("    {:<22} {count:>7} x {each:>8.2} us {bytes:>7.0} GB/s", now.name);
        }
    }
}
