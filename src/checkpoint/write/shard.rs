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
use std::ops::Range;
use std::path::Path;

/// Where a weight lies.
#[derive(Clone)]
struct Written<'a> {
    file: &'a str,
    codes: Range<usize>,
    scales: Range<usize>,
}

/// Makes what files consist of. Holds one weight at a time or, with calibration, those of a layer.
pub struct Maker<'a, 'b> {
    plan: &'a Plan<'a>,
    partial: &'a Partial<'a>,
    inputs: Option<&'b mut dyn LayerInputs>,
    /// Told the source's bytes of what is done.
    progress: &'a mut dyn FnMut(u64),
    /// The layer that inputs are asked for next.
    next: usize,
    /// By index in [`Plan::linears`], until they are written: those of odd sizes stand at the end of their file.
    rounded: BTreeMap<usize, Fp4Tensor>,
    /// By index in [`Plan::linears`], what an interrupted run has written.
    written: BTreeMap<usize, Written<'a>>,
    /// The file of these that was read last.
    mapped: Option<(&'a str, Bytes)>,
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
            written: written(plan, partial),
            mapped: None,
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
        let tensor = match self.rounded.remove(&index) {
            Some(rounded) => rounded,
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
    fn read(&mut self, index: usize, written: Written<'a>) -> Result<Fp4Tensor> {
        let path = self.partial.folder().join(written.file);
        let bytes = match &self.mapped {
            Some((file, bytes)) if *file == written.file => bytes.clone(),
            _ => Bytes::map_file(&path)?,
        };
        self.mapped = Some((written.file, bytes.clone()));
        let linear = &self.plan.linears[index];
        let part = |range| {
            let shorter = || Error::tensor(linear.name, Some(path.clone()), "its file has become shorter");
            bytes.slice(range).ok_or_else(shorter)
        };
        let parts = Parts {
            shape: linear.matrix.shape(),
            group: self.plan.format.group,
            codes: part(written.codes)?,
            scales: part(written.scales)?,
            kind: self.plan.format.kind,
            factor: self.needed_factor(index)?.map_or(Factor::None, Factor::Mul),
        };
        Fp4Tensor::new(linear.name, parts)
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
    fn is_open(&self, module: &str) -> bool {
        let index = self.plan.index(module);
        index.is_some_and(|index| !self.written.contains_key(&index))
    }

    fn round(&mut self, module: &str, feedback: Option<&Feedback>) -> Result<Option<Fp4Tensor>> {
        let Some(index) = self.plan.index(module) else {
            return Ok(None);
        };
        if let Some(written) = self.written.get(&index).cloned() {
            return self.read(index, written).map(Some);
        }
        self.plain += usize::from(feedback.is_none());
        let tensor = self.quantize(index, feedback)?;
        self.rounded.insert(index, tensor.clone());
        Ok(Some(tensor))
    }
}

/// The weights of the files that are there.
fn written<'a>(plan: &'a Plan<'_>, partial: &Partial<'_>) -> BTreeMap<usize, Written<'a>> {
    let mut found = BTreeMap::new();
    for (name, file) in plan.files.iter().filter(|(name, _)| partial.has(name)) {
        for (entry, range) in file.ranges() {
            let (index, is_codes) = match entry.content {
                Content::Codes(index) => (index, true),
                Content::Scales(index) => (index, false),
                Content::Copy(_) | Content::Divisor(_) => continue,
            };
            let weight = found.entry(index).or_insert(Written {
                file: name,
                codes: 0..0,
                scales: 0..0,
            });
            match is_codes {
                true => weight.codes = range,
                false => weight.scales = range,
            }
        }
    }
    found
}
