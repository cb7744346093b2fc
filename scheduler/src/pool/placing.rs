//! Which node a request goes to.
use super::{Node, Place, Pool, Refusal, Search};
use crate::group::Group;
use crate::serving::Prediction;
use crate::{BlockKey, Generate, ModelId, NodeId, Offer, Time, Trust};
use std::time::Duration;

/// Candidates of each kind: with the prompt's beginning in the cache, the soonest done (of each numerics), at random.
const DRAW_PREFIX: usize = 4;
const DRAW_BEST: usize = 4;
const DRAW_RANDOM: usize = 2;
/// Waiting for a faster node is worth it if it ends within this share of what the best node with room would take:
/// predictions err.
const WORTH_WAITING: f64 = 0.7;

/// What one node is to a request.
enum Considered {
    /// It can have it, at that cost.
    On(f64, Prediction),
    /// It could, but has no room, at least not before then; at what cost if it had.
    Full(f64, Prediction, Option<Time>),
    /// It could, but fails too often.
    Resting(f64, Prediction),
    Refused(String),
    Unfit,
}

impl Pool {
    /// The best node for a request: of a few that are drawn, or of all, if none of those will do.
    pub fn place(&mut self, ask: &Generate, search: &Search<'_>) -> Place {
        let over = self.groups.get_mut(&ask.model).map(|group| group.resumed(search.now)).unwrap_or_default();
        for id in over {
            self.touch(search.now, id, ask.model);
        }
        let Some(group) = self.groups.get(&ask.model) else { return Place::Never(Refusal::NoModel) };
        let mut drawn = group.with_prefix(search.keys, search.draw, DRAW_PREFIX);
        drawn.extend(group.best(ask.priority, DRAW_BEST));
        drawn.extend(
            (0..DRAW_RANDOM as u32).filter_map(|n| group.drawn(search.draw.rotate_left(17 * (n + 1)))),
        );
        let best = self.best_of(ask, search, drawn.into_iter());
        match best.or_else(|| self.best_of(ask, search, group.open(ask.priority))) {
            Some((cost, id, prediction)) => match self.sooner_elsewhere(cost, ask, search, group) {
                Some(at) => Place::Wait(Some(at)),
                None => Place::On(id, prediction),
            },
            None => self.wait_or_give_up(ask, search, group),
        }
    }

    /// Whether a request that could go somewhere at this cost (in seconds, as the policy counts) had better wait for a
    /// place on a faster node; and when to look again, if none becomes free before.
    fn sooner_elsewhere(
        &self,
        cost: f64,
        ask: &Generate,
        search: &Search<'_>,
        group: &Group,
    ) -> Option<Time> {
        let (mut places_per_s, mut least) = (0.0, f64::MAX);
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
        (wait_s + least < WORTH_WAITING * cost)
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
        let (mut longest, mut refusal) = (0, None);
        let mut resting: Option<(f64, NodeId, Prediction)> = None;
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
                Considered::Refused(reason) => refusal = Some(reason),
                Considered::Unfit => {}
            }
        }
        let tokens = (ask.prompt.len() + ask.output.len()) as u64;
        match (resting, refusal) {
            (Some((_, id, prediction)), _) => Place::On(id, prediction),
            _ if tokens >= u64::from(longest) => Place::Never(Refusal::TooLong { longest }),
            (None, Some(reason)) => Place::Never(Refusal::Policy(reason)),
            (None, None) => Place::Never(Refusal::Exhausted),
        }
    }

    fn context(&self, id: NodeId, model: ModelId) -> u32 {
        self.nodes.get(&id).and_then(|n| n.models.get(&model)).map_or(0, |s| s.held.context)
    }

    fn consider(&self, id: NodeId, ask: &Generate, search: &Search<'_>) -> Considered {
        let Some(node) = self.nodes.get(&id) else { return Considered::Unfit };
        let Some(serving) = node.models.get(&ask.model) else { return Considered::Unfit };
        let tokens = (ask.prompt.len() + ask.output.len()) as u64;
        let unfit = tokens >= u64::from(serving.held.context)
            || search.tried.contains(&id)
            || node.is_draining()
            || serving.leaving
            || !serving.alive;
        if unfit {
            return Considered::Unfit;
        }
        if node.trust != Trust::Own && ask.is_private() {
            return Considered::Refused(format!("it is private, and {} is a {}", node.name, node.trust));
        }
        let prediction = serving.predict(tokens, search.keys).at_distance(node.round_trip);
        let offer = Offer {
            node: id,
            name: &node.name,
            trust: node.trust,
            labels: &node.labels,
            held: &serving.held,
            running: serving.total(),
            ttft: prediction.ttft,
            total: prediction.total(search.expected_output),
            burden: prediction.burden(search.expected_output),
            cost: node.price.of(tokens - prediction.cached, u64::from(search.expected_output)),
            late: search.first_by.is_some_and(|by| search.now + prediction.ttft > by),
            same_numerics: search.numerics.is_none_or(|n| n == serving.held.numerics),
        };
        let left = u64::from(ask.max_tokens).saturating_sub(ask.output.len() as u64);
        let worst = node.price.of(tokens, left);
        if worst > search.budget {
            let dollars = |amount: u64| amount as f64 / 1e9;
            let (worst, left) = (dollars(worst), dollars(search.budget));
            return Considered::Refused(format!(
                "it may cost ${worst:.6}, and ${left:.6} of the key's budget are left"
            ));
        }
        if let Err(reason) = search.policy.admits(ask, &offer) {
            return Considered::Refused(reason);
        }
        let now = search.now;
        let cost = search.policy.cost(ask, &offer);
        if node.suspect || !serving.has_room(now, ask.priority) {
            return Considered::Full(cost, prediction, Some(serving.busy_until).filter(|until| *until > now));
        }
        match node.rests_until > now {
            true => Considered::Resting(cost, prediction),
            false => Considered::On(cost, prediction),
        }
    }
}
