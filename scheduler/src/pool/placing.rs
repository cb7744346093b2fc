//! Which node a request goes to.
use super::{Node, Place, Pool, Refusal, Search};
use crate::group::Group;
use crate::serving::Prediction;
use crate::{BlockKey, Denial, Generate, ModelId, NodeId, Offer, OnLoss, Time, Trust};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Candidates of each kind: with the prompt's beginning in the cache, the soonest done (of each numerics), at random.
const DRAW_PREFIX: usize = 4;
const DRAW_BEST: usize = 4;
const DRAW_RANDOM: usize = 2;
/// Waiting for a faster node is worth it if it ends within this share of what the best node with room would take:
/// predictions err.
const WORTH_WAITING: f64 = 0.7;

/// Offers that are considered where none of those drawn will do, at most: the soonest done come first.
const LATER_MAX: usize = 256;
/// How many times as many tokens a prompt may be to a provider as we think: a token of ours is four bytes of text, on
/// average, and a tokenizer that makes more than one token of a byte is none.
const PROMPT_MARGIN: u64 = 4;
/// What a provider may charge beyond what was reserved before it is not followed any further, in percent.
const OVERCHARGE_MAX: u64 = 900;
/// Rules that are named to whom they refuse, at most.
const NAMED_MAX: usize = 4;

/// Why a node may not have a request.
#[derive(Clone, Copy)]
enum Denied<'a> {
    Private(Trust),
    /// What it may cost there, and what is left of the key's budget.
    Budget(u64, u64),
    /// And what the request itself may cost.
    MaxCost(u64, u64),
    /// It has tokens, and those that follow would be other ones.
    Inexact,
    Policy(Denial<'a>),
}

/// What one node is to a request.
enum Considered<'a> {
    /// It can have it, at that cost.
    On(f64, Prediction),
    /// It could, but has no room, at least not before then; at what cost if it had.
    Full(f64, Prediction, Option<Time>),
    /// It could, but fails too often.
    Resting(f64, Prediction),
    Refused(Denied<'a>),
    Unfit,
}

impl Pool {
    /// Takes note of the holders of a model whose pause is over: due before a search.
    pub fn wake(&mut self, now: Time, model: ModelId) {
        let over = self.groups.get_mut(&model).map(|group| group.resumed(now)).unwrap_or_default();
        for id in over {
            self.touch(now, id, model);
        }
    }

    /// The best node for a request: of a few that are drawn, or of those soonest done, if none of the former will do.
    pub fn place(&self, ask: &Generate, search: &Search<'_>) -> Place {
        let Some(group) = self.groups.get(&ask.model) else { return Place::Never(Refusal::NoModel) };
        let mut drawn = group.with_prefix(search.keys, search.draw, DRAW_PREFIX);
        drawn.extend(group.best(ask.priority, DRAW_BEST));
        match search.breadth {
            0 => drawn.extend(
                (0..DRAW_RANDOM as u32).filter_map(|n| group.drawn(search.draw.rotate_left(17 * (n + 1)))),
            ),
            most => {
                drawn.extend(group.some(search.draw, most));
                drawn.sort_unstable();
                drawn.dedup();
            }
        }
        let best = self.best_of(ask, search, drawn.into_iter());
        let open = || group.open(ask.priority).take(LATER_MAX);
        match best.or_else(|| self.best_of(ask, search, open())) {
            Some((_, id, prediction)) if !search.patient => Place::On(id, prediction),
            Some((cost, id, prediction)) => match self.sooner_elsewhere(cost, ask, search, group) {
                Some(at) => Place::Later(at),
                None => Place::On(id, prediction),
            },
            None => self.wait_or_give_up(ask, search, group),
        }
    }

    /// Whether a request that could go somewhere at this cost (as the policy counts) had better wait for a
    /// place on a faster node; and when to look again, if none becomes free before.
    fn sooner_elsewhere(
        &self,
        cost: f64,
        ask: &Generate,
        search: &Search<'_>,
        group: &Group,
    ) -> Option<Time> {
        let (mut places_per_s, mut least) = (0.0, f64::MAX);
        let second = search.decision.second();
        for id in group.best_full(ask.priority, DRAW_BEST) {
            if let Considered::Full(there, prediction, _) = self.consider(id, ask, search)
                && there < cost
            {
                let slots =
                    self.nodes.get(&id).and_then(|n| n.models.get(&ask.model)).map_or(1, |s| s.held.slots);
                let each_s = prediction.token_time.as_secs_f64() * f64::from(search.expected_output.max(1));
                places_per_s += f64::from(slots) / each_s.max(1e-6);
                least = least.min(there);
            }
        }
        let wait_s = (search.ahead + 1) as f64 / places_per_s;
        (second * wait_s + least < cost - (1.0 - WORTH_WAITING) * cost.abs())
            .then(|| search.now + Duration::from_secs_f64(wait_s.clamp(0.01, 10.0)))
    }

    /// When the first token of a request that must wait could be there, at the earliest: `ahead` others wait before it.
    pub fn soonest(&self, ask: &Generate, keys: &[BlockKey], ahead: usize) -> Option<Duration> {
        let group = self.groups.get(&ask.model)?;
        let tokens = (ask.prompt.len() + ask.output.len()) as u64;
        let best = group.best(ask.priority, DRAW_BEST).chain(group.best_full(ask.priority, DRAW_BEST));
        let ttft = |id| {
            let node: &Node = self.nodes.get(&id)?;
            Some(node.models.get(&ask.model)?.predict(tokens, keys).at_distance(node.round_trip).ttft)
        };
        let ttft = best.filter_map(ttft).min()?;
        // Each of those before it takes at least its prompt's time, and all holders work at once.
        Some(ttft.saturating_mul((1 + ahead / group.len().max(1)) as u32))
    }

    fn best_of(
        &self,
        ask: &Generate,
        search: &Search<'_>,
        candidates: impl Iterator<Item = NodeId>,
    ) -> Option<(f64, NodeId, Prediction)> {
        let mut best: Option<(f64, NodeId, Prediction)> = None;
        for id in candidates {
            if let Considered::On(cost, prediction) = self.consider(id, ask, search)
                && best.is_none_or(|(least, at, _)| (cost, id) < (least, at))
            {
                best = Some((cost, id, prediction));
            }
        }
        best
    }

    /// Nobody has room: whether somebody will, or who rests is to be asked after all, or why it can never be.
    fn wait_or_give_up(&self, ask: &Generate, search: &Search<'_>, group: &Group) -> Place {
        let mut longest = 0;
        let mut refusals: BTreeMap<String, u32> = BTreeMap::new();
        let mut resting: Option<(f64, NodeId, Prediction)> = None;
        let mut too_dear: Option<u64> = None;
        for id in group.holders() {
            longest = longest.max(self.context(id, ask.model));
            match self.consider(id, ask, search) {
                Considered::On(_, prediction) => return Place::On(id, prediction),
                Considered::Full(_, _, until) => return Place::Wait(until),
                Considered::Resting(cost, prediction) => {
                    if resting.is_none_or(|(least, ..)| cost < least) {
                        resting = Some((cost, id, prediction));
                    }
                }
                Considered::Refused(Denied::Budget(worst, _)) => {
                    too_dear = Some(too_dear.map_or(worst, |least| least.min(worst)));
                }
                Considered::Refused(denied) => {
                    let reason = denied.to_string();
                    if refusals.len() < NAMED_MAX || refusals.contains_key(&reason) {
                        *refusals.entry(reason).or_default() += 1;
                    }
                }
                Considered::Unfit => {}
            }
        }
        let tokens = (ask.prompt.len() + ask.output.len()) as u64;
        match resting {
            Some((_, id, prediction)) => Place::On(id, prediction),
            _ if tokens >= u64::from(longest) => Place::Never(Refusal::TooLong { longest }),
            None if let Some(worst) = too_dear => {
                Place::Never(Refusal::Budget { worst, others: said(&refusals) })
            }
            None if refusals.is_empty() => Place::Never(Refusal::Exhausted),
            None => Place::Never(Refusal::Policy(said(&refusals))),
        }
    }

    fn context(&self, id: NodeId, model: ModelId) -> u32 {
        self.nodes.get(&id).and_then(|n| n.models.get(&model)).map_or(0, |s| s.held.context)
    }

    fn consider<'a>(&'a self, id: NodeId, ask: &Generate, search: &Search<'a>) -> Considered<'a> {
        let Some(node) = self.nodes.get(&id) else { return Considered::Unfit };
        let Some(serving) = node.models.get(&ask.model) else { return Considered::Unfit };
        let tokens = (ask.prompt.len() + ask.output.len()) as u64;
        let unfit = tokens >= u64::from(serving.held.context)
            || search.tried.contains(&id)
            || node.is_draining()
            || serving.leaving
            || !serving.alive
            || (!serving.held.resumes && !ask.output.is_empty())
            || (!serving.held.grammars && ask.grammar.is_some());
        if unfit {
            return Considered::Unfit;
        }
        if node.trust != Trust::Own && ask.is_private() {
            return Considered::Refused(Denied::Private(node.trust));
        }
        let left = u64::from(ask.max_tokens).saturating_sub(ask.output.len() as u64);
        let worst = node.worst(tokens, left);
        if worst > search.budget {
            return Considered::Refused(Denied::Budget(worst, search.budget));
        }
        if let Some(most) = ask.max_cost.filter(|most| worst > *most) {
            return Considered::Refused(Denied::MaxCost(worst, most));
        }
        let prediction = serving.predict(tokens, search.keys).at_distance(node.round_trip);
        let offer = Offer {
            node: id,
            name: &node.name,
            trust: node.trust,
            labels: &node.labels,
            held: &serving.held,
            resident: true,
            running: serving.busy(),
            ttft: prediction.ttft,
            total: prediction.total(search.expected_output),
            burden: prediction.burden(search.expected_output),
            price: node.price,
            worst,
            cost: node.price.of(tokens - prediction.cached, u64::from(search.expected_output)),
            late: search.first_by.is_some_and(|by| search.now + prediction.ttft > by),
            same_numerics: search.numerics.is_none_or(|n| n == serving.held.numerics),
        };
        if !offer.same_numerics && search.decision.on_loss() == OnLoss::Restart {
            return Considered::Refused(Denied::Inexact);
        }
        if let Err(denial) = search.decision.admits(&offer) {
            return Considered::Refused(Denied::Policy(denial));
        }
        let now = search.now;
        let cost = search.decision.cost(&offer);
        if node.suspect || !serving.has_room(now, ask.priority) {
            return Considered::Full(cost, prediction, Some(serving.busy_until).filter(|until| *until > now));
        }
        match node.rests_until > now {
            true => Considered::Resting(cost, prediction),
            false => Considered::On(cost, prediction),
        }
    }
}

impl Node {
    /// What so much may cost there at worst. A provider counts a prompt's tokens by a tokenizer that we don't have; and one
    /// that has charged more than was reserved may do so again.
    pub fn worst(&self, prompt: u64, output: u64) -> u64 {
        match self.trust {
            Trust::Own | Trust::Guest => self.price.of(prompt, output),
            Trust::Provider => {
                let worst = self.price.of(PROMPT_MARGIN * prompt, output);
                worst.saturating_mul(100 + self.overcharge_percent) / 100
            }
        }
    }

    /// How many tokens a prompt may be there at worst.
    pub fn worst_prompt(&self, prompt: u64) -> u64 {
        if self.trust == Trust::Provider { PROMPT_MARGIN * prompt } else { prompt }
    }
}

impl Pool {
    /// A provider says what something cost for which so much was reserved: if that was too little, more is from now on.
    pub fn charged(&mut self, id: NodeId, nano_usd: u64, reserved: u64) {
        let Some(node) = self.nodes.get_mut(&id).filter(|_| nano_usd > reserved) else { return };
        let percent = nano_usd.saturating_mul(100 + node.overcharge_percent) / reserved.max(1);
        node.overcharge_percent = percent.saturating_sub(99).clamp(node.overcharge_percent, OVERCHARGE_MAX);
    }
}

impl fmt::Display for Denied<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dollars = |amount: u64| amount as f64 / 1e9;
        match *self {
            Denied::Private(trust) => write!(f, "it is private, and this is a {trust}"),
            Denied::Budget(worst, left) => {
                let (worst, left) = (dollars(worst), dollars(left));
                write!(f, "it may cost ${worst:.6}, and ${left:.6} of the key's budget are left")
            }
            Denied::MaxCost(worst, most) => {
                let (worst, most) = (dollars(worst), dollars(most));
                write!(f, "it may cost ${worst:.6} there, and no more than ${most:.6} is wanted")
            }
            Denied::Inexact => f.write_str("it can't be gone on with exactly, and the policy wants no less"),
            Denied::Policy(Denial { rule, why }) => write!(f, "rule `{rule}`: {why}"),
        }
    }
}

/// All reasons, each with how many nodes it holds for.
fn said(refusals: &BTreeMap<String, u32>) -> String {
    let each = refusals.iter().map(|(reason, nodes)| match nodes {
        1 => reason.clone(),
        _ => format!("{reason} ({nodes} nodes)"),
    });
    each.collect::<Vec<_>>().join("; ")
}
