//! Sums over a layer's inputs.

use crate::Result;
use crate::fp4::Feedback;
use candle_core::Tensor;

/// What is added to the squares of inputs, beside their mean: more than the 0.01 of GPTQ's authors, as models of few inputs and many
/// experts gain by it (docs/quantize.md).
const DAMPING: f64 = 0.1;

/// `XᵀX [K, K]` of the inputs of a linear layer, and how many there were.
pub(super) struct Moments {
    sums: Vec<f64>,
    rows: usize,
    k: usize,
}

impl Moments {
    pub fn new(k: usize) -> Self {
        Self {
            sums: vec![0.0; k * k],
            rows: 0,
            k,
        }
    }

    /// Adds inputs `[rows, K]`, F32: some thousand at most, whose products are summed in F32.
    pub fn add(&mut self, x: &Tensor) -> Result<()> {
        let x = x.contiguous()?;
        let products = x.t()?.matmul(&x)?.flatten_all()?.to_vec1::<f32>()?;
        for (sum, product) in self.sums.iter_mut().zip(products) {
            *sum += f64::from(product);
        }
        self.rows += x.dim(0)?;
        Ok(())
    }

    /// What rounding the weights of layer `name` is to know of it; `None` of fewer inputs than would tell the columns of
    /// its weight apart.
    pub fn into_feedback(self, name: &str) -> Result<Option<Feedback>> {
        if self.rows < self.k {
            return Ok(None);
        }
        Feedback::new(name, self.k, self.sums, DAMPING).map(Some)
    }
}
