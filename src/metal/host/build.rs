//! Builds `metal/*.metal` for the host.

use crate::metal::source;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a build is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Sanitizers of the compiler.
    pub sanitize: Sanitize,
    /// As Metal compiles by default: sums reassociated, no NaN expected.
    pub fast_math: bool,
    /// A program that runs launches from a file, in place of a library: sanitizers want to be there from the start.
    pub program: bool,
}

/// Sanitizers of the compiler.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sanitize {
    /// None.
    #[default]
    None,
    /// Addresses and undefined behaviour.
    Addresses,
    /// Races.
    Threads,
}

/// The checkout.
const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Builds the kernels of this checkout where that build is not there yet, and says where it is.
///
/// # Errors
/// See [`library_of`].
pub fn library(options: &Options) -> Result<PathBuf> {
    library_of(&sources(), &folder(), options, None)
}

/// The kernels of this checkout.
pub fn sources() -> PathBuf {
    Path::new(ROOT).join("metal")
}

/// Where builds of this checkout's kernels are kept, under Cargo's folder for what is built.
pub fn folder() -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| Path::new(ROOT).join("target"), PathBuf::from);
    target.join("msl-host")
}

/// Builds those of this crate's `.metal` files that are in a folder into `to`, under a name that their text and the tools' determine;
/// of `kernels` only these, which takes the shorter the fewer they are.
///
/// # Errors
/// [`Error::Io`] where Python does not start; [`Error::File`] with the messages of the tool or the compiler.
pub fn library_of(
    metal: &Path,
    to: &Path,
    options: &Options,
    kernels: Option<&BTreeSet<String>>,
) -> Result<PathBuf> {
    let tool = Path::new(ROOT).join("tests/msl");
    let mut hasher = DefaultHasher::new();
    for part in ["mslc", "include", "runtime"] {
        hash_folder(&tool.join(part), &mut hasher)?;
    }
    hash_folder(metal, &mut hasher)?;
    hasher.write(format!("{options:?} {kernels:?} {:?}", std::env::var_os("MSL_CLANG")).as_bytes());
    std::fs::create_dir_all(to).map_err(|error| Error::io(to, error, ""))?;
    let out = to.join(format!("{:016x}", hasher.finish()));
    if out.exists() {
        return Ok(out);
    }
    // Tests build at the same time, in one process and in several.
    static BUILDS: AtomicUsize = AtomicUsize::new(0);
    let build = BUILDS.fetch_add(1, Ordering::Relaxed);
    let partial = to.join(format!("{:016x}.{}.{build}", hasher.finish(), std::process::id()));
    let mut command = Command::new("python3");
    command
        .arg(tool.join("mslc.py"))
        .args(["build", "-o"])
        .arg(&partial);
    match options.sanitize {
        Sanitize::None => {}
        Sanitize::Addresses => drop(command.args(["--sanitize", "address,undefined"])),
        Sanitize::Threads => drop(command.args(["--sanitize", "thread"])),
    }
    if options.fast_math {
        command.arg("--fast-math");
    }
    if options.program {
        command.arg("--exe");
    }
    for kernel in kernels.into_iter().flatten() {
        command.args(["-k", kernel]);
    }
    command.arg("--keep").arg(folder()).arg("-I").arg(metal);
    let files = source::KERNELS.iter().map(|file| metal.join(file.name));
    command.args(files.filter(|file| file.exists()));
    let output = command
        .output()
        .map_err(|error| Error::io("python3", error, "it builds the kernels; install it"))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        return Err(Error::file(metal, String::from_utf8_lossy(&text), ""));
    }
    std::fs::rename(&partial, &out).map_err(|error| Error::io(&out, error, ""))?;
    Ok(out)
}

/// Names and contents of a folder's files, those of folders in it included.
fn hash_folder(folder: &Path, hasher: &mut DefaultHasher) -> Result<()> {
    let failed = |error| Error::io(folder, error, "kernels are built in a checkout of the project");
    let mut entries = std::fs::read_dir(folder)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .map_err(failed)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        hasher.write(entry.file_name().as_encoded_bytes());
        if path.is_dir() {
            if entry.file_name() != "__pycache__" {
                hash_folder(&path, hasher)?;
            }
        } else {
            hasher.write(&std::fs::read(&path).map_err(failed)?);
        }
    }
    Ok(())
}

/// The compiler that [`library`] is built with: `MSL_CLANG`, else the newest clang that is installed.
pub fn compiler() -> Option<std::ffi::OsString> {
    // `Debian clang version 19.1.7`
    let runs = |name: &std::ffi::OsString| {
        let Ok(output) = Command::new(name).arg("--version").output() else {
            return false;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text
            .split("clang version ")
            .nth(1)
            .and_then(|rest| rest.split('.').next());
        version.and_then(|version| version.parse::<u32>().ok()) >= Some(17)
    };
    if let Some(name) = std::env::var_os("MSL_CLANG") {
        return Some(name).filter(runs);
    }
    ["clang++-19", "clang++-18", "clang++-17", "clang++"]
        .map(Into::into)
        .into_iter()
        .find(runs)
}
