//! Environment variables: docs/environment.md has them all.

use crate::doctor::{Check, Status};

/// Variables that change what the kernels do, or how fast, begin so.
const LIVE: [&str; 6] = [
    "MMFP4_",
    "CANDLE_",
    "RAYON_",
    "MTL_",
    "METAL_",
    "MISTRALRS_FORCE_",
];

/// Those among them that check what the GPU does, and slow it down.
const DEBUGGING: [&str; 2] = ["MTL_DEBUG_LAYER", "MTL_SHADER_VALIDATION"];

/// Names from guides that nothing reads, and what stands in their place, if anything.
const DEAD: [(&str, &str); 18] = [
    ("MTL_SHADER_CACHE_SIZE", ""),
    ("METAL_DEVICE_DEBUG", "MTL_DEBUG_LAYER"),
    ("METAL_CAPTURE_ENABLED", "MTL_CAPTURE_ENABLED"),
    ("MTL_PREFER_DISCRETE_GPU", ""),
    ("METAL_DEBUG_MODE", "MTL_DEBUG_LAYER"),
    ("METAL_FORCE_COMPILE", ""),
    (
        "MTL_SHADER_VALIDATION_DETAILED_ERRORS",
        "MTL_SHADER_VALIDATION_REPORT_TO_STDERR",
    ),
    ("METAL_DEVICE_WRAPPER_TYPE", "MTL_DEBUG_LAYER"),
    ("METAL_DEBUG_ERROR_MODE", "MTL_DEBUG_LAYER_ERROR_MODE"),
    ("PYTORCH_MPS_DEBUG", ""),
    ("METAL_MARLIN_MODEL_PATH", "--model"),
    ("METAL_MARLIN_DEVICE", "--device"),
    ("METAL_MARLIN_MAX_BATCH_SIZE", ""),
    ("METAL_MARLIN_MAX_WAIT_MS", ""),
    ("METAL_MARLIN_MAX_SEQ_LEN", "--context"),
    ("METAL_MARLIN_QUANTIZED_KV", ""),
    ("METAL_MARLIN_STREAM_CHUNK_SIZE", ""),
    ("METAL_MARLIN_DEBUG", "-vv"),
];

/// A secret: its value is told nobody. It is dead as well.
const SECRET: &str = "METAL_MARLIN_API_KEY";

/// All that is set, names and values.
pub(super) fn set() -> Vec<(String, String)> {
    let all = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.into_string().ok()?;
        Some((name, value.to_string_lossy().into_owned()))
    });
    all.collect()
}

/// What of these matters to the kernels, and what was meant to.
pub(super) fn check(mut set: Vec<(String, String)>) -> Check {
    set.sort();
    let instead = |name: &str| match name {
        SECRET => Some(""),
        _ => DEAD
            .iter()
            .find(|(dead, _)| *dead == name)
            .map(|(_, instead)| *instead),
    };
    let (mut live, mut advice) = (Vec::new(), Vec::new());
    let mut slows = false;
    for (name, value) in set {
        match instead(&name) {
            Some("") => advice.push(format!("{name} does nothing")),
            Some(instead) => advice.push(format!("{name} does nothing: {instead} does")),
            None if LIVE.iter().any(|prefix| name.starts_with(prefix)) => {
                slows |= DEBUGGING.contains(&name.as_str()) && value != "0";
                live.push(format!("{name}={value}"));
            }
            None => {}
        }
    }
    if slows {
        advice.push("Metal's debugging slows every kernel down: unset it for speed".into());
    }
    let check = match live.is_empty() {
        true => Check::ok("environment", "nothing set that matters"),
        false => Check::ok("environment", live.join(" ")),
    };
    match advice.is_empty() {
        true => check,
        false => check.but(
            Status::Warning,
            format!("{} (docs/environment.md)", advice.join("; ")),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn of(name: &str, value: &str) -> Check {
        check(vec![(name.into(), value.into())])
    }

    #[test]
    fn what_slows_metal_down_is_named() {
        assert_eq!(of("MTL_SHADER_VALIDATION", "1").status, Status::Warning);
        assert_eq!(of("MTL_SHADER_VALIDATION", "0").status, Status::Ok);
        for name in ["MMFP4_THREADS", "MISTRALRS_FORCE_AVX2"] {
            let found = of(name, "2");
            assert_eq!((found.status, found.found), (Status::Ok, format!("{name}=2")));
        }
        assert_eq!(check(Vec::new()).found, "nothing set that matters");
        assert_eq!(of("EDITOR", "ed").found, "nothing set that matters");
    }

    #[test]
    fn what_does_nothing_is_no_setting() {
        let found = of("METAL_DEVICE_DEBUG", "1");
        assert_eq!(
            (found.status, found.found.as_str()),
            (Status::Warning, "nothing set that matters")
        );
        assert!(
            found
                .advice
                .starts_with("METAL_DEVICE_DEBUG does nothing: MTL_DEBUG_LAYER does"),
            "{}",
            found.advice
        );
        let secret = of(SECRET, "hunter2");
        assert_eq!(secret.status, Status::Warning);
        assert!(!format!("{secret:?}").contains("hunter2"));
    }

    /// The page's last part names them all.
    #[test]
    fn the_page_has_the_same_dead_names() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/environment.md");
        let page = std::fs::read_to_string(page).unwrap();
        let (_, dead) = page.split_once("## Of the Python original").unwrap();
        let rows = dead.lines().filter_map(|line| line.strip_prefix("| `"));
        let of_page: BTreeSet<&str> = rows
            .flat_map(|row| row.split(" |").next().unwrap_or_default().split(", "))
            .map(|name| name.trim_matches('`'))
            .collect();
        let ours = DEAD.iter().map(|(name, _)| *name).chain([SECRET]);
        assert_eq!(ours.collect::<BTreeSet<_>>(), of_page);
    }
}
