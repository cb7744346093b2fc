//! What this machine's memory and threads can do, measured beside what is made of it.
use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Words of 8 bytes that each thread reads: far more than caches hold.
const WORDS: usize = 16 << 20;
const PASSES: usize = 5;
const MEETINGS: u32 = 20_000;

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    /// Threads that did it.
    pub(super) threads: usize,
    /// Bytes a second that they read together.
    pub(super) bandwidth: f64,
    /// What it takes all of them to meet at a barrier.
    pub(super) sync: Duration,
}

impl Machine {
    /// Takes about half a second and 128 MiB a thread.
    pub(super) fn measure(threads: usize) -> Machine {
        Machine { threads, bandwidth: bandwidth(threads, WORDS), sync: sync(threads) }
    }

    /// Seconds that a token takes if nothing but memory and barriers cost: `bytes / (0.92 bandwidth) + steps * sync`.
    pub(super) fn roofline(&self, weight_bytes: u64, steps: usize) -> f64 {
        weight_bytes as f64 / (0.92 * self.bandwidth) + steps as f64 * self.sync.as_secs_f64()
    }
}

/// Bytes a second that so many threads read from memory together, each so many words.
pub(super) fn bandwidth(threads: usize, words: usize) -> f64 {
    let buffers: Vec<Vec<u64>> = (0..threads).map(|t| vec![t as u64 + 1; words]).collect();
    let pass = || {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for buffer in &buffers {
                scope.spawn(|| black_box(sum(buffer)));
            }
        });
        begun.elapsed().as_secs_f64()
    };
    let mut seconds: Vec<f64> = (0..PASSES).map(|_| pass()).collect();
    (threads * words * size_of::<u64>()) as f64 / super::median(&mut seconds)
}

/// Several sums at once, so that the loop is bound by memory.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for chunk in words.chunks_exact(32) {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

fn sync(threads: usize) -> Duration {
    let arrived = AtomicUsize::new(0);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for round in 1..=MEETINGS as usize {
                    arrived.fetch_add(1, Ordering::AcqRel);
                    let mut spins = 0u32;
                    while arrived.load(Ordering::Acquire) < round * threads {
                        spins += 1;
                        // others may need the processor on which the missing thread should run
                        if spins.is_multiple_of(4096) { std::thread::yield_now() } else { spin_loop() }
                    }
                }
            });
        }
    });
    begun.elapsed() / MEETINGS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roofline_is_bytes_and_barriers() {
        let machine = Machine { threads: 1, bandwidth: 1e9, sync: Duration::from_micros(10) };
        let seconds = machine.roofline(92_000_000, 100);
        assert!((seconds - 0.101).abs() < 1e-9, "{seconds}");
    }
}
