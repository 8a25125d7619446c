//! How much memory this process takes.

/// The most memory that this process has had resident, in bytes; `None` where the system does not tell.
///
/// Pages of mapped checkpoints count while they are resident.
pub fn peak_resident() -> Option<u64> {
    status("VmHWM:")
}

/// The memory that this process has resident now, in bytes; `None` where the system does not tell.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// A field of Linux' `/proc/self/status`, which counts in KiB.
#[cfg(target_os = "linux")]
fn status(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(not(target_os = "linux"))]
fn status(_: &str) -> Option<u64> {
    None
}
