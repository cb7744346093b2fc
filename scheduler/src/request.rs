//! The vocabulary of a request: what a node is asked and what it answers.
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A node of the pool, numbered by the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

/// A request, numbered by the scheduler; unique for the life of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

impl RequestId {
    /// Requests of the scheduler itself, which nobody waits for, have this bit in their numbers; no other has.
    pub const OWN: u64 = 1 << 63;

    /// Whether it is the scheduler's own.
    pub fn is_own(self) -> bool {
        self.0 & RequestId::OWN != 0
    }
}

/// The API key a request came with; 0 is nobody's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u64);

/// A model by content: the SHA-256 of its file (of the first file, for a split one).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId(pub [u8; 32]);

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}{:02x}{:02x}{:02x}..", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

/// Who goes first when there isn't room for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Yields to everybody within one step.
    Background,
    /// The default.
    #[default]
    Normal,
    /// Somebody is watching the text appear.
    Interactive,
}

/// How the next token is chosen. Every field has been checked at the edge: finite, within its range.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; logits are divided by it. In 0..=100.
    pub temperature: f32,
    /// Only the k most likely tokens; 0 is all.
    pub top_k: u32,
    /// The smallest set of tokens whose probability reaches this; 1 is all. In (0, 1].
    pub top_p: f32,
    /// Only tokens at least this likely relative to the likeliest; 0 is all. In 0..=1.
    pub min_p: f32,
    /// Divides (if positive) or multiplies the logit of each token of prompt or output; 1 is off. In (0, 100].
    pub repetition_penalty: f32,
    /// Subtracted for each time the token occurs in the output. In -100..=100.
    pub frequency_penalty: f32,
    /// Subtracted once if the token occurs in the output. In -100..=100.
    pub presence_penalty: f32,
    /// The seed of the noise: same seed, same tokens on a node of the same numerics.
    pub seed: u64,
    /// Added to the logits of these tokens. Each in -100..=100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report the chosen token's log-probability and this many of the likeliest candidates (0..=20).
    pub logprobs: Option<u8>,
}

impl Default for Sampling {
    /// Greedy, nothing altered.
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

/// W3C trace context; all zeros where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceContext {
    /// 16 bytes, big-endian on the wire of HTTP.
    pub trace: u128,
    /// The parent span.
    pub span: u64,
    /// Bit 0: sampled.
    pub flags: u8,
}

/// Bytes of a grammar, at most.
pub const GRAMMAR_BYTES_MAX: usize = 1 << 20;

/// What a node is asked: to continue `prompt ++ output`.
#[derive(Clone, Debug, PartialEq)]
pub struct Generate {
    /// Echoed in every [`Event`].
    pub request: RequestId,
    /// Counts the nodes that this request has been given to, from 0. Echoed, so that a late answer is known as one.
    pub attempt: u32,
    /// Which model.
    pub model: ModelId,
    /// Models that will do as well where no node can take it for this one, first choice first; nodes aren't told. When
    /// it goes to one of them, that becomes its model, and the old one joins the others.
    pub otherwise: Vec<ModelId>,
    /// The prompt's token ids, at least one.
    pub prompt: Vec<u32>,
    /// Tokens already generated and delivered elsewhere: the node goes on after them and does not send them again.
    /// They count towards `max_tokens`, penalties and stop strings.
    pub output: Vec<u32>,
    /// How to choose.
    pub sampling: Sampling,
    /// Most tokens of output, those in `output` included. At least 1.
    pub max_tokens: u32,
    /// Ends the text before the first occurrence of any of these; none is empty.
    pub stop: Vec<String>,
    /// Go on past the model's end-of-generation tokens (benches).
    pub ignore_eos: bool,
    /// What the output must look like: a grammar in llguidance's dialect of Lark. Tokens are drawn among those that it
    /// allows, and the output ends where nothing more may come. Only for models that are [`crate::Held::grammars`].
    pub grammar: Option<Arc<str>>,
    /// Who goes first.
    pub priority: Priority,
    /// Time left when it was sent; past it the node gives up.
    pub deadline: Option<Duration>,
    /// The first token must come within this after it was submitted; nodes aren't told.
    pub ttft: Option<Duration>,
    /// What it may cost, at worst, in billionths of a dollar; nodes aren't told.
    pub max_cost: Option<u64>,
    /// Tenants with different salts share no KV blocks.
    pub salt: u64,
    /// On whose behalf.
    pub key: KeyId,
    /// Free labels that policies look at.
    pub tags: Vec<(String, String)>,
    /// The trace that this is part of.
    pub trace: TraceContext,
}

impl Generate {
    /// It is for nodes of our own only.
    pub fn is_private(&self) -> bool {
        self.tags.iter().any(|(name, _)| name == crate::PRIVATE)
    }

    /// A request with nothing special: greedy, of normal priority, given to no node yet, for as long as it takes, on
    /// nobody's behalf. Its number is 0 until somebody gives it one.
    pub fn new(model: ModelId, prompt: Vec<u32>, max_tokens: u32) -> Generate {
        Generate {
            request: RequestId(0),
            attempt: 0,
            model,
            otherwise: Vec::new(),
            prompt,
            output: Vec::new(),
            sampling: Sampling::default(),
            max_tokens,
            stop: Vec::new(),
            ignore_eos: false,
            grammar: None,
            priority: Priority::Normal,
            deadline: None,
            ttft: None,
            max_cost: None,
            salt: 0,
            key: KeyId(0),
            tags: Vec::new(),
            trace: TraceContext::default(),
        }
    }
}

/// A token considered at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Token id.
    pub id: u32,
    /// Natural log of its probability, after penalties and bias, before temperature and truncation.
    pub logprob: f32,
    /// The token's bytes.
    pub bytes: Vec<u8>,
}

/// Log-probability of a chosen token and its likeliest rivals.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprob {
    /// Of the chosen token.
    pub chosen: Candidate,
    /// Likeliest first; as many as were asked for.
    pub top: Vec<Candidate>,
}

/// One token of output.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// 0 is the first token of output, tokens of [`Generate::output`] included.
    pub position: u32,
    /// Token id.
    pub id: u32,
    /// Text that became certain with this token: whole characters, nothing that may yet turn out to be part of a
    /// stop string. Often empty; held-back text comes with a later token or with the end.
    pub text: String,
    /// Where asked for.
    pub logprob: Option<Logprob>,
}

/// Why a generation ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// An end-of-generation token or a stop string.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
}

/// What was computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, found in the KV cache.
    pub cached_tokens: u32,
    /// Tokens of output, a final end-of-generation token included.
    pub output_tokens: u32,
}

/// The kind of a failure, for whoever decides what to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// The request can't succeed anywhere: too long for the model, not valid.
    Invalid,
    /// The model isn't known or isn't loaded.
    NoModel,
    /// No room now; elsewhere or later it may work.
    Busy,
    /// The deadline passed.
    Deadline,
    /// It was cancelled.
    Cancelled,
    /// The node or its device failed.
    Internal,
    /// A budget is used up, or will be by what is under way.
    Budget {
        /// Something may be left after so many seconds.
        after_s: u32,
    },
    /// More comes than a rate allows.
    Rate {
        /// It may be taken after so many seconds.
        after_s: u32,
    },
    /// What it may cost can't be written down now; later it may.
    Unbooked,
    /// A provider that was asked failed, or refused our key.
    Upstream,
}

impl FailureKind {
    /// One word for it, of which there are few: for metrics, traces and accounts.
    pub fn word(self) -> &'static str {
        match self {
            FailureKind::Invalid => "invalid",
            FailureKind::NoModel => "no_model",
            FailureKind::Busy => "busy",
            FailureKind::Deadline => "deadline",
            FailureKind::Cancelled => "cancelled",
            FailureKind::Internal => "internal",
            FailureKind::Upstream => "upstream",
            FailureKind::Budget { .. } => "budget",
            FailureKind::Rate { .. } => "rate",
            FailureKind::Unbooked => "unbooked",
        }
    }
}

/// Why a generation ended without finishing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What to do about it.
    pub kind: FailureKind,
    /// For a person: what failed, with what, what to try.
    pub message: String,
}

/// What a node answers. Each request ends with exactly one `Finished` or `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The next token.
    Token(Token),
    /// The end, with text that had been held back.
    Finished {
        /// Why.
        reason: Finish,
        /// Text held back that turned out to belong to the output.
        text: String,
        /// What was computed.
        usage: Usage,
    },
    /// The end, without success.
    Failed(Failure),
}
