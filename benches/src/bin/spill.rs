//! What a request costs that is sent on to a provider, beside gateways that do nothing else, under the same load, in the
//! same run.
//!
//! The provider is in this process and answers at once. Ours has no node of its own, so that by its policy every request
//! spills; each is placed, reserved for and settled. What is printed as added is the time through the gateway less the time
//! straight to the provider. A slow peer is sent fewer requests, which is said.
use anyhow::{Context as _, Result, bail, ensure};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use weir_benches::gateways::{
    CONNECTIONS, Figures, Gateway, free, print_table, ready, resident_bytes, started,
};
use weir_benches::load;

const HELP: &str = "\
spill --weir PROGRAM [--litellm PROGRAM] [--portkey SCRIPT] [--rounds N] [--requests N] [--many N]
PROGRAM is a release build of weir; memory is read after --many requests";

/// litellm gets this share of the requests: it takes that much longer.
const LITELLM_SHARE: usize = 20;

struct Options {
    weir: PathBuf,
    litellm: Option<PathBuf>,
    portkey: Option<PathBuf>,
    rounds: usize,
    requests: usize,
    many: usize,
}

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let mut options = Options {
        weir: PathBuf::new(),
        litellm: None,
        portkey: None,
        rounds: 5,
        requests: 20_000,
        many: 100_000,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--weir" => options.weir = value()?.into(),
            "--litellm" => options.litellm = Some(value()?.into()),
            "--portkey" => options.portkey = Some(value()?.into()),
            "--rounds" => options.rounds = value()?.parse()?,
            "--requests" => options.requests = value()?.parse()?,
            "--many" => options.many = value()?.parse()?,
            _ => {
                println!("{HELP}");
                return Ok(());
            }
        }
    }
    ensure!(options.weir.is_file(), "{HELP}");
    // They are started in folders of their own.
    options.weir = options.weir.canonicalize()?;
    let upstream = load::null_upstream()?;
    let mut entrants = Vec::new();
    if let Some(program) = &options.litellm {
        entrants.push(litellm(program, upstream, &options)?);
    }
    if let Some(script) = &options.portkey {
        entrants.push(portkey(script, upstream, &options)?);
    }
    entrants.push(weir(upstream, &options)?);
    let mut direct = Figures::default();
    for _ in 0..options.rounds {
        direct.measure(upstream, &ask(""), options.requests)?;
        for entrant in &mut entrants {
            entrant.figures.measure(entrant.gateway.address, &entrant.request, entrant.requests)?;
        }
    }
    print_table(&direct, entrants.iter().map(|e| (e.gateway.name, &e.figures)));
    for entrant in &mut entrants {
        entrant.fill(&options)?;
        let mib = entrant.bytes as f64 / 1048576.0;
        println!("{:<10}{mib:>8.1} MiB after {} requests", entrant.gateway.name, entrant.done);
    }
    let missed = compare(&entrants);
    if missed.is_empty() { Ok(()) } else { bail!("missed: {}", missed.join("; ")) }
}

/// A gateway, what it is asked, and how it does.
struct Entrant {
    gateway: Gateway,
    request: Vec<u8>,
    /// A round.
    requests: usize,
    figures: Figures,
    /// Requests in all, and the memory behind them.
    done: usize,
    bytes: u64,
}

impl Entrant {
    fn new(mut gateway: Gateway, request: Vec<u8>, requests: usize) -> Result<Entrant> {
        ready(&mut gateway, &request)?;
        Ok(Entrant { gateway, request, requests, figures: Figures::default(), done: 0, bytes: 0 })
    }

    /// Sends what is left to many requests, and reads the memory.
    fn fill(&mut self, options: &Options) -> Result<()> {
        let share = options.requests / self.requests.max(1);
        let asked = options.rounds * self.requests * 11 / 8;
        let left = (options.many / share.max(1)).saturating_sub(asked);
        if left > 0 {
            load::run(self.gateway.address, &self.request, CONNECTIONS[1], left * 10 / 11)?;
        }
        (self.done, self.bytes) = (asked + left, resident_bytes(self.gateway.child.id()));
        Ok(())
    }
}

/// A chat request for one token.
fn ask(headers: &str) -> Vec<u8> {
    let message = r#""messages":[{"role":"user","content":"Hello, world"}]"#;
    let body = format!(r#"{{"model":"bench/null",{message},"max_tokens":1,"temperature":0,"stream":false}}"#);
    load::request_with("/v1/chat/completions", headers, &body)
}

fn weir(upstream: SocketAddr, options: &Options) -> Result<Entrant> {
    let (http, folder) = (free()?, tempfile::tempdir()?);
    let (config, key) = (folder.path().join("weir.toml"), folder.path().join("key"));
    std::fs::write(&key, "sk-bench")?;
    let prices = "usd_per_mtok = { prompt = 0.1, output = 0.4 }";
    let models = format!("models = [{{ name = \"null\", context = 4096, {prices} }}]");
    let text = format!(
        "[[provider]]\nname = \"bench\"\nurl = \"http://{upstream}\"\nkey_file = {key:?}\nslots = 256\n{models}\n"
    );
    std::fs::write(&config, text)?;
    let mut serve = Command::new(&options.weir);
    serve.args(["serve", "--no-node", "--policy", "spill-when-busy", "--http", &http.to_string()]);
    serve.env("WEIR_CONFIG", &config).env("XDG_STATE_HOME", folder.path());
    let mut gateway = started("weir", &mut serve, http)?;
    gateway.folders.push(folder);
    Entrant::new(gateway, ask(""), options.requests)
}

fn litellm(program: &std::path::Path, upstream: SocketAddr, options: &Options) -> Result<Entrant> {
    let (http, folder) = (free()?, tempfile::tempdir()?);
    let config = folder.path().join("config.yaml");
    let parameters = format!("{{model: openai/null, api_base: \"http://{upstream}/v1\", api_key: x}}");
    std::fs::write(
        &config,
        format!("model_list:\n  - model_name: bench/null\n    litellm_params: {parameters}\n"),
    )?;
    let mut command = Command::new(program);
    command.arg("--config").arg(&config).args(["--host", "127.0.0.1", "--port", &http.port().to_string()]);
    // Ours asks for no key on loopback either.
    command.env("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY", "true").env("LITELLM_LOG", "ERROR");
    let mut gateway = started("litellm", &mut command, http)?;
    gateway.folders.push(folder);
    Entrant::new(gateway, ask(""), options.requests / LITELLM_SHARE)
}

fn portkey(script: &std::path::Path, upstream: SocketAddr, options: &Options) -> Result<Entrant> {
    let http = free()?;
    let mut command = Command::new("node");
    command.arg(script).arg(format!("--port={}", http.port())).env("TRUSTED_CUSTOM_HOSTS", "127.0.0.1");
    let gateway = started("portkey", &mut command, http)?;
    let host = format!("x-portkey-custom-host: http://{upstream}/v1\r\n");
    let headers = format!("x-portkey-provider: openai\r\nauthorization: Bearer x\r\n{host}");
    Entrant::new(gateway, ask(&headers), options.requests)
}

/// What we promise: ten times litellm's requests a second, and ahead of every peer in everything.
fn compare(entrants: &[Entrant]) -> Vec<String> {
    let mut missed = Vec::new();
    let Some((ours, peers)) = entrants.split_last() else { return missed };
    for peer in peers {
        let name = peer.gateway.name;
        let times = if name == "litellm" { 10.0 } else { 1.0 };
        for (which, connections) in CONNECTIONS.into_iter().enumerate() {
            for percent in [50, 99] {
                let of = |entrant: &Entrant| entrant.figures.percentile_us(which, percent);
                if of(ours) > of(peer) {
                    let (mine, theirs) = (of(ours), of(peer));
                    missed.push(format!("p{percent} at {connections}: {mine:.0} us, {name} has {theirs:.0}"));
                }
            }
            let (mine, theirs) = (ours.figures.rate(which), peer.figures.rate(which));
            if mine < times * theirs {
                missed.push(format!("requests/s at {connections}: {mine:.0}, {name} has {theirs:.0}"));
            }
        }
        if ours.bytes > peer.bytes {
            missed.push(format!("memory: {} bytes, {name} has {}", ours.bytes, peer.bytes));
        }
    }
    missed
}
