//! Endpoints: a scheduler listens on one UDP port, nodes dial it, and browsers come in by WebTransport. All speak TLS 1.3; the
//! scheduler is known by its pinned key (a browser knows its certificate's hash), and a node proves its own key after the
//! handshake.
mod tls;
mod web;

use crate::crowd::Crowd;
use crate::identity::{Fingerprint, Identity};
use crate::link::{AnyLink, Link, quic};
use quinn::crypto::rustls::HandshakeData;
use quinn::{Endpoint, Incoming, VarInt};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
pub use tls::tls_to;
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::time::timeout;
pub use web::WebCertificate;

/// For a handshake, and for a dialled address to answer.
const HANDSHAKE: Duration = Duration::from_secs(8);
/// Handshakes under way, at most.
const HANDSHAKES_MAX: usize = 256;
/// And of one address.
const HANDSHAKES_EACH_MAX: usize = 128;
/// With more connections than this, who comes must show that its address is its own before anything is kept of it.
const UNVALIDATED_MAX: usize = 64;
/// Links that nobody has accepted yet, at most.
const ARRIVED_MAX: usize = 64;

/// Why an endpoint can't be had.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address is taken or not ours.
    #[error("can't listen on {address} (UDP): {error}; choose another with --listen")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// No UDP socket at all.
    #[error("can't open a UDP socket: {0}")]
    Socket(io::Error),
    /// The key makes no certificate; a bug.
    #[error("the cluster's key makes no certificate: {0}")]
    Certificate(String),
}

/// Why no link came about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// Nobody answers at any address: what each said.
    #[error("no scheduler answers: {0}")]
    Unreachable(String),
    /// Somebody answers with another key.
    #[error(
        "{0} is another cluster: its key is not the one in the join link; ask for a new link (`weir link`)"
    )]
    OtherCluster(String),
}

/// A scheduler's end: takes links from nodes. Dropping it closes them all.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    web: WebCertificate,
    arrived: Mutex<mpsc::Receiver<(Link, SocketAddr)>>,
}

impl Listener {
    /// Listens; must be called within a tokio runtime.
    pub fn bind(address: SocketAddr, cluster: &Identity) -> Result<Listener, EndpointError> {
        let web = WebCertificate::new(SystemTime::now()).map_err(EndpointError::Certificate)?;
        let config = tls::server_config(cluster, web.clone()).map_err(EndpointError::Certificate)?;
        let endpoint =
            Endpoint::server(config, address).map_err(|error| EndpointError::Bind { address, error })?;
        let (arrivals, arrived) = mpsc::channel(ARRIVED_MAX);
        tokio::spawn(shake_hands(endpoint.clone(), web.clone(), arrivals));
        Ok(Listener { endpoint, web, arrived: Mutex::new(arrived) })
    }

    /// Where it listens, with the port that the system chose where 0 was asked for.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// What browsers see, to be told to pages.
    pub fn web_certificate(&self) -> WebCertificate {
        self.web.clone()
    }

    /// The next link, and where it comes from; none once closed. Whoever is at the other end has proved nothing yet.
    pub async fn accept(&self) -> Option<(Link, SocketAddr)> {
        self.arrived.lock().await.recv().await
    }

    /// Closes all links, and waits a moment for the other ends to hear of it.
    pub async fn close(&self, reason: &str) {
        self.endpoint.close(VarInt::from_u32(0), reason.as_bytes());
        _ = timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.endpoint.close(VarInt::from_u32(0), b"the scheduler stopped");
    }
}

/// Takes in connections until the endpoint closes. What is kept of strangers is bounded.
async fn shake_hands(endpoint: Endpoint, web: WebCertificate, arrivals: mpsc::Sender<(Link, SocketAddr)>) {
    let room = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let crowd = Crowd::new(HANDSHAKES_EACH_MAX);
    while let Some(incoming) = endpoint.accept().await {
        if endpoint.open_connections() > UNVALIDATED_MAX && incoming.may_retry() {
            // An error means that it may not retry, which was asked.
            _ = incoming.retry();
            continue;
        }
        let places = (room.clone().try_acquire_owned(), crowd.enter(incoming.remote_address().ip()));
        let (Ok(place), Some(own_place)) = places else {
            incoming.refuse();
            continue;
        };
        let (arrivals, web) = (arrivals.clone(), web.clone());
        tokio::spawn(async move {
            let from = incoming.remote_address();
            match timeout(HANDSHAKE, shake(incoming, &web)).await {
                // The place is kept until somebody takes the link.
                Ok(Ok(link)) => _ = arrivals.send((link, from)).await,
                Ok(Err(error)) => tracing::debug!("{from}: {error}"),
                Err(_) => tracing::debug!("{from}: no handshake within {} s", HANDSHAKE.as_secs()),
            }
            drop((place, own_place));
        });
    }
}

async fn shake(incoming: Incoming, web: &WebCertificate) -> Result<Link, String> {
    let certificate = web.hash(SystemTime::now());
    let connection = incoming.accept().map_err(|e| e.to_string())?.await.map_err(|e| e.to_string())?;
    let data = connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    let link = match data.and_then(|data| data.protocol).as_deref() {
        Some(tls::ALPN) => quic::Link::native(connection),
        Some(web::ALPN) if web.hash(SystemTime::now()) != certificate => {
            return Err("the certificate was renewed meanwhile; it may try again".into());
        }
        Some(web::ALPN) => web::welcome(connection, certificate).await?,
        other => return Err(format!("it speaks {other:?}")),
    };
    Ok(Link(AnyLink::Quic(Box::new(link))))
}

/// A node's end.
#[derive(Debug)]
pub struct Dialer {
    endpoint: Endpoint,
}

impl Dialer {
    /// Opens a socket; must be called within a tokio runtime.
    pub fn new() -> Result<Dialer, EndpointError> {
        let any =
            [SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))];
        let endpoint = Endpoint::client(any[0]).or_else(|_| Endpoint::client(any[1]));
        Ok(Dialer { endpoint: endpoint.map_err(EndpointError::Socket)? })
    }

    /// A link to the cluster with this key, by the first of `addresses` (`HOST:PORT`) that answers.
    pub async fn dial(&self, addresses: &[String], cluster: Fingerprint) -> Result<Link, DialError> {
        let config = tls::native_client(cluster);
        let mut failures = Vec::new();
        for address in addresses {
            let found = match tokio::net::lookup_host(address.as_str()).await {
                Ok(found) => found.take(8).collect::<Vec<_>>(),
                Err(error) => {
                    failures.push(format!("{address}: {error}"));
                    continue;
                }
            };
            for at in found {
                match self.connect(at, config.clone()).await {
                    Ok(connection) => {
                        return Ok(Link(AnyLink::Quic(Box::new(quic::Link::native(connection)))));
                    }
                    Err(why) if why.contains(tls::OTHER_KEY) => {
                        return Err(DialError::OtherCluster(address.clone()));
                    }
                    Err(why) => failures.push(format!("{at}: {why}")),
                }
            }
        }
        Err(DialError::Unreachable(failures.join("; ")))
    }

    /// A link over WebTransport, as a page makes it: to whoever shows the certificate with this SHA-256 at `HOST:PORT`.
    pub async fn dial_web(&self, address: &str, certificate: [u8; 32]) -> Result<Link, DialError> {
        let tried = async {
            let mut found = tokio::net::lookup_host(address).await.map_err(|e| e.to_string())?;
            let at = found.next().ok_or("it has no address")?;
            let connection = self.connect(at, tls::web_client(certificate)).await?;
            let entered = timeout(HANDSHAKE, web::enter(connection, address, certificate)).await;
            entered.map_err(|_| format!("no session within {} s", HANDSHAKE.as_secs()))?
        };
        let link = tried.await.map_err(|why| DialError::Unreachable(format!("{address}: {why}")))?;
        Ok(Link(AnyLink::Quic(Box::new(link))))
    }

    async fn connect(
        &self,
        at: SocketAddr,
        config: quinn::ClientConfig,
    ) -> Result<quinn::Connection, String> {
        let connecting = self.endpoint.connect_with(config, at, tls::NAME).map_err(|e| e.to_string())?;
        timeout(HANDSHAKE, connecting)
            .await
            .map_err(|_| format!("no answer within {} s", HANDSHAKE.as_secs()))?
            .map_err(|e| e.to_string())
    }

    /// Waits a moment for the other ends to hear that links are closed.
    pub async fn linger(&self) {
        _ = timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }
}
