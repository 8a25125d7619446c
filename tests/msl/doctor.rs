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
    let number = |name: &str, number: &str| {
        let name = format!("Metal on the host: {name}");
        let check = checks.iter().find(|check| check.name == name);
        check.unwrap_or_else(|| panic!("no {name}")).numbers[number]
    };
    assert!(number("compiling", "variants") >= 72.0);
    for family in ["linear", "per head"] {
        assert!(number(family, "nmse") <= number(family, "bound"));
    }
    assert!(number("bytes of linear, 1 row, F16", "planned_bytes") > 3e7);
}
