//! The system, the processor, memory, the environment.

mod facts;

use super::requirements::{CANDLE, CacheFormat, MACOS, Needs, gb};
use super::{Check, Options, Status};
use crate::cpu::{Executor, Isa};
use crate::{Result, memory};

/// Variables that change what the kernels do, or how fast, begin so.
const VARIABLES: [&str; 5] = ["MMFP4_", "CANDLE_", "RAYON_", "MTL_", "METAL_"];

/// Those among them that check what the GPU does, and slow it down.
const DEBUGGING: [&str; 2] = ["MTL_DEBUG_LAYER", "MTL_SHADER_VALIDATION"];

pub(super) fn look(options: &Options, add: &mut dyn FnMut(Check)) -> Result<()> {
    add(system());
    add(program());
    let cores = num_cpus::get_physical();
    add(
        Check::ok("processor", format!("{}, {cores} cores", facts::processor()))
            .with("physical_cores", cores as f64),
    );
    add(instructions());
    let set = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.into_string().ok()?;
        let value = value.to_string_lossy().into_owned();
        let matters = VARIABLES.iter().any(|prefix| name.starts_with(prefix));
        matters.then_some((name, value))
    });
    add(environment(set.collect()));
    let (total, available) = (facts::memory(), memory::available().or_else(facts::available));
    add(has(total, available));
    let needs = match &options.model {
        Some(needs) => needs.clone(),
        None => Needs::flash()?,
    };
    add(fits(&needs, options, total, cfg!(target_os = "macos")));
    Ok(())
}

fn system() -> Check {
    let check = Check::ok(
        "system",
        format!("{}, {}", facts::system(), std::env::consts::ARCH),
    );
    match facts::macos() {
        Some(version) => of_mac(check, &version),
        None => check,
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
        "candle-mmfp4 {} for Candle {CANDLE}; features: {}",
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
    let check = Check::ok(name, found).with("threads", executor.threads() as f64);
    match executor.isa() {
        Isa::Reference => check.but(
            Status::Warning,
            "plain code, many times slower: the kernels want AVX2 and FMA, or on AArch64 dot product instructions; unset \
             MMFP4_CPU if that chose it",
        ),
        _ => check,
    }
}

fn environment(mut set: Vec<(String, String)>) -> Check {
    set.sort();
    let slows = set
        .iter()
        .any(|(name, value)| DEBUGGING.contains(&name.as_str()) && value != "0");
    let all: Vec<_> = set
        .into_iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let check = match all.is_empty() {
        true => Check::ok("environment", "nothing set that matters"),
        false => Check::ok("environment", all.join(" ")),
    };
    match slows {
        true => check.but(
            Status::Warning,
            "Metal's debugging slows every kernel down: unset it for speed (docs/environment.md)",
        ),
        false => check,
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
            check = check.with(name, bytes as f64);
        }
    }
    check
}

/// Whether a model fits. On a Mac it has to: the GPU's memory cannot be read from files again and again, as the CPU's can.
fn fits(needs: &Needs, options: &Options, total: Option<u64>, on_mac: bool) -> Check {
    let (tokens, format) = (options.context, CacheFormat::F32);
    let mut check = Check::ok(
        "memory for a model",
        format!(
            "{}: {} of weights, {} of cache for {tokens} tokens",
            needs.name,
            gb(needs.weights),
            gb(needs.bytes(tokens, format) - needs.weights),
        ),
    );
    check = check
        .with("weights_bytes", needs.weights as f64)
        .with("cache_bytes_per_token", needs.cache_per_token(format) as f64)
        .with("needed_bytes", needs.of_mac(tokens, format) as f64);
    let Some(total) = total.filter(|total| *total < needs.of_mac(tokens, format)) else {
        return check;
    };
    let smaller = "take a smaller model (the demo model needs 0.1 GB) or a shorter context";
    let of_mac = |gib: u64| format!(", or a Mac with {gib} GB");
    match on_mac {
        true => check.but(
            Status::Wrong,
            format!(
                "{} are too few, the system's own share included: {smaller}{}",
                gb(total),
                needs.smallest_mac(tokens, format).map_or(String::new(), of_mac)
            ),
        ),
        false => check.but(
            Status::Warning,
            format!(
                "{} are too few: weights would be read from disk again and again; {smaller}",
                gb(total)
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_macos_is_wrong() {
        let status = |version: &str| of_mac(Check::ok("system", ""), version).status;
        assert_eq!(status("14.7.1"), Status::Wrong);
        assert_eq!(status("15.0"), Status::Ok);
        assert_eq!(status("26.1"), Status::Ok);
    }

    #[test]
    fn a_mac_of_16_gb_is_refused_with_advice() {
        let (flash, options) = (Needs::flash().unwrap(), Options::default());
        let of = |gib: u64, on_mac| fits(&flash, &options, Some(gib << 30), on_mac);
        let refused = of(16, true);
        assert_eq!(refused.status, Status::Wrong);
        assert!(refused.advice.contains("a Mac with 24 GB"), "{}", refused.advice);
        assert!(refused.advice.contains("smaller model"));
        assert_eq!(of(24, true).status, Status::Ok);
        assert_eq!(of(16, false).status, Status::Warning);
        assert_eq!(fits(&flash, &options, None, true).status, Status::Ok);
        // More context, more memory.
        let long = Options {
            context: 131_072,
            ..Options::default()
        };
        assert_eq!(fits(&flash, &long, Some(24 << 30), true).status, Status::Wrong);
    }

    #[test]
    fn what_slows_metal_down_is_named() {
        let of = |name: &str, value: &str| environment(vec![(name.into(), value.into())]);
        assert_eq!(of("MTL_SHADER_VALIDATION", "1").status, Status::Warning);
        assert_eq!(of("MTL_SHADER_VALIDATION", "0").status, Status::Ok);
        let found = of("MMFP4_THREADS", "2");
        assert_eq!(
            (found.status, found.found.as_str()),
            (Status::Ok, "MMFP4_THREADS=2")
        );
        assert_eq!(environment(Vec::new()).found, "nothing set that matters");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells() {
        assert!(facts::system().contains("Linux"), "{}", facts::system());
        assert!(!facts::processor().is_empty());
        assert!(facts::memory() > Some(1 << 28));
        assert_eq!(facts::macos(), None);
    }
}
