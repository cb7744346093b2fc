//! GPUs as the system offers them: what each can do, and whether it computes rightly.
#[cfg(not(target_family = "wasm"))]
pub mod ceilings;

use super::kernels::{Dialect, Kernel};
use crate::program::DeviceError;
use ::wgpu::{
    Adapter, AdapterInfo, Backend, Backends, BindGroup, BindGroupDescriptor, BindGroupEntry, BindGroupLayout,
    BindGroupLayoutDescriptor, BindGroupLayoutEntry, BindingType, Buffer, BufferBindingType,
    BufferDescriptor, BufferSize, BufferUsages, CommandEncoderDescriptor, ComputePassDescriptor,
    ComputePipeline, ComputePipelineDescriptor, Device, DeviceDescriptor, DeviceType, Error, Features,
    Instance, InstanceDescriptor, MapMode, PipelineCompilationOptions, PipelineLayoutDescriptor, PollError,
    PollType, Queue, ShaderModuleDescriptor, ShaderRuntimeChecks, ShaderSource, ShaderStages,
    SubmissionIndex,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// Invocations of the largest workgroup, and storage buffers of the busiest kernel.
const INVOCATIONS: u32 = 256;
const STORAGE_BUFFERS: u32 = 8;
const TIMESTAMPS: Features = Features::TIMESTAMP_QUERY.union(Features::TIMESTAMP_QUERY_INSIDE_PASSES);
/// A step in the uniform buffer of parameters.
pub const PARAMS_STRIDE: u64 = 256;

/// A GPU that could be opened, or the reason why it can't.
#[derive(Clone, Debug)]
pub struct Found {
    /// `wgpu:0`, `wgpu:1`, ..., the fastest kind first.
    pub name: String,
    /// What it calls itself, and by which way it is reached.
    pub description: String,
    /// Whether it is a program that imitates a GPU: right, but slow.
    pub software: bool,
    adapter: Adapter,
}

/// All GPUs, the fastest kind first. Empty where the system has no driver for any.
pub async fn find() -> Vec<Found> {
    let instance = Instance::new(InstanceDescriptor::new_without_display_handle());
    let mut adapters = instance.enumerate_adapters(Backends::all()).await;
    let rank = |adapter: &Adapter| match adapter.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu | DeviceType::Other => 2,
        DeviceType::Cpu => 3,
    };
    adapters.sort_by_key(rank);
    let found = |(i, adapter): (usize, Adapter)| {
        let info = adapter.get_info();
        Found {
            name: format!("wgpu:{i}"),
            description: describe(&info),
            software: info.device_type == DeviceType::Cpu,
            adapter,
        }
    };
    adapters.into_iter().enumerate().map(found).collect()
}

fn describe(info: &AdapterInfo) -> String {
    let AdapterInfo { name, driver, driver_info, backend, .. } = info;
    // Browsers tell little.
    let name = if name.is_empty() { "GPU" } else { name.as_str() };
    match format!("{driver} {driver_info}").trim() {
        "" => format!("{name}, {backend}"),
        driver => format!("{name}, {backend} ({driver})"),
    }
}

/// An open GPU.
pub struct Gpu {
    pub name: String,
    pub description: String,
    pub numerics: String,
    pub device: Device,
    pub queue: Queue,
    pub dialect: Dialect,
    /// Most bytes of a buffer, and of a binding.
    pub buffer_max: u64,
    pub binding_max: u64,
    /// Bytes of memory of its own, where that can be found out.
    pub memory: Option<u64>,
    /// Whether it is a program that imitates a GPU.
    #[cfg(not(target_family = "wasm"))]
    pub software: bool,
    /// Nanoseconds of a tick of the GPU's clock, where it can be read between dispatches.
    pub tick_nanos: Option<f64>,
    /// Threads that prepare weights.
    pub threads: usize,
    trouble: Arc<Mutex<Trouble>>,
    params: BindGroupLayout,
    layouts: Mutex<HashMap<Vec<bool>, BindGroupLayout>>,
}

#[derive(Debug, Default)]
struct Trouble {
    lost: Option<String>,
    memory: bool,
}

impl Gpu {
    /// Opens a GPU and tests it. `shuffles` says that it has subgroups though wgpu doesn't know, as in a browser whose
    /// devices are asked for with them.
    pub async fn open(found: &Found, shuffles: bool) -> Result<Gpu, DeviceError> {
        let adapter = &found.adapter;
        let (info, limits) = (adapter.get_info(), adapter.limits());
        let refuse = |why: String| DeviceError::Unsupported(format!("{}: {why}", found.description));
        if limits.max_compute_invocations_per_workgroup < INVOCATIONS
            || limits.max_storage_buffers_per_shader_stage < STORAGE_BUFFERS
        {
            return Err(refuse(format!(
                "workgroups of {} and {} storage buffers are too few; {INVOCATIONS} and {STORAGE_BUFFERS} are needed",
                limits.max_compute_invocations_per_workgroup, limits.max_storage_buffers_per_shader_stage
            )));
        }
        let wanted = DeviceDescriptor {
            label: Some("weir"),
            required_features: adapter.features() & (Features::SUBGROUP | TIMESTAMPS),
            required_limits: limits.clone(),
            ..DeviceDescriptor::default()
        };
        let opened = adapter.request_device(&wanted).await;
        let (device, queue) = opened.map_err(|error| refuse(error.to_string()))?;
        let trouble = watch(&device);
        let timed = device.features().contains(TIMESTAMPS);
        let tick_nanos = timed.then(|| f64::from(queue.get_timestamp_period()));
        let params = params_layout(&device);
        let lanes = if shuffles || adapter.features().contains(Features::SUBGROUP) {
            let least = info.subgroup_min_size.clamp(1, 32);
            if least.is_power_of_two() { least } else { 1 }
        } else {
            1
        };
        let dialect = Dialect {
            lanes,
            browser: info.backend == Backend::BrowserWebGpu,
            shared_bytes: limits.max_compute_workgroup_storage_size,
        };
        let mut gpu = Gpu {
            name: found.name.clone(),
            description: found.description.clone(),
            numerics: String::new(),
            device,
            queue,
            dialect,
            buffer_max: limits.max_buffer_size,
            binding_max: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
            memory: memory(adapter, &info),
            threads: std::thread::available_parallelism().map_or(1, usize::from).min(16),
            #[cfg(not(target_family = "wasm"))]
            software: found.software,
            tick_nanos,
            trouble,
            params,
            layouts: Mutex::default(),
        };
        gpu.test(&refuse).await?;
        gpu.numerics = format!("wgpu-1-{}-{}", found.description, gpu.dialect.lanes);
        Ok(gpu)
    }

    /// Lanes shuffle and bytes multiply as the kernels rely on; fewer lanes, if need be.
    async fn test(&mut self, refuse: &dyn Fn(String) -> DeviceError) -> Result<(), DeviceError> {
        loop {
            let (found, lanes) = (self.probe().await?, self.dialect.lanes);
            let bytes = (-128i32) * 3 + 127 * -5 + 7 * 11 + -13 * 17;
            if found[0] != bytes as u32 || found[1] != 0x80ff_7f01 {
                return Err(refuse(format!("its products of bytes are wrong: {:?}", &found[..2])));
            }
            let right = |lid: u32| {
                found[2 + lid as usize] == (0..lanes).map(|i| lid / lanes * lanes + i).sum::<u32>()
            };
            if lanes == 1 || (0..INVOCATIONS).all(right) {
                return Ok(());
            }
            self.dialect.lanes /= 2;
        }
    }

    async fn probe(&self) -> Result<Vec<u32>, DeviceError> {
        let words = 2 + u64::from(INVOCATIONS);
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
        let (out, read) = (
            self.buffer("probe", 4 * words, usage),
            self.buffer("probe", 4 * words, BufferUsages::MAP_READ | BufferUsages::COPY_DST),
        );
        let params = self.buffer("params", PARAMS_STRIDE, BufferUsages::UNIFORM);
        let kernel = super::kernels::probe(self.dialect);
        let pipeline = self.pipeline(&kernel);
        let bound = self.bind(&kernel, &[(&out, 0, 4 * words)]);
        let params = self.bind_params(&params);
        let mut commands = self.device.create_command_encoder(&CommandEncoderDescriptor { label: None });
        {
            let mut pass = commands.begin_compute_pass(&ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &bound, &[]);
            pass.set_bind_group(1, &params, &[0]);
            pass.dispatch_workgroups(1, 1, 1);
        }
        commands.copy_buffer_to_buffer(&out, 0, &read, 0, 4 * words);
        let submission = self.queue.submit([commands.finish()]);
        let (done, mapped) = oneshot::channel();
        read.slice(..).map_async(MapMode::Read, |result| _ = done.send(result));
        self.wait(Some(submission))?;
        let lost = || DeviceError::Lost("the self-test did not end".into());
        mapped.await.map_err(|_| lost())?.map_err(|error| DeviceError::Lost(error.to_string()))?;
        self.fine()?;
        let view = read.slice(..).get_mapped_range().map_err(|error| DeviceError::Lost(error.to_string()))?;
        Ok(view.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// A buffer of zeros.
    pub fn buffer(&self, label: &str, size: u64, usage: BufferUsages) -> Buffer {
        self.device.create_buffer(&BufferDescriptor {
            label: Some(label),
            size: size.next_multiple_of(16).max(16),
            usage,
            mapped_at_creation: false,
        })
    }

    /// Compiles a kernel.
    pub fn pipeline(&self, kernel: &Kernel) -> ComputePipeline {
        let source = ShaderSource::Wgsl(kernel.text.as_str().into());
        let module = ShaderModuleDescriptor { label: Some(kernel.entry), source };
        // SAFETY: the text is ours; its loops end, and its indices come from sizes and block tables checked before.
        let module =
            unsafe { self.device.create_shader_module_trusted(module, ShaderRuntimeChecks::unchecked()) };
        let layout = self.layout(&kernel.writes);
        let layout = self.device.create_pipeline_layout(&PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&layout), Some(&self.params)],
            immediate_size: 0,
        });
        self.device.create_compute_pipeline(&ComputePipelineDescriptor {
            label: Some(kernel.entry),
            layout: Some(&layout),
            module: &module,
            entry_point: Some(kernel.entry),
            compilation_options: PipelineCompilationOptions {
                constants: &[],
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        })
    }

    /// Buffers, from a byte on, of so many bytes, for a kernel.
    pub fn bind(&self, kernel: &Kernel, buffers: &[(&Buffer, u64, u64)]) -> BindGroup {
        let layout = self.layout(&kernel.writes);
        let entries: Vec<BindGroupEntry<'_>> = buffers
            .iter()
            .enumerate()
            .map(|(i, &(buffer, offset, size))| BindGroupEntry {
                binding: i as u32,
                resource: ::wgpu::BindingResource::Buffer(::wgpu::BufferBinding {
                    buffer,
                    offset,
                    size: BufferSize::new(size),
                }),
            })
            .collect();
        self.device.create_bind_group(&BindGroupDescriptor {
            label: None,
            layout: &layout,
            entries: &entries,
        })
    }

    /// The parameters, at a dynamic offset.
    pub fn bind_params(&self, params: &Buffer) -> BindGroup {
        let entry = BindGroupEntry {
            binding: 0,
            resource: ::wgpu::BindingResource::Buffer(::wgpu::BufferBinding {
                buffer: params,
                offset: 0,
                size: BufferSize::new(16),
            }),
        };
        let layout = &self.params;
        self.device.create_bind_group(&BindGroupDescriptor { label: None, layout, entries: &[entry] })
    }

    fn layout(&self, writes: &[bool]) -> BindGroupLayout {
        let mut layouts = self.layouts.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = |(i, &write): (usize, &bool)| BindGroupLayoutEntry {
            binding: i as u32,
            visibility: ShaderStages::COMPUTE,
            ty: BindingType::Buffer {
                ty: BufferBindingType::Storage { read_only: !write },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        };
        let make = || {
            let entries: Vec<BindGroupLayoutEntry> = writes.iter().enumerate().map(entry).collect();
            self.device
                .create_bind_group_layout(&BindGroupLayoutDescriptor { label: None, entries: &entries })
        };
        layouts.entry(writes.to_vec()).or_insert_with(make).clone()
    }

    /// Until a submission has run. In a browser, where nothing may block, until all have that were made so far.
    pub async fn passed(&self, submission: SubmissionIndex) -> Result<(), DeviceError> {
        if cfg!(target_family = "wasm") {
            let (done, passed) = oneshot::channel();
            self.queue.on_submitted_work_done(|| _ = done.send(()));
            passed.await.map_err(|_| DeviceError::Lost("the GPU went silent".into()))?;
        }
        self.wait(Some(submission))
    }

    /// Waits for a submission, or for all; in a browser, for nothing.
    pub fn wait(&self, submission_index: Option<SubmissionIndex>) -> Result<(), DeviceError> {
        match self.device.poll(PollType::Wait { submission_index, timeout: None }) {
            Ok(_) => self.fine(),
            Err(error) => Err(DeviceError::Lost(error.to_string())),
        }
    }

    /// Runs what is due; waits, where the system can, up to `patience` for a submission.
    pub fn poll(&self, submission: Option<SubmissionIndex>, patience: Duration) -> Result<(), DeviceError> {
        let wait = PollType::Wait { submission_index: submission, timeout: Some(patience) };
        match self.device.poll(wait) {
            Ok(_) | Err(PollError::Timeout) => self.fine(),
            Err(error) => Err(DeviceError::Lost(error.to_string())),
        }
    }

    /// An error once the device is lost, or a command of ours was refused, which is a bug.
    pub fn fine(&self) -> Result<(), DeviceError> {
        match &self.trouble.lock().unwrap_or_else(PoisonError::into_inner).lost {
            Some(why) => Err(DeviceError::Lost(why.clone())),
            None => Ok(()),
        }
    }

    /// Bytes that a program may take: all of the GPU's own memory, as no interface tells what others have taken.
    pub fn memory_free(&self) -> u64 {
        self.memory.unwrap_or(4 << 30)
    }

    /// Whether memory ran out since this was last asked.
    pub fn ran_out(&self) -> bool {
        std::mem::take(&mut self.trouble.lock().unwrap_or_else(PoisonError::into_inner).memory)
    }
}

/// Remembers what goes wrong.
fn watch(device: &Device) -> Arc<Mutex<Trouble>> {
    let trouble = Arc::new(Mutex::new(Trouble::default()));
    let lost = trouble.clone();
    device.set_device_lost_callback(move |reason, message| {
        let mut trouble = lost.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.lost.get_or_insert(format!("{reason:?}: {message}"));
    });
    let failed = trouble.clone();
    device.on_uncaptured_error(Arc::new(move |error: Error| {
        let mut trouble = failed.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            Error::OutOfMemory { .. } => trouble.memory = true,
            other => {
                tracing::error!(error = %other, "the GPU refused a command");
                trouble.lost.get_or_insert(other.to_string());
            }
        }
    }));
    trouble
}

fn params_layout(device: &Device) -> BindGroupLayout {
    let entry = BindGroupLayoutEntry {
        binding: 0,
        visibility: ShaderStages::COMPUTE,
        ty: BindingType::Buffer {
            ty: BufferBindingType::Uniform,
            has_dynamic_offset: true,
            min_binding_size: BufferSize::new(16),
        },
        count: None,
    };
    device.create_bind_group_layout(&BindGroupLayoutDescriptor { label: None, entries: &[entry] })
}

/// Bytes of the GPU's own memory, which only Vulkan tells.
#[cfg(any(target_os = "linux", target_os = "windows", target_os = "android"))]
fn memory(adapter: &Adapter, info: &AdapterInfo) -> Option<u64> {
    if info.backend != Backend::Vulkan {
        return None;
    }
    // SAFETY: the handles are only read, and live as long as the adapter.
    unsafe {
        let vulkan = adapter.as_hal::<::wgpu::hal::api::Vulkan>()?;
        let instance = vulkan.shared_instance().raw_instance();
        let memory = instance.get_physical_device_memory_properties(vulkan.raw_physical_device());
        // Bit 0: DEVICE_LOCAL.
        memory
            .memory_heaps_as_slice()
            .iter()
            .filter(|heap| heap.flags.as_raw() & 1 != 0)
            .map(|heap| heap.size)
            .max()
    }
}

#[cfg(not(any(target_os = "linux", target_os = "windows", target_os = "android")))]
fn memory(_: &Adapter, _: &AdapterInfo) -> Option<u64> {
    None
}
