//! Faults planted in the kernels and in their plans: tests that would miss one are worth nothing.

use crate::backend::available;
use crate::checks::strict;
use crate::families::{FAMILIES, Family};
use crate::full;
use crate::runner::Work;
use candle_mmfp4::metal::host::build::{self, Options, Sanitize};
use candle_mmfp4::metal::plan::Plan;
use candle_mmfp4::metal::source;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

/// A fault: what it is, the file, and the text that is replaced.
pub struct Fault {
    pub what: &'static str,
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

/// A fault in a plan: what it is, and what plants it, `false` where a plan cannot have it.
pub struct PlanFault {
    pub what: &'static str,
    pub change: fn(&mut Plan) -> bool,
}

/// Which checks found it, in the order in which they ran.
struct Found {
    strict: Option<String>,
    plain: Option<String>,
    schedules: Option<String>,
    addresses: Option<String>,
    races: Option<String>,
}

/// Every fault of kernels, with its family.
fn all() -> impl Iterator<Item = (&'static Family, &'static Fault)> {
    let faults = |family: &'static Family| family.faults.iter().map(move |fault| (family, fault));
    FAMILIES.iter().flat_map(faults)
}

/// The faults of plans, with their families.
fn all_of_plans() -> impl Iterator<Item = (&'static Family, &'static PlanFault)> {
    let faults = |family: &'static Family| family.plan_faults.iter().map(move |fault| (family, fault));
    FAMILIES.iter().flat_map(faults)
}

/// Those that every run of the tests plants: one for each kind of check.
const IN_CI: [&str; 5] = [
    "a barrier that one simdgroup does not reach",
    "a barrier that orders no memory",
    "outputs written past the last row of W",
    "sums in half",
    "the code 0.5 flushed to zero",
];
const OF_PLANS_IN_CI: [&str; 3] = [
    "a threadgroup too few along y",
    "a row of W too many",
    "twice the threads",
];

impl Fault {
    /// The family's kernels with this fault, in a folder of their own.
    fn planted(&self, family: &Family) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let kernels = source::KERNELS
            .iter()
            .filter(|file| family.files.contains(&file.name));
        for file in source::HEADERS.iter().chain(kernels) {
            let text = if file.name == self.file {
                assert!(
                    file.text.contains(self.from),
                    "{}: the text is not there",
                    self.what
                );
                file.text.replace(self.from, self.to)
            } else {
                file.text.to_string()
            };
            std::fs::write(folder.path().join(file.name), text).unwrap();
        }
        folder
    }

    /// Those files of the family that have it: its own, or those that include it.
    fn files(&self, family: &Family) -> impl Iterator<Item = &'static str> {
        let files = family.files.iter().copied();
        files.filter(|file| reaches(file, self.file))
    }

    fn find(&self, family: &Family, works: &[Work], all: bool) -> Found {
        let folder = self.planted(family);
        let strict = strict(folder.path(), self.files(family)).map(|text| first_line(&text));
        let kernels = Kernels {
            metal: folder.path().to_path_buf(),
            to: folder.path().join("build"),
            faulty: true,
        };
        kernels.find(strict, works, all)
    }
}

/// Whether a file is another one or includes it, or what does.
fn reaches(file: &str, other: &str) -> bool {
    let files = source::HEADERS.iter().chain(source::KERNELS);
    let text = files.into_iter().find(|found| found.name == file).unwrap().text;
    let mut included = (text.lines()).filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
    file == other || included.any(|header| reaches(header, other))
}

impl PlanFault {
    /// What finds it in any of the plans that can have it.
    fn find(&self, works: &[Work], all: bool) -> Found {
        Kernels::as_they_are().find(None, &self.planted(works), all)
    }

    fn planted(&self, works: &[Work]) -> Vec<Work> {
        let changed = |work: &Work| work.changed(self.change);
        let works: Vec<_> = works.iter().filter_map(changed).collect();
        assert!(!works.is_empty(), "{}: no plan can have it", self.what);
        works
    }
}

/// Kernels that programs are built of.
struct Kernels {
    metal: PathBuf,
    /// Where programs are kept.
    to: PathBuf,
    /// Whether it is a finding that they do not compile.
    faulty: bool,
}

impl Kernels {
    fn as_they_are() -> Self {
        Self {
            metal: build::sources(),
            to: build::folder(),
            faulty: false,
        }
    }

    /// Runs the checks behind the strict one; `all` of them, or up to the first of them that finds something.
    fn find(&self, strict: Option<String>, works: &[Work], all: bool) -> Found {
        let mut found = Found {
            strict,
            plain: None,
            schedules: None,
            addresses: None,
            races: None,
        };
        let mut found_by = None;
        let mut run = |sanitize, seeds| self.check(sanitize, seeds, works, &mut found_by);
        // What the strict check says may be beside the point, as of a variable that is not used any more.
        if all || !found.ran() {
            found.plain = run(Sanitize::None, 0..1);
        }
        if all || !found.ran() {
            found.schedules = run(Sanitize::None, 1..9);
        }
        if all || !found.ran() {
            found.addresses = run(Sanitize::Addresses, 0..1);
        }
        if all || !found.ran() {
            found.races = run(Sanitize::Threads, 0..1);
        }
        found
    }

    /// What goes wrong in one of the runs. Where another check has `found` something, that run goes first, with a program of its own
    /// kernels, since what one check finds others mostly find there too; then all.
    fn check(
        &self,
        sanitize: Sanitize,
        seeds: Range<u64>,
        works: &[Work],
        found: &mut Option<usize>,
    ) -> Option<String> {
        let options = Options {
            sanitize,
            program: true,
            ..Options::default()
        };
        let one = found.map(|index| index..index + 1);
        let told = one
            .into_iter()
            .chain(std::iter::once(0..works.len()))
            .find_map(|some| {
                let kernels = works[some.clone()].iter().flat_map(Work::kernels).cloned();
                let program =
                    match build::library_of(&self.metal, &self.to, &options, Some(&kernels.collect())) {
                        Ok(program) => program,
                        Err(error) if self.faulty => {
                            return Some(format!("does not compile: {}", first_line(&error.to_string())));
                        }
                        Err(error) => panic!("{error}"),
                    };
                some.into_iter().find_map(|index| {
                    let told = seeds
                        .clone()
                        .find_map(|seed| works[index].failure_of(&program, seed))?;
                    *found = Some(index);
                    Some(told)
                })
            })?;
        Some(told.replace(&format!("{}/", self.metal.display()), ""))
    }
}

impl Found {
    fn each(&self) -> [&Option<String>; 5] {
        [
            &self.strict,
            &self.plain,
            &self.schedules,
            &self.addresses,
            &self.races,
        ]
    }

    fn any(&self) -> bool {
        self.each().iter().any(|found| found.is_some())
    }

    /// Whether one behind the strict check did.
    fn ran(&self) -> bool {
        self.each()[1..].iter().any(|found| found.is_some())
    }
}

/// The first line that tells something, without folders.
fn first_line(text: &str) -> String {
    let telling = |line: &&str| line.contains("error") || line.contains("lint");
    let line = text
        .lines()
        .find(telling)
        .or_else(|| text.lines().next())
        .unwrap_or_default();
    let line = line.rsplit('/').next().unwrap_or(line);
    line.chars().take(70).collect()
}

#[test]
fn planted_faults_are_found() {
    if !available() {
        return;
    }
    for what in IN_CI {
        let (family, fault) = all().find(|(_, fault)| fault.what == what).unwrap();
        let found = fault.find(family, &(family.works)(), false);
        assert!(found.any(), "nothing finds: {what}");
    }
    for what in OF_PLANS_IN_CI {
        let (family, fault) = all_of_plans().find(|(_, fault)| fault.what == what).unwrap();
        let found = fault.find(&(family.works)(), false);
        assert!(found.any(), "nothing finds: {what}");
    }
}

#[test]
fn every_fault_can_be_planted() {
    for (family, fault) in all() {
        fault.planted(family);
    }
    // docs/metal-faults.md tells rows apart by what the fault is.
    let mut names: Vec<_> = all().map(|(_, fault)| fault.what).collect();
    names.extend(all_of_plans().map(|(_, fault)| fault.what));
    names.sort_unstable();
    let twice = names.windows(2).find(|pair| pair[0] == pair[1]);
    assert_eq!(twice, None);
}

/// The families whose faults are to be planted, by the names of their files without `.metal`, a comma between them; all where it is
/// not set. Rows of others stay in docs/metal-faults.md as they are.
const CHOSEN: &str = "MMFP4_MSL_FAULTS";

/// What a cell has of a check that did not run, because one before it had found the fault.
const NOT_RUN: &str = "–";

/// All of them, or those of the chosen families, through the checks up to the first that finds one, or through all where
/// `MMFP4_MSL_FULL` is set; writes docs/metal-faults.md.
#[test]
#[ignore = "many minutes: cargo test --release --features msl-host --test msl -- --ignored faults"]
fn faults() {
    assert!(available());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metal-faults.md");
    let before = std::fs::read_to_string(&path).unwrap();
    let chosen = std::env::var(CHOSEN).ok();
    let chosen = |family: &Family| {
        let is_one = |name: &str| {
            family
                .files
                .iter()
                .any(|file| file.strip_suffix(".metal") == Some(name))
        };
        chosen.as_ref().is_none_or(|names| names.split(',').any(is_one))
    };
    // Once for all faults of a family, of kernels that show none as they are.
    let works: Vec<OnceLock<Vec<Work>>> = FAMILIES.iter().map(|_| OnceLock::new()).collect();
    let works_of = |family: &Family| {
        let index = FAMILIES.iter().position(|other| other.files == family.files);
        works[index.unwrap()].get_or_init(|| {
            let works = (family.works)();
            let found = Kernels::as_they_are().find(None, &works, true);
            assert!(
                !found.any(),
                "{:?}, without a fault: {:?}",
                family.files,
                found.each()
            );
            works
        })
    };
    let mut missed = Vec::new();
    let mut tables = String::from(
        "# Faults planted in the Metal kernels and in their plans\n\n\
         Each is one change of `metal/`, or of a launch plan that a test recorded, put through the checks on Linux; a cell\n\
         tells what the check said, nothing where it found nothing, and – where it did not run, because another run before it had\n\
         found the fault. Written by `cargo test --release --features msl-host --test msl -- --ignored faults`, which fails where\n\
         nothing finds one; before it, `MMFP4_MSL_FULL=1` has every check run, and `MMFP4_MSL_FAULTS=append,merged` has the rows\n\
         of these files' faults written anew and the others left.\n\n## In kernels\n\n",
    );
    let (of_kernels, of_plans) = before.split_once("## In plans").unwrap();
    let kernels = together(all().collect(), |(family, fault)| {
        let find = || timed(fault.what, || fault.find(family, works_of(family), full()));
        (fault.what, chosen(family).then(find))
    });
    table(&mut tables, &mut missed, (0, of_kernels), kernels);
    tables.push_str(
        "\n## In plans\n\nThe kernels are as they are. More threadgroups than a plan needs along x and y are no fault: they \
         write nothing.\n\n",
    );
    let plans = together(all_of_plans().collect(), |(family, fault)| {
        let find = || timed(fault.what, || fault.find(works_of(family), full()));
        (fault.what, chosen(family).then(find))
    });
    table(&mut tables, &mut missed, (1, of_plans), plans);
    let partial = path.with_extension("md.partial");
    std::fs::write(&partial, tables).unwrap();
    std::fs::rename(&partial, &path).unwrap();
    assert!(missed.is_empty(), "nothing finds {missed:#?}");
}

/// Tells how long it took.
fn timed<R>(what: &str, f: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = f();
    eprintln!("{:.0?}: {what}", start.elapsed());
    result
}

/// What `f` gives for each, in their order; by as many threads as there are cores, since compilers take most of the time.
fn together<T: Copy + Sync, R: Send>(items: Vec<T>, f: impl Fn(T) -> R + Sync) -> Vec<R> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((index, item)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    items.get(index).map(|item| (index, *item))
                } {
                    let result = f(item);
                    results.lock().unwrap().push((index, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap();
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// The checks from one on as columns, and a row for each fault; of one that was not planted the row that there was, if any.
fn table(
    text: &mut String,
    missed: &mut Vec<String>,
    (from, before): (usize, &str),
    faults: Vec<(&'static str, Option<Found>)>,
) {
    let columns = [
        "strict check",
        "numbers, threads in order",
        "eight other schedules",
        "addresses, undefined behaviour",
        "races",
    ];
    writeln!(text, "| fault | {} |", columns[from..].join(" | ")).unwrap();
    writeln!(text, "|---|{}", "---|".repeat(columns.len() - from)).unwrap();
    for (what, found) in faults {
        let Some(found) = found else {
            let row = before
                .lines()
                .find(|line| line.starts_with(&format!("| {what} | ")));
            row.map_or_else(
                || eprintln!("docs/metal-faults.md has no row yet: {what}"),
                |row| writeln!(text, "{row}").unwrap(),
            );
            continue;
        };
        let each = found.each();
        let first = (1..each.len()).find(|index| each[*index].is_some());
        let cells: Vec<_> = (0..each.len())
            .map(|index| match each[index] {
                Some(told) => told.replace('|', "\\|"),
                None if !full() && first.is_some_and(|first| first < index) => NOT_RUN.to_string(),
                None => String::new(),
            })
            .collect();
        writeln!(text, "| {what} | {} |", cells[from..].join(" | ")).unwrap();
        if !found.any() {
            missed.push(what.to_string());
        }
    }
}
