//! What a policy answers: which offers a request may take, and which of them it likes best.
use crate::{Class, Generate, Held, KeyId, NodeId, Price, Priority, Trust};
use std::time::Duration;

/// A request with a tag of this name is for nodes of our own only, neither for guests nor for providers, whatever the tag's
/// value and whatever the policy.
pub const PRIVATE: &str = "private";

/// What a policy sees of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask<'a> {
    /// The name of its key; empty where it has none.
    pub key: &'a str,
    /// Its tags; the first of a name counts.
    pub tags: &'a [(String, String)],
    /// Who goes first.
    pub priority: Priority,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Tokens of output, at most.
    pub max_tokens: u32,
    /// Tokens of output that it has already.
    pub output_tokens: u32,
    /// What nodes call its model; empty where the policy looks at nothing but offers.
    pub model: &'a str,
    /// Bytes of its model's file; 0 where nobody says.
    pub model_bytes: u64,
    /// The first token must come within this after it was submitted.
    pub ttft: Option<Duration>,
    /// Time left for the last.
    pub deadline: Option<Duration>,
    /// What it may cost, in billionths of a dollar.
    pub max_cost: Option<u64>,
    /// How long it has waited.
    pub waited: Duration,
}

/// What a policy sees of all nodes together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolView {
    /// Other requests that wait for the same model.
    pub queue: usize,
    /// Requests that wait, for any model.
    pub waiting: usize,
    /// Requests that run.
    pub running: usize,
    /// Of those, the ones at providers.
    pub spilling: usize,
    /// Nodes connected.
    pub nodes: usize,
    /// Of those, our own.
    pub own: usize,
    /// And guests.
    pub guests: usize,
    /// And providers.
    pub providers: usize,
    /// Nodes of our own that hold the request's model.
    pub own_holding: usize,
    /// Of those, the ones that have room for it.
    pub own_free: usize,
    /// What time it is, if somebody said so.
    pub clock: Option<Clock>,
}

/// The time of day, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Seconds since 1970, UTC.
    pub unix_s: i64,
    /// East of Greenwich, where the scheduler is.
    pub utc_offset_s: i32,
}

/// What one node could do for one request.
#[derive(Clone, Debug)]
pub struct Offer<'a> {
    /// Who offers.
    pub node: NodeId,
    /// Its name.
    pub name: &'a str,
    /// Whose it is.
    pub trust: Trust,
    /// What its owner says of it.
    pub labels: &'a [(String, String)],
    /// The model there.
    pub held: &'a Held,
    /// The model is in its memory.
    pub resident: bool,
    /// Requests that it runs for this scheduler, of this model.
    pub running: u32,
    /// Predicted time to the first token.
    pub ttft: Duration,
    /// Predicted time to the last token.
    pub total: Duration,
    /// What a token costs there.
    pub price: Price,
    /// What it would cost, by expectation; billionths of a dollar.
    pub cost: u64,
    /// And at worst.
    pub worst: u64,
    /// The first token would come later than the request wants it.
    pub late: bool,
    /// What the requests that run there already would lose by it, all together.
    pub burden: Duration,
    /// The request's earlier tokens, if any, came from the same numerics: the same tokens follow.
    pub same_numerics: bool,
}

/// Why a request may not go somewhere, for a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Denial<'a> {
    /// By which rule.
    pub rule: &'a str,
    /// What it says.
    pub why: &'a str,
}

/// What becomes of a request that has lost its node after some of its tokens were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLoss {
    /// Another node goes on after them.
    #[default]
    Resume,
    /// Another node goes on where that is exact: equal numerics give equal tokens; else it fails, for the client to begin
    /// again.
    Restart,
    /// It fails.
    Fail,
}

/// Filters and weighs offers. What is [`PRIVATE`] is offered by nodes of our own alone, and what costs more than a request
/// or its key may spend isn't offered.
///
/// For each decision [`begin`](Self::begin) is called, then the [`Decision`] is asked about one offer after the other.
pub trait Policy: Send {
    /// What holds for one decision, whichever the node: evaluated here, once.
    fn begin<'a>(&'a self, ask: &'a Ask<'a>, pool: &'a PoolView) -> Box<dyn Decision + 'a>;

    /// The names of the models of a class, the best first; those of the pool are classed by size where there are none.
    fn class(&self, _: Class) -> &[String] {
        &[]
    }

    /// Whether decisions look at the pool or at the request's model: finding out what there is costs some time.
    fn looks_at_pool(&self) -> bool {
        false
    }

    /// How many offers a decision considers beside those that are soonest done: all, if there aren't more. 0 where those
    /// will do.
    fn breadth(&self) -> usize {
        0
    }

    /// Requests that wait are looked at again so often: the policy may allow later what it forbids now.
    fn looks_again(&self) -> Option<Duration> {
        None
    }
}

/// A policy's view of one request.
pub trait Decision {
    /// Whether the request may go there.
    fn admits(&self, offer: &Offer<'_>) -> Result<(), Denial<'_>>;
    /// What the offer costs; the least wins. Units are the policy's own.
    fn cost(&self, offer: &Offer<'_>) -> f64;
    /// What a second of waiting costs, in the same units.
    fn second(&self) -> f64 {
        1.0
    }
    /// See [`OnLoss`].
    fn on_loss(&self) -> OnLoss {
        OnLoss::Resume
    }
}

/// Whoever is done first, where what others lose by it counts as much; a request under way stays with its numerics if it
/// can. A provider's models are asked for by nobody but who names them: no request leaves that doesn't say so itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fastest;

/// Seconds that a change of numerics is worth: more than any prediction.
const OTHER_NUMERICS_S: f64 = 1e6;

/// And a first token in time: more than most predictions.
const LATE_S: f64 = 1e3;

impl Policy for Fastest {
    fn begin<'a>(&'a self, _: &'a Ask<'a>, _: &'a PoolView) -> Box<dyn Decision + 'a> {
        Box::new(Fastest)
    }
}

impl Decision for Fastest {
    fn admits(&self, _: &Offer<'_>) -> Result<(), Denial<'_>> {
        Ok(())
    }

    fn cost(&self, offer: &Offer<'_>) -> f64 {
        let other_numerics = if offer.same_numerics { 0.0 } else { OTHER_NUMERICS_S };
        let late = if offer.late { LATE_S } else { 0.0 };
        (offer.total + offer.burden).as_secs_f64() + other_numerics + late
    }
}

/// What policies see of a request, where that isn't the request that is sent: a check of a guest's answer may go where
/// the answer's own request might, and nowhere else.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Terms {
    pub key: KeyId,
    pub tags: Vec<(String, String)>,
    pub priority: Priority,
    pub prompt_tokens: u32,
    pub max_tokens: u32,
}

impl Terms {
    pub fn of(ask: &Generate) -> Terms {
        Terms {
            key: ask.key,
            tags: ask.tags.clone(),
            priority: ask.priority,
            prompt_tokens: u32::try_from(ask.prompt.len()).unwrap_or(u32::MAX),
            max_tokens: ask.max_tokens,
        }
    }
}
