//! The scheduler's own end.
use super::{Happening, World, limits};
use std::collections::BTreeMap;
use weir_scheduler::{Event, Failure, FailureKind, Fastest, Input, NodeId, Scheduler, Time};

impl World {
    /// The new scheduler knows nothing. What was under way is lost with the links; nodes come back with what they hold.
    pub(super) fn restart(&mut self) {
        let seed = self.rng.next();
        self.scheduler = Scheduler::new(limits(), Box::new(Fastest), seed);
        self.open_accounts();
        self.mail.clear();
        self.asleep = Time::ZERO;
        self.wants.clear();
        let message = "the scheduler is gone".to_owned();
        let failure = Failure { kind: FailureKind::Internal, message };
        for client in self.clients.values_mut() {
            client.end.get_or_insert(Event::Failed(failure.clone()));
        }
        let mut renamed = BTreeMap::new();
        for (old, mut node) in std::mem::take(&mut self.nodes) {
            self.number += 1;
            node.reconnects(self.now);
            renamed.insert(old, NodeId(self.number));
            self.nodes.insert(NodeId(self.number), node);
        }
        for (at, what) in std::mem::take(&mut self.agenda) {
            use Happening::*;
            let new = |id: NodeId| renamed.get(&id).copied().unwrap_or(id);
            let what = match what {
                Arrives(_) | Reaches(..) => continue,
                Works(id) => Works(new(id)),
                Beats(id) => Beats(new(id)),
                Dies(id) => Dies(new(id)),
                Cut(id) => Cut(new(id)),
                Loaded(id, model) => Loaded(new(id), model),
                Unloaded(id, model) => Unloaded(new(id), model),
                Sleeps | Restarts | Joins | Asks(_) | Wants(_) => what,
            };
            self.agenda.insert(at, what);
        }
        for id in renamed.into_values() {
            let profile = self.nodes[&id].profile(id);
            let after = self.rng.ms(10, 3000);
            self.nodes.get_mut(&id).expect("it was renamed").connected = self.now + after;
            self.plan(after, Happening::Arrives(Input::Connected { node: id, profile }));
        }
    }
}
