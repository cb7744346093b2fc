//! Sends spans and metrics to a collector, from a thread of its own.
//!
//! Nobody waits for it: a queue takes what there is room for, and the rest is dropped and counted. A collector that can't
//! be reached or refuses is told of once, until it has worked again.
use super::metrics::Family;
use super::otlp::{self, Resource};
use super::span::Span;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc as blocking};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use weir_upstream::{Address, Connection, Connector};

/// Spans in the queue, at most; and in one message.
const QUEUE_MAX: usize = 4096;
const BATCH_MAX: usize = 512;
/// Times that a message is sent which a collector couldn't take just now; and the pause before, which doubles.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes of a collector's answer that are read.
const ANSWER_MAX: usize = 64 << 10;

/// Where to, and how.
#[derive(Clone, Debug)]
pub struct ExportConfig {
    /// Where spans go; none where they don't.
    pub traces: Option<Target>,
    /// Where metrics go.
    pub metrics: Option<Target>,
    /// Sent with each request: a collector's key, most likely.
    pub headers: Vec<(String, String)>,
    /// For one request.
    pub timeout: Duration,
    /// How long spans wait for company.
    pub delay: Duration,
    /// How often metrics are sent.
    pub metrics_every: Duration,
    /// What this process is: `service.name` and its like.
    pub resource: Vec<(String, String)>,
}

/// `https://HOST:PORT/PATH`.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    address: Address,
    path: String,
}

impl Target {
    /// The URL as it is; none where it is none.
    pub fn exact(url: &str) -> Option<Target> {
        let address = Address::parse(url)?;
        let rest = url.trim().split_once("://").map_or(url.trim(), |(_, rest)| rest);
        let path = rest.find('/').map_or("/", |at| &rest[at..]).to_owned();
        Some(Target { address, path })
    }

    /// `signal` (`traces`, `metrics`) below the endpoint of a collector.
    pub fn below(endpoint: &str, signal: &str) -> Option<Target> {
        Target::exact(&format!("{}/v1/{signal}", endpoint.trim().trim_end_matches('/')))
    }
}

enum Item {
    Span(Box<Span>),
    Metrics(Vec<Family>, SystemTime),
    /// Everything before it has been dealt with.
    Flush(blocking::Sender<()>),
}

/// The end of the queue that fills it.
pub(super) struct Exporter {
    queue: mpsc::Sender<Item>,
    dropped: Arc<AtomicU64>,
    spans: bool,
    metrics_every: Option<Duration>,
}

impl Exporter {
    pub fn start(config: ExportConfig) -> Result<Exporter, String> {
        let (queue, items) = mpsc::channel(QUEUE_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("can't export telemetry: {error}"))?;
        let spans = config.traces.is_some();
        let metrics_every = config.metrics.as_ref().map(|_| config.metrics_every);
        let sender = Sender::new(config, dropped.clone())?;
        let thread = std::thread::Builder::new().name("weir-otlp".into());
        let run = move || runtime.block_on(sender.run(items));
        thread.spawn(run).map_err(|error| format!("can't export telemetry: {error}"))?;
        Ok(Exporter { queue, dropped, spans, metrics_every })
    }

    pub fn takes_spans(&self) -> bool {
        self.spans
    }

    pub fn metrics_every(&self) -> Option<Duration> {
        self.metrics_every
    }

    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub fn span(&self, span: Span) {
        self.push(Item::Span(Box::new(span)));
    }

    pub fn metrics(&self, families: Vec<Family>, now: SystemTime) {
        self.push(Item::Metrics(families, now));
    }

    fn push(&self, item: Item) {
        if self.queue.try_send(item).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn flush(&self, within: Duration) {
        let (done, flushed) = blocking::channel();
        // A full queue is not worth waiting for.
        if self.queue.try_send(Item::Flush(done)).is_ok() {
            _ = flushed.recv_timeout(within);
        }
    }
}

/// The end that empties it.
struct Sender {
    config: ExportConfig,
    resource: Resource,
    headers: Vec<(HeaderName, HeaderValue)>,
    began: SystemTime,
    dropped: Arc<AtomicU64>,
    traces: Option<Line>,
    metrics: Option<Line>,
}

/// A target and the connection to it.
struct Line {
    target: Target,
    connector: Connector,
    connection: Option<Connection>,
    /// It was said that nothing can be sent.
    said: bool,
}

/// Why a message did not arrive.
struct Refused {
    why: String,
    /// Later it may.
    may_pass: bool,
}

impl Sender {
    fn new(config: ExportConfig, dropped: Arc<AtomicU64>) -> Result<Sender, String> {
        let line = |target: &Target| {
            let connector = Connector::to(&target.address)?;
            Ok::<_, String>(Line { target: target.clone(), connector, connection: None, said: false })
        };
        let traces = config.traces.as_ref().map(line).transpose()?;
        let metrics = config.metrics.as_ref().map(line).transpose()?;
        let wrong = |name: &str| format!("the header {name:?} for the collector can't be sent");
        let headers = config.headers.iter().map(|(name, value)| {
            let mut value = HeaderValue::try_from(value).map_err(|_| wrong(name))?;
            value.set_sensitive(true);
            Ok((HeaderName::try_from(name).map_err(|_| wrong(name))?, value))
        });
        let headers = headers.collect::<Result<Vec<_>, String>>()?;
        let resource = Resource(config.resource.clone());
        let began = SystemTime::now();
        Ok(Sender { resource, headers, began, dropped, traces, metrics, config })
    }

    /// Until nobody can fill the queue any more.
    async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        let (mut batch, mut spans) = (Vec::with_capacity(BATCH_MAX), Vec::with_capacity(BATCH_MAX));
        while items.recv_many(&mut batch, 1).await > 0 {
            let until = Instant::now() + self.config.delay;
            // Company.
            while batch.len() < BATCH_MAX && !batch.iter().any(|item| !matches!(item, Item::Span(_))) {
                let room = BATCH_MAX - batch.len();
                match tokio::time::timeout_at(until, items.recv_many(&mut batch, room)).await {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => break,
                }
            }
            let mut told = Vec::new();
            for item in batch.drain(..) {
                match item {
                    Item::Span(span) => spans.push(*span),
                    Item::Metrics(families, now) => {
                        let body = otlp::metrics(&self.resource, &families, self.began, now);
                        self.deliver(false, body, 1).await;
                    }
                    Item::Flush(done) => told.push(done),
                }
            }
            if !spans.is_empty() {
                let body = otlp::traces(&self.resource, &spans);
                self.deliver(true, body, spans.len() as u64).await;
                spans.clear();
            }
            // Whoever waited may have stopped.
            told.into_iter().for_each(|done| _ = done.send(()));
        }
    }

    /// Sends a message with so many items, more than once if need be.
    async fn deliver(&mut self, traces: bool, body: Vec<u8>, count: u64) {
        let line = if traces { &mut self.traces } else { &mut self.metrics };
        let Some(line) = line else { return };
        let body = Bytes::from(body);
        let mut pause = PAUSE;
        for tried in 1.. {
            let sent = timeout(self.config.timeout, line.send(&self.headers, body.clone())).await;
            let refused = match sent {
                Ok(Ok(())) => {
                    if std::mem::replace(&mut line.said, false) {
                        tracing::warn!(
                            "the telemetry collector {} works again",
                            line.target.address.authority
                        );
                    }
                    return;
                }
                Ok(Err(refused)) => refused,
                Err(_) => Refused { why: "it does not answer".into(), may_pass: true },
            };
            line.connection = None;
            if !std::mem::replace(&mut line.said, true) {
                tracing::warn!(
                    "telemetry can't be sent to {}: {}; what it doesn't take is dropped",
                    line.target.address.authority,
                    refused.why
                );
            }
            if !refused.may_pass || tried >= TRIES {
                self.dropped.fetch_add(count, Ordering::Relaxed);
                return;
            }
            sleep(pause).await;
            pause *= 2;
        }
    }
}

impl Line {
    async fn send(&mut self, headers: &[(HeaderName, HeaderValue)], body: Bytes) -> Result<(), Refused> {
        let broken = |why: String| Refused { why, may_pass: true };
        let address = &self.target.address;
        let mut connection = match self.connection.take() {
            Some(open) if !open.sender.is_closed() => open,
            _ => self.connector.open(address, Duration::from_secs(10)).await.map_err(broken)?,
        };
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(&self.target.path)
            .header(HOST, &address.authority)
            .header(USER_AGENT, concat!("weir/", env!("CARGO_PKG_VERSION")))
            .header(CONTENT_TYPE, "application/x-protobuf")
            .header(CONTENT_LENGTH, body.len());
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request =
            request.body(Full::new(body)).map_err(|e| Refused { why: e.to_string(), may_pass: false })?;
        connection.sender.ready().await.map_err(|e| broken(e.to_string()))?;
        let answer = connection.sender.send_request(request).await.map_err(|e| broken(e.to_string()))?;
        let status = answer.status();
        // Read to its end, so that the connection can be used again.
        let read = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
        if read.is_ok() {
            self.connection = Some(connection);
        }
        match status.as_u16() {
            200..300 => Ok(()),
            code => Err(Refused { why: format!("status {code}"), may_pass: matches!(code, 429 | 502..=504) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_where_the_specification_says() {
        let check = |endpoint: &str, authority: &str, path: &str| {
            let target = Target::below(endpoint, "traces").unwrap();
            assert_eq!((target.address.authority.as_str(), target.path.as_str()), (authority, path));
        };
        check("http://localhost:4318", "localhost:4318", "/v1/traces");
        check("http://localhost:4318/", "localhost:4318", "/v1/traces");
        check("https://a.example/otlp", "a.example", "/otlp/v1/traces");
        assert_eq!(Target::exact("https://a.example/x").unwrap().path, "/x");
        assert_eq!(Target::exact("https://a.example").unwrap().path, "/");
        assert!(Target::below("ftp://a", "traces").is_none());
    }

    #[test]
    fn a_dead_collector_costs_nobody_any_time() {
        let target = Target::below("http://127.0.0.1:9", "metrics");
        let config = ExportConfig {
            traces: None,
            metrics: target,
            headers: Vec::new(),
            timeout: Duration::from_secs(1),
            delay: Duration::from_millis(10),
            metrics_every: Duration::from_secs(60),
            resource: Vec::new(),
        };
        let exporter = Exporter::start(config).unwrap();
        let began = std::time::Instant::now();
        for _ in 0..3 * QUEUE_MAX {
            exporter.metrics(Vec::new(), SystemTime::now());
        }
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        assert!(exporter.dropped() >= QUEUE_MAX as u64);
    }
}
