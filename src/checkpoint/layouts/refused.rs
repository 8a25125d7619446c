//! What other quantisers write, refused by name: loaded as something else it would be garbage.

use super::siblings::Siblings;
use crate::Result;
use safetensors::Dtype;

const INSTEAD: &str = "take an FP4 checkpoint, or the original in BF16 with --quantize mmfp4";

/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) names the tensor that tells.
pub(super) fn check(siblings: &Siblings<'_>) -> Result<()> {
    let integers = [Dtype::U32, Dtype::I32];
    let eight_bits = [Dtype::F8_E4M3, Dtype::F8_E5M2];
    // The first that is there tells what all are.
    let known: &[(&str, bool, &str)] = &[
        (
            "biases",
            siblings.is("weight", &integers),
            "MLX's affine quantisation, integers with a bias: no 4-bit floating point",
        ),
        ("g_idx", true, "GPTQ, integers in groups by a permutation"),
        ("qzeros", true, "GPTQ or AWQ, integers with zero points"),
        (
            "weight_zero_point",
            true,
            "integers with zero points (compressed-tensors pack-quantized)",
        ),
        (
            "weight_shape",
            true,
            "integers (compressed-tensors pack-quantized)",
        ),
        ("weight.absmax", true, "bitsandbytes"),
        ("weight.quant_map", true, "bitsandbytes"),
        ("SCB", true, "bitsandbytes, eight bits"),
        // Before its scales of inputs, which it has too.
        (
            "svdquant_lora_a",
            true,
            "ModelOpt's NVFP4_SVD, with a correction of low rank beside the codes",
        ),
        (
            "pre_quant_scale",
            true,
            "ModelOpt's NVFP4_AWQ, whose activations are scaled before the product",
        ),
        ("q_weight", true, "EXL2"),
        ("trellis", true, "EXL3"),
        ("W_q", true, "HQQ, integers with zero points"),
        ("codebooks", true, "AQLM"),
        ("Qidxs", true, "QuIP#"),
        ("su", true, "Metal Marlin's trellis codes"),
        ("weight_scale_inv", true, "FP8 in blocks (DeepSeek's)"),
        ("weight", siblings.is("weight", &eight_bits), "FP8"),
        (
            "weight",
            siblings.is("weight", &[Dtype::I8]),
            "eight-bit integers",
        ),
    ];
    for (suffix, rest, what) in known {
        if *rest && siblings.has(suffix) {
            let named = siblings.get(suffix)?;
            let dtype = named.tensor.dtype;
            let problem =
                format!("dtype {dtype:?}: the weight is in {what}, which is not implemented; {INSTEAD}");
            return Err(named.problem(problem));
        }
    }
    Ok(())
}
