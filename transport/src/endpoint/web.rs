//! WebTransport on the same port: how browsers, which can't speak `weir/1`, come by a link.
//!
//! A page is told the hash of a short-lived certificate ([`WebCertificate`]), and connects to [`crate::WEB_PATH`]. The scheduler opens
//! one unidirectional stream with 32 random bytes; from then on both ends open bidirectional streams of frames, as on any
//! link. A browser doesn't let a page see the TLS exporter, so what both ends know, and the node signs, is
//! `SHA-256("weir/1 web" || certificate's hash || those bytes)`: good for this one session, and worthless to somebody
//! in between, whose certificate is another.
use super::tls::{certified, sha256};
use crate::identity::{IdentityError, random};
use crate::link::quic;
use crate::signed::{WEB_PATH, of_session};
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::CertifiedKey;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use web_transport_quinn::http::StatusCode;
use web_transport_quinn::{Request, Session};

/// What browsers ask for in the handshake.
pub(super) const ALPN: &[u8] = web_transport_quinn::ALPN.as_bytes();
/// Browsers take a certificate by its hash only if it is valid for at most 14 days.
const VALID: Duration = Duration::from_secs(13 * DAY);
/// Clocks may differ by as much.
const BACKDATED: Duration = Duration::from_secs(DAY);
/// Then the next one is shown.
const SHOWN: Duration = Duration::from_secs(6 * DAY);
const DAY: u64 = 24 * 3600;

/// The certificate that browsers see. Made at random, and again every six days; clones are the same.
#[derive(Clone, Debug)]
pub struct WebCertificate(Arc<Mutex<Shown>>);

#[derive(Clone, Debug)]
struct Shown {
    key: Arc<CertifiedKey>,
    hash: [u8; 32],
    since: SystemTime,
}

impl WebCertificate {
    pub(super) fn new(now: SystemTime) -> Result<WebCertificate, String> {
        Ok(WebCertificate(Arc::new(Mutex::new(Shown::new(now)?))))
    }

    /// The SHA-256 of the certificate that is shown now: for a page's `serverCertificateHashes`.
    pub fn hash(&self, now: SystemTime) -> [u8; 32] {
        self.current(now).hash
    }

    pub(super) fn key(&self, now: SystemTime) -> Arc<CertifiedKey> {
        self.current(now).key.clone()
    }

    fn current(&self, now: SystemTime) -> MutexGuard<'_, Shown> {
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A clock that was set back is no reason to keep one whose validity has not begun.
        if now.duration_since(shown.since).unwrap_or(Duration::MAX) > SHOWN {
            match Shown::new(now) {
                Ok(next) => *shown = next,
                Err(why) => tracing::error!("browsers see an old certificate: {why}"),
            }
        }
        shown
    }
}

impl Shown {
    fn new(now: SystemTime) -> Result<Shown, String> {
        let text = |e: rcgen::Error| e.to_string();
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(text)?;
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).map_err(text)?;
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now - BACKDATED + VALID).into();
        let certificate = params.self_signed(&pair).map_err(text)?;
        let hash = sha256(certificate.der());
        let key = certified(certificate, PrivateKeyDer::Pkcs8(pair.serialize_der().into()))?;
        Ok(Shown { key: Arc::new(key), hash, since: now })
    }
}

/// The scheduler's end, after the handshake with a browser that was shown the certificate with this hash.
pub(super) async fn welcome(
    connection: quinn::Connection,
    certificate: [u8; 32],
) -> Result<quic::Link, String> {
    let request = Request::accept(connection).await.map_err(|e| e.to_string())?;
    if request.url.path() != WEB_PATH {
        let asked = request.url.path().to_owned();
        request.reject(StatusCode::NOT_FOUND).await.map_err(|e| e.to_string())?;
        return Err(format!("it asks for {asked:?}"));
    }
    let session = request.ok().await.map_err(|e| e.to_string())?;
    let nonce: [u8; 32] = random().map_err(|e: IdentityError| e.to_string())?;
    let mut stream = session.open_uni().await.map_err(|e| e.to_string())?;
    stream.write_all(&nonce).await.map_err(|e| e.to_string())?;
    stream.finish().map_err(|e| e.to_string())?;
    Ok(quic::Link::web(session, binding(&certificate, &nonce)))
}

/// The node's end, after the handshake.
pub(super) async fn enter(
    connection: quinn::Connection,
    authority: &str,
    certificate: [u8; 32],
) -> Result<quic::Link, String> {
    let url = format!("https://{authority}{WEB_PATH}");
    let url: url::Url = url.parse().map_err(|_| format!("{url} is no address"))?;
    let session = Session::connect(connection, url).await.map_err(|e| e.to_string())?;
    let mut stream = session.accept_uni().await.map_err(|e| e.to_string())?;
    let mut nonce = [0; 32];
    stream.read_exact(&mut nonce).await.map_err(|e| e.to_string())?;
    Ok(quic::Link::web(session, binding(&certificate, &nonce)))
}

fn binding(certificate: &[u8; 32], nonce: &[u8; 32]) -> [u8; 32] {
    sha256(&of_session(certificate, nonce))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_shown_for_six_days_and_valid_for_less_than_fourteen() {
        let now = SystemTime::now();
        let days = |n: u64| now + Duration::from_secs(n * DAY);
        let certificate = WebCertificate::new(now).unwrap();
        let first = certificate.hash(now);
        assert_eq!(certificate.hash(days(6)), first);
        let second = certificate.clone().hash(days(6) + Duration::from_secs(1));
        assert_ne!(second, first);
        assert_eq!(certificate.hash(days(7)), second);
        assert_ne!(certificate.hash(days(1)), second, "the clock was set back");
        assert!(VALID <= Duration::from_secs(14 * DAY) && SHOWN < VALID - BACKDATED * 2);
    }
}
