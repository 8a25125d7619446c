//! The Metal kernels over the grid of shapes, against the plain reference: on Linux compiled for the host from the
//! unmodified `.metal` files (feature `msl-host`), on macOS by the GPU.
//!
//! ```sh
//! cargo test --release --features msl-host --test msl                         # some minutes
//! MMFP4_MSL_FULL=1 cargo test --release --features msl-host --test msl        # everything, by hand: some more minutes
//! cargo test --release --features msl-host --test msl -- --ignored faults     # seeded faults: docs/metal-faults.md
//! MMFP4_MSL_FAULTS=append,merged cargo test …  -- --ignored faults            # those of these files, the other rows staying
//! ```
//!
//! Without clang 17 or newer it says that it is skipped; with `MMFP4_MSL_REQUIRED=1` that is a failure.

mod append;
mod backend;
#[cfg(target_os = "linux")]
mod checks;
#[path = "../common/mod.rs"]
mod common;
mod dense;
#[cfg(target_os = "linux")]
mod doctor;
#[cfg(target_os = "linux")]
mod families;
#[cfg(target_os = "linux")]
mod faults;
#[cfg(target_os = "linux")]
mod gpu_works;
mod grid;
mod linear;
mod merged;
mod model;
mod moe;
mod norm_rope;
mod paged;
mod paged_model;
#[cfg(target_os = "linux")]
mod runner;
#[cfg(target_os = "linux")]
mod token;

pub use common::{noise, values};

/// Whether everything is to run.
pub fn full() -> bool {
    std::env::var_os("MMFP4_MSL_FULL").is_some()
}

/// What rounding explains, as normalised mean-square error.
pub fn bound(dtype: candle_core::DType) -> f64 {
    match dtype {
        candle_core::DType::F16 => 3e-7,
        candle_core::DType::BF16 => 1e-5,
        _ => 1e-9,
    }
}

/// `Σ (a - e)² / Σ e²`; NaN counts as infinite, but for one that is expected.
pub fn nmse(actual: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let square = |v: f64| v * v;
    let other = |(a, e): &(&f32, &f32)| !(a.is_nan() && e.is_nan());
    let pairs = || actual.iter().zip(expected).filter(other);
    let error: f64 = pairs().map(|(a, e)| square(f64::from(*a) - f64::from(*e))).sum();
    let norm: f64 = pairs().map(|(_, e)| square(f64::from(*e))).sum();
    match error {
        0.0 => 0.0,
        _ if error.is_nan() => f64::INFINITY,
        _ => error / norm,
    }
}
