//! A policy file's view of one request: what doesn't depend on the node is known from the start.
use crate::fields::{Facts, quality};
use crate::file::{Filter, Objective, Override, Rules, Wish};
use crate::value::{Fault, Value};
use std::time::Duration;
use weir_scheduler::{Ask, Class, Decision, Denial, Offer, OnLoss, Policy, PoolView, Trust};

/// Points that a change of numerics costs, and a first token too late: more than weights can make up for.
const OTHER_NUMERICS: f64 = 1e9;
const LATE: f64 = 1e6;
/// Offers that are considered, where there are so many.
const BREADTH: usize = 128;
/// How often what waits is looked at again, where rules look at what changes.
const AGAIN: Duration = Duration::from_millis(250);

/// A decision.
pub(crate) struct Judging<'a> {
    facts: Facts<'a>,
    /// What is the same for all nodes.
    slots: Vec<Result<Value<'a>, Fault>>,
    /// Those that apply.
    pub filters: Vec<&'a Filter>,
    pub wishes: Vec<&'a Wish>,
    pub overriding: Option<&'a Override>,
    pub objective: Objective,
    /// Providers may be used; or why that isn't known.
    pub spills: Result<bool, Fault>,
    spill_why: &'a str,
    on_loss: OnLoss,
}

impl Rules {
    pub(crate) fn judge<'a>(&'a self, ask: &'a Ask<'a>, pool: &'a PoolView) -> Judging<'a> {
        let facts = Facts {
            ask,
            pool,
            key: ask.key,
            size: if self.looks_at_pool { self.class(ask.model, ask.model_bytes) } else { "" },
            utc_offset_s: self.utc_offset_s,
            offer: None,
            slots: &[],
        };
        let applies = |when: &'a Option<crate::eval::Expr>, in_doubt: bool| {
            when.as_ref().is_none_or(|when| when.test(&facts).unwrap_or(in_doubt))
        };
        let mut doubt = None;
        let overriding = self.overrides.iter().find(|o| {
            let holds = o.when.test(&facts);
            doubt = doubt.or(holds.err());
            holds == Ok(true)
        });
        let set = overriding.map(|o| o.set).unwrap_or_default();
        let spills = match (set.spill, doubt) {
            // An override that might have held might have forbidden it.
            (_, Some(fault)) => Err(fault),
            (Some(set), None) => Ok(set),
            (None, None) => self.spill.when.test(&facts),
        };
        Judging {
            slots: self.slots.iter().map(|slot| slot.eval(&facts)).collect(),
            filters: self.filters.iter().filter(|rule| applies(&rule.when, true)).collect(),
            wishes: self.wishes.iter().filter(|wish| applies(&wish.when, false)).collect(),
            overriding,
            objective: Objective {
                latency: set.latency.unwrap_or(self.objective.latency),
                cost: set.cost.unwrap_or(self.objective.cost),
                quality: set.quality.unwrap_or(self.objective.quality),
            },
            spills,
            spill_why: &self.spill.why,
            on_loss: set.on_loss.unwrap_or(self.on_loss),
            facts,
        }
    }
}

impl Judging<'_> {
    fn facts<'v>(&'v self, offer: &'v Offer<'v>) -> Facts<'v> {
        Facts { offer: Some(offer), slots: &self.slots, ..self.facts }
    }

    /// The rule that keeps the request from there, and the fault that made it so, if one did. What can't be evaluated
    /// keeps it.
    pub fn denial(&self, offer: &Offer<'_>) -> Option<(Denial<'_>, Option<Fault>)> {
        if offer.trust == Trust::Provider && self.spills != Ok(true) {
            return Some((Denial { rule: "spill", why: self.spill_why }, self.spills.err()));
        }
        let facts = self.facts(offer);
        self.filters.iter().find_map(|rule| {
            let holds = rule.that.test(&facts);
            let denial = Denial { rule: &rule.name, why: &rule.why };
            (holds != Ok(rule.wanted)).then_some((denial, holds.err()))
        })
    }

    /// The wishes that an offer meets.
    pub fn granted<'v>(&'v self, offer: &'v Offer<'v>) -> impl Iterator<Item = &'v Wish> + 'v {
        let facts = self.facts(offer);
        self.wishes.iter().copied().filter(move |wish| wish.that.test(&facts) == Ok(true))
    }

    /// The points of an offer, but for what must not be.
    pub fn points(&self, offer: &Offer<'_>) -> f64 {
        let Objective { latency, cost, quality: weight } = self.objective;
        let seconds = (offer.total + offer.burden).as_secs_f64();
        let cents = offer.cost as f64 / 1e7;
        let wishes: f64 = self.granted(offer).map(|wish| wish.weight).sum();
        latency * seconds + cost * cents - weight * quality(offer) - wishes
    }
}

impl Policy for Rules {
    fn begin<'a>(&'a self, ask: &'a Ask<'a>, pool: &'a PoolView) -> Box<dyn Decision + 'a> {
        Box::new(self.judge(ask, pool))
    }

    fn class(&self, class: Class) -> &[String] {
        let name = match class {
            Class::Small => "small",
            Class::Medium => "medium",
            Class::Large => "large",
            Class::Auto => "auto",
        };
        self.classes.get(name).map_or(&[], Vec::as_slice)
    }

    fn looks_at_pool(&self) -> bool {
        self.looks_at_pool
    }

    fn breadth(&self) -> usize {
        BREADTH
    }

    fn looks_again(&self) -> Option<Duration> {
        self.may_change.then_some(AGAIN)
    }
}

impl Decision for Judging<'_> {
    fn admits(&self, offer: &Offer<'_>) -> Result<(), Denial<'_>> {
        self.denial(offer).map_or(Ok(()), |(denial, _)| Err(denial))
    }

    fn cost(&self, offer: &Offer<'_>) -> f64 {
        let other_numerics = if offer.same_numerics { 0.0 } else { OTHER_NUMERICS };
        let late = if offer.late { LATE } else { 0.0 };
        self.points(offer) + other_numerics + late
    }

    fn second(&self) -> f64 {
        self.objective.latency
    }

    fn on_loss(&self) -> OnLoss {
        self.on_loss
    }
}
