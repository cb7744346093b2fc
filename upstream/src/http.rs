//! Connections to one upstream: kept for the next request, given up when nothing comes.
use crate::address::Address;
use crate::connect::{Connection, Connector};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::timeout;

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
    /// Made once.
    connector: Result<Connector, String>,
    connect: Duration,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// A response whose body comes. Dropping it before the end closes the connection, which cancels the request.
pub(crate) struct Reply {
    pub response: Response<Incoming>,
    http: Arc<Http>,
    connection: Option<Connection>,
}

impl Http {
    pub fn new(address: Address, connect: Duration) -> Arc<Http> {
        let connector = Connector::to(&address);
        Arc::new(Http { address, connector, connect, idle: Mutex::default() })
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
        let connector = self.connector.as_ref().map_err(|why| why.clone());
        let opened = match connector {
            Ok(connector) => connector.open(&self.address, self.connect).await,
            Err(why) => Err(why),
        };
        opened.map_err(|why| {
            HttpError::Unreachable(format!("{} can't be reached: {why}", self.address.authority))
        })
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
