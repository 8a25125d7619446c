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
pub mod contexts;
#[cfg(target_os = "macos")]
mod gpu;
mod machine;
mod report;
pub mod requirements;
mod runner;
mod speed;

pub use report::{Check, Gpu, Machine, Number, Report, Status};

use crate::cpu::{Executor, Isa};
use crate::kv::CacheKind;
use crate::{Place, Result};
use requirements::Needs;
use runner::Runner;

/// What to examine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Whose kernels: [`Place::Auto`] means the CPU's and, on a Mac, the GPU's too; the others only their own.
    pub place: Place,
    /// The model that is to fit.
    pub model: Option<Needs>,
    /// Tokens that its cache is to hold.
    pub context: usize,
    /// Which cache.
    pub kv_cache: CacheKind,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            place: Place::Auto,
            model: None,
            context: requirements::CONTEXTS[0],
            kv_cache: CacheKind::default(),
        }
    }
}

/// Looks at everything; `seen` is called with each check when it is done. Takes some seconds and some 500 MB of memory.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) without that memory. What is wrong with the machine is no error, but in the report.
pub fn examine(options: &Options, mut seen: impl FnMut(&Check)) -> Result<Report> {
    let mut checks = Vec::new();
    let mut add = |check: Check| {
        seen(&check);
        checks.push(check);
    };
    let mut machine = machine::look(options, &mut add)?;
    let data = speed::Data::new()?;
    if matches!(options.place, Place::Auto | Place::Cpu) {
        cpu(&data, &mut add);
    }
    match options.place {
        Place::Cpu => {}
        Place::Auto if !cfg!(target_os = "macos") => {
            add(Check::ok("GPU", "none that this program uses: the CPU computes"));
        }
        place => match runner::of_place(place) {
            Ok(runner) => {
                machine.gpu = runner::describe(&runner, options, &mut add);
                speed::first_call(&runner, &mut add);
                runner::compile(&runner, &mut add);
                cases::compare(&runner, &mut add);
                speed::measure(&runner, &data, &mut add);
            }
            Err(error) => add(runner::refused(place, &error)),
        },
    }
    Ok(Report::new(machine, checks))
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
