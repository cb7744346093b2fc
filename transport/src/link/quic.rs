//! Links over QUIC: straight on it, or in a WebTransport session on it.
use super::{AnyReceiver, AnySender, LinkError, Stream, Urgency};
use crate::Frame;
use crate::frames::Assembler;
use quinn::{Connection, ConnectionError};
use std::sync::{Arc, OnceLock};
use web_transport_quinn::{
    ReadError, RecvStream, SendStream, Session, SessionError, WebTransportError, WriteError,
};

/// Of a reason that the other end gives, at most.
const REASON_MAX: usize = 500;
/// Bytes taken off a stream at once, at most.
const CHUNK_MAX: usize = 64 << 10;
/// What a half dropped before its end says.
const ABANDONED: u32 = 1;
/// Labels what nodes sign.
const EXPORT_LABEL: &[u8] = b"EXPORTER-weir-1-node";

/// Why this end closed the link, once it has.
type Reason = Arc<OnceLock<String>>;

#[derive(Debug)]
pub(crate) struct Link {
    session: Session,
    binding: [u8; 32],
    web: bool,
    reason: Reason,
}

impl Link {
    /// Streams straight on the connection, whose handshake is done.
    pub fn native(connection: Connection) -> Link {
        let mut binding = [0; 32];
        let exported = connection.export_keying_material(&mut binding, EXPORT_LABEL, &[]);
        exported.expect("32 bytes can be exported once the handshake is done");
        Link { session: Session::raw(connection), binding, web: false, reason: Reason::default() }
    }

    /// Streams of a WebTransport session. `binding` is known to both its ends, and no others.
    pub fn web(session: Session, binding: [u8; 32]) -> Link {
        Link { session, binding, web: true, reason: Reason::default() }
    }

    fn stream(&self, (send, receive): (SendStream, RecvStream)) -> Stream {
        let send = Sender { stream: send, finished: false, torn: false, reason: self.reason.clone() };
        let receive = Receiver { stream: receive, frames: Assembler::default(), reason: self.reason.clone() };
        Stream {
            send: super::Sender(AnySender::Quic(send)),
            receive: super::Receiver(AnyReceiver::Quic(receive)),
        }
    }

    pub async fn open(&self) -> Result<Stream, LinkError> {
        self.session.open_bi().await.map(|halves| self.stream(halves)).map_err(|e| closed(e, &self.reason))
    }

    pub async fn accept(&self) -> Result<Stream, LinkError> {
        let accepted = self.session.accept_bi().await;
        accepted.map(|halves| self.stream(halves)).map_err(|e| closed(e, &self.reason))
    }

    pub fn close(&self, reason: &str) {
        let mut end = reason.len().min(REASON_MAX);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        // Only the first reason counts.
        _ = self.reason.set(reason.to_owned());
        self.session.close(0, &reason.as_bytes()[..end]);
    }

    pub async fn closed(&self) {
        _ = self.session.closed().await;
    }

    pub fn binding(&self) -> [u8; 32] {
        self.binding
    }

    pub fn is_web(&self) -> bool {
        self.web
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close("the other end is gone");
    }
}

fn closed(error: SessionError, reason: &Reason) -> LinkError {
    let short = |told: &str| told.chars().take(REASON_MAX).collect::<String>();
    LinkError::Closed(match error {
        SessionError::WebTransportError(WebTransportError::Closed(_, told)) => short(&told),
        SessionError::ConnectionError(ConnectionError::ApplicationClosed(close)) => {
            short(&String::from_utf8_lossy(&close.reason))
        }
        SessionError::ConnectionError(ConnectionError::LocallyClosed) => {
            reason.get().cloned().unwrap_or_else(|| "this end closed it".into())
        }
        SessionError::ConnectionError(ConnectionError::TimedOut) => "nothing came for too long".into(),
        SessionError::ConnectionError(ConnectionError::Reset) => "the other end has forgotten it".into(),
        other => other.to_string(),
    })
}

#[derive(Debug)]
pub(crate) struct Sender {
    stream: SendStream,
    finished: bool,
    /// A frame was given up halfway.
    torn: bool,
    reason: Reason,
}

impl Sender {
    pub async fn send(&mut self, frame: Frame) -> Result<(), LinkError> {
        if self.torn {
            // An error means that it is reset already.
            _ = self.stream.reset(ABANDONED);
            return Err(LinkError::Reset);
        }
        self.torn = true;
        let written = self.stream.write_chunk(frame.bytes().clone()).await;
        written.map_err(|error| match error {
            WriteError::SessionError(error) => closed(error, &self.reason),
            _ => LinkError::Reset,
        })?;
        self.torn = false;
        Ok(())
    }

    pub fn finish(mut self) {
        if !self.torn {
            // An error means that the other end wants nothing more.
            _ = self.stream.finish();
            self.finished = true;
        }
    }

    pub fn set_urgency(&self, urgency: Urgency) {
        // An error means that nothing will be sent any more.
        _ = self.stream.set_priority(urgency as i32 - Urgency::Normal as i32);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if !self.finished {
            // An error means that it is reset already.
            _ = self.stream.reset(ABANDONED);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Receiver {
    stream: RecvStream,
    frames: Assembler,
    reason: Reason,
}

impl Receiver {
    pub async fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        loop {
            if let Some(frame) = self.frames.take()? {
                return Ok(Some(frame));
            }
            // Nothing is lost if the future is dropped here: reading a chunk either happens or doesn't.
            match self.stream.read_chunk(CHUNK_MAX, true).await {
                Ok(Some(chunk)) => self.frames.push(chunk.bytes),
                Ok(None) => return Ok(self.frames.end().map(|()| None)?),
                Err(ReadError::SessionError(error)) => return Err(closed(error, &self.reason)),
                Err(_) => return Err(LinkError::Reset),
            }
        }
    }
}
