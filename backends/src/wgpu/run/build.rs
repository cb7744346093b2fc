//! Kernels are compiled, weights loaded, buffers bound.
use crate::gguf::ModelFile;
use crate::program::DeviceError;
use crate::wgpu::adapter::Gpu;
use crate::wgpu::kernels::Kernel;
use crate::wgpu::load::{self, Weights};
use crate::wgpu::lower::{Buf, Call, Lowered};
use ::wgpu::{BindGroup, Buffer, ComputePipeline};
use std::collections::{HashMap, HashSet};

/// Each kernel once, compiled beside the loading of weights.
pub(super) async fn build(
    gpu: &Gpu,
    file: &ModelFile,
    lists: &[&Vec<Call>],
    lowered: &Lowered,
    weights: &Weights,
) -> Result<HashMap<Kernel, ComputePipeline>, DeviceError> {
    let mut kernels: Vec<&Kernel> = Vec::new();
    let mut known = HashSet::new();
    for call in lists.iter().flat_map(|list| list.iter()) {
        if known.insert(&call.kernel) {
            kernels.push(&call.kernel);
        }
    }
    let compile = |kernels: &[&Kernel]| -> Vec<(Kernel, ComputePipeline)> {
        kernels.iter().map(|&kernel| (kernel.clone(), gpu.pipeline(kernel))).collect()
    };
    #[cfg(target_family = "wasm")]
    {
        // The browser compiles beside us anyway.
        let pipelines = compile(&kernels).into_iter().collect();
        load::fill(gpu, file, &lowered.regions, weights).await?;
        gpu.fine()?;
        Ok(pipelines)
    }
    #[cfg(not(target_family = "wasm"))]
    std::thread::scope(|scope| {
        let each = kernels.len().div_ceil(gpu.threads.min(8)).max(1);
        let parts: Vec<_> = kernels.chunks(each).map(|part| scope.spawn(move || compile(part))).collect();
        pollster::block_on(load::fill(gpu, file, &lowered.regions, weights))?;
        let mut pipelines = HashMap::new();
        for part in parts {
            let part = part.join();
            pipelines.extend(part.map_err(|_| DeviceError::Lost("a kernel could not be compiled".into()))?);
        }
        gpu.fine()?;
        Ok(pipelines)
    })
}

pub(super) fn bind(
    gpu: &Gpu,
    call: &Call,
    buffers: &HashMap<Buf, Buffer>,
    weights: &Weights,
    lowered: &Lowered,
) -> BindGroup {
    let one = |&buf: &Buf| match buf {
        Buf::Region(region) => {
            let place = &weights.places[region];
            (&weights.arenas[place.arena], place.offset, place.bytes)
        }
        Buf::Delta(k) => {
            let bytes = 4 * lowered.rows_max * lowered.hidden;
            (&buffers[&Buf::Deltas], (k * bytes) as u64, bytes as u64)
        }
        other => (&buffers[&other], 0, buffers[&other].size()),
    };
    let bound: Vec<(&Buffer, u64, u64)> = call.buffers.iter().map(one).collect();
    gpu.bind(&call.kernel, &bound)
}
