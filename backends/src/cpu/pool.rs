//! Pinned threads that go through a step together, meeting at barriers.
#[cfg(target_family = "wasm")]
use super::lent;
use super::os;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How long a thread spins before it sleeps: processors may be shared with other programs.
const SPIN: Duration = Duration::from_micros(20);
/// How long an idle worker spins for the next step: the gap between two tokens is shorter.
const SPIN_IDLE: Duration = Duration::from_micros(50);

/// A number that grows, and that threads wait for.
struct Gate {
    value: AtomicU32,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Gate {
    fn new() -> Gate {
        Gate {
            value: AtomicU32::new(0),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    fn open(&self) {
        // SeqCst, as is the sleeper's registration: one of the two sees the other
        self.value.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
            self.wake.notify_all();
        }
    }

    /// Returns once the value is not `seen`.
    fn wait(&self, seen: u32, spin: Duration) {
        for _ in 0..64 {
            if self.value.load(Ordering::Acquire) != seen {
                return;
            }
            std::hint::spin_loop();
        }
        let mut patience = Patience::new();
        loop {
            for _ in 0..64 {
                if self.value.load(Ordering::Acquire) != seen {
                    return;
                }
                std::hint::spin_loop();
            }
            if patience.is_over(spin) {
                break;
            }
        }
        let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.value.load(Ordering::SeqCst) == seen {
            guard = self.sleep(guard);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    #[cfg(not(target_family = "wasm"))]
    fn sleep<'a>(&self, guard: MutexGuard<'a, ()>) -> MutexGuard<'a, ()> {
        self.wake.wait(guard).unwrap_or_else(|e| e.into_inner())
    }

    /// A lent thread that dies takes only its own worker with it; the others have to look.
    #[cfg(target_family = "wasm")]
    fn sleep<'a>(&self, guard: MutexGuard<'a, ()>) -> MutexGuard<'a, ()> {
        let (guard, _) = self.wake.wait_timeout(guard, LOOK).unwrap_or_else(|e| e.into_inner());
        assert!(!lent::is_broken(), "a thread of this program has died");
        guard
    }
}

/// How often a thread that sleeps looks whether the others are alive.
#[cfg(target_family = "wasm")]
const LOOK: Duration = Duration::from_secs(1);

/// How long a thread has been spinning.
#[cfg(not(target_family = "wasm"))]
struct Patience(std::time::Instant);

#[cfg(not(target_family = "wasm"))]
impl Patience {
    fn new() -> Patience {
        Patience(std::time::Instant::now())
    }

    fn is_over(&mut self, spin: Duration) -> bool {
        self.0.elapsed() > spin
    }
}

/// How often a thread has looked: there is no clock.
#[cfg(target_family = "wasm")]
struct Patience(u32);

#[cfg(target_family = "wasm")]
impl Patience {
    /// What 64 looks take on processors of these years.
    const LOOKS: Duration = Duration::from_nanos(50);

    fn new() -> Patience {
        Patience(0)
    }

    fn is_over(&mut self, spin: Duration) -> bool {
        self.0 += 1;
        Patience::LOOKS * self.0 > spin
    }
}

struct Shared {
    threads: usize,
    /// Opened when a job starts.
    start: Gate,
    /// Opened when all threads have arrived at a barrier.
    barrier: Gate,
    arrived: AtomicUsize,
    stop: AtomicBool,
    job: Mutex<Option<Job>>,
}

/// A borrowed closure whose lifetime [`Pool::run`] guards.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(Thread<'_>) + Sync));
// SAFETY: the closure is Sync, and `run` returns only when no thread uses it any more.
unsafe impl Send for Job {}

/// A thread of a running job.
#[derive(Clone, Copy)]
pub struct Thread<'a> {
    /// 0 is the caller of [`Pool::run`].
    pub index: usize,
    shared: &'a Shared,
}

impl Thread<'_> {
    /// Threads of the job.
    pub fn count(&self) -> usize {
        self.shared.threads
    }

    /// Waits for all threads; what each wrote before is visible to all after.
    pub fn barrier(&self) {
        let s = self.shared;
        if s.threads == 1 {
            return;
        }
        let seen = s.barrier.value.load(Ordering::Acquire);
        if s.arrived.fetch_add(1, Ordering::AcqRel) + 1 == s.threads {
            s.arrived.store(0, Ordering::Relaxed);
            s.barrier.open();
        } else {
            s.barrier.wait(seen, SPIN);
        }
    }
}

/// Threads for one program; the caller of [`Pool::run`] is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    pinned: Option<std::thread::ThreadId>,
}

impl Pool {
    /// `threads - 1` workers; each thread stays on a processor of its own where there are enough.
    pub fn new(threads: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            threads,
            start: Gate::new(),
            barrier: Gate::new(),
            arrived: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            job: Mutex::new(None),
        });
        let mut pool = Pool { shared, workers: Vec::new(), pinned: None };
        for index in 1..threads {
            let shared = pool.shared.clone();
            let worker = move || {
                os::pin(place(index, shared.threads));
                work(&shared, index);
            };
            pool.workers.push(spawn(index, worker)?);
        }
        Ok(pool)
    }

    /// Runs `job` on every thread and returns when all are done.
    pub fn run(&mut self, job: &(dyn Fn(Thread<'_>) + Sync)) {
        let me = std::thread::current().id();
        if self.pinned != Some(me) {
            self.pinned = Some(me);
            os::pin(place(0, self.shared.threads));
        }
        if self.shared.threads > 1 {
            // SAFETY: only the lifetime is erased; the last barrier below outlives every use.
            let job: *const (dyn Fn(Thread<'_>) + Sync + 'static) = unsafe { std::mem::transmute(job) };
            *self.shared.job.lock().unwrap_or_else(|e| e.into_inner()) = Some(Job(job));
            self.shared.start.open();
        }
        let thread = Thread { index: 0, shared: &self.shared };
        let guard = AbortOnPanic;
        job(thread);
        thread.barrier();
        std::mem::forget(guard);
    }
}

#[cfg(not(target_family = "wasm"))]
type Worker = std::thread::JoinHandle<()>;
#[cfg(target_family = "wasm")]
type Worker = lent::Worker;

#[cfg(not(target_family = "wasm"))]
fn spawn(index: usize, work: impl FnOnce() + Send + 'static) -> std::io::Result<Worker> {
    std::thread::Builder::new().name(format!("weir-cpu-{index}")).spawn(work)
}

#[cfg(target_family = "wasm")]
fn spawn(_index: usize, work: impl FnOnce() + Send + 'static) -> std::io::Result<Worker> {
    lent::spawn(work)
}

/// Processors for one of `threads` threads: its own where there are enough, else all.
fn place(index: usize, threads: usize) -> &'static [usize] {
    let all = os::processors();
    if threads > 1 && threads <= all.len() { &all[index..=index] } else { all }
}

/// A thread that unwound out of a job would leave the others waiting, with the job's memory gone.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        std::process::abort();
    }
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        shared.start.wait(seen, SPIN_IDLE);
        seen = seen.wrapping_add(1);
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        let job = *shared.job.lock().unwrap_or_else(|e| e.into_inner());
        let thread = Thread { index, shared };
        if let Some(Job(job)) = job {
            let guard = AbortOnPanic;
            // SAFETY: `run` waits for the barrier below before the closure dies.
            unsafe { (*job)(thread) };
            std::mem::forget(guard);
        }
        thread.barrier();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.start.open();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each thread has a processor of its own, though the second pool is made by a thread that the first has pinned.
    #[test]
    #[cfg(target_os = "linux")]
    fn threads_keep_apart() {
        let threads = os::processors().len();
        if threads < 2 {
            eprintln!("SKIPPED: there is one processor");
            return;
        }
        for _ in 0..2 {
            let mut pool = Pool::new(threads).unwrap();
            let places = Mutex::new(Vec::new());
            pool.run(&|_| places.lock().unwrap().push(os::allowed()));
            let mut places = places.into_inner().unwrap();
            places.sort();
            let apart: Vec<Vec<usize>> = os::processors().iter().map(|p| vec![*p]).collect();
            assert_eq!(places, apart);
        }
    }

    #[test]
    fn threads_meet_at_every_barrier() {
        let mut pool = Pool::new(3).unwrap();
        let count = AtomicUsize::new(0);
        for round in 1..200 {
            pool.run(&|t| {
                for step in 0..20 {
                    count.fetch_add(1, Ordering::Relaxed);
                    t.barrier();
                    assert!(count.load(Ordering::Relaxed) >= (round - 1) * 60 + (step + 1) * 3);
                    t.barrier();
                }
            });
            assert_eq!(count.load(Ordering::Relaxed), round * 60);
        }
    }
}
