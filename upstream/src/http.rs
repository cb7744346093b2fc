//! Connections to one upstream: kept for the next request, given up when nothing comes.
use crate::address::Address;
use crate::connect::{Connection, Connector};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::{Request, Response};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// Idle connections that are kept, at most, and for how long, unless the other end names a shorter time.
const IDLE_MAX: usize = 32;
const IDLE_FOR: Duration = Duration::from_secs(50);
/// Left of the time that the other end names: what is sent in its last moments may meet a closed door.
const MARGIN: Duration = Duration::from_secs(1);
/// For an idle connection to say that it is ready.
const READY: Duration = Duration::from_millis(100);

/// Why there is no response.
#[derive(Debug)]
pub(crate) enum HttpError {
    /// Nobody could be reached: why.
    Unreachable(String),
    /// Nothing came in time.
    Silent,
    /// The connection broke with the request on its way, or with the answer: how. Whether it was read, nobody knows.
    Broken(String),
    /// The connection broke before a byte of the request was written: how.
    Unsent(String),
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
    until: Instant,
}

/// A response whose body comes. Dropping it before the end closes the connection, which cancels the request.
pub(crate) struct Reply {
    pub response: Response<Incoming>,
    http: Arc<Http>,
    connection: Option<Connection>,
    /// The connection may be kept for so long behind the answer.
    idle_for: Duration,
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
    ///
    /// What may cost money is sent once: an idle connection that turns out to be closed gives way to another only if none
    /// of the request was written to it, or if the request may be repeated by its method.
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
            let request = request()?;
            let repeatable = request.method().is_idempotent();
            let sent = timeout(patience, connection.sender.try_send_request(request)).await;
            let mut error = match sent.map_err(|_| HttpError::Silent)? {
                Ok(response) => {
                    let idle_for = idle_for(response.headers());
                    let connection = Some(connection);
                    return Ok(Reply { response, http: self.clone(), connection, idle_for });
                }
                Err(error) => error,
            };
            // It comes back only if it was never begun.
            let unsent = error.take_message().is_some();
            let error = error.into_error();
            if was_idle && (unsent || repeatable && error.is_incomplete_message()) {
                continue;
            }
            let why = describe(&error);
            return Err(if unsent { HttpError::Unsent(why) } else { HttpError::Broken(why) });
        }
    }

    /// Has a connection ready, if there is none.
    pub async fn warm(&self) -> Result<(), HttpError> {
        let now = Instant::now();
        self.idle().retain(|idle| now < idle.until && !idle.connection.sender.is_closed());
        if self.idle().is_empty() {
            let connection = self.open().await?;
            self.keep(connection, IDLE_FOR);
        }
        Ok(())
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that is still good; the one used last, so that the others may go.
    async fn take(&self) -> Option<Connection> {
        loop {
            let Idle { mut connection, until } = self.idle().pop()?;
            let fresh = Instant::now() < until && !connection.sender.is_closed();
            if fresh && matches!(timeout(READY, connection.sender.ready()).await, Ok(Ok(()))) {
                return Some(connection);
            }
        }
    }

    fn keep(&self, connection: Connection, idle_for: Duration) {
        let mut idle = self.idle();
        let now = Instant::now();
        idle.retain(|idle| now < idle.until && !idle.connection.sender.is_closed());
        if idle.len() < IDLE_MAX && !idle_for.is_zero() && !connection.sender.is_closed() {
            idle.push(Idle { connection, until: now + idle_for });
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
                        self.http.keep(connection, self.idle_for);
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

/// How long the other end keeps a connection, as far as it says so: `Keep-Alive: timeout=5, max=100`.
fn idle_for(headers: &HeaderMap) -> Duration {
    let said = headers.get("keep-alive").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let timeout = said.split(',').find_map(|part| part.trim().strip_prefix("timeout="));
    let seconds = timeout.and_then(|seconds| seconds.trim().parse().ok());
    seconds.map_or(IDLE_FOR, |s| Duration::from_secs(s).saturating_sub(MARGIN).min(IDLE_FOR))
}

/// hyper names the kind; what is behind it says more.
fn describe(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_kept_no_longer_than_the_other_end_keeps_them() {
        let check = |said: &'static str, seconds: u64| {
            let headers = HeaderMap::from_iter([(
                hyper::header::HeaderName::from_static("keep-alive"),
                said.parse().unwrap(),
            )]);
            assert_eq!(idle_for(&headers), Duration::from_secs(seconds), "{said}");
        };
        check("timeout=5, max=100", 4);
        check("max=100, timeout=1", 0);
        check("timeout=0", 0);
        check("timeout=3600", 50);
        check("soon", 50);
        assert_eq!(idle_for(&HeaderMap::new()), IDLE_FOR);
    }
}
