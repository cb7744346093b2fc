//! `weir join`
mod lines;

use super::ending::{Asked, asked_to_stop};
use super::serving;
use super::speaker::{Drafts, device_options};
use super::telling::Telling;
use super::{Interrupted, machine, output::note, store};
use crate::config::Config;
use crate::driver::{load_all, stock, worker};
use crate::lan::{self, Found};
use crate::private;
use crate::telemetry::{Scrape, Watcher, gather_node};
use anyhow::{Context, bail};
use lines::Serving as Served;
use serde::{Deserialize, Serialize};
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, IsTerminal, Write, stderr, stdin};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use weir_node::{Stock, Worker};
use weir_transport::{Dialer, Fingerprint, Identity, JoinLink, JoinToken};

/// Waits between attempts to reach the scheduler, each of random length up to twice the one before.
const WAIT_FIRST: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(15);
/// How long to look for schedulers in the local network.
const SEARCH: Duration = Duration::from_secs(3);
/// How often to ask whether we were let in meanwhile, and for how long.
const ASK_AGAIN: Duration = Duration::from_secs(2);
const ASKING: Duration = Duration::from_secs(290);
/// A link that held for so long was a good one: the waits begin anew.
const SETTLED: Duration = Duration::from_secs(20);
/// What runs here gets so long to end or to move when we are asked to stop.
const LEAVING: Duration = Duration::from_secs(30);

/// Make this machine a node of a cluster
#[derive(clap::Args)]
#[command(after_help = "\
The link comes from `weir link` on the scheduler's machine and is needed once: afterwards this machine is known by its
key. With --lan no link is needed: the scheduler is looked for in the local network, both machines show a code, and it is let
in by `weir admit CODE` there. Connections go out only, so that it works behind a router. Ctrl-C leaves: what runs here moves to other nodes.

Examples:
  weir join --lan
  weir join weir://192.168.1.5:8484/4e0c.../9a31... --model qwen2.5-coder-0.5b
  weir join weir://192.168.1.5:8484/4e0c.../9a31... --model big.gguf --draft small.gguf
  weir join weir://192.168.1.5:8484/4e0c.../9a31...      loads models of the catalog as they are asked for
  weir join                              the cluster joined before, again")]
pub(super) struct Join {
    /// The join link; the cluster joined before where none
    link: Option<JoinLink>,
    /// Look for the scheduler in the local network
    #[arg(long, conflicts_with = "link")]
    lan: bool,
    /// With --lan: take the scheduler on the machine of this name, and don't ask whether the codes are the same
    #[arg(long, value_name = "NAME", requires = "lan")]
    scheduler: Option<String>,
    /// A catalog name or a path to a .gguf; may be given several times
    #[arg(short, long, value_name = "MODEL")]
    model: Vec<String>,
    #[command(flatten)]
    draft: Drafts,
    /// A model that this machine may be told to load; where none is named, with neither --model nor --offer, all of the
    /// catalog. May be given several times
    #[arg(long, value_name = "MODEL")]
    offer: Vec<String>,
    /// What the node is called [default: the machine's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Tell this node's /metrics here, in plain HTTP and without a key
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    /// Where the node's key is kept
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// What a node remembers.
#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    /// The node's key, PKCS#8, a number a byte.
    key: Vec<u8>,
    /// The cluster that it joined last.
    home: Option<Home>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Home {
    addresses: Vec<String>,
    cluster: String,
}

/// A node, and where it belongs.
struct Belonging {
    identity: Identity,
    addresses: Vec<String>,
    cluster: Fingerprint,
    token: Option<JoinToken>,
    /// Without a token: the person at the scheduler is asked, and so is ours unless told otherwise.
    ask: bool,
    trusting: bool,
}

impl Join {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let folder = serving::folder(config, self.state.as_deref())?;
        let belonging = match self.lan {
            true => nearby(&folder, self.scheduler.as_deref())?,
            false => belonging(&folder, self.link)?,
        };
        let named: Vec<&str> = match self.model.as_slice() {
            [] => config.model.iter().map(String::as_str).collect(),
            named => named.iter().map(String::as_str).collect(),
        };
        let models = self.draft.find(config, &named.iter().map(|n| Some(*n)).collect::<Vec<_>>())?;
        let device = device_options(config);
        let machine = machine(config, device)?;
        let stock = match named.is_empty() || !self.offer.is_empty() {
            true => stock(store(config)?, &self.offer, device)?,
            false => Stock::none(),
        };
        let name = self.name.unwrap_or_else(|| gethostname::gethostname().to_string_lossy().into_owned());
        super::single_runtime()?.block_on(async {
            let telemetry = config.telemetry("weir-node", &name)?;
            let worker = worker(&name, machine, load_all(models, device).await?, stock);
            let worker = worker.watched(Arc::new(Watcher::new(&telemetry)));
            let (of, told) = (worker.clone(), telemetry.clone());
            let scrape: Scrape = Arc::new(move || {
                let (telemetry, worker) = (told.clone(), of.clone());
                Box::pin(async move { gather_node(&telemetry, &worker).await })
            });
            let telling = Telling::start(config, self.metrics, telemetry, scrape).await?;
            worker.try_out().await;
            let serving = Arc::new(Served::new(worker.clone(), Dialer::new()?, belonging, name, folder));
            let asked = tokio::select! {
                failed = serving.clone().run() => return failed,
                asked = leave(&worker) => asked,
            };
            serving.dialer.linger().await;
            telling.end().await;
            let residents = worker.residents();
            tokio::task::spawn_blocking(move || residents.iter().for_each(|r| r.shutdown())).await?;
            match asked {
                Asked::Interrupt => Err(Interrupted.into()),
                Asked::Terminate => Ok(()),
            }
        })
    }
}

/// What is remembered in `folder`; a new key if nothing is.
fn remembered(folder: &Path) -> anyhow::Result<Remembered> {
    let path = folder.join("node.json");
    let shown = || path.display().to_string();
    private::create_folder(folder).with_context(|| folder.display().to_string())?;
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(shown),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(Remembered { key: Identity::generate()?.pkcs8().to_vec(), home: None })
        }
        Err(error) => Err(error).with_context(shown),
    }
}

impl Remembered {
    fn identity(&self, folder: &Path) -> anyhow::Result<Identity> {
        Identity::from_pkcs8(&self.key).with_context(|| folder.join("node.json").display().to_string())
    }

    fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let path = folder.join("node.json");
        private::write_file(&path, &serde_json::to_vec(self)?).with_context(|| path.display().to_string())
    }
}

/// The node's key, made once, and the cluster: that of the link, or the one before.
fn belonging(folder: &Path, link: Option<JoinLink>) -> anyhow::Result<Belonging> {
    let mut remembered = remembered(folder)?;
    let identity = remembered.identity(folder)?;
    let token = link.as_ref().map(|link| link.token);
    if let Some(link) = link {
        remembered.home = Some(Home { addresses: link.addresses, cluster: link.cluster.to_string() });
        remembered.write(folder)?;
    }
    let Some(home) = remembered.home else {
        bail!(
            "this machine has joined no cluster yet; `weir link` on the scheduler's machine prints a join link"
        )
    };
    let cluster = home.cluster.parse()?;
    Ok(Belonging { identity, addresses: home.addresses, cluster, token, ask: false, trusting: false })
}

/// The node's key, and a cluster that says in the local network that it is there. It is remembered once it has let us in.
fn nearby(folder: &Path, scheduler: Option<&str>) -> anyhow::Result<Belonging> {
    if scheduler.is_none() && !stdin().is_terminal() {
        bail!(
            "--lan asks a person to compare codes; without a terminal, name the machine with --scheduler NAME"
        );
    }
    let remembered = remembered(folder)?;
    let identity = remembered.identity(folder)?;
    // A key that nobody remembers would be asked about again and again.
    remembered.write(folder)?;
    note("Looking for a scheduler in the local network");
    let mut found = lan::find(SEARCH)?;
    found.retain(|f| {
        scheduler.is_none_or(|name| f.name == name || f.name.strip_suffix(".local") == Some(name))
    });
    let names: Vec<&str> = found.iter().map(|f| f.name.as_str()).collect();
    let Found { name, addresses, cluster } = match found.as_slice() {
        [] => bail!(
            "no scheduler answers in the local network; is `weir serve --listen 0.0.0.0:8484` running? `weir join LINK` works beyond it"
        ),
        [one] => one.clone(),
        _ => bail!("there are several: {}; choose with --scheduler NAME", names.join(", ")),
    };
    eprintln!("Found {name}, at {}", addresses.join(", "));
    let known = remembered.home.is_some_and(|home| home.cluster == cluster.to_string());
    Ok(Belonging { identity, addresses, cluster, token: None, ask: !known, trusting: scheduler.is_some() })
}

/// Tells both persons what to do; whether ours sees the same code on both screens.
async fn compared(code: String, trusting: bool) -> anyhow::Result<()> {
    eprintln!(
        "This machine asks to join by the code {code}. On the scheduler's machine: `weir admit {code}`"
    );
    if trusting {
        return Ok(());
    }
    let asked = move || {
        eprint!("Does `weir nodes` (or the log) there show the same code? [y/N] ");
        stderr().flush()?;
        let mut answer = String::new();
        stdin().lock().read_line(&mut answer)?;
        anyhow::Ok(answer.trim().eq_ignore_ascii_case("y"))
    };
    match tokio::task::spawn_blocking(asked).await?? {
        true => Ok(()),
        false => bail!("then somebody else answers in this network; join by a link (`weir link`) instead"),
    }
}

impl Belonging {
    /// The next `weir join` needs nothing more.
    fn remember(&self, folder: &Path) -> anyhow::Result<()> {
        self.remember_all(folder, &self.addresses)
    }

    /// The same, where the cluster has schedulers at these addresses.
    fn remember_all(&self, folder: &Path, addresses: &[String]) -> anyhow::Result<()> {
        let home = Home { addresses: addresses.to_vec(), cluster: self.cluster.to_string() };
        Remembered { key: self.identity.pkcs8().to_vec(), home: Some(home) }.write(folder)
    }
}

/// Between half of it and all of it, so that nodes that lost the same scheduler don't come back all at once.
fn jittered(wait: Duration) -> Duration {
    let draw = RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
    wait.mul_f64(0.5 + draw / 2.0)
}

/// Waits to be asked to stop, then for what runs here to end or move.
async fn leave(worker: &Worker) -> Asked {
    let asked = asked_to_stop().await;
    worker.drain();
    let empty = async {
        while worker.running() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if worker.running() > 0 {
        note("What runs here moves to other nodes or ends. Ctrl-C again leaves at once.");
        tokio::select! {
            () = empty => {}
            () = tokio::time::sleep(LEAVING) => {}
            _ = asked_to_stop() => {}
        }
    }
    asked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_key_is_made_once_and_its_home_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("deep/state");
        assert!(belonging(&state, None).err().unwrap().to_string().contains("weir link"));
        let link = JoinLink {
            addresses: vec!["a:1".into()],
            cluster: Identity::generate().unwrap().public().fingerprint(),
            token: JoinToken::generate().unwrap(),
        };
        let first = belonging(&state, Some(link.clone())).unwrap();
        let again = belonging(&state, None).unwrap();
        assert_eq!(first.identity.public(), again.identity.public());
        assert_eq!((again.cluster, again.addresses, again.token), (link.cluster, link.addresses, None));
        std::fs::write(state.join("node.json"), "{").unwrap();
        assert!(belonging(&state, None).is_err());
    }

    #[test]
    fn waits_differ() {
        let waits: Vec<Duration> = (0..20).map(|_| jittered(Duration::from_secs(1))).collect();
        assert!(waits.iter().all(|w| (Duration::from_millis(500)..=Duration::from_secs(1)).contains(w)));
        assert!(waits.iter().any(|w| *w != waits[0]));
    }
}
