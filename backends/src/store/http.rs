//! Files from web servers: in ranges, so that what has been fetched is never fetched again.
use super::catalog::to_hex;
use super::error::SourceError;
use super::part::{Note, Part};
use super::{Progress, StoreConfig, StoreError};
use std::io::{self, Read};
use std::time::Duration;
use ureq::http::{Response, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, BodyReader, Proxy};

const REDIRECTS_MAX: usize = 8;
/// Connections in a row that brought nothing new.
const FRUITLESS_MAX: u32 = 4;

/// What to fetch.
pub(super) struct Get<'a> {
    pub(super) url: &'a str,
    /// Sent to the first host only, never where it redirects to.
    pub(super) token: Option<&'a str>,
    /// What the file must be: a server that names its digest and names another is not even downloaded.
    pub(super) sha256: &'a [u8; 32],
}

/// Fetches what is missing of `part`, over as many connections as it takes while each brings something.
pub(super) fn fetch(
    config: &StoreConfig,
    get: &Get<'_>,
    part: &mut Part,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), SourceError> {
    let (direct, proxied) = agents(config)?;
    let agent = |url: &str| match &proxied {
        Some(agent) if !exempt(&config.no_proxy, host_of(url)) => agent.clone(),
        _ => direct.clone(),
    };
    let (mut furthest, mut fruitless) = (part.len(), 0);
    loop {
        let failed = match once(&agent, get, part, progress) {
            Ok(()) if part.missing() == 0 => return Ok(()),
            Ok(()) => format!("{} ended early", host_of(get.url)),
            Err(SourceError::Network(why)) => why,
            Err(other) => return Err(other),
        };
        fruitless = if part.len() > furthest { 0 } else { fruitless + 1 };
        // a host that can't be reached at all is given up at once: the next source may be near
        let never_reached = part.len() == part.inherited && fruitless > 0;
        if never_reached || fruitless >= FRUITLESS_MAX {
            return Err(SourceError::Network(failed));
        }
        furthest = furthest.max(part.len());
        tracing::debug!("{failed}; going on at byte {}", part.len());
        std::thread::sleep(Duration::from_millis(100 << fruitless));
    }
}

/// One connection.
fn once(
    agent: &dyn Fn(&str) -> Agent,
    get: &Get<'_>,
    part: &mut Part,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), SourceError> {
    let mut response = request(agent, get, part)?;
    match response.status().as_u16() {
        206 => {
            let (start, total) = content_range(&response)
                .ok_or_else(|| SourceError::Network(format!("{}: a range without bounds", get.url)))?;
            if start != part.len() {
                return Err(SourceError::Network(format!("{}: not the range asked for", get.url)));
            }
            check_size(total, part.size())?;
        }
        // no ranges here, or the file has changed since
        200 => {
            let length = response.headers().get(header::CONTENT_LENGTH);
            check_size(length.and_then(|v| v.to_str().ok()?.parse().ok()), part.size())?;
            if part.len() > 0 {
                part.restart()?;
            }
        }
        416 => {
            part.restart()?;
            return Err(SourceError::Network(format!("{}: no such range", get.url)));
        }
        status @ (408 | 429 | 500..=599) if part.len() > part.inherited => {
            return Err(SourceError::Network(format!("{} answered {status}", get.url)));
        }
        status => return Err(SourceError::Status { url: get.url.into(), status }),
    }
    let etag = response.headers().get(header::ETAG).and_then(|v| v.to_str().ok());
    // a weak one doesn't promise equal bytes
    let etag = etag.filter(|e| e.starts_with('"') && e.len() < 256).map(str::to_owned);
    part.set_note(Note { url: get.url.into(), etag })?;
    part.append_all(&mut Named { url: get.url, body: response.body_mut().as_reader() }, progress)
}

/// A body whose errors say where it comes from.
struct Named<'a> {
    url: &'a str,
    body: BodyReader<'a>,
}

impl Read for Named<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.body.read(into).map_err(|e| io::Error::other(network(self.url, &e.into()).to_string()))
    }
}

/// The response to a request for the missing bytes, redirects followed.
fn request(agent: &dyn Fn(&str) -> Agent, get: &Get<'_>, part: &Part) -> Result<Response<Body>, SourceError> {
    let mut url = get.url.to_owned();
    for hop in 0..REDIRECTS_MAX {
        let mut request = agent(&url).get(&url).header("accept-encoding", "identity");
        if let Some(token) = get.token.filter(|_| host_of(&url) == host_of(get.url)) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if part.len() > 0 {
            request = request.header("range", format!("bytes={}-", part.len()));
            if let (true, Some(etag)) = (part.note().url == get.url, &part.note().etag) {
                request = request.header("if-range", etag);
            }
        }
        let response = request.call().map_err(|e| network(&url, &e))?;
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
        if hop == 0 {
            check_linked(header("x-linked-etag"), header("x-linked-size"), get.sha256, part.size())?;
        }
        match header("location").filter(|_| response.status().is_redirection()) {
            Some(to) => url = join(&url, to)?,
            None => return Ok(response),
        }
    }
    Err(SourceError::Network(format!("{}: too many redirects", get.url)))
}

/// Hugging Face names digest and size of a large file in the answer that redirects to it.
fn check_linked(
    etag: Option<&str>,
    size: Option<&str>,
    sha256: &[u8; 32],
    expected: u64,
) -> Result<(), SourceError> {
    let digest = etag.map(|e| e.trim_matches('"')).filter(|e| e.len() == 64);
    if let Some(digest) = digest.filter(|d| !d.eq_ignore_ascii_case(&to_hex(sha256))) {
        return Err(SourceError::Different(format!("SHA-256 {digest}")));
    }
    check_size(size.and_then(|s| s.parse().ok()), expected)
}

fn check_size(stated: Option<u64>, expected: u64) -> Result<(), SourceError> {
    match stated {
        Some(size) if size != expected => {
            Err(SourceError::Different(format!("{size} bytes instead of {expected}")))
        }
        _ => Ok(()),
    }
}

/// First byte and total size of `bytes FIRST-LAST/TOTAL`; the total may be `*`.
fn content_range(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    let value = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let first = range.split_once('-')?.0.parse().ok()?;
    Some((first, total.parse().ok()))
}

/// Where a redirect leads. From https never to http.
fn join(from: &str, to: &str) -> Result<String, SourceError> {
    let refuse = |why: &str| Err(SourceError::Network(format!("{from} redirects {why}")));
    if to.starts_with("http://") && from.starts_with("https://") {
        return refuse("to an unencrypted address");
    }
    if to.starts_with("https://") || to.starts_with("http://") {
        return Ok(to.to_owned());
    }
    let Some((scheme, rest)) = from.split_once("://") else { return refuse("nowhere") };
    if let Some(other) = to.strip_prefix("//") {
        return Ok(format!("{scheme}://{other}"));
    }
    let host = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    if to.starts_with('/') {
        return Ok(format!("{scheme}://{host}{to}"));
    }
    let path = rest[host.len()..].split(['?', '#']).next().unwrap_or_default();
    let folder = path.rfind('/').map_or("/", |at| &path[..=at]);
    Ok(format!("{scheme}://{host}{folder}{to}"))
}

/// Host and port of an address.
fn host_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    authority.rsplit_once('@').map_or(authority, |(_, host)| host)
}

/// Whether NO_PROXY's list of hosts and domains names this one. This machine itself needs no proxy either.
fn exempt(list: &str, host: &str) -> bool {
    let bare = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or(v6),
        None => host.split(':').next().unwrap_or(host),
    };
    let named = |entry: &str| {
        let entry = entry.trim().trim_start_matches('*').trim_start_matches('.');
        !entry.is_empty() && (bare == entry || bare.strip_suffix(entry).is_some_and(|b| b.ends_with('.')))
    };
    let local = bare == "localhost" || bare == "::1" || bare.starts_with("127.");
    local || list.trim() == "*" || list.split(',').any(named)
}

/// One agent that goes straight to the host, and one through the proxy, if there is one.
fn agents(config: &StoreConfig) -> Result<(Agent, Option<Agent>), SourceError> {
    let agent = |proxy| {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            // said outright: a program that links two of them has no default
            .unversioned_rustls_crypto_provider(std::sync::Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        Agent::config_builder()
            .tls_config(tls)
            .proxy(proxy)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("weir/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(config.connect_timeout))
            .timeout_connect(Some(config.connect_timeout))
            .timeout_recv_response(Some(config.stall_timeout))
            .timeout_per_read(Some(config.stall_timeout))
            .timeout_per_write(Some(config.stall_timeout))
            .build()
            .new_agent()
    };
    let proxied = match &config.proxy {
        Some(url) => Some(Proxy::new(url).map_err(|_| StoreError::Proxy(url.clone()))?),
        None => None,
    };
    Ok((agent(None), proxied.map(|p| agent(Some(p)))))
}

fn network(url: &str, e: &ureq::Error) -> SourceError {
    let host = host_of(url);
    SourceError::Network(match e {
        ureq::Error::HostNotFound => format!("there is no host {host}, or no network"),
        ureq::Error::Timeout(_) => format!("{host} didn't answer in time"),
        ureq::Error::ConnectionFailed => format!("could not connect to {host}"),
        ureq::Error::Io(e) => format!("{host}: {e}"),
        other => format!("{host}: {other}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_they_say() {
        let check = |from, to, lead: Option<&str>| assert_eq!(join(from, to).ok().as_deref(), lead);
        check("https://a/x/y?q=/", "z", Some("https://a/x/z"));
        check("https://a/x/y", "/z", Some("https://a/z"));
        check("https://a", "z", Some("https://a/z"));
        check("https://a/x", "//b/z", Some("https://b/z"));
        check("http://a/x", "https://b/", Some("https://b/"));
        check("https://a/x", "http://a/", None);
    }

    #[test]
    fn some_hosts_need_no_proxy() {
        let check = |list, host, so| assert_eq!(exempt(list, host), so, "{list} {host}");
        check("", "127.0.0.1:80", true);
        check("", "[::1]:80", true);
        check("", "example.org", false);
        check("a.b, .example.org", "hub.example.org:443", true);
        check("example.org", "notexample.org", false);
        check("*", "anything", true);
    }
}
