//! What a policy answers: which offers a request may take, and which of them it likes best.
use crate::{Generate, Held, NodeId, Trust};
use std::time::Duration;

/// A request with a tag of this name is for nodes of our own only, neither for guests nor for providers, whatever the tag's value.
pub const PRIVATE: &str = "private";

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
    /// Requests that it runs for this scheduler, of this model.
    pub running: u32,
    /// Predicted time to the first token.
    pub ttft: Duration,
    /// Predicted time to the last token.
    pub total: Duration,
    /// What it would cost, by expectation; billionths of a dollar.
    pub cost: u64,
    /// The first token would come later than the request wants it.
    pub late: bool,
    /// What the requests that run there already would lose by it, all together.
    pub burden: Duration,
    /// The request's earlier tokens, if any, came from the same numerics: the same tokens follow.
    pub same_numerics: bool,
}

/// Filters and weighs offers; what is [`PRIVATE`] is offered by nodes of our own alone. Asked for every candidate of every request, so it must be quick.
pub trait Policy: Send {
    /// Whether the request may go there; a refusal says why, for whoever asks for an explanation.
    fn admits(&self, ask: &Generate, offer: &Offer<'_>) -> Result<(), String>;
    /// What the offer costs; the least wins. Units are the policy's own.
    fn cost(&self, ask: &Generate, offer: &Offer<'_>) -> f64;
}

/// Whoever is done first of our own nodes and of guests, where what others lose by it counts as much; a request under way stays with its numerics if
/// it can.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fastest;

/// Seconds that a change of numerics is worth: more than any prediction.
const OTHER_NUMERICS_S: f64 = 1e6;

/// And a first token in time: more than most predictions.
const LATE_S: f64 = 1e3;

impl Policy for Fastest {
    fn admits(&self, _: &Generate, offer: &Offer<'_>) -> Result<(), String> {
        match offer.trust {
            Trust::Own | Trust::Guest => Ok(()),
            Trust::Provider => Err(format!("no policy lets requests leave for {}, a provider", offer.name)),
        }
    }

    fn cost(&self, _: &Generate, offer: &Offer<'_>) -> f64 {
        let other_numerics = if offer.same_numerics { 0.0 } else { OTHER_NUMERICS_S };
        let late = if offer.late { LATE_S } else { 0.0 };
        (offer.total + offer.burden).as_secs_f64() + other_numerics + late
    }
}
