//! A running scheduler, as the other commands on its machine find it.
use crate::config::Config;
use crate::private;
use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use weir_transport::{Fingerprint, tls_to};

/// For a whole exchange.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer, in bytes.
const ANSWER_MAX: usize = 64 << 20;

/// What `weir serve --listen` leaves in its state folder, for its owner's eyes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Serving {
    /// Where its gateway can be called from this machine.
    http: SocketAddr,
    /// The key that it shows there; plain HTTP where none.
    #[serde(default)]
    key: Option<String>,
    /// The admin token.
    token: String,
}

/// The file of a [`Serving`], gone when dropped.
pub(super) struct Announced(PathBuf);

impl Drop for Announced {
    fn drop(&mut self) {
        // If it stays, the next command finds that nobody answers there.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn file(folder: &Path) -> PathBuf {
    folder.join("serving.json")
}

/// The folder for state.
pub(super) fn folder(config: &Config, asked: Option<&Path>) -> anyhow::Result<PathBuf> {
    config.state_folder(asked).context("there is no folder for state; name one with --state DIR")
}

impl Serving {
    /// A gateway at `http`; wherever it listens, it can be called by loopback if it listens everywhere.
    pub(super) fn new(mut http: SocketAddr, key: Option<Fingerprint>, token: String) -> Serving {
        if http.ip().is_unspecified() {
            http.set_ip(match http {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        Serving { http, key: key.map(|key| key.to_string()), token }
    }

    /// Leaves it in the folder for as long as the result lives.
    pub(super) fn announce(&self, folder: &Path) -> anyhow::Result<Announced> {
        let path = file(folder);
        private::write_file(&path, &serde_json::to_vec(self)?).with_context(|| path.display().to_string())?;
        Ok(Announced(path))
    }

    /// The scheduler whose state is in the folder.
    pub(super) fn find(config: &Config, state: Option<&Path>) -> anyhow::Result<Serving> {
        let folder = folder(config, state)?;
        let path = file(&folder);
        let bytes = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => anyhow!(
                "no scheduler runs with the state in {}; start one with `weir serve --listen ADDR`, or name its folder \
                 with --state DIR",
                folder.display()
            ),
            _ => anyhow!("{}: {error}", path.display()),
        })?;
        serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
    }

    /// Asks its admin API; `path` is what follows `/weir/v1/`.
    pub(super) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        let asked = tokio::time::timeout(PATIENCE, self.exchange(method, path, body)).await;
        asked.map_err(|_| anyhow!("the scheduler at {} does not answer", self.http))?
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(self.http).await?;
        let Some(key) = &self.key else { return open(stream).await };
        // Its certificate may name other machines only; its key is what we were told.
        let tls = TlsConnector::from(Arc::new(tls_to(key.parse()?)));
        open(tls.connect(ServerName::from(self.http.ip()), stream).await?).await
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let unreachable = || format!("no scheduler answers at {}; it may have been killed", self.http);
        let mut sender = self.connect().await.with_context(unreachable)?;
        let request = Request::builder()
            .method(method)
            .uri(format!("/weir/v1/{path}"))
            .header(HOST, self.http.to_string())
            .header(AUTHORIZATION, format!("Bearer {}", self.token))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.map(Value::to_string).unwrap_or_default())))?;
        let response = sender.send_request(request).await.with_context(unreachable)?;
        let status = response.status();
        let read = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        let bytes = read.map_err(|error| anyhow!("{error}"))?.to_bytes();
        let value: Value = serde_json::from_slice(&bytes).context("what answers is no scheduler")?;
        if !status.is_success() {
            let message = value["error"]["message"].as_str().unwrap_or("it does not say why");
            bail!("{message}");
        }
        Ok(value)
    }
}

async fn open<S>(stream: S) -> anyhow::Result<SendRequest<Full<Bytes>>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}
