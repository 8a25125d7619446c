//! From a checkpoint's tensors to weights and layers.

use super::marlin;
use super::report::{Kept, LoadReport};
use super::safetensors::Checkpoint;
use crate::Result;
use crate::fp4::{Format, ScaleRule, Weight, quantize};
use crate::nn::MmfP4Linear;
use candle_core::{Device, Tensor};
use candle_nn::RmsNorm;
use std::cell::RefCell;
use std::collections::BTreeSet;

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Quantise floating-point linear layers while loading. Embeddings, output head and routers stay as they
    /// are: they cost little and matter much.
    pub quantize: Option<Format>,
}

/// Takes a model's weights out of a checkpoint and keeps account of it.
pub struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a LoadOptions,
    device: &'a Device,
    report: RefCell<LoadReport>,
    used: RefCell<BTreeSet<String>>,
}

impl<'a> Loader<'a> {
    /// Begins; norms and biases go to `device`.
    pub fn new(checkpoint: &'a Checkpoint, options: &'a LoadOptions, device: &'a Device) -> Self {
        Self {
            checkpoint,
            options,
            device,
            report: RefCell::default(),
            used: RefCell::default(),
        }
    }

    /// The linear layer `module` with its weight `[N, K]` and, if `bias`, its bias `[N]`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) names what is missing or malformed.
    pub fn linear(&self, module: &str, n: usize, k: usize, bias: bool) -> Result<MmfP4Linear> {
        let weight = self.weight(module, n, k)?;
        let bias = match bias {
            true => Some(Tensor::new(
                self.vector(&format!("{module}.bias"), n)?,
                &Device::Cpu,
            )?),
            false => None,
        };
        MmfP4Linear::new(weight, bias.as_ref())
    }

    /// The weight `[N, K]` of the linear layer `module`, FP4 or floating point as the checkpoint has it,
    /// quantised if that was asked for.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) names what is missing or malformed.
    pub fn weight(&self, module: &str, n: usize, k: usize) -> Result<Weight> {
        let weight = self.stored_weight(module, n, k)?;
        let (Some(format), Weight::Dense(dense)) = (self.options.quantize, &weight) else {
            self.account(&weight);
            return Ok(weight);
        };
        let name = format!("{module}.weight");
        if !k.is_multiple_of(format.group) {
            let reason = format!("K = {k} is not a multiple of the group of {}", format.group);
            self.report.borrow_mut().kept.push(Kept { name, reason });
            self.account(&weight);
            return Ok(weight);
        }
        let packed = quantize(&name, &dense.to_f32(), (n, k), format, ScaleRule::default())?;
        self.report.borrow_mut().quantized.add(packed.size_in_bytes());
        Ok(packed.into())
    }

    /// As [`weight`](Self::weight), but never quantised: embeddings, output head, routers.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) names what is missing or malformed.
    pub fn kept_weight(&self, module: &str, n: usize, k: usize) -> Result<Weight> {
        let weight = self.stored_weight(module, n, k)?;
        self.account(&weight);
        Ok(weight)
    }

    /// The norm `module` over `len` elements.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) names what is missing or malformed.
    pub fn rms_norm(&self, module: &str, len: usize, eps: f64) -> Result<RmsNorm> {
        let weight = self.vector(&format!("{module}.weight"), len)?;
        Ok(RmsNorm::new(Tensor::new(weight, self.device)?, eps))
    }

    /// The vector `name` of `len` floats.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) where it is missing or malformed.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let stored = self.checkpoint.get(name)?;
        let values = stored.vector(name, len)?;
        self.mark_used(name.to_string());
        self.report.borrow_mut().dense.add(stored.bytes.len());
        Ok(values)
    }

    /// Records that the experts of `module` were copied to lie together.
    pub fn note_copied(&self, module: &str, bytes: usize) {
        // Experts quantised in memory are always gathered: that is not worth telling.
        if bytes > 0 && self.options.quantize.is_none() {
            self.report.borrow_mut().copied.push((module.to_string(), bytes));
        }
    }

    /// Ends; tensors with an `ignored` prefix, or called `duplicate`, are not reported as unused.
    pub fn finish(self, ignored: &[String], duplicate: Option<&str>) -> LoadReport {
        let used = self.used.into_inner();
        let mut report = self.report.into_inner();
        for (name, _) in self
            .checkpoint
            .tensors()
            .filter(|(name, _)| !used.contains(*name))
        {
            if ignored.iter().any(|prefix| name.starts_with(prefix)) {
                report.ignored += 1;
            } else if !name.ends_with(".rotary_emb.inv_freq") && duplicate != Some(name) {
                report.unused.push(name.to_string());
            }
        }
        report
    }

    fn stored_weight(&self, module: &str, n: usize, k: usize) -> Result<Weight> {
        let name = format!("{module}.weight");
        let stored = self.checkpoint.get(&name)?;
        let weight = if marlin::is_packed(stored) {
            let weight = marlin::read(self.checkpoint, module, n, k)?;
            for beside in marlin::scale_names(module) {
                self.mark_used(beside);
            }
            for beside in [format!("{module}.group_size"), format!("{name}.group_size")] {
                self.mark_used(beside);
            }
            weight.into()
        } else {
            stored.matrix(&name, n, k)?.into()
        };
        self.mark_used(name);
        Ok(weight)
    }

    fn account(&self, weight: &Weight) {
        let mut report = self.report.borrow_mut();
        match weight {
            Weight::Fp4(tensor) => report.fp4.add(tensor.size_in_bytes()),
            Weight::Dense(tensor) => report.dense.add(tensor.bytes().len()),
        }
    }

    fn mark_used(&self, name: String) {
        self.used.borrow_mut().insert(name);
    }
}
