//! Where the time of a batch goes.
use crate::program::StepTime;
use std::sync::Mutex;
use std::time::Instant;

/// Time a step by the first thread's clock.
pub(super) struct StepClock {
    last: Option<Instant>,
    laps: Vec<StepTime>,
}

impl StepClock {
    pub(super) fn start(on: bool) -> StepClock {
        // A browser has no such clock.
        let on = on && cfg!(not(target_family = "wasm"));
        StepClock { last: on.then(Instant::now), laps: Vec::new() }
    }

    pub(super) fn lap(&mut self, name: &'static str, bytes: u64) {
        let Some(last) = self.last else { return };
        let now = Instant::now();
        let nanos = now.duration_since(last).as_nanos() as u64;
        self.last = Some(now);
        match self.laps.iter_mut().find(|l| l.name == name) {
            Some(l) => (l.count, l.nanos, l.bytes) = (l.count + 1, l.nanos + nanos, l.bytes + bytes),
            None => self.laps.push(StepTime { name, count: 1, nanos, bytes }),
        }
    }

    pub(super) fn add_to(self, profile: &Mutex<Vec<StepTime>>) {
        if self.last.is_none() {
            return;
        }
        let mut all = profile.lock().unwrap_or_else(|e| e.into_inner());
        for lap in self.laps {
            match all.iter_mut().find(|l| l.name == lap.name) {
                Some(l) => {
                    (l.count, l.nanos, l.bytes) =
                        (l.count + lap.count, l.nanos + lap.nanos, l.bytes + lap.bytes);
                }
                None => all.push(lap),
            }
        }
    }
}
