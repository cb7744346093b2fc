//! What the way through a gateway costs, beside a peer that does the same job, under the same load, in the same run.
//!
//! Both get the same chat request for one token. The peer's upstream answers at once; our nodes have the null device, whose
//! steps cost nothing, and are reached over QUIC. Upstream and nodes are in this process, as is the load tool. What is
//! printed as added is the time through the gateway less the time straight to the upstream.
use anyhow::{Context as _, Result, bail, ensure};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use weir_backends::load::LoadOptions;
use weir_backends::null::Null;
use weir_benches::gateways::{
    CONNECTIONS, Figures, Gateway, UP, free, print_table, ready, resident_bytes, started,
};
use weir_benches::load;
use weir_node::{Credentials, Machine, Resident, Stock, Worker};
use weir_transport::{Dialer, Identity, JoinLink};

const HELP: &str = "\
gateway --weir PROGRAM [--peer PROGRAM] [--rounds N] [--requests N] [--streams N] [--only latency|memory|streams]
PROGRAM is a release build of weir; the peer is smg";

/// Requests after which memory is read.
const MANY: usize = 100_000;
/// Streamed tokens a second that must be held, and for how many tokens.
const TOKENS_PER_S: f64 = 50.0;
const TOKENS: usize = 1000;
/// A step of the nodes that stream: a little faster than what must be held, since a step takes a little more.
const STEP: Duration = Duration::from_micros(18_500);

struct Options {
    weir: PathBuf,
    peer: Option<PathBuf>,
    rounds: usize,
    requests: usize,
    streams: usize,
    only: Option<String>,
}

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let mut options =
        Options { weir: PathBuf::new(), peer: None, rounds: 5, requests: 20_000, streams: 512, only: None };
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--weir" => options.weir = value()?.into(),
            "--peer" => options.peer = Some(value()?.into()),
            "--rounds" => options.rounds = value()?.parse()?,
            "--requests" => options.requests = value()?.parse()?,
            "--streams" => options.streams = value()?.parse()?,
            "--only" => options.only = Some(value()?),
            _ => {
                println!("{HELP}");
                return Ok(());
            }
        }
    }
    ensure!(options.weir.is_file(), "{HELP}");
    // It is started in a folder of its own.
    options.weir = options.weir.canonicalize()?;
    let wanted = |part: &str| options.only.as_deref().is_none_or(|only| only == part);
    let mut missed = Vec::new();
    if wanted("latency") || wanted("memory") {
        missed.extend(beside_the_peer(&options, wanted("memory"))?);
    }
    if wanted("streams") {
        missed.extend(streams(&options)?);
    }
    if missed.is_empty() { Ok(()) } else { bail!("missed: {}", missed.join("; ")) }
}

/// Our scheduler and gateway as a process, with nodes of this process that have joined it.
fn weir(program: &Path, runtime: &Runtime, nodes: usize, null: &Null, slots: u32) -> Result<Gateway> {
    let (http, listen, state) = (free()?, free()?, tempfile::tempdir()?);
    let mut serve = Command::new(program);
    serve.args(["serve", "--no-node", "--http", &http.to_string(), "--listen", &listen.to_string()]);
    let mut gateway = started("weir", serve.arg("--state").arg(state.path()), http)?;
    let end = Instant::now() + UP;
    let link = loop {
        let uses = nodes.to_string();
        let out =
            Command::new(program).args(["link", "--uses", &uses, "--state"]).arg(state.path()).output()?;
        if out.status.success() {
            break String::from_utf8(out.stdout)?.parse::<JoinLink>()?;
        }
        ensure!(Instant::now() < end, "{}", String::from_utf8_lossy(&out.stderr));
        std::thread::sleep(Duration::from_millis(50));
    };
    for n in 0..nodes {
        let options = LoadOptions { slots, ..LoadOptions::default() };
        let loaded = weir_node::null(null, options)?;
        let resident = Resident::new(loaded.held, loaded.text, loaded.engine);
        let worker = Worker::new(&format!("n{n}"), Machine::default(), vec![resident], Stock::none());
        let link = link.clone();
        // As `weir join` does.
        runtime.block_on(worker.try_out());
        runtime.spawn(async move {
            let dialer = Dialer::new().expect("a socket");
            let at = dialer.dial(&link.addresses, link.cluster).await.expect("the scheduler answers");
            let proof = at.binding().map(|binding| Identity::generate().expect("randomness").prove(&binding));
            let credentials = Credentials { proof, token: Some(link.token.to_string()), ask: false };
            // It ends with the scheduler.
            _ = worker.serve(&at, credentials).await;
        });
    }
    ready(&mut gateway, &ask(1, false))?;
    gateway.folders.push(state);
    Ok(gateway)
}

fn smg(program: &Path, upstream: SocketAddr) -> Result<Gateway> {
    let (address, metrics) = (free()?, free()?);
    let mut command = Command::new(program);
    command.args(["launch", "--backend", "openai", "--worker-urls", &format!("http://{upstream}")]);
    command.args(["--host", "127.0.0.1", "--port", &address.port().to_string(), "--log-level", "error"]);
    command.args(["--prometheus-port", &metrics.port().to_string()]);
    let mut gateway = started("smg", &mut command, address)?;
    ready(&mut gateway, &ask(1, false))?;
    Ok(gateway)
}

fn ask(tokens: usize, stream: bool) -> Vec<u8> {
    let message = r#""messages":[{"role":"user","content":"Hello, world"}]"#;
    let body =
        format!(r#"{{"model":"null",{message},"max_tokens":{tokens},"temperature":0,"stream":{stream}}}"#);
    load::request("/v1/chat/completions", &body)
}

/// Returns what was missed.
fn beside_the_peer(options: &Options, memory: bool) -> Result<Vec<String>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let upstream = load::null_upstream()?;
    let ours = weir(&options.weir, &runtime, 1, &Null::default(), 64)?;
    let peer = options.peer.as_ref().map(|program| smg(program, upstream)).transpose()?;
    let gateways: Vec<&Gateway> = peer.iter().chain([&ours]).collect();
    let (mut direct, mut figures) = (Figures::default(), Vec::new());
    figures.resize_with(gateways.len(), Figures::default);
    for _ in 0..options.rounds {
        direct.measure(upstream, &ask(1, false), options.requests)?;
        for (gateway, figures) in gateways.iter().zip(&mut figures) {
            figures.measure(gateway.address, &ask(1, false), options.requests)?;
        }
    }
    print_table(&direct, gateways.iter().map(|g| g.name).zip(&figures));
    let mut missed = compare(&direct, &figures);
    if memory {
        missed.extend(compare_memory(&gateways, options)?);
    }
    Ok(missed)
}

/// What we promise: at most 300 us added at the median of one connection, and ahead of the peer.
fn compare(direct: &Figures, figures: &[Figures]) -> Vec<String> {
    let mut missed = Vec::new();
    let Some((ours, peers)) = figures.split_last() else { return missed };
    let added = ours.percentile_us(0, 50) - direct.percentile_us(0, 50);
    if added > 300.0 {
        missed.push(format!("{added:.0} us are added at one connection, not 300"));
    }
    for (which, connections) in CONNECTIONS.into_iter().enumerate() {
        for peer in peers {
            let (mine, theirs) = (ours.percentile_us(which, 50), peer.percentile_us(which, 50));
            if mine > theirs {
                missed.push(format!("p50 at {connections}: {mine:.0} us, the peer has {theirs:.0}"));
            }
            let rate = |figures: &Figures| figures.median(which, |load| load.requests_per_s);
            if rate(ours) < rate(peer) {
                missed.push(format!("requests/s at {connections}: {:.0}, not {:.0}", rate(ours), rate(peer)));
            }
        }
    }
    missed
}

/// Memory after many requests.
fn compare_memory(gateways: &[&Gateway], options: &Options) -> Result<Vec<String>> {
    let done = options.rounds * options.requests * 11 / 8;
    let mut all = Vec::new();
    for gateway in gateways {
        load::run(gateway.address, &ask(1, false), 64, MANY.saturating_sub(done).max(6400))?;
        let bytes = resident_bytes(gateway.child.id());
        println!(
            "{:<10}{:>8.1} MiB after {} requests",
            gateway.name,
            bytes as f64 / 1048576.0,
            done.max(MANY)
        );
        all.push(bytes);
    }
    Ok(match all.as_slice() {
        [peer, ours] if ours > peer => vec![format!("memory: {ours} bytes, the peer has {peer}")],
        _ => Vec::new(),
    })
}

/// Many streams at once, each to be held at a pace.
fn streams(options: &Options) -> Result<Vec<String>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (nodes, null) = (4, format!("step_us={}", STEP.as_micros()).parse::<Null>());
    let null = null.map_err(|why| anyhow::anyhow!(why))?;
    let slots = options.streams.div_ceil(nodes) as u32;
    let gateway = weir(&options.weir, &runtime, nodes, &null, slots)?;
    let request = ask(TOKENS, true);
    let all = std::thread::scope(|scope| {
        let spawn = |_| {
            // Not all in the same instant, as people don't come either.
            std::thread::sleep(Duration::from_millis(2));
            scope.spawn(|| load::stream(gateway.address, &request))
        };
        let clients: Vec<_> = (0..options.streams).map(spawn).collect();
        clients
            .into_iter()
            .map(|client| client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    let rate = |times: &Vec<Instant>| match (times.first(), times.last()) {
        (Some(first), Some(last)) => (times.len() - 1) as f64 / last.duration_since(*first).as_secs_f64(),
        _ => 0.0,
    };
    let mut rates: Vec<f64> = all.iter().map(rate).collect();
    rates.sort_by(f64::total_cmp);
    let mut gaps: Vec<Duration> = all.iter().flat_map(|t| t.windows(2).map(|w| w[1] - w[0])).collect();
    gaps.sort();
    let gap = |percent: usize| gaps.get(gaps.len() * percent / 100).copied().unwrap_or_default();
    let slowest = rates.first().copied().unwrap_or(0.0);
    println!(
        "{} streams: slowest {slowest:.1}, median {:.1} tokens/s; between tokens p50 {:.1}, p99 {:.1}, longest {:.1} ms; \
         {:.1} MiB",
        rates.len(),
        rates.get(rates.len() / 2).copied().unwrap_or(0.0),
        gap(50).as_secs_f64() * 1e3,
        gap(99).as_secs_f64() * 1e3,
        gaps.last().copied().unwrap_or_default().as_secs_f64() * 1e3,
        resident_bytes(gateway.child.id()) as f64 / 1048576.0
    );
    Ok(match slowest < TOKENS_PER_S {
        true => vec![format!("a stream had {slowest:.1} tokens/s, not {TOKENS_PER_S}")],
        false => Vec::new(),
    })
}
