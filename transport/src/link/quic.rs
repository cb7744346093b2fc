//! Links over QUIC: straight on it, or in a WebTransport session on it.
use super::{AnyReceiver, AnySender, LinkError, Stream, Urgency};
use crate::Frame;
use crate::frames::Assembler;
use quinn::{Connection, ConnectionError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use web_transport_quinn::{
    ReadError, RecvStream, SendStream, Session, SessionError, WebTransportError, WriteError,
};

/// Of a reason that the other end gives, at most.
const REASON_MAX: usize = 500;
/// Bytes taken off a stream at once, at most.
const CHUNK_MAX: usize = 64 << 10;
/// Retired streams of which the other end hasn't been told, at most.
const RETIRED_MAX: usize = 64;
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
    retired: Arc<Retired>,
}

/// Halves that are done with. Dropping one is a word to the other end, which isn't worth a datagram of its own.
#[derive(Debug, Default)]
struct Retired(Mutex<Vec<SendStream>>);

impl Retired {
    fn take(&self, stream: SendStream) {
        let mut retired = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if retired.len() >= RETIRED_MAX {
            retired.clear();
        }
        retired.push(stream);
    }

    fn tell(&self) {
        let retired = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for mut stream in retired {
            // An error means that the other end wants nothing more.
            _ = stream.reset(ABANDONED);
        }
    }
}

impl Link {
    /// Streams straight on the connection, whose handshake is done.
    pub fn native(connection: Connection) -> Link {
        let mut binding = [0; 32];
        let exported = connection.export_keying_material(&mut binding, EXPORT_LABEL, &[]);
        exported.expect("32 bytes can be exported once the handshake is done");
        Link::of(Session::raw(connection), binding, false)
    }

    /// Streams of a WebTransport session. `binding` is known to both its ends, and no others.
    pub fn web(session: Session, binding: [u8; 32]) -> Link {
        Link::of(session, binding, true)
    }

    fn of(session: Session, binding: [u8; 32], web: bool) -> Link {
        Link { session, binding, web, reason: Reason::default(), retired: Arc::default() }
    }

    fn stream(&self, (send, receive): (SendStream, RecvStream)) -> Stream {
        let (reason, retired) = (self.reason.clone(), self.retired.clone());
        let send = Sender { stream: Some(send), torn: false, reason, retired };
        let receive = Receiver { stream: receive, frames: Assembler::default(), reason: self.reason.clone() };
        Stream {
            send: super::Sender(AnySender::Quic(send)),
            receive: super::Receiver(AnyReceiver::Quic(receive)),
        }
    }

    pub async fn open(&self) -> Result<Stream, LinkError> {
        let opened = self.session.open_bi().await.map(|halves| self.stream(halves));
        self.tidy();
        opened.map_err(|e| closed(e, &self.reason))
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

    pub fn tidy(&self) {
        self.retired.tell();
    }

    pub fn round_trip(&self) -> std::time::Duration {
        self.session.rtt()
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
    /// None once it is finished or retired.
    stream: Option<SendStream>,
    /// A frame was given up halfway.
    torn: bool,
    reason: Reason,
    retired: Arc<Retired>,
}

impl Sender {
    pub async fn send(&mut self, frame: Frame) -> Result<(), LinkError> {
        let Some(stream) = &mut self.stream else { return Err(LinkError::Reset) };
        if self.torn {
            // An error means that it is reset already.
            _ = stream.reset(ABANDONED);
            return Err(LinkError::Reset);
        }
        self.torn = true;
        let written = stream.write_chunk(frame.bytes().clone()).await;
        written.map_err(|error| match error {
            WriteError::SessionError(error) => closed(error, &self.reason),
            _ => LinkError::Reset,
        })?;
        self.torn = false;
        Ok(())
    }

    pub fn finish(mut self) {
        if let Some(mut stream) = self.stream.take_if(|_| !self.torn) {
            // An error means that the other end wants nothing more.
            _ = stream.finish();
        }
    }

    pub fn retire(mut self) {
        if let Some(stream) = self.stream.take() {
            self.retired.take(stream);
        }
    }

    pub fn set_urgency(&self, urgency: Urgency) {
        if let Some(stream) = &self.stream {
            // An error means that nothing will be sent any more.
            _ = stream.set_priority(urgency as i32 - Urgency::Normal as i32);
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.stream {
            // An error means that it is reset already.
            _ = stream.reset(ABANDONED);
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
