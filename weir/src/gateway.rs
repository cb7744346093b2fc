//! The HTTP gateway: the OpenAI API over whatever the driver's pool can serve.
//!
//! Follow a request down: [`Gateway::run`] accepts, `connection` guards the socket, `routes` checks who asks and finds the
//! endpoint, `request` turns JSON into checked values, `prompt` turns messages into token ids, the driver generates,
//! `running` makes the parts of an answer of what comes back (`parts`: text, reasoning, tool calls), and `answer` (whole) or
//! `stream` (server-sent events) writes them.
mod accounts;
mod admin;
mod answer;
mod body;
mod caller;
mod connection;
mod console;
mod embeddings;
mod error;
mod fields;
mod files;
mod form;
mod grammar;
mod messages;
mod models;
mod parts;
mod prompt;
mod request;
mod responses;
mod routes;
mod running;
mod stats;
mod stopped;
mod stream;
mod tls;
mod voice;
mod write;

use crate::driver::Driver;
use crate::once::Once;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use weir_transport::Fingerprint;

pub use accounts::Accounts;
pub(crate) use accounts::{list, since_ms, sum, with_secret};
pub use admin::AdminConfig;
pub use files::SharedFile;
pub use tls::{TlsConfig, TlsError};

/// Where the gateway listens, and for whom.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Address to listen on. Off loopback a key is required, and TLS.
    pub http: SocketAddr,
    /// By what certificate it is known; plain HTTP where none.
    pub tls: Option<TlsConfig>,
    /// Plain HTTP off loopback all the same: something in front does TLS.
    pub insecure_http: bool,
    /// The key that requests must carry as `Authorization: Bearer KEY`; none lets everybody in.
    pub api_key: Option<String>,
    /// Names that a `Host` header may carry besides the loopback ones, and off loopback any address: without ports. (A web
    /// page that reaches this server by rebinding DNS sends its own name.)
    pub allowed_hosts: Vec<String>,
    /// Origins of web pages, as `https://example.org`, that may call this gateway from a browser.
    pub allowed_origins: Vec<String>,
    /// Other names of models, and by which each is served; what isn't served is passed over.
    pub aliases: Vec<(String, String)>,
    /// Whose nodes are listed, let in and sent away here; none where no nodes can join.
    pub admin: Option<AdminConfig>,
    /// API keys and what is spent by them; none where there is no state folder.
    pub accounts: Option<Accounts>,
    /// Model files that browser tabs may fetch, to compute with them themselves.
    pub files: Vec<SharedFile>,
    /// How much of everything one client, or all of them, may take.
    pub limits: Limits,
}

impl GatewayConfig {
    /// Listening on `http`, no key, nobody's web pages, the default limits.
    pub fn new(http: SocketAddr) -> GatewayConfig {
        GatewayConfig {
            http,
            tls: None,
            insecure_http: false,
            api_key: None,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            aliases: Vec::new(),
            admin: None,
            accounts: None,
            files: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// Bounds on what the outside may make the gateway hold or wait for.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest request body, in bytes.
    pub body_bytes_max: usize,
    /// For a request's head; also how long an idle connection is kept.
    pub header_timeout: Duration,
    /// For a request's body to arrive.
    pub body_timeout: Duration,
    /// From a request's arrival to the last byte of its answer.
    pub request_timeout: Duration,
    /// A client that takes nothing for this long is cut off.
    pub stall_timeout: Duration,
    /// Requests under way get this long to finish after the shutdown; then they are cut.
    pub grace: Duration,
    /// Open connections.
    pub connections_max: usize,
    /// Requests being answered at once.
    pub requests_max: usize,
    /// Prompts times `n` in one request.
    pub choices_max: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body_bytes_max: 8 << 20,
            header_timeout: Duration::from_secs(20),
            body_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(600),
            stall_timeout: Duration::from_secs(60),
            grace: Duration::from_secs(3),
            connections_max: 1024,
            requests_max: 512,
            choices_max: 64,
        }
    }
}

/// Why the gateway could not serve.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The address is taken, not ours, or not allowed.
    #[error("can't listen on {address}: {source}; {hint}")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
        /// What to try.
        hint: &'static str,
    },
    /// Anybody could use an open gateway off loopback.
    #[error(
        "http://{address} can be reached from other machines, so a key is required: set `api_key` (WEIR_API_KEY), or listen on 127.0.0.1"
    )]
    KeyRequired {
        /// What was asked for.
        address: SocketAddr,
    },
    /// Keys and prompts would pass in the clear.
    #[error(
        "http://{address} can be reached from other machines, so TLS is required; or set `insecure_http` if something in front of it does TLS"
    )]
    TlsRequired {
        /// What was asked for.
        address: SocketAddr,
    },
    /// A key that no client could send.
    #[error("the API key must be 1 to 512 visible ASCII characters")]
    BadKey,
}

/// Listens and serves until `shutdown` resolves and what was under way has ended or been cut.
pub async fn serve(
    driver: Driver,
    config: GatewayConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    Gateway::bind(driver, config).await?.run(shutdown).await;
    Ok(())
}

/// A gateway that listens but doesn't answer yet: connections wait until [`Gateway::run`].
pub struct Gateway {
    listener: TcpListener,
    address: SocketAddr,
    key: Option<Fingerprint>,
    shared: Arc<Shared>,
}

/// What every connection needs.
pub(crate) struct Shared {
    driver: Driver,
    limits: Limits,
    /// BLAKE3 of the key: equal hashes are found in constant time, and the key itself isn't kept.
    key: Option<blake3::Hash>,
    /// Lower case.
    hosts: Vec<String>,
    /// Whether a `Host` may be any address, or only one of loopback.
    any_address: bool,
    tls: Option<TlsAcceptor>,
    origins: Vec<String>,
    aliases: Vec<(String, String)>,
    admin: Option<admin::Admin>,
    accounts: Option<Accounts>,
    files: files::Files,
    responses: Arc<responses::Store>,
    requests: Arc<Semaphore>,
    stats: Arc<stats::Stats>,
    /// Who was refused what, as far as it was logged.
    refusals: Once<(IpAddr, &'static str)>,
    phase: watch::Receiver<Phase>,
    /// Distinguishes names of requests between processes.
    salt: u64,
}

/// How far the gateway's life has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Phase {
    Serving,
    /// Nothing new; what is under way goes on.
    Draining,
    /// What is still under way ends with an error.
    Cut,
}

impl Shared {
    /// Whether headers carry the token that lies in the state folder.
    fn is_owner(&self, headers: &hyper::HeaderMap) -> bool {
        self.admin.as_ref().is_some_and(|admin| admin.knows(headers))
            || self.accounts.as_ref().is_some_and(|accounts| accounts.knows(headers))
    }

    /// Resolves when the gateway's life has come to `wanted`.
    fn reached(&self, wanted: Phase) -> impl Future<Output = ()> + Send + use<> {
        let mut phase = self.phase.clone();
        async move {
            // An error means that the gateway is gone: the same thing.
            let _ = phase.wait_for(|phase| *phase >= wanted).await;
        }
    }

    /// Resolves when requests under way must end.
    fn cut(&self) -> impl Future<Output = ()> + Send + use<> {
        self.reached(Phase::Cut)
    }
}

impl Gateway {
    /// Checks the configuration and takes the address.
    pub async fn bind(driver: Driver, config: GatewayConfig) -> Result<Gateway, GatewayError> {
        let address = config.http;
        let has_keys = config.accounts.as_ref().is_some_and(|accounts| !accounts.keys.is_empty());
        if config.api_key.is_none() && !has_keys && !address.ip().is_loopback() {
            return Err(GatewayError::KeyRequired { address });
        }
        if config.tls.is_none() && !config.insecure_http && !address.ip().is_loopback() {
            return Err(GatewayError::TlsRequired { address });
        }
        if let Some(key) = &config.api_key
            && (key.is_empty() || key.len() > 512 || !key.bytes().all(|b| b.is_ascii_graphic()))
        {
            return Err(GatewayError::BadKey);
        }
        let listener = TcpListener::bind(address).await.map_err(|source| {
            let hint = bind_hint(&source);
            GatewayError::Bind { address, source, hint }
        })?;
        let address = listener.local_addr().unwrap_or(address);
        let key = config.tls.as_ref().map(TlsConfig::key);
        let hosts = config.allowed_hosts.iter().map(|h| h.to_ascii_lowercase()).collect();
        // The receiver here is replaced by `run`, which holds the sender.
        let (_, phase) = watch::channel(Phase::Serving);
        let shared = Shared {
            driver,
            key: config.api_key.map(|k| blake3::hash(k.as_bytes())),
            hosts,
            any_address: !address.ip().is_loopback(),
            tls: config.tls.map(|tls| tls.config.into()),
            origins: config.allowed_origins,
            aliases: config.aliases,
            admin: config.admin.map(admin::Admin::from),
            accounts: config.accounts,
            files: files::Files::new(config.files),
            responses: Arc::default(),
            requests: Arc::new(Semaphore::new(config.limits.requests_max)),
            limits: config.limits,
            stats: Arc::default(),
            refusals: Once::default(),
            phase,
            salt: request::draw(),
        };
        Ok(Gateway { listener, address, key, shared: Arc::new(shared) })
    }

    /// The address that it listens on, with the port that the system chose where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// By what key it is known; none where it speaks plain HTTP.
    pub fn key(&self) -> Option<Fingerprint> {
        self.key
    }

    /// Serves until `shutdown` resolves; returns when every connection is closed, at most a little after
    /// [`Limits::grace`].
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Gateway { listener, mut shared, .. } = self;
        let (phase, receiver) = watch::channel(Phase::Serving);
        Arc::get_mut(&mut shared).expect("nobody shares it before it runs").phase = receiver;
        let slots = Arc::new(Semaphore::new(shared.limits.connections_max));
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut shutdown => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, from)) => match slots.clone().try_acquire_owned() {
                    Ok(slot) => {
                        let shared = shared.clone();
                        tokio::spawn(async move {
                            connection::serve(stream, from.ip(), shared).await;
                            drop(slot);
                        });
                    }
                    Err(_) => connection::refuse(&stream),
                },
                Err(error) => {
                    // Out of file descriptors, most likely: they come back as connections close.
                    tracing::warn!(%error, "can't accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        drop(listener);
        let _ = phase.send(Phase::Draining);
        let all = u32::try_from(shared.limits.connections_max).unwrap_or(u32::MAX);
        if tokio::time::timeout(shared.limits.grace, slots.acquire_many(all)).await.is_err() {
            let _ = phase.send(Phase::Cut);
            // Time for the last words to leave; then the runtime's end closes what is left.
            let _ = tokio::time::timeout(Duration::from_secs(1), slots.acquire_many(all)).await;
        }
    }
}

fn bind_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "another program (another `weir serve`?) has it: stop that, or choose another port with --http ADDR:PORT"
        }
        std::io::ErrorKind::PermissionDenied => {
            "ports below 1024 need privileges: choose a higher one with --http ADDR:PORT"
        }
        std::io::ErrorKind::AddrNotAvailable => "this machine has no such address: try --http 127.0.0.1:8484",
        _ => "try --http 127.0.0.1:8484",
    }
}
