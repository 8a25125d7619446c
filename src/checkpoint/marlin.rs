//! Marlin's MMFP4 layout: U32 codes `[N, K/8]` as `.weight`, F16 scales `[N, K/group]` beside them.

use super::safetensors::{Checkpoint, StoredTensor};
use crate::fp4::{Factor, Fp4Tensor, GROUPS, Parts, ScaleKind};
use crate::{Error, Result};
use safetensors::Dtype;

/// Whether a `.weight` holds packed codes.
pub(super) fn is_packed(weight: &StoredTensor) -> bool {
    matches!(weight.dtype, Dtype::U32 | Dtype::I32)
}

/// The names that the scales of a linear layer go by, the published one first.
pub(super) fn scale_names(module: &str) -> [String; 2] {
    [format!("{module}.scales"), format!("{module}.weight.scales")]
}

/// The FP4 weight `[N, K]` of `module`, used where it lies.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) names codes or scales that are missing or of another shape.
pub(super) fn read(checkpoint: &Checkpoint, module: &str, n: usize, k: usize) -> Result<Fp4Tensor> {
    let codes_name = format!("{module}.weight");
    let codes = checkpoint.get(&codes_name)?;
    if !k.is_multiple_of(8) {
        return Err(codes.problem(
            &codes_name,
            format!("packed codes, but K = {k} is not a multiple of 8"),
        ));
    }
    codes.expect_shape(&codes_name, &[n, k / 8])?;
    for rotated in [
        format!("{module}.hadamard_block_size"),
        format!("{codes_name}.hadamard_block_size"),
    ] {
        if let Some(tensor) = checkpoint.find(&rotated) {
            let problem = "this weight was rotated by a Hadamard matrix, which is not implemented";
            return Err(tensor.problem(&rotated, problem));
        }
    }
    let [published, older] = scale_names(module);
    let (scales_name, scales) = match checkpoint.find(&older) {
        Some(scales) if checkpoint.find(&published).is_none() => (older, scales),
        _ => (published.clone(), checkpoint.get(&published)?),
    };
    let kind = match scales.dtype {
        Dtype::F16 => ScaleKind::F16,
        Dtype::BF16 => ScaleKind::BF16,
        other => {
            return Err(scales.problem(
                &scales_name,
                format!("dtype {other:?}; expected F16 or BF16 scales"),
            ));
        }
    };
    let group = match scales.shape[..] {
        [rows, groups] if rows == n && groups > 0 && k.is_multiple_of(groups) => k / groups,
        _ => 0,
    };
    if !GROUPS.contains(&group) {
        let problem = format!(
            "shape {:?}; expected [{n}, {k} / group], the group 16, 32, 64 or 128",
            scales.shape
        );
        return Err(scales.problem(&scales_name, problem));
    }
    let parts = Parts {
        shape: (n, k),
        group,
        codes: codes.bytes.clone(),
        scales: scales.bytes.clone(),
        kind,
        factor: Factor::None,
    };
    Fp4Tensor::new(&codes_name, parts).map_err(|error| match error {
        // Of shapes checked above only a scale's value can be wrong.
        Error::Tensor { problem, .. } => scales.problem(&scales_name, problem),
        other => other,
    })
}
