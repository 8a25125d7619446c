//! How fast this machine reads a model's weights: what decoding is limited by, and measured against.

use crate::fp4::Bytes;
use crate::models::glm4_moe_lite::Model;
use rayon::prelude::*;
use std::time::Instant;

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
/// let mut memory = ReadBandwidth::new(&model);
/// memory.read_all();
/// let fastest = memory.measure() / model.bytes_read(1) as f64;
/// println!("no more than {fastest:.0} tokens a second");
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug)]
pub struct ReadBandwidth {
    pieces: Vec<Bytes>,
    next: usize,
}

impl ReadBandwidth {
    /// Bytes that a measurement reads at least: several times what any cache holds.
    pub const SAMPLE: usize = 256_000_000;

    /// Takes the [weights](Model::weights) of `model` where they lie.
    pub fn new(model: &Model) -> Self {
        let regions = model.weights().into_iter().flat_map(|weight| weight.regions());
        let pieces = regions.flat_map(|bytes| {
            let starts = (0..bytes.len()).step_by(PIECE);
            starts.filter_map(|start| bytes.slice(start..bytes.len().min(start + PIECE)))
        });
        Self {
            pieces: pieces.collect(),
            next: 0,
        }
    }

    /// Reads all of it once, so that all of it is in memory where memory is large enough.
    pub fn read_all(&self) {
        read(&self.pieces);
    }

    /// Bytes a second of reading the next [`SAMPLE`](Self::SAMPLE) bytes by as many threads as the kernels use. After the
    /// end it goes on at the beginning: a model that is smaller is read several times, from whatever cache holds it.
    pub fn measure(&mut self) -> f64 {
        let (mut sample, mut size) = (Vec::new(), 0);
        while size < Self::SAMPLE {
            let piece = &self.pieces[self.next];
            size += piece.len();
            sample.push(piece.clone());
            self.next = (self.next + 1) % self.pieces.len();
        }
        let start = Instant::now();
        read(&sample);
        size as f64 / start.elapsed().as_secs_f64()
    }
}

/// Threads that the kernels run on.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

fn read(pieces: &[Bytes]) {
    pieces.par_iter().for_each(|piece| {
        std::hint::black_box(read_piece(piece));
    });
}

/// A cache line, which plain loads of 64 bytes read whole.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u64; 8]);

/// Loads every whole line; the result only keeps the loads from being left out.
fn read_piece(bytes: &[u8]) -> u64 {
    // SAFETY: any 64 bytes are a valid `Line`, which is eight integers without padding.
    let (_, lines, _) = unsafe { bytes.align_to::<Line>() };
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the machine has this feature.
        return unsafe { read_lines_avx512(lines) };
    }
    read_lines(lines)
}

#[inline(always)]
fn read_lines(lines: &[Line]) -> u64 {
    let mut sum = [0u64; 8];
    for line in lines {
        for (sum, word) in sum.iter_mut().zip(line.0) {
            *sum ^= word;
        }
    }
    sum.iter().fold(0, |all, word| all ^ word)
}

/// # Safety
/// The machine must have AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn read_lines_avx512(lines: &[Line]) -> u64 {
    use std::arch::x86_64::{
        _mm512_load_si512, _mm512_reduce_add_epi64, _mm512_setzero_si512, _mm512_xor_si512,
    };
    let mut sum = _mm512_setzero_si512();
    for line in lines {
        // SAFETY: a line is 64 bytes, aligned to them.
        sum = _mm512_xor_si512(sum, unsafe { _mm512_load_si512(line.0.as_ptr().cast()) });
    }
    _mm512_reduce_add_epi64(sum) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn every_whole_line_is_read() {
        let mut words = vec![0u64; 8 * 40];
        for index in 0..words.len() {
            words[index] = 1 << 40;
            // SAFETY: the bytes of a slice of integers.
            let bytes = unsafe { words.align_to::<u8>().1 };
            let whole = bytes.as_ptr().align_offset(64) / 8;
            let inside = (whole..whole + (words.len() - whole) / 8 * 8).contains(&index);
            assert_eq!(read_piece(bytes) != 0, inside, "word {index}");
            words[index] = 0;
        }
        assert_eq!(read_piece(&[]), 0);
    }

    #[test]
    fn samples_go_round_the_weights() {
        let (model, _) =
            Model::from_folder("examples/demo-model", &Default::default(), &Device::Cpu).unwrap();
        let mut memory = ReadBandwidth::new(&model);
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
