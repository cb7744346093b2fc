//! A link between a node and a scheduler, and the streams on it.

mod memory;

use crate::{Frame, FrameError};

/// One end of a link: bidirectional streams of frames, each with flow control of its own, so that a reader that is
/// behind holds up its own stream only, and costs a bounded amount of memory.
///
/// Either end opens streams and accepts those of the other. A stream whose half is dropped before its end is reset:
/// the other end sees [`LinkError::Reset`]. A closed link ends all its streams.
#[derive(Debug)]
pub struct Link(memory::Link);

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
pub struct Sender(memory::Sender);

/// The half of a stream that frames come out of.
#[derive(Debug)]
pub struct Receiver(memory::Receiver);

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
        (Link(a), Link(b))
    }

    /// Opens a stream. The other end sees it at once.
    pub async fn open(&self) -> Result<Stream, LinkError> {
        self.0.open().await
    }

    /// The next stream that the other end opened. One task at a time.
    pub async fn accept(&self) -> Result<Stream, LinkError> {
        self.0.accept().await
    }

    /// Closes both ends and all streams.
    pub fn close(&self, reason: &str) {
        self.0.close(reason);
    }
}

impl Sender {
    /// Sends a frame, when there is room for it.
    pub async fn send(&mut self, frame: Frame) -> Result<(), LinkError> {
        self.0.send(frame).await
    }

    /// Nothing more will be sent; what was sent arrives.
    pub fn finish(self) {
        self.0.finish();
    }
}

impl Receiver {
    /// The next frame; none after the other end's [`Sender::finish`]. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        self.0.next().await
    }
}
