//! A connection to a gateway.
use super::address::Address;
use crate::ClientError;
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
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, ClientConfig};

/// To find the host, connect and shake hands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Open as long as it isn't dropped.
pub(super) struct Connection {
    pub(super) sender: SendRequest<Full<Bytes>>,
    task: AbortHandle,
}

impl Connection {
    pub(super) async fn open(address: &Address) -> Result<Connection, ClientError> {
        let unreachable = |why: String| ClientError::Unreachable { host: address.authority.clone(), why };
        let opened = tokio::time::timeout(CONNECT_TIMEOUT, open(address)).await;
        let opened =
            opened.unwrap_or_else(|_| Err(format!("no connection within {} s", CONNECT_TIMEOUT.as_secs())));
        opened.map_err(unreachable)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn open(address: &Address) -> Result<Connection, String> {
    let text = |e: std::io::Error| e.to_string();
    let stream = TcpStream::connect((address.host.as_str(), address.port)).await.map_err(text)?;
    stream.set_nodelay(true).map_err(text)?;
    if !address.tls {
        return shake_hands(stream).await;
    }
    let name = ServerName::try_from(address.host.clone()).map_err(|e| e.to_string())?;
    let connector = TlsConnector::from(Arc::new(tls().map_err(|e| e.to_string())?));
    shake_hands(connector.connect(name, stream).await.map_err(text)?).await
}

/// The crypto provider is named: a program that links two of them has no default one.
fn tls() -> Result<ClientConfig, rustls::Error> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions()?.with_platform_verifier()?;
    Ok(builder.with_no_client_auth())
}

async fn shake_hands<S>(stream: S) -> Result<Connection, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let task = tokio::spawn(async move { _ = connection.await });
    Ok(Connection { sender, task: task.abort_handle() })
}
