//! How scheduler and nodes talk: [`Frame`]s on the [`Stream`]s of a [`Link`].
//!
//! A node opens the link's first stream, the control stream, sends `Hello` (JSON), is answered with `Welcome`, then
//! sends its `Profile` and a `Status` now and then; `Order`s come the other way. The scheduler opens a stream for each
//! request: `Generate` goes one way; `Tokens`, then one `Finished` or `Failed` come back. It opens one, too, to `Fetch`
//! content, which comes in `Piece`s. Dropping a stream resets it, and cancels the request.
//!
//! Links lie within a process, over QUIC, or in a WebTransport session, which is what browsers have: a [`Listener`] takes
//! those that a [`Dialer`] makes, all on one UDP port. The listener is known by the [`Fingerprint`] of its [`Identity`], to
//! a browser by the hash of its [`WebCertificate`]; a node proves its own key by signing [`Link::binding`].
#![forbid(unsafe_code)]

mod crowd;
#[cfg(not(target_arch = "wasm32"))]
mod endpoint;
mod frames;
#[cfg(not(target_arch = "wasm32"))]
mod identity;
mod link;
mod signed;

pub use crowd::{Crowd, Place};
#[cfg(not(target_arch = "wasm32"))]
pub use endpoint::{DialError, Dialer, EndpointError, Listener, WebCertificate, tls_to};
pub use frames::{
    Assembler, BODY_MAX, Fetch, Frame, FrameError, HEADER_BYTES, Hello, Kind, MAGIC, Message, Order,
    PIECE_MAX, Proof, Refusal, RefusalCode, Replica, Tokens, VERSION, Welcome,
};
#[cfg(not(target_arch = "wasm32"))]
pub use identity::{
    ADDRESSES_MAX, Fingerprint, Identity, IdentityError, JoinLink, JoinToken, PublicKey, code,
};
pub use link::{Link, LinkError, Receiver, Sender, Stream, Urgency};
pub use signed::{WEB_PATH, signed_by_node};
