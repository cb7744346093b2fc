//! A running scheduler, as the other commands on its machine find it.
use crate::config::Config;
use crate::private;
use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
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

    /// Whether anybody listens there.
    pub(super) fn is_there(&self) -> bool {
        std::net::TcpStream::connect_timeout(&self.http, Duration::from_secs(2)).is_ok()
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

    async fn send(&self, method: Method, path: &str, body: String) -> anyhow::Result<Response<Incoming>> {
        let request = Request::builder()
            .method(method)
            .uri(format!("/weir/v1/{path}"))
            .header(HOST, self.http.to_string())
            .header(AUTHORIZATION, format!("Bearer {}", self.token))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        Ok(self.connect().await?.send_request(request).await?)
    }

    /// What happens from now on.
    pub(super) async fn events(&self) -> anyhow::Result<Events> {
        let unreachable = || format!("no scheduler answers at {}; it may have been killed", self.http);
        let asked = tokio::time::timeout(PATIENCE, self.send(Method::GET, "events", String::new())).await;
        let response = asked.with_context(unreachable)?.with_context(unreachable)?;
        if !response.status().is_success() {
            bail!("the scheduler at {} tells nothing (status {})", self.http, response.status());
        }
        Ok(Events { body: response.into_body(), unread: Vec::new() })
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let unreachable = || format!("no scheduler answers at {}; it may have been killed", self.http);
        let body = body.map(Value::to_string).unwrap_or_default();
        let response = self.send(method, path, body).await.with_context(unreachable)?;
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

/// The scheduler's event stream.
pub(super) struct Events {
    body: Incoming,
    unread: Vec<u8>,
}

impl Events {
    /// The next event: its name and its data. None after the last.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<(String, Value)>> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.unread.drain(..end + 2).collect();
                let event = String::from_utf8_lossy(&event);
                let field =
                    |name: &str| event.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
                if let (Some(kind), Some(data)) = (field("event:"), field("data:")) {
                    return Ok(Some((kind.to_owned(), serde_json::from_str(data)?)));
                }
                continue;
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            if let Ok(data) = frame?.into_data() {
                self.unread.extend_from_slice(&data);
            }
            if self.unread.len() > ANSWER_MAX {
                bail!("the scheduler sends an event without end");
            }
        }
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
