//! What the system tells of itself.

#[cfg(target_os = "linux")]
pub(super) use of_linux::*;
#[cfg(target_os = "macos")]
pub(super) use of_macos::*;
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
pub(super) use unknown::*;

#[cfg(target_os = "linux")]
mod of_linux {
    use std::fs::read_to_string;

    /// `Debian GNU/Linux 12 (bookworm), Linux 6.1.0`.
    pub fn system() -> String {
        let release = read_to_string("/etc/os-release").unwrap_or_default();
        let name = release
            .lines()
            .find_map(|line| line.strip_prefix("PRETTY_NAME="))
            .map(|name| format!("{}, ", name.trim_matches('"')));
        let kernel = version().unwrap_or_default();
        format!("{}Linux {kernel}", name.unwrap_or_default())
    }

    /// The kernel's.
    pub fn version() -> Option<String> {
        let version = read_to_string("/proc/sys/kernel/osrelease").ok()?;
        Some(version.trim().to_string())
    }

    /// The first processor's name; AArch64 has numbers in its place.
    pub fn processor() -> String {
        let text = read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_once(':').map(|(_, value)| value.trim().to_string())
        };
        let numbers = || {
            let (maker, part) = (field("CPU implementer")?, field("CPU part")?);
            Some(format!("implementer {maker}, part {part}"))
        };
        field("model name")
            .or_else(numbers)
            .unwrap_or_else(|| "unknown".into())
    }

    /// Bytes.
    pub fn memory() -> Option<u64> {
        let text = read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    }
}

/// Type-checked for the real target; not run yet.
#[cfg(target_os = "macos")]
mod of_macos {
    use std::ffi::CStr;

    /// `macOS 15.1 (24B83), MacBookPro18,3`.
    pub fn system() -> String {
        let text = |name| text(name).unwrap_or_else(|| "unknown".into());
        format!(
            "macOS {} ({}), {}",
            text(c"kern.osproductversion"),
            text(c"kern.osversion"),
            text(c"hw.model")
        )
    }

    /// `15.1`.
    pub fn version() -> Option<String> {
        text(c"kern.osproductversion")
    }

    pub fn processor() -> String {
        text(c"machdep.cpu.brand_string").unwrap_or_else(|| "unknown".into())
    }

    /// Bytes.
    pub fn memory() -> Option<u64> {
        let mut value = [0; size_of::<u64>()];
        (read(c"hw.memsize", &mut value)? == value.len()).then(|| u64::from_ne_bytes(value))
    }

    fn text(name: &CStr) -> Option<String> {
        let mut value = [0; 256];
        let len = read(name, &mut value)?;
        let text = CStr::from_bytes_until_nul(&value[..len]).ok()?;
        Some(text.to_string_lossy().into_owned())
    }

    /// A value of the system's by name; gives its length.
    fn read(name: &CStr, value: &mut [u8]) -> Option<usize> {
        let mut len = value.len();
        // SAFETY: the name ends with a zero; `len` says how much room there is, and is set to what was written.
        let status = unsafe {
            libc::sysctlbyname(
                name.as_ptr(),
                value.as_mut_ptr().cast(),
                &mut len,
                std::ptr::null_mut(),
                0,
            )
        };
        (status == 0).then_some(len)
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod unknown {
    pub fn system() -> String {
        std::env::consts::OS.into()
    }

    pub fn version() -> Option<String> {
        None
    }

    pub fn processor() -> String {
        "unknown".into()
    }

    pub fn memory() -> Option<u64> {
        None
    }
}
