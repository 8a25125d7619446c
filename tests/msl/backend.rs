//! What runs the plans: the host on Linux, the GPU on macOS.

use candle_core::{Device, Tensor};

#[cfg(target_os = "linux")]
use candle_mmfp4::metal::host::{Host, build};
#[cfg(target_os = "linux")]
use std::sync::Arc;

/// A device that runs launch plans.
pub struct Backend {
    #[cfg(target_os = "linux")]
    pub host: Arc<Host>,
    device: Device,
}

#[cfg(target_os = "linux")]
impl Backend {
    /// The compiled kernels; `None`, once said why, without a compiler.
    pub fn start() -> Option<Self> {
        available().then(|| Self::over(Host::start().unwrap_or_else(|error| panic!("{error}"))))
    }

    /// The same, counted apart from whatever other tests run: see [`on_cpu`](Self::on_cpu).
    pub fn alone() -> Option<Self> {
        available().then(|| {
            let library = build::library(&build::Options::default());
            let host = library.and_then(|path| Host::load(&path));
            Self::over(Arc::new(host.unwrap_or_else(|error| panic!("{error}"))))
        })
    }

    /// Ops that the CPU's own kernels ran in place of these, none of which takes their operands.
    pub fn on_cpu(&self) -> Vec<&'static str> {
        self.host.without_kernel()
    }

    /// Kernels compiled elsewhere.
    pub fn over(host: Arc<Host>) -> Self {
        Self {
            host,
            device: Device::Cpu,
        }
    }

    /// Runs ops of tensors of the given device by Metal kernels.
    pub fn run(
        &self,
        ops: impl FnOnce(&Device) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        self.within(|| ops(&self.device))
    }

    /// Calls `f`, of which ops of this thread run by Metal kernels.
    pub fn within<R>(&self, f: impl FnOnce() -> R) -> R {
        self.host.install(f)
    }
}

/// Whether there is a compiler; without one it is said once, or a failure where `MMFP4_MSL_REQUIRED` is set.
#[cfg(target_os = "linux")]
pub fn available() -> bool {
    static SAID: std::sync::Once = std::sync::Once::new();
    if build::compiler().is_some() {
        return true;
    }
    let line = "skipped: Metal kernels need clang 17 or newer (Debian: apt install clang-19 libclang-rt-19-dev llvm-19)";
    assert!(std::env::var_os("MMFP4_MSL_REQUIRED").is_none(), "{line}");
    SAID.call_once(|| eprintln!("{line}"));
    false
}

#[cfg(target_os = "macos")]
impl Backend {
    /// The GPU.
    pub fn start() -> Option<Self> {
        let device = candle_mmfp4::metal::device::open(0).unwrap_or_else(|error| panic!("{error}"));
        Some(Self { device })
    }

    /// The GPU.
    pub fn alone() -> Option<Self> {
        Self::start()
    }

    /// None: an op without a kernel is an error there, but for attention, which is Candle's.
    pub fn on_cpu(&self) -> Vec<&'static str> {
        vec!["mmfp4-attention"]
    }

    /// Runs ops of tensors of the given device.
    pub fn run(
        &self,
        ops: impl FnOnce(&Device) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        ops(&self.device)?.to_device(&Device::Cpu)
    }

    /// Calls `f`.
    pub fn within<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }
}

impl Backend {
    /// The device that models are to be loaded on.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
