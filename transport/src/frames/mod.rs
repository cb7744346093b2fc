//! Frames: a header of 16 bytes and a body.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..4 | `WEIR` |
//! | 4..6 | protocol version, little-endian as all that follows |
//! | 6..8 | kind |
//! | 8..12 | flags: 0 |
//! | 12..16 | bytes of the body, at most [`BODY_MAX`] |
//!
//! `Hello` and `Welcome` are JSON, so that versions can meet; their version field is the sender's. `Profile`, `Order`
//! and `Fetch` are JSON too, since they are rare and grow: unknown fields are passed over. `Piece` is plain bytes. All
//! other bodies are rkyv archives (unaligned, little-endian, 32-bit pointers), validated before anything is read of
//! them. What a valid body says is checked once more for sense: whoever gets a [`Message`] need not ask again.
//!
//! Version 1 is frozen: `tests/golden/frames.txt` holds the bytes of one of each kind.

mod assembler;
mod body;
mod convert;
mod described;

pub use assembler::Assembler;
use body::ArchivedTokens;
use bytes::Bytes;
pub use described::{Fetch, Hello, Order, Proof, Refusal, RefusalCode, Replica, Welcome};
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use described::{hex, unhex};
use serde::{Deserialize, Serialize};
use weir_scheduler::{Event, Failure, Finish, Generate, Profile, RequestId, Status, Token, Usage};

/// The first bytes of every frame.
pub const MAGIC: [u8; 4] = *b"WEIR";
/// The protocol version.
pub const VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// Most bytes of a body: room for a prompt of two million tokens.
pub const BODY_MAX: usize = 8 << 20;
/// Most bytes of a JSON body.
const JSON_MAX: usize = 256 << 10;
/// Most bytes of a [`Kind::Piece`].
pub const PIECE_MAX: usize = 256 << 10;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Node to scheduler, first on the control stream.
    Hello = 1,
    /// Its answer.
    Welcome = 2,
    /// Node to scheduler: what it holds.
    Profile = 3,
    /// Node to scheduler: a heartbeat.
    Status = 4,
    /// Scheduler to node, first on a request's stream.
    Generate = 5,
    /// Scheduler to node.
    Cancel = 6,
    /// Node to scheduler: one token, or several where the reader was behind.
    Tokens = 7,
    /// Node to scheduler: the end.
    Finished = 8,
    /// Node to scheduler: the end, without success.
    Failed = 9,
    /// Scheduler to node, on the control stream: what to do beside requests.
    Order = 10,
    /// Scheduler to node, first on a stream of its own: hand out some content.
    Fetch = 11,
    /// Its answer, piece by piece.
    Piece = 12,
}

impl Kind {
    /// All there are.
    pub const ALL: [Kind; 12] = [
        Kind::Hello,
        Kind::Welcome,
        Kind::Profile,
        Kind::Status,
        Kind::Generate,
        Kind::Cancel,
        Kind::Tokens,
        Kind::Finished,
        Kind::Failed,
        Kind::Order,
        Kind::Fetch,
        Kind::Piece,
    ];

    /// Most bytes of its body.
    fn body_max(self) -> usize {
        match self {
            Kind::Hello | Kind::Welcome | Kind::Profile | Kind::Order | Kind::Fetch => JSON_MAX,
            Kind::Piece => PIECE_MAX,
            _ => BODY_MAX,
        }
    }
}

/// What is wrong with a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It does not begin as frames do.
    #[error("this is no frame: it does not begin with WEIR")]
    Magic,
    /// Another version.
    #[error(
        "the peer speaks protocol version {0}, this program speaks version {VERSION}; update the older of the two"
    )]
    Version(u16),
    /// Not a kind.
    #[error("{0} is no kind of frame")]
    Kind(u16),
    /// Flags that this version doesn't have.
    #[error("flags {0:#x} are not known")]
    Flags(u32),
    /// Longer than allowed.
    #[error("a body of {0} bytes is longer than allowed")]
    TooLong(usize),
    /// Shorter or longer than it says.
    #[error("a frame of {got} bytes should have {want}")]
    Length {
        /// Bytes there are.
        got: usize,
        /// Bytes there should be.
        want: usize,
    },
    /// The body is not a valid archive, or not the JSON expected.
    #[error("malformed {kind:?} frame: {why}")]
    Malformed {
        /// Of which kind.
        kind: Kind,
        /// What is wrong.
        why: String,
    },
    /// The body is well-formed and makes no sense.
    #[error("{kind:?} frame: {why}")]
    Senseless {
        /// Of which kind.
        kind: Kind,
        /// What is wrong.
        why: &'static str,
    },
}

/// What a frame says.
#[derive(Debug)]
pub enum Message<'a> {
    /// See [`Kind::Hello`].
    Hello(Hello),
    /// See [`Kind::Welcome`].
    Welcome(Welcome),
    /// See [`Kind::Profile`].
    Profile(Profile),
    /// See [`Kind::Status`].
    Status(Status),
    /// See [`Kind::Generate`].
    Generate(Box<Generate>),
    /// See [`Kind::Cancel`].
    Cancel {
        /// Which request.
        request: RequestId,
        /// Which attempt.
        attempt: u32,
    },
    /// See [`Kind::Tokens`].
    Tokens(Tokens<'a>),
    /// See [`Kind::Finished`] and [`Kind::Failed`].
    End {
        /// Which request.
        request: RequestId,
        /// Which attempt.
        attempt: u32,
        /// `Finished` or `Failed`.
        event: Event,
    },
    /// See [`Kind::Order`].
    Order(Order),
    /// See [`Kind::Fetch`].
    Fetch(Fetch),
    /// See [`Kind::Piece`].
    Piece(Bytes),
}

/// Tokens, read in place.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a>(&'a ArchivedTokens);

impl<'a> Tokens<'a> {
    /// Which request.
    pub fn request(&self) -> RequestId {
        RequestId(self.0.request.into())
    }

    /// Which attempt.
    pub fn attempt(&self) -> u32 {
        self.0.attempt.into()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.tokens.len()
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.0.tokens.is_empty()
    }

    /// First to last.
    pub fn iter(&self) -> impl Iterator<Item = Token> + 'a {
        self.0.tokens.iter().map(convert::token)
    }

    /// Positions, ids and texts, first to last, where they lie.
    pub fn pieces(&self) -> impl Iterator<Item = (u32, u32, &'a str)> + 'a {
        self.0.tokens.iter().map(|token| (token.position.into(), token.id.into(), token.text.as_str()))
    }

    /// Ids, first to last.
    pub fn ids(&self) -> impl Iterator<Item = u32> + 'a {
        self.0.tokens.iter().map(|token| token.id.into())
    }
}

/// A frame whose header has been checked. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    kind: Kind,
    bytes: Bytes,
}

impl Frame {
    /// Checks the header of a whole frame.
    pub fn parse(bytes: Bytes) -> Result<Frame, FrameError> {
        let header =
            bytes.first_chunk().ok_or(FrameError::Length { got: bytes.len(), want: HEADER_BYTES })?;
        let (kind, body) = Frame::parse_header(header)?;
        let want = HEADER_BYTES + body;
        if bytes.len() != want {
            return Err(FrameError::Length { got: bytes.len(), want });
        }
        Ok(Frame { kind, bytes })
    }

    /// Kind and length of the body that follows, which is bounded.
    pub fn parse_header(header: &[u8; HEADER_BYTES]) -> Result<(Kind, usize), FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let u32_at =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if header[..4] != MAGIC {
            return Err(FrameError::Magic);
        }
        let number = u16_at(6);
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u16 == number);
        let greeting = matches!(kind, Some(Kind::Hello | Kind::Welcome));
        if u16_at(4) != VERSION && !greeting {
            return Err(FrameError::Version(u16_at(4)));
        }
        let kind = kind.ok_or(FrameError::Kind(number))?;
        if u32_at(8) != 0 {
            return Err(FrameError::Flags(u32_at(8)));
        }
        let length = u32_at(12) as usize;
        if length > kind.body_max() {
            return Err(FrameError::TooLong(length));
        }
        Ok((kind, length))
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// All of it, as it goes over a link.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    fn body(&self) -> &[u8] {
        &self.bytes[HEADER_BYTES..]
    }

    /// Validates the body and says what it says.
    pub fn read(&self) -> Result<Message<'_>, FrameError> {
        let kind = self.kind;
        Ok(match kind {
            Kind::Hello => Message::Hello(self.json()?),
            Kind::Welcome => Message::Welcome(self.json()?),
            Kind::Profile => Message::Profile(described::profile(self.json()?)?),
            Kind::Status => Message::Status(convert::status(self.archive()?)?),
            Kind::Generate => Message::Generate(Box::new(convert::generate(self.archive()?)?)),
            Kind::Cancel => {
                let body: &body::ArchivedCancel = self.archive()?;
                Message::Cancel { request: RequestId(body.request.into()), attempt: body.attempt.into() }
            }
            Kind::Tokens => Message::Tokens(Tokens(self.archive()?)),
            Kind::Finished => {
                let body: &body::ArchivedFinished = self.archive()?;
                let event = convert::finished(body)?;
                Message::End { request: RequestId(body.request.into()), attempt: body.attempt.into(), event }
            }
            Kind::Failed => {
                let body: &body::ArchivedFailed = self.archive()?;
                let event = Event::Failed(convert::failure(body)?);
                Message::End { request: RequestId(body.request.into()), attempt: body.attempt.into(), event }
            }
            Kind::Order => Message::Order(self.json()?),
            Kind::Fetch => Message::Fetch(self.json()?),
            Kind::Piece => Message::Piece(self.bytes.slice(HEADER_BYTES..)),
        })
    }

    fn json<T: for<'a> Deserialize<'a>>(&self) -> Result<T, FrameError> {
        serde_json::from_slice(self.body())
            .map_err(|error| FrameError::Malformed { kind: self.kind, why: error.to_string() })
    }

    fn archive<T: body::Archived>(&self) -> Result<&T, FrameError> {
        rkyv::access::<T, rkyv::rancor::Error>(self.body())
            .map_err(|error| FrameError::Malformed { kind: self.kind, why: error.to_string() })
    }

    /// A frame of these JSON fields.
    fn of_json(kind: Kind, body: &impl Serialize) -> Frame {
        let body = serde_json::to_vec(body).expect("strings and numbers always serialise");
        Frame::finish(kind, [&[0; HEADER_BYTES], body.as_slice()].concat())
    }

    /// `bytes` begin with room for the header.
    fn finish(kind: Kind, mut bytes: Vec<u8>) -> Frame {
        let length = (bytes.len() - HEADER_BYTES) as u32;
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&(kind as u16).to_le_bytes());
        bytes[8..12].fill(0);
        bytes[12..16].copy_from_slice(&length.to_le_bytes());
        Frame { kind, bytes: bytes.into() }
    }

    /// See [`Kind::Hello`].
    pub fn hello(hello: &Hello) -> Frame {
        Frame::of_json(Kind::Hello, hello)
    }

    /// See [`Kind::Welcome`].
    pub fn welcome(welcome: &Welcome) -> Frame {
        Frame::of_json(Kind::Welcome, welcome)
    }

    /// See [`Kind::Profile`].
    pub fn profile(profile: &Profile) -> Frame {
        Frame::of_json(Kind::Profile, &described::Profile::from(profile))
    }

    /// See [`Kind::Status`].
    pub fn status(status: Status) -> Frame {
        body::encode(Kind::Status, &body::Status::from(status))
    }

    /// See [`Kind::Generate`]. Fails if the request is longer than a frame may be.
    pub fn generate(ask: Generate) -> Result<Frame, FrameError> {
        let frame = body::encode(Kind::Generate, &body::Generate::from(ask));
        let length = frame.body().len();
        if length > BODY_MAX { Err(FrameError::TooLong(length)) } else { Ok(frame) }
    }

    /// See [`Kind::Cancel`].
    pub fn cancel(request: RequestId, attempt: u32) -> Frame {
        body::encode(Kind::Cancel, &body::Cancel { request: request.0, attempt })
    }

    /// See [`Kind::Tokens`].
    pub fn tokens(request: RequestId, attempt: u32, tokens: Vec<Token>) -> Frame {
        let tokens = tokens.into_iter().map(body::Token::from).collect();
        body::encode(Kind::Tokens, &body::Tokens { request: request.0, attempt, tokens })
    }

    /// See [`Kind::Finished`].
    pub fn finished(request: RequestId, attempt: u32, reason: Finish, text: String, usage: Usage) -> Frame {
        body::encode(Kind::Finished, &body::Finished::new(request, attempt, reason, text, usage))
    }

    /// See [`Kind::Failed`].
    pub fn failed(request: RequestId, attempt: u32, failure: Failure) -> Frame {
        body::encode(Kind::Failed, &body::Failed::new(request, attempt, failure))
    }

    /// See [`Kind::Order`].
    pub fn order(order: &Order) -> Frame {
        Frame::of_json(Kind::Order, order)
    }

    /// See [`Kind::Fetch`].
    pub fn fetch(fetch: &Fetch) -> Frame {
        Frame::of_json(Kind::Fetch, fetch)
    }

    /// See [`Kind::Piece`]. At most [`PIECE_MAX`] bytes.
    pub fn piece(bytes: &[u8]) -> Frame {
        Frame::finish(Kind::Piece, [&[0; HEADER_BYTES], bytes].concat())
    }
}
