//! The system, the processor, memory, the environment.

mod environment;
mod facts;

use super::requirements::{CANDLE, MACOS, Needs, gb};
use super::{Check, Machine, Options, Status};
use crate::cpu::{Executor, Isa};
use crate::{Place, Result, memory};
use candle_core::DType;

pub(super) fn look(options: &Options, add: &mut dyn FnMut(Check)) -> Result<Machine> {
    let machine = Machine {
        os: std::env::consts::OS,
        os_version: facts::version(),
        architecture: std::env::consts::ARCH,
        processor: facts::processor(),
        physical_cores: num_cpus::get_physical(),
        memory_bytes: facts::memory(),
        available_bytes: memory::available(),
        gpu: None,
    };
    add(system(&machine));
    add(program());
    let cores = machine.physical_cores;
    add(
        Check::ok("processor", format!("{}, {cores} cores", machine.processor)).with("physical_cores", cores),
    );
    add(instructions());
    add(environment::check(environment::set()));
    add(has(machine.memory_bytes, machine.available_bytes));
    let needs = match &options.model {
        Some(needs) => needs.clone(),
        None => Needs::flash()?,
    };
    add(fits(
        &needs,
        options,
        machine.memory_bytes,
        cfg!(target_os = "macos"),
    )?);
    Ok(machine)
}

fn system(machine: &Machine) -> Check {
    let found = format!("{}, {}", facts::system(), machine.architecture);
    let check = Check::ok("system", found);
    match &machine.os_version {
        Some(version) if machine.os == "macos" => of_mac(check, version),
        _ => check,
    }
}

fn of_mac(check: Check, version: &str) -> Check {
    let major: Option<u32> = version.split('.').next().and_then(|text| text.parse().ok());
    match major.is_some_and(|major| major < MACOS) {
        true => check.but(
            Status::Wrong,
            format!(
                "the GPU needs macOS {MACOS} or newer: update the system, or compute on the CPU: --device cpu"
            ),
        ),
        false => check,
    }
}

fn program() -> Check {
    let mut features = Vec::new();
    for (name, on) in [
        ("hub", cfg!(feature = "hub")),
        ("cli", cfg!(feature = "cli")),
        ("msl-host", cfg!(msl_host)),
    ] {
        features.extend(on.then_some(name));
    }
    let found = format!(
        "candle-mmfp4 {}, written for Candle {CANDLE}; features: {}",
        env!("CARGO_PKG_VERSION"),
        features.join(", ")
    );
    let check = Check::ok("program", found);
    match cfg!(debug_assertions) {
        true => check.but(
            Status::Warning,
            "built without optimisation, many times slower: build with --release",
        ),
        false => check,
    }
}

fn instructions() -> Check {
    let name = "instructions";
    let executor = match Executor::current() {
        Ok(executor) => executor,
        Err(error) => {
            return Check::failed(name, &error, "correct the variable, or unset it");
        }
    };
    let others: Vec<_> = Isa::available()
        .into_iter()
        .filter(|isa| *isa != executor.isa())
        .map(Isa::name)
        .collect();
    let found = format!(
        "{} on {} threads; this processor also runs {}",
        executor.isa().name(),
        executor.threads(),
        match others.is_empty() {
            true => "nothing else".into(),
            false => others.join(", "),
        }
    );
    let check = Check::ok(name, found).with("threads", executor.threads());
    match executor.isa() {
        Isa::Reference => check.but(
            Status::Warning,
            "plain code, many times slower: the kernels want AVX2 and FMA, or on AArch64 dot product instructions; unset \
             MMFP4_CPU if that chose it",
        ),
        _ => check,
    }
}

fn has(total: Option<u64>, available: Option<u64>) -> Check {
    let say = |bytes: Option<u64>| bytes.map_or("unknown".into(), gb);
    let mut check = Check::ok(
        "memory",
        format!("{}, of which {} available", say(total), say(available)),
    );
    for (name, bytes) in [("total_bytes", total), ("available_bytes", available)] {
        if let Some(bytes) = bytes {
            check = check.with(name, bytes);
        }
    }
    check
}

/// Whether a model fits. For a Mac's GPU it has to: that cannot read it from files again and again, as the CPU can.
fn fits(needs: &Needs, options: &Options, total: Option<u64>, on_mac: bool) -> Result<Check> {
    let on_gpu = match options.place {
        Place::Metal => true,
        Place::Auto => on_mac,
        Place::Cpu | Place::MslHost => false,
    };
    // What a contiguous cache is of, as the activations are.
    let dtype = if on_gpu { DType::BF16 } else { DType::F32 };
    let (kind, tokens) = (options.kv_cache, needs.held(options.context));
    let bytes = needs.bytes(tokens, kind, dtype)?;
    let needed = bytes.saturating_add(Needs::BESIDE);
    let mut check = Check::ok(
        "memory for a model",
        format!(
            "{}: {} of weights, {} of cache ({kind}) for {tokens} tokens",
            needs.name,
            gb(needs.weights),
            gb(bytes - needs.weights),
        ),
    );
    check = check
        .with("weights_bytes", needs.weights)
        .with("cache_bytes_per_token", needs.cache_per_token(kind, dtype)?)
        .with("needed_bytes", needed);
    let Some(total) = total.filter(|total| *total < needed) else {
        return Ok(check);
    };
    let smaller = "take a smaller model (the demo model needs 0.1 GB) or a shorter context";
    let of_mac = |gib: u64| format!(", or a Mac with {gib} GB");
    Ok(match on_gpu {
        true => check.but(
            Status::Wrong,
            format!(
                "{} are too few for the GPU, the system's own share included: {smaller}{}; the CPU would compute, slowly: \
                 --device cpu",
                gb(total),
                Needs::smallest_mac(bytes).map_or(String::new(), of_mac)
            ),
        ),
        false => check.but(
            Status::Warning,
            format!(
                "{} are too few: weights would be read from disk again and again; {smaller}",
                gb(total)
            ),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::CacheKind;

    #[test]
    fn an_old_macos_is_wrong() {
        let status = |version: &str| of_mac(Check::ok("system", ""), version).status;
        assert_eq!(status("14.7.1"), Status::Wrong);
        assert_eq!(status("15.0"), Status::Ok);
        assert_eq!(status("26.1"), Status::Ok);
    }

    #[test]
    fn a_mac_of_16_gb_is_refused_with_advice() {
        let flash = Needs::flash().unwrap();
        let of = |gib: u64, place, context, on_mac| {
            let options = Options {
                place,
                context,
                ..Options::default()
            };
            fits(&flash, &options, Some(gib << 30), on_mac).unwrap()
        };
        for place in [Place::Auto, Place::Metal] {
            let refused = of(16, place, 8192, true);
            assert_eq!(refused.status, Status::Wrong);
            assert!(refused.advice.contains("a Mac with 24 GB"), "{}", refused.advice);
            for part in ["smaller model", "--device cpu"] {
                assert!(refused.advice.contains(part), "{}", refused.advice);
            }
            assert_eq!(of(24, place, 8192, true).status, Status::Ok);
            // More context, more memory: as much as the README says, the cache being in BF16.
            assert_eq!(of(24, place, 131_072, true).status, Status::Wrong);
            let fits = of(32, place, 131_072, true);
            assert_eq!(fits.status, Status::Ok);
            assert!(fits.found.contains("7.1 GB of cache (bf16)"), "{}", fits.found);
        }
    }

    #[test]
    fn a_cpu_with_too_little_memory_is_slow_and_no_more() {
        let flash = Needs::flash().unwrap();
        for (place, on_mac) in [
            (Place::Cpu, true),
            (Place::Cpu, false),
            (Place::Auto, false),
            (Place::MslHost, false),
        ] {
            let of = |kv_cache, total| {
                let options = Options {
                    place,
                    context: 131_072,
                    kv_cache,
                    ..Options::default()
                };
                fits(&flash, &options, total, on_mac).unwrap().status
            };
            let (contiguous, bf16) = (CacheKind::Contiguous, CacheKind::default());
            assert_eq!(of(bf16, Some(16 << 30)), Status::Warning);
            assert_eq!(of(bf16, Some(32 << 30)), Status::Ok);
            // In F32 there.
            assert_eq!(of(contiguous, Some(32 << 30)), Status::Warning);
            assert_eq!(of(contiguous, Some(36 << 30)), Status::Ok);
            assert_eq!(of(bf16, None), Status::Ok);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells() {
        assert!(facts::system().contains("Linux"), "{}", facts::system());
        assert!(!facts::processor().is_empty());
        assert!(facts::memory() > Some(1 << 28));
        assert!(facts::version().is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit())));
    }
}
