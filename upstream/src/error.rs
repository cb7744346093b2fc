//! Why an upstream did not answer.
use std::time::Duration;

/// Why there is no answer, or no more of it. Each says which provider; none has a key in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamError {
    /// Nobody can be reached by the address.
    #[error("{provider}: `{url}` is no address; expected http(s)://HOST[:PORT][/PATH]")]
    Address {
        /// Which.
        provider: String,
        /// What was configured.
        url: String,
    },
    /// 400 and its like: the request itself is at fault.
    #[error("{provider} refuses the request ({status}): {message}")]
    Invalid {
        /// Which.
        provider: String,
        /// Of its answer; 0 where we saw it ourselves.
        status: u16,
        /// What it says.
        message: String,
    },
    /// 401, 403.
    #[error("{provider} refuses its key ({status}): {message}; check {remedy}")]
    Key {
        /// Which.
        provider: String,
        /// Of its answer.
        status: u16,
        /// What it says.
        message: String,
        /// Where the key is set.
        remedy: String,
    },
    /// 404: it has no such model.
    #[error("{provider} has no model `{model}`: {message}")]
    NoModel {
        /// Which.
        provider: String,
        /// As it was asked for.
        model: String,
        /// What it says.
        message: String,
    },
    /// It wants to be asked later: 429, or our own reckoning of its limits.
    #[error("{provider} takes no more requests for {:.1} s: {message}", after.as_secs_f64())]
    Busy {
        /// Which.
        provider: String,
        /// When to ask again.
        after: Duration,
        /// What it says.
        message: String,
    },
    /// It says so, or it was never reached.
    #[error("{provider} failed: {message}")]
    Failed {
        /// Which.
        provider: String,
        /// What happened.
        message: String,
    },
    /// It didn't answer in time.
    #[error("{provider} sent {what} for {:.1} s", after.as_secs_f64())]
    Silent {
        /// Which.
        provider: String,
        /// What did not come: `no first token`, `nothing`.
        what: &'static str,
        /// We waited so long.
        after: Duration,
    },
    /// The answer ended before its end.
    #[error("{provider} broke off its answer: {message}")]
    Cut {
        /// Which.
        provider: String,
        /// How.
        message: String,
    },
    /// It sent what it may not.
    #[error("{provider} sent what is no answer: {message}")]
    Nonsense {
        /// Which.
        provider: String,
        /// What.
        message: String,
    },
}

impl UpstreamError {
    /// Of which kind it is, for logs: messages may repeat what was asked.
    pub fn kind(&self) -> &'static str {
        match self {
            UpstreamError::Address { .. } => "address",
            UpstreamError::Invalid { .. } => "invalid",
            UpstreamError::Key { .. } => "key",
            UpstreamError::NoModel { .. } => "no_model",
            UpstreamError::Busy { .. } => "busy",
            UpstreamError::Failed { .. } => "failed",
            UpstreamError::Silent { .. } => "silent",
            UpstreamError::Cut { .. } => "cut",
            UpstreamError::Nonsense { .. } => "nonsense",
        }
    }

    /// Whether the same may be sent once more, while nothing has come of it: it never arrived, or the provider itself says
    /// that it failed. What broke off or makes no sense may be charged for.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, UpstreamError::Failed { .. })
    }

    /// Whether it says something of the provider's health.
    pub(crate) fn is_fault(&self) -> bool {
        use UpstreamError::{Cut, Failed, Nonsense, Silent};
        matches!(self, Failed { .. } | Cut { .. } | Nonsense { .. } | Silent { .. })
    }
}

/// Characters of what a provider says that are passed on.
const EXCERPT_CHARS: usize = 300;

/// The beginning of something, fit for a terminal.
pub(crate) fn excerpt(text: &str) -> String {
    let cut = text.trim().chars().take(EXCERPT_CHARS);
    let text: String = cut.map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.is_empty() {
        true => "nothing".into(),
        false => text,
    }
}
