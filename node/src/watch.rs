//! Whoever wants to know what a node has run: its telemetry.
use std::time::Duration;
use weir_scheduler::{FailureKind, TraceContext};

/// Is told of each attempt when it is over, on the thread that carried it: to be quick about.
pub trait Watch: Send + Sync {
    /// An attempt is over.
    fn ran(&self, ran: &Ran<'_>);
}

/// What became of an attempt. Nothing of what was said.
#[derive(Clone, Copy, Debug)]
pub struct Ran<'a> {
    /// The node's name.
    pub node: &'a str,
    /// Of its devices the first, as people call it.
    pub device: &'a str,
    /// What requests call the model.
    pub model: &'a str,
    /// Kernel family, activation and KV types.
    pub numerics: &'a str,
    /// In which trace, and whose child.
    pub trace: TraceContext,
    /// Counts the nodes that the request was given to.
    pub attempt: u32,
    /// Tokens that were sent.
    pub tokens: u32,
    /// Requests that ran at the same time, at most, itself included.
    pub beside: u32,
    /// From the request's arrival here to its first token, to the last one, and to the end.
    pub first: Option<Duration>,
    /// See [`Ran::first`].
    pub last: Option<Duration>,
    /// See [`Ran::first`].
    pub took: Duration,
    /// It ended with an answer, whole or failed; else it was cancelled.
    pub ended: bool,
    /// Why it failed, if it did.
    pub failed: Option<FailureKind>,
}
