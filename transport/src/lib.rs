//! How scheduler and nodes talk: [`Frame`]s on the [`Stream`]s of a [`Link`].
//!
//! A node opens the link's first stream, the control stream, sends `Hello` (JSON), is answered with `Welcome`, then
//! sends its `Profile` and a `Status` now and then. The scheduler opens a stream for each request: `Generate` goes
//! one way; `Tokens`, then one `Finished` or `Failed` come back. Dropping a stream resets it, and cancels the request.
#![forbid(unsafe_code)]

mod frames;
mod link;

pub use frames::{
    BODY_MAX, Frame, FrameError, HEADER_BYTES, Hello, Kind, MAGIC, Message, Tokens, VERSION, Welcome,
};
pub use link::{Link, LinkError, Receiver, Sender, Stream};
