//! Room on a disk.

use crate::{Error, Result};
use std::path::Path;

/// The free bytes of the disk that holds, or will hold, `folder`; None where the system does not say.
#[cfg(all(unix, feature = "hub"))]
pub(super) fn free_space(folder: &Path) -> Option<u64> {
    let existing = folder
        .ancestors()
        // The last ancestor of a relative path is empty, and means here.
        .map(|ancestor| {
            if ancestor.as_os_str().is_empty() {
                Path::new(".")
            } else {
                ancestor
            }
        })
        .find(|ancestor| ancestor.is_dir())?;
    let disk = rustix::fs::statvfs(existing).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

/// As on Unix, where `statvfs` tells (its crate comes with the feature `hub`); elsewhere nothing is known.
#[cfg(not(all(unix, feature = "hub")))]
pub(super) fn free_space(_folder: &Path) -> Option<u64> {
    None
}

/// Refuses to write `needed` bytes to `target` where fewer are known to be `free`.
pub(super) fn check_space(target: &Path, needed: u64, free: Option<u64>) -> Result<()> {
    match free {
        Some(free) if free < needed => Err(Error::DiskSpace {
            path: target.to_path_buf(),
            needed,
            free,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(all(unix, feature = "hub"))]
    fn free_space_is_known() {
        let folder = tempfile::tempdir().unwrap();
        for path in [&folder.path().join("not/made/yet"), Path::new("not-made-yet")] {
            let free = free_space(path).unwrap();
            assert!(free > 1 << 20, "{free}");
        }
    }

    #[test]
    fn too_little_room_is_refused_with_the_numbers() {
        let target = Path::new("there/model");
        let error = check_space(target, 1001, Some(1000)).unwrap_err().to_string();
        assert!(
            error.starts_with("there/model: 1001 bytes are needed, 1000 are free"),
            "{error}"
        );
        assert!(check_space(target, 1000, Some(1000)).is_ok());
        assert!(check_space(target, 1000, None).is_ok());
    }
}
