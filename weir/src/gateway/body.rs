//! Bodies: what is read with limits, and what is written.
use super::Limits;
use super::error::ApiError;
use super::stream::EventStream;
use bytes::Bytes;
use hyper::StatusCode;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// A response's body.
pub(super) enum Body {
    /// Known from the start.
    Full(Bytes),
    /// Server-sent events, made as the connection asks for them.
    Events(Box<EventStream>),
    /// Server-sent events that somebody else writes.
    Feed(tokio::sync::mpsc::Receiver<Bytes>),
}

impl Body {
    pub(super) fn full(bytes: impl Into<Bytes>) -> Body {
        Body::Full(bytes.into())
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Body::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            Body::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Body::Events(stream) => stream.poll_bytes(cx).map(|bytes| bytes.map(|b| Ok(Frame::data(b)))),
            Body::Feed(events) => events.poll_recv(cx).map(|bytes| bytes.map(|b| Ok(Frame::data(b)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Body::Full(bytes) if bytes.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Body::Events(_) | Body::Feed(_) => SizeHint::default(),
        }
    }
}

/// All of a request's body, if it is short enough and comes fast enough.
pub(super) async fn read(mut body: Incoming, limits: &Limits) -> Result<Vec<u8>, ApiError> {
    let deadline = Instant::now() + limits.body_timeout;
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > limits.body_bytes_max {
        discard(body).await;
        return Err(too_large(limits));
    }
    let mut bytes = Vec::with_capacity(announced.min(64 << 10));
    loop {
        let frame = match timeout_at(deadline, poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))).await {
            Err(_) => {
                return Err(ApiError::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "timeout",
                    format!("The request's body did not arrive within {} s.", limits.body_timeout.as_secs()),
                ));
            }
            Ok(None) => return Ok(bytes),
            Ok(Some(Err(_))) => {
                return Err(ApiError::new(
                    StatusCode::BAD_REQUEST,
                    "bad_body",
                    "The request's body broke off or was malformed.",
                ));
            }
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limits.body_bytes_max {
            discard(body).await;
            return Err(too_large(limits));
        }
        bytes.extend_from_slice(&data);
    }
}

fn too_large(limits: &Limits) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "request_too_large",
        format!("The request's body is longer than {} bytes.", limits.body_bytes_max),
    )
}

/// Reads on for a moment: closing at once would reset the connection before the client has seen the answer.
async fn discard(mut body: Incoming) {
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut left = 64usize << 20;
    while let Ok(Some(Ok(frame))) =
        timeout_at(deadline, poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))).await
    {
        let length = frame.data_ref().map_or(0, |d| d.len());
        if length > left {
            return;
        }
        left -= length;
    }
}
