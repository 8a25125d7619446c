//! The C interface of a library that `tests/msl/mslc.py` builds; `tests/msl/runtime` has the other side.

use crate::{Error, Result};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

pub(super) const READ: u32 = 0;
pub(super) const WRITE: u32 = 1;
pub(super) const BYTES: u32 = 2;

const VERSION: u32 = 1;

#[repr(C)]
pub(super) struct Binding {
    pub index: u32,
    pub kind: u32,
    pub pointer: *mut c_void,
    pub size: u64,
}

#[repr(C)]
pub(super) struct Constant {
    pub index: u32,
    pub size: u32,
    pub value: [u8; 8],
}

#[repr(C)]
struct Launch {
    kernel: *const c_char,
    constants: *const Constant,
    constant_count: u32,
    bindings: *const Binding,
    binding_count: u32,
    threadgroup_memory: *const u32,
    threadgroup_memory_count: u32,
    threadgroups: [u32; 3],
    threads: [u32; 3],
    seed: u64,
}

type Run = unsafe extern "C" fn(*const Launch, *mut c_char, u64) -> c_int;

/// A loaded library. It stays loaded for as long as this lives, and the pointers into it with it.
#[derive(Debug)]
pub(super) struct Library {
    run: Run,
    names: Vec<CString>,
    _library: libloading::Library,
}

impl Library {
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |error: libloading::Error| {
            Error::file(path, error.to_string(), "remove it, so that it is built again")
        };
        // SAFETY: the library is our own build; its constructors only fill its table of kernels.
        let library = unsafe { libloading::Library::new(path) }.map_err(refuse)?;
        // SAFETY: these are the signatures that version 1 of the interface has.
        let (version, count, name, run) = unsafe {
            (
                *library
                    .get::<unsafe extern "C" fn() -> u32>(b"msl_abi\0")
                    .map_err(refuse)?,
                *library
                    .get::<unsafe extern "C" fn() -> u32>(b"msl_kernel_count\0")
                    .map_err(refuse)?,
                *library
                    .get::<unsafe extern "C" fn(u32) -> *const c_char>(b"msl_kernel_name\0")
                    .map_err(refuse)?,
                *library.get::<Run>(b"msl_run\0").map_err(refuse)?,
            )
        };
        // SAFETY: as above.
        let found = unsafe { version() };
        if found != VERSION {
            let problem = format!("version {found} of the interface, expected {VERSION}");
            return Err(Error::file(path, problem, "remove it, so that it is built again"));
        }
        // SAFETY: as above; names are strings that live as long as the library.
        let names = unsafe { (0..count()).map(|i| CStr::from_ptr(name(i)).to_owned()).collect() };
        Ok(Self {
            run,
            names,
            _library: library,
        })
    }

    pub fn kernels(&self) -> Vec<String> {
        self.names
            .iter()
            .map(|name| name.to_string_lossy().into_owned())
            .collect()
    }

    /// Runs a launch; what the other side says where it refuses.
    pub fn run(
        &self,
        kernel: &str,
        constants: &[Constant],
        bindings: &[Binding],
        threadgroups: [u32; 3],
        threads: [u32; 3],
        seed: u64,
    ) -> std::result::Result<(), String> {
        let kernel = CString::new(kernel).map_err(|error| error.to_string())?;
        let mut message = vec![0u8; 4096];
        let launch = Launch {
            kernel: kernel.as_ptr(),
            constants: constants.as_ptr(),
            constant_count: constants.len() as u32,
            bindings: bindings.as_ptr(),
            binding_count: bindings.len() as u32,
            threadgroup_memory: std::ptr::null(),
            threadgroup_memory_count: 0,
            threadgroups,
            threads,
            seed,
        };
        // SAFETY: all pointers are to slices that outlive the call. A binding's memory is borrowed by the caller for as
        // long, mutably where the kernel may write, which the other side checks; that a kernel stays inside of it is what
        // tests prove under AddressSanitizer.
        let failed = unsafe { (self.run)(&launch, message.as_mut_ptr().cast(), message.len() as u64) };
        if failed == 0 {
            return Ok(());
        }
        let text = CStr::from_bytes_until_nul(&message).unwrap_or_default();
        Err(text.to_string_lossy().into_owned())
    }
}
