//! Whether a model fits a GPU's memory.

use crate::{Error, Result};

/// Checks that `needed` bytes of weights and cache fit the working set that the system recommends for the GPU.
///
/// # Errors
/// [`Error::Argument`] with both numbers, and how a Mac's owner lets the GPU have more.
pub fn check(needed: u64, recommended: u64) -> Result<()> {
    if needed <= recommended {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    // What the system keeps for the rest of its work.
    let limit = mib(needed) + 1024;
    let expected = format!(
        "at most {} MiB of weights and cache for the GPU",
        mib(recommended)
    );
    let found = format!(
        "{} MiB; take a shorter context, or, on a Mac that has that much memory, let the GPU have more of it until the \
         next start: sudo sysctl iogpu.wired_limit_mb={limit}",
        mib(needed)
    );
    Err(Error::argument("metal", "memory", expected, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_is_refused_with_a_way_out() {
        check(16 << 30, 16 << 30).unwrap();
        let error = check(17 << 30, 12 << 30).unwrap_err().to_string();
        for part in ["12288 MiB", "17408 MiB", "iogpu.wired_limit_mb=18432"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
