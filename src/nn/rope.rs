//! Rotary position embedding.

use crate::cpu::Pairing;
use crate::ops::Rope;
use candle_core::{Device, Result, Tensor};

/// Rotates the `d` elements of a head by `position · theta^(-2i/d)`, in f32.
#[derive(Debug, Clone)]
pub struct RotaryEmbedding {
    inverse_frequencies: Vec<f32>,
    op: Rope,
}

/// Cosines and sines of a forward pass's positions, both `[tokens, d/2]`.
#[derive(Debug, Clone)]
pub struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Angles {
    /// Cosines `[tokens, d/2]`, F32.
    pub fn cos(&self) -> &Tensor {
        &self.cos
    }

    /// Sines `[tokens, d/2]`, F32.
    pub fn sin(&self) -> &Tensor {
        &self.sin
    }
}

impl RotaryEmbedding {
    /// For heads of `d` (even) rotated elements with base `theta`.
    pub fn new(d: usize, theta: f32, pairing: Pairing) -> Self {
        // As transformers computes them: all in f32.
        let inverse_frequencies = (0..d / 2)
            .map(|i| 1.0 / theta.powf((2 * i) as f32 / d as f32))
            .collect();
        Self {
            inverse_frequencies,
            op: Rope::new(pairing),
        }
    }

    /// The angles at these positions; one set serves all layers.
    ///
    /// # Errors
    /// Those of the device.
    pub fn angles(&self, positions: &[usize], device: &Device) -> Result<Angles> {
        let shape = (positions.len(), self.inverse_frequencies.len());
        let frequencies = &self.inverse_frequencies;
        let angles = || {
            positions
                .iter()
                .flat_map(|p| frequencies.iter().map(move |f| *p as f32 * f))
        };
        Ok(Angles {
            cos: Tensor::from_iter(angles().map(f32::cos), device)?.reshape(shape)?,
            sin: Tensor::from_iter(angles().map(f32::sin), device)?.reshape(shape)?,
        })
    }

    /// Rotates `x` `[tokens, heads, d]`, F32, F16 or BF16; there must be as many tokens as positions were given.
    ///
    /// # Errors
    /// Where shapes do not fit.
    pub fn forward(&self, x: &Tensor, angles: &Angles) -> Result<Tensor> {
        self.op.forward(x, &angles.cos, &angles.sin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_rotate_by_their_own_angle() {
        for pairing in [Pairing::Interleaved, Pairing::Halves] {
            let rope = RotaryEmbedding::new(4, 100.0, pairing);
            let angles = rope.angles(&[0, 3], &Device::Cpu).unwrap();
            let x = Tensor::new(&[[[1f32, 2., 3., 4.]], [[1., 2., 3., 4.]]], &Device::Cpu).unwrap();
            let y = rope.forward(&x, &angles).unwrap().to_vec3::<f32>().unwrap();
            assert_eq!(y[0][0], [1., 2., 3., 4.]);
            let rotate = |a: f32, b: f32, angle: f32| {
                (
                    a * angle.cos() - b * angle.sin(),
                    a * angle.sin() + b * angle.cos(),
                )
            };
            let expected = match pairing {
                Pairing::Interleaved => {
                    let ((a, b), (c, d)) = (rotate(1., 2., 3.), rotate(3., 4., 0.3));
                    [a, b, c, d]
                }
                Pairing::Halves => {
                    let ((a, c), (b, d)) = (rotate(1., 3., 3.), rotate(2., 4., 0.3));
                    [a, b, c, d]
                }
            };
            for (y, expected) in y[1][0].iter().zip(expected) {
                assert!((y - expected).abs() < 1e-6, "{pairing:?}");
            }
        }
    }
    #[test]
    fn a_part_of_wider_heads_is_rotated_where_it_lies() {
        for pairing in [Pairing::Interleaved, Pairing::Halves] {
            let rope = RotaryEmbedding::new(6, 100.0, pairing);
            let angles = rope.angles(&[4, 5, 9], &Device::Cpu).unwrap();
            let wide = Tensor::randn(0f32, 1., (3, 2, 10), &Device::Cpu).unwrap();
            let part = wide.narrow(2, 3, 6).unwrap();
            let rotate = |x: &Tensor| rope.forward(x, &angles).unwrap().to_vec3::<f32>().unwrap();
            let expected = rotate(&part.contiguous().unwrap());
            assert_eq!(rotate(&part), expected);
            let elsewhere = part.transpose(1, 2).unwrap().contiguous().unwrap();
            assert_eq!(rotate(&elsewhere.transpose(1, 2).unwrap()), expected);
        }
    }

    #[test]
    fn more_angles_than_tokens_are_refused_and_fewer_too() {
        let rope = RotaryEmbedding::new(4, 100.0, Pairing::Interleaved);
        let angles = rope.angles(&[0, 1, 2], &Device::Cpu).unwrap();
        for shape in [(2, 1, 4), (4, 1, 4), (3, 1, 6), (3, 1, 5), (3, 1, 0)] {
            let x = Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
            let error = rope.forward(&x, &angles).unwrap_err().to_string();
            assert!(error.contains("`cos`") || error.contains("`x`"), "{error}");
        }
    }
}
