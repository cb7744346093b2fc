//! What goes into the state machine and what comes out of it.
use crate::{
    Account, Allowance, Entry, Event, Failure, FromNode, Generate, KeyId, ModelId, NodeId, Price, Profile,
    RequestId, ToNode, Trust,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A client asks. The caller numbers requests and never uses a number twice.
    Submit(Box<Generate>),
    /// A client doesn't want it any more, or is gone.
    Cancel(RequestId),
    /// A client reads slower than tokens come (or no longer so): then silence isn't the node's fault.
    Reader {
        /// Whose.
        request: RequestId,
        /// It is behind.
        behind: bool,
    },
    /// A node connected. The caller numbers nodes, anew at each connection.
    Connected {
        /// Its number.
        node: NodeId,
        /// What it holds.
        profile: Profile,
    },
    /// A node said something.
    Node {
        /// Which.
        node: NodeId,
        /// What.
        from: FromNode,
    },
    /// The stream of an attempt broke, with or without the node's link: what a node says of a request is an event.
    Broken {
        /// Whose.
        node: NodeId,
        /// Of which request.
        request: RequestId,
        /// Which attempt.
        attempt: u32,
        /// Why, for a person.
        reason: String,
    },
    /// How long a word takes to a node and back, as the link has measured it.
    RoundTrip {
        /// Which.
        node: NodeId,
        /// How long.
        time: Duration,
    },
    /// A node's link broke.
    Lost {
        /// Which.
        node: NodeId,
        /// Why, for a person.
        reason: String,
    },
    /// A node is to get nothing new, and what runs there moves elsewhere as soon as it can; or it is used again.
    Drain {
        /// Which.
        node: NodeId,
        /// Whether it drains.
        on: bool,
    },
    /// Somebody is about to ask for a model: is it here, and if not, may a node load it? Answered by [`Output::Found`].
    Want {
        /// The caller numbers them and never uses a number twice.
        want: u64,
        /// Which.
        model: Wanted,
    },
    /// The names of keys: accounts and policies know them by those.
    Keys(BTreeMap<KeyId, Arc<str>>),
    /// What keys, tags and all together may spend from now on, instead of what was allowed before.
    Allow(Vec<Allowance>),
    /// What has been taken of an account before this scheduler began, or by others since.
    Booked {
        /// Which.
        account: Account,
        /// In which of its windows.
        window: i64,
        /// So much, in all.
        taken: u64,
    },
    /// The time of [`crate::Scheduler::wake_at`] has come.
    Tick,
}

/// A model that somebody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// This one.
    Model(ModelId),
    /// One of those that the pool holds, or could.
    Class(Class),
}

/// A model by what it is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The smallest.
    Small,
    /// The one in the middle; of two, the larger.
    Medium,
    /// The largest.
    Large,
    /// The largest that writes faster than people read; the fastest, if none does.
    Auto,
}

impl Class {
    /// The class of that name: `small`, `medium`, `large`, `auto`.
    pub fn named(name: &str) -> Option<Class> {
        Some(match name {
            "small" => Class::Small,
            "medium" => Class::Medium,
            "large" => Class::Large,
            "auto" => Class::Auto,
            _ => return None,
        })
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send this to a node.
    Send {
        /// Which.
        node: NodeId,
        /// What.
        message: ToNode,
    },
    /// Tell the client. `Finished` or `Failed` comes once for each request, and nothing after it. Where
    /// [`RequestId::is_own`] there is no client; what comes is said all the same.
    Emit {
        /// Whose.
        request: RequestId,
        /// What.
        event: Event,
    },
    /// What the attempt that is sent next may take at worst is set aside: it may not be sent before that is remembered where
    /// it outlives this process. Nothing is said where no account applies but those of a [`crate::Period::Minute`].
    Reserved {
        /// For which request.
        request: RequestId,
        /// For which attempt at it.
        attempt: u32,
        /// By account.
        entries: Vec<Entry>,
    },
    /// What came of what was [`Output::Reserved`]: once for each.
    Settled {
        /// For which request.
        request: RequestId,
        /// For which attempt at it.
        attempt: u32,
        /// By account: what was reserved, and what was spent of it.
        entries: Vec<Entry>,
    },
    /// What an attempt at a request cost. Nothing is said of what cost nothing.
    Spent {
        /// Whose.
        key: KeyId,
        /// For which request.
        request: RequestId,
        /// For which attempt at it.
        attempt: u32,
        /// Billionths of a dollar.
        amount: u64,
        /// What was reckoned with, at worst: its node may have charged more.
        worst: u64,
    },
    /// What came of an [`Input::Want`]: a node holds this model now, or why none will. Once for each.
    Found {
        /// Which.
        want: u64,
        /// The model, or what to tell whoever wants it.
        found: Result<ModelId, Failure>,
    },
    /// The node hasn't been heard for long, or was refuted: close its link. It is forgotten already.
    Disconnect {
        /// Which.
        node: NodeId,
        /// Why, for a person.
        reason: String,
        /// It is a guest whose tokens are too unlikely: it may not come back.
        refuted: bool,
    },
}

/// How much waits, and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Requests that wait for a node, at most.
    pub waiting_max: usize,
    /// Nodes a request is given to, at most.
    pub attempts_max: u32,
    /// Times a request is turned away by nodes that have no room, at most.
    pub busy_max: u32,
    /// A node silent for so long gets nothing new, and what runs there moves where it can; heartbeats must come several
    /// times as often.
    pub suspect_after: Duration,
    /// A node silent for so long is given up.
    pub lost_after: Duration,
    /// A request whose node is gone waits for so long when no other can take it: nodes come back.
    pub orphan_wait: Duration,
    /// A request moves elsewhere, if it can, when nothing has come of it for this long and for [`Limits::stall_times`]
    /// the predicted time.
    pub stall_min: Duration,
    /// See [`Limits::stall_min`].
    pub stall_times: u32,
    /// With nowhere else to go, it fails after so many such stalls in a row.
    pub stalls_max: u32,
    /// Tokens of output that a request is expected to have, before there is experience.
    pub output_guess: u32,
    /// A request that somebody watches goes to a second node when nothing has come of it for so many times the
    /// predicted time, and for [`Limits::hedge_min`].
    pub hedge_times: u32,
    /// See [`Limits::hedge_times`].
    pub hedge_min: Duration,
    /// One in so many of a guest's greedy answers is checked.
    pub check_one_in: u32,
    /// [`Input::Want`]s that wait for a model, at most; and for how long.
    pub wants_max: usize,
    /// See [`Limits::wants_max`].
    pub load_wait: Duration,
    /// A model makes room for another only when nothing has run there for so long.
    pub settle: Duration,
    /// A model that nobody has asked for in so long is unloaded.
    pub idle_unload: Duration,
    /// A node that failed to load a model isn't told to again for so long.
    pub load_again: Duration,
    /// When requests have waited for a model for so long, and would for longer than it takes to load, a further node with
    /// free memory loads it.
    pub crowded_after: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            waiting_max: 1024,
            attempts_max: 8,
            busy_max: 100,
            suspect_after: Duration::from_millis(2500),
            lost_after: Duration::from_secs(15),
            orphan_wait: Duration::from_secs(10),
            stall_min: Duration::from_secs(5),
            stall_times: 16,
            stalls_max: 12,
            output_guess: 256,
            hedge_times: 3,
            hedge_min: Duration::from_secs(1),
            check_one_in: 16,
            wants_max: 1024,
            load_wait: Duration::from_secs(600),
            settle: Duration::from_secs(10),
            idle_unload: Duration::from_secs(900),
            load_again: Duration::from_secs(60),
            crowded_after: Duration::from_secs(5),
        }
    }
}

/// How much there is of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Nodes connected.
    pub nodes: usize,
    /// Requests that nodes work on.
    pub running: usize,
    /// Of those, the ones that two nodes work on.
    pub hedged: usize,
    /// Of all, the scheduler's own.
    pub checks: usize,
    /// Requests that wait for a node.
    pub waiting: usize,
}

/// A node as the scheduler sees it, for a person.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// Which.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub trust: Trust,
    /// What its owner says of it.
    pub labels: Vec<(String, String)>,
    /// It gets nothing new.
    pub draining: bool,
    /// How long it has said nothing.
    pub silent: Duration,
    /// How long it is left alone yet because it failed again and again; 0 where it isn't.
    pub rests: Duration,
    /// Its devices.
    pub devices: Vec<String>,
    /// Bytes that further models may take.
    pub memory_free: u64,
    /// Bytes of memory that its devices read in a second; 0 where it doesn't say.
    pub bandwidth: u64,
    /// What a token costs there.
    pub price: Price,
    /// What it holds.
    pub models: Vec<ModelView>,
    /// What it is loading.
    pub loading: Vec<ModelId>,
}

/// A model on a node.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelView {
    /// Which.
    pub model: ModelId,
    /// What requests call it.
    pub name: String,
    /// Its engine works.
    pub alive: bool,
    /// Requests of ours that run there.
    pub running: u32,
    /// Sequences that run at once, at most.
    pub slots: u32,
    /// Tokens that came from there.
    pub tokens: u64,
    /// From one token to the next with as many sequences as run now (one, if none does), as observed.
    pub token_time: Duration,
    /// Prompt tokens a second, as observed.
    pub prefill_tokens_per_s: f32,
    /// Kernel family, activation and KV types.
    pub numerics: String,
    /// Bytes of memory that it takes.
    pub bytes: u64,
    /// Bytes of its file; 0 where the node doesn't say.
    pub weights: u64,
    /// It stays, whatever else is wanted.
    pub pinned: bool,
    /// KV blocks free, and in all.
    pub kv_blocks: (u32, u32),
}
