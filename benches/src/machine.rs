//! The machine's ceilings, measured in the same run as what is compared with them.
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// What the machine can do with a number of threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ceilings {
    /// Bytes a second read from memory, all threads together.
    pub read_bytes_per_s: f64,
    /// One barrier between all threads, spinning.
    pub sync_s: f64,
    /// Multiplications and additions of 8-bit integers a second, all threads together.
    pub int8_ops_per_s: f64,
}

/// Measures ceilings again and again in the course of a run.
pub struct Machine {
    threads: usize,
    memory: Vec<u64>,
}

/// Memory read by one measurement: far more than any cache.
const MEMORY_BYTES: usize = 1 << 30;
const BARRIERS: usize = 20_000;

impl Machine {
    /// Takes 1 GiB of memory to read.
    pub fn new(threads: usize) -> Machine {
        // Not zeros, which the system would map to one page.
        let memory = (0..MEMORY_BYTES as u64 / 8).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        Machine { threads: threads.max(1), memory }
    }

    /// One measurement of each ceiling.
    pub fn measure(&self) -> Ceilings {
        Ceilings {
            read_bytes_per_s: self.read_bytes_per_s(),
            sync_s: self.sync_s(),
            int8_ops_per_s: self.int8_ops_per_s(),
        }
    }

    fn read_bytes_per_s(&self) -> f64 {
        let each = self.memory.len() / self.threads;
        let seconds = self.together(|thread| {
            std::hint::black_box(vector::xor(&self.memory[thread * each..(thread + 1) * each]));
        });
        (each * self.threads * 8) as f64 / seconds
    }

    fn sync_s(&self) -> f64 {
        let arrived = AtomicUsize::new(0);
        let seconds = self.together(|_| {
            for round in 1..=BARRIERS {
                arrived.fetch_add(1, Ordering::AcqRel);
                while arrived.load(Ordering::Acquire) < round * self.threads {
                    std::hint::spin_loop();
                }
            }
        });
        seconds / BARRIERS as f64
    }

    fn int8_ops_per_s(&self) -> f64 {
        const ROUNDS: usize = 4_000_000;
        let seconds = self.together(|_| {
            std::hint::black_box(vector::int8_products(ROUNDS));
        });
        (ROUNDS * vector::OPS_PER_ROUND * self.threads) as f64 / seconds
    }

    /// Seconds that `work` takes on all threads, from a common start to the last one's end.
    fn together(&self, work: impl Fn(usize) + Sync) -> f64 {
        let start = Barrier::new(self.threads);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|thread| {
                    let (start, work) = (&start, &work);
                    scope.spawn(move || {
                        start.wait();
                        let began = Instant::now();
                        work(thread);
                        began.elapsed().as_secs_f64()
                    })
                })
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).fold(0.0, f64::max)
        })
    }
}

/// The one-minute load average, where the system tells.
pub fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

/// The processor's name, where the system tells.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.to_owned())
}

#[cfg(target_arch = "x86_64")]
mod vector {
    use std::arch::x86_64::{
        __m512i, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_reduce_add_epi32, _mm512_set1_epi32,
        _mm512_setzero_si512, _mm512_xor_si512,
    };

    /// Independent accumulators: hides the latency of a load or a product.
    const CHAINS: usize = 12;
    /// Two operations a byte pair, 64 pairs an instruction.
    pub const OPS_PER_ROUND: usize = CHAINS * 128;

    /// Reads all of `words`.
    pub fn xor(words: &[u64]) -> u64 {
        if std::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F.
            return unsafe { xor_512(words) };
        }
        super::portable::xor(words)
    }

    #[target_feature(enable = "avx512f")]
    fn xor_512(words: &[u64]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for chunk in words.chunks_exact(8 * CHAINS) {
            for (sum, eight) in sums.iter_mut().zip(chunk.chunks_exact(8)) {
                // SAFETY: eight words are 64 bytes; the load needs no alignment.
                *sum = _mm512_xor_si512(*sum, unsafe { _mm512_loadu_si512(eight.as_ptr().cast()) });
            }
        }
        let all = sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_xor_si512(a, b));
        _mm512_reduce_add_epi32(all) as u64
    }

    /// `rounds` times as many products as there are chains.
    pub fn int8_products(rounds: usize) -> i32 {
        if std::is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the processor has AVX-512 VNNI, and with it AVX-512F.
            return unsafe { int8_products_512(rounds) };
        }
        super::portable::int8_products(rounds, OPS_PER_ROUND / 2)
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8_products_512(rounds: usize) -> i32 {
        let mut sums: [__m512i; CHAINS] = [_mm512_setzero_si512(); CHAINS];
        let (a, b) = (std::hint::black_box(_mm512_set1_epi32(0x0102_0304)), _mm512_set1_epi32(0x0101_0101));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_epi32(sum)).fold(0, i32::wrapping_add)
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod vector {
    pub use super::portable::xor;
    pub const OPS_PER_ROUND: usize = 512;

    pub fn int8_products(rounds: usize) -> i32 {
        super::portable::int8_products(rounds, OPS_PER_ROUND / 2)
    }
}

/// Whatever the compiler makes of it.
mod portable {
    pub fn xor(words: &[u64]) -> u64 {
        let mut sums = [0; 32];
        for chunk in words.chunks_exact(32) {
            for (sum, word) in sums.iter_mut().zip(chunk) {
                *sum ^= word;
            }
        }
        sums.into_iter().fold(0, |a, b| a ^ b)
    }

    pub fn int8_products(rounds: usize, pairs: usize) -> i32 {
        let (a, b) = (std::hint::black_box(vec![3u8; pairs]), std::hint::black_box(vec![1i8; pairs]));
        let dot = || a.iter().zip(&b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum::<i32>();
        (0..rounds).map(|_| std::hint::black_box(dot())).fold(0, i32::wrapping_add)
    }
}
