//! The linear layer.

use crate::cpu::Arithmetic;
use crate::fp4::{Bytes, Factor, Format, Fp4Tensor, GROUPS, Parts, ScaleKind, ScaleRule, Weight, quantize};
use crate::ops::{Comparison, Kernel};
use crate::{Error, Result, ops};
use candle_core::{DType, Module, Tensor};
use candle_nn::VarBuilder;
use candle_nn::init::{DEFAULT_KAIMING_NORMAL, Init};
use half::{bf16, f16};

/// A linear layer `y = x · Wᵀ + b` whose weight `[N, K]` lies in FP4 (or, where a checkpoint keeps it so, in
/// floating point).
///
/// Takes `x` `[…, K]` of any leading shape, strided or not, in F32, F16 or BF16; gives `[…, N]` in the same
/// dtype, computed in f32. There is no backward pass.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_mmfp4::{fp4::Format, nn::MmfP4Linear};
///
/// let weight = Tensor::randn(0f32, 1f32, (64, 128), &Device::Cpu)?;
/// let dense = candle_nn::Linear::new(weight, None);
/// let fp4 = MmfP4Linear::from_linear(&dense, Format::mmfp4())?;
///
/// let x = Tensor::randn(0f32, 1f32, (2, 5, 128), &Device::Cpu)?;
/// let (exact, rounded) = (dense.forward(&x)?, fp4.forward(&x)?);
/// assert_eq!(rounded.dims(), [2, 5, 64]);
/// let error = (&exact - rounded)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
/// let power = exact.sqr()?.mean_all()?.to_scalar::<f32>()?;
/// assert!(error / power < 0.02);
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct MmfP4Linear {
    op: ops::Linear,
}

impl MmfP4Linear {
    /// From its parts: a weight `[N, K]`, used where it lies, and a bias `[N]`.
    ///
    /// # Errors
    /// [`Error::Argument`] where the bias is not a vector of `N` floats.
    pub fn new(weight: impl Into<Weight>, bias: Option<&Tensor>) -> Result<Self> {
        let bias = bias
            .map(|bias| {
                if bias.rank() != 1 || !bias.dtype().is_float() {
                    let found = format!("{:?} of shape {:?}", bias.dtype(), bias.dims());
                    return Err(Error::argument(
                        "mmfp4-linear",
                        "bias",
                        "a vector of floats",
                        found,
                    ));
                }
                Ok(bias.to_dtype(DType::F32)?.to_vec1()?)
            })
            .transpose()?;
        Ok(Self {
            op: ops::Linear::new(weight.into(), bias)?,
        })
    }

    /// Quantises a layer of `candle_nn`; its bias stays as it is.
    ///
    /// # Errors
    /// As [`quantize`]: K must be a multiple of the format's group, the weight finite.
    pub fn from_linear(linear: &candle_nn::Linear, format: Format) -> Result<Self> {
        Self::new(quantize_tensor("weight", linear.weight(), format)?, linear.bias())
    }

    /// Reads `weight` and `scales` in Marlin's MMFP4 layout (U32 codes `[N, K/8]`, F16 or BF16 scales `[N, K/group]`)
    /// where there are scales, else a floating-point `weight` `[N, K]` and quantises it to MMFP4; `bias`, if
    /// `has_bias`.
    ///
    /// A `VarBuilder` hands out tensors, so this copies the weight;
    /// [`Checkpoint`](crate::checkpoint::Checkpoint) uses a file's bytes where they lie.
    ///
    /// # Errors
    /// [`Error::Tensor`] or [`Error::Candle`], with the tensor's full name, for what is missing or of another
    /// shape.
    pub fn from_var_builder(
        in_features: usize,
        out_features: usize,
        has_bias: bool,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (n, k) = (out_features, in_features);
        let name = |part: &str| match vb.prefix() {
            prefix if prefix.is_empty() => part.to_string(),
            prefix => format!("{prefix}.{part}"),
        };
        // A `VarMap` makes what it is asked for: a whole new layer, as with candle_nn, but no part of an old one.
        let new = !vb.contains_tensor("weight") && !vb.contains_tensor("scales");
        let get = |part: &str, shape: &[usize], dtype| {
            if !new && !vb.contains_tensor(part) {
                return Err(Error::tensor(name(part), None, "missing"));
            }
            let init = if part == "weight" {
                DEFAULT_KAIMING_NORMAL
            } else {
                Init::default()
            };
            vb.get_with_hints_dtype(shape, part, init, dtype)
                .map_err(|error| Error::tensor(name(part), None, error.to_string()))
        };
        let weight = if vb.contains_tensor("scales") {
            // I32 words, as some writers store them, keep their bits in this conversion.
            let words = get("weight", &[n, k / 8], DType::U32)?.to_dtype(DType::U32)?;
            let groups = GROUPS.into_iter().filter(|group| k.is_multiple_of(*group));
            let mut fits =
                groups.filter_map(|group| Some((group, get("scales", &[n, k / group], DType::F32).ok()?)));
            let Some((group, scales)) = fits.next() else {
                let problem = format!("expected [{n}, {k} / group] scales, the group 16, 32, 64 or 128");
                return Err(Error::tensor(name("scales"), None, problem));
            };
            let words = words.flatten_all()?.to_vec1::<u32>()?;
            let scales = scales.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            let Some((kind, scales)) = half_scales(&scales) else {
                let problem = "values that neither F16 nor BF16 holds; expected F16 or BF16 scales";
                return Err(Error::tensor(name("scales"), None, problem));
            };
            let parts = Parts {
                shape: (n, k),
                group,
                codes: Bytes::copy_from(&words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>())?,
                scales: Bytes::copy_from(&scales)?,
                kind,
                factor: Factor::None,
            };
            Fp4Tensor::new(&name("weight"), parts)?
        } else {
            let weight = get("weight", &[n, k], vb.dtype()).map_err(|error| {
                // Codes without their scales are recognised by their shape.
                match !new && k.is_multiple_of(8) && get("weight", &[n, k / 8], DType::U32).is_ok() {
                    true => Error::tensor(name("scales"), None, "missing beside packed codes"),
                    false => error,
                }
            })?;
            quantize_tensor(&name("weight"), &weight, Format::mmfp4())?
        };
        let bias = has_bias.then(|| get("bias", &[n], vb.dtype())).transpose()?;
        Self::new(weight, bias.as_ref())
    }

    /// The same layer in this arithmetic, on the CPU; the default is
    /// [`Arithmetic::W4A8`](crate::cpu::Arithmetic::W4A8).
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        Self {
            op: self.op.with_arithmetic(arithmetic),
        }
    }

    /// The op behind it.
    pub fn op(&self) -> &ops::Linear {
        &self.op
    }

    /// The weight.
    pub fn weight(&self) -> &Weight {
        self.op.weight()
    }

    /// The bias, `N` values.
    pub fn bias(&self) -> Option<&[f32]> {
        self.op.bias()
    }

    /// Bytes of weight and bias.
    pub fn size_in_bytes(&self) -> usize {
        self.op.size_in_bytes()
    }
}

impl Module for MmfP4Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.op.forward(x)
    }
}

impl Kernel<&Tensor> for MmfP4Linear {
    fn validate(&self, x: &Tensor) -> Result<Comparison> {
        self.op.validate(x)
    }
}

/// As [`candle_nn::linear()`], in FP4: see [`MmfP4Linear::from_var_builder`].
///
/// # Errors
/// As [`MmfP4Linear::from_var_builder`].
pub fn linear(in_features: usize, out_features: usize, vb: VarBuilder) -> candle_core::Result<MmfP4Linear> {
    Ok(MmfP4Linear::from_var_builder(
        in_features,
        out_features,
        true,
        vb,
    )?)
}

/// As [`candle_nn::linear_no_bias`], in FP4: see [`MmfP4Linear::from_var_builder`].
///
/// # Errors
/// As [`MmfP4Linear::from_var_builder`].
pub fn linear_no_bias(
    in_features: usize,
    out_features: usize,
    vb: VarBuilder,
) -> candle_core::Result<MmfP4Linear> {
    Ok(MmfP4Linear::from_var_builder(
        in_features,
        out_features,
        false,
        vb,
    )?)
}

/// Quantises a float matrix `[N, K]` of Candle's.
pub(super) fn quantize_tensor(name: &str, tensor: &Tensor, format: Format) -> Result<Fp4Tensor> {
    let shape = tensor.dims2()?;
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    quantize(name, &values, shape, format, ScaleRule::default())
}

/// Scales as F16 or, where that would change any, as BF16; a `VarBuilder` does not tell which they were. `None`
/// where they were neither.
fn half_scales(scales: &[f32]) -> Option<(ScaleKind, Vec<u8>)> {
    let all = |round: fn(f32) -> f32| scales.iter().all(|s| s.is_nan() || round(*s) == *s);
    if all(|s| f16::from_f32(s).to_f32()) {
        let bytes = scales.iter().flat_map(|s| f16::from_f32(*s).to_le_bytes());
        return Some((ScaleKind::F16, bytes.collect()));
    }
    let bytes = scales.iter().flat_map(|s| bf16::from_f32(*s).to_le_bytes());
    all(|s| bf16::from_f32(s).to_f32()).then(|| (ScaleKind::BF16, bytes.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_nn::VarMap;
    use std::collections::HashMap;

    #[test]
    fn it_is_built_from_whatever_candle_nn_is_built_from() {
        // A VarMap makes its variables when they are first asked for; the second layer finds the first one's.
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu).pp("mlp");
        let dense = candle_nn::linear(128, 8, vb.clone()).unwrap();
        let fp4 = linear(128, 8, vb.clone()).unwrap();
        let own = MmfP4Linear::from_linear(&dense, Format::mmfp4()).unwrap();
        let x = Tensor::randn(0f32, 1f32, (3, 128), &Device::Cpu).unwrap();
        let run = |layer: &MmfP4Linear| layer.forward(&x).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(run(&fp4), run(&own));
        assert!(
            linear_no_bias(128, 8, vb.pp("new")).is_ok(),
            "made, as candle_nn would"
        );

        let weight = Tensor::zeros((8, 64), DType::F32, &Device::Cpu).unwrap();
        let tensors = HashMap::from([("mlp.up.weight".to_string(), weight)]);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        for module in ["mlp.up", "mlp.gate"] {
            let error = linear_no_bias(128, 8, vb.pp(module)).unwrap_err().to_string();
            assert!(error.contains(&format!("{module}.weight")), "{error}");
        }
    }
}
