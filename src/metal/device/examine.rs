//! What a GPU is and can do.

use crate::Result;
use crate::metal::memory;
use candle_core::MetalDevice;
use candle_metal_kernels::metal::{Device, Library};
use objc2_metal::{MTLCompileOptions, MTLDevice as _, MTLGPUFamily, MTLLanguageVersion};

/// A GPU as Metal describes it; sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// The newest family of Apple's that it belongs to: 7 for M1, 8 for M2, and so on; `None` for other makers'.
    pub family: Option<u32>,
    /// What all buffers together should stay below.
    pub working_set: u64,
    /// The largest buffer.
    pub largest_buffer: u64,
    /// Threadgroup memory.
    pub threadgroup_memory: u64,
    /// Whether it shares its memory with the CPU.
    pub unified: bool,
}

impl Gpu {
    /// Asks Metal.
    pub fn of(device: &MetalDevice) -> Self {
        let raw = device.device().as_ref();
        // `MTLGPUFamilyApple1` is 1001; a family that this system's Metal does not know yet is not supported.
        let is_of = |family: &u32| raw.supportsFamily(MTLGPUFamily(1000 + *family as isize));
        Self {
            name: raw.name().to_string(),
            family: (1..=20).rev().find(is_of),
            working_set: raw.recommendedMaxWorkingSetSize(),
            largest_buffer: raw.maxBufferLength() as u64,
            threadgroup_memory: raw.maxThreadgroupMemoryLength() as u64,
            unified: raw.hasUnifiedMemory(),
        }
    }

    /// Whether so many bytes of weights and cache fit; see [`memory::check`].
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) with both numbers.
    pub fn check(&self, bytes: u64) -> Result<()> {
        memory::check(bytes, self.working_set)
    }
}

/// Whether the system's compiler has MSL's `bfloat`.
///
/// # Errors
/// What the compiler says.
pub fn has_bfloat(device: &MetalDevice) -> std::result::Result<(), String> {
    compiles(
        device.device(),
        "kernel void probe(device const bfloat *x, device bfloat *y) { y[0] = x[0] + x[1]; }",
    )
}

/// Whether the system's compiler and the GPU have matrices of a simdgroup.
///
/// # Errors
/// What the compiler says.
pub fn has_simdgroup_matrices(device: &MetalDevice) -> std::result::Result<(), String> {
    compiles(
        device.device(),
        "kernel void probe(device const float *x, device float *y) { simdgroup_float8x8 a, b, c(0); \
         simdgroup_load(a, x, 8); simdgroup_load(b, x, 8); simdgroup_multiply_accumulate(c, a, b, c); \
         simdgroup_store(c, y, 8); }",
    )
}

/// Makes a pipeline of a kernel named `probe`.
fn compiles(device: &Device, kernel: &str) -> std::result::Result<(), String> {
    let options = MTLCompileOptions::new();
    options.setLanguageVersion(MTLLanguageVersion::Version3_1);
    let text = format!("#include <metal_stdlib>\nusing namespace metal;\n{kernel}\n");
    let said = |error: candle_metal_kernels::MetalKernelError| error.to_string();
    let library: Library = device
        .new_library_with_source(&text, Some(&options))
        .map_err(said)?;
    let function = library.get_function("probe", None).map_err(said)?;
    device
        .new_compute_pipeline_state_with_function(&function)
        .map_err(said)?;
    Ok(())
}
