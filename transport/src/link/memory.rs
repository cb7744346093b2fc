//! Links within a process.
use super::{AnyReceiver, AnySender, LinkError, Stream};
use crate::Frame;
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{Mutex, mpsc, watch};

/// Frames on their way in one direction of a stream, at most.
const FRAMES_MAX: usize = 8;
/// Streams opened and not yet accepted, at most.
const STREAMS_MAX: usize = 64;

#[derive(Debug)]
pub(crate) struct Link {
    outgoing: mpsc::Sender<Stream>,
    incoming: Mutex<mpsc::Receiver<Stream>>,
    closed: Arc<Closed>,
}

/// Why the link is closed, once it is.
#[derive(Debug)]
struct Closed(watch::Sender<Option<Arc<str>>>);

impl Closed {
    fn close(&self, reason: &str) {
        self.0.send_if_modified(|closed| {
            let first = closed.is_none();
            if first {
                *closed = Some(reason.into());
            }
            first
        });
    }

    fn watch(&self) -> Watch {
        Watch(self.0.subscribe())
    }
}

/// Sees the link close.
#[derive(Clone, Debug)]
struct Watch(watch::Receiver<Option<Arc<str>>>);

impl Watch {
    fn now(&self) -> Option<LinkError> {
        self.0.borrow().as_ref().map(|reason| LinkError::Closed(reason.to_string()))
    }

    async fn closed(&mut self) -> LinkError {
        match self.0.wait_for(Option::is_some).await {
            Ok(reason) => LinkError::Closed(reason.as_deref().unwrap_or_default().into()),
            Err(_) => LinkError::Closed("both ends were dropped".into()),
        }
    }
}

impl Link {
    pub fn pair() -> (Link, Link) {
        let closed = Arc::new(Closed(watch::Sender::new(None)));
        let (to_b, from_a) = mpsc::channel(STREAMS_MAX);
        let (to_a, from_b) = mpsc::channel(STREAMS_MAX);
        let end = |outgoing, incoming, closed| Link { outgoing, incoming: Mutex::new(incoming), closed };
        (end(to_b, from_b, closed.clone()), end(to_a, from_a, closed))
    }

    pub async fn open(&self) -> Result<Stream, LinkError> {
        let mut closed = self.closed.watch();
        if let Some(error) = closed.now() {
            return Err(error);
        }
        let (send_there, receive_here) = half(&closed);
        let (send_here, receive_there) = half(&closed);
        let stream = |send, receive| Stream {
            send: super::Sender(AnySender::Memory(send)),
            receive: super::Receiver(AnyReceiver::Memory(receive)),
        };
        let (there, here) = (stream(send_there, receive_there), stream(send_here, receive_here));
        tokio::select! {
            biased;
            sent = self.outgoing.send(there) => sent.map_err(|_| LinkError::Reset)?,
            error = closed.closed() => return Err(error),
        }
        Ok(here)
    }

    pub async fn accept(&self) -> Result<Stream, LinkError> {
        let mut closed = self.closed.watch();
        let mut incoming = self.incoming.lock().await;
        tokio::select! {
            biased;
            error = closed.closed() => Err(error),
            stream = incoming.recv() => stream.ok_or_else(|| LinkError::Closed("the other end is gone".into())),
        }
    }

    pub fn close(&self, reason: &str) {
        self.closed.close(reason);
    }

    pub async fn closed(&self) {
        self.closed.watch().closed().await;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close("the other end is gone");
    }
}

fn half(closed: &Watch) -> (Sender, Receiver) {
    let (frames, incoming) = mpsc::channel(FRAMES_MAX);
    let finished = Arc::new(AtomicBool::new(false));
    let sender = Sender { frames, finished: finished.clone(), closed: closed.clone() };
    (sender, Receiver { frames: incoming, finished, closed: closed.clone() })
}

/// Reset when dropped without having been finished.
#[derive(Debug)]
pub(crate) struct Sender {
    frames: mpsc::Sender<Bytes>,
    finished: Arc<AtomicBool>,
    closed: Watch,
}

impl Sender {
    pub async fn send(&mut self, frame: Frame) -> Result<(), LinkError> {
        match self.frames.try_send(frame.bytes().clone()) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(self.closed.now().unwrap_or(LinkError::Reset)),
            Err(mpsc::error::TrySendError::Full(bytes)) => tokio::select! {
                biased;
                error = self.closed.closed() => Err(error),
                sent = self.frames.send(bytes) => sent.map_err(|_| LinkError::Reset),
            },
        }
    }

    pub fn finish(self) {
        self.finished.store(true, Ordering::Release);
    }
}

#[derive(Debug)]
pub(crate) struct Receiver {
    frames: mpsc::Receiver<Bytes>,
    finished: Arc<AtomicBool>,
    closed: Watch,
}

impl Receiver {
    pub async fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        let bytes = tokio::select! {
            biased;
            bytes = self.frames.recv() => bytes,
            error = self.closed.closed() => return Err(error),
        };
        match bytes {
            Some(bytes) => Ok(Some(Frame::parse(bytes)?)),
            None if self.finished.load(Ordering::Acquire) => Ok(None),
            None => Err(self.closed.now().unwrap_or(LinkError::Reset)),
        }
    }
}
