//! One connection: HTTP/1.1 over a socket that is cut when its client stops reading.
use super::{Phase, Shared, routes};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::Future;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Answers the connection's requests until it closes, or until the gateway has told it to and it has nothing under way.
pub(super) async fn serve(stream: TcpStream, from: IpAddr, shared: Arc<Shared>) {
    // Tokens are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let guarded = Guarded { stream, patience: shared.limits.stall_timeout, stalled: None };
    let Some(tls) = &shared.tls else { return answer(guarded, from, shared).await };
    let header_timeout = shared.limits.header_timeout;
    match timeout(header_timeout, shake_hands(tls, guarded)).await {
        Ok(Ok(stream)) => answer(stream, from, shared).await,
        Ok(Err(error)) => tracing::debug!(%from, %error, "no TLS handshake"),
        Err(_) => tracing::debug!(%from, "no TLS handshake in time"),
    }
}

async fn shake_hands(tls: &TlsAcceptor, guarded: Guarded) -> io::Result<TlsStream<Guarded>> {
    const HANDSHAKE: u8 = 22;
    let mut first = [0];
    if guarded.stream.peek(&mut first).await? == 1 && first[0] != HANDSHAKE {
        const HINT: &str = "This server speaks HTTPS; begin its address with https://.\n";
        let head = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n";
        let _ = guarded
            .stream
            .try_write(format!("{head}content-length: {}\r\n\r\n{HINT}", HINT.len()).as_bytes());
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it speaks plain HTTP"));
    }
    tls.accept(guarded).await
}

async fn answer<S>(stream: S, from: IpAddr, shared: Arc<Shared>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut draining = pin!(shared.reached(Phase::Draining));
    let header_timeout = shared.limits.header_timeout;
    let service = service_fn(move |request| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(routes::respond(&shared, from, request).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(header_timeout)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(stream), service)
    );
    let closed = tokio::select! {
        result = connection.as_mut() => result,
        () = &mut draining => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = closed {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Turns a connection away without reading from it.
pub(super) fn refuse(stream: &TcpStream) {
    const BODY: &str = r#"{"error":{"message":"Too many connections.","type":"server_error","param":null,"code":"overloaded"}}"#;
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close";
    // A fresh socket's buffer takes this; if not, the client sees the connection close.
    let _ = stream.try_write(format!("{head}\r\ncontent-length: {}\r\n\r\n{BODY}", BODY.len()).as_bytes());
}

/// A socket whose writes fail once the client has taken nothing for `patience`.
///
/// The response's body isn't polled while the socket is full, so only the socket itself can notice.
struct Guarded {
    stream: TcpStream,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Guarded {
    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let end = Instant::now() + self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(end)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client stopped reading")))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
