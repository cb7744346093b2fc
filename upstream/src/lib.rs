//! Upstreams: providers, and engines of one's own next door, that are asked over HTTP.
//!
//! A [`Provider`] says how one is spoken to; the [`Catalog`] has rows of the well-known ones. An [`Upstream`] is a
//! provider with its key and its connections: [`Upstream::ask`] sends a conversation and returns an [`Answer`], whose
//! [`Piece`]s come as the provider sends them and whose [`End`] says what was used and what it cost. Conversations and
//! answers have the shape of OpenAI's chat completions whatever the provider speaks.
//!
//! What comes from outside is bounded in size and time. Keys are [`Secret`]s: no debug output, error or log shows one.
#![forbid(unsafe_code)]

mod address;
mod answer;
mod anthropic;
mod ask;
mod catalog;
mod connect;
mod discover;
mod error;
mod http;
mod limiter;
mod openai;
mod secret;
pub mod sse;
mod told;
mod upstream;

pub use address::Address;
pub use answer::Answer;
pub use anthropic::{REDACTED_THINKING, STOP_SEQUENCE, THINKING_SIGNATURE};
pub use ask::{Api, Ask, estimate_tokens};
pub use catalog::{
    Auth, Catalog, CatalogError, Dialect, Engine, Entry, Model, ModelEntry, Prefill, Prices, Provider, Whose,
};
pub use connect::{Connection, Connector};
pub use discover::{Found, Queue};
pub use error::UpstreamError;
pub use limiter::Limiter;
pub use openai::EMBEDDINGS;
pub use secret::Secret;
pub use told::{Cost, End, Finish, Piece, Usage, merge_delta};
pub use upstream::{Times, Upstream};
