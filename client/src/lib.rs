//! One way to ask a language model, wherever it runs.
//!
//! ```no_run
//! # async fn example() -> Result<(), weir_client::ClientError> {
//! use weir_client::{Endpoint, Message, Options, Piece, Weir};
//!
//! let mut weir = Weir::new();
//! weir.add("home", Endpoint::gateway("http://127.0.0.1:8484", None));
//! let mut answer = weir.chat(vec![Message::user("Why is the sky blue?")], Options::default())?;
//! while let Some(piece) = answer.next().await {
//!     match piece? {
//!         Piece::Text(text) => print!("{text}"),
//!         Piece::End(end) => println!("\n[{} tokens]", end.usage.output_tokens),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! To ask another model elsewhere, add another [`Endpoint`]; nothing else changes.
//!
//! Behind a gateway an answer outlives the node that makes it; it doesn't outlive its connection to the gateway. Where that
//! breaks, the pieces so far are followed by [`ClientError::Broken`], and the request is cancelled there: asking again, with
//! the same seed, is up to the caller.
#![forbid(unsafe_code)]

mod answer;
mod error;
mod gateway;
mod local;
mod message;

pub use answer::{Answer, Canceller, End, Finish, Piece, Usage};
pub use error::ClientError;
pub use local::LocalOptions;
pub use message::{Message, Options, Role};
pub use weir_scheduler::Priority;

use gateway::Gateway;
use local::Local;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Somewhere that answers.
#[derive(Clone)]
#[non_exhaustive]
pub enum Endpoint {
    /// A model in this process, loaded when it is first asked.
    Local {
        /// A catalog name or a path to a .gguf.
        model: String,
        /// How it is held.
        options: LocalOptions,
    },
    /// Anything that speaks the OpenAI API.
    Gateway {
        /// `http://127.0.0.1:8484` or `https://host/v1`.
        url: String,
        /// Sent as a bearer token.
        key: Option<String>,
        /// Silence after which an answer is taken for dead. The first token of a model that has to be loaded takes
        /// long.
        patience: Duration,
    },
}

impl Endpoint {
    /// A gateway, with five minutes of patience.
    pub fn gateway(url: impl Into<String>, key: Option<String>) -> Endpoint {
        Endpoint::Gateway { url: url.into(), key, patience: Duration::from_secs(300) }
    }
}

impl fmt::Debug for Endpoint {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Local { model, .. } => write!(f, "Local({model})"),
            Endpoint::Gateway { url, .. } => write!(f, "Gateway({url})"),
        }
    }
}

/// The endpoints that a program knows, by name.
///
/// Nothing is decided behind the caller's back: a request goes to the endpoint that [`Options::endpoint`] names, else
/// to the first one added. Answers are made on the tokio runtime that the call was made in.
#[derive(Clone, Default)]
pub struct Weir {
    endpoints: Vec<(String, Reached)>,
}

/// An endpoint and what is kept of it between requests.
#[derive(Clone)]
enum Reached {
    Local(Arc<Local>),
    Gateway(Arc<Gateway>),
}

impl Weir {
    /// Knows no endpoint.
    pub fn new() -> Weir {
        Weir::default()
    }

    /// Adds an endpoint, or puts it in the place of the one that has this name. Nothing is connected or loaded yet.
    pub fn add(&mut self, name: impl Into<String>, endpoint: Endpoint) -> &mut Weir {
        let name = name.into();
        let reached = match endpoint {
            Endpoint::Local { model, options } => Reached::Local(Arc::new(Local::new(model, options))),
            Endpoint::Gateway { url, key, patience } => {
                Reached::Gateway(Arc::new(Gateway::new(url, key, patience)))
            }
        };
        match self.endpoints.iter_mut().find(|(known, _)| *known == name) {
            Some(place) => place.1 = reached,
            None => self.endpoints.push((name, reached)),
        }
        self
    }

    /// The model's next turn in a conversation. Must be called within a tokio runtime. Dropping the answer cancels it.
    pub fn chat(&self, messages: Vec<Message>, options: Options) -> Result<Answer, ClientError> {
        self.ask(Ask::Chat(messages), options)
    }

    /// The text that follows `prompt`. As [`Weir::chat`] otherwise.
    pub fn complete(&self, prompt: impl Into<String>, options: Options) -> Result<Answer, ClientError> {
        self.ask(Ask::Complete(prompt.into()), options)
    }

    /// The names of the models that an endpoint offers; the first one added where `endpoint` is none.
    pub async fn models(&self, endpoint: Option<&str>) -> Result<Vec<String>, ClientError> {
        match self.endpoint(endpoint)? {
            Reached::Local(local) => local.models(),
            Reached::Gateway(gateway) => gateway.models().await,
        }
    }

    fn ask(&self, ask: Ask, options: Options) -> Result<Answer, ClientError> {
        options.check()?;
        match self.endpoint(options.endpoint.as_deref())?.clone() {
            Reached::Local(local) => {
                Ok(Answer::of(|out| async move { local.answer(ask, options, out).await }))
            }
            Reached::Gateway(gateway) => {
                Ok(Answer::of(|out| async move { gateway.answer(ask, options, out).await }))
            }
        }
    }

    fn endpoint(&self, name: Option<&str>) -> Result<&Reached, ClientError> {
        let found = match name {
            Some(name) => self.endpoints.iter().find(|(known, _)| known == name),
            None => self.endpoints.first(),
        };
        found.map(|(_, reached)| reached).ok_or_else(|| ClientError::NoEndpoint {
            wanted: name.map(str::to_owned),
            known: self.endpoints.iter().map(|(known, _)| known.clone()).collect(),
        })
    }
}

/// What is asked.
enum Ask {
    Chat(Vec<Message>),
    Complete(String),
}
