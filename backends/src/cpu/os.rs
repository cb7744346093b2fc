//! The only file of this device that asks the operating system for anything.
use std::alloc::Layout;

/// Free memory that a program may take, in bytes, within what its control groups allow; what can't be found out counts
/// as 4 GiB.
pub fn memory_free() -> u64 {
    #[cfg(target_os = "linux")]
    if let Ok(text) = std::fs::read_to_string("/proc/meminfo")
        && let Some(kib) = number_after(&text, "MemAvailable:")
    {
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        return group_free(&groups, |path| std::fs::read_to_string(path).ok()).min(kib * 1024);
    }
    4 << 30
}

#[cfg(target_os = "linux")]
fn number_after(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What the control groups of `/proc/self/cgroup` leave, by version 2's files or version 1's. Caches of files don't
/// count as taken. A group's own path may not be visible from within a container, which then is at the root.
#[cfg(target_os = "linux")]
fn group_free(groups: &str, read: impl Fn(&str) -> Option<String>) -> u64 {
    let left = |folder: String, names: [&str; 2], cache: &str| {
        let number = |name: &str| read(&format!("{folder}/{name}"))?.trim().parse::<u64>().ok();
        let (most, taken) = (number(names[0])?, number(names[1])?);
        let cached = read(&format!("{folder}/memory.stat")).and_then(|stat| number_after(&stat, cache));
        Some(most.saturating_sub(taken.saturating_sub(cached.unwrap_or(0))))
    };
    let found = groups.lines().flat_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (kinds, path) = (parts.next().unwrap_or(""), parts.next().unwrap_or("/").trim_end_matches('/'));
        let (root, names, cache) = match kinds {
            "" => ("/sys/fs/cgroup", ["memory.max", "memory.current"], "inactive_file "),
            _ if kinds.split(',').any(|kind| kind == "memory") => (
                "/sys/fs/cgroup/memory",
                ["memory.limit_in_bytes", "memory.usage_in_bytes"],
                "total_inactive_file ",
            ),
            _ => return None,
        };
        left(format!("{root}{path}"), names, cache).or_else(|| left(root.to_owned(), names, cache))
    });
    found.min().unwrap_or(u64::MAX)
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

#[cfg(target_os = "linux")]
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn control_groups_bound_memory() {
        let check = |groups: &str, files: &[(&str, &str)], expected: u64| {
            let read = |path: &str| Some(files.iter().find(|(name, _)| *name == path)?.1.to_owned());
            assert_eq!(group_free(groups, read), expected, "{groups}");
        };
        check("", &[], u64::MAX);
        check(
            "0::/\n",
            &[("/sys/fs/cgroup/memory.max", "max\n"), ("/sys/fs/cgroup/memory.current", "5\n")],
            u64::MAX,
        );
        let two = [
            ("/sys/fs/cgroup/a/b/memory.max", "1000\n"),
            ("/sys/fs/cgroup/a/b/memory.current", "700\n"),
            ("/sys/fs/cgroup/a/b/memory.stat", "anon 1\ninactive_file 400\nactive_file 9\n"),
        ];
        check("0::/a/b\n", &two, 700);
        let hidden = [
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "100"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "130"),
        ];
        check("5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n", &hidden, 0);
    }
}
