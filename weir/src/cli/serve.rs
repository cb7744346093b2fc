//! `weir serve`
use super::ending::{Asked, asked_to_stop};
use super::secure::{Secure, host_name, own_addresses, own_names};
use super::serving::{self, Announced, Serving};
use super::speaker::{Drafts, device_options, find};
use super::telling::Telling;
use super::{Interrupted, machine, output::note, store};
use crate::books::Books;
use crate::cluster::{Cluster, Invitation};
use crate::config::Config;
use crate::driver::{Driver, DriverConfig, ModelSource, ModelSpec, Port, stock_here};
use crate::gateway::{Accounts, AdminConfig, Gateway, GatewayConfig, SharedFile};
use crate::keys::Keys;
use crate::lan::{self, Announcement};
use crate::policy::{Source, keep_time};
use crate::replicas::{Followed, Presence, Replicas};
use crate::state::State;
use crate::telemetry::{Scrape, gather};
use std::io::{IsTerminal, Write, stderr, stdout};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;
use weir_transport::{JoinLink, JoinToken};

/// Serve models over the OpenAI API
#[derive(clap::Args)]
#[command(after_help = "\
The address is printed once requests are taken, and nothing else goes to standard output. Off loopback a key is
required, and TLS is on (`weir trust` makes this machine believe its certificate). Ctrl-C lets requests that are under way finish. With --listen other machines can join: `weir link` prints a
link for one, to be used with `weir join` there.

Examples:
  weir serve
  weir serve --model smollm2-135m --model qwen2.5-coder-0.5b
  weir serve --model big.gguf --draft small.gguf     small guesses, big decides: the same tokens sooner
  weir serve --listen 0.0.0.0:8484       other machines can join, too
  weir serve --listen 0.0.0.0:8484 --no-node
  weir serve --listen 127.0.0.1:8484 --no-node --share smollm2-135m
                                         only browser tabs compute (/join)
  WEIR_API_KEY=secret weir serve --http 0.0.0.0:8484
  weir serve --policy spill-when-busy
  weir serve --listen 0.0.0.0:8484 --no-node --etcd http://etcd:2379
                                         one of several schedulers: same nodes, keys and budgets
  weir serve --model null                made-up tokens, for load tests")]
pub(super) struct Serve {
    /// Listen here; port 0 takes any free one [default: 127.0.0.1:8484]
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// A catalog name or a path to a .gguf; may be given several times
    #[arg(short, long, value_name = "MODEL")]
    model: Vec<String>,
    #[command(flatten)]
    draft: Drafts,
    /// Let nodes join here (UDP)
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// What join links say instead of this machine's own addresses: HOST:PORT, may be given several times
    #[arg(long, value_name = "HOST:PORT", requires = "listen")]
    advertise: Vec<String>,
    /// Don't let `weir join --lan` find this scheduler in the local network
    #[arg(long, requires = "listen")]
    no_lan: bool,
    /// Hold no model here: only nodes that join do, and providers that weir.toml names
    #[arg(long, conflicts_with = "model")]
    no_node: bool,
    /// Where requests may go: a policy file, which may change meanwhile, or the name of a policy that comes with weir (see
    /// `weir policy show`) [default: whoever is done first; a provider
    /// only for requests that name its model]
    #[arg(long, value_name = "FILE")]
    policy: Option<String>,
    /// Browser tabs may fetch this model and compute with it (a catalog name or a path), may be given several times
    /// [default: the models served here]
    #[arg(long, value_name = "MODEL")]
    share: Vec<String>,
    /// Where the cluster's key and members are kept
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Share the cluster with other schedulers by this etcd: http://HOST:2379, several with commas. It has the cluster's
    /// secret key then
    #[arg(long, value_name = "URL,...")]
    etcd: Option<String>,
    /// What the keys in etcd begin with [default: /weir/]
    #[arg(long, value_name = "PREFIX")]
    etcd_prefix: Option<String>,
    /// Clients must send this key; better set WEIR_API_KEY, which others on this machine don't see
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Tell /metrics here too, in plain HTTP and without a key
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    #[command(flatten)]
    secure: Secure,
}

impl Serve {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let names = match self.model.as_slice() {
            _ if self.no_node => Vec::new(),
            [] => vec![None],
            named => named.iter().map(|n| Some(n.as_str())).collect(),
        };
        let models = self.draft.find(config, &names)?;
        let shared = self.share.iter().map(|n| find(config, Some(n))).collect::<anyhow::Result<Vec<_>>>()?;
        let accounts = self.accounts(config)?;
        let mut gateway = self.gateway(config, accounts.as_ref())?;
        let policy =
            self.policy.as_ref().or(config.policy.as_ref()).map(|name| Source::named(name)).transpose()?;
        policy.as_ref().map(Source::load).transpose()?;
        let upstreams = config.upstreams()?;
        if self.no_node && self.listen.is_none() && upstreams.is_empty() {
            anyhow::bail!(
                "with --no-node nobody could answer: let nodes join with --listen ADDR, or name a [[provider]] in weir.toml"
            );
        }
        gateway.files = if shared.is_empty() { &models } else { &shared }.iter().filter_map(share).collect();
        super::runtime()?.block_on(async {
            let device = device_options(config);
            let telemetry = config.telemetry("weir", &host_name())?;
            let books = accounts.as_ref().map(|kept| kept.accounts.books.clone());
            let driver = DriverConfig {
                models,
                device,
                labels: config.labels(),
                no_node: self.no_node,
                upstreams,
                books,
                telemetry,
            };
            let driver = match self.no_node {
                true => Driver::start(driver).await?,
                false => {
                    let stock = stock_here(store(config)?, device)?;
                    Driver::start_with(driver, machine(config, device)?, stock).await?
                }
            };
            keep_time(driver.clone()).await;
            if let Some(Kept { accounts: Accounts { keys, .. }, .. }) = &accounts {
                driver.set_keys(keys).await;
            }
            if let Some(policy) = policy {
                policy.follow(driver.clone()).await?;
            }
            let house = match (self.listen, &accounts) {
                (Some(at), Some(kept)) => Some(self.open_house(kept, &driver, at)?),
                _ => None,
            };
            gateway.admin = house.as_ref().map(|house| house.admin.clone());
            gateway.accounts = accounts.as_ref().map(|kept| kept.accounts.clone());
            let telling = self.tell(config, &driver).await?;
            let gateway = Gateway::bind(driver.clone(), gateway).await?;
            let announced = match &accounts {
                Some(kept) => Some(self.announce(config, &gateway, &kept.accounts.token)?),
                None => None,
            };
            let presence = accounts.as_ref().map(|kept| kept.follow(&driver, house.as_ref(), &gateway));
            let presence = presence.transpose()?.flatten();
            let names: Vec<String> = driver.models().iter().map(|m| m.name.clone()).collect();
            writeln!(
                stdout(),
                "{}://{}",
                if gateway.key().is_some() { "https" } else { "http" },
                gateway.address()
            )?;
            note(&match names.as_slice() {
                [] => "Waiting for nodes. Ctrl-C stops.".to_owned(),
                names => format!("Serving {}. Ctrl-C stops.", names.join(", ")),
            });
            if let Some(house) = &house {
                house.invite()?;
            }
            let (said, heard) = oneshot::channel();
            gateway
                .run(async {
                    let _ = said.send(asked_to_stop().await);
                })
                .await;
            drop(announced);
            // Others hear that we go.
            _ = tokio::task::spawn_blocking(move || drop(presence)).await;
            driver.shutdown().await;
            if let Some(Kept { accounts: Accounts { books, .. }, .. }) = &accounts {
                let books = books.clone();
                // It is written, or the runtime is going down.
                _ = tokio::task::spawn_blocking(move || books.close()).await;
            }
            telling.end().await;
            if let Some(house) = house {
                house.port.close().await;
            }
            match heard.await {
                Ok(Asked::Interrupt) => Err(Interrupted.into()),
                _ => Ok(()),
            }
        })
    }

    async fn tell(&self, config: &Config, driver: &Driver) -> anyhow::Result<Telling> {
        let telling = driver.clone();
        let scrape: Scrape = Arc::new(move || {
            let driver = telling.clone();
            Box::pin(async move { gather(&driver).await })
        });
        Telling::start(config, self.metrics, driver.telemetry().clone(), scrape).await
    }

    /// The state, with keys and what they have spent. Where nodes can join it must be ours; else it may be another's that
    /// runs on this machine, too, and we do without.
    fn accounts(&self, config: &Config) -> anyhow::Result<Option<Kept>> {
        let etcd = config.etcd(self.etcd.as_deref(), self.etcd_prefix.as_deref())?;
        let is_shared = etcd.is_some();
        let open = || {
            let folder = serving::folder(config, self.state.as_deref())?;
            let state = State::open(&folder)?;
            let unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
            let replicas = etcd.as_ref().map(|etcd| Replicas::open(etcd, &state)).transpose()?;
            let (keys, books) = match &replicas {
                None => (Keys::open(state.clone())?, Books::open(state.clone(), unix_s)?),
                Some(replicas) => (
                    Keys::open_shared(state.clone(), replicas.etcd().clone())?,
                    Books::open_shared(state.clone(), replicas.sharing(), unix_s)?,
                ),
            };
            let (keys, books) = (Arc::new(keys), Arc::new(books));
            // As long as two of them: 256 bits.
            let token = format!("{}{}", JoinToken::generate()?, JoinToken::generate()?);
            anyhow::Ok(Kept { state, replicas, accounts: Accounts { keys, books, token } })
        };
        match open() {
            Ok(accounts) => Ok(Some(accounts)),
            Err(error) if is_shared || self.listen.is_some() || self.state.is_some() => Err(error),
            Err(error) => {
                tracing::warn!("API keys and what is spent are not kept here: {error:#}");
                Ok(None)
            }
        }
    }

    /// So that `weir key`, `weir link` and their like find us.
    fn announce(&self, config: &Config, gateway: &Gateway, token: &str) -> anyhow::Result<Announced> {
        let folder = serving::folder(config, self.state.as_deref())?;
        Serving::new(gateway.address(), gateway.key(), token.to_owned()).announce(&folder)
    }

    fn gateway(&self, config: &Config, accounts: Option<&Kept>) -> anyhow::Result<GatewayConfig> {
        let http = self.http.unwrap_or(config.http);
        let folder = || serving::folder(config, self.state.as_deref());
        let mut allowed_hosts = config.allowed_hosts.clone();
        if !http.ip().is_loopback() {
            allowed_hosts.extend(own_names());
        }
        let api_key = self.key.clone().or_else(|| config.api_key.clone());
        let has_key = api_key.is_some() || accounts.is_some_and(|kept| !kept.accounts.keys.is_empty());
        Ok(GatewayConfig {
            // Without a key it will not run: that is said first.
            tls: has_key
                .then_some(())
                .and_then(|()| self.secure.tls(config, http, folder).transpose())
                .transpose()?,
            insecure_http: self.secure.is_insecure(config),
            api_key,
            allowed_hosts,
            allowed_origins: config.allowed_origins.clone(),
            aliases: store(config)?.catalog().aliases(),
            ..GatewayConfig::new(http)
        })
    }

    /// Opens the port for nodes.
    fn open_house(&self, kept: &Kept, driver: &Driver, at: SocketAddr) -> anyhow::Result<House> {
        let etcd = kept.replicas.as_ref().map(|replicas| replicas.etcd().clone());
        let cluster = Arc::new(Cluster::within(kept.state.clone(), etcd)?);
        if let Some(replicas) = &kept.replicas {
            cluster.set_schedulers(replicas.alone());
        }
        let port = driver.listen(at, cluster.clone())?;
        let addresses = match self.advertise.as_slice() {
            [] => {
                let at = port.address()?;
                own_addresses(at.ip()).iter().map(|ip| SocketAddr::new(*ip, at.port()).to_string()).collect()
            }
            told => told.to_vec(),
        };
        let token = kept.accounts.token.clone();
        let web = port.web_certificate();
        let lan = (!self.no_lan && !at.ip().is_loopback()).then(|| announce(&port, &cluster)).flatten();
        Ok(House { port, admin: AdminConfig { cluster, addresses, web, token }, _lan: lan })
    }
}

/// What is kept, and with whom.
struct Kept {
    state: State,
    /// Other schedulers may share it.
    replicas: Option<Replicas>,
    accounts: Accounts,
}

impl Kept {
    /// Keeps in step with other schedulers, if there may be any.
    fn follow(
        &self,
        driver: &Driver,
        house: Option<&House>,
        gateway: &Gateway,
    ) -> anyhow::Result<Option<Presence>> {
        let Some(replicas) = self.replicas.clone() else { return Ok(None) };
        let scheme = if gateway.key().is_some() { "https" } else { "http" };
        let followed = Followed {
            cluster: house.map(|house| house.admin.cluster.clone()),
            keys: self.accounts.keys.clone(),
            driver: driver.clone(),
            addresses: house.map(|house| house.admin.addresses.clone()).unwrap_or_default(),
            http: format!("{scheme}://{}", gateway.address()),
        };
        Ok(Some(replicas.follow(followed)?))
    }
}

/// A model as a file for browser tabs, if it is one.
fn share(model: &ModelSpec) -> Option<SharedFile> {
    match &model.source {
        ModelSource::File { path, id: Some(id), .. } => {
            Some(SharedFile { name: model.name.clone(), sha256: id.0, path: path.clone() })
        }
        _ => None,
    }
}

/// What is open to other machines.
struct House {
    port: Port,
    admin: AdminConfig,
    /// `weir join --lan` finds us.
    _lan: Option<Announcement>,
}

/// A network without multicast is no reason not to serve.
fn announce(port: &Port, cluster: &Cluster) -> Option<Announcement> {
    let at = port.address().ok()?;
    let announced = lan::announce(&host_name(), at, cluster.fingerprint());
    announced.inspect_err(|error| tracing::warn!("{error}")).ok()
}

impl House {
    /// A join link for whoever started us, if it is a person.
    fn invite(&self) -> anyhow::Result<()> {
        if stderr().is_terminal() {
            let token = self.admin.cluster.invite(Invitation::default(), SystemTime::now())?;
            let cluster = self.admin.cluster.fingerprint();
            let link = JoinLink { addresses: self.admin.addresses.clone(), cluster, token };
            note("One machine can join within an hour (`weir link` prints more links):");
            eprintln!("  weir join {link}");
        }
        Ok(())
    }
}
