//! The CPU device: weights repacked at load, integer dot products, pinned threads, one barrier a fused step.
//!
//! `load.rs` lowers the plan and repacks the weights, without loss, into panels of 16 rows (`pack.rs`). Activations become
//! int8, with a scale for each 32, once for every product that reads them; a block's integer dot product is exact and its
//! sum one f32 fused multiply-add, in the order of the columns, so neither the batch nor the instruction set shows: AVX-512
//! VNNI and AVX2 give the same bits, the portable path has a numerics id of its own. Panels are dealt to pinned threads by
//! bytes, and all threads walk the steps together (`run.rs`), with one barrier behind a step when there is one row: what
//! must come between, every thread does for itself. A product leaves its sum beside the residual stream; whoever reads the
//! stream next adds it, norms and quantises in the same pass. Attention goes by spans of 128 positions at absolute places,
//! folded in order; few queries over a long past are dealt out span by span, many as whole tiles. Barriers spin for 20 us,
//! then sleep (`pool.rs`).
// Lanes, rows and columns are numbered, and several arrays share the number.
#![allow(clippy::needless_range_loop)]
mod attend;
mod gemm;
mod kernels;
#[cfg(any(test, target_family = "wasm"))]
pub mod lent;
mod load;
mod os;
mod pack;
mod pool;
mod rows;
mod run;
mod simd;

use crate::gguf::ModelFile;
use crate::plan::Plan;
use crate::program::{Device, DeviceError, DeviceInfo, KvLayout, Program};
pub use kernels::Isa;
use std::ops::Range;

/// Choices for a [`Cpu`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads of a program, the engine's own included; one a processor where not told, or all that were lent.
    pub threads: Option<usize>,
    /// The instruction set; the best that is present where not told.
    pub isa: Option<Isa>,
}

/// The processor that this program runs on.
#[derive(Clone, Debug)]
pub struct Cpu {
    threads: usize,
    isa: Isa,
}

impl Cpu {
    /// An instruction set that isn't present is replaced by the best that is.
    pub fn new(options: CpuOptions) -> Cpu {
        #[cfg(not(target_family = "wasm"))]
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        #[cfg(target_family = "wasm")]
        let available = || 1 + lent::free();
        let best = Isa::ALL.into_iter().find(|i| i.present()).unwrap_or(Isa::Portable);
        Cpu {
            threads: options.threads.unwrap_or_else(available).clamp(1, 256),
            isa: options.isa.filter(|i| i.present()).unwrap_or(best),
        }
    }
}

fn threads(count: usize) -> String {
    if count == 1 { "1 thread".to_owned() } else { format!("{count} threads") }
}

impl Device for Cpu {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo {
            name: "cpu".to_owned(),
            description: format!("{}, {}, {}", os::processor(), threads(self.threads), self.isa.name()),
            numerics: self.isa.numerics().to_owned(),
            memory_free: os::memory_free(),
        }
    }

    fn compile(
        &self,
        model: &ModelFile,
        plan: &Plan,
        layers: Range<usize>,
        kv: KvLayout,
    ) -> Result<Box<dyn Program>, DeviceError> {
        let lowered = load::lower(model, plan, layers, kv, self.threads)?;
        let free = os::memory_free();
        let needed = lowered.weights_bytes + lowered.cache_bytes;
        if needed as u64 > free {
            return Err(DeviceError::Memory {
                weights_mib: (lowered.weights_bytes >> 20) as u64,
                kv_mib: (lowered.cache_bytes >> 20) as u64,
                free_mib: free >> 20,
                device: "the CPU".to_owned(),
            });
        }
        // In a browser the thread that opened a file is the only one that can read it.
        let readers = if cfg!(target_family = "wasm") { 1 } else { self.threads };
        let weights = load::weights(model, &lowered, readers)?;
        Ok(Box::new(run::CpuProgram::new(lowered, weights, kernels::of(self.isa), self.threads)?))
    }
}
