//! `mmfp4 doctor` over the Metal kernels: all are there, agree with the reference, and move the bytes that it counts.

use crate::backend::available;
use candle_mmfp4::Place;
use candle_mmfp4::doctor::{Check, Options, Status, examine};

#[test]
fn the_doctor_finds_nothing_wrong() {
    if !available() {
        return;
    }
    let options = Options {
        place: Place::MslHost,
        ..Options::default()
    };
    let report = examine(&options, |_| ()).unwrap();
    let checks: Vec<&Check> = report
        .checks
        .iter()
        .filter(|check| check.name.starts_with("Metal on the host"))
        .collect();
    for check in &checks {
        assert_eq!(check.status, Status::Ok, "{check:?}");
    }
    assert!(report.machine.gpu.is_none());
    let number = |name: &str, number: &str| {
        let name = format!("Metal on the host: {name}");
        let check = checks.iter().find(|check| check.name == name);
        let check = check.unwrap_or_else(|| panic!("no {name}"));
        let number = check.numbers.get(number);
        number
            .unwrap_or_else(|| panic!("no such number: {check:?}"))
            .value()
    };
    assert!(number("compiling", "variants") >= 200.0);
    // By kernels, not by the CPU in their place.
    for family in [
        "linear",
        "linear, floating point",
        "joined linear",
        "normed linear",
        "per head",
        "per head, floating point",
        "merged per head",
        "MLP",
        "mixture of experts",
        "routing",
        "RMS norm",
        "addition",
        "RoPE",
        "latent rows",
        "paged attention",
        "tokens of a paged cache",
        "storing in a paged cache",
    ] {
        assert!(number(family, "nmse") <= number(family, "bound"));
        assert!(number(family, "launches") >= 18.0, "{family}");
    }
    assert!(number("attention", "cases") >= 18.0);
    assert!(number("work of linear, 1 row, F16", "planned") > 3e7);
    assert!(number("work of mixture of experts, 512 tokens, F16", "planned") > 4e10);
}
