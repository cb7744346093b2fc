//! A connection to a server, plain or encrypted.
use crate::address::Address;
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls_platform_verifier::BuilderVerifierExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

/// What connections to one address have in common.
pub struct Connector {
    /// None for plain HTTP.
    tls: Option<TlsConnector>,
}

/// Open as long as it isn't dropped.
pub struct Connection {
    /// Takes one request after the other.
    pub sender: SendRequest<Full<Bytes>>,
    task: AbortHandle,
}

impl Connector {
    /// Fails, and says why, where this machine's trust can't be read.
    pub fn to(address: &Address) -> Result<Connector, String> {
        let tls = address.tls.then(tls).transpose().map_err(|e| e.to_string())?;
        Ok(Connector { tls: tls.map(|config| TlsConnector::from(Arc::new(config))) })
    }

    /// The same to a server whose certificate an authority of `pem` has signed, instead of one that this machine trusts.
    pub fn trusting(address: &Address, pem: &[u8]) -> Result<Connector, String> {
        let tls = address.tls.then(|| tls_by(pem)).transpose()?;
        Ok(Connector { tls: tls.map(|config| TlsConnector::from(Arc::new(config))) })
    }

    /// Finds the host, connects and shakes hands within so long; or says, for a person, why not.
    pub async fn open(&self, address: &Address, within: Duration) -> Result<Connection, String> {
        let opened = timeout(within, self.connect(address)).await;
        opened.unwrap_or_else(|_| Err(format!("no connection within {:.1} s", within.as_secs_f64())))
    }

    async fn connect(&self, address: &Address) -> Result<Connection, String> {
        let text = |e: std::io::Error| e.to_string();
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await.map_err(text)?;
        stream.set_nodelay(true).map_err(text)?;
        let Some(tls) = &self.tls else { return shake_hands(stream).await };
        let name = ServerName::try_from(address.host.clone()).map_err(|e| e.to_string())?;
        shake_hands(tls.connect(name, stream).await.map_err(text)?).await
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The crypto provider is named: a program that links two of them has no default one.
fn tls() -> Result<ClientConfig, rustls::Error> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions()?.with_platform_verifier()?;
    Ok(builder.with_no_client_auth())
}

fn tls_by(pem: &[u8]) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate =
            certificate.map_err(|e| format!("an authority's certificate can't be read: {e}"))?;
        roots.add(certificate).map_err(|e| e.to_string())?;
    }
    if roots.is_empty() {
        return Err("there is no certificate of an authority (PEM)".into());
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

async fn shake_hands<S>(stream: S) -> Result<Connection, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let task = tokio::spawn(async move { _ = connection.await });
    Ok(Connection { sender, task: task.abort_handle() })
}
