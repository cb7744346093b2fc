//! Side by side with llama.cpp: the same files, the same threads, interleaved in one run.
//!
//! Each repetition measures the machine's ceilings, then, for each workload, our side and the peer's in turn, the one
//! that begins alternating. Figures are medians.
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;
use weir_backends::cpu::{Cpu, CpuOptions};
use weir_backends::program::{Device, StepTime};
use weir_benches::machine::{self, Ceilings, Machine};
use weir_benches::ours::{Model, Ours, ThroughEngine};
use weir_benches::report::{self, Row};
use weir_benches::roofline::Cost;
use weir_benches::workload::{Side, Workload};

const HELP: &str = "\
bench cpu [--model NAME|PATH]... [--repetitions N] [--threads N] [--device cpu|reference]
          [--only decode|prefill|streams]... [--no-peer] [--profile] [--json]
models default to smollm2, gemma3 and qwen2; a name is looked for as NAME.gguf in the folder WEIR_TEST_MODELS";

/// What the command line asks for.
struct Options {
    models: Vec<String>,
    repetitions: usize,
    threads: usize,
    device: String,
    workloads: Vec<Workload>,
    peer: bool,
    profile: bool,
    json: bool,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(options) = parse(&arguments)? else {
        println!("{HELP}");
        return Ok(());
    };
    let bench =
        Bench { machine: Machine::new(options.threads), ceilings: Vec::new(), rows: Vec::new(), options };
    bench.run()
}

fn parse(arguments: &[String]) -> Result<Option<Options>> {
    let mut options = Options {
        models: Vec::new(),
        repetitions: 5,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        device: "cpu".into(),
        workloads: Vec::new(),
        peer: cfg!(feature = "peers"),
        profile: false,
        json: false,
    };
    let mut words = arguments.iter().map(String::as_str);
    if words.next() != Some("cpu") {
        return Ok(None);
    }
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value\n{HELP}"));
        match word {
            "--model" => options.models.push(value()?.into()),
            "--repetitions" => options.repetitions = value()?.parse()?,
            "--threads" => options.threads = value()?.parse()?,
            "--device" => options.device = value()?.into(),
            "--only" => options.workloads.push(match value()? {
                "decode" => Workload::Decode,
                "prefill" => Workload::Prefill,
                "streams" => Workload::Streams,
                other => bail!("no workload {other}\n{HELP}"),
            }),
            "--no-peer" => options.peer = false,
            "--profile" => options.profile = true,
            "--json" => options.json = true,
            "--help" | "-h" => return Ok(None),
            other => bail!("unknown: {other}\n{HELP}"),
        }
    }
    if options.models.is_empty() {
        options.models = ["smollm2", "gemma3", "qwen2"].map(String::from).to_vec();
    }
    if options.workloads.is_empty() {
        options.workloads = Workload::ALL.to_vec();
    }
    Ok(Some(options))
}

/// `NAME` as a file of the folder of test models, anything else as a path.
fn find(model: &str) -> PathBuf {
    match std::env::var_os("WEIR_TEST_MODELS") {
        Some(folder) if !model.ends_with(".gguf") => Path::new(&folder).join(format!("{model}.gguf")),
        _ => model.into(),
    }
}

fn device(name: &str, threads: usize) -> Result<Box<dyn Device>> {
    match name {
        "reference" => Ok(Box::new(weir_backends::reference::Reference { threads, ..Default::default() })),
        "cpu" => Ok(Box::new(Cpu::new(CpuOptions { threads: Some(threads), ..Default::default() }))),
        other => bail!("no device {other}; there are cpu and reference"),
    }
}

struct Bench {
    options: Options,
    machine: Machine,
    ceilings: Vec<Ceilings>,
    rows: Vec<Row>,
}

impl Bench {
    fn run(mut self) -> Result<()> {
        let load_before = machine::load();
        let device = device(&self.options.device, self.options.threads)?;
        for name in self.options.models.clone() {
            let path = find(&name);
            let model = Model::open(&path).with_context(|| path.display().to_string())?;
            let cost = Cost::of(&model.file, &model.plan)?;
            let sides = (Ours::new(device.as_ref(), &model)?, ThroughEngine::new(device.as_ref(), &model)?);
            let first = self.rows.len();
            for &workload in &self.options.workloads {
                let model = name.clone();
                self.rows.push(Row { model, workload, cost, ours: vec![], engine: vec![], peer: vec![] });
            }
            self.sides(&path, sides, first)?;
        }
        self.print(device.as_ref(), load_before);
        Ok(())
    }

    /// Our side on a thread of its own, so that whatever our device pins leaves the peer's threads alone.
    fn sides(&mut self, path: &Path, sides: (Ours, ThroughEngine), first: usize) -> Result<()> {
        let (mut ours, mut engine) = sides;
        let profile = self.options.profile;
        let (ask, asked) = mpsc::channel();
        let (answer, answered) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for (seam, workload) in asked {
                    let figure = match seam {
                        Seam::Program if profile => profiled(&mut ours, workload),
                        Seam::Program => ours.run(workload),
                        Seam::Engine => engine.run(workload),
                    };
                    if answer.send(figure).is_err() {
                        return;
                    }
                }
            });
            let mut run = move |seam, workload| -> Result<f64> {
                ask.send((seam, workload))?;
                answered.recv()?
            };
            self.with_peer(path, first, &mut run)
        })
    }

    #[cfg(feature = "peers")]
    fn with_peer(&mut self, path: &Path, first: usize, ours: OnOurs<'_>) -> Result<()> {
        use weir_benches::peer::{Peer, PeerSide};
        if !self.options.peer {
            return self.repeat(first, ours, None);
        }
        let peer = Peer::start()?;
        eprintln!("llama.cpp: {}", peer.system_info());
        let model = peer.load(path)?;
        let mut side = PeerSide::new(&model, self.options.threads)?;
        self.repeat(first, ours, Some(&mut |workload| side.run(workload)))
    }

    #[cfg(not(feature = "peers"))]
    fn with_peer(&mut self, _: &Path, first: usize, ours: OnOurs<'_>) -> Result<()> {
        if self.options.peer {
            bail!("built without the feature `peers`");
        }
        self.repeat(first, ours, None)
    }

    fn repeat(&mut self, first: usize, ours: OnOurs<'_>, mut peer: Option<Run<'_>>) -> Result<()> {
        // Repetition 0 warms up caches, pages and clocks.
        for repetition in 0..=self.options.repetitions {
            let ceilings = self.machine.measure();
            for row in &mut self.rows[first..] {
                let mut timed = [None; 3];
                for turn in 0..timed.len() {
                    // Threads of the side before may still be spinning.
                    std::thread::sleep(Duration::from_millis(30));
                    let side = (repetition + turn) % timed.len();
                    timed[side] = match side {
                        0 => Some(ours(Seam::Program, row.workload)?),
                        1 => Some(ours(Seam::Engine, row.workload)?),
                        _ => peer.as_mut().map(|peer| peer(row.workload)).transpose()?,
                    };
                }
                if repetition > 0 {
                    row.ours.extend(timed[0]);
                    row.engine.extend(timed[1]);
                    row.peer.extend(timed[2]);
                    let [ours, engine, peer] = timed.map(Option::unwrap_or_default);
                    eprintln!("{} {}: {ours:.1} {engine:.1} {peer:.1}", row.model, row.workload.name());
                }
            }
            if repetition > 0 {
                self.ceilings.push(ceilings);
            }
        }
        Ok(())
    }

    fn print(&self, device: &dyn Device, load_before: Option<f64>) {
        let ceilings = report::typical(&self.ceilings);
        let load = (load_before, machine::load());
        let threads = self.options.threads;
        if self.options.json {
            println!("{}", report::json(&self.rows, &ceilings, threads, load));
            return;
        }
        let shown = |load: Option<f64>| load.map_or("unknown".into(), |load| format!("{load:.2}"));
        println!("{}; {} ({})", machine::processor(), device.describe().description, device.describe().name);
        println!(
            "{threads} threads on both sides; load average before {}, after {}; medians of {} interleaved repetitions",
            shown(load.0),
            shown(load.1),
            self.options.repetitions
        );
        println!(
            "ceilings in this run: {:.1} GB/s read, {:.2} us a barrier, {:.2} TOP/s of int8 products",
            ceilings.read_bytes_per_s / 1e9,
            ceilings.sync_s * 1e6,
            ceilings.int8_ops_per_s / 1e12
        );
        if load.0.is_some_and(|load| load > 0.5) {
            println!(
                "NOT QUIET: something else was running before, and a busy core costs llama.cpp's spinning threads more \
                 than ours; don't quote these figures"
            );
        }
        println!("{}", report::table(&self.rows, &ceilings));
        println!(
            "Ours chooses each token by its logits; llama.cpp is given it, as llama-bench does. share: of read \
             bandwidth (decode) or of the int8 peak (prefill, streams).\nroofline: weight_bytes / (0.92 * bandwidth) + \
             steps * barrier a step, and the int8 peak where that is less."
        );
    }
}

/// Runs a workload and shows the time of each kind of fused step in it.
fn profiled(ours: &mut Ours, workload: Workload) -> Result<f64> {
    let before = ours.profile();
    let figure = ours.run(workload);
    eprintln!("  {}: step, count, us each, GB/s", workload.name());
    for step in ours.profile() {
        let earlier = before.iter().find(|earlier| earlier.name == step.name);
        let since = |of: fn(&StepTime) -> u64| of(&step) - earlier.map_or(0, of);
        let (count, nanos, bytes) =
            (since(|s| s.count), since(|s| s.nanos) as f64, since(|s| s.bytes) as f64);
        if count > 0 {
            eprintln!(
                "    {:<22} {count:>7} {:>9.1} {:>6.1}",
                step.name,
                nanos / count as f64 / 1e3,
                bytes / nanos
            );
        }
    }
    figure
}

/// Where our side is entered.
enum Seam {
    /// A program, directly.
    Program,
    /// The engine in front of one.
    Engine,
}

/// Runs a workload once on our side.
type OnOurs<'a> = &'a mut dyn FnMut(Seam, Workload) -> Result<f64>;

/// Runs a workload once.
type Run<'a> = &'a mut dyn FnMut(Workload) -> Result<f64>;
