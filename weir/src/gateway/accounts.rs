//! The admin API's part about API keys and what was spent: for the owner of the state folder alone.
use super::Shared;
use super::admin::{answer, on_thread, parse};
use super::body::{self, Body};
use super::caller::bearer;
use super::error::ApiError;
use crate::books::{Books, By, Slice, Sum};
use crate::keys::{Key, KeyError, Keys, NewKey};
use crate::state::{KeptError, StateError};
use hyper::header::HeaderMap;
use hyper::{Method, Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use weir_scheduler::{Account, Holder, Limit};

/// Who may ask, and what it has cost.
#[derive(Clone, Debug)]
pub struct Accounts {
    /// API keys.
    pub keys: Arc<Keys>,
    /// What is spent by them.
    pub books: Arc<Books>,
    /// What the owner sends.
    pub token: String,
}

impl Accounts {
    /// Whether these headers carry the owner's token.
    pub(super) fn knows(&self, headers: &HeaderMap) -> bool {
        // Comparing hashes takes the same time whatever they are.
        bearer(headers).is_some_and(|sent| blake3::hash(sent) == blake3::hash(self.token.as_bytes()))
    }
}

/// What can be asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Keys,
    Revoke(String),
    Usage,
}

/// Answers whoever has the owner's token.
pub(super) async fn respond(
    shared: &Arc<Shared>,
    route: &Route,
    request: Request<hyper::body::Incoming>,
) -> Result<Response<Body>, ApiError> {
    let Some(accounts) = shared.accounts.clone() else {
        let message = "This server keeps no accounts: it has no state folder of its own.";
        return Err(ApiError::new(StatusCode::NOT_FOUND, "no_accounts", message));
    };
    if !accounts.knows(request.headers()) {
        return Err(ApiError::owner_only());
    }
    let Accounts { keys, books, .. } = accounts;
    match (route, request.method()) {
        (Route::Keys, &Method::GET | &Method::HEAD) => {
            let list = on_thread(move || list(&keys, &books.taken())).await?;
            Ok(answer(&json!({ "keys": list })))
        }
        (Route::Keys, &Method::POST) => {
            let body = body::read(request.into_body(), &shared.limits).await?;
            let new: NewKey = parse(&body)?;
            let made = keys.clone();
            let (key, secret) = on_thread(move || made.add(new, SystemTime::now())).await??;
            shared.driver.set_keys(&keys).await;
            Ok(answer(&with_secret(&key, &secret)))
        }
        (Route::Revoke(name), &Method::POST) => {
            let (all, name) = (keys.clone(), name.clone());
            on_thread(move || all.revoke(&name)).await??;
            shared.driver.set_keys(&keys).await;
            Ok(answer(&json!({ "revoked": true })))
        }
        (Route::Usage, &Method::POST) => {
            let body = body::read(request.into_body(), &shared.limits).await?;
            let Asked { since_s, by } = parse(&body)?;
            let since_ms = since_ms(since_s);
            let sums = on_thread(move || books.usage(since_ms, by)).await??;
            let sums: Vec<Value> = sums.iter().map(sum).collect();
            Ok(answer(&json!({ "usage": sums, "shared": keys.is_shared() })))
        }
        (Route::Keys, _) => Err(ApiError::method("GET, POST")),
        _ => Err(ApiError::method("POST")),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    since_s: u64,
    by: By,
}

/// That many seconds ago, in milliseconds since 1970.
pub(crate) fn since_ms(since_s: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    now.saturating_sub(since_s.saturating_mul(1000))
}

/// A sum, for scripts.
pub(crate) fn sum(sum: &Sum) -> Value {
    json!({
        "name": sum.name, "requests": sum.requests, "failed": sum.failed, "prompt_tokens": sum.prompt_tokens,
        "output_tokens": sum.output_tokens, "nano_usd": sum.nano_usd, "usd": sum.nano_usd as f64 / 1e9,
    })
}

/// A key that was just made.
pub(crate) fn with_secret(key: &Key, secret: &str) -> Value {
    let mut made = describe(key, &[]);
    made["key"] = secret.into();
    made
}

/// All keys, and what is spent by them in the present windows.
pub(crate) fn list(keys: &Keys, taken: &[Slice]) -> Vec<Value> {
    keys.list().iter().map(|key| describe(key, taken)).collect()
}

fn describe(key: &Key, taken: &[Slice]) -> Value {
    let now = SystemTime::now();
    let state = match key.state(now) {
        Ok(()) => "good",
        Err(crate::keys::Refused::Expired) => "expired",
        Err(_) => "revoked",
    };
    let unix_s = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    let budgets: Vec<Value> =
        key.limits.iter().map(|bound| balance(&key.name, bound.0, taken, unix_s)).collect();
    let tag = |(name, value): &(String, String)| match value.is_empty() {
        true => name.clone(),
        false => format!("{name}={value}"),
    };
    let tags: Vec<String> = key.tags.iter().map(tag).collect();
    json!({
        "name": key.name, "state": state, "made": key.made, "expires": key.expires, "models": key.models,
        "tags": tags, "limits": budgets,
    })
}

fn balance(name: &str, limit: Limit, taken: &[Slice], unix_s: i64) -> Value {
    let account = Account { holder: Holder::Key(name.into()), unit: limit.unit, period: limit.period };
    let window = limit.period.window(unix_s);
    let slice = taken.iter().find(|slice| slice.account == account && slice.window == window);
    let (spent, reserved) = slice.map_or((0, 0), |s| (s.elsewhere.saturating_add(s.spent), s.held));
    json!({
        "limit": limit.to_string(), "amount": limit.amount, "spent": spent, "reserved": reserved,
        "left": limit.amount.saturating_sub(spent).saturating_sub(reserved),
        "turns": limit.period.begins(window.saturating_add(1)),
    })
}

impl From<StateError> for ApiError {
    fn from(error: StateError) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "state_error", error.to_string())
    }
}

impl From<KeptError> for ApiError {
    fn from(error: KeptError) -> ApiError {
        match error {
            KeptError::State(error) => error.into(),
            KeptError::Etcd(error) => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "shared_state_unavailable", error.to_string())
            }
        }
    }
}

impl From<KeyError> for ApiError {
    fn from(error: KeyError) -> ApiError {
        let (status, code) = match error {
            KeyError::Kept(error) => return error.into(),
            KeyError::Name(_) => (StatusCode::BAD_REQUEST, "invalid_name"),
            KeyError::Twice(_) => (StatusCode::CONFLICT, "key_exists"),
            KeyError::Unknown(_) => (StatusCode::NOT_FOUND, "key_not_found"),
            KeyError::Full => (StatusCode::CONFLICT, "too_many_keys"),
            KeyError::Random => (StatusCode::INTERNAL_SERVER_ERROR, "no_randomness"),
        };
        ApiError::new(status, code, error.to_string())
    }
}
