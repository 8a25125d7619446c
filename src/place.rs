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
    /// The names that [`FromStr`](std::str::FromStr) knows.
    pub const NAMES: [&str; 4] = ["auto", "cpu", "metal", "msl-host"];

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
                let expected = "x86-64 Linux, and a build with the feature msl-host";
                Err(Error::argument("device", "msl-host", expected, "neither or one"))
            }
        }
    }
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
