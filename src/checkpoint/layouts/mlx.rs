//! MLX's layouts: U32 codes `[N, K/8]` as `.weight`, U8 `.scales` beside them, and no biases: E8M0 every 32 (`mxfp4`) or
//! E4M3 every 16 (`nvfp4`) (`mlx/ops.cpp`, `fp_quantize`).

use super::siblings::Siblings;
use super::{Layout, together};
use crate::Result;
use crate::fp4::{Factor, Fp4Tensor, Parts, ScaleKind};

pub(super) fn read(siblings: &Siblings<'_>, (n, k): (usize, usize)) -> Result<(Fp4Tensor, Layout)> {
    let codes = siblings.get("weight")?;
    if !k.is_multiple_of(16) {
        return Err(codes.problem(format!(
            "packed codes, but K = {k} is not a multiple of the smallest group, 16"
        )));
    }
    codes.expect_shape(&[n, k / 8])?;
    let scales = siblings.get("scales")?;
    let (group, kind, layout) = match scales.tensor.shape[..] {
        [rows, groups] if rows == n && groups * 32 == k => (32, ScaleKind::E8M0, Layout::MlxMxfp4),
        [rows, groups] if rows == n && groups * 16 == k => (16, ScaleKind::E4M3, Layout::MlxNvfp4),
        _ => {
            let problem = format!(
                "shape {:?}; expected [{n}, {k} / 32] (mxfp4) or [{n}, {k} / 16] (nvfp4)",
                scales.tensor.shape
            );
            return Err(scales.problem(problem));
        }
    };
    let parts = Parts {
        shape: (n, k),
        group,
        codes: codes.tensor.bytes.clone(),
        scales: scales.tensor.bytes.clone(),
        kind,
        factor: Factor::None,
    };
    Ok((together(siblings, &codes, &scales, parts)?, layout))
}
