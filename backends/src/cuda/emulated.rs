//! What [`super::driver`] offers, for tests where there is no GPU: the same kernels, built for this processor by its C++
//! compiler. Memory is the process' own, and everything happens before the call returns, except that a kernel which may
//! start early is held until the next call: it begins before the one ahead of it runs.
use super::forms::Chip;
use crate::program::DeviceError;
use std::cell::RefCell;
use std::ffi::c_void;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

fn lost(what: impl std::fmt::Display) -> DeviceError {
    DeviceError::Lost(what.to_string())
}

/// This processor, as if it were an H100 of few multiprocessors, so that each has several units of a product to do.
pub struct Gpu {
    pub index: usize,
    pub name: String,
    pub capability: u32,
    pub chip: Chip,
}

impl Gpu {
    pub fn count() -> Result<usize, String> {
        Ok(1)
    }

    pub fn open(index: usize) -> Result<Gpu, DeviceError> {
        let name = "emulated GPU".into();
        Ok(Gpu { index, name, capability: 90, chip: Chip { shared: 227 << 10, processors: 3 } })
    }

    pub fn enter(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    pub fn memory(&self) -> Result<(u64, u64), DeviceError> {
        Ok((4 << 30, 4 << 30))
    }
}

/// Memory.
pub struct Buffer {
    pub at: u64,
    pub bytes: usize,
    layout: std::alloc::Layout,
}

impl Buffer {
    pub fn zeroed(_: &Arc<Gpu>, bytes: usize, _: &Stream) -> Result<Buffer, DeviceError> {
        let layout = std::alloc::Layout::from_size_align(bytes.max(256), 256).map_err(lost)?;
        // SAFETY: the size isn't 0.
        let at = unsafe { std::alloc::alloc_zeroed(layout) };
        if at.is_null() { Err(lost("no memory")) } else { Ok(Buffer { at: at as u64, bytes, layout }) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.at as *mut u8, self.layout) };
    }
}

/// Memory that both sides know.
pub struct Pinned {
    pub host: *mut u8,
    pub at: u64,
    pub bytes: usize,
    _memory: Buffer,
}

// SAFETY: plain memory.
unsafe impl Send for Pinned {}

impl Pinned {
    pub fn zeroed(gpu: &Arc<Gpu>, bytes: usize) -> Result<Pinned, DeviceError> {
        let memory = Buffer::zeroed(gpu, bytes, &Stream::new(gpu)?)?;
        Ok(Pinned { host: memory.at as *mut u8, at: memory.at, bytes, _memory: memory })
    }

    pub fn unset(gpu: &Arc<Gpu>, bytes: usize) -> Result<Pinned, DeviceError> {
        Pinned::zeroed(gpu, bytes)
    }

    pub fn words(&mut self, n: usize) -> &mut [u32] {
        assert!(4 * n <= self.bytes);
        // SAFETY: that long and aligned.
        unsafe { std::slice::from_raw_parts_mut(self.host.cast(), n) }
    }

    pub fn word(&self, i: usize) -> u32 {
        assert!(4 * i < self.bytes);
        // SAFETY: inside, aligned.
        unsafe { self.host.cast::<u32>().add(i).read_volatile() }
    }
}

type Begin = unsafe extern "C" fn(*const i32, i32, usize, *const c_void, usize, bool) -> *mut c_void;
type End = unsafe extern "C" fn(*mut c_void);

/// A launch to come: its kernel and what it is given.
#[derive(Clone)]
struct Call {
    begin: Begin,
    end: End,
    grid: [i32; 3],
    threads: usize,
    shared: usize,
    early: bool,
    args: Vec<u8>,
}

/// Begins and ends launches in order.
pub struct Stream {
    /// What has begun and not ended.
    held: RefCell<Option<(*mut c_void, End)>>,
    /// Calls of a capture under way.
    captured: RefCell<Option<Vec<Call>>>,
}

// SAFETY: used by one thread at a time.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new(_: &Arc<Gpu>) -> Result<Stream, DeviceError> {
        Ok(Stream { held: RefCell::new(None), captured: RefCell::new(None) })
    }

    pub fn wait(&self) -> Result<(), DeviceError> {
        if let Some((launch, end)) = self.held.borrow_mut().take() {
            // SAFETY: begun once, ended once, its module alive.
            unsafe { end(launch) };
        }
        Ok(())
    }

    pub fn done(&self) -> Result<bool, DeviceError> {
        self.wait().map(|()| true)
    }

    pub unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), DeviceError> {
        self.wait()?;
        // SAFETY: the caller's contract.
        unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, bytes) };
        Ok(())
    }

    pub fn copy(&self, to: &Buffer, from: &Buffer, bytes: usize) -> Result<(), DeviceError> {
        assert!(bytes <= to.bytes && bytes <= from.bytes);
        // SAFETY: both are that long.
        unsafe { self.upload(to.at, from.at as *const u8, bytes) }
    }

    pub fn download(&self, to: &mut [f32], from: u64) -> Result<(), DeviceError> {
        self.wait()?;
        // SAFETY: the caller names a place that holds as much.
        unsafe { std::ptr::copy_nonoverlapping(from as *const f32, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    pub fn fill(&self, buffer: &Buffer, byte: u8) -> Result<(), DeviceError> {
        self.wait()?;
        // SAFETY: all of the buffer.
        unsafe { std::ptr::write_bytes(buffer.at as *mut u8, byte, buffer.bytes) };
        Ok(())
    }

    pub unsafe fn set(&self, at: u64, word: u32) -> Result<(), DeviceError> {
        self.wait()?;
        // SAFETY: the caller's contract.
        unsafe { *(at as *mut u32) = word };
        Ok(())
    }

    pub fn capture(&self, record: impl FnOnce() -> Result<(), DeviceError>) -> Result<Graph, DeviceError> {
        self.wait()?;
        *self.captured.borrow_mut() = Some(Vec::new());
        let recorded = record();
        let calls = self.captured.borrow_mut().take().unwrap_or_default();
        recorded.map(|()| Graph { calls })
    }

    pub fn replay(&self, graph: &Graph) -> Result<(), DeviceError> {
        graph.calls.iter().try_for_each(|call| self.call(call))?;
        self.wait()
    }

    pub unsafe fn launch<T: Copy>(
        &self,
        kernel: &Kernel,
        grid: [usize; 3],
        args: &T,
    ) -> Result<(), DeviceError> {
        if grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: plain memory of that size.
        let bytes =
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(args).cast::<u8>(), size_of::<T>()) };
        let call = Call {
            begin: kernel.begin,
            end: kernel.end,
            grid: grid.map(|n| n as i32),
            threads: kernel.threads,
            shared: kernel.shared,
            early: kernel.early,
            args: bytes.to_vec(),
        };
        if let Some(calls) = &mut *self.captured.borrow_mut() {
            calls.push(call);
            return Ok(());
        }
        self.call(&call)
    }

    fn call(&self, c: &Call) -> Result<(), DeviceError> {
        if !c.early {
            self.wait()?;
        }
        // SAFETY: the symbol has this type; arguments are as the kernel takes them, which it checks by size.
        let launch = unsafe {
            (c.begin)(
                c.grid.as_ptr(),
                c.threads as i32,
                c.shared,
                c.args.as_ptr().cast(),
                c.args.len(),
                c.early,
            )
        };
        // the one ahead ends now, after this one has begun
        self.wait()?;
        *self.held.borrow_mut() = Some((launch, c.end));
        if c.early { Ok(()) } else { self.wait() }
    }
}

/// Calls that are replayed together.
pub struct Graph {
    calls: Vec<Call>,
}

/// Compiled kernels.
pub struct Module {
    library: libloading::Library,
}

impl Module {
    pub fn load(_: &Arc<Gpu>, library: &[u8]) -> Result<Arc<Module>, DeviceError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("weir-{}-{}.so", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, library).map_err(lost)?;
        // SAFETY: built from our own source; it has no initialisers to speak of.
        let library = unsafe { libloading::Library::new(&path) }.map_err(lost);
        std::fs::remove_file(&path).map_err(lost)?;
        Ok(Arc::new(Module { library: library? }))
    }

    pub fn kernel(
        self: &Arc<Module>,
        name: &str,
        threads: usize,
        shared: usize,
        early: bool,
    ) -> Result<Kernel, DeviceError> {
        // SAFETY: every kernel has these two functions.
        unsafe {
            let begin = self.library.get::<Begin>(format!("{name}_begin\0").as_bytes()).map_err(lost)?;
            let end = self.library.get::<End>(format!("{name}_end\0").as_bytes()).map_err(lost)?;
            Ok(Kernel { begin: *begin, end: *end, threads, shared, early, _module: self.clone() })
        }
    }
}

/// One kernel, and how it is launched.
pub struct Kernel {
    begin: Begin,
    end: End,
    threads: usize,
    shared: usize,
    early: bool,
    _module: Arc<Module>,
}

/// The C++ compiler.
pub struct Compiler {
    pub version: (i32, i32),
}

impl Compiler {
    pub fn find() -> Result<Compiler, String> {
        let found = Command::new("c++").arg("--version").output();
        match found {
            Ok(output) if output.status.success() => Ok(Compiler { version: (0, 2) }),
            _ => Err(
                "the emulator needs a C++ compiler: `apt-get install -y g++`, or your system's like of it"
                    .into(),
            ),
        }
    }

    pub fn compile(&self, source: &str, capability: u32) -> Result<Vec<u8>, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("weir-{}-source-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let base = std::env::temp_dir().join(name);
        let (from, to) = (base.with_extension("cpp"), base.with_extension("so"));
        std::fs::write(&from, source).map_err(|e| e.to_string())?;
        let output = Command::new("c++")
            .args([
                "-std=c++20",
                "-O1",
                "-w",
                "-fPIC",
                "-shared",
                "-ffp-contract=off",
                "-fno-strict-aliasing",
                "-mf16c",
            ])
            .arg(format!("-D__CUDA_ARCH__={}", capability * 10))
            .arg(&from)
            .arg("-o")
            .arg(&to)
            .output()
            .map_err(|e| e.to_string());
        let bytes = std::fs::read(&to);
        _ = std::fs::remove_file(&from);
        _ = std::fs::remove_file(&to);
        let output = output?;
        if output.status.success() {
            bytes.map_err(|e| e.to_string())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}
