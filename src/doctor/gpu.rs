//! What a GPU is (macOS). Type-checked for the real target; not run yet.

use super::requirements::{APPLE_FAMILY, Needs, gb};
use super::{Check, Gpu, Options, Status};
use crate::Result;
use crate::metal::device::{self, has_bfloat, has_simdgroup_matrices};
use candle_core::{DType, MetalDevice};

pub(super) fn describe(device: &MetalDevice, options: &Options, add: &mut dyn FnMut(Check)) -> Gpu {
    let gpu = device::Gpu::of(device);
    let family = gpu.family.map_or("none of Apple's families".into(), |family| {
        format!("family Apple{family}")
    });
    let found = format!(
        "{}, {family}, {} memory; largest buffer {}, threadgroup memory {} KiB",
        gpu.name,
        if gpu.unified { "unified" } else { "its own" },
        gb(gpu.largest_buffer),
        gpu.threadgroup_memory >> 10,
    );
    let check = Check::ok("GPU", found);
    add(match gpu.family >= Some(APPLE_FAMILY) {
        true => check,
        false => check.but(
            Status::Wrong,
            format!(
                "the kernels need family Apple{APPLE_FAMILY}, M1 or later; compute on the CPU: --device cpu"
            ),
        ),
    });
    let mut present = |name, found: Result<(), String>| {
        add(match &found {
            Ok(()) => Check::ok(name, "present"),
            Err(error) => Check::failed(name, error, "compute on the CPU: --device cpu"),
        });
        found.is_ok()
    };
    let described = Gpu {
        bfloat: present("GPU bfloat", has_bfloat(device)),
        simdgroup_matrices: present("GPU simdgroup matrices", has_simdgroup_matrices(device)),
        name: gpu.name.clone(),
        apple_family: gpu.family,
        working_set_bytes: gpu.working_set,
        largest_buffer_bytes: gpu.largest_buffer,
        threadgroup_memory_bytes: gpu.threadgroup_memory,
        unified_memory: gpu.unified,
    };
    let checked = options
        .model
        .clone()
        .map_or_else(Needs::flash, Ok)
        .and_then(|needs| memory(&gpu, &needs, options));
    add(checked.unwrap_or_else(|error| Check::failed("GPU memory", &error, "")));
    described
}

/// Whether loading the model would be refused.
fn memory(gpu: &device::Gpu, needs: &Needs, options: &Options) -> Result<Check> {
    let bytes = needs.bytes(options.context, options.kv_cache, DType::BF16)?;
    let found = format!(
        "{} for the GPU; {} with {} tokens takes {}",
        gb(gpu.working_set),
        needs.name,
        needs.held(options.context),
        gb(bytes)
    );
    let check = Check::ok("GPU memory", found)
        .with("recommended_working_set_bytes", gpu.working_set)
        .with("needed_bytes", bytes);
    Ok(match gpu.check(bytes) {
        Ok(()) => check,
        Err(error) => check.but(Status::Wrong, error.to_string()),
    })
}
