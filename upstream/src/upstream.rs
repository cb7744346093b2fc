//! An upstream: a provider with its key, its connections and what is known of its limits.
use crate::address::Address;
use crate::answer::{Answer, Opening};
use crate::ask::{Api, Ask, estimate_text, estimate_tokens};
use crate::catalog::{Auth, Dialect, Engine, Model, Prefill, Provider};
use crate::discover::{self, Found, Queue};
use crate::error::{UpstreamError, excerpt};
use crate::http::{Http, HttpError, Reply};
use crate::limiter::Limiter;
use crate::secret::Secret;
use crate::told::{Fault, Reader, Told};
use crate::{anthropic, openai};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request};
use serde_json::Value;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Bytes of a refusal, a list of models or metrics that are read.
const BODY_BYTES_MAX: usize = 4 << 20;
/// Of an answer that isn't streamed although it was to be.
const WHOLE_BYTES_MAX: usize = 16 << 20;
/// For questions about the upstream itself.
const QUESTION: Duration = Duration::from_secs(5);
/// Times that a request is sent once more, and the pause before, about, which grows threefold.
const RETRIES: u32 = 2;
const PAUSE: Duration = Duration::from_millis(150);
/// Who was asked within this may be asked again soon.
const IN_USE: Duration = Duration::from_secs(600);

/// How long each thing may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// To find the host, connect and shake hands.
    pub connect: Duration,
    /// From a request to its first token.
    pub first: Duration,
    /// Between signs of life of an answer.
    pub between: Duration,
}

impl Default for Times {
    fn default() -> Times {
        let second = Duration::from_secs(1);
        Times { connect: 10 * second, first: 120 * second, between: 60 * second }
    }
}

/// Asks a provider. Cheap to clone; all clones share connections and limits.
#[derive(Clone)]
pub struct Upstream {
    inner: Arc<Inner>,
}

struct Inner {
    provider: Provider,
    key: Option<Secret>,
    times: Times,
    http: Arc<Http>,
    limiter: Mutex<Limiter>,
    used: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream").field("provider", &self.inner.provider).finish_non_exhaustive()
    }
}

impl Upstream {
    /// A provider, with its key if it wants one. Nothing is sent yet.
    pub fn new(provider: Provider, key: Option<Secret>, times: Times) -> Result<Upstream, UpstreamError> {
        let Some(address) = Address::parse(&provider.url) else {
            let (provider, url) = (provider.name.clone(), provider.url.clone());
            return Err(UpstreamError::Address { provider, url });
        };
        let http = Http::new(address, times.connect);
        let (limiter, used) = (Mutex::default(), Mutex::default());
        Ok(Upstream { inner: Arc::new(Inner { provider, key, times, http, limiter, used }) })
    }

    /// What it is called here.
    pub fn name(&self) -> &str {
        &self.inner.provider.name
    }

    /// How it is spoken to.
    pub fn provider(&self) -> &Provider {
        &self.inner.provider
    }

    pub(crate) fn times(&self) -> Times {
        self.inner.times
    }

    fn limiter(&self) -> MutexGuard<'_, Limiter> {
        self.inner.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request and waits for the first token of its answer. Until then, and while [`Ask::first_by`] lets it, what
    /// did not reach the provider, or what it says has failed, is tried again. What it may have read without saying so
    /// isn't: it may charge for both.
    pub async fn ask(&self, ask: &Ask<'_>) -> Result<Answer, UpstreamError> {
        let model = self.inner.provider.models.iter().find(|model| model.name == ask.model);
        let unknown;
        let model = match model {
            Some(model) => model,
            None => {
                unknown = Model::named(ask.model);
                &unknown
            }
        };
        let prepared = self.prepare(model, ask)?;
        let mut tried = 0;
        loop {
            let now = Instant::now();
            let admitted = self.limiter().admit(now);
            if let Err(after) = admitted {
                let message = "it has had enough for now".into();
                return Err(UpstreamError::Busy { provider: self.name().into(), after, message });
            }
            *self.inner.used.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
            let left = ask.first_by.map_or(self.inner.times.first, |by| by.saturating_duration_since(now));
            let patience = left.min(self.inner.times.first);
            let error = match self.attempt(&prepared, ask, model, patience).await {
                Ok(answer) => {
                    self.limiter().worked();
                    return Ok(answer);
                }
                Err(error) => error,
            };
            if error.is_fault() {
                self.note_fault();
            }
            // Those that failed together don't come back together.
            let spread = f64::from(RandomState::new().hash_one(0) as u32) / f64::from(u32::MAX);
            let pause = (PAUSE * 3u32.pow(tried)).mul_f64(0.5 + spread);
            let in_time = ask.first_by.is_none_or(|by| Instant::now() + pause < by);
            if !error.may_pass() || tried >= RETRIES || !in_time {
                return Err(error);
            }
            tried += 1;
            // What it said may repeat what it was asked: that is nobody's business but the client's.
            tracing::debug!(provider = self.name(), error = error.kind(), "trying again");
            tokio::time::sleep(pause).await;
        }
    }

    /// The path and body of a request, and how its answer is read.
    fn prepare(&self, model: &Model, ask: &Ask<'_>) -> Result<Prepared, UpstreamError> {
        let provider = &self.inner.provider;
        let prefill = provider.prefill(model);
        let refuse =
            |message: String| UpstreamError::Invalid { provider: provider.name.clone(), status: 0, message };
        if !ask.so_far.is_empty() && prefill == Prefill::None {
            return Err(refuse(format!("{} can't go on with an answer", model.name)));
        }
        let ask = Ask {
            max_tokens: ask.max_tokens.min(model.output_max.unwrap_or(u32::MAX)).max(1),
            ..ask.clone()
        };
        let (path, body, json, owed) = match provider.dialect {
            Dialect::OpenAi => {
                let (path, body) = openai::request(provider, prefill, &ask);
                (path, body, false, String::new())
            }
            Dialect::Anthropic => {
                let mut translated = anthropic::request(&ask).map_err(refuse)?;
                provider.refuses.iter().for_each(|name| _ = translated.body.remove(name));
                ("messages", translated.body, translated.json, translated.owed)
            }
        };
        Ok(Prepared { path, body: Value::Object(body).to_string().into(), json, owed })
    }

    async fn attempt(
        &self,
        prepared: &Prepared,
        ask: &Ask<'_>,
        model: &Model,
        patience: Duration,
    ) -> Result<Answer, UpstreamError> {
        let started = Instant::now();
        let silent = |error: HttpError| match error {
            HttpError::Silent => self.silent("no first token", patience),
            other => self.http_error(other),
        };
        let sent = self.send(Method::POST, prepared.path, &prepared.body, ask.traceparent, patience).await;
        let mut reply = sent.map_err(silent)?;
        if !reply.response.status().is_success() {
            return Err(self.refusal(&mut reply, ask.model, patience).await);
        }
        let reader = match self.inner.provider.dialect {
            Dialect::OpenAi => Reader::OpenAi(openai::Reader),
            Dialect::Anthropic => {
                Reader::Anthropic(anthropic::Reader::new(prepared.json, ask.native.is_some()))
            }
        };
        let prices = model.usd_per_mtok.unwrap_or_default();
        let prompt_estimate = estimate_tokens(ask.fields).saturating_add(estimate_text(ask.so_far));
        let opening = Opening { reader, prices, prompt_estimate, owed: prepared.owed.clone() };
        let kind = content_type(reply.response.headers());
        match kind.as_str() {
            "text/event-stream" => {}
            "application/json" if self.inner.provider.dialect == Dialect::OpenAi => {
                let body = reply.whole(WHOLE_BYTES_MAX, patience).await.map_err(silent)?;
                let value = serde_json::from_slice(&body).map_err(|_| self.nonsense(&body))?;
                let mut told = Told::default();
                let taken = match ask.api {
                    Api::Embedding => openai::Reader::take_embeddings(value, &mut told),
                    Api::Chat | Api::Completion => openai::Reader.take_value(value, &mut told),
                };
                taken.map_err(|fault| self.fault(fault))?;
                told.done = told.finish.is_some();
                if !told.done {
                    return Err(self.nonsense(&body));
                }
                return Ok(Answer::new(self.clone(), reply, opening).already(told));
            }
            _ => {
                let body = reply.whole(BODY_BYTES_MAX, patience.min(QUESTION)).await.unwrap_or_default();
                let got = excerpt(&String::from_utf8_lossy(&body));
                let message = self.redact(&format!("it is `{}`, no event stream: {got}", excerpt(&kind)));
                return Err(UpstreamError::Nonsense { provider: self.name().into(), message });
            }
        }
        let mut answer = Answer::new(self.clone(), reply, opening);
        answer.begin(patience.saturating_sub(started.elapsed()), patience).await?;
        Ok(answer)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: &Bytes,
        traceparent: Option<&str>,
        patience: Duration,
    ) -> Result<Reply, HttpError> {
        let address = self.inner.http.address();
        let (path, has_body) = (address.path(path), method == Method::POST);
        let request = || {
            let mut request = Request::builder()
                .method(method.clone())
                .uri(&path)
                .header(header::HOST, &address.authority)
                .header(header::USER_AGENT, concat!("weir/", env!("CARGO_PKG_VERSION")))
                .header(header::ACCEPT, "text/event-stream, application/json");
            if has_body {
                request = request.header(header::CONTENT_TYPE, "application/json");
            }
            if self.inner.provider.dialect == Dialect::Anthropic {
                request = request.header("anthropic-version", anthropic::VERSION);
            }
            if let Some(traceparent) = traceparent {
                request = request.header("traceparent", traceparent);
            }
            if let Some((name, value)) = self.authorization() {
                request = request.header(name, value);
            }
            let request = request.body(Full::new(if has_body { body.clone() } else { Bytes::new() }));
            request.map_err(|_| HttpError::Broken("its address or its key can't be sent".into()))
        };
        self.inner.http.send(&request, patience).await
    }

    fn authorization(&self) -> Option<(&'static str, HeaderValue)> {
        let key = self.inner.key.as_ref()?;
        let (name, value) = match self.inner.provider.auth {
            Auth::Bearer => ("authorization", format!("Bearer {}", key.reveal())),
            Auth::XApiKey => ("x-api-key", key.reveal().to_owned()),
            Auth::None => return None,
        };
        let mut value = HeaderValue::try_from(value).ok()?;
        value.set_sensitive(true);
        Some((name, value))
    }

    /// What a status that is no success says.
    async fn refusal(&self, reply: &mut Reply, model: &str, patience: Duration) -> UpstreamError {
        let status = reply.response.status().as_u16();
        let after = retry_after(reply.response.headers(), SystemTime::now());
        let body = reply.whole(BODY_BYTES_MAX, patience.min(QUESTION)).await.unwrap_or_default();
        let message = self.redact(&excerpt(&message(&body)));
        let provider = self.name().to_owned();
        match status {
            401 | 403 => {
                UpstreamError::Key { provider, status, message, remedy: self.inner.provider.key_remedy() }
            }
            404 => UpstreamError::NoModel { provider, model: model.to_owned(), message },
            429 => UpstreamError::Busy {
                provider,
                after: self.limiter().refused(Instant::now(), after),
                message,
            },
            408 | 409 | 425 | 500.. if after.is_none() => {
                UpstreamError::Failed { provider, message: format!("status {status}: {message}") }
            }
            // It says when it will work again.
            500.. => UpstreamError::Busy {
                provider,
                after: self.limiter().refused(Instant::now(), after),
                message,
            },
            _ => UpstreamError::Invalid { provider, status, message },
        }
    }

    /// What an event that ends an answer says.
    pub(crate) fn fault(&self, fault: Fault) -> UpstreamError {
        let provider = self.name().to_owned();
        match fault {
            Fault::Nonsense(message) => {
                UpstreamError::Nonsense { provider, message: self.redact(&excerpt(&message)) }
            }
            Fault::Said { kind, message } => {
                let message = self.redact(&excerpt(&message));
                if kind.contains("rate_limit") || kind.contains("429") {
                    let after = self.limiter().refused(Instant::now(), None);
                    return UpstreamError::Busy { provider, after, message };
                }
                match kind.contains("invalid_request") {
                    true => UpstreamError::Invalid { provider, status: 0, message },
                    false => UpstreamError::Failed { provider, message },
                }
            }
        }
    }

    fn http_error(&self, error: HttpError) -> UpstreamError {
        let provider = self.name().to_owned();
        match error {
            HttpError::Unreachable(message) | HttpError::Unsent(message) => {
                UpstreamError::Failed { provider, message }
            }
            HttpError::Broken(why) => {
                let message = format!("{why}; it may have read the request, so it isn't sent again");
                UpstreamError::Cut { provider, message }
            }
            HttpError::Silent => self.silent("nothing", QUESTION),
        }
    }

    fn silent(&self, what: &'static str, after: Duration) -> UpstreamError {
        UpstreamError::Silent { provider: self.name().to_owned(), what, after }
    }

    fn nonsense(&self, body: &[u8]) -> UpstreamError {
        let message = self.redact(&excerpt(&String::from_utf8_lossy(body)));
        UpstreamError::Nonsense { provider: self.name().to_owned(), message }
    }

    fn redact(&self, text: &str) -> String {
        self.inner.key.as_ref().map_or_else(|| text.to_owned(), |key| key.redact(text))
    }

    /// It failed, by its own fault.
    pub(crate) fn note_fault(&self) {
        if let Some(rest) = self.limiter().failed(Instant::now()) {
            tracing::warn!(
                "{} fails again and again; it is left alone for {:.0} s",
                self.name(),
                rest.as_secs_f64()
            );
        }
    }

    /// The models that it tells of; an error where it isn't well.
    pub async fn models(&self) -> Result<Vec<Found>, UpstreamError> {
        let engine = self.inner.provider.engine;
        if let Some(path) = discover::health_path(engine) {
            self.question(path).await?;
        }
        let body = self.question("models").await?;
        let mut models = discover::models(&body).ok_or_else(|| self.nonsense(&body))?;
        if engine == Engine::LlamaServer
            && let Some(context) =
                self.question("/props").await.ok().and_then(|b| discover::props_context(&b))
        {
            models.iter_mut().for_each(|model| model.context = Some(context));
        }
        Ok(models)
    }

    /// How busy it is, where it says.
    pub async fn queue(&self) -> Option<Queue> {
        let engine = self.inner.provider.engine;
        if matches!(engine, Engine::Any | Engine::Ollama) {
            return None;
        }
        let body = self.question("/metrics").await.ok()?;
        discover::queue(engine, &String::from_utf8_lossy(&body))
    }

    /// Whether it was asked lately, so that a connection is worth having ready.
    pub fn is_in_use(&self) -> bool {
        let used = *self.inner.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.is_some_and(|at| at.elapsed() < IN_USE)
    }

    /// Has a connection ready for the next request.
    pub async fn warm(&self) -> Result<(), UpstreamError> {
        self.inner.http.warm().await.map_err(|error| self.http_error(error))
    }

    async fn question(&self, path: &str) -> Result<Vec<u8>, UpstreamError> {
        let asked = self.send(Method::GET, path, &Bytes::new(), None, QUESTION).await;
        let mut reply = asked.map_err(|error| self.http_error(error))?;
        if !reply.response.status().is_success() {
            return Err(self.refusal(&mut reply, "", QUESTION).await);
        }
        reply.whole(BODY_BYTES_MAX, QUESTION).await.map_err(|error| self.http_error(error))
    }
}

/// A request, ready to be sent.
struct Prepared {
    path: &'static str,
    body: Bytes,
    json: bool,
    owed: String,
}

/// The media type alone, in small letters.
fn content_type(headers: &HeaderMap) -> String {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// The message in an error's body, whatever its shape.
fn message(body: &[u8]) -> String {
    let text = || String::from_utf8_lossy(&body[..body.len().min(2048)]).into_owned();
    let Ok(value) = serde_json::from_slice::<Value>(body) else { return text() };
    let places = ["/error/message", "/message", "/detail", "/error", "/message/detail/0/msg"];
    let found = places.iter().find_map(|at| value.pointer(at)?.as_str());
    found.map_or_else(text, str::to_owned)
}

/// When to ask again: seconds, milliseconds (OpenAI's own header), or a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<f64>().ok();
    let seconds = |s: f64| (s.is_finite() && s >= 0.0).then(|| Duration::from_secs_f64(s.min(1e6)));
    if let Some(ms) = number("retry-after-ms").and_then(|ms| seconds(ms / 1e3)) {
        return Some(ms);
    }
    if let Some(after) = number("retry-after").and_then(seconds) {
        return Some(after);
    }
    let date = headers.get("retry-after")?.to_str().ok()?;
    let at = http_date(date)?;
    let now = now.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    Some(Duration::from_secs(at.saturating_sub(now)))
}

/// Seconds since 1970 of `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(text: &str) -> Option<u64> {
    let mut parts = text.trim().strip_suffix(" GMT")?.split_once(", ")?.1.split(' ');
    let day: u64 = parts.next()?.parse().ok().filter(|d| (1..=31).contains(d))?;
    let names = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let name = parts.next()?;
    let month = names.iter().position(|n| *n == name)? as u64 + 1;
    let year: u64 = parts.next()?.parse().ok().filter(|y| (1970..10_000).contains(y))?;
    let mut clock = parts.next()?.split(':').map(|n| n.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    // Howard Hinnant's days_from_civil, for years after 1970.
    let (y, m) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let (era, of_era) = (y / 400, y % 400);
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + (153 * m + 2) / 5 + day - 1;
    Some(days.checked_sub(719_468)? * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_understood_in_all_its_forms() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_700);
        let check = |name: &'static str, value: &'static str, expected: Option<f64>| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            assert_eq!(retry_after(&headers, now).map(|d| d.as_secs_f64()), expected, "{value}");
        };
        check("retry-after", "3", Some(3.0));
        check("retry-after", "0.5", Some(0.5));
        check("retry-after-ms", "250", Some(0.25));
        check("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT", Some(77.0));
        check("retry-after", "Sun, 06 Nov 1994 08:00:00 GMT", Some(0.0));
        for bad in
            ["", "-1", "NaN", "inf", "soon", "Sun, 99 Nov 1994 08:49:37 GMT", "x, 1 Foo 2000 1:1:1 GMT"]
        {
            check("retry-after", bad, None);
        }
    }

    #[test]
    fn messages_are_found_in_all_shapes() {
        let check = |body: &str, expected: &str| assert_eq!(message(body.as_bytes()), expected);
        check(r#"{"error":{"message":"a"}}"#, "a");
        check(r#"{"error":"b"}"#, "b");
        check(r#"{"message":"c"}"#, "c");
        check(r#"{"detail":"d"}"#, "d");
        check("<html>", "<html>");
    }
}
