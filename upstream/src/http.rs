//! Connections to one upstream: kept for the next request, given up when nothing comes.
use crate::address::Address;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls_platform_verifier::BuilderVerifierExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, ClientConfig};

/// Idle connections that are kept, at most, and for how long.
const IDLE_MAX: usize = 32;
const IDLE_FOR: Duration = Duration::from_secs(50);
/// For an idle connection to say that it is ready.
const READY: Duration = Duration::from_millis(100);

/// Why there is no response.
#[derive(Debug)]
pub(crate) enum HttpError {
    /// Nobody could be reached: why.
    Unreachable(String),
    /// Nothing came in time.
    Silent,
    /// The connection broke: how.
    Broken(String),
}

/// Connections to one address.
pub(crate) struct Http {
    address: Address,
    /// Made once; none for plain HTTP.
    tls: Option<Result<TlsConnector, String>>,
    connect: Duration,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// Open as long as it isn't dropped.
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    task: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A response whose body comes. Dropping it before the end closes the connection, which cancels the request.
pub(crate) struct Reply {
    pub response: Response<Incoming>,
    http: Arc<Http>,
    connection: Option<Connection>,
}

impl Http {
    pub fn new(address: Address, connect: Duration) -> Arc<Http> {
        let tls = address.tls.then(connector);
        Arc::new(Http { address, tls, connect, idle: Mutex::default() })
    }

    /// Where it leads.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Sends a request; the head of its answer must come within `patience`.
    pub async fn send(
        self: &Arc<Http>,
        request: &(dyn Fn() -> Result<Request<Full<Bytes>>, HttpError> + Sync),
        patience: Duration,
    ) -> Result<Reply, HttpError> {
        loop {
            let kept = self.take().await;
            let was_idle = kept.is_some();
            let mut connection = match kept {
                Some(connection) => connection,
                None => self.open().await?,
            };
            let sent = timeout(patience, connection.sender.send_request(request()?)).await;
            match sent.map_err(|_| HttpError::Silent)? {
                Ok(response) => {
                    return Ok(Reply { response, http: self.clone(), connection: Some(connection) });
                }
                // The other end had closed it; nobody has read the request.
                Err(error)
                    if was_idle
                        && (error.is_canceled() || error.is_closed() || error.is_incomplete_message()) => {}
                Err(error) => return Err(HttpError::Broken(describe(&error))),
            }
        }
    }

    /// Has a connection ready, if there is none.
    pub async fn warm(&self) -> Result<(), HttpError> {
        let now = Instant::now();
        self.idle().retain(|idle| now - idle.since < IDLE_FOR && !idle.connection.sender.is_closed());
        if self.idle().is_empty() {
            let connection = self.open().await?;
            self.keep(connection);
        }
        Ok(())
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that is still good; the one used last, so that the others may go.
    async fn take(&self) -> Option<Connection> {
        loop {
            let Idle { mut connection, since } = self.idle().pop()?;
            let fresh = since.elapsed() < IDLE_FOR && !connection.sender.is_closed();
            if fresh && matches!(timeout(READY, connection.sender.ready()).await, Ok(Ok(()))) {
                return Some(connection);
            }
        }
    }

    fn keep(&self, connection: Connection) {
        let mut idle = self.idle();
        let now = Instant::now();
        idle.retain(|idle| now - idle.since < IDLE_FOR && !idle.connection.sender.is_closed());
        if idle.len() < IDLE_MAX && !connection.sender.is_closed() {
            idle.push(Idle { connection, since: now });
        }
    }

    async fn open(&self) -> Result<Connection, HttpError> {
        let opened = timeout(self.connect, self.connect()).await;
        let late = || format!("no connection within {:.1} s", self.connect.as_secs_f64());
        opened.unwrap_or_else(|_| Err(late())).map_err(|why| {
            HttpError::Unreachable(format!("{} can't be reached: {why}", self.address.authority))
        })
    }

    async fn connect(&self) -> Result<Connection, String> {
        let text = |e: std::io::Error| e.to_string();
        let stream =
            TcpStream::connect((self.address.host.as_str(), self.address.port)).await.map_err(text)?;
        stream.set_nodelay(true).map_err(text)?;
        let Some(tls) = &self.tls else { return shake_hands(stream).await };
        let name = ServerName::try_from(self.address.host.clone()).map_err(|e| e.to_string())?;
        shake_hands(tls.clone()?.connect(name, stream).await.map_err(text)?).await
    }
}

impl Reply {
    /// The next bytes of the body, which must come within `patience`; none after the last.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Bytes>, HttpError> {
        loop {
            match timeout(patience, self.response.frame()).await.map_err(|_| HttpError::Silent)? {
                None => {
                    if let Some(connection) = self.connection.take() {
                        self.http.keep(connection);
                    }
                    return Ok(None);
                }
                Some(Err(error)) => return Err(HttpError::Broken(describe(&error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => return Ok(Some(bytes)),
                    Err(_trailers) => {}
                },
            }
        }
    }

    /// The whole body, or as much as `most` bytes of it.
    pub async fn whole(&mut self, most: usize, patience: Duration) -> Result<Vec<u8>, HttpError> {
        let deadline = tokio::time::Instant::now() + patience;
        let read = async {
            let mut body = Vec::new();
            while let Some(bytes) = self.next(patience).await? {
                let room = most - body.len();
                body.extend_from_slice(&bytes[..bytes.len().min(room)]);
                if bytes.len() > room {
                    break;
                }
            }
            Ok(body)
        };
        tokio::time::timeout_at(deadline, read).await.unwrap_or(Err(HttpError::Silent))
    }
}

/// hyper names the kind; what is behind it says more.
fn describe(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// The crypto provider is named: a program that links two of them has no default one.
fn connector() -> Result<TlsConnector, String> {
    let config = || -> Result<ClientConfig, rustls::Error> {
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions()?.with_platform_verifier()?;
        Ok(builder.with_no_client_auth())
    };
    config().map(|config| TlsConnector::from(Arc::new(config))).map_err(|e| e.to_string())
}

async fn shake_hands<S>(stream: S) -> Result<Connection, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let task = tokio::spawn(async move { _ = connection.await });
    Ok(Connection { sender, task: task.abort_handle() })
}
