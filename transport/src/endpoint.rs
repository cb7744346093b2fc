//! QUIC endpoints: a scheduler listens on one UDP port, nodes dial it. Both speak TLS 1.3; the scheduler is known by its
//! pinned key, and a node proves its own key after the handshake.
use crate::crowd::Crowd;
use crate::identity::{Fingerprint, Identity};
use crate::link::{AnyLink, Link, quic};
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{Endpoint, IdleTimeout, Incoming, TransportConfig, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::time::timeout;

/// What native nodes ask for in the handshake.
const ALPN: &[u8] = b"weir/1";
/// The name in certificates; it means nothing, since their key is pinned.
const NAME: &str = "weir";
/// A link on which nothing comes for so long is dead.
const IDLE: Duration = Duration::from_secs(12);
/// Something is sent at least so often.
const KEEP_ALIVE: Duration = Duration::from_secs(4);
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
/// Bytes that a stream may be ahead of its reader: of tokens, which a scheduler reads, and of prompts, which a node reads.
const TOKENS_WINDOW: u32 = 32 << 10;
const PROMPT_WINDOW: u32 = 256 << 10;
/// Requests on a node at once, at most.
const REQUESTS_MAX: u32 = 4096;
/// Streams that a node opens: one for control, and room to grow.
const NODE_STREAMS_MAX: u32 = 4;

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
    arrived: Mutex<mpsc::Receiver<(Link, SocketAddr)>>,
}

impl Listener {
    /// Listens; must be called within a tokio runtime.
    pub fn bind(address: SocketAddr, cluster: &Identity) -> Result<Listener, EndpointError> {
        let config = server_config(cluster).map_err(EndpointError::Certificate)?;
        let endpoint =
            Endpoint::server(config, address).map_err(|error| EndpointError::Bind { address, error })?;
        let (arrivals, arrived) = mpsc::channel(ARRIVED_MAX);
        tokio::spawn(shake_hands(endpoint.clone(), arrivals));
        Ok(Listener { endpoint, arrived: Mutex::new(arrived) })
    }

    /// Where it listens, with the port that the system chose where 0 was asked for.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
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
async fn shake_hands(endpoint: Endpoint, arrivals: mpsc::Sender<(Link, SocketAddr)>) {
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
        let arrivals = arrivals.clone();
        tokio::spawn(async move {
            let from = incoming.remote_address();
            match timeout(HANDSHAKE, shake(incoming)).await {
                // The place is kept until somebody takes the link.
                Ok(Ok(link)) => _ = arrivals.send((link, from)).await,
                Ok(Err(error)) => tracing::debug!("{from}: {error}"),
                Err(_) => tracing::debug!("{from}: no handshake within {} s", HANDSHAKE.as_secs()),
            }
            drop((place, own_place));
        });
    }
}

async fn shake(incoming: Incoming) -> Result<Link, String> {
    let connection = incoming.accept().map_err(|e| e.to_string())?.await.map_err(|e| e.to_string())?;
    let data = connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    match data.and_then(|data| data.protocol).as_deref() {
        Some(ALPN) => Ok(Link(AnyLink::Quic(quic::Link::new(connection)))),
        other => Err(format!("it speaks {other:?}")),
    }
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
        let config = client_config(cluster);
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
                match self.try_one(at, config.clone()).await {
                    Ok(link) => return Ok(link),
                    Err(why) if why.contains(OTHER_KEY) => {
                        return Err(DialError::OtherCluster(address.clone()));
                    }
                    Err(why) => failures.push(format!("{at}: {why}")),
                }
            }
        }
        Err(DialError::Unreachable(failures.join("; ")))
    }

    async fn try_one(&self, at: SocketAddr, config: quinn::ClientConfig) -> Result<Link, String> {
        let connecting = self.endpoint.connect_with(config, at, NAME).map_err(|e| e.to_string())?;
        let connection = timeout(HANDSHAKE, connecting)
            .await
            .map_err(|_| format!("no answer within {} s", HANDSHAKE.as_secs()))?
            .map_err(|e| e.to_string())?;
        Ok(Link(AnyLink::Quic(quic::Link::new(connection))))
    }

    /// Waits a moment for the other ends to hear that links are closed.
    pub async fn linger(&self) {
        _ = timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn server_config(cluster: &Identity) -> Result<quinn::ServerConfig, String> {
    let (certificate, key) = certificate(cluster).map_err(|e| e.to_string())?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .map_err(|e| e.to_string())?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let tls = QuicServerConfig::try_from(tls).map_err(|e| e.to_string())?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(transport(NODE_STREAMS_MAX, TOKENS_WINDOW)));
    config.max_incoming(1024);
    Ok(config)
}

/// A self-signed certificate around the cluster's key, made anew each time: nodes look at the key only.
fn certificate(
    cluster: &Identity,
) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), rcgen::Error> {
    let key = PrivateKeyDer::Pkcs8(cluster.pkcs8().to_vec().into());
    let pair = rcgen::KeyPair::from_der_and_sign_algo(&key, &rcgen::PKCS_ED25519)?;
    let certificate = rcgen::CertificateParams::new(vec![NAME.to_owned()])?.self_signed(&pair)?;
    Ok((certificate.der().clone(), key))
}

fn client_config(cluster: Fingerprint) -> quinn::ClientConfig {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { cluster, provider: provider() }))
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = rustls::client::Resumption::disabled();
    let tls = QuicClientConfig::try_from(tls).expect("the provider has QUIC's initial cipher suite");
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport(REQUESTS_MAX, PROMPT_WINDOW)));
    config
}

fn transport(streams_max: u32, window: u32) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(window))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE).expect("it is short")))
        .keep_alive_interval(Some(KEEP_ALIVE));
    transport
}

/// What the verifier's error begins with.
const OTHER_KEY: &str = "the key is not the pinned one";

/// Takes one key and no other, in whatever certificate.
#[derive(Debug)]
struct Pinned {
    cluster: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        match Fingerprint::of(&parsed.subject_public_key_info()) == self.cluster {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(rustls::Error::General(OTHER_KEY.into())),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(CertificateError::BadSignature.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}
