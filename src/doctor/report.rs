//! What was found.

use serde::Serialize;
use std::collections::BTreeMap;

/// How something was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// It works, but worse than it could.
    Warning,
    /// It does not work, or gives wrong results.
    Wrong,
}

/// A number behind what was found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Number {
    /// A count, or bytes.
    Whole(u64),
    /// A measurement.
    Measured(f64),
}

impl Number {
    /// As a measurement, whichever it is.
    pub fn value(self) -> f64 {
        match self {
            Self::Whole(count) => count as f64,
            Self::Measured(value) => value,
        }
    }
}

impl From<u64> for Number {
    fn from(count: u64) -> Self {
        Self::Whole(count)
    }
}

impl From<usize> for Number {
    fn from(count: usize) -> Self {
        Self::Whole(count as u64)
    }
}

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        Self::Measured(value)
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What it is.
    pub name: String,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it; empty where nothing is to be done.
    pub advice: String,
    /// The numbers behind `found`: `nmse` and `bound`, `gb_per_s`, `first_ms`, `later_ms`, sizes in bytes, …
    pub numbers: BTreeMap<&'static str, Number>,
}

impl Check {
    /// Something that is as it should be.
    pub(super) fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            status: Status::Ok,
            found: found.into(),
            advice: String::new(),
            numbers: BTreeMap::new(),
        }
    }

    /// The same, but otherwise.
    pub(super) fn but(self, status: Status, advice: impl Into<String>) -> Self {
        Self {
            status,
            advice: advice.into(),
            ..self
        }
    }

    /// With a number.
    pub(super) fn with(mut self, name: &'static str, value: impl Into<Number>) -> Self {
        self.numbers.insert(name, value.into());
        self
    }

    /// What could not be found out.
    pub(super) fn failed(name: impl Into<String>, error: &dyn std::fmt::Display, advice: &str) -> Self {
        Self::ok(name, error.to_string()).but(Status::Wrong, advice)
    }
}

/// What the machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// `linux`, `macos`, …
    pub os: &'static str,
    /// Of macOS, as in `15.1`, or of Linux.
    pub os_version: Option<String>,
    /// `x86_64`, `aarch64`, …
    pub architecture: &'static str,
    /// The processor's name.
    pub processor: String,
    /// Its cores.
    pub physical_cores: usize,
    /// Its memory.
    pub memory_bytes: Option<u64>,
    /// How much of it programs can still take.
    pub available_bytes: Option<u64>,
    /// The GPU, where it was examined.
    pub gpu: Option<Gpu>,
}

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// The newest family of Apple's that it belongs to.
    pub apple_family: Option<u32>,
    /// Whether its compiler has `bfloat`.
    pub bfloat: bool,
    /// Whether it has matrices of a simdgroup.
    pub simdgroup_matrices: bool,
    /// What all buffers together should stay below.
    pub working_set_bytes: u64,
    /// The largest buffer.
    pub largest_buffer_bytes: u64,
    /// Threadgroup memory.
    pub threadgroup_memory_bytes: u64,
    /// Whether it shares its memory with the CPU.
    pub unified_memory: bool,
}

/// All that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// This crate's version.
    pub version: &'static str,
    /// The worst of all checks.
    pub status: Status,
    /// The machine.
    pub machine: Machine,
    /// In the order in which it was looked at.
    pub checks: Vec<Check>,
}

impl Report {
    pub(super) fn new(machine: Machine, checks: Vec<Check>) -> Self {
        let all = checks.iter().map(|check| check.status);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            status: all.max().unwrap_or(Status::Ok),
            machine,
            checks,
        }
    }

    /// Whether anything is wrong.
    pub fn is_wrong(&self) -> bool {
        self.status == Status::Wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_whole_numbers_and_the_worst_check_is_the_status() {
        let machine = Machine {
            os: "macos",
            os_version: Some("15.1".into()),
            architecture: "aarch64",
            processor: "Apple M1".into(),
            physical_cores: 8,
            memory_bytes: Some(17_179_869_184),
            available_bytes: None,
            gpu: None,
        };
        let good = Check::ok("a", "b").with("cases", 18_usize).with("nmse", 2.0);
        let status = |checks| Report::new(machine.clone(), checks).status;
        assert_eq!(status(Vec::new()), Status::Ok);
        let slow = good.clone().but(Status::Warning, "c");
        assert_eq!(status(vec![slow.clone(), good.clone()]), Status::Warning);
        let report = Report::new(machine.clone(), vec![good, Check::failed("d", &"e", "f"), slow]);
        assert!(report.is_wrong());
        let json = serde_json::to_string(&report).unwrap();
        for part in [
            r#""status":"wrong","machine":{"os":"macos","os_version":"15.1","#,
            r#""memory_bytes":17179869184,"#,
            r#""numbers":{"cases":18,"nmse":2.0}"#,
        ] {
            assert!(json.contains(part), "{part}: {json}");
        }
    }
}
