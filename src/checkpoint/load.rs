//! From a checkpoint's tensors to weights and layers.

use super::files::ModelFiles;
use super::keep::Keep;
use super::layouts::{self, Found, Layout, Reading};
use super::ledger::Ledger;
use super::quality::Survey;
use super::report::{Kept, LoadReport, OwnReason, RoundedHead};
use super::safetensors::Checkpoint;
use crate::Result;
use crate::cpu::Arithmetic;
use crate::fp4::{
    Bytes, Factor, Format, Fp4Tensor, Int8Tensor, Parts, ScaleRule, Weight, quantize, quantize_dense,
};
use crate::kv::CacheKind;
use crate::nn::{CacheSize, MmfP4Linear, RmsNorm};
use candle_core::{DType, Device, Tensor};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Quantise floating-point linear layers while loading. Embeddings, output head and routers stay as they
    /// are: they cost little and matter much.
    pub quantize: Option<Format>,
    /// Decoder layers whose weights are left as they are when quantising, counted from 0 or, if negative, from
    /// the end: -1 is the last.
    pub skip_layers: Vec<i64>,
    /// Weights that are left as they are when quantising, by their tensors' names: a text with `*` matches whole
    /// names, each star standing for any text (`*.self_attn.*`, `model.layers.*.mlp.shared_experts.*`); one
    /// without matches a part of the name (`o_proj`). A pattern that matches nothing is among
    /// [`LoadReport::warnings`].
    pub keep: Vec<String>,
    /// Another checkpoint of the same model, mostly the original in floating point: tensors that this one lacks are taken from
    /// there, norms and the routers' biases as well as whole weights, if they are in floating point there.
    /// [`LoadReport::supplied`] names them. Of a base with an index only the files that hold them are opened.
    pub base: Option<ModelFiles>,
    /// The layout that the checkpoint's FP4 weights are in. Their tensors tell it, but for scales `[N, K/group]` that could as
    /// well be `[K/group, N]`: this decides. A weight in another layout is an error then.
    pub layout: Option<Layout>,
    /// How activations meet FP4 weights on the CPU: rounded to eight bits, or exactly.
    pub arithmetic: Arithmetic,
    /// Run the experts that a token chooses one after the other instead of in one fused op: slower, and there to
    /// measure by how much ([`SeparateMoe`](crate::nn::SeparateMoe)).
    pub separate_experts: bool,
    /// Round a floating-point output head to eight bits while loading ([`Int8Tensor`]), in memory of this process: half
    /// the bytes of a BF16 one to read a token. One that shares its matrix with the embeddings is rounded beside them;
    /// one in FP4 stays, which [`LoadReport::warnings`] says.
    pub int8_head: bool,
    /// What goes from op to op: F32, F16 or BF16. `None`: F32 on the CPU, whose kernels compute in it, and BF16 on a GPU.
    pub activations: Option<DType>,
    /// The cache that a [`Pipeline`](crate::generation::Pipeline) makes.
    pub kv_cache: CacheKind,
    /// How large it is, of all its sequences together; see
    /// [`Model::new_kv_cache`](crate::models::glm4_moe_lite::Model::new_kv_cache) for `None`. What the machine cannot hold,
    /// a GPU the weights beside it, is refused before anything is loaded.
    pub kv_size: Option<CacheSize>,
}

impl LoadOptions {
    /// The dtype of [`activations`](Self::activations) on a device.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for another dtype.
    pub fn activations_on(&self, device: &Device) -> Result<DType> {
        match self.activations {
            None if device.is_cpu() => Ok(DType::F32),
            None => Ok(DType::BF16),
            Some(dtype @ (DType::F32 | DType::F16 | DType::BF16)) => Ok(dtype),
            Some(other) => {
                let found = format!("{other:?}");
                Err(crate::Error::argument(
                    "load",
                    "activations",
                    "F32, F16 or BF16",
                    found,
                ))
            }
        }
    }
}

/// How the names end of what other kernels quantise activations by.
const INPUT_SCALES: [&str; 2] = ["input_scale", "input_global_scale"];

/// A weight as a checkpoint has it.
struct Stored {
    weight: Weight,
    /// Of an FP4 weight.
    layout: Option<Layout>,
    /// Bytes of its tensors.
    stored: usize,
    /// Bytes that lie in memory of this process.
    own: usize,
    /// The file that it is in.
    file: Option<PathBuf>,
}

/// Takes a model's weights out of a checkpoint and keeps account of it.
pub struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a LoadOptions,
    keep: Keep<'a>,
    /// Linear layers' weights that others are to stand for, by module.
    replaced: Option<&'a BTreeMap<String, Fp4Tensor>>,
    /// Whether there are weights in k-quants, which others could not be in.
    k_quants: bool,
    reading: Reading,
    report: RefCell<LoadReport>,
    ledger: RefCell<Ledger>,
    survey: RefCell<Survey>,
    used: RefCell<BTreeSet<String>>,
}

impl<'a> Loader<'a> {
    /// Begins to load a model of so many decoder `layers`.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for options that make no sense: a layer that is not there,
    /// an empty pattern, a group that no tensor can have.
    pub fn new(checkpoint: &'a Checkpoint, options: &'a LoadOptions, layers: usize) -> Result<Self> {
        if let Some(format) = options.quantize {
            format.check("load")?;
        }
        Ok(Self {
            checkpoint,
            options,
            keep: Keep::new(options, layers)?,
            replaced: None,
            k_quants: layouts::has_k_quants(checkpoint),
            reading: Reading {
                layout: options.layout,
                headers_only: false,
            },
            report: RefCell::default(),
            ledger: RefCell::default(),
            survey: RefCell::default(),
            used: RefCell::default(),
        })
    }

    /// The same, of which only the report is asked for: of data no more than a sample is read, nothing is quantised, and the
    /// weights that it gives are of no use but for their sizes.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn of_headers(
        checkpoint: &'a Checkpoint,
        options: &'a LoadOptions,
        layers: usize,
    ) -> Result<Self> {
        let mut loader = Self::new(checkpoint, options, layers)?;
        loader.reading.headers_only = true;
        Ok(loader)
    }

    /// The same, with these weights in the place of the checkpoint's, by module.
    pub(crate) fn replacing(self, weights: &'a BTreeMap<String, Fp4Tensor>) -> Self {
        Self {
            replaced: Some(weights),
            ..self
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
        Ok(MmfP4Linear::new(weight, bias.as_ref())?.with_arithmetic(self.arithmetic()))
    }

    /// How activations are to meet FP4 weights on the CPU.
    pub fn arithmetic(&self) -> Arithmetic {
        self.options.arithmetic
    }

    /// The weight `[N, K]` of the linear layer `module`, FP4 or floating point as the checkpoint has it,
    /// quantised if that was asked for.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) names what is missing or malformed.
    pub fn weight(&self, module: &str, n: usize, k: usize) -> Result<Weight> {
        if let Some(weight) = self.replaced.and_then(|weights| weights.get(module)) {
            return Ok(weight.clone().into());
        }
        self.quantized(module, self.take(self.read(module, n, k)?))
    }

    /// Whether the checkpoint has a module.
    pub fn has_module(&self, module: &str) -> bool {
        self.checkpoint.has_module(module)
    }

    /// As [`weight`](Self::weight), of a module that has a matrix `[N, K]` a head: `[heads · N, K]`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) names what is missing or malformed.
    pub fn stack(&self, module: &str, heads: usize, n: usize, k: usize) -> Result<Weight> {
        let found = layouts::read_stack(self.checkpoint, module, (heads * n, k), self.reading)?;
        self.quantized(module, self.take(found))
    }

    /// A weight quantised, if that was asked for.
    fn quantized(&self, module: &str, stored: Stored) -> Result<Weight> {
        let (n, k) = stored.weight.shape();
        let format = (self.options.quantize).filter(|_| !matches!(stored.weight, Weight::Fp4(_)));
        let Some(format) = format else {
            if let Weight::Fp4(tensor) = &stored.weight {
                self.survey.borrow_mut().linear(tensor, true);
            }
            if let Weight::Dense(dense) = &stored.weight
                && self.k_quants
                && !k.is_multiple_of(layouts::K_BLOCK)
            {
                let (kind, block) = (dense.kind(), layouts::K_BLOCK);
                self.report.borrow_mut().kept.push(Kept {
                    name: format!("{module}.weight"),
                    reason: format!(
                        "the file has it in {kind:?}: K = {k} is not a multiple of {block}, which k-quants need"
                    ),
                });
            }
            return Ok(self.accounted(module, stored));
        };
        let name = format!("{module}.weight");
        let odd = || format!("K = {k} is not a multiple of the group of {}", format.group);
        let reason = self.keep.reason(&name);
        if let Some(reason) = reason.or_else(|| (!k.is_multiple_of(format.group)).then(odd)) {
            self.report.borrow_mut().kept.push(Kept { name, reason });
            return Ok(self.accounted(module, stored));
        }
        let rule = ScaleRule::default();
        let packed = match &stored.weight {
            _ if self.reading.headers_only => unwritten(&name, (n, k), format),
            Weight::Dense(dense) => quantize_dense(&name, dense, format, rule, None),
            other => quantize(&name, &other.to_f32(), (n, k), format, rule),
        };
        let packed = packed.map_err(|error| error.in_file(stored.file.clone()))?;
        self.survey.borrow_mut().linear(&packed, false);
        let size = packed.size_in_bytes();
        self.report.borrow_mut().quantized.add(size);
        let weight = packed.into();
        let mut ledger = self.ledger.borrow_mut();
        ledger.weight(module, &weight, None, stored.stored, (OwnReason::Quantized, size));
        Ok(weight)
    }

    /// As [`weight`](Self::weight), but never quantised: embeddings, output head, routers.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) names what is missing or malformed.
    pub fn kept_weight(&self, module: &str, n: usize, k: usize) -> Result<Weight> {
        Ok(self.accounted(module, self.sensitive_weight(module, n, k)?))
    }

    /// The output head `[N, K]`: `tied` where it shares the embeddings' matrix, else that of `module`; rounded to eight
    /// bits where [`LoadOptions::int8_head`] asks for it, else as it is.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) names what is missing or malformed,
    /// [`Error::NonFinite`](crate::Error::NonFinite) a value that cannot be rounded.
    pub fn head(&self, module: &str, n: usize, k: usize, tied: Option<&Weight>) -> Result<Weight> {
        let stored = match tied {
            Some(weight) => Stored {
                weight: weight.clone(),
                layout: None,
                stored: 0,
                own: 0,
                file: None,
            },
            None => self.sensitive_weight(module, n, k)?,
        };
        if self.options.int8_head {
            if let Weight::Dense(dense) = &stored.weight {
                let rounded = match self.reading.headers_only {
                    true => Int8Tensor::unwritten((n, k)),
                    false => Int8Tensor::round(&format!("{module}.weight"), dense),
                };
                let rounded = rounded.map_err(|error| error.in_file(stored.file.clone()))?;
                self.report.borrow_mut().int8_head = Some(RoundedHead {
                    before: stored.weight.size_in_bytes(),
                    after: rounded.size_in_bytes(),
                });
                let weight = Weight::from(rounded);
                let own = (OwnReason::HeadRounded, weight.size_in_bytes());
                let mut ledger = self.ledger.borrow_mut();
                ledger.weight(module, &weight, None, stored.stored, own);
                return Ok(weight);
            }
            self.survey.borrow_mut().int8_head_without_effect();
        }
        match tied {
            Some(_) => Ok(stored.weight),
            None => Ok(self.accounted(module, stored)),
        }
    }

    /// The norm `module` over `len` elements.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) names what is missing or malformed.
    pub fn rms_norm(&self, module: &str, len: usize, eps: f64) -> Result<RmsNorm> {
        let weight = self.vector(&format!("{module}.weight"), len)?;
        RmsNorm::new(weight, eps)
    }

    /// The vector `name` of `len` floats.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) where it is missing or malformed.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let stored = self.checkpoint.get(name)?;
        let values = match self.reading.headers_only {
            true => {
                stored.float_kind(name)?;
                stored.expect_shape(name, &[len])?;
                vec![0.0; len]
            }
            false => stored.vector(name, len)?,
        };
        self.mark_used(name.to_string());
        self.report.borrow_mut().dense.add(stored.bytes.len());
        self.ledger.borrow_mut().vector(name, len, stored.bytes.len());
        Ok(values)
    }

    /// Whether [`LoadOptions::separate_experts`] is set.
    pub(crate) fn separates_experts(&self) -> bool {
        self.options.separate_experts
    }

    /// Records that the weights of the MLP or the experts of `module` were copied to lie together.
    pub fn note_copied(&self, module: &str, bytes: usize) {
        self.ledger.borrow_mut().gathered(module, bytes);
        let mut report = self.report.borrow_mut();
        // Experts made in memory are always gathered: that is not worth telling.
        if bytes > 0 && self.options.quantize.is_none() && report.repacked.tensors == 0 {
            report.copied.push((module.to_string(), bytes));
        }
    }

    /// Ends; tensors with an `ignored` prefix, or called `duplicate`, are not reported as unused.
    pub fn finish(self, ignored: &[String], duplicate: Option<&str>) -> LoadReport {
        let used = self.used.into_inner();
        let mut report = self.report.into_inner();
        report.warnings = self.survey.into_inner().warnings();
        report.warnings.extend(self.keep.warnings());
        report.dangling = self.checkpoint.dangling().to_vec();
        (report.components, report.own) = self.ledger.into_inner().told();
        for (name, tensor) in self
            .checkpoint
            .tensors()
            .filter(|(name, _)| !used.contains(*name))
        {
            if ignored.iter().any(|prefix| name.starts_with(prefix)) {
                report.ignored += 1;
                report.ignored_bytes += tensor.bytes.len();
            } else if !name.ends_with(".rotary_emb.inv_freq") && duplicate != Some(name) {
                report.unused.push(name.to_string());
            }
        }
        report
    }

    /// Keeps account of a weight that was read.
    fn take(&self, found: Found) -> Stored {
        let first = found.used.first().and_then(|name| self.checkpoint.find(name));
        let file = first.map(|tensor| tensor.file.clone());
        for name in found.used {
            let scales_inputs = INPUT_SCALES.iter().any(|suffix| name.ends_with(suffix));
            let is_new = self.used.borrow_mut().insert(name);
            self.report.borrow_mut().input_scales += usize::from(is_new && scales_inputs);
        }
        self.report.borrow_mut().layouts.extend(found.layout);
        Stored {
            weight: found.weight,
            layout: found.layout,
            stored: found.stored,
            own: found.own,
            file,
        }
    }

    fn read(&self, module: &str, n: usize, k: usize) -> Result<Found> {
        layouts::read(self.checkpoint, module, (n, k), self.reading)
    }

    fn sensitive_weight(&self, module: &str, n: usize, k: usize) -> Result<Stored> {
        let stored = self.take(self.read(module, n, k)?);
        self.survey.borrow_mut().sensitive(module, &stored.weight);
        // A pattern that names it is met, if not by this.
        self.keep.reason(&format!("{module}.weight"));
        Ok(stored)
    }

    fn accounted(&self, module: &str, stored: Stored) -> Weight {
        let mut report = self.report.borrow_mut();
        let size = stored.weight.size_in_bytes();
        let reason = match &stored.weight {
            Weight::Fp4(_) if stored.layout.is_some_and(Layout::is_repacked) => OwnReason::Repacked,
            Weight::Fp4(_) => OwnReason::ScalesTurned,
            _ => OwnReason::Misaligned,
        };
        let mut ledger = self.ledger.borrow_mut();
        ledger.weight(
            module,
            &stored.weight,
            stored.layout,
            stored.stored,
            (reason, stored.own),
        );
        match &stored.weight {
            Weight::Fp4(_) if reason == OwnReason::Repacked => report.repacked.add(size),
            Weight::Fp4(_) => report.fp4.add(size),
            Weight::Dense(_) => report.dense.add(size),
            Weight::Blocks(_) => report.blocks.add(size),
            // Made here and told apart; a checkpoint has none.
            Weight::Int8(_) => {}
        }
        stored.weight
    }

    fn mark_used(&self, name: String) {
        self.used.borrow_mut().insert(name);
    }
}

/// A weight of the size that quantising would give, of zeros that take no memory.
fn unwritten(name: &str, shape: (usize, usize), format: Format) -> Result<Fp4Tensor> {
    let (n, k) = shape;
    let parts = Parts {
        shape,
        group: format.group,
        codes: Bytes::unwritten(n * k / 2)?,
        scales: Bytes::unwritten(n * (k / format.group) * format.kind.size())?,
        kind: format.kind,
        factor: Factor::None,
    };
    Fp4Tensor::unread(name, parts)
}
