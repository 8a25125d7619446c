//! Deterministic random weights for any model: a tensor's values follow from its name, and each is exact
//! in F32, BF16 and F16, so that one reference serves all three.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

/// The values of the tensor `name`: a vector is a norm's scale or a bias, a matrix is `[out, in]`.
pub fn values(name: &str, dims: &[usize]) -> Vec<f32> {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325, fnv) | 1;
    let (offset, scale) = match dims {
        [_] if name.ends_with("weight") => (1., 1. / 128.),
        [_] => (0., 1. / 256.),
        [.., inputs] => (0., 0.5f32.powi(6 + (*inputs as f32 / 32.).sqrt().log2() as i32)),
        [] => (0., 1.),
    };
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let integer = (state >> 40) as i64 % 65 - 32;
        offset + integer as f32 * scale
    };
    std::iter::repeat_with(next).take(dims.iter().product()).collect()
}

/// Serves every name in every shape, and notes what was asked for.
#[derive(Clone, Default)]
pub struct Weights {
    asked: Arc<Mutex<BTreeMap<String, Vec<usize>>>>,
    /// Where all layers are to share their tensors: these, by name without the layer's number.
    shared: Option<Arc<Mutex<HashMap<String, Tensor>>>>,
}

impl Weights {
    /// All layers alike, for a model that cannot be made small.
    pub fn shared() -> Self {
        Self {
            shared: Some(Arc::default()),
            ..Self::default()
        }
    }

    pub fn var_builder(&self, dtype: DType) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, Device::Cpu)
    }

    /// What was asked for so far, as a GGUF file of F32 tensors.
    pub fn gguf(&self) -> Result<Vec<u8>> {
        let asked = self.asked.lock().expect("no panic while noting names").clone();
        let tensors = asked
            .into_iter()
            .map(|(name, dims)| {
                let tensor = Tensor::from_vec(values(&name, &dims), dims, &Device::Cpu)?;
                Ok((name, QTensor::quantize(&tensor, GgmlDType::F32)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
            .collect();
        let mut file = std::io::Cursor::new(Vec::new());
        gguf_file::write(&mut file, &[], &tensors)?;
        Ok(file.into_inner())
    }
}

impl SimpleBackend for Weights {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let make = |name: &str| Tensor::from_vec(values(name, shape.dims()), &shape, device)?.to_dtype(dtype);
        let Some(shared) = &self.shared else {
            let mut asked = self.asked.lock().expect("no panic while noting names");
            asked.insert(name.to_string(), shape.dims().to_vec());
            return make(name);
        };
        let name: String = name.chars().filter(|c| !c.is_ascii_digit()).collect();
        let mut shared = shared.lock().expect("no panic while making weights");
        if let Some(tensor) = shared.get(&name) {
            return Ok(tensor.clone());
        }
        let tensor = make(&name)?;
        shared.insert(name, tensor.clone());
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("{name}: no model here asks for a tensor without its shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}
