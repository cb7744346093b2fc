//! A client of etcd, where schedulers keep what they share.
//!
//! It speaks etcd's own JSON gateway (`/v3/...`, in every etcd since 3.4) over the HTTP client that is here anyway: gRPC would
//! bring tonic, prost and HTTP/2 with it, for five calls. Keys and values are base64 there, and 64-bit numbers strings.
//!
//! Whoever asks blocks: those who do have threads for that. A thread of its own drives the connections, so that asking works
//! from anywhere. Everything sent may be sent twice: what changes something names the revision that it saw, and says what
//! shall be there, not what shall be added.
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use serde_json::{Value, json};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use weir_upstream::{Address, Connection, Connector};

/// For one endpoint to answer. Whoever reserves may wait as long, once, when etcd goes away.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Calls that wait, at most.
const WAITING_MAX: usize = 1024;
/// Idle connections that are kept, at most.
const IDLE_MAX: usize = 4;
/// Longest answer, in bytes; and entries of one page of a list.
const ANSWER_MAX: usize = 32 << 20;
const PAGE: usize = 1000;
/// gRPC's codes that mean: not now, or not here.
const DEADLINE_EXCEEDED: u64 = 4;
const UNAVAILABLE: u64 = 14;
const UNAUTHENTICATED: u64 = 16;

/// Where etcd is, and who we are there. Its `Debug` hides the password.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `http://HOST:2379`; the next is asked where one doesn't answer.
    pub endpoints: Vec<String>,
    /// Begins all keys; ends with a slash.
    pub prefix: String,
    /// A user and its password, where etcd wants one.
    pub user: Option<(String, String)>,
    /// Whose certificates are trusted (PEM); those that the system trusts, where none.
    pub ca: Option<PathBuf>,
}

impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.user.as_ref().map(|(name, _)| name);
        f.debug_struct("EtcdConfig")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("user", &user)
            .field("ca", &self.ca)
            .finish()
    }
}

/// Why etcd did not do something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EtcdError {
    /// The configuration makes no sense.
    #[error("etcd: {0}")]
    Config(String),
    /// Nobody answers, or nobody there can decide now: what each endpoint said. It may have been done, or may yet be.
    #[error("etcd does not answer: {0}")]
    Away(String),
    /// It says no.
    #[error("etcd refuses: {0}")]
    Refused(String),
}

/// An entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Without the prefix.
    pub key: String,
    /// What is there.
    pub value: Vec<u8>,
    /// When it was changed last: counts changes of the whole of etcd.
    pub revision: i64,
}

/// Something to be done.
#[derive(Clone, Debug)]
pub enum Op {
    /// Look.
    Get(String),
    /// Write.
    Put {
        /// Where.
        key: String,
        /// What.
        value: Vec<u8>,
        /// It goes when this lease does.
        lease: Option<i64>,
    },
    /// Take out.
    Delete(String),
}

/// What came of a transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// What was compared was so.
    pub succeeded: bool,
    /// Of the whole of etcd.
    pub revision: i64,
    /// What each [`Op::Get`] found, in their order.
    pub found: Vec<Option<Found>>,
}

/// An etcd. Cheap to clone; the thread ends with the last of them.
#[derive(Clone)]
pub struct Etcd {
    asks: mpsc::Sender<Ask>,
    prefix: Arc<str>,
    /// For all endpoints, one after the other.
    patience: Duration,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Etcd({})", self.prefix)
    }
}

type Answer = Result<Value, EtcdError>;

struct Ask {
    path: &'static str,
    body: Value,
    reply: SyncSender<Answer>,
}

impl Etcd {
    /// Nobody is asked anything yet.
    pub fn new(config: &EtcdConfig) -> Result<Etcd, EtcdError> {
        let lines = Arc::new(Lines::new(config)?);
        let failed = |error: std::io::Error| EtcdError::Config(error.to_string());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (asks, mut asked) = mpsc::channel::<Ask>(WAITING_MAX);
        let patience = PATIENCE * (2 * lines.endpoints.len() as u32 + 1);
        let run = async move {
            while let Some(Ask { path, body, reply }) = asked.recv().await {
                let lines = lines.clone();
                // Whoever asked may have stopped waiting.
                tokio::spawn(async move { _ = reply.send(lines.ask(path, body).await) });
            }
        };
        let thread = std::thread::Builder::new().name("weir-etcd".into());
        thread.spawn(move || runtime.block_on(run)).map_err(failed)?;
        Ok(Etcd { asks, prefix: config.prefix.as_str().into(), patience })
    }

    fn ask(&self, path: &'static str, body: Value) -> Answer {
        let (reply, answer) = sync_channel(1);
        let busy = |_| EtcdError::Away("too many calls wait for it".into());
        self.asks.try_send(Ask { path, body, reply }).map_err(busy)?;
        answer.recv_timeout(self.patience).unwrap_or_else(|error| {
            Err(EtcdError::Away(match error {
                RecvTimeoutError::Timeout => format!("nothing came within {:?}", self.patience),
                RecvTimeoutError::Disconnected => "its thread has ended".into(),
            }))
        })
    }

    fn key(&self, key: &str) -> String {
        BASE64.encode(format!("{}{key}", self.prefix))
    }

    /// Does `then` if each of these keys has been changed last at that revision (0: isn't there), else `otherwise`. Blocks.
    pub fn transact(&self, when: &[(&str, i64)], then: &[Op], otherwise: &[Op]) -> Result<Done, EtcdError> {
        let compare: Vec<Value> = when
            .iter()
            .map(|(key, revision)| {
                json!({ "key": self.key(key), "target": "MOD", "result": "EQUAL",
                        "mod_revision": revision.to_string() })
            })
            .collect();
        let ops = |ops: &[Op]| ops.iter().map(|op| self.op(op)).collect::<Vec<_>>();
        let body = json!({ "compare": compare, "success": ops(then), "failure": ops(otherwise) });
        let answer = self.ask("/v3/kv/txn", body)?;
        let responses = answer["responses"].as_array().map(Vec::as_slice).unwrap_or_default();
        let found = responses.iter().filter_map(|response| response.get("response_range"));
        Ok(Done {
            succeeded: answer["succeeded"].as_bool().unwrap_or(false),
            revision: number(&answer["header"]["revision"]),
            found: found.map(|range| Ok(self.found(range)?.pop())).collect::<Result<_, EtcdError>>()?,
        })
    }

    fn op(&self, op: &Op) -> Value {
        match op {
            Op::Get(key) => json!({ "request_range": { "key": self.key(key) } }),
            Op::Delete(key) => json!({ "request_delete_range": { "key": self.key(key) } }),
            Op::Put { key, value, lease } => {
                let lease = lease.unwrap_or(0).to_string();
                json!({ "request_put": { "key": self.key(key), "value": BASE64.encode(value), "lease": lease } })
            }
        }
    }

    /// The entry of a key. Blocks.
    pub fn get(&self, key: &str) -> Result<Option<Found>, EtcdError> {
        Ok(self.transact(&[], &[Op::Get(key.to_owned())], &[])?.found.into_iter().next().flatten())
    }

    /// What lies below `prefix` and was changed at revision `since` or later, and the revision at which that was so. What is
    /// gone isn't told. Blocks.
    pub fn list(&self, prefix: &str, since: i64) -> Result<(Vec<Found>, i64), EtcdError> {
        let first = format!("{}{prefix}", self.prefix);
        let end = BASE64.encode(end_of(first.as_bytes()));
        let (mut all, mut from, mut at) = (Vec::new(), BASE64.encode(&first), 0);
        loop {
            let asked = json!({
                "key": from, "range_end": end, "limit": PAGE.to_string(), "min_mod_revision": since.to_string(),
                // Each page is of the same moment.
                "revision": at.to_string(),
            });
            let answer = self.ask("/v3/kv/range", asked)?;
            at = if at == 0 { number(&answer["header"]["revision"]) } else { at };
            let page = self.found(&answer)?;
            let more = answer["more"].as_bool().unwrap_or(false);
            if let Some(last) = page.last() {
                from = BASE64.encode(format!("{}{}\0", self.prefix, last.key));
            }
            let was_empty = page.is_empty();
            all.extend(page);
            if !more || was_empty {
                return Ok((all, at));
            }
        }
    }

    fn found(&self, range: &Value) -> Result<Vec<Found>, EtcdError> {
        let odd = || EtcdError::Refused("its answer can't be read".into());
        let text = |value: &Value| BASE64.decode(value.as_str().unwrap_or_default()).map_err(|_| odd());
        let read = |kv: &Value| {
            let key = String::from_utf8(text(&kv["key"])?).map_err(|_| odd())?;
            let key = key.strip_prefix(&*self.prefix).ok_or_else(odd)?.to_owned();
            Ok(Found { key, value: text(&kv["value"])?, revision: number(&kv["mod_revision"]) })
        };
        range["kvs"].as_array().map(Vec::as_slice).unwrap_or_default().iter().map(read).collect()
    }

    /// A lease of so many seconds. Blocks.
    pub fn grant(&self, seconds: u64) -> Result<i64, EtcdError> {
        let answer = self.ask("/v3/lease/grant", json!({ "TTL": seconds.to_string() }))?;
        Ok(number(&answer["ID"]))
    }

    /// Renews a lease. Says whether it is still there. Blocks.
    pub fn keep_alive(&self, lease: i64) -> Result<bool, EtcdError> {
        let answer = self.ask("/v3/lease/keepalive", json!({ "ID": lease.to_string() }))?;
        Ok(number(&answer["result"]["TTL"]) > 0)
    }

    /// Lets go of a lease, and of what hangs on it. Blocks.
    pub fn let_go(&self, lease: i64) -> Result<(), EtcdError> {
        self.ask("/v3/lease/revoke", json!({ "ID": lease.to_string() })).map(drop)
    }
}

/// A number, which is left out where it is 0.
fn number(value: &Value) -> i64 {
    value.as_i64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
}

/// The first key that doesn't begin so.
fn end_of(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // All keys.
    vec![0]
}

struct Endpoint {
    address: Address,
    connector: Connector,
}

/// The connections.
struct Lines {
    endpoints: Vec<Endpoint>,
    /// The one that answered last.
    first: AtomicUsize,
    idle: Mutex<Vec<(usize, Connection)>>,
    user: Option<(String, String)>,
    token: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lines {
    fn new(config: &EtcdConfig) -> Result<Lines, EtcdError> {
        let wrong = EtcdError::Config;
        let ca = config
            .ca
            .as_ref()
            .map(|path| std::fs::read(path).map_err(|e| wrong(format!("{}: {e}", path.display()))));
        let ca = ca.transpose()?;
        let endpoint = |url: &String| {
            let address = Address::parse(url)
                .ok_or_else(|| wrong(format!("{url:?} is no address; write it as http://HOST:2379")))?;
            let connector = match &ca {
                Some(pem) => Connector::trusting(&address, pem),
                None => Connector::to(&address),
            };
            let connector = connector.map_err(|why| wrong(format!("{url}: {why}")))?;
            Ok(Endpoint { address, connector })
        };
        let endpoints = config.endpoints.iter().map(endpoint).collect::<Result<Vec<_>, EtcdError>>()?;
        if endpoints.is_empty() {
            return Err(wrong("no endpoint is named".into()));
        }
        let user = config.user.clone();
        Ok(Lines {
            endpoints,
            first: AtomicUsize::new(0),
            idle: Mutex::default(),
            user,
            token: Mutex::default(),
        })
    }

    async fn ask(&self, path: &str, body: Value) -> Answer {
        let body = Bytes::from(body.to_string());
        let (first, count) = (self.first.load(Ordering::Relaxed), self.endpoints.len());
        let mut said = Vec::new();
        for at in (0..count).map(|n| (first + n) % count) {
            match timeout(PATIENCE, self.ask_one(at, path, &body)).await {
                Ok(Ok(value)) => {
                    self.first.store(at, Ordering::Relaxed);
                    return Ok(value);
                }
                Ok(Err(EtcdError::Away(why))) => said.push(why),
                Ok(Err(error)) => return Err(error),
                Err(_) => said.push(format!("nothing came within {PATIENCE:?}")),
            }
            let last = said.last_mut().expect("something was just pushed");
            *last = format!("{}: {last}", self.endpoints[at].address.authority);
        }
        Err(EtcdError::Away(said.join("; ")))
    }

    async fn ask_one(&self, at: usize, path: &str, body: &Bytes) -> Answer {
        let (status, answer) = self.send_authorised(at, path, body).await?;
        if status == 200 && answer.get("error").is_none() {
            return Ok(answer);
        }
        // A stream's one answer has it within.
        let error = answer.get("error").filter(|error| error.is_object()).unwrap_or(&answer);
        let message = error["message"].as_str().or(error["error"].as_str());
        let message = message.map_or_else(|| format!("status {status}"), str::to_owned);
        match error["code"].as_u64().or(error["grpc_code"].as_u64()) {
            Some(DEADLINE_EXCEEDED | UNAVAILABLE) => Err(EtcdError::Away(message)),
            None if status >= 500 => Err(EtcdError::Away(message)),
            _ => Err(EtcdError::Refused(message)),
        }
    }

    /// With a token, and with a new one where the old has expired.
    async fn send_authorised(&self, at: usize, path: &str, body: &Bytes) -> Result<(u16, Value), EtcdError> {
        let Some((name, password)) = &self.user else { return self.send(at, path, body, None).await };
        let known = lock(&self.token).clone();
        if let Some(token) = known {
            let (status, answer) = self.send(at, path, body, Some(&token)).await?;
            if status != 401 && answer["code"].as_u64() != Some(UNAUTHENTICATED) {
                return Ok((status, answer));
            }
        }
        let who = Bytes::from(json!({ "name": name, "password": password }).to_string());
        let (status, answer) = self.send(at, "/v3/auth/authenticate", &who, None).await?;
        let Some(token) = answer["token"].as_str() else {
            let why = answer["message"].as_str().unwrap_or("no token came");
            return Err(EtcdError::Refused(format!("user {name:?} (status {status}): {why}")));
        };
        *lock(&self.token) = Some(token.to_owned());
        self.send(at, path, body, Some(token)).await
    }

    /// By a connection that was kept, or, where that has been closed meanwhile, by a new one.
    async fn send(
        &self,
        at: usize,
        path: &str,
        body: &Bytes,
        token: Option<&str>,
    ) -> Result<(u16, Value), EtcdError> {
        let away = |why: String| EtcdError::Away(why);
        let kept = {
            let mut idle = lock(&self.idle);
            let found = idle.iter().position(|(of, open)| *of == at && !open.sender.is_closed());
            found.map(|place| idle.swap_remove(place).1)
        };
        if let Some(open) = kept
            && let Ok(answer) = self.exchange(at, open, path, body, token).await
        {
            return Ok(answer);
        }
        let Endpoint { address, connector } = &self.endpoints[at];
        let open = connector.open(address, PATIENCE).await.map_err(away)?;
        self.exchange(at, open, path, body, token).await.map_err(away)
    }

    async fn exchange(
        &self,
        at: usize,
        mut open: Connection,
        path: &str,
        body: &Bytes,
        token: Option<&str>,
    ) -> Result<(u16, Value), String> {
        let text = |error: hyper::Error| error.to_string();
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(HOST, &self.endpoints[at].address.authority)
            .header(CONTENT_TYPE, "application/json")
            .header(CONTENT_LENGTH, body.len());
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, token);
        }
        let request = request.body(Full::new(body.clone())).map_err(|e| e.to_string())?;
        open.sender.ready().await.map_err(text)?;
        let answer = open.sender.send_request(request).await.map_err(text)?;
        let status = answer.status().as_u16();
        let read = Limited::new(answer.into_body(), ANSWER_MAX).collect().await.map_err(|e| e.to_string())?;
        let bytes = read.to_bytes();
        let value = serde_json::from_slice(&bytes)
            .map_err(|_| format!("what answers (status {status}) is no etcd with a JSON gateway"))?;
        let mut idle = lock(&self.idle);
        if idle.len() < IDLE_MAX {
            idle.push((at, open));
        }
        Ok((status, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_behind_the_last_key_with_the_prefix() {
        let check = |prefix: &[u8], end: &[u8]| assert_eq!(end_of(prefix), end);
        check(b"/weir/", b"/weir0");
        check(b"a\xff", b"b");
        check(b"\xff\xff", b"\0");
        check(b"", b"\0");
    }

    #[test]
    fn who_isnt_there_is_said_by_name() {
        let config = EtcdConfig {
            endpoints: vec!["http://127.0.0.1:9".into(), "http://127.0.0.1:10".into()],
            prefix: "/weir/".into(),
            user: None,
            ca: None,
        };
        let error = Etcd::new(&config).unwrap().get("x").unwrap_err();
        let said = error.to_string();
        assert!(said.contains("127.0.0.1:9: ") && said.contains("127.0.0.1:10: "), "{said}");
        assert!(matches!(error, EtcdError::Away(_)));
        for endpoints in [vec![], vec!["ftp://x".to_owned()]] {
            let wrong = EtcdConfig { endpoints, ..config.clone() };
            assert!(matches!(Etcd::new(&wrong), Err(EtcdError::Config(_))));
        }
    }
    #[test]
    fn a_user_needs_the_password() {
        let Some(server) = weir_tests::EtcdServer::start() else { return };
        let ask = |path: &str, body: Value| {
            let asked = weir_tests::Connection::open(server.address, "POST", path, &body.to_string());
            let reply = asked.unwrap().reply().unwrap();
            assert_eq!(reply.status, 200, "{path}: {reply:?}");
        };
        ask("/v3/auth/user/add", json!({ "name": "root", "password": "geheim" }));
        ask("/v3/auth/role/add", json!({ "name": "root" }));
        ask("/v3/auth/user/grant", json!({ "user": "root", "role": "root" }));
        ask("/v3/auth/enable", json!({}));
        let by = |user: Option<&str>| {
            let user = user.map(|password| ("root".to_owned(), password.to_owned()));
            let config =
                EtcdConfig { endpoints: vec![server.url()], prefix: "/weir/".into(), user, ca: None };
            assert!(!format!("{config:?}").contains("geheim"));
            Etcd::new(&config).unwrap()
        };
        let put = [Op::Put { key: "x".into(), value: b"1".to_vec(), lease: None }];
        let known = by(Some("geheim"));
        assert!(known.transact(&[], &put, &[]).unwrap().succeeded);
        assert_eq!(known.get("x").unwrap().unwrap().value, b"1");
        for stranger in [by(None), by(Some("wrong"))] {
            let error = stranger.get("x").unwrap_err();
            assert!(matches!(&error, EtcdError::Refused(_)), "{error}");
            assert!(!error.to_string().contains("wrong"), "{error}");
        }
    }
}
