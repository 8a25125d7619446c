//! The tensors of one linear layer.

use super::{Layout, Reading};
use crate::checkpoint::safetensors::{Checkpoint, StoredTensor};
use crate::fp4::Bytes;
use crate::{Error, Result};
use safetensors::Dtype;
use std::cell::RefCell;

/// A linear layer's tensors: those under its own name or, of an expert, its share of those of all experts.
#[derive(Debug)]
pub(super) struct Siblings<'a> {
    checkpoint: &'a Checkpoint,
    /// What their names begin with.
    module: String,
    share: Share,
    reading: Reading,
    used: RefCell<Vec<String>>,
    given: RefCell<Vec<Bytes>>,
}

/// How much of the tensors is the layer's.
#[derive(Debug, Clone, Copy)]
enum Share {
    /// All.
    Whole,
    /// One of a stack.
    One(usize),
    /// All of a stack, its matrices one below the other.
    Stacked,
    /// One of a stack that is a parameter of its own, as ModelOpt has it.
    Packed(Packed),
}

/// One expert's matrix in tensors of all experts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packed {
    /// The expert.
    pub expert: usize,
    /// Which half of the rows it is: 0 the gate's, 1 up's; `None` where all are one matrix.
    pub half: Option<usize>,
}

/// A tensor and its name.
#[derive(Debug)]
pub(super) struct Named {
    pub name: String,
    pub tensor: StoredTensor,
}

impl Named {
    pub fn problem(&self, problem: impl Into<String>) -> Error {
        self.tensor.problem(&self.name, problem)
    }

    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        self.tensor.expect_shape(&self.name, expected)
    }

    /// The one number that it is, a tensor's factor; 1 where data are not read.
    pub fn factor(&self, reading: Reading) -> Result<f32> {
        match self.tensor.shape.iter().product() {
            1usize => self.factor_at(0, reading),
            _ => Err(self.problem(format!("shape {:?}; expected one number", self.tensor.shape))),
        }
    }

    /// One of the numbers that it is, counted in the order in which they lie; 1 where data are not read.
    pub fn factor_at(&self, index: usize, reading: Reading) -> Result<f32> {
        let count = self.tensor.shape.iter().product();
        let flat = StoredTensor {
            shape: vec![count],
            ..self.tensor.clone()
        };
        if reading.headers_only {
            return flat.float_kind(&self.name).map(|_| 1.0);
        }
        let factor = flat.vector(&self.name, count)?[index];
        match factor.is_normal() && factor > 0.0 {
            true => Ok(factor),
            false => Err(self.problem(format!("it is {factor}; expected a number above 0"))),
        }
    }

    /// The one integer that it is.
    pub fn integer(&self) -> Result<i64> {
        let bytes = &self.tensor.bytes[..];
        let value = match self.tensor.dtype {
            Dtype::U8 => bytes.try_into().ok().map(u8::from_le_bytes).map(i64::from),
            Dtype::I32 => bytes.try_into().ok().map(i32::from_le_bytes).map(i64::from),
            Dtype::U32 => bytes.try_into().ok().map(u32::from_le_bytes).map(i64::from),
            Dtype::I64 => bytes.try_into().ok().map(i64::from_le_bytes),
            _ => None,
        };
        value.ok_or_else(|| {
            let (dtype, shape) = (self.tensor.dtype, &self.tensor.shape);
            self.problem(format!(
                "dtype {dtype:?} and shape {shape:?}; expected one integer"
            ))
        })
    }
}

impl<'a> Siblings<'a> {
    /// Of a module under its own name or, of an expert that is not there, under that of all.
    pub fn of(checkpoint: &'a Checkpoint, module: &str, reading: Reading) -> Self {
        let own = Self::new(checkpoint, module.to_string(), Share::Whole, reading);
        let of_all = || {
            let (module, share) = of_switch(module)?;
            Some(Self::new(checkpoint, module, share, reading)).filter(Self::is_there)
        };
        let of_packed = || {
            let (module, share) = of_packed(module)?;
            Some(Self::new(checkpoint, module, share, reading)).filter(Self::is_there)
        };
        match own.is_there() {
            true => own,
            false => of_all().or_else(of_packed).unwrap_or(own),
        }
    }

    /// Of a module whose weight has a matrix a head.
    pub fn stacked(checkpoint: &'a Checkpoint, module: &str, reading: Reading) -> Self {
        Self::new(checkpoint, module.to_string(), Share::Stacked, reading)
    }

    fn new(checkpoint: &'a Checkpoint, module: String, share: Share, reading: Reading) -> Self {
        Self {
            checkpoint,
            module,
            share,
            reading,
            used: RefCell::default(),
            given: RefCell::default(),
        }
    }

    /// How they are read.
    pub fn reading(&self) -> Reading {
        self.reading
    }

    /// Refuses a weight in another layout than the one that was named.
    pub fn check_layout(&self, found: Layout) -> Result<()> {
        let Some(named) = self.reading.layout.filter(|named| *named != found) else {
            return Ok(());
        };
        let problem = format!(
            "it is in {} ({}), and --layout says {}: name the former, or none",
            found.name(),
            found.told_by(),
            named.name()
        );
        let file = self
            .used
            .borrow()
            .first()
            .and_then(|name| self.checkpoint.find(name));
        Err(Error::tensor(
            &self.module,
            file.map(|tensor| tensor.file.clone()),
            problem,
        ))
    }

    fn is_there(&self) -> bool {
        match self.share {
            Share::Packed(_) => self.has("weight"),
            _ => self.checkpoint.has_module(&self.module),
        }
    }

    /// Where it lies in tensors of all experts, if these are parameters of their own.
    pub fn packed(&self) -> Option<Packed> {
        match self.share {
            Share::Packed(packed) => Some(packed),
            _ => None,
        }
    }

    /// Whether there are tensors of the weight, in whatever form.
    pub fn has_weight(&self) -> bool {
        self.packed().is_some() || self.checkpoint.has_weight_of(&self.module)
    }

    /// What messages call the layer.
    pub fn name(&self, suffix: &str) -> String {
        match (self.share, suffix) {
            (Share::Packed(_), "weight") => self.module.clone(),
            (Share::Packed(_), suffix) => format!("{}_{suffix}", self.module),
            _ => format!("{}.{suffix}", self.module),
        }
    }

    pub fn has(&self, suffix: &str) -> bool {
        self.checkpoint.find(&self.name(suffix)).is_some()
    }

    /// Whether one is there and has one of these dtypes.
    pub fn is(&self, suffix: &str, dtypes: &[Dtype]) -> bool {
        (self.checkpoint.find(&self.name(suffix))).is_some_and(|tensor| dtypes.contains(&tensor.dtype))
    }

    /// A tensor that has to be there: the layer's share of it or, of a [packed](Self::packed) one, all of it.
    pub fn get(&self, suffix: &str) -> Result<Named> {
        let name = self.name(suffix);
        let tensor = self.checkpoint.get(&name)?;
        self.see(suffix);
        let tensor = match self.share {
            Share::Whole => tensor.clone(),
            Share::One(index) => slice(&name, tensor, index)?,
            Share::Stacked => below_one_another(&name, tensor)?,
            Share::Packed(_) => {
                let tensor = tensor.clone();
                return Ok(Named { name, tensor });
            }
        };
        self.give(&tensor.bytes);
        Ok(Named { name, tensor })
    }

    /// Counts bytes of a file as the layer's.
    pub fn give(&self, bytes: &Bytes) {
        self.given.borrow_mut().push(bytes.clone());
    }

    /// Counts a tensor as used, if it is there.
    pub fn see(&self, suffix: &str) {
        if self.has(suffix) {
            self.used.borrow_mut().push(self.name(suffix));
        }
    }

    /// The names of the tensors that were used, and the bytes that were [given](Self::give).
    pub fn used(self) -> (Vec<String>, Vec<Bytes>) {
        (self.used.into_inner(), self.given.into_inner())
    }
}

/// Where MLX keeps an expert: `….experts.3.up_proj` is the fourth of `….switch_mlp.up_proj`.
fn of_switch(module: &str) -> Option<(String, Share)> {
    let (layer, expert) = module.split_once(".experts.")?;
    let (index, projection) = expert.split_once('.')?;
    Some((
        format!("{layer}.switch_mlp.{projection}"),
        Share::One(index.parse().ok()?),
    ))
}

/// Where ModelOpt keeps an expert of a model whose experts are parameters: `….experts.3.up_proj` is the second half of the
/// fourth of `….experts.gate_up_proj`.
fn of_packed(module: &str) -> Option<(String, Share)> {
    let (layer, expert) = module.split_once(".experts.")?;
    let (index, projection) = expert.split_once('.')?;
    let (stack, half) = match projection {
        "gate_proj" => ("gate_up_proj", Some(0)),
        "up_proj" => ("gate_up_proj", Some(1)),
        "down_proj" => (projection, None),
        _ => return None,
    };
    let expert = index.parse().ok()?;
    Some((
        format!("{layer}.experts.{stack}"),
        Share::Packed(Packed { expert, half }),
    ))
}

/// Matrices `[H, N, K]` as one `[H · N, K]`; a factor of all stays.
fn below_one_another(name: &str, stack: &StoredTensor) -> Result<StoredTensor> {
    let rows = |a: usize, b: usize| {
        let problem = format!("shape {:?} is larger than memory", stack.shape);
        a.checked_mul(b).ok_or_else(|| stack.problem(name, problem))
    };
    let shape = match stack.shape[..] {
        [heads, n, k] => vec![rows(heads, n)?, k],
        _ => stack.shape.clone(),
    };
    Ok(StoredTensor {
        shape,
        ..stack.clone()
    })
}

/// One of a stack of tensors.
fn slice(name: &str, stack: &StoredTensor, index: usize) -> Result<StoredTensor> {
    let of = stack.shape.first().copied().unwrap_or(0);
    if index >= of {
        let problem = format!("shape {:?}; expected more than {index} experts", stack.shape);
        return Err(stack.problem(name, problem));
    }
    let size = stack.bytes.len() / of;
    let bytes = stack.bytes.slice(index * size..(index + 1) * size);
    let bytes = bytes.ok_or_else(|| stack.problem(name, "its data lies outside the file"))?;
    Ok(StoredTensor {
        dtype: stack.dtype,
        shape: stack.shape[1..].to_vec(),
        bytes,
        file: stack.file.clone(),
    })
}
