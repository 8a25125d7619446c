//! How fast this machine reads a model's weights: what decoding is limited by, and measured against.

use crate::Result;
use crate::cpu::{Executor, roofline::read_bandwidth};
use crate::fp4::Bytes;
use crate::models::glm4_moe_lite::Model;
use std::sync::Arc;

/// What one thread reads at a time.
const PIECE: usize = 1 << 20;

/// The weights of a model, to be read again and again at a run's own speed.
///
/// ```
/// use candle_core::Device;
/// use candle_mmfp4::bandwidth::ReadBandwidth;
/// use candle_mmfp4::models::glm4_moe_lite::Model;
///
/// let (model, _) = Model::from_folder("examples/demo-model", &Default::default(), &Device::Cpu)?;
/// let mut memory = ReadBandwidth::new(&model)?;
/// memory.read_all();
/// let fastest = memory.measure() / model.bytes_read(1) as f64;
/// println!("no more than {fastest:.0} tokens a second");
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug)]
pub struct ReadBandwidth {
    pieces: Vec<Bytes>,
    next: usize,
    executor: Arc<Executor>,
}

impl ReadBandwidth {
    /// Bytes that a measurement reads at least: several times what any cache holds.
    pub const SAMPLE: usize = 256_000_000;

    /// Takes the [weights](Model::weights) of `model` where they lie.
    ///
    /// # Errors
    /// As [`Executor::current`], whose threads it uses.
    pub fn new(model: &Model) -> Result<Self> {
        let regions = model.weights().into_iter().flat_map(|weight| weight.regions());
        let pieces = regions.flat_map(|bytes| {
            let starts = (0..bytes.len()).step_by(PIECE);
            starts.filter_map(|start| bytes.slice(start..bytes.len().min(start + PIECE)))
        });
        Ok(Self {
            pieces: pieces.collect(),
            next: 0,
            executor: Executor::current()?,
        })
    }

    /// Reads all of it once, so that all of it is in memory where memory is large enough.
    pub fn read_all(&self) {
        self.read(&self.pieces);
    }

    fn read(&self, pieces: &[Bytes]) -> f64 {
        let regions: Vec<&[u8]> = pieces.iter().map(|piece| &piece[..]).collect();
        read_bandwidth(&self.executor, &regions)
    }

    /// Bytes a second of reading the next [`SAMPLE`](Self::SAMPLE) bytes by the threads that the kernels use. After the
    /// end it goes on at the beginning: a model that is smaller is read several times, from whatever cache holds it.
    pub fn measure(&mut self) -> f64 {
        let (mut sample, mut size) = (Vec::new(), 0);
        while size < Self::SAMPLE {
            let piece = &self.pieces[self.next];
            size += piece.len();
            sample.push(piece.clone());
            self.next = (self.next + 1) % self.pieces.len();
        }
        self.read(&sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn samples_go_round_the_weights() {
        let (model, _) =
            Model::from_folder("examples/demo-model", &Default::default(), &Device::Cpu).unwrap();
        let mut memory = ReadBandwidth::new(&model).unwrap();
        let all: usize = memory.pieces.iter().map(|piece| piece.len()).sum();
        assert_eq!(
            all,
            model.weights().iter().map(|w| w.size_in_bytes()).sum::<usize>()
        );
        memory.read_all();
        assert!(memory.measure() > 0.0);
        assert!(memory.next > 0 && memory.next < memory.pieces.len());
    }
}
