//! `/metrics` on an address of its own, for a Prometheus that has no key: plain HTTP, nothing else, off unless asked for.
use super::{CONTENT_TYPE, Family, render};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections at once, at most; how long each may be idle or take.
const CONNECTIONS_MAX: usize = 16;
const PATIENCE: Duration = Duration::from_secs(30);

/// Gathers what is to be told, each time that somebody asks.
pub type Scrape = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Vec<Family>> + Send>> + Send + Sync>;

/// Listens for as long as it isn't dropped.
pub struct Listener {
    /// Where, with the port that the system chose where 0 was asked for.
    pub address: SocketAddr,
    task: tokio::task::AbortHandle,
}

impl Listener {
    /// Takes the address.
    pub async fn open(address: SocketAddr, scrape: Scrape) -> std::io::Result<Listener> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(accept(listener, scrape)).abort_handle();
        Ok(Listener { address, task })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, scrape: Scrape) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // Whoever is one too many is hung up on.
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let scrape = scrape.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| respond(request, scrape.clone()));
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(16 << 10);
            // A scraper that breaks off comes again.
            _ = tokio::time::timeout(20 * PATIENCE, builder.serve_connection(TokioIo::new(stream), service))
                .await;
            drop(place);
        });
    }
}

async fn respond(
    request: Request<hyper::body::Incoming>,
    scrape: Scrape,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, render(&scrape().await)),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, String::new()),
        _ => (StatusCode::NOT_FOUND, "/metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    Ok(response)
}
