//! NVIDIA's driver and its run-time compiler, behind a few types that free what they hold. Nothing here is linked:
//! both libraries are looked for when the program runs.
use super::forms::Chip;
use crate::program::DeviceError;
use cudarc::driver::sys::{self, CUresult};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::Arc;

/// An error of the driver, as a device that is gone: none of them can be recovered from.
pub fn check(what: &str, result: CUresult) -> Result<(), DeviceError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the string is the driver's and lives as long as the library.
    let why = unsafe {
        sys::cuGetErrorString(result, &mut text);
        if text.is_null() { "unknown error".into() } else { CStr::from_ptr(text).to_string_lossy() }
    };
    Err(DeviceError::Lost(format!("{what}: {why}")))
}

/// One GPU.
pub struct Gpu {
    context: sys::CUcontext,
    ordinal: sys::CUdevice,
    pub index: usize,
    pub name: String,
    /// Compute capability: 90 is 9.0.
    pub capability: u32,
    pub chip: Chip,
}

// SAFETY: a context may be made current on any thread; the driver locks.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// GPUs of this machine.
    ///
    /// # Errors
    /// Why there are none, for a person.
    pub fn count() -> Result<usize, String> {
        // SAFETY: calls without preconditions; the library is there where the first says so.
        unsafe {
            if !sys::is_culib_present() {
                return Err("NVIDIA's driver isn't installed (libcuda was not found)".into());
            }
            check("cuInit", sys::cuInit(0)).map_err(|e| e.to_string())?;
            let mut n = 0;
            check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut n)).map_err(|e| e.to_string())?;
            Ok(n.max(0) as usize)
        }
    }

    /// Opens a GPU; call [`Gpu::count`] first.
    pub fn open(index: usize) -> Result<Gpu, DeviceError> {
        // SAFETY: out-pointers are to locals; the driver checks the index.
        unsafe {
            let mut ordinal = 0;
            check("cuDeviceGet", sys::cuDeviceGet(&mut ordinal, index as c_int))?;
            let mut name = [0 as c_char; 128];
            check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), 127, ordinal))?;
            let attribute = |a| {
                let mut v = 0;
                check("cuDeviceGetAttribute", sys::cuDeviceGetAttribute(&mut v, a, ordinal))
                    .map(|()| v as u32)
            };
            use sys::CUdevice_attribute as A;
            let capability = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
                + attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let processors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            let shared = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
            let mut context = std::ptr::null_mut();
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, ordinal))?;
            Ok(Gpu {
                context,
                ordinal,
                index,
                name: CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned(),
                capability,
                chip: Chip { shared: shared as usize, processors: processors as usize },
            })
        }
    }

    /// Makes it this thread's.
    pub fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as `self`.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Bytes of memory: free, in all.
    pub fn memory(&self) -> Result<(u64, u64), DeviceError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: out-pointers to locals.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: retained once, released once.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.ordinal) };
    }
}

/// Memory of a GPU.
pub struct Buffer {
    pub at: u64,
    pub bytes: usize,
    gpu: Arc<Gpu>,
}

impl Buffer {
    /// Zeroed memory, on 256 bytes.
    pub fn zeroed(gpu: &Arc<Gpu>, bytes: usize, stream: &Stream) -> Result<Buffer, DeviceError> {
        let bytes = bytes.max(256);
        let mut at = 0;
        // SAFETY: the context is current; the memory is this buffer's.
        unsafe {
            check(&format!("{} MiB of GPU memory", bytes >> 20), sys::cuMemAlloc_v2(&mut at, bytes))?;
            let buffer = Buffer { at, bytes, gpu: gpu.clone() };
            check("cuMemsetD8Async", sys::cuMemsetD8Async(at, 0, bytes, stream.raw))?;
            Ok(buffer)
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: allocated once; its users have been waited for by the program's drop.
            unsafe { sys::cuMemFree_v2(self.at) };
        }
    }
}

/// Host memory that the GPU reads and writes.
pub struct Pinned {
    pub host: *mut u8,
    /// Its address on the GPU.
    pub at: u64,
    pub bytes: usize,
    gpu: Arc<Gpu>,
}

// SAFETY: plain memory; the program that owns it is driven by one thread.
unsafe impl Send for Pinned {}

impl Pinned {
    pub fn zeroed(gpu: &Arc<Gpu>, bytes: usize) -> Result<Pinned, DeviceError> {
        let pinned = Pinned::unset(gpu, bytes)?;
        // SAFETY: the memory is `bytes` long.
        unsafe { std::ptr::write_bytes(pinned.host, 0, bytes) };
        Ok(pinned)
    }

    /// With whatever is in it, for what is written before it is read.
    pub fn unset(gpu: &Arc<Gpu>, bytes: usize) -> Result<Pinned, DeviceError> {
        let mut host = std::ptr::null_mut();
        let mut at = 0;
        // SAFETY: out-pointers to locals.
        unsafe {
            let mapped = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
            check("pinned memory", sys::cuMemHostAlloc(&mut host, bytes, mapped))?;
            check("mapped memory", sys::cuMemHostGetDevicePointer_v2(&mut at, host, 0))?;
        }
        Ok(Pinned { host: host.cast(), at, bytes, gpu: gpu.clone() })
    }

    /// The first `n` words.
    pub fn words(&mut self, n: usize) -> &mut [u32] {
        assert!(4 * n <= self.bytes);
        // SAFETY: the memory is that long and aligned to pages; the GPU isn't writing what the host does.
        unsafe { std::slice::from_raw_parts_mut(self.host.cast(), n) }
    }

    /// A word that the GPU may write at any time.
    pub fn word(&self, i: usize) -> u32 {
        assert!(4 * i < self.bytes);
        // SAFETY: inside, aligned.
        unsafe { self.host.cast::<u32>().add(i).read_volatile() }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: allocated once.
            unsafe { sys::cuMemFreeHost(self.host.cast()) };
        }
    }
}

/// A queue of work. Copies and kernels run in order.
pub struct Stream {
    raw: sys::CUstream,
    gpu: Arc<Gpu>,
}

// SAFETY: used by one thread at a time.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Stream, DeviceError> {
        gpu.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: out-pointer to a local; 1 is CU_STREAM_NON_BLOCKING.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, 1) })?;
        Ok(Stream { raw, gpu: gpu.clone() })
    }

    pub fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream is alive.
        check("the GPU", unsafe { sys::cuStreamSynchronize(self.raw) })
    }

    /// Whether all is done; an error of the GPU shows here too.
    pub fn done(&self) -> Result<bool, DeviceError> {
        // SAFETY: the stream is alive.
        match unsafe { sys::cuStreamQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check("the GPU", other).map(|()| true),
        }
    }

    /// To the GPU. Pinned memory must stay as it is until the copy is done; other memory is read before this returns.
    ///
    /// # Safety
    /// `to` has room for it.
    pub unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's contract.
        check("a copy to the GPU", unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.raw) })
    }

    /// Within the GPU.
    pub fn copy(&self, to: &Buffer, from: &Buffer, bytes: usize) -> Result<(), DeviceError> {
        assert!(bytes <= to.bytes && bytes <= from.bytes);
        // SAFETY: both are that long.
        check("a copy in the GPU", unsafe { sys::cuMemcpyDtoDAsync_v2(to.at, from.at, bytes, self.raw) })
    }

    /// From the GPU; waits for it.
    pub fn download(&self, to: &mut [f32], from: u64) -> Result<(), DeviceError> {
        let bytes = size_of_val(to);
        // SAFETY: `to` has room, and is not touched before the wait is over.
        unsafe {
            check(
                "a copy from the GPU",
                sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, bytes, self.raw),
            )?;
        }
        self.wait()
    }

    /// Sets every byte.
    pub fn fill(&self, buffer: &Buffer, byte: u8) -> Result<(), DeviceError> {
        // SAFETY: all of the buffer.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(buffer.at, byte, buffer.bytes, self.raw) })
    }

    /// Sets one word.
    ///
    /// # Safety
    /// `at` is a word of a buffer.
    pub unsafe fn set(&self, at: u64, word: u32) -> Result<(), DeviceError> {
        // SAFETY: the caller's contract.
        check("cuMemsetD32Async", unsafe { sys::cuMemsetD32Async(at, word, 1, self.raw) })
    }

    /// Everything that `record` launches, as a graph.
    pub fn capture(&self, record: impl FnOnce() -> Result<(), DeviceError>) -> Result<Graph, DeviceError> {
        // SAFETY: begin and end are paired on this stream, out-pointers are to locals.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            check("cuStreamBeginCapture", sys::cuStreamBeginCapture_v2(self.raw, mode))?;
            let recorded = record();
            let mut graph = std::ptr::null_mut();
            let ended = sys::cuStreamEndCapture(self.raw, &mut graph);
            recorded?;
            check("cuStreamEndCapture", ended)?;
            let mut raw = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&mut raw, graph, 0);
            sys::cuGraphDestroy(graph);
            check("cuGraphInstantiate", made)?;
            check("cuGraphUpload", sys::cuGraphUpload(raw, self.raw))?;
            Ok(Graph { raw, gpu: self.gpu.clone() })
        }
    }

    pub fn replay(&self, graph: &Graph) -> Result<(), DeviceError> {
        // SAFETY: both are alive.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.raw, self.raw) })
    }

    /// Launches `kernel` with its one argument, a `repr(C)` structure.
    ///
    /// # Safety
    /// `args` is what the kernel takes, and what it points to is there until it is done.
    pub unsafe fn launch<T: Copy>(
        &self,
        kernel: &Kernel,
        grid: [usize; 3],
        args: &T,
    ) -> Result<(), DeviceError> {
        if grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: attribute and configuration are locals that outlive the call; the rest is the caller's contract.
        unsafe {
            let mut attribute: sys::CUlaunchAttribute = std::mem::zeroed();
            attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attribute.value.programmaticStreamSerializationAllowed = 1;
            let config = sys::CUlaunchConfig {
                gridDimX: grid[0] as u32,
                gridDimY: grid[1] as u32,
                gridDimZ: grid[2] as u32,
                blockDimX: kernel.threads as u32,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: kernel.shared as u32,
                hStream: self.raw,
                attrs: &mut attribute,
                numAttrs: u32::from(kernel.early),
            };
            let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
            let launched =
                sys::cuLaunchKernelEx(&config, kernel.raw, params.as_mut_ptr(), std::ptr::null_mut());
            check(&kernel.name, launched)
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: created once; destruction waits for nothing, which is the program's task.
            unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// Launches that are replayed together.
pub struct Graph {
    raw: sys::CUgraphExec,
    gpu: Arc<Gpu>,
}

// SAFETY: used by one thread at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: instantiated once.
            unsafe { sys::cuGraphExecDestroy(self.raw) };
        }
    }
}

/// Compiled kernels.
pub struct Module {
    raw: sys::CUmodule,
    gpu: Arc<Gpu>,
}

// SAFETY: modules are the context's; the driver locks.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    pub fn load(gpu: &Arc<Gpu>, cubin: &[u8]) -> Result<Arc<Module>, DeviceError> {
        gpu.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the image is whole; the driver checks it.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut raw, cubin.as_ptr().cast()) })?;
        Ok(Arc::new(Module { raw, gpu: gpu.clone() }))
    }

    /// A kernel of `threads` threads a block and `shared` bytes of dynamic shared memory. `early`: it may be started
    /// before the kernel ahead of it is done, and waits for it itself.
    pub fn kernel(
        self: &Arc<Module>,
        name: &str,
        threads: usize,
        shared: usize,
        early: bool,
    ) -> Result<Kernel, DeviceError> {
        let c_name = CString::new(name).map_err(|_| DeviceError::Unsupported(name.to_owned()))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the module is alive, out-pointers are to locals.
        unsafe {
            check(name, sys::cuModuleGetFunction(&mut raw, self.raw, c_name.as_ptr()))?;
            if shared > 48 << 10 {
                let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                check(name, sys::cuFuncSetAttribute(raw, most, shared as c_int))?;
            }
        }
        let early = early && self.gpu.capability >= 90;
        Ok(Kernel { raw, threads, shared, early, name: name.to_owned(), _module: self.clone() })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: loaded once; kernels hold the module.
            unsafe { sys::cuModuleUnload(self.raw) };
        }
    }
}

/// One kernel, and how it is launched.
pub struct Kernel {
    raw: sys::CUfunction,
    threads: usize,
    shared: usize,
    early: bool,
    name: String,
    _module: Arc<Module>,
}

// SAFETY: functions are the module's and never change.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

type NvrtcProgram = *mut c_void;
type Compile = unsafe extern "C" fn(NvrtcProgram, c_int, *const *const c_char) -> c_int;
type Create = unsafe extern "C" fn(
    *mut NvrtcProgram,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Size = unsafe extern "C" fn(NvrtcProgram, *mut usize) -> c_int;
type Fill = unsafe extern "C" fn(NvrtcProgram, *mut c_char) -> c_int;

/// NVIDIA's run-time compiler.
pub struct Compiler {
    library: libloading::Library,
    /// Its version, part of the names of cached kernels.
    pub version: (c_int, c_int),
}

impl Compiler {
    /// Looks where the system looks, then where CUDA is usually installed.
    ///
    /// # Errors
    /// What to install.
    pub fn find() -> Result<Compiler, String> {
        let names =
            ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];
        let mut folders = vec![PathBuf::new()];
        for variable in ["CUDA_HOME", "CUDA_PATH"] {
            if let Some(root) = std::env::var_os(variable).map(PathBuf::from) {
                folders.extend([root.join("lib64"), root.join("bin")]);
            }
        }
        folders.push("/usr/local/cuda/lib64".into());
        for path in folders.iter().flat_map(|folder| names.map(|name| folder.join(name))) {
            // SAFETY: a library of that name is NVIDIA's; its initialisers have no preconditions.
            let Ok(library) = (unsafe { libloading::Library::new(&path) }) else { continue };
            let mut version = (0, 0);
            type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
            // SAFETY: the symbol has this type in every version.
            let known = unsafe {
                library.get::<Version>(b"nvrtcVersion\0").map(|f| f(&mut version.0, &mut version.1))
            };
            if matches!(known, Ok(0)) {
                return Ok(Compiler { library, version });
            }
        }
        Err("NVIDIA's run-time compiler isn't installed (libnvrtc was not found); install the CUDA toolkit, or the \
             package nvidia-cuda-nvrtc and put its folder on the library path"
            .into())
    }

    fn symbol<T: Copy>(&self, name: &str) -> Result<T, String> {
        // SAFETY: the types above are those of nvrtc.h.
        unsafe { self.library.get::<T>(name.as_bytes()).map(|s| *s).map_err(|e| e.to_string()) }
    }

    /// Machine code for `capability` (90: 9.0) from CUDA C++ source.
    pub fn compile(&self, source: &str, capability: u32) -> Result<Vec<u8>, String> {
        let create: Create = self.symbol("nvrtcCreateProgram\0")?;
        let compile: Compile = self.symbol("nvrtcCompileProgram\0")?;
        let log_size: Size = self.symbol("nvrtcGetProgramLogSize\0")?;
        let log: Fill = self.symbol("nvrtcGetProgramLog\0")?;
        let size: Size = self.symbol("nvrtcGetCUBINSize\0")?;
        let fill: Fill = self.symbol("nvrtcGetCUBIN\0")?;
        let destroy: unsafe extern "C" fn(*mut NvrtcProgram) -> c_int =
            self.symbol("nvrtcDestroyProgram\0")?;
        let source = CString::new(source).map_err(|e| e.to_string())?;
        // instructions of Hopper alone
        let own = if capability == 90 { "a" } else { "" };
        let options =
            [format!("--gpu-architecture=sm_{capability}{own}"), "--fmad=false".into(), "--std=c++17".into()]
                .map(|o| CString::new(o).unwrap_or_default());
        let pointers = options.each_ref().map(|o| o.as_ptr());
        let mut program = std::ptr::null_mut();
        // SAFETY: strings outlive the calls, buffers are as long as the library said.
        unsafe {
            let name = c"weir.cu".as_ptr();
            if create(&mut program, source.as_ptr(), name, 0, std::ptr::null(), std::ptr::null()) != 0 {
                return Err("nvrtcCreateProgram failed".into());
            }
            let failed = compile(program, pointers.len() as c_int, pointers.as_ptr()) != 0;
            let mut n = 0;
            let mut bytes;
            if failed {
                log_size(program, &mut n);
                bytes = vec![0u8; n];
                log(program, bytes.as_mut_ptr().cast());
            } else {
                size(program, &mut n);
                bytes = vec![0u8; n];
                fill(program, bytes.as_mut_ptr().cast());
            }
            destroy(&mut program);
            if failed { Err(String::from_utf8_lossy(&bytes).into_owned()) } else { Ok(bytes) }
        }
    }
}
