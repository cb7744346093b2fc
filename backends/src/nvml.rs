//! What NVIDIA's GPUs draw, by their driver's management library (NVML), which is looked for at run time.
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

const NAMES: [&str; 3] = ["libnvidia-ml.so.1", "libnvidia-ml.so", "nvml.dll"];
/// GPUs that are asked, at most.
const GPUS_MAX: c_uint = 64;
const SUCCESS: c_int = 0;

type Handle = *mut c_void;

/// The library's functions, as `nvml.h` declares them.
struct Nvml {
    count: unsafe extern "C" fn(*mut c_uint) -> c_int,
    handle: unsafe extern "C" fn(c_uint, *mut Handle) -> c_int,
    name: unsafe extern "C" fn(Handle, *mut c_char, c_uint) -> c_int,
    power: unsafe extern "C" fn(Handle, *mut c_uint) -> c_int,
    /// The functions are there as long as it is.
    _library: libloading::Library,
}

impl Nvml {
    fn find() -> Option<Nvml> {
        // SAFETY: NVIDIA's library has no initialisers that could do harm, and the types are those of its header, whose
        // `_v2` functions never change.
        unsafe {
            let library = NAMES.iter().find_map(|name| libloading::Library::new(*name).ok())?;
            let init: libloading::Symbol<unsafe extern "C" fn() -> c_int> =
                library.get(b"nvmlInit_v2\0").ok()?;
            if init() != SUCCESS {
                return None;
            }
            Some(Nvml {
                count: *library.get(b"nvmlDeviceGetCount_v2\0").ok()?,
                handle: *library.get(b"nvmlDeviceGetHandleByIndex_v2\0").ok()?,
                name: *library.get(b"nvmlDeviceGetName\0").ok()?,
                power: *library.get(b"nvmlDeviceGetPowerUsage\0").ok()?,
                _library: library,
            })
        }
    }

    fn watts(&self, index: c_uint) -> Option<(String, f32)> {
        let (mut handle, mut milliwatts) = (std::ptr::null_mut(), 0);
        let mut name = [0 as c_char; 96];
        // SAFETY: the library is initialised; it writes to what it is given, no more than the length that it is told.
        let told = unsafe {
            (self.handle)(index, &mut handle) == SUCCESS
                && (self.power)(handle, &mut milliwatts) == SUCCESS
                && (self.name)(handle, name.as_mut_ptr(), name.len() as c_uint - 1) == SUCCESS
        };
        // SAFETY: it ends with the 0 that it began with, if not sooner.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        told.then(|| (format!("cuda:{index} {name}"), milliwatts as f32 / 1e3))
    }
}

/// Watts by GPU; nothing where there is none, or where it doesn't say.
pub fn power() -> Vec<(String, f32)> {
    static NVML: OnceLock<Option<Nvml>> = OnceLock::new();
    let Some(nvml) = NVML.get_or_init(Nvml::find) else { return Vec::new() };
    let mut count = 0;
    // SAFETY: it writes a number.
    if unsafe { (nvml.count)(&mut count) } != SUCCESS {
        return Vec::new();
    }
    (0..count.min(GPUS_MAX)).filter_map(|index| nvml.watts(index)).collect()
}
