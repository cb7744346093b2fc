//! The only file of this device that asks the operating system for anything.
use std::alloc::Layout;

/// Free memory that a program may take, in bytes; what can't be found out counts as 4 GiB.
pub fn memory_free() -> u64 {
    #[cfg(target_os = "linux")]
    if let Ok(text) = std::fs::read_to_string("/proc/meminfo")
        && let Some(line) = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))
        && let Some(kib) = line.split_whitespace().next().and_then(|n| n.parse::<u64>().ok())
    {
        return kib * 1024;
    }
    4 << 30
}

/// What the processor calls itself.
pub fn processor() -> String {
    #[cfg(target_os = "linux")]
    if let Ok(text) = std::fs::read_to_string("/proc/cpuinfo")
        && let Some(name) = text.lines().find(|l| l.starts_with("model name"))
        && let Some((_, name)) = name.split_once(':')
    {
        return name.trim().to_owned();
    }
    std::env::consts::ARCH.to_owned()
}

/// Processors that this process may run on, as found before any thread was pinned; empty where that can't be found
/// out.
pub fn processors() -> &'static [usize] {
    static FOUND: std::sync::OnceLock<Vec<usize>> = std::sync::OnceLock::new();
    FOUND.get_or_init(allowed)
}

/// Processors that the calling thread may run on now; empty where that can't be found out.
#[cfg(target_os = "linux")]
pub fn allowed() -> Vec<usize> {
    // SAFETY: an all-zero set is a valid set; the call writes at most its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return Vec::new();
        }
        set
    };
    // SAFETY: the index is below the set's size.
    (0..libc::CPU_SETSIZE as usize).filter(|&i| unsafe { libc::CPU_ISSET(i, &set) }).collect()
}

/// Processors that the calling thread may run on now; empty where that can't be found out.
#[cfg(not(target_os = "linux"))]
pub fn allowed() -> Vec<usize> {
    Vec::new()
}

/// Keeps the calling thread on these processors, where the system lets it. A thread inherits its maker's set, so one
/// that may roam has to be told so too.
pub fn pin(processors: &[usize]) {
    #[cfg(target_os = "linux")]
    // SAFETY: an all-zero set is a valid set; the indices are below its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for &p in processors.iter().filter(|&&p| p < libc::CPU_SETSIZE as usize) {
            libc::CPU_SET(p, &mut set);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = processors;
}

/// Zeroed bytes, aligned for vectors and, if large, for huge pages. Pages take memory once they are touched.
pub struct Bytes {
    at: *mut u8,
    len: usize,
    mapped: bool,
}

// SAFETY: plain owned memory; who writes what when is the program's affair.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

const HUGE: usize = 2 << 20;
const ALIGN: usize = 64;

impl Bytes {
    /// None where the system has no room.
    pub fn zeroed(len: usize) -> Option<Bytes> {
        let len = len.max(1).checked_next_multiple_of(ALIGN)?;
        #[cfg(target_os = "linux")]
        if len >= HUGE {
            // SAFETY: a fresh private mapping of nothing else; the ends outside the aligned part are given back at once.
            unsafe {
                let room = len.checked_add(HUGE)?.next_multiple_of(4096);
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                let at =
                    libc::mmap(std::ptr::null_mut(), room, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
                if at == libc::MAP_FAILED {
                    return None;
                }
                let at = at.cast::<u8>();
                let before = at.align_offset(HUGE);
                let kept = len.next_multiple_of(4096);
                if before > 0 {
                    libc::munmap(at.cast(), before);
                }
                if room > before + kept {
                    libc::munmap(at.add(before + kept).cast(), room - before - kept);
                }
                let at = at.add(before);
                libc::madvise(at.cast(), kept, libc::MADV_HUGEPAGE);
                return Some(Bytes { at, len, mapped: true });
            }
        }
        let layout = Layout::from_size_align(len, ALIGN).ok()?;
        // SAFETY: the layout has a size.
        let at = unsafe { std::alloc::alloc_zeroed(layout) };
        (!at.is_null()).then_some(Bytes { at, len, mapped: false })
    }

    /// The first byte.
    pub fn ptr(&self) -> *mut u8 {
        self.at
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: mapped, or allocated with this layout, by `zeroed`.
        unsafe {
            if self.mapped {
                #[cfg(target_os = "linux")]
                libc::munmap(self.at.cast(), self.len.next_multiple_of(4096));
            } else {
                std::alloc::dealloc(self.at, Layout::from_size_align_unchecked(self.len, ALIGN));
            }
        }
    }
}
