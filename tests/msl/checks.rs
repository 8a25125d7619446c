//! What only the host can check: the sources themselves, schedules, memory, races, plans against kernels.

use crate::backend::{Backend, available};
use crate::families::FAMILIES;
use crate::linear::{self, cases};
use crate::runner::Work;
use candle_core::DType;
use candle_mmfp4::cpu::HeadRows;
use candle_mmfp4::fp4::{Format, Weight};
use candle_mmfp4::metal::every_kernel;
use candle_mmfp4::metal::host::build::{self, Options, Sanitize};
use candle_mmfp4::metal::host::{Host, Operand};
use candle_mmfp4::metal::linear::{Direction, Operands, Product};
use candle_mmfp4::metal::plan::{Binding, Plan, limits};
use candle_mmfp4::metal::source;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs that reach every kernel's loops and edges; what is slow runs over these.
pub fn subset() -> Vec<Work> {
    FAMILIES.iter().flat_map(|family| (family.works)()).collect()
}

/// The messages of the strict check of files of a folder, where there are any.
pub fn strict<'a>(metal: &Path, files: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/msl/mslc.py");
    let output = Command::new("python3")
        .arg(tool)
        .arg("check")
        .args(files.into_iter().map(|file| metal.join(file)))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    (!output.status.success()).then_some(text)
}

fn library(options: Options) -> PathBuf {
    build::library(&options).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn sources_pass_the_strict_check() {
    if available()
        && let Some(messages) = strict(&build::sources(), source::KERNELS.iter().map(|file| file.name))
    {
        panic!("{messages}");
    }
}

#[test]
fn the_one_text_that_a_mac_compiles_passes_the_strict_check() {
    if !available() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("library.metal");
    std::fs::write(&file, source::library()).unwrap();
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/msl/mslc.py");
    let output = Command::new("python3")
        .arg(tool)
        .arg("check")
        .arg(file)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}

#[test]
fn any_schedule_gives_the_same_numbers() {
    if !available() {
        return;
    }
    let (library, works) = (library(Options::default()), subset());
    for seed in 1..=8 {
        let host = Host::load(&library).unwrap().with_seed(seed);
        for work in &works {
            let failure = work.failure_on(&host);
            assert_eq!(failure, None, "seed {seed}, {}", work.name);
        }
    }
}

#[test]
fn addresses_and_undefined_behaviour() {
    sanitized(Sanitize::Addresses);
}

#[test]
fn races() {
    sanitized(Sanitize::Threads);
}

fn sanitized(sanitize: Sanitize) {
    if !available() {
        return;
    }
    let program = library(Options {
        sanitize,
        program: true,
        ..Options::default()
    });
    for work in subset() {
        assert_eq!(work.failure_of(&program, 0), None, "{}", work.name);
    }
}

#[test]
fn fast_math_changes_no_more_than_rounding() {
    if !available() {
        return;
    }
    let library = library(Options {
        fast_math: true,
        ..Options::default()
    });
    let host = Host::load(&library).unwrap();
    for work in subset().into_iter().filter(|work| !work.expects_nan()) {
        assert_eq!(work.failure_on(&host), None, "{}", work.name);
    }
}

#[test]
fn more_threadgroups_than_needed_along_x_and_y_do_nothing() {
    if !available() {
        return;
    }
    let works = linear::works::all();
    for sanitize in [Sanitize::Addresses, Sanitize::Threads] {
        let program = library(Options {
            sanitize,
            program: true,
            ..Options::default()
        });
        for axis in 0..2 {
            for work in &works {
                let more = work.changed(|plan| {
                    plan.launches
                        .iter_mut()
                        .for_each(|launch| launch.threadgroups[axis] *= 2);
                    true
                });
                let failure = more.and_then(|work| work.failure_of(&program, 0));
                assert_eq!(failure, None, "axis {axis}: {}", work.name);
            }
        }
    }
}

#[test]
fn every_kernel_is_launched_and_every_launch_keeps_to_the_limits() {
    let Some(backend) = Backend::start() else { return };
    let mut launched = BTreeSet::new();
    let plans = cases::DTYPES.map(|dtype| every_kernel(Format::mmfp4(), dtype).unwrap());
    for plan in plans.into_iter().flatten() {
        for launch in plan.launches {
            let threads: usize = launch.threads.iter().product();
            assert!(threads <= limits::THREADS);
            assert!(
                threads.is_multiple_of(32),
                "{}: lanes of a simdgroup missing",
                launch.kernel
            );
            for (_, binding) in &launch.bindings {
                if let Binding::Bytes(bytes) = binding {
                    assert!(bytes.len() <= limits::BYTES);
                }
            }
            launched.insert(launch.kernel);
        }
    }
    let kernels: BTreeSet<_> = backend.host.kernels().into_iter().collect();
    assert_eq!(launched, kernels);
}

#[test]
fn launches_that_do_not_fit_their_kernel_are_refused() {
    let Some(backend) = Backend::start() else { return };
    let case = cases::Case::default();
    let op = case.op();
    let Weight::Fp4(weight) = op.weight() else {
        unreachable!("cases are in FP4")
    };
    let rows = HeadRows {
        heads: 1,
        stride: case.n,
        start: 0,
        len: case.n,
    };
    let product = Product {
        weight,
        rows,
        direction: Direction::Rows,
        operands: Operands {
            codes: 0,
            scales: 1,
            bias: None,
            x: 2,
            y: 3,
        },
        dtype: DType::F32,
        m: 1,
        x_offset: 0,
        x_row: case.k,
        x_head: 0,
        y_offset: 0,
        y_row: case.n,
        y_head: 0,
    };
    let x = vec![0u8; case.k * 4];
    type Change<'a> = &'a dyn Fn(&mut Vec<(usize, Binding)>);
    let run = |change: Change<'_>| {
        let mut launch = product.launch().unwrap();
        change(&mut launch.bindings);
        let plan = Plan {
            launches: vec![launch],
        };
        let mut y = vec![0u8; case.n * 4];
        let mut operands = [
            Operand::Read(weight.codes()),
            Operand::Read(weight.scales()),
            Operand::Read(&x),
            Operand::Write(&mut y),
        ];
        backend
            .host
            .run(&plan, &mut operands)
            .map_err(|error| error.to_string())
    };
    run(&|_| {}).unwrap();
    let read = Binding::Read {
        operand: 3,
        offset: 0,
    };
    let refused: [(&str, Change<'_>); 6] = [
        ("an unbound output", &|bindings| drop(bindings.remove(3))),
        ("an output bound as an input", &|bindings| {
            bindings[3].1 = read.clone()
        }),
        ("a binding that the kernel does not have", &|bindings| {
            bindings.push((9, read.clone()));
        }),
        ("arguments that are too short", &|bindings| {
            bindings[4].1 = Binding::Bytes(vec![0; 36]);
        }),
        ("codes off four bytes", &|bindings| {
            bindings[0].1 = Binding::Read {
                operand: 0,
                offset: 2,
            };
        }),
        ("an operand that is not there", &|bindings| {
            bindings[2].1 = Binding::Read {
                operand: 7,
                offset: 0,
            };
        }),
    ];
    for (what, change) in refused {
        assert!(run(change).is_err(), "{what}");
    }
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let weight = cases::weight((8, 64), 32, cases::KINDS[0], 0);
    let odd = cases::weight((8, 64), 32, cases::KINDS[0], 2);
    let product = Product {
        weight: &weight,
        rows: HeadRows {
            heads: 1,
            stride: 8,
            start: 0,
            len: 8,
        },
        direction: Direction::Rows,
        operands: Operands {
            codes: 0,
            scales: 1,
            bias: None,
            x: 2,
            y: 3,
        },
        dtype: DType::F32,
        m: 1,
        x_offset: 0,
        x_row: 64,
        x_head: 0,
        y_offset: 0,
        y_row: 8,
        y_head: 0,
    };
    for (part, wrong) in [
        (
            "F32, F16 or BF16",
            Product {
                dtype: DType::U32,
                ..product
            },
        ),
        (
            "2^32",
            Product {
                x_row: 1 << 32,
                ..product
            },
        ),
        (
            "4 bytes",
            Product {
                weight: &odd,
                ..product
            },
        ),
    ] {
        let error = wrong.launch().unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
