//! Certificates and how they are checked: a cluster's by its pinned key, a web one by its hash.
use super::web::{self, WebCertificate};
use crate::identity::{Fingerprint, Identity};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{AckFrequencyConfig, IdleTimeout, TransportConfig, VarInt};
use ring::digest::{SHA256, digest};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring as provider_of, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What native nodes ask for in the handshake.
pub(super) const ALPN: &[u8] = b"weir/1";
/// The name in certificates; it means nothing, since they are pinned.
pub(super) const NAME: &str = "weir";
/// A link on which nothing comes for so long is dead.
const IDLE: Duration = Duration::from_secs(12);
/// The other end acknowledges alone only after so many packets, or after its usual 25 ms; most acknowledgements travel with an
/// answer instead of waking somebody for themselves.
const PACKETS_AN_ACK: u32 = 8;
/// Something is sent at least so often.
const KEEP_ALIVE: Duration = Duration::from_secs(4);
/// Bytes that a stream may be ahead of its reader: of tokens, which a scheduler reads, and of prompts, which a node reads.
const TOKENS_WINDOW: u32 = 32 << 10;
const PROMPT_WINDOW: u32 = 256 << 10;
/// Requests on a node at once, at most.
const REQUESTS_MAX: u32 = 4096;
/// Streams that a node opens: one for control, one that is HTTP/3's, and room to grow.
const NODE_STREAMS_MAX: u32 = 4;
/// Unidirectional streams of HTTP/3: settings and header compression.
const HTTP3_STREAMS_MAX: u32 = 4;
/// Browsers want datagrams to be possible. Nobody reads them, so the newest one is all that is kept.
const DATAGRAM_MAX: usize = 1500;
/// What the verifier's error begins with.
pub(super) const OTHER_KEY: &str = "the key is not the pinned one";

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(provider_of::default_provider())
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

/// One port for both sorts of nodes: the handshake's ALPN decides which certificate is shown.
pub(super) fn server_config(cluster: &Identity, web: WebCertificate) -> Result<quinn::ServerConfig, String> {
    let native = native_certificate(cluster)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(ByAlpn { native: Arc::new(native), web }));
    tls.alpn_protocols = vec![ALPN.to_vec(), web::ALPN.to_vec()];
    let tls = QuicServerConfig::try_from(tls).map_err(|e| e.to_string())?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    let mut transport = transport(NODE_STREAMS_MAX, TOKENS_WINDOW);
    transport
        .max_concurrent_uni_streams(VarInt::from_u32(HTTP3_STREAMS_MAX))
        .datagram_receive_buffer_size(Some(DATAGRAM_MAX));
    config.transport_config(Arc::new(transport));
    config.max_incoming(1024);
    Ok(config)
}

/// A self-signed certificate around the cluster's key, made anew each time: nodes look at the key only.
fn native_certificate(cluster: &Identity) -> Result<CertifiedKey, String> {
    let key = PrivateKeyDer::Pkcs8(cluster.pkcs8().to_vec().into());
    let pair =
        rcgen::KeyPair::from_der_and_sign_algo(&key, &rcgen::PKCS_ED25519).map_err(|e| e.to_string())?;
    let params = rcgen::CertificateParams::new(vec![NAME.to_owned()]).map_err(|e| e.to_string())?;
    certified(params.self_signed(&pair).map_err(|e| e.to_string())?, key)
}

pub(super) fn certified(
    certificate: rcgen::Certificate,
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, String> {
    let key = provider_of::sign::any_supported_type(&key).map_err(|e| e.to_string())?;
    Ok(CertifiedKey::new(vec![certificate.der().clone()], key))
}

/// Shows native nodes the cluster's certificate, and browsers the one whose hash they were told.
#[derive(Debug)]
struct ByAlpn {
    native: Arc<CertifiedKey>,
    web: WebCertificate,
}

impl ResolvesServerCert for ByAlpn {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let wants = |protocol: &[u8]| hello.alpn().is_some_and(|mut all| all.any(|one| one == protocol));
        if wants(ALPN) {
            return Some(self.native.clone());
        }
        wants(web::ALPN).then(|| self.web.key(SystemTime::now()))
    }
}

/// For links to the cluster with this key.
pub(super) fn native_client(cluster: Fingerprint) -> quinn::ClientConfig {
    client(ALPN, Pin::Key(cluster), transport(REQUESTS_MAX, PROMPT_WINDOW))
}

/// For WebTransport to whoever has this certificate.
pub(super) fn web_client(certificate: [u8; 32]) -> quinn::ClientConfig {
    let mut transport = transport(REQUESTS_MAX, PROMPT_WINDOW);
    transport.max_concurrent_uni_streams(VarInt::from_u32(HTTP3_STREAMS_MAX));
    client(web::ALPN, Pin::Certificate(certificate), transport)
}

/// TLS 1.3 to whoever proves this key, in whatever certificate.
pub fn tls_to(key: Fingerprint) -> rustls::ClientConfig {
    pinned(Pin::Key(key))
}

fn pinned(pin: Pin) -> rustls::ClientConfig {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { pin, provider: provider() }))
        .with_no_client_auth();
    tls.resumption = rustls::client::Resumption::disabled();
    tls
}

fn client(alpn: &[u8], pin: Pin, transport: TransportConfig) -> quinn::ClientConfig {
    let mut tls = pinned(pin);
    tls.alpn_protocols = vec![alpn.to_vec()];
    let tls = QuicClientConfig::try_from(tls).expect("the provider has QUIC's initial cipher suite");
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    config
}

fn transport(streams_max: u32, window: u32) -> TransportConfig {
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(PACKETS_AN_ACK));
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(window))
        .datagram_receive_buffer_size(None)
        .ack_frequency_config(Some(acks))
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE).expect("it is short")))
        .keep_alive_interval(Some(KEEP_ALIVE));
    transport
}

/// What the other end must show.
#[derive(Debug)]
enum Pin {
    /// This key, in whatever certificate.
    Key(Fingerprint),
    /// This certificate, by its SHA-256.
    Certificate([u8; 32]),
}

#[derive(Debug)]
struct Pinned {
    pin: Pin,
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
        let holds = match self.pin {
            Pin::Key(key) => Fingerprint::of_certificate(end_entity) == Some(key),
            Pin::Certificate(hash) => sha256(end_entity) == hash,
        };
        match holds {
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
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
