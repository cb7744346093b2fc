//! Who may ask, and which endpoint answers.
use super::body::{self, Body};
use super::caller::{self, Caller};
use super::error::ApiError;
use super::request::{Api, draw};
use super::responses::{self, Owner};
use super::{Shared, admin, answer, console, messages, models};
use crate::telemetry;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;
use tracing::Instrument;
use weir_scheduler::TraceContext;

/// Answers one request; an error becomes the API's error object.
pub(super) async fn respond(
    shared: &Arc<Shared>,
    from: IpAddr,
    request: Request<Incoming>,
) -> Response<Body> {
    let name = format!("{:016x}{:08x}", draw(), shared.salt as u32);
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let is_anthropic = messages::is_asked(&path, request.headers());
    let origin = allowed_origin(shared, request.headers());
    let page = request.headers().get(header::ORIGIN).cloned();
    let mut response = match handle(shared, request, &name).await {
        Ok(response) => response,
        Err(error) => {
            match error.turns_away().filter(|code| shared.refusals.first((from, code))) {
                Some(code) => log_refusal(from, page.as_ref(), code),
                None => {
                    tracing::debug!(%method, path, status = error.told().0, code = error.told().1, "refused")
                }
            }
            if is_anthropic { error.to_anthropic(&format!("req_{name}")) } else { error.to_response() }
        }
    };
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::try_from(format!("req_{name}")) {
        if is_anthropic {
            headers.insert(HeaderName::from_static("request-id"), value.clone());
        }
        headers.insert(HeaderName::from_static("x-request-id"), value);
    }
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("x-request-id, request-id"),
        );
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

/// For whoever runs this server; the same of the same machine is logged once in a while.
fn log_refusal(from: IpAddr, page: Option<&HeaderValue>, code: &str) {
    let page = page.map(|origin| format!(", of a web page of {:.100?},", origin)).unwrap_or_default();
    tracing::warn!("a request from {from}{page} was refused: {code}");
}

/// What can be asked for.
enum Endpoint {
    Models,
    Model(String),
    Generate(Api),
    /// Anthropic's: how many tokens a request has.
    Count,
    /// OpenAI's: an answer that is kept.
    Response(String),
    Live,
    Ready,
    Metrics,
    Admin(admin::Route),
    Files,
    File(String),
    Page(&'static console::Asset),
}

impl Endpoint {
    fn of(path: &str) -> Option<Endpoint> {
        let path = path.strip_suffix('/').unwrap_or(path);
        Some(match path {
            "/v1/chat/completions" => Endpoint::Generate(Api::Chat),
            "/v1/completions" => Endpoint::Generate(Api::Completion),
            "/v1/messages" => Endpoint::Generate(Api::Messages),
            "/v1/messages/count_tokens" => Endpoint::Count,
            "/v1/responses" => Endpoint::Generate(Api::Responses),
            "/v1/embeddings" => Endpoint::Generate(Api::Embeddings),
            "/v1/models" => Endpoint::Models,
            "/healthz" => Endpoint::Live,
            "/readyz" => Endpoint::Ready,
            "/metrics" => Endpoint::Metrics,
            "/weir/v1/files" => Endpoint::Files,
            _ if path.starts_with("/weir/v1/files/") => {
                Endpoint::File(path.strip_prefix("/weir/v1/files/")?.to_owned())
            }
            _ if path.starts_with("/weir/v1/") => {
                Endpoint::Admin(admin::Route::of(path.strip_prefix("/weir/v1/")?)?)
            }
            _ if path.starts_with("/v1/responses/") => {
                Endpoint::Response(percent_decoded(path.strip_prefix("/v1/responses/")?)?)
            }
            _ if path.starts_with("/v1/models/") => {
                Endpoint::Model(percent_decoded(path.strip_prefix("/v1/models/")?)?)
            }
            _ => Endpoint::Page(console::find(path)?),
        })
    }
}

async fn handle(
    shared: &Arc<Shared>,
    request: Request<Incoming>,
    name: &str,
) -> Result<Response<Body>, ApiError> {
    let headers = request.headers();
    check_host(shared, &request)?;
    check_origin(shared, headers)?;
    if request.method() == Method::OPTIONS {
        return Ok(preflight(headers));
    }
    let endpoint = Endpoint::of(request.uri().path());
    let is_public = matches!(
        endpoint,
        Some(
            Endpoint::Live
                | Endpoint::Ready
                | Endpoint::Page(_)
                | Endpoint::Admin(admin::Route::WebTransport)
        )
    );
    // The owner of the scheduler needs no key beside the admin token.
    let is_owner =
        matches!(endpoint, Some(Endpoint::Admin(_) | Endpoint::Metrics)) && shared.is_owner(headers);
    // Whoever may join needs the model.
    let is_invited = matches!(endpoint, Some(Endpoint::Files | Endpoint::File(_)))
        && shared.admin.as_ref().is_some_and(|admin| admin.has_invited(headers));
    let caller = match is_public || is_owner || is_invited {
        true => Caller::default(),
        false => Caller::of(shared, headers)?,
    };
    let Some(endpoint) = endpoint else {
        let path: String = request.uri().path().chars().take(200).collect();
        return Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "unknown_url",
            format!("Unknown request URL: {} {path}.", request.method()),
        ));
    };
    let is_anthropic = messages::is_asked(request.uri().path(), headers);
    match (endpoint, request.method()) {
        (Endpoint::Models, &Method::GET | &Method::HEAD) => {
            Ok(models::list(&shared.driver, &caller, is_anthropic))
        }
        (Endpoint::Model(id), &Method::GET | &Method::HEAD) => {
            models::show(shared, &caller, &id, is_anthropic)
        }
        (Endpoint::Live, &Method::GET | &Method::HEAD) => Ok(models::live(&shared.driver)),
        (Endpoint::Ready, &Method::GET | &Method::HEAD) => Ok(models::ready(&shared.driver)),
        (Endpoint::Metrics, &Method::GET | &Method::HEAD) => Ok(models::metrics(&shared.driver).await),
        (Endpoint::Page(asset), &Method::GET | &Method::HEAD) => Ok(console::respond(asset, headers)),
        (Endpoint::Files, &Method::GET | &Method::HEAD) => Ok(shared.files.list()),
        (Endpoint::File(sha256), &Method::GET) => shared.files.send(&sha256, headers),
        (Endpoint::Admin(route), _) => admin::respond(shared, route, request).await,
        (Endpoint::Generate(api), &Method::POST) => {
            check_content(headers)?;
            let permit = permit(shared)?;
            let owner = owner(headers);
            let served = shared.driver.telemetry().serve(api.route(), trace_context(headers));
            let answered = async {
                let body = body::read(request.into_body(), &shared.limits).await?;
                let served = served.clone();
                answer::generate(shared, answer::Call { api, name, body, served, owner, permit, caller })
                    .await
            };
            let about = telemetry::about(served.context());
            let answered = answered.instrument(about.clone()).await;
            answered.inspect_err(|error| {
                let (status, code) = error.told();
                about.in_scope(|| tracing::debug!(status, code, "not answered"));
                served.refused(status, code);
            })
        }
        (Endpoint::Response(id), method) => responses::kept(shared, method, owner(headers), &id),
        (Endpoint::Count, &Method::POST) => {
            check_content(headers)?;
            let _permit = permit(shared)?;
            let body = body::read(request.into_body(), &shared.limits).await?;
            messages::count(shared, &caller, body).await
        }
        (Endpoint::Generate(_) | Endpoint::Count, _) => Err(ApiError::method("POST")),
        _ => Err(ApiError::method("GET")),
    }
}

/// Room for one more request.
fn permit(shared: &Shared) -> Result<OwnedSemaphorePermit, ApiError> {
    let most = shared.limits.requests_max;
    let full = |_| {
        let message = format!("{most} requests are being answered already; try again.");
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", message)
    };
    shared.requests.clone().try_acquire_owned().map_err(full)
}

/// A page of another site that has made its name resolve to this address still sends that name.
fn check_host(shared: &Shared, request: &Request<Incoming>) -> Result<(), ApiError> {
    let header = request.headers().get(header::HOST).and_then(|h| h.to_str().ok());
    let Some(host) = request.uri().authority().map(|a| a.as_str()).or(header) else {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "host_missing",
            "The request has no Host header.",
        ));
    };
    let host = without_port(host).to_ascii_lowercase();
    if is_own_name(&host, shared.any_address) || shared.hosts.contains(&host) {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::FORBIDDEN,
        "host_not_allowed",
        "This server doesn't answer to the name in the Host header; add it to `allowed_hosts` if it should.",
    ))
}

/// An address is nobody's name.
fn is_own_name(host: &str, any_address: bool) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse::<IpAddr>().is_ok_and(|ip| any_address || ip.is_loopback())
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

/// Browsers send a page's origin; it must be on the list, or this server's own.
fn check_origin(shared: &Shared, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let own = || {
        let scheme = if shared.tls.is_some() { "https://" } else { "http://" };
        let origin = origin.to_str().ok()?.strip_prefix(scheme)?;
        (headers.get(header::HOST)?.to_str().ok()? == origin).then_some(())
    };
    if allowed_origin(shared, headers).is_some() || own().is_some() {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::FORBIDDEN,
        "origin_not_allowed",
        "Web pages of this origin may not use this server; add it to `allowed_origins` if they should.",
    ))
}

fn allowed_origin(shared: &Shared, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    shared.origins.iter().any(|o| o.as_bytes() == origin.as_bytes()).then(|| origin.clone())
}

/// The answer to a browser that asks before it asks; only reached from origins that are allowed.
fn preflight(headers: &HeaderMap) -> Response<Body> {
    let mut response = Response::new(Body::full(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let out = response.headers_mut();
    out.insert(header::ALLOW, HeaderValue::from_static("GET, POST, DELETE, OPTIONS"));
    if headers.contains_key(header::ORIGIN) {
        out.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
        out.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
        if let Some(wanted) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            out.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
        }
        if headers.contains_key("access-control-request-private-network") {
            let name = HeaderName::from_static("access-control-allow-private-network");
            out.insert(name, HeaderValue::from_static("true"));
        }
    }
    response
}

/// Whose the answers are that are kept: whoever has the same key.
fn owner(headers: &HeaderMap) -> Owner {
    caller::given(headers).map_or([0; 32], |key| *blake3::hash(key).as_bytes())
}

/// Only JSON: browsers send other types without asking first.
fn check_content(headers: &HeaderMap) -> Result<(), ApiError> {
    let refuse = |message: &str| {
        Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message))
    };
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    let kind = kind.split(';').next().unwrap_or("").trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return refuse("The request's Content-Type must be 'application/json'.");
    }
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => refuse("Compressed request bodies aren't supported."),
        _ => Ok(()),
    }
}

/// W3C `traceparent`; zeros where there is none or it is malformed.
fn trace_context(headers: &HeaderMap) -> TraceContext {
    let parse = || {
        let text = headers.get("traceparent")?.to_str().ok()?;
        let mut parts = text.split('-');
        let mut part = |length: usize| {
            parts.next().filter(|p| p.len() == length && p.bytes().all(|b| b.is_ascii_hexdigit()))
        };
        part(2).filter(|version| *version != "ff")?;
        Some(TraceContext {
            trace: u128::from_str_radix(part(32)?, 16).ok()?,
            span: u64::from_str_radix(part(16)?, 16).ok()?,
            flags: u8::from_str_radix(part(2)?, 16).ok()?,
        })
    };
    parse().unwrap_or_default()
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digit = |b: u8| (b as char).to_digit(16);
                (digit(bytes.next()?)? * 16 + digit(bytes.next()?)?) as u8
            }
            other => other,
        });
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine() {
        for host in ["localhost", "localhost:8484", "127.0.0.1:1", "127.8.9.1", "[::1]", "[::1]:8484", "::1"]
        {
            assert!(is_own_name(without_port(host), false), "{host}");
        }
        for host in
            ["", "localhost.evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[::2]:1"]
        {
            assert!(!is_own_name(without_port(host), false), "{host}");
        }
        assert!(is_own_name("10.0.0.1", true) && is_own_name("[fd00::1]", true));
        assert!(!is_own_name("evil.example", true));
    }

    #[test]
    fn percent_encoding() {
        assert_eq!(percent_decoded("a%2Fb%20c").as_deref(), Some("a/b c"));
        assert_eq!(percent_decoded("%"), None);
        assert_eq!(percent_decoded("%zz"), None);
        assert_eq!(percent_decoded("%ff"), None);
    }

    #[test]
    fn trace_contexts() {
        let check = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", HeaderValue::from_static(text));
            trace_context(&headers)
        };
        let good = check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        assert_eq!((good.trace >> 120, good.span & 0xff, good.flags), (0x0a, 0x31, 1));
        for bad in ["", "00", "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "00-0-0-0"] {
            assert_eq!(check(bad), TraceContext::default(), "{bad}");
        }
    }
}
