//! A fused mixture of experts from dense tensors.

use super::linear::quantize_tensor;
use crate::cpu::Expert;
use crate::fp4::Format;
use crate::ops::FusedMoe;
use crate::{Error, Result};
use candle_core::Tensor;

impl FusedMoe {
    /// Quantises stacked experts: `gate` and `up` `[E, I, D]`, `down` `[E, D, I]`, in any float dtype. There
    /// are no shared experts.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_mmfp4::{fp4::Format, nn::FusedMoe};
    ///
    /// let weight = |shape: (usize, usize, usize)| Tensor::randn(0f32, 0.1, shape, &Device::Cpu);
    /// let (gate, up, down) = (weight((8, 64, 128))?, weight((8, 64, 128))?, weight((8, 128, 64))?);
    /// let moe = FusedMoe::from_dense(&gate, &up, &down, Format::mxfp4())?;
    ///
    /// let x = Tensor::randn(0f32, 1., (3, 128), &Device::Cpu)?;
    /// let ids = Tensor::new(&[[0u32, 5], [7, 1], [5, 2]], &Device::Cpu)?;
    /// let weights = Tensor::new(&[[0.75f32, 0.25], [0.5, 0.5], [0.9, 0.1]], &Device::Cpu)?;
    /// assert_eq!(moe.forward(&x, &ids, &weights)?.dims(), [3, 128]);
    /// # Ok::<(), anyhow::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Argument`] where the numbers of experts differ; else as [`quantize`](crate::fp4::quantize).
    pub fn from_dense(gate: &Tensor, up: &Tensor, down: &Tensor, format: Format) -> Result<Self> {
        let experts = gate.dims3()?.0;
        for (argument, stack) in [("up", up), ("down", down)] {
            if stack.dims3()?.0 != experts {
                let found = stack.dims3()?.0.to_string();
                return Err(Error::argument(
                    "from_dense",
                    argument,
                    format!("{experts} experts, as gate"),
                    found,
                ));
            }
        }
        let part = |name: &str, stack: &Tensor, e: usize| -> Result<_> {
            Ok(quantize_tensor(&format!("{name}[{e}]"), &stack.get(e)?, format)?.into())
        };
        let expert = |e| -> Result<Expert> {
            Ok(Expert {
                gate: part("gate", gate, e)?,
                up: part("up", up, e)?,
                down: part("down", down, e)?,
            })
        };
        Self::new((0..experts).map(expert).collect::<Result<_>>()?, Vec::new())
    }
}
