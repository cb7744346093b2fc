//! What the GPU can do at best, measured: the yardstick of every other figure.
use super::{Gpu, PARAMS_STRIDE};
use crate::program::DeviceError;
use crate::wgpu::kernels::{self, Kernel};
use ::wgpu::{
    BindGroup, Buffer, BufferUsages, CommandEncoderDescriptor, ComputePassDescriptor, ComputePipeline,
};
use std::time::Instant;

const REPEATS: usize = 5;
const READ_BYTES: u64 = 1 << 30;
/// Of a program that imitates a GPU.
const READ_BYTES_SLOW: u64 = 64 << 20;
const READS: usize = 20;
const DISPATCHES: usize = 2000;

/// Bytes a second that a kernel reads.
pub fn read_bytes_per_s(gpu: &Gpu) -> Result<f64, DeviceError> {
    let most = if gpu.software { READ_BYTES_SLOW } else { READ_BYTES };
    let bytes = most.min(gpu.binding_max / 2 / 4096 * 4096);
    let seconds = seconds(gpu, &kernels::read(gpu.dialect, 1056), bytes, 1056, READS)?;
    Ok(bytes as f64 / seconds)
}

/// Seconds between dependent dispatches.
pub fn dispatch_s(gpu: &Gpu) -> Result<f64, DeviceError> {
    seconds(gpu, &kernels::read(gpu.dialect, 1), 4096, 1, DISPATCHES)
}

/// Median time of one of `n` dispatches, without what a submission costs.
fn seconds(gpu: &Gpu, kernel: &Kernel, bytes: u64, width: u32, n: usize) -> Result<f64, DeviceError> {
    let data = gpu.buffer("ceiling", bytes, BufferUsages::STORAGE);
    let out = gpu.buffer("ceiling", 4 * 256 * u64::from(width), BufferUsages::STORAGE);
    let params = gpu.buffer("params", PARAMS_STRIDE, BufferUsages::UNIFORM);
    let bench = Bench {
        pipeline: gpu.pipeline(kernel),
        bound: gpu.bind(kernel, &[(&data, 0, data.size()), (&out, 0, out.size())]),
        params: gpu.bind_params(&params),
        _buffers: [data, out, params],
    };
    let mut all = Vec::new();
    for _ in 0..=REPEATS {
        all.push((bench.run(gpu, width, n)? - bench.run(gpu, width, 1)?) / (n - 1) as f64);
    }
    all.remove(0); // the first finds clocks low and pages new
    all.sort_by(f64::total_cmp);
    Ok(all[all.len() / 2].max(1e-12))
}

struct Bench {
    pipeline: ComputePipeline,
    bound: BindGroup,
    params: BindGroup,
    _buffers: [Buffer; 3],
}

impl Bench {
    fn run(&self, gpu: &Gpu, width: u32, n: usize) -> Result<f64, DeviceError> {
        let mut commands = gpu.device.create_command_encoder(&CommandEncoderDescriptor { label: None });
        {
            let mut pass = commands.begin_compute_pass(&ComputePassDescriptor::default());
            pass.set_pipeline(&self.pipeline);
            pass.set_bind_group(0, &self.bound, &[]);
            pass.set_bind_group(1, &self.params, &[0]);
            (0..n).for_each(|_| pass.dispatch_workgroups(width, 1, 1));
        }
        let commands = commands.finish();
        let began = Instant::now();
        let submission = gpu.queue.submit([commands]);
        gpu.wait(Some(submission))?;
        Ok(began.elapsed().as_secs_f64())
    }
}
