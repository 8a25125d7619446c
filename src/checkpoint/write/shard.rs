//! The bytes of files.

use super::calibrate::{LayerInputs, Rounding};
use super::plan::{Content, Plan};
use super::resume::Partial;
use crate::checkpoint::layout::File;
use crate::fp4::{
    Bytes, Factor, Feedback, Fp4Tensor, Parts, ScaleKind, quantize_compensated, quantize_dense, shared_factor,
};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Makes what files consist of. Holds one weight at a time or, with calibration, those of a layer.
pub struct Maker<'a, 'b> {
    plan: &'a Plan<'a>,
    partial: &'a Partial<'a>,
    inputs: Option<&'b mut dyn LayerInputs>,
    /// Told the source's bytes of what is done.
    progress: &'a mut dyn FnMut(u64),
    /// The layer that inputs are asked for next.
    next: usize,
    /// By index in [`Plan::linears`], those of the layer before.
    rounded: BTreeMap<usize, Fp4Tensor>,
    packed: Option<(usize, Fp4Tensor)>,
    /// Of those that share one, found once: divisors are the last in a file, when the weights are long out of memory.
    factors: BTreeMap<usize, f32>,
    plain: usize,
}

impl<'a, 'b> Maker<'a, 'b> {
    pub fn new(
        plan: &'a Plan<'a>,
        partial: &'a Partial<'a>,
        inputs: Option<&'b mut dyn LayerInputs>,
        progress: &'a mut dyn FnMut(u64),
    ) -> Self {
        Self {
            plan,
            partial,
            inputs,
            progress,
            next: 0,
            rounded: BTreeMap::new(),
            packed: None,
            factors: BTreeMap::new(),
            plain: 0,
        }
    }

    /// How many weights were rounded plainly because too little was known of their inputs.
    pub fn plain(&self) -> usize {
        self.plain
    }

    /// Writes a file.
    pub fn write(&mut self, file: &File<Content<'_>>, path: &Path) -> Result<()> {
        file.write(path, |entry, put| match entry.content {
            Content::Copy(stored) => {
                put(&stored.bytes)?;
                (self.progress)(stored.bytes.len() as u64);
                Ok(())
            }
            Content::Codes(index) => put(self.weight(index)?.codes()),
            Content::Scales(index) => match &self.packed {
                Some((of, tensor)) if *of == index => put(tensor.scales()),
                _ => Err(Error::tensor(&entry.name, None, "scales before their codes")),
            },
            // A power of two: the reciprocal is exact.
            Content::Divisor(index) => put(&(1.0 / self.factor(index)?).to_le_bytes()),
        })
    }

    fn weight(&mut self, index: usize) -> Result<&Fp4Tensor> {
        if let Some(layer) = self.plan.layer(index) {
            self.round_up_to(layer)?;
        }
        let tensor = match self.rounded.get(&index) {
            Some(rounded) => rounded.clone(),
            None => {
                self.plain += usize::from(self.inputs.is_some());
                self.quantize(index, None)?
            }
        };
        Ok(&self.packed.insert((index, tensor)).1)
    }

    /// Has inputs round all layers up to one.
    fn round_up_to(&mut self, layer: usize) -> Result<()> {
        // While they round, what rounds is this.
        let Some(inputs) = self.inputs.take() else {
            return Ok(());
        };
        let mut done = Ok(());
        while done.is_ok() && self.next <= layer && self.next < inputs.layers() {
            self.rounded.clear();
            done = inputs.round_layer(self.next, self);
            self.next += 1;
        }
        self.inputs = Some(inputs);
        done
    }

    fn quantize(&mut self, index: usize, feedback: Option<&Feedback>) -> Result<Fp4Tensor> {
        let factor = self.needed_factor(index)?;
        let linear = &self.plan.linears[index];
        let (name, matrix) = (linear.name, &linear.matrix);
        let Plan { format, rule, .. } = *self.plan;
        let tensor = match feedback {
            None => quantize_dense(name, matrix, format, rule, factor)?,
            Some(feedback) => quantize_compensated(name, matrix, format, rule, factor, feedback)?,
        };
        debug_assert!(factor.is_none_or(|factor| tensor.factor() == Factor::Mul(factor)));
        (self.progress)(matrix.bytes().len() as u64);
        Ok(tensor)
    }

    /// A weight as an interrupted run has written it.
    fn written(&mut self, index: usize) -> Result<Option<Fp4Tensor>> {
        let codes = |content: &Content<'_>| matches!(content, Content::Codes(of) if *of == index);
        let scales = |content: &Content<'_>| matches!(content, Content::Scales(of) if *of == index);
        let mut files = self.plan.files.iter().filter(|(name, _)| self.partial.has(name));
        let found = files.find_map(|(name, file)| Some((name, file.range(codes)?, file.range(scales)?)));
        let Some((file, codes, scales)) = found else {
            return Ok(None);
        };
        let bytes = Bytes::map_file(self.partial.folder().join(file))?;
        let (Some(codes), Some(scales)) = (bytes.slice(codes), bytes.slice(scales)) else {
            return Ok(None);
        };
        let linear = &self.plan.linears[index];
        let parts = Parts {
            shape: linear.matrix.shape(),
            group: self.plan.format.group,
            codes,
            scales,
            kind: self.plan.format.kind,
            factor: self.needed_factor(index)?.map_or(Factor::None, Factor::Mul),
        };
        Fp4Tensor::new(linear.name, parts).map(Some)
    }

    /// What scales of a format that has factors are multiplied by.
    fn needed_factor(&mut self, index: usize) -> Result<Option<f32>> {
        match self.plan.format.kind {
            ScaleKind::E4M3 => self.factor(index).map(Some),
            _ => Ok(None),
        }
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

impl Rounding for Maker<'_, '_> {
    fn is_finished(&self, index: usize) -> bool {
        let missing = self.plan.files.iter().filter(|(name, _)| !self.partial.has(name));
        let mut entries = missing.flat_map(|(_, file)| file.entries());
        !entries.any(|entry| match entry.content {
            Content::Codes(linear) => self.plan.layer(linear) == Some(index),
            _ => false,
        })
    }

    fn round(&mut self, module: &str, feedback: Option<&Feedback>) -> Result<Option<Fp4Tensor>> {
        let Some(index) = self.plan.index(module) else {
            return Ok(None);
        };
        if let Some(written) = self.written(index)? {
            return Ok(Some(written));
        }
        self.plain += usize::from(feedback.is_none());
        let tensor = self.quantize(index, feedback)?;
        self.rounded.insert(index, tensor.clone());
        Ok(Some(tensor))
    }
}
