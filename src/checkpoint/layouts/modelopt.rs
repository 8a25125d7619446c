//! ModelOpt's NVFP4: U8 codes `[N, K/2]` as `.weight`, E4M3 `.weight_scale`, and `.weight_scale_2`, which multiplies
//! (`modelopt/torch/export`, NVIDIA's project).

use super::siblings::Siblings;
use super::{Layout, compressed};
use crate::Result;
use crate::fp4::{Factor, Fp4Tensor};
use safetensors::Dtype;

pub(super) fn read(siblings: &Siblings<'_>, shape: (usize, usize)) -> Result<(Fp4Tensor, Layout)> {
    let codes = siblings.get("weight")?;
    let scales = siblings.get("weight_scale")?;
    if scales.tensor.dtype != Dtype::F8_E4M3 {
        return Err(scales.problem(format!(
            "dtype {:?} beside codes in U8; expected F8_E4M3 (ModelOpt NVFP4)",
            scales.tensor.dtype
        )));
    }
    let factor = siblings.get("weight_scale_2")?;
    let tensor = compressed::nvfp4(
        siblings,
        (&codes, &scales),
        shape,
        Factor::Mul(factor.factor(siblings.reading())?),
    )?;
    // What activations are quantised by, which here they are not.
    siblings.see("input_scale");
    Ok((tensor, Layout::ModelOpt))
}
