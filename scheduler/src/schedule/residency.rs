//! Models that somebody wants and no node holds.
use super::{Scheduler, Timer};
use crate::pool::Bring;
use crate::{Failure, FailureKind, ModelId, NodeId, Output, RequestId, Time, ToNode, Wanted};
use std::collections::BTreeMap;
use std::time::Duration;

/// How often those who wait for models are looked after, and how often idle models are looked for.
const LOOK: Duration = Duration::from_secs(1);
const LOOK_IDLE: Duration = Duration::from_secs(30);

/// Who waits for models to come.
#[derive(Debug, Default)]
pub(super) struct Residency {
    wants: BTreeMap<ModelId, Vec<(u64, Time)>>,
    /// Its entry among the timers.
    due: Option<Time>,
}

impl Scheduler {
    pub(super) fn want(&mut self, now: Time, want: u64, wanted: Wanted) {
        let model = match wanted {
            Wanted::Model(model) => Some(model),
            Wanted::Class(class) => {
                self.pool.named(self.policy.class(class)).or_else(|| self.pool.of_class(class))
            }
        };
        let Some(model) = model else {
            let message = "no node holds a model or can load one";
            return self.found(want, Err((FailureKind::NoModel, message.into())));
        };
        if self.residency.wants.values().map(Vec::len).sum::<usize>() >= self.limits.wants_max {
            let message = format!("{} wait for models already; try again later", self.limits.wants_max);
            return self.found(want, Err((FailureKind::Busy, message)));
        }
        self.residency.wants.entry(model).or_default().push((want, now));
        self.answer(now, model);
        self.look_at(now + LOOK);
    }

    fn found(&mut self, want: u64, found: Result<ModelId, (FailureKind, String)>) {
        let found = found.map_err(|(kind, message)| Failure { kind, message });
        self.outputs.push_back(Output::Found { want, found });
    }

    /// Sees to it that a model comes, and tells those who want it what came of it so far.
    fn answer(&mut self, now: Time, model: ModelId) {
        let answer = match self.bring(now, model) {
            Ok(false) => return,
            Ok(true) => Ok(model),
            Err(why) => Err((FailureKind::NoModel, why)),
        };
        for (want, _) in self.residency.wants.remove(&model).unwrap_or_default() {
            self.found(want, answer.clone());
        }
    }

    /// Whether somebody waits for a model. That it would do as well for one who waits for another doesn't count: it would
    /// keep the other out of memory for ever.
    fn is_awaited(&self, model: ModelId) -> bool {
        let for_it = |id: &RequestId| self.requests.get(id).is_some_and(|request| request.ask.model == model);
        let waiting = self.waiting.get(&model);
        waiting.is_some_and(|turns| turns.iter().any(|(_, id)| for_it(id)))
            || self.residency.wants.contains_key(&model)
    }

    /// Sees to it that a node holds a model. Says whether one does; fails if none ever will.
    pub(super) fn bring(&mut self, now: Time, model: ModelId) -> Result<bool, String> {
        let awaited = |m: ModelId| self.is_awaited(m);
        match self.pool.bring(now, model, &self.limits, &awaited) {
            Bring::Here => Ok(true),
            Bring::Coming => Ok(false),
            Bring::Load(node) => {
                let order = self.pool.load(now, node, model);
                self.order(node, order);
                Ok(false)
            }
            Bring::Unload(node, models) => {
                self.unload(now, models.into_iter().map(|model| (node, model)).collect());
                Ok(false)
            }
            Bring::Never(why) => Err(why),
        }
    }

    /// Whether a request for a model that no node holds has something to wait for.
    pub(super) fn is_coming(&mut self, now: Time, id: RequestId) -> bool {
        let Some(model) = self.requests.get(&id).map(|r| r.ask.model) else { return false };
        if id.is_own() {
            return false;
        }
        let coming = self.bring(now, model) == Ok(false);
        if coming {
            self.look_at(now + LOOK);
            if let Some(request) = self.requests.get_mut(&id) {
                (request.bereft, request.orphaned) = (false, None);
            }
        }
        coming
    }

    fn order(&mut self, node: NodeId, message: Option<ToNode>) {
        self.outputs.extend(message.map(|message| Output::Send { node, message }));
    }

    fn unload(&mut self, now: Time, models: Vec<(NodeId, ModelId)>) {
        for (node, model) in models {
            let order = self.pool.unload(now, node, model);
            self.order(node, order);
        }
    }

    /// A node has said what it holds: some may have waited for it, or for what it has let go of.
    pub(super) fn look_after_all(&mut self, now: Time) {
        let wanted: Vec<ModelId> = self.residency.wants.keys().copied().collect();
        wanted.into_iter().for_each(|model| self.answer(now, model));
        let homeless: Vec<ModelId> =
            self.waiting.keys().copied().filter(|model| !self.pool.is_held(*model)).collect();
        homeless.into_iter().for_each(|model| self.retry(now, model, true));
        if self.pool.may_idle() {
            self.look_at(now + LOOK_IDLE);
        }
    }

    /// Not later than then.
    pub(super) fn look_at(&mut self, at: Time) {
        if self.residency.due.is_some_and(|due| due <= at) {
            return;
        }
        if let Some(due) = self.residency.due.replace(at) {
            self.timers.remove(&(due, Timer::Residency));
        }
        self.timers.insert((at, Timer::Residency));
    }

    pub(super) fn residency_due(&mut self, now: Time) {
        self.residency.due = None;
        self.give_up_wants(now);
        self.look_after_all(now);
        self.relieve(now);
        let idle = self.pool.idle(now, &self.limits);
        let idle = idle.into_iter().filter(|(_, model)| !self.is_awaited(*model)).collect();
        self.unload(now, idle);
        if !self.residency.wants.is_empty() || !self.waiting.is_empty() {
            self.look_at(now + LOOK);
        }
    }

    /// Those who have waited for too long.
    fn give_up_wants(&mut self, now: Time) {
        let late = |since: Time| now.since(since) >= self.limits.load_wait;
        let mut given_up = Vec::new();
        self.residency.wants.retain(|_, wants| {
            given_up.extend(wants.extract_if(.., |(_, since)| late(*since)));
            !wants.is_empty()
        });
        for (want, _) in given_up {
            let message = "the model is still being loaded; try again later";
            self.found(want, Err((FailureKind::Busy, message.into())));
        }
    }

    /// Models whose holders can't keep up are loaded by a further node, where there is memory to spare, if that is sooner
    /// than the last of those who wait would have their turn.
    fn relieve(&mut self, now: Time) {
        let crowded = |id: &RequestId| {
            let request = self.requests.get(id);
            request.is_some_and(|r| now.since(r.submitted) >= self.limits.crowded_after)
        };
        let first = self.waiting.iter().filter_map(|(model, turns)| Some((*model, turns.first()?.1)));
        let models: Vec<ModelId> = first.filter(|(_, id)| crowded(id)).map(|(model, _)| model).collect();
        for model in models {
            let waiting = self.waiting.get(&model).map_or(0, |turns| turns.len());
            let wait = self.pool.wait(model, waiting, self.expected_output as u32);
            if let Some(node) = self.pool.spare_for(now, model, wait, &self.limits) {
                let order = self.pool.load(now, node, model);
                self.order(node, order);
            }
        }
    }
}
