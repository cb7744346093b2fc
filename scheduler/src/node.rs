//! What a node says of itself, when it connects and from then on.
use crate::{BlockKey, Event, Generate, KvType, ModelId, RequestId};
use std::fmt;
use std::time::Duration;

/// Whose a node is. The scheduler decides it when a node joins; what a node says of itself doesn't count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Trust {
    /// Ours: it may see every request.
    #[default]
    Own,
    /// Somebody else's: it sees no request that is tagged [`crate::PRIVATE`].
    Guest,
    /// A company's, for money: it sees no request that is tagged [`crate::PRIVATE`], and others only where the policy
    /// lets them leave.
    Provider,
}

impl Trust {
    /// Each of them.
    pub const ALL: [Trust; 3] = [Trust::Own, Trust::Guest, Trust::Provider];

    /// As people write it: `own`, `guest`, `provider`.
    pub fn name(self) -> &'static str {
        match self {
            Trust::Own => "own",
            Trust::Guest => "guest",
            Trust::Provider => "provider",
        }
    }

    /// The one of that name.
    pub fn named(name: &str) -> Option<Trust> {
        Trust::ALL.into_iter().find(|trust| trust.name() == name)
    }
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
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
    /// What its owner says of it, by names that policies know: `kind`, `country`, `zone`, `provider`, and any other. At
    /// most [`LABELS_MAX`]; the first of a name counts. A guest's don't count at all.
    pub labels: Vec<(String, String)>,
    /// Its devices, for a person.
    pub devices: Vec<String>,
    /// Bytes that further models may take, beside those it holds and those it loads; 0 where it doesn't say.
    pub memory_free: u64,
    /// Bytes of memory that its devices read in a second, as measured; 0 where it doesn't say.
    pub bandwidth: u64,
    /// What a token costs there, by its owner's word.
    pub price: Price,
    /// What it can serve now.
    pub models: Vec<Held>,
    /// What it could load: it has the file, or knows where to get it.
    pub offers: Vec<Offered>,
    /// What it is loading.
    pub loading: Vec<Loading>,
    /// What it could not load, and why, for a person.
    pub failures: Vec<(ModelId, String)>,
    /// The number of the last order to load or unload that it has taken from this scheduler: what it says here is what
    /// came of all up to it.
    pub orders: u64,
}

/// Labels of a node, at most; and bytes of a label's name or value, at most.
pub const LABELS_MAX: usize = 32;
/// See [`LABELS_MAX`].
pub const LABEL_BYTES_MAX: usize = 100;

/// What tokens cost on a node, in billionths of a dollar: energy, or what a provider charges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Price {
    /// For a token of a prompt.
    pub prompt: u64,
    /// For a token of output.
    pub output: u64,
}

impl Price {
    /// For so many tokens.
    pub fn of(&self, prompt: u64, output: u64) -> u64 {
        self.prompt.saturating_mul(prompt).saturating_add(self.output.saturating_mul(output))
    }
}

/// A model that a node could load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Which.
    pub model: ModelId,
    /// What requests call it.
    pub name: String,
    /// Bytes of its file.
    pub weights: u64,
    /// Bytes of memory that it takes with a KV cache worth having.
    pub bytes: u64,
}

/// A model on its way into a node's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loading {
    /// Which.
    pub model: ModelId,
    /// Bytes of memory that are set aside for it.
    pub bytes: u64,
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
    /// Bytes of its file; 0 where it doesn't say.
    pub weights: u64,
    /// Bytes of memory that it takes, KV cache included; 0 where it doesn't say.
    pub bytes: u64,
    /// It stays, whatever else is wanted: its owner named it.
    pub pinned: bool,
    /// It can go on after the beginning of an answer; some providers can't.
    pub resumes: bool,
    /// It takes requests whose output must follow a grammar, or is asked for the same in its own words.
    pub grammars: bool,
    /// Blocks in its KV cache when the node said this, those used last; no more than [`PREFIXES_MAX`].
    pub prefixes: Vec<BlockKey>,
}

/// Blocks of a model's KV cache that a node names when it connects, and in a heartbeat, at most.
pub const PREFIXES_MAX: usize = 512;

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
    /// Of each model whose cache has, as far as it was told; no more than [`PREFIXES_MAX`] blocks in all.
    pub caches: Vec<CacheStatus>,
    /// Requests that run for other schedulers of the cluster, of those of [`Status::models`] that have some.
    pub others: Vec<(ModelId, u32)>,
}

/// What has changed in a model's KV cache on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheStatus {
    /// Which.
    pub model: ModelId,
    /// Blocks that are there now.
    pub new: Vec<BlockKey>,
    /// Blocks that are there no longer.
    pub gone: Vec<BlockKey>,
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
    /// It takes nothing new for so long: a provider has had enough. What runs there goes on.
    Pause(Duration),
    /// What an attempt cost in truth, in billionths of a dollar; said before its last event, by what keeps its own
    /// account.
    Charged {
        /// Of which request.
        request: RequestId,
        /// Which attempt.
        attempt: u32,
        /// How much, in all.
        amount: u64,
    },
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
    /// To load a model that it offers.
    Load {
        /// Counts orders to this node, from 1.
        number: u64,
        /// Which.
        model: ModelId,
        /// Bytes of memory that it may take, KV cache included.
        bytes: u64,
    },
    /// To let go of a model.
    Unload {
        /// Counts orders to this node, from 1.
        number: u64,
        /// Which.
        model: ModelId,
    },
}
