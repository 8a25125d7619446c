//! The bytes of a file.

use super::calibrate::LayerInputs;
use super::plan::{Content, Plan};
use crate::checkpoint::layout::File;
use crate::fp4::{Factor, Fp4Tensor, ScaleKind, quantize_compensated, quantize_dense, shared_factor};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Writes a file; `progress` is told the source's bytes of each tensor that is done. Answers how many weights were rounded
/// plainly because `inputs` knew too little of them.
pub fn write(
    plan: &Plan<'_>,
    file: &File<Content<'_>>,
    path: &Path,
    inputs: &mut Option<&mut dyn LayerInputs>,
    progress: &mut dyn FnMut(u64),
) -> Result<usize> {
    let mut maker = Maker {
        plan,
        inputs,
        plain: 0,
        packed: None,
        factors: BTreeMap::new(),
    };
    file.write(path, |entry, put| match entry.content {
        Content::Copy(stored) => {
            put(&stored.bytes)?;
            progress(stored.bytes.len() as u64);
            Ok(())
        }
        Content::Codes(index) => {
            put(maker.quantize(index)?.codes())?;
            progress(plan.linears[index].matrix.bytes().len() as u64);
            Ok(())
        }
        Content::Scales(index) => match &maker.packed {
            Some((of, tensor)) if *of == index => put(tensor.scales()),
            _ => Err(Error::tensor(&entry.name, None, "scales before their codes")),
        },
        // A power of two: the reciprocal is exact.
        Content::Divisor(index) => put(&(1.0 / maker.factor(index)?).to_le_bytes()),
    })?;
    Ok(maker.plain)
}

/// Holds one weight at a time.
struct Maker<'a, 'b> {
    plan: &'a Plan<'a>,
    inputs: &'a mut Option<&'b mut dyn LayerInputs>,
    /// How many weights they knew too little of.
    plain: usize,
    packed: Option<(usize, Fp4Tensor)>,
    /// Of those that share one, found once: divisors are the last in a file, when the weights are long out of memory.
    factors: BTreeMap<usize, f32>,
}

impl Maker<'_, '_> {
    fn quantize(&mut self, index: usize) -> Result<&Fp4Tensor> {
        let factor = match self.plan.format.kind {
            ScaleKind::E4M3 => Some(self.factor(index)?),
            _ => None,
        };
        let linear = &self.plan.linears[index];
        let (name, matrix) = (linear.name, &linear.matrix);
        let Plan { format, rule, .. } = *self.plan;
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let tensor = match self.inputs {
            None => quantize_dense(name, matrix, format, rule, factor)?,
            Some(inputs) => match inputs.feedback(module)? {
                Some(feedback) => quantize_compensated(name, matrix, format, rule, factor, feedback)?,
                None => {
                    self.plain += 1;
                    quantize_dense(name, matrix, format, rule, factor)?
                }
            },
        };
        debug_assert!(factor.is_none_or(|factor| tensor.factor() == Factor::Mul(factor)));
        Ok(&self.packed.insert((index, tensor)).1)
    }

    fn factor(&mut self, index: usize) -> Result<f32> {
        let set = self.plan.linears[index].fused;
        if let Some(factor) = self.factors.get(&set) {
            return Ok(*factor);
        }
        let members = self.plan.fused[set]
            .iter()
            .map(|member| &self.plan.linears[*member]);
        let members: Vec<_> = members.map(|linear| (linear.name, &linear.matrix)).collect();
        let factor = shared_factor(&members)?;
        self.factors.insert(set, factor);
        Ok(factor)
    }
}
