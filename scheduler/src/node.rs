//! What a node says of itself, when it connects and from then on.
use crate::{Event, Generate, KvType, ModelId, RequestId};
use std::time::Duration;

/// Whose a node is. The scheduler decides it when a node joins; what a node says of itself doesn't count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Trust {
    /// Ours: it may see every request.
    #[default]
    Own,
    /// Somebody else's: it sees no request that is tagged [`crate::PRIVATE`].
    Guest,
}

/// A model's tokenizer and chat template by content: the SHA-256 of [`Held::text`]'s bytes as a node hands them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TextId(pub [u8; 32]);

/// What a node is and holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// For a person.
    pub name: String,
    /// Who it is, across connections; 0 where that isn't known. Whoever takes the connection says so, not the node.
    pub identity: u64,
    /// Whose it is.
    pub trust: Trust,
    /// Its devices, for a person.
    pub devices: Vec<String>,
    /// Bytes that further models may take; 0 where it doesn't say.
    pub memory_free: u64,
    /// What it can serve now.
    pub models: Vec<Held>,
}

/// A model that a node holds in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    /// Which.
    pub model: ModelId,
    /// What requests call it.
    pub name: String,
    /// Its tokenizer and chat template, if the node hands them out.
    pub text: Option<TextId>,
    /// Longest sequence, prompt and output, in tokens.
    pub context: u32,
    /// Kernel family, activation and KV types: between equal ids equal seeds give equal tokens.
    pub numerics: String,
    /// How keys and values are stored.
    pub kv: KvType,
    /// KV blocks in all.
    pub kv_blocks: u32,
    /// Sequences that run at once, at least 1.
    pub slots: u32,
    /// How fast it is.
    pub rates: Rates,
}

/// How fast a node runs a model, by its own measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Prompt tokens a second; above 0.
    pub prefill_tokens_per_s: f32,
    /// From one token of output to the next, with one sequence running.
    pub token_time_alone: Duration,
    /// The same with all slots running.
    pub token_time_full: Duration,
}

impl Rates {
    /// From one token to the next while `running` of `slots` sequences run, interpolated.
    pub fn token_time(&self, running: u32, slots: u32) -> Duration {
        let more = self.token_time_full.saturating_sub(self.token_time_alone);
        let share = f64::from(running.clamp(1, slots.max(1)) - 1) / f64::from(slots.max(2) - 1);
        self.token_time_alone + more.mul_f64(share)
    }
}

/// A heartbeat.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Takes no new work.
    pub draining: bool,
    /// Of each model that has changed since the heartbeat before.
    pub models: Vec<ModelStatus>,
}

/// How a model fares on a node.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelStatus {
    /// Which.
    pub model: ModelId,
    /// Its engine works.
    pub alive: bool,
    /// Sequences that run.
    pub running: u32,
    /// Sequences that wait for room.
    pub waiting: u32,
    /// Tokens of prompts still to be computed, for whomever.
    pub queued_tokens: u32,
    /// KV blocks free.
    pub kv_blocks_free: u32,
    /// Steps computed since it was loaded: progress, whoever's.
    pub steps: u64,
    /// Rates by recent work.
    pub rates: Option<Rates>,
}

/// What a node tells the scheduler.
#[derive(Clone, Debug, PartialEq)]
pub enum FromNode {
    /// It holds other models than before.
    Profile(Profile),
    /// A heartbeat.
    Status(Status),
    /// Of a request.
    Event {
        /// Which.
        request: RequestId,
        /// [`Generate::attempt`] that this answers.
        attempt: u32,
        /// What happened.
        event: Event,
    },
}

/// What the scheduler tells a node.
#[derive(Clone, Debug, PartialEq)]
pub enum ToNode {
    /// To run a request.
    Generate(Box<Generate>),
    /// To stop; nothing that it still says of this attempt is heard.
    Cancel {
        /// Which.
        request: RequestId,
        /// Which attempt.
        attempt: u32,
    },
}
