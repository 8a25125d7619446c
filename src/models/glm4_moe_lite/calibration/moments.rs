//! Sums over a layer's inputs.

use super::DAMPING;
use crate::Result;
use crate::fp4::Feedback;
use candle_core::Tensor;

/// Of a linear layer's inputs X in the original model and Z behind quantised layers: `ZᵀZ` and `(X - Z)ᵀZ`, both `[K, K]`, and how
/// many there were.
pub(super) struct Moments {
    squares: Vec<f64>,
    drift: Vec<f64>,
    rows: usize,
    k: usize,
}

impl Moments {
    pub fn new(k: usize) -> Self {
        Self {
            squares: vec![0.0; k * k],
            drift: vec![0.0; k * k],
            rows: 0,
            k,
        }
    }

    /// Adds the inputs `[rows, K]`, F32, of the same tokens: some thousand at most, whose products are summed in F32.
    pub fn add(&mut self, original: &Tensor, quantized: &Tensor) -> Result<()> {
        let z = quantized.contiguous()?;
        add(&mut self.squares, &z, &z)?;
        add(&mut self.drift, &(original - &z)?, &z)?;
        self.rows += z.dim(0)?;
        Ok(())
    }

    /// What rounding the weights of layer `name` is to know of it; `None` of fewer inputs than would tell the columns of
    /// its weight apart.
    pub fn into_feedback(self, name: &str) -> Result<Option<Feedback>> {
        if self.rows < self.k {
            return Ok(None);
        }
        let (k, squares, drift) = (self.k, self.squares, self.drift);
        // Nothing is quantised before a model's first layer.
        let feedback = match drift.iter().all(|value| *value == 0.0) {
            true => Feedback::new(name, k, squares, DAMPING),
            false => Feedback::drifted(name, k, squares, drift, DAMPING),
        };
        feedback.map(Some)
    }
}

/// Adds `AᵀB`.
fn add(sums: &mut [f64], a: &Tensor, b: &Tensor) -> Result<()> {
    let products = a.t()?.matmul(b)?.flatten_all()?.to_vec1::<f32>()?;
    for (sum, product) in sums.iter_mut().zip(products) {
        *sum += f64::from(product);
    }
    Ok(())
}
