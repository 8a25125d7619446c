//! compressed-tensors' layouts: U8 codes `[N, K/2]` as `.weight_packed`, `.weight_scale` beside them, and for NVFP4
//! `.weight_global_scale`, which divides (`compressed_tensors/compressors`, vLLM's project).

use super::Layout;
use super::siblings::{Named, Siblings};
use crate::Result;
use crate::fp4::{Factor, Fp4Tensor, Parts, ScaleKind};
use safetensors::Dtype;

pub(super) fn read(siblings: &Siblings<'_>, (n, k): (usize, usize)) -> Result<(Fp4Tensor, Layout)> {
    let codes = siblings.get("weight_packed")?;
    let scales = siblings.get("weight_scale")?;
    match scales.tensor.dtype {
        Dtype::F8_E4M3 => {
            let factor = siblings.get("weight_global_scale")?;
            let tensor = nvfp4(
                siblings,
                (&codes, &scales),
                (n, k),
                Factor::Div(factor.factor(siblings.reading())?),
            )?;
            // What activations are quantised by, which here they are not.
            siblings.see("input_global_scale");
            Ok((tensor, Layout::CompressedNvfp4))
        }
        Dtype::U8 | Dtype::F8_E8M0 => {
            let tensor = packed(
                siblings,
                (&codes, &scales),
                (n, k),
                (32, ScaleKind::E8M0),
                Factor::None,
            )?;
            Ok((tensor, Layout::CompressedMxfp4))
        }
        other => Err(scales.problem(format!(
            "dtype {other:?} beside packed codes; expected F8_E4M3 (NVFP4) or U8 (MXFP4)"
        ))),
    }
}

/// NVFP4: a group of 16 with E4M3 scales, and a factor.
pub(super) fn nvfp4(
    siblings: &Siblings<'_>,
    codes_and_scales: (&Named, &Named),
    shape: (usize, usize),
    factor: Factor,
) -> Result<Fp4Tensor> {
    packed(siblings, codes_and_scales, shape, (16, ScaleKind::E4M3), factor)
}

/// Codes, two in a byte, and a scale every `group`.
fn packed(
    siblings: &Siblings<'_>,
    (codes, scales): (&Named, &Named),
    (n, k): (usize, usize),
    (group, kind): (usize, ScaleKind),
    factor: Factor,
) -> Result<Fp4Tensor> {
    if codes.tensor.dtype != Dtype::U8 {
        return Err(codes.problem(format!("dtype {:?}; expected codes in U8", codes.tensor.dtype)));
    }
    if !k.is_multiple_of(group) {
        return Err(codes.problem(format!("K = {k} is not a multiple of the group of {group}")));
    }
    codes.expect_shape(&[n, k / 2])?;
    scales.expect_shape(&[n, k / group])?;
    let parts = Parts {
        shape: (n, k),
        group,
        codes: codes.tensor.bytes.clone(),
        scales: scales.tensor.bytes.clone(),
        kind,
        factor,
    };
    super::together(siblings, codes, scales, parts)
}
