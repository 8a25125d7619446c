//! Where to compute.

use crate::{Error, Result};
use candle_core::Device;

/// A device by the name that command lines give it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Place {
    /// The CPU, until Metal's kernels have been seen to run on a Mac.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A Mac's GPU.
    Metal,
    /// The CPU, with Metal kernels compiled for it in place of its own: a development feature.
    MslHost,
}

impl Place {
    /// The names of what this build can have. [`FromStr`](std::str::FromStr) knows `msl-host` in any build, so that
    /// [`open`](Self::open) can say what it lacks.
    pub const NAMES: &[&str] = if cfg!(msl_host) {
        &["auto", "cpu", "metal", "msl-host"]
    } else {
        &["auto", "cpu", "metal"]
    };

    /// The device. Tensors of [`MslHost`](Self::MslHost) are the CPU's: it switches all ops of this process.
    ///
    /// # Errors
    /// [`Error::Argument`] where this system or this build has no such device.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Auto | Self::Cpu => Ok(Device::Cpu),
            #[cfg(target_os = "macos")]
            Self::Metal => crate::metal::device::open(0),
            #[cfg(not(target_os = "macos"))]
            Self::Metal => {
                let expected = "a Mac; here use --device cpu";
                Err(Error::argument("device", "metal", expected, std::env::consts::OS))
            }
            #[cfg(msl_host)]
            Self::MslHost => {
                crate::metal::host::Host::start()?.install_everywhere();
                Ok(Device::Cpu)
            }
            #[cfg(not(msl_host))]
            Self::MslHost => {
                let system = format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH);
                Err(no_msl_host(
                    cfg!(all(target_os = "linux", target_arch = "x86_64")),
                    system,
                ))
            }
        }
    }
}

/// Why this build has no `msl-host`: the system, or else the feature.
#[cfg(any(not(msl_host), test))]
fn no_msl_host(on_its_system: bool, system: String) -> Error {
    let (expected, found) = match on_its_system {
        false => ("x86-64 Linux", system),
        true => (
            "a build with the feature msl-host: cargo run --release --features cli,msl-host -- …",
            "a build without it".into(),
        ),
    };
    Error::argument("device", "msl-host", expected, found)
}

impl std::str::FromStr for Place {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "metal" => Ok(Self::Metal),
            "msl-host" => Ok(Self::MslHost),
            _ => Err(Error::argument("device", "name", Self::NAMES.join(", "), name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_build_lacks_is_said() {
        let on = |its| no_msl_host(its, "macos on aarch64".into()).to_string();
        let (system, feature) = (on(false), on(true));
        assert!(
            system.contains("expected x86-64 Linux, found macos on aarch64"),
            "{system}"
        );
        assert!(
            feature.contains("--features cli,msl-host") && !feature.contains("x86"),
            "{feature}"
        );
    }

    #[test]
    fn names_are_those_of_places_that_a_build_can_have() {
        for name in Place::NAMES {
            assert!(name.parse::<Place>().is_ok(), "{name}");
        }
        assert_eq!(Place::NAMES.contains(&"msl-host"), cfg!(msl_host));
        let error = "gpu".parse::<Place>().unwrap_err().to_string();
        assert!(error.contains("auto, cpu, metal"), "{error}");
        assert_eq!(error.contains("msl-host"), cfg!(msl_host), "{error}");
    }
}
