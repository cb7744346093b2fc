//! The wgpu device: any GPU that Vulkan, Metal, Direct3D 12 or a browser's WebGPU reaches, by WGSL generated for the
//! loaded model.
//!
//! A step of decoding is one compute pass of five dispatches a layer and four more: norms are part of the products that
//! read them, rotation and the cache's new row part of attention, tokens are chosen on the GPU, and the next step's
//! embedding looks the id up there. Quantised matrices meet activations of eight bits in integer products; sums have
//! one order whatever is in the batch, so results are batch-invariant. It is six dispatches where attention is split over
//! spans, and for several rows a norm is a dispatch of its own.
//!
//! f16 is only ever storage, through `pack2x16float`, so no adapter needs `shader-f16`. The order of each sum is fixed by
//! the matrix' shape and the adapter's subgroups; every multiplication that meets an addition is an explicit `fma`, since a
//! compiler may contract the same text differently in two kernels. Weights lie in regions, one a dispatch, cut where a
//! binding ends. Where a request wants penalties, masks, top-k, top-p or log-probabilities, logits come back and
//! `sampling.rs` chooses.
mod adapter;
mod kernels;
mod load;
mod lower;
mod pack;
mod run;

use crate::gguf::ModelFile;
use crate::plan::Plan;
use crate::program::{Device, DeviceError, DeviceInfo, KvLayout, Program};
pub use adapter::Found;
use std::ops::Range;
use std::sync::Arc;

/// A GPU that runs programs.
pub struct Wgpu {
    gpu: Arc<adapter::Gpu>,
    profile: bool,
    wake: Wake,
}

/// Called when results of a step have come back; where nothing may block, that is the time to poll.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

impl Wgpu {
    /// All GPUs of this machine, the fastest kind first, programs that imitate one last. Empty where there is no driver.
    #[cfg(not(target_family = "wasm"))]
    pub fn find() -> Vec<Found> {
        pollster::block_on(adapter::find())
    }

    /// Opens a GPU, and tests whether it computes rightly.
    #[cfg(not(target_family = "wasm"))]
    pub fn new(found: &Found) -> Result<Wgpu, DeviceError> {
        pollster::block_on(Wgpu::open(found, false))
    }

    /// As [`Wgpu::find`], where nothing may block.
    pub async fn find_async() -> Vec<Found> {
        adapter::find().await
    }

    /// As [`Wgpu::new`], where nothing may block. `shuffles` says that the GPU has subgroups though wgpu doesn't know:
    /// it has no name for what browsers call so, but a page may see to it that devices are asked for with them.
    pub async fn open(found: &Found, shuffles: bool) -> Result<Wgpu, DeviceError> {
        let gpu = Arc::new(adapter::Gpu::open(found, shuffles).await?);
        Ok(Wgpu { gpu, profile: false, wake: Arc::new(|| ()) })
    }

    /// Programs call `wake` when results have come back.
    pub fn with_wake(self, wake: Wake) -> Wgpu {
        Wgpu { wake, ..self }
    }

    /// Whether programs measure the time of each dispatch, which costs some of it, where the GPU can.
    pub fn with_profile(self, profile: bool) -> Wgpu {
        Wgpu { profile, ..self }
    }

    /// Bytes a second that a kernel reads from a buffer larger than caches.
    #[cfg(not(target_family = "wasm"))]
    pub fn read_bytes_per_s(&self) -> Result<f64, DeviceError> {
        adapter::ceilings::read_bytes_per_s(&self.gpu)
    }

    /// Seconds from a small dispatch to the next one that reads what it wrote.
    #[cfg(not(target_family = "wasm"))]
    pub fn dispatch_s(&self) -> Result<f64, DeviceError> {
        adapter::ceilings::dispatch_s(&self.gpu)
    }

    /// As [`Device::compile`], where nothing may block.
    pub async fn compile_async(
        &self,
        model: &ModelFile,
        plan: &Plan,
        layers: Range<usize>,
        kv: KvLayout,
    ) -> Result<Box<dyn Program>, DeviceError> {
        self.gpu.fine()?;
        let limit = usize::try_from(self.gpu.binding_max).unwrap_or(usize::MAX);
        let lowered = lower::lower(model, plan, layers, kv, self.gpu.dialect, limit)?;
        let weights_bytes: usize = lowered.regions.iter().map(|region| 4 * region.words).sum();
        let other_bytes: usize = lowered.sizes.values().sum();
        let free = self.gpu.memory_free();
        let short = DeviceError::Memory {
            weights_mib: weights_bytes as u64 >> 20,
            kv_mib: other_bytes as u64 >> 20,
            free_mib: free >> 20,
            device: self.gpu.name.clone(),
        };
        if (weights_bytes + other_bytes) as u64 > free {
            return Err(short);
        }
        let program = run::WgpuProgram::new(self, model, lowered, kv).await;
        if self.gpu.ran_out() { Err(short) } else { Ok(Box::new(program?)) }
    }
}

impl Device for Wgpu {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo {
            name: self.gpu.name.clone(),
            description: self.gpu.description.clone(),
            numerics: self.gpu.numerics.clone(),
            memory_free: self.gpu.memory_free(),
        }
    }

    fn compile(
        &self,
        model: &ModelFile,
        plan: &Plan,
        layers: Range<usize>,
        kv: KvLayout,
    ) -> Result<Box<dyn Program>, DeviceError> {
        #[cfg(not(target_family = "wasm"))]
        return pollster::block_on(self.compile_async(model, plan, layers, kv));
        #[cfg(target_family = "wasm")]
        {
            let _ = (model, plan, layers, kv);
            Err(DeviceError::Unsupported(
                "in a browser nothing may block: `compile_async` loads models there".into(),
            ))
        }
    }
}
