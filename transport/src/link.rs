//! A link between a node and a scheduler, and the streams on it.

mod memory;
#[cfg(target_arch = "wasm32")]
mod page;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) mod quic;

use crate::{Frame, FrameError};
use std::time::Duration;

/// One end of a link: bidirectional streams of frames, each with flow control of its own, so that a reader that is
/// behind holds up its own stream only, and costs a bounded amount of memory.
///
/// Either end opens streams and accepts those of the other. A stream whose half is dropped before its end is reset:
/// the other end sees [`LinkError::Reset`]. A closed link ends all its streams.
#[derive(Debug)]
pub struct Link(pub(crate) AnyLink);

#[derive(Debug)]
pub(crate) enum AnyLink {
    Memory(memory::Link),
    #[cfg(not(target_arch = "wasm32"))]
    Quic(Box<quic::Link>),
    #[cfg(target_arch = "wasm32")]
    Page(page::Link),
}

/// A bidirectional stream.
#[derive(Debug)]
pub struct Stream {
    /// Towards the other end.
    pub send: Sender,
    /// From it.
    pub receive: Receiver,
}

/// The half of a stream that frames go into.
#[derive(Debug)]
pub struct Sender(AnySender);

#[derive(Debug)]
enum AnySender {
    Memory(memory::Sender),
    #[cfg(not(target_arch = "wasm32"))]
    Quic(quic::Sender),
    #[cfg(target_arch = "wasm32")]
    Page(page::Sender),
}

/// The half of a stream that frames come out of.
#[derive(Debug)]
pub struct Receiver(AnyReceiver);

#[derive(Debug)]
enum AnyReceiver {
    Memory(memory::Receiver),
    #[cfg(not(target_arch = "wasm32"))]
    Quic(quic::Receiver),
    #[cfg(target_arch = "wasm32")]
    Page(page::Receiver),
}

/// Whose frames leave first where a link has not room for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Of requests that yield to everybody.
    Background,
    /// Of requests.
    Normal,
    /// Of requests that somebody watches.
    Interactive,
    /// Heartbeats and orders.
    Control,
}

/// Why nothing comes or goes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The link is closed: why.
    #[error("the link is closed: {0}")]
    Closed(String),
    /// The other end gave up this stream.
    #[error("the other end reset the stream")]
    Reset,
    /// What came was no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl Link {
    /// Two ends of a link within this process, over bounded channels of the bytes that a wire would carry.
    pub fn in_memory() -> (Link, Link) {
        let (a, b) = memory::Link::pair();
        (Link(AnyLink::Memory(a)), Link(AnyLink::Memory(b)))
    }

    /// A link from a page to the scheduler at `url`, which must show the certificate with this SHA-256.
    #[cfg(target_arch = "wasm32")]
    pub async fn connect(url: &str, certificate: [u8; 32]) -> Result<Link, LinkError> {
        Ok(Link(AnyLink::Page(page::Link::connect(url, certificate).await?)))
    }

    /// Opens a stream. The other end sees it with its first frame, or before.
    pub async fn open(&self) -> Result<Stream, LinkError> {
        match &self.0 {
            AnyLink::Memory(link) => link.open().await,
            #[cfg(not(target_arch = "wasm32"))]
            AnyLink::Quic(link) => link.open().await,
            #[cfg(target_arch = "wasm32")]
            AnyLink::Page(link) => link.open().await,
        }
    }

    /// The next stream that the other end opened. One task at a time.
    pub async fn accept(&self) -> Result<Stream, LinkError> {
        match &self.0 {
            AnyLink::Memory(link) => link.accept().await,
            #[cfg(not(target_arch = "wasm32"))]
            AnyLink::Quic(link) => link.accept().await,
            #[cfg(target_arch = "wasm32")]
            AnyLink::Page(link) => link.accept().await,
        }
    }

    /// Closes both ends and all streams.
    pub fn close(&self, reason: &str) {
        match &self.0 {
            AnyLink::Memory(link) => link.close(reason),
            #[cfg(not(target_arch = "wasm32"))]
            AnyLink::Quic(link) => link.close(reason),
            #[cfg(target_arch = "wasm32")]
            AnyLink::Page(link) => link.close(reason),
        }
    }

    /// Resolves when the link is closed.
    pub async fn closed(&self) {
        match &self.0 {
            AnyLink::Memory(link) => link.closed().await,
            #[cfg(not(target_arch = "wasm32"))]
            AnyLink::Quic(link) => link.closed().await,
            #[cfg(target_arch = "wasm32")]
            AnyLink::Page(link) => link.closed().await,
        }
    }

    /// Tells the other end of streams that were retired.
    pub fn tidy(&self) {
        match &self.0 {
            AnyLink::Memory(_) => {}
            #[cfg(not(target_arch = "wasm32"))]
            AnyLink::Quic(link) => link.tidy(),
            #[cfg(target_arch = "wasm32")]
            AnyLink::Page(_) => {}
        }
    }

    /// How long a word takes to the other end and back, as measured; none within a process.
    pub fn round_trip(&self) -> Duration {
        match &self.0 {
            AnyLink::Memory(_) => Duration::ZERO,
            #[cfg(not(target_arch = "wasm32"))]
            AnyLink::Quic(link) => link.round_trip(),
            #[cfg(target_arch = "wasm32")]
            AnyLink::Page(_) => Duration::ZERO,
        }
    }

    /// Whether a browser may be at the other end.
    pub fn is_web(&self) -> bool {
        match &self.0 {
            AnyLink::Memory(_) => false,
            #[cfg(not(target_arch = "wasm32"))]
            AnyLink::Quic(link) => link.is_web(),
            #[cfg(target_arch = "wasm32")]
            AnyLink::Page(_) => true,
        }
    }

    /// What only the two ends of this very link know, for an end to sign; none within a process, where nothing needs
    /// to be proved.
    pub fn binding(&self) -> Option<[u8; 32]> {
        match &self.0 {
            AnyLink::Memory(_) => None,
            #[cfg(not(target_arch = "wasm32"))]
            AnyLink::Quic(link) => Some(link.binding()),
            #[cfg(target_arch = "wasm32")]
            AnyLink::Page(link) => Some(link.binding()),
        }
    }
}

impl Sender {
    /// Sends a frame, when there is room for it. A stream whose send was dropped halfway is reset by the next one.
    pub async fn send(&mut self, frame: Frame) -> Result<(), LinkError> {
        match &mut self.0 {
            AnySender::Memory(sender) => sender.send(frame).await,
            #[cfg(not(target_arch = "wasm32"))]
            AnySender::Quic(sender) => sender.send(frame).await,
            #[cfg(target_arch = "wasm32")]
            AnySender::Page(sender) => sender.send(frame).await,
        }
    }

    /// Nothing more will be sent; what was sent arrives.
    pub fn finish(self) {
        match self.0 {
            AnySender::Memory(sender) => sender.finish(),
            #[cfg(not(target_arch = "wasm32"))]
            AnySender::Quic(sender) => sender.finish(),
            #[cfg(target_arch = "wasm32")]
            AnySender::Page(sender) => sender.finish(),
        }
    }

    /// Nothing more will be sent, and the other end has said all it wanted to: what is left to be told of the stream goes
    /// out with whatever is said next on the link, or with [`Link::tidy`].
    pub fn retire(self) {
        match self.0 {
            AnySender::Memory(sender) => sender.finish(),
            #[cfg(not(target_arch = "wasm32"))]
            AnySender::Quic(sender) => sender.retire(),
            #[cfg(target_arch = "wasm32")]
            AnySender::Page(sender) => sender.finish(),
        }
    }

    /// What is sent from now on leaves before what is less urgent on other streams. Normal until it is set.
    pub fn set_urgency(&self, urgency: Urgency) {
        match &self.0 {
            // Channels don't share a wire.
            AnySender::Memory(_) => {}
            #[cfg(not(target_arch = "wasm32"))]
            AnySender::Quic(sender) => sender.set_urgency(urgency),
            #[cfg(target_arch = "wasm32")]
            AnySender::Page(sender) => sender.set_urgency(urgency),
        }
    }
}

impl Receiver {
    /// The next frame; none after the other end's [`Sender::finish`]. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        match &mut self.0 {
            AnyReceiver::Memory(receiver) => receiver.next().await,
            #[cfg(not(target_arch = "wasm32"))]
            AnyReceiver::Quic(receiver) => receiver.next().await,
            #[cfg(target_arch = "wasm32")]
            AnyReceiver::Page(receiver) => receiver.next().await,
        }
    }
}
