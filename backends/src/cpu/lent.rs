//! Threads that a host has made and lent, for where the standard library can't make any: a browser's workers, which share
//! this program's memory.
//!
//! A worker calls [`enlist`], then [`serve`], which doesn't return; from the first call on a [`Pool`](super::pool) may have
//! it. When a program ends, its threads are free for the next one.
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

type Job = Box<dyn FnOnce() + Send>;

struct Lent {
    state: Mutex<State>,
    wake: Condvar,
    broken: AtomicBool,
}

struct State {
    /// Threads without a job, less the jobs that none has taken yet.
    free: usize,
    jobs: VecDeque<Job>,
}

static LENT: Lent = Lent {
    state: Mutex::new(State { free: 0, jobs: VecDeque::new() }),
    wake: Condvar::new(),
    broken: AtomicBool::new(false),
};

fn state() -> MutexGuard<'static, State> {
    LENT.state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts the calling thread in: it must call [`serve`] next.
pub fn enlist() {
    state().free += 1;
}

/// Does what programs give it, for ever.
pub fn serve() -> ! {
    loop {
        let mut waiting = state();
        let job = loop {
            match waiting.jobs.pop_front() {
                Some(job) => break job,
                None => waiting = LENT.wake.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(waiting);
        job();
    }
}

/// Says that a lent thread has died in the middle of its work: those who wait for it would wait for ever.
pub fn broke() {
    LENT.broken.store(true, Ordering::SeqCst);
}

/// Whether one has.
pub(super) fn is_broken() -> bool {
    LENT.broken.load(Ordering::SeqCst)
}

/// Threads that could be had now.
pub fn free() -> usize {
    state().free
}

/// A lent thread at work.
pub(super) struct Worker(Arc<(Mutex<bool>, Condvar)>);

/// Gives a job to a lent thread.
///
/// # Errors
/// None is free.
pub(super) fn spawn(job: impl FnOnce() + Send + 'static) -> io::Result<Worker> {
    let over = Arc::new((Mutex::new(false), Condvar::new()));
    let told = over.clone();
    let job = move || {
        job();
        // Free before it says so: whoever joined it may have it again.
        state().free += 1;
        *told.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        told.1.notify_all();
    };
    let mut state = state();
    state.free = state.free.checked_sub(1).ok_or_else(|| io::Error::other("no lent thread is free"))?;
    state.jobs.push_back(Box::new(job));
    LENT.wake.notify_one();
    Ok(Worker(over))
}

impl Worker {
    /// Waits until its job is done.
    pub(super) fn join(self) {
        let mut over = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !*over {
            over = self.0.1.wait(over).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn threads_are_lent_and_come_back() {
        for _ in 0..2 {
            enlist();
            std::thread::spawn(|| serve());
        }
        let done = Arc::new(AtomicUsize::new(0));
        for round in 1..50 {
            let job = || {
                let done = done.clone();
                move || _ = done.fetch_add(1, Ordering::SeqCst)
            };
            let workers = [spawn(job()).unwrap(), spawn(job()).unwrap()];
            workers.into_iter().for_each(Worker::join);
            assert_eq!((free(), done.load(Ordering::SeqCst)), (2, 2 * round));
        }
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let gates = Arc::new(Mutex::new(gate));
        let waits = || {
            let gates = gates.clone();
            move || _ = gates.lock().unwrap().recv()
        };
        let workers = [spawn(waits()).unwrap(), spawn(waits()).unwrap()];
        assert!(spawn(|| ()).is_err(), "both have something to do");
        drop(open);
        workers.into_iter().for_each(Worker::join);
        assert_eq!((free(), is_broken()), (2, false));
    }
}
