//! `weir join`
use super::ending::{Asked, asked_to_stop};
use super::serving;
use super::speaker::{device_options, find};
use super::{Interrupted, output::note};
use crate::config::Config;
use crate::driver::{load_all, worker};
use crate::private;
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use weir_node::{Credentials, Worker, WorkerError};
use weir_transport::{DialError, Dialer, Fingerprint, Identity, JoinLink, JoinToken, RefusalCode};

/// Waits between attempts to reach the scheduler, each of random length up to twice the one before.
const WAIT_FIRST: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(15);
/// A link that held for so long was a good one: the waits begin anew.
const SETTLED: Duration = Duration::from_secs(20);
/// What runs here gets so long to end or to move when we are asked to stop.
const LEAVING: Duration = Duration::from_secs(30);

/// Make this machine a node of a cluster
#[derive(clap::Args)]
#[command(after_help = "\
The link comes from `weir link` on the scheduler's machine and is needed once: afterwards this machine is known by its
key. Connections go out only, so that it works behind a router. Ctrl-C leaves: what runs here moves to other nodes.

Examples:
  weir join weir://192.168.1.5:8484/4e0c.../9a31... --model qwen2.5-coder-0.5b
  weir join                              the cluster joined before, again")]
pub(super) struct Join {
    /// The join link; the cluster joined before where none
    link: Option<JoinLink>,
    /// A catalog name or a path to a .gguf; may be given several times
    #[arg(short, long, value_name = "MODEL")]
    model: Vec<String>,
    /// What the node is called [default: the machine's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
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
}

impl Join {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let folder = serving::folder(config, self.state.as_deref())?;
        let belonging = belonging(&folder, self.link)?;
        let names = match self.model.as_slice() {
            [] => vec![None],
            named => named.iter().map(|n| Some(n.as_str())).collect(),
        };
        let models = names.into_iter().map(|n| find(config, n)).collect::<anyhow::Result<Vec<_>>>()?;
        let name = self.name.unwrap_or_else(|| gethostname::gethostname().to_string_lossy().into_owned());
        super::runtime()?.block_on(async {
            let worker = worker(&name, load_all(models, device_options(config)).await?);
            let dialer = Dialer::new()?;
            let asked = tokio::select! {
                failed = serve(&worker, &dialer, &belonging, &name) => return failed,
                asked = leave(&worker) => asked,
            };
            dialer.linger().await;
            let residents = worker.residents().to_vec();
            tokio::task::spawn_blocking(move || residents.iter().for_each(|r| r.shutdown())).await?;
            match asked {
                Asked::Interrupt => Err(Interrupted.into()),
                Asked::Terminate => Ok(()),
            }
        })
    }
}

/// The node's key, made once, and the cluster: that of the link, or the one before.
fn belonging(folder: &Path, link: Option<JoinLink>) -> anyhow::Result<Belonging> {
    let path = folder.join("node.json");
    let shown = || path.display().to_string();
    private::create_folder(folder).with_context(|| folder.display().to_string())?;
    let mut remembered = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(shown)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Remembered { key: Identity::generate()?.pkcs8().to_vec(), home: None }
        }
        Err(error) => return Err(error).with_context(shown),
    };
    let identity = Identity::from_pkcs8(&remembered.key).with_context(shown)?;
    let token = link.as_ref().map(|link| link.token);
    if let Some(link) = link {
        remembered.home = Some(Home { addresses: link.addresses, cluster: link.cluster.to_string() });
        private::write_file(&path, &serde_json::to_vec(&remembered)?).with_context(shown)?;
    }
    let Some(home) = remembered.home else {
        bail!(
            "this machine has joined no cluster yet; `weir link` on the scheduler's machine prints a join link"
        )
    };
    Ok(Belonging { identity, addresses: home.addresses, cluster: home.cluster.parse()?, token })
}

/// Serves the scheduler, and finds it again whenever it is lost; returns only what trying again can't help.
async fn serve(worker: &Worker, dialer: &Dialer, home: &Belonging, name: &str) -> anyhow::Result<()> {
    let (mut wait, mut told) = (WAIT_FIRST, false);
    loop {
        let trouble = match dialer.dial(&home.addresses, home.cluster).await {
            Ok(link) => {
                let proof = link.binding().map(|binding| home.identity.prove(&binding));
                let token = home.token.map(|token| token.to_string());
                let began = Instant::now();
                let mut welcomes = worker.welcomes();
                let greeted = async {
                    if welcomes.changed().await.is_ok() {
                        eprintln!("Joined as {name}. Ctrl-C leaves.");
                    }
                    std::future::pending::<()>().await;
                };
                let why = tokio::select! {
                    why = worker.serve(&link, Credentials { proof, token }) => why,
                    () = greeted => continue,
                };
                if let WorkerError::Refused(refusal) = &why
                    && refusal.code != RefusalCode::Full
                {
                    bail!("the scheduler turned this node away: {}", refusal.message);
                }
                if began.elapsed() > SETTLED {
                    wait = WAIT_FIRST;
                }
                told = false;
                why.to_string()
            }
            Err(error @ DialError::OtherCluster(_)) => bail!(error),
            Err(error) => error.to_string(),
        };
        if !told {
            eprintln!("{trouble}; trying again until it answers");
            told = true;
        }
        tokio::time::sleep(jittered(wait)).await;
        wait = (wait * 2).min(WAIT_MAX);
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
