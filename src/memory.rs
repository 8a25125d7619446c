//! How much memory this process takes, and when it grew.

use candle_core::Device;
use std::fmt;

/// The most memory that this process has had resident, in bytes; `None` where the system does not tell.
///
/// Pages of mapped checkpoints count while they are resident. Known on Linux and on macOS (what is for macOS has
/// neither been compiled nor run there by the authors yet).
pub fn peak_resident() -> Option<u64> {
    system::peak_resident()
}

/// The memory that this process has resident now, in bytes; `None` where the system does not tell.
pub fn resident() -> Option<u64> {
    system::resident()
}

/// The memory that is this process's own, in bytes: what is resident without the pages of mapped files, which the
/// system can drop and read again. Known on Linux; `None` elsewhere.
pub fn private_resident() -> Option<u64> {
    system::private_resident()
}

/// The memory that a program can still take, in bytes, the pages of files that the system holds included: `MemAvailable`
/// on Linux; pages that are free or inactive on macOS (type-checked for it, not run there yet); `None` elsewhere.
pub fn available() -> Option<u64> {
    system::available()
}

/// The bytes that Candle has allocated on a Metal device, as Metal counts them; `None` on any other device.
/// (Written against Candle's interface, not yet run on a Mac by the authors.)
pub fn device_allocated(device: &Device) -> Option<u64> {
    #[cfg(target_os = "macos")]
    if let Device::Metal(metal) = device {
        return u64::try_from(metal.metal_device().current_allocated_size()).ok();
    }
    let _ = device;
    None
}

/// Memory at several moments, each under a name.
///
/// ```
/// use candle_core::Device;
/// use candle_mmfp4::memory::MemoryLog;
///
/// let mut log = MemoryLog::new(&Device::Cpu);
/// log.record("start");
/// let table = vec![1u8; 32 << 20];
/// log.record("a table");
/// println!("{log}");
/// assert_eq!(log.entries().len(), 2);
/// # drop(table);
/// ```
#[derive(Debug, Clone)]
pub struct MemoryLog {
    device: Device,
    entries: Vec<MemoryEntry>,
}

/// One line of a [`MemoryLog`]; sizes in bytes, `None` where they are not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryEntry {
    /// What had just happened.
    pub tag: String,
    /// See [`resident`].
    pub resident: Option<u64>,
    /// See [`peak_resident`].
    pub peak: Option<u64>,
    /// See [`device_allocated`].
    pub device: Option<u64>,
}

impl MemoryLog {
    /// An empty log that also watches `device`.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            entries: Vec::new(),
        }
    }

    /// Adds a line with the memory as it is now.
    pub fn record(&mut self, tag: impl Into<String>) {
        self.entries.push(MemoryEntry {
            tag: tag.into(),
            resident: resident(),
            peak: peak_resident(),
            device: device_allocated(&self.device),
        });
    }

    /// The lines so far.
    pub fn entries(&self) -> &[MemoryEntry] {
        &self.entries
    }
}

/// A table; a column that nothing is known of is left out.
impl fmt::Display for MemoryLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        type Column = (&'static str, fn(&MemoryEntry) -> Option<u64>);
        let columns: [Column; 3] = [
            ("resident", |entry| entry.resident),
            ("peak", |entry| entry.peak),
            ("Metal", |entry| entry.device),
        ];
        let columns = columns.map(|column| {
            self.entries
                .iter()
                .any(|e| column.1(e).is_some())
                .then_some(column)
        });
        let widest = self.entries.iter().map(|entry| entry.tag.chars().count()).max();
        // A width is no more than 16 bits; nobody reads a table that wide.
        let width = widest.unwrap_or(0).clamp("memory".len(), 80);
        write!(f, "{:width$}", "memory")?;
        for (name, _) in columns.iter().flatten() {
            write!(f, "  {name:>12}")?;
        }
        for entry in &self.entries {
            write!(f, "\n{:width$}", entry.tag)?;
            for (_, value) in columns.iter().flatten() {
                let mib = |bytes| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
                write!(f, "  {:>12}", value(entry).map_or("unknown".into(), mib))?;
            }
        }
        Ok(())
    }
}

#[cfg(target_os = "linux")]
mod system {
    pub fn peak_resident() -> Option<u64> {
        status("VmHWM:")
    }

    pub fn resident() -> Option<u64> {
        status("VmRSS:")
    }

    pub fn private_resident() -> Option<u64> {
        status("RssAnon:")
    }

    pub fn available() -> Option<u64> {
        field("/proc/meminfo", "MemAvailable:")
    }

    fn status(name: &str) -> Option<u64> {
        field("/proc/self/status", name)
    }

    /// A field of one of the system's files that count in KiB.
    fn field(file: &str, field: &str) -> Option<u64> {
        let status = std::fs::read_to_string(file).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    }
}

#[cfg(target_os = "macos")]
mod system {
    use std::mem::MaybeUninit;

    pub fn peak_resident() -> Option<u64> {
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: `getrusage` writes one `rusage` through a pointer to room for one.
        let status = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
        // SAFETY: `rusage` consists of integers, for which the zeros it began with are valid.
        let usage = unsafe { usage.assume_init() };
        // Bytes here, unlike Linux' KiB.
        (status == 0)
            .then(|| u64::try_from(usage.ru_maxrss).ok())
            .flatten()
    }

    pub fn resident() -> Option<u64> {
        let mut usage = MaybeUninit::<libc::rusage_info_v0>::zeroed();
        let pid = i32::try_from(std::process::id()).ok()?;
        // SAFETY: with this flavour `proc_pid_rusage` writes one `rusage_info_v0`, for which there is room.
        let status = unsafe { libc::proc_pid_rusage(pid, libc::RUSAGE_INFO_V0, usage.as_mut_ptr().cast()) };
        // SAFETY: `rusage_info_v0` consists of integers, for which the zeros it began with are valid.
        let usage = unsafe { usage.assume_init() };
        (status == 0).then_some(usage.ri_resident_size)
    }

    pub fn private_resident() -> Option<u64> {
        None
    }

    /// Bytes of pages that are free, or that the system can free at once.
    pub fn available() -> Option<u64> {
        let mut statistics = MaybeUninit::<libc::vm_statistics64>::zeroed();
        let mut count = libc::HOST_VM_INFO64_COUNT;
        // SAFETY: `count` says how many integers there is room for behind the pointer; the port is this process's own.
        let status = unsafe {
            #[allow(deprecated, reason = "libc wants another crate used, for this one call")]
            let host = libc::mach_host_self();
            libc::host_statistics64(
                host,
                libc::HOST_VM_INFO64,
                statistics.as_mut_ptr().cast(),
                &mut count,
            )
        };
        // SAFETY: it consists of integers, for which the zeros it began with are valid.
        let statistics = unsafe { statistics.assume_init() };
        // SAFETY: no pointers are involved.
        let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
        let pages = u64::from(statistics.free_count) + u64::from(statistics.inactive_count);
        (status == libc::KERN_SUCCESS).then(|| pages * page)
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod system {
    pub fn peak_resident() -> Option<u64> {
        None
    }

    pub fn resident() -> Option<u64> {
        None
    }

    pub fn private_resident() -> Option<u64> {
        None
    }

    pub fn available() -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_of_any_length_is_shown() {
        let mut log = MemoryLog::new(&Device::Cpu);
        log.record("x".repeat(70_000));
        assert!(log.to_string().contains(&"x".repeat(70_000)));
    }

    #[test]
    fn the_table_leaves_out_what_nobody_knows() {
        let entry = |tag: &str, resident, device| MemoryEntry {
            tag: tag.into(),
            resident,
            peak: None,
            device,
        };
        let mut log = MemoryLog::new(&Device::Cpu);
        log.entries = vec![
            entry("load", Some(3 << 19), None),
            entry("a longer tag", Some(1 << 30), Some(1 << 20)),
        ];
        let expected = "\
memory            resident         Metal
load               1.5 MiB       unknown
a longer tag    1024.0 MiB       1.0 MiB";
        assert_eq!(log.to_string(), expected);
    }
}
