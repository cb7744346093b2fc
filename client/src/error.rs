//! Why there is no answer.
use std::time::Duration;

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No endpoint has that name, or none was added.
    #[error("{}", no_endpoint(wanted.as_deref(), known))]
    NoEndpoint {
        /// What was asked for.
        wanted: Option<String>,
        /// What there is.
        known: Vec<String>,
    },
    /// The options make no sense.
    #[error("{0}")]
    Invalid(String),
    /// The address of a gateway makes no sense.
    #[error("`{0}` is not the address of a gateway; it looks like http://127.0.0.1:8484 or https://host/v1")]
    Url(String),
    /// The gateway can't be reached.
    #[error("could not reach {host}: {why}; is `weir serve` running there?")]
    Unreachable {
        /// Host and port.
        host: String,
        /// What the system says.
        why: String,
    },
    /// The endpoint said no.
    #[error("{message} (status {status})")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The endpoint's own words.
        message: String,
    },
    /// The endpoint failed while it answered.
    #[error("{0}")]
    Failed(String),
    /// What came is not what was agreed on.
    #[error("{host} doesn't speak the OpenAI API: {why}")]
    Protocol {
        /// Host and port.
        host: String,
        /// What is wrong.
        why: String,
    },
    /// The connection broke before the answer's end.
    #[error("the connection to {host} broke before the end of the answer: {why}")]
    Broken {
        /// Host and port.
        host: String,
        /// What the system says.
        why: String,
    },
    /// Nothing came for too long.
    #[error("nothing came from {host} for {} s", after.as_secs())]
    Silent {
        /// Host and port.
        host: String,
        /// How long.
        after: Duration,
    },
    /// By the caller.
    #[error("cancelled")]
    Cancelled,
}

fn no_endpoint(wanted: Option<&str>, known: &[String]) -> String {
    match (wanted, known) {
        (_, []) => "no endpoint was added".into(),
        (Some(wanted), known) => format!("no endpoint is called `{wanted}`; there are {}", known.join(", ")),
        (None, _) => "no endpoint was named".into(),
    }
}
