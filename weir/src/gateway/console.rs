//! The pages: chat, cluster, benchmark, and the one that makes a tab a node. They are part of the program if they were made
//! before it was built.
use super::body::Body;
use hyper::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue,
    IF_NONE_MATCH, VARY,
};
use hyper::{Response, StatusCode};

/// A file that browsers ask for.
#[derive(Debug)]
pub(super) struct Asset {
    /// As pages name it.
    path: &'static str,
    /// None where it is kept packed only.
    bytes: &'static [u8],
    /// The same, packed.
    gzip: Option<&'static [u8]>,
    /// Of its content.
    tag: &'static str,
}

/// All of them.
static SITE: &[Asset] = include!(concat!(env!("OUT_DIR"), "/site.rs"));

/// Stands where the pages would be.
static MISSING: Asset =
    Asset { path: "/missing.html", bytes: include_bytes!("console.html"), gzip: None, tag: "\"missing\"" };

/// Pages by the names that people type.
const PAGES: [(&str, &str); 4] =
    [("", "/index.html"), ("/cluster", "/cluster.html"), ("/bench", "/bench.html"), ("/join", "/join.html")];

/// What scripts of these pages may do: those of this server only, and WebAssembly; models may come from anywhere by
/// HTTPS, and nodes connect to wherever the scheduler says.
const POLICY: &str = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; \
                      style-src 'self'; img-src 'self' data:; manifest-src 'self'; connect-src 'self' https: blob: data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The file for a path without its last slash, if there is one.
pub(super) fn find(path: &str) -> Option<&'static Asset> {
    let page = PAGES.iter().find(|(name, _)| *name == path);
    let wanted = page.map_or(path, |(_, file)| file);
    let found = SITE.iter().find(|asset| asset.path == wanted);
    found.or(page.map(|_| &MISSING))
}

/// The file, or that whoever asks has it already.
pub(super) fn respond(asset: &'static Asset, asked: &HeaderMap) -> Response<Body> {
    let has = |name: HeaderName, what: &str| {
        asked.get(name).and_then(|value| value.to_str().ok()).is_some_and(|value| value.contains(what))
    };
    let (bytes, packed) = match asset.gzip.filter(|_| asset.bytes.is_empty() || has(ACCEPT_ENCODING, "gzip"))
    {
        Some(packed) => (packed, true),
        None => (asset.bytes, false),
    };
    let known = has(IF_NONE_MATCH, asset.tag);
    let mut response = Response::new(Body::full(if known { &[] } else { bytes }));
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value: &'static str| {
        headers.insert(name, HeaderValue::from_static(value));
    };
    set(CONTENT_TYPE, kind(asset.path));
    set(ETAG, asset.tag);
    set(CACHE_CONTROL, "no-cache");
    set(VARY, "accept-encoding");
    if packed && !known {
        set(CONTENT_ENCODING, "gzip");
    }
    for (name, value) in [
        ("content-security-policy", POLICY),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        // Isolated from other origins' pages: threads that share memory, and exact clocks.
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-embedder-policy", "require-corp"),
        ("cross-origin-resource-policy", "same-origin"),
    ] {
        set(HeaderName::from_static(name), value);
    }
    response
}

fn kind(path: &str) -> &'static str {
    match path.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("wasm") => "application/wasm",
        Some("svg") => "image/svg+xml",
        Some("webmanifest") => "application/manifest+json",
        Some("json") => "application/json",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_there_whether_they_were_built_or_not() {
        for (name, _) in PAGES {
            let asset = find(name).unwrap();
            let response = respond(asset, &HeaderMap::new());
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.headers()[CONTENT_TYPE], "text/html; charset=utf-8");
            let mut asked = HeaderMap::new();
            asked.insert(IF_NONE_MATCH, HeaderValue::from_static(asset.tag));
            assert_eq!(respond(asset, &asked).status(), StatusCode::NOT_MODIFIED);
        }
        for path in ["/nothing", "/..", "/index.html/", "/.gitignore"] {
            assert!(find(path).is_none(), "{path}");
        }
    }

    #[test]
    fn what_is_packed_is_unpacked_for_those_who_ask_for_no_packing() {
        static ASSET: Asset = Asset { path: "/a.js", bytes: b"long", gzip: Some(b"short"), tag: "\"1\"" };
        let mut asked = HeaderMap::new();
        assert!(!respond(&ASSET, &asked).headers().contains_key(CONTENT_ENCODING));
        asked.insert(ACCEPT_ENCODING, HeaderValue::from_static("br, gzip"));
        assert_eq!(respond(&ASSET, &asked).headers()[CONTENT_ENCODING], "gzip");
    }
}
