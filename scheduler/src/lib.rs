//! The cluster's mind: who is in the pool, what each holds, and where a request goes.
//!
//! Everything here is pure: no I/O, no clock, no threads, no randomness of its own. Time and random seeds are
//! arguments, so that the code the simulator drives is the code that ships. [`Scheduler`] is the state machine; the
//! crate also owns the vocabulary that every other crate speaks: [`Generate`] is what a node is asked, [`Event`] is
//! what it answers.
#![forbid(unsafe_code)]

mod block;
mod breaker;
mod group;
mod interface;
mod ledger;
mod memory;
mod node;
mod policy;
mod pool;
mod request;
mod schedule;
mod serving;
mod time;

pub use block::{BLOCK_TOKENS, BlockKey, KvType, chain};
pub use interface::{Class, Input, Limits, Load, ModelView, NodeView, Output, Wanted};
pub use ledger::{Account, Allowance, Balance, Entry, Holder, Limit, Period, Unit, Who};
pub use node::{
    CacheStatus, FromNode, Held, LABEL_BYTES_MAX, LABELS_MAX, Loading, ModelStatus, Offered, PREFIXES_MAX,
    Price, Profile, Rates, Status, TextId, ToNode, Trust,
};
pub use policy::{Ask, Clock, Decision, Denial, Fastest, Offer, OnLoss, PRIVATE, Policy, PoolView};
pub use request::{
    Candidate, Event, Failure, FailureKind, Finish, GRAMMAR_BYTES_MAX, Generate, KeyId, Logprob, ModelId,
    NodeId, Priority, RequestId, Sampling, Token, TraceContext, Usage,
};
pub use schedule::Scheduler;
pub use time::Time;
