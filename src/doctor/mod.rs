//! What this machine is, whether it will do, and whether the kernels compute here what they should: `mmfp4 doctor`.
//!
//! ```no_run
//! use candle_mmfp4::doctor::{Options, examine};
//!
//! let report = examine(&Options::default(), |check| println!("{}: {}", check.name, check.found))?;
//! assert!(!report.is_wrong());
//! # Ok::<(), candle_mmfp4::Error>(())
//! ```

mod cases;
#[cfg(target_os = "macos")]
mod gpu;
mod machine;
pub mod requirements;
mod runner;
mod speed;

use crate::cpu::{Executor, Isa};
use crate::{Place, Result};
use requirements::Needs;
use runner::Runner;
use serde::Serialize;
use std::collections::BTreeMap;

/// What to examine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Whose kernels: [`Place::Auto`] means the CPU's and, on a Mac, the GPU's too; the others only their own.
    pub place: Place,
    /// The model that is to fit.
    pub model: Option<Needs>,
    /// Tokens that its cache is to hold.
    pub context: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            place: Place::Auto,
            model: None,
            context: requirements::CONTEXTS[0],
        }
    }
}

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
    pub numbers: BTreeMap<&'static str, f64>,
}

impl Check {
    /// Something that is as it should be.
    fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            status: Status::Ok,
            found: found.into(),
            advice: String::new(),
            numbers: BTreeMap::new(),
        }
    }

    /// The same, but otherwise.
    fn but(self, status: Status, advice: impl Into<String>) -> Self {
        Self {
            status,
            advice: advice.into(),
            ..self
        }
    }

    /// With a number.
    fn with(mut self, name: &'static str, value: f64) -> Self {
        self.numbers.insert(name, value);
        self
    }

    /// What could not be found out.
    fn failed(name: impl Into<String>, error: &dyn std::fmt::Display, advice: &str) -> Self {
        Self::ok(name, error.to_string()).but(Status::Wrong, advice)
    }
}

/// All that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// This crate's version.
    pub version: &'static str,
    /// In the order in which it was looked at.
    pub checks: Vec<Check>,
}

impl Report {
    /// The worst of all.
    pub fn status(&self) -> Status {
        let all = self.checks.iter().map(|check| check.status);
        all.max().unwrap_or(Status::Ok)
    }

    /// Whether anything is wrong.
    pub fn is_wrong(&self) -> bool {
        self.status() == Status::Wrong
    }
}

/// Looks at everything; `seen` is called with each check when it is done. Takes some seconds and some 300 MB of memory.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) without that memory. What is wrong with the machine is no error, but in the report.
pub fn examine(options: &Options, mut seen: impl FnMut(&Check)) -> Result<Report> {
    let mut checks = Vec::new();
    let mut add = |check: Check| {
        seen(&check);
        checks.push(check);
    };
    machine::look(options, &mut add)?;
    let data = speed::Data::new()?;
    if matches!(options.place, Place::Auto | Place::Cpu) {
        cpu(&data, &mut add);
    }
    match options.place {
        Place::Cpu => {}
        // There is no GPU that would be taken.
        Place::Auto if !cfg!(target_os = "macos") => {}
        place => match runner::of_place(place) {
            Ok(runner) => kernels(&runner, options, &data, &mut add),
            Err(error) => add(Check::failed("GPU", &error, runner::ADVICE)),
        },
    }
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        checks,
    })
}

/// The CPU's kernels, in each instruction set that this machine has.
fn cpu(data: &speed::Data, add: &mut dyn FnMut(Check)) {
    let threads = match Executor::current() {
        Ok(executor) => executor.threads(),
        Err(error) => {
            let advice = "unset MMFP4_CPU and MMFP4_THREADS, or give them other values";
            return add(Check::failed("CPU kernels", &error, advice));
        }
    };
    for isa in Isa::available().into_iter().rev() {
        match Executor::new(isa, threads) {
            Ok(executor) => {
                let runner = Runner::Cpu(executor);
                speed::first_call(&runner, add);
                cases::compare(&runner, add);
                speed::measure(&runner, data, add);
            }
            Err(error) => add(Check::failed(isa.name(), &error, "")),
        }
    }
}

/// Metal kernels.
fn kernels(runner: &Runner, options: &Options, data: &speed::Data, add: &mut dyn FnMut(Check)) {
    runner::describe(runner, options, add);
    speed::first_call(runner, add);
    runner::compile(runner, add);
    cases::compare(runner, add);
    speed::measure(runner, data, add);
}
