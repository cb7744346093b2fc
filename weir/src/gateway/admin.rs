//! The admin API: who is in the pool, what happens there, who may join and who must go.
//!
//! Looking needs what every other request needs; changing needs the admin token, which lies in the state folder.
use super::Shared;
use super::accounts;
use super::body::{self, Body};
use super::caller::bearer;
use super::error::ApiError;
use crate::cluster::{Asker, Cluster, ClusterError, Invitation, Record};
use crate::driver::{Driver, News, NodeInfo};
use bytes::Bytes;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use weir_scheduler::Trust;
use weir_transport::{ADDRESSES_MAX, JoinLink, PublicKey, Replica, WEB_PATH, WebCertificate};

/// Digits of a node's key that name it in lists.
const ID_DIGITS: usize = 10;
/// How often watchers are told how much runs.
const PULSE: Duration = Duration::from_secs(1);
/// Events written and not yet sent, at most; a watcher that is further behind is dropped.
const EVENTS_MAX: usize = 64;

/// What the admin API works on.
#[derive(Clone, Debug)]
pub struct AdminConfig {
    /// Who belongs to it.
    pub cluster: Arc<Cluster>,
    /// Where nodes reach the scheduler: `HOST:PORT`.
    pub addresses: Vec<String>,
    /// By what browsers know it there.
    pub web: WebCertificate,
    /// What those must send who change something.
    pub token: String,
}

/// The same, with the token as its hash.
pub(super) struct Admin {
    cluster: Arc<Cluster>,
    addresses: Vec<String>,
    web: WebCertificate,
    token: blake3::Hash,
}

impl From<AdminConfig> for Admin {
    fn from(config: AdminConfig) -> Admin {
        let token = blake3::hash(config.token.as_bytes());
        Admin { cluster: config.cluster, addresses: config.addresses, web: config.web, token }
    }
}

impl Admin {
    /// Where nodes reach a scheduler of the cluster: this one, and one address of each other.
    fn addresses(&self) -> Vec<String> {
        let schedulers = self.cluster.schedulers();
        let schedulers = schedulers.borrow();
        let others = schedulers.all.iter().filter(|other| Some(&other.id) != schedulers.own.as_ref());
        let mut all = self.addresses.clone();
        let room = ADDRESSES_MAX.saturating_sub(all.len());
        all.extend(others.filter_map(|other| other.addresses.first().cloned()).take(room));
        all
    }

    /// Whether these headers carry the admin token.
    pub(super) fn knows(&self, headers: &HeaderMap) -> bool {
        bearer(headers).is_some_and(|token| blake3::hash(token) == self.token)
    }

    /// Whether they carry a join token that has not expired.
    pub(super) fn has_invited(&self, headers: &HeaderMap) -> bool {
        let token = bearer(headers).and_then(|token| std::str::from_utf8(token).ok()?.parse().ok());
        token.is_some_and(|token| self.cluster.has_invited(&token, SystemTime::now()))
    }
}

/// What can be asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Nodes,
    Events,
    /// How pages reach the scheduler: no secret.
    WebTransport,
    Links,
    Admit(String),
    Revoke(String),
    Drain(String),
    Accounts(accounts::Route),
}

impl Route {
    /// `path` is what follows `/weir/v1/`.
    pub(super) fn of(path: &str) -> Option<Route> {
        Some(match path.split('/').collect::<Vec<_>>().as_slice() {
            ["nodes"] => Route::Nodes,
            ["events"] => Route::Events,
            ["webtransport"] => Route::WebTransport,
            ["links"] => Route::Links,
            ["keys"] => Route::Accounts(accounts::Route::Keys),
            ["keys", name, "revoke"] => Route::Accounts(accounts::Route::Revoke((*name).to_owned())),
            ["usage"] => Route::Accounts(accounts::Route::Usage),
            ["nodes", code, "admit"] => Route::Admit((*code).to_owned()),
            ["nodes", id, "revoke"] => Route::Revoke((*id).to_owned()),
            ["nodes", id, "drain"] => Route::Drain((*id).to_owned()),
            _ => return None,
        })
    }
}

/// Answers; the caller has checked that whoever asks may look.
pub(super) async fn respond(
    shared: &Arc<Shared>,
    route: Route,
    request: Request<hyper::body::Incoming>,
) -> Result<Response<Body>, ApiError> {
    match (&route, request.method()) {
        (Route::Accounts(route), _) => return accounts::respond(shared, route, request).await,
        (Route::Nodes, &Method::GET | &Method::HEAD) => {
            let nodes = nodes(shared.admin.as_ref(), &shared.driver).await;
            let mut told = json!({ "nodes": nodes });
            if let Some(schedulers) = shared.admin.as_ref().and_then(schedulers) {
                told["schedulers"] = schedulers;
            }
            return Ok(answer(&told));
        }
        (Route::Events, &Method::GET) => return Ok(events(shared).await),
        (Route::WebTransport, &Method::GET) => {
            return shared.admin.as_ref().map(web_transport).ok_or_else(no_cluster);
        }
        (Route::Nodes | Route::Events | Route::WebTransport, _) => return Err(ApiError::method("GET")),
        (_, &Method::POST) => {}
        _ => return Err(ApiError::method("POST")),
    }
    let admin = shared.admin.as_ref().ok_or_else(no_cluster)?;
    if !admin.knows(request.headers()) {
        return Err(ApiError::owner_only());
    }
    let body = body::read(request.into_body(), &shared.limits).await?;
    let body = if body.is_empty() { b"{}".as_slice() } else { &body };
    match route {
        Route::Links => link(admin, parse(body)?).await,
        Route::Admit(code) => admit(admin, code).await,
        Route::Revoke(id) => revoke(admin, &shared.driver, &id).await,
        Route::Drain(id) => drain(admin, &shared.driver, &id, parse(body)?).await,
        Route::Nodes | Route::Events | Route::WebTransport | Route::Accounts(_) => {
            Err(ApiError::method("GET"))
        }
    }
}

fn no_cluster() -> ApiError {
    let message = "This server takes no nodes: start it with `weir serve --listen ADDR`.";
    ApiError::new(StatusCode::NOT_FOUND, "no_cluster", message)
}

/// Where a page connects, and the hash of the certificate that it has to expect there: to be asked just before.
fn web_transport(admin: &Admin) -> Response<Body> {
    let urls: Vec<String> = admin.addresses.iter().map(|at| format!("https://{at}{WEB_PATH}")).collect();
    let hash: String = admin.web.hash(SystemTime::now()).iter().map(|b| format!("{b:02x}")).collect();
    answer(&json!({ "urls": urls, "certificate_sha256": hash }))
}

pub(super) fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", error.to_string()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NewLink {
    uses: u32,
    expires_s: u64,
    guest: bool,
}

impl Default for NewLink {
    fn default() -> Self {
        let Invitation { uses, valid, guest } = Invitation::default();
        NewLink { uses, expires_s: valid.as_secs(), guest }
    }
}

async fn link(admin: &Admin, wanted: NewLink) -> Result<Response<Body>, ApiError> {
    let valid = Duration::from_secs(wanted.expires_s);
    let invitation = Invitation { uses: wanted.uses, valid, guest: wanted.guest };
    let cluster = admin.cluster.clone();
    let token = on_disk(move || cluster.invite(invitation, SystemTime::now())).await?;
    let link = JoinLink { addresses: admin.addresses(), cluster: admin.cluster.fingerprint(), token };
    Ok(answer(&json!({ "link": link.to_string() })))
}

async fn admit(admin: &Admin, code: String) -> Result<Response<Body>, ApiError> {
    let cluster = admin.cluster.clone();
    let key = on_disk(move || cluster.confirm(&code, SystemTime::now())).await?;
    Ok(answer(&json!({ "id": short(&key), "state": "away" })))
}

async fn revoke(admin: &Admin, driver: &Driver, id: &str) -> Result<Response<Body>, ApiError> {
    let key = admin.cluster.find(id)?;
    let cluster = admin.cluster.clone();
    on_disk(move || cluster.revoke(&key)).await?;
    driver.expel(key, "the node was revoked").await;
    Ok(answer(&json!({ "id": short(&key), "state": "revoked" })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Drained {
    on: bool,
}

impl Default for Drained {
    fn default() -> Self {
        Drained { on: true }
    }
}

async fn drain(
    admin: &Admin,
    driver: &Driver,
    id: &str,
    wanted: Drained,
) -> Result<Response<Body>, ApiError> {
    let (key, on) = (admin.cluster.find(id)?, wanted.on);
    let cluster = admin.cluster.clone();
    on_disk(move || cluster.drain(&key, on)).await?;
    driver.drain(key, on).await;
    Ok(answer(&json!({ "id": short(&key), "state": if on { "draining" } else { "used" } })))
}

async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ClusterError> + Send + 'static,
) -> Result<T, ApiError> {
    Ok(on_thread(work).await??)
}

/// Does what blocks where it may.
pub(super) async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::shutting_down())
}

impl From<ClusterError> for ApiError {
    fn from(error: ClusterError) -> ApiError {
        let (status, code) = match error {
            ClusterError::Node(_) => (StatusCode::NOT_FOUND, "node_not_found"),
            ClusterError::Kept(error) => return error.into(),
            ClusterError::Identity(_) => (StatusCode::INTERNAL_SERVER_ERROR, "state_error"),
        };
        ApiError::new(status, code, error.to_string())
    }
}

fn short(key: &PublicKey) -> String {
    key.to_string()[..ID_DIGITS].to_owned()
}

/// Who shares the cluster, if anybody does.
fn schedulers(admin: &Admin) -> Option<Value> {
    let schedulers = admin.cluster.schedulers();
    let schedulers = schedulers.borrow();
    let own = schedulers.own.as_ref()?;
    let told = |one: &Replica| json!({ "id": one.id, "addresses": one.addresses, "own": one.id == *own });
    Some(schedulers.all.iter().map(told).collect())
}

/// All nodes: those that are connected, and those that have joined and are away.
async fn nodes(admin: Option<&Admin>, driver: &Driver) -> Vec<Value> {
    let connected = driver.survey().await;
    let known = admin.map(|admin| admin.cluster.nodes()).unwrap_or_default();
    let is_here = |key: &PublicKey| connected.iter().any(|info| info.key.as_ref() == Some(key));
    let away: Vec<Value> =
        known.iter().filter(|(key, _)| !is_here(key)).map(|(key, record)| away(key, record)).collect();
    let asking = admin.map(|admin| admin.cluster.asking()).unwrap_or_default();
    connected.iter().map(here).chain(away).chain(asking.iter().map(asks)).collect()
}

fn here(info: &NodeInfo) -> Value {
    let view = &info.view;
    let models: Vec<Value> = view
        .models
        .iter()
        .map(|m| {
            json!({
                "name": m.name, "sha256": m.model.to_string(), "alive": m.alive, "running": m.running,
                "slots": m.slots, "tokens": m.tokens, "token_ms": m.token_time.as_secs_f64() * 1e3,
                "prefill_tokens_per_s": m.prefill_tokens_per_s, "numerics": m.numerics, "bytes": m.bytes,
                "pinned": m.pinned, "kv_blocks_free": m.kv_blocks.0, "kv_blocks": m.kv_blocks.1,
            })
        })
        .collect();
    let labels: BTreeMap<&str, &str> =
        view.labels.iter().rev().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    json!({
        "id": info.key.as_ref().map(short), "name": view.name, "guest": view.trust == Trust::Guest,
        "trust": view.trust.name(), "labels": labels,
        "state": if view.draining { "draining" } else { "connected" },
        "silent_ms": view.silent.as_millis() as u64, "devices": view.devices, "memory_free": view.memory_free,
        "bandwidth": view.bandwidth, "models": models,
        "loading": view.loading.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "price": { "prompt_usd_per_mtok": view.price.prompt as f64 / 1e3,
                   "output_usd_per_mtok": view.price.output as f64 / 1e3 },
    })
}

fn asks(asker: &Asker) -> Value {
    json!({
        "id": short(&asker.key), "name": asker.name, "guest": asker.guest, "state": "asking", "code": asker.code,
        "models": [],
    })
}

fn away(key: &PublicKey, record: &Record) -> Value {
    let state = match (record.revoked, record.refuted) {
        (_, true) => "refuted",
        (true, false) => "revoked",
        (false, false) => "away",
    };
    json!({ "id": short(key), "name": record.name, "guest": record.guest, "state": state, "models": [] })
}

/// Server-sent events: `nodes` (and counts of requests) at once and every second, and each `joined`, `left` and `drained` as it happens.
async fn events(shared: &Arc<Shared>) -> Response<Body> {
    let news = shared.driver.news().await;
    let (sender, events) = mpsc::channel(EVENTS_MAX);
    let writer = EventWriter { shared: shared.clone(), sender };
    let cut = shared.reached(super::Phase::Draining);
    tokio::spawn(async move {
        tokio::select! {
            () = writer.run(news) => {}
            () = cut => {}
        }
    });
    let mut response = Response::new(Body::Feed(events));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

struct EventWriter {
    shared: Arc<Shared>,
    sender: mpsc::Sender<Bytes>,
}

impl EventWriter {
    /// Until the watcher is gone or too far behind.
    async fn run(self, mut news: mpsc::Receiver<News>) {
        let mut pulse = tokio::time::interval(PULSE);
        loop {
            let (kind, data) = tokio::select! {
                _ = pulse.tick() => {
                    let nodes = nodes(self.shared.admin.as_ref(), &self.shared.driver).await;
                    ("nodes", json!({ "nodes": nodes, "requests": self.shared.stats.to_json() }))
                }
                news = news.recv() => match news {
                    Some(news) => told(&news),
                    None => return,
                },
                () = self.sender.closed() => return,
            };
            if self.sender.try_send(format!("event: {kind}\ndata: {data}\n\n").into()).is_err() {
                return;
            }
        }
    }
}

fn told(news: &News) -> (&'static str, Value) {
    let id = |key: &Option<PublicKey>| key.as_ref().map(short);
    match news {
        News::Joined { name, key } => ("joined", json!({ "id": id(key), "name": name })),
        News::Left { name, key, reason } => {
            ("left", json!({ "id": id(key), "name": name, "reason": reason }))
        }
        News::Drained { name, key, on } => ("drained", json!({ "id": id(key), "name": name, "on": on })),
    }
}

pub(super) fn answer(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::full(value.to_string()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(Route::of("nodes"), Some(Route::Nodes));
        assert_eq!(Route::of("webtransport"), Some(Route::WebTransport));
        assert_eq!(Route::of("nodes/ab/revoke"), Some(Route::Revoke("ab".into())));
        assert_eq!(Route::of("nodes/ab/drain"), Some(Route::Drain("ab".into())));
        let keys = |route| Some(Route::Accounts(route));
        assert_eq!(Route::of("keys"), keys(accounts::Route::Keys));
        assert_eq!(Route::of("keys/a/revoke"), keys(accounts::Route::Revoke("a".into())));
        for other in ["", "nodes/", "nodes/ab", "nodes/ab/", "nodes/ab/revoke/x", "link"] {
            assert_eq!(Route::of(other), None, "{other}");
        }
    }
}
