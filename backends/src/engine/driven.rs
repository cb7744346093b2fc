//! An engine without a thread of its own, as in a browser's worker: whoever made it drives it.
use super::{Engine, EngineConfig, EngineStatus, Progress};
use std::cell::RefCell;
use std::rc::Rc;
use tokio::sync::mpsc::Sender;
use weir_scheduler::{BlockKey, Event, Failure, Generate, RequestId, Time};

/// An engine that others ask while one drives it. Clones are the same engine.
///
/// Its maker calls [`EngineHandle::step`] as [`Progress`] says; after [`Progress::Idle`] it rests until `ring` is called,
/// which every request, and whatever else changes something, does.
#[derive(Clone)]
pub struct EngineHandle {
    inner: Rc<Inner>,
}

struct Inner {
    engine: RefCell<Engine>,
    config: EngineConfig,
    clock: fn() -> Time,
    ring: Box<dyn Fn()>,
}

impl EngineHandle {
    /// An engine that goes by `clock`, and whose driver wakes when `ring` is called; that must not call back.
    pub fn new(engine: Engine, clock: fn() -> Time, ring: impl Fn() + 'static) -> EngineHandle {
        let config = engine.config;
        EngineHandle { inner: Rc::new(Inner { engine: engine.into(), config, clock, ring: Box::new(ring) }) }
    }

    /// Does the next piece of work.
    pub fn step(&self) -> Progress {
        self.inner.engine.borrow_mut().step((self.inner.clock)())
    }

    /// Asks for a generation: see [`Engine::generate`].
    pub fn generate(&self, ask: Generate, events: Sender<Event>) -> Result<(), Failure> {
        let taken = self.inner.engine.borrow_mut().generate((self.inner.clock)(), ask, events);
        (self.inner.ring)();
        taken
    }

    /// Ends a request with [`weir_scheduler::FailureKind::Cancelled`]; nothing happens if it has ended already.
    pub fn cancel(&self, request: RequestId, attempt: u32) {
        self.inner.engine.borrow_mut().cancel(request, attempt);
        (self.inner.ring)();
    }

    /// Names of blocks in its KV cache, at most so many: those in use, and those used last.
    pub async fn cached_blocks(&self, most: usize) -> Vec<BlockKey> {
        self.inner.engine.borrow().pool.names(most)
    }

    /// How it is doing.
    pub fn status(&self) -> EngineStatus {
        self.inner.engine.borrow().status((self.inner.clock)())
    }

    /// What it runs, its bounds brought within what the layout can do.
    pub fn config(&self) -> EngineConfig {
        self.inner.config
    }

    /// Fails what is running, and refuses what follows.
    pub fn shutdown(&self) {
        self.fail("the engine was shut down");
    }

    /// The same, for another reason.
    pub fn fail(&self, why: &str) {
        self.inner.engine.borrow_mut().fail(why);
        (self.inner.ring)();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Speculation;
    use super::*;
    use crate::null::{NULL_MODEL, Null};
    use std::cell::Cell;
    use tokio::sync::mpsc::channel;

    #[test]
    fn it_rings_for_work_and_ends_what_runs() {
        let null = Null::default();
        let layout = crate::program::KvLayout { blocks: 64, kv: Default::default(), slots: 2, rows: 66 };
        let config = EngineConfig {
            model: NULL_MODEL,
            layout,
            context: 512,
            prefill_chunk: 64,
            speculation: Speculation::Off,
        };
        let rings = Rc::new(Cell::new(0));
        let ring = {
            let rings = rings.clone();
            move || rings.set(rings.get() + 1)
        };
        let engine = Engine::new(null.program(layout), null.vocabulary(), config);
        let handle = EngineHandle::new(engine, || Time::ZERO, ring);
        let (events, mut told) = channel(64);
        handle.generate(Generate::new(NULL_MODEL, vec![1, 2, 3], 8), events).unwrap();
        assert_eq!(rings.get(), 1);
        while handle.step() != Progress::Idle {}
        let mut count = 0;
        while let Ok(event) = told.try_recv() {
            count += usize::from(matches!(event, Event::Token(_)));
        }
        assert_eq!(count, 8);
        handle.shutdown();
        let (events, _told) = channel(64);
        assert!(handle.generate(Generate::new(NULL_MODEL, vec![1], 8), events).is_err());
        assert!(handle.status().failed.is_some());
    }
}
