//! What a GPU is (macOS). Type-checked for the real target; not run yet.

use super::requirements::{ACTIVATIONS, APPLE_FAMILY, CacheFormat, Needs, gb};
use super::{Check, Options, Status};
use crate::metal::device::{Gpu, has_bfloat, has_simdgroup_matrices};
use candle_core::MetalDevice;

pub(super) fn describe(device: &MetalDevice, options: &Options, add: &mut dyn FnMut(Check)) {
    let gpu = Gpu::of(device);
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
    let check = Check::ok("GPU", found).with("apple_family", f64::from(gpu.family.unwrap_or(0)));
    add(match gpu.family >= Some(APPLE_FAMILY) {
        true => check,
        false => check.but(
            Status::Wrong,
            format!(
                "the kernels need family Apple{APPLE_FAMILY}, M1 or later; compute on the CPU: --device cpu"
            ),
        ),
    });
    for (name, found) in [
        ("GPU bfloat", has_bfloat(device)),
        ("GPU simdgroup matrices", has_simdgroup_matrices(device)),
    ] {
        add(match found {
            Ok(()) => Check::ok(name, "present"),
            Err(error) => Check::failed(name, &error, "compute on the CPU: --device cpu"),
        });
    }
    let Ok(needs) = options.model.clone().map_or_else(Needs::flash, Ok) else {
        return;
    };
    let bytes = needs.bytes(options.context, CacheFormat::Half) + ACTIVATIONS;
    let found = format!(
        "{} for the GPU; {} with {} tokens takes {}",
        gb(gpu.working_set),
        needs.name,
        options.context,
        gb(bytes)
    );
    let check = Check::ok("GPU memory", found)
        .with("recommended_working_set_bytes", gpu.working_set as f64)
        .with("needed_bytes", bytes as f64);
    add(match gpu.check(bytes) {
        Ok(()) => check,
        Err(error) => check.but(Status::Warning, error.to_string()),
    });
}
