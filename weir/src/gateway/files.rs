//! Model files for browser tabs, which compute with them themselves: by content, in ranges.
use super::body::Body;
use super::error::ApiError;
use bytes::Bytes;
use hyper::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, RANGE,
};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc};

/// Bytes read at once.
const CHUNK: usize = 256 << 10;
/// Chunks on their way to a browser.
const CHUNKS_MAX: usize = 2;
/// Files that are read at once.
const READERS_MAX: usize = 64;

/// A model file that tabs may fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedFile {
    /// What requests call the model.
    pub name: String,
    /// Of the file.
    pub sha256: [u8; 32],
    /// Where it is.
    pub path: PathBuf,
}

/// Those of a gateway.
pub(super) struct Files {
    files: Vec<SharedFile>,
    readers: Arc<Semaphore>,
}

impl Files {
    pub(super) fn new(files: Vec<SharedFile>) -> Files {
        Files { files, readers: Arc::new(Semaphore::new(READERS_MAX)) }
    }

    /// `GET /weir/v1/files`.
    pub(super) fn list(&self) -> Response<Body> {
        let size = |file: &SharedFile| std::fs::metadata(&file.path).map_or(0, |about| about.len());
        let list: Vec<Value> = self
            .files
            .iter()
            .map(|file| json!({ "name": file.name, "sha256": hex(&file.sha256), "size": size(file) }))
            .collect();
        let mut response = Response::new(Body::full(json!({ "files": list }).to_string()));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    /// `GET /weir/v1/files/SHA256`, all of it or one range.
    pub(super) fn send(&self, sha256: &str, asked: &HeaderMap) -> Result<Response<Body>, ApiError> {
        let gone =
            || ApiError::new(StatusCode::NOT_FOUND, "file_not_found", "This server shares no such file.");
        let file = self.files.iter().find(|file| hex(&file.sha256) == sha256).ok_or_else(gone)?;
        let busy = |_| {
            ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too_many_requests",
                "Too many files are being read.",
            )
        };
        let reader = self.readers.clone().try_acquire_owned().map_err(busy)?;
        let failed = |error: io::Error| {
            tracing::warn!(%error, "{} can't be read", file.path.display());
            gone()
        };
        let mut source = File::open(&file.path).map_err(failed)?;
        let size = source.metadata().map_err(failed)?.len();
        let range = asked.get(RANGE).map(|range| range.to_str().ok().and_then(|range| parse(range, size)));
        let (from, to) = match range {
            None => (0, size),
            Some(Some(range)) => range,
            Some(None) => return Ok(unsatisfiable(size)),
        };
        source.seek(SeekFrom::Start(from)).map_err(failed)?;
        let (sender, chunks) = mpsc::channel(CHUNKS_MAX);
        tokio::spawn(async move {
            send(source, to - from, sender).await;
            drop(reader);
        });
        let mut response = Response::new(Body::Feed(chunks));
        if range.is_some() {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        headers.insert(CONTENT_LENGTH, (to - from).into());
        let mut set = |name, value: String| {
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(name, value);
            }
        };
        set(ETAG, format!("\"{sha256}\""));
        if range.is_some() {
            set(CONTENT_RANGE, format!("bytes {from}-{}/{size}", to - 1));
        }
        Ok(response)
    }
}

fn unsatisfiable(size: u64) -> Response<Body> {
    let mut response = Response::new(Body::full(""));
    *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
    if let Ok(value) = HeaderValue::try_from(format!("bytes */{size}")) {
        response.headers_mut().insert(CONTENT_RANGE, value);
    }
    response
}

/// Reads as fast as somebody takes it; whoever hangs up ends it, and a file that has become shorter does.
async fn send(source: File, mut left: u64, sender: mpsc::Sender<Bytes>) {
    let mut source = Some(source);
    while left > 0 {
        let Ok(room) = sender.reserve().await else { return };
        let Some(mut file) = source.take() else { return };
        let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length];
            file.read_exact(&mut bytes).map(|()| (file, bytes))
        });
        match read.await {
            Ok(Ok((file, bytes))) => {
                source = Some(file);
                left -= bytes.len() as u64;
                room.send(bytes.into());
            }
            Ok(Err(error)) => return tracing::warn!(%error, "a model file can't be read"),
            Err(_) => return,
        }
    }
}

/// `bytes=FROM-TO`, `bytes=FROM-` or `bytes=-LAST`, as the first byte and the one behind the last.
fn parse(range: &str, size: u64) -> Option<(u64, u64)> {
    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (from, to) = match (from, to) {
        ("", last) => (size.saturating_sub(last.parse().ok()?), size),
        (from, "") => (from.parse().ok()?, size),
        (from, to) => (from.parse().ok()?, to.parse::<u64>().ok()?.checked_add(1)?.min(size)),
    };
    (from < to).then_some((from, to))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (text, expected) in [
            ("bytes=0-0", Some((0, 1))),
            ("bytes=5-", Some((5, 10))),
            ("bytes=5-99", Some((5, 10))),
            ("bytes=-3", Some((7, 10))),
            ("bytes=-30", Some((0, 10))),
            ("bytes=10-", None),
            ("bytes=7-5", None),
            ("bytes=-0", None),
            ("bytes=0-1,3-4", None),
            ("bytes=0-18446744073709551615", None),
            ("lines=0-1", None),
            ("bytes=", None),
        ] {
            assert_eq!(parse(text, 10), expected, "{text}");
        }
    }
}
