//! Activations rounded to eight bits, a block of 128 at a time.

/// Elements of a row that share a scale.
pub(super) const BLOCK: usize = 128;

/// 128 consecutive elements of a row: `x[k] ≈ 2 · scale · q[k]`, `q` whole numbers from -127 to 127.
///
/// The even and the odd elements lie apart, as the low and the high nibbles of 64 bytes of codes do, so that a
/// register of decoded nibbles meets a register of activations.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Block {
    pub even: [i8; BLOCK / 2],
    pub odd: [i8; BLOCK / 2],
    /// The largest magnitude, divided by 254: half the step, since kernels multiply by twice the code's value.
    /// NaN where an element is NaN or infinite, so that it stays visible in every product.
    pub scale: f32,
    /// The sum of all corrections.
    pub correction: i32,
    /// Tile products read up to here, a vector product the corrections as well: three lines of the cache, or four.
    _line: [u32; 14],
    /// -12 times the sum of `q` over each eight consecutive elements: what cancels the 12 that x86 kernels add to
    /// the doubled codes, because their dot product takes one unsigned factor.
    pub corrections: [i32; BLOCK / 8],
}

impl Block {
    pub const ZERO: Self = Self {
        even: [0; BLOCK / 2],
        odd: [0; BLOCK / 2],
        scale: 0.0,
        correction: 0,
        _line: [0; 14],
        corrections: [0; BLOCK / 8],
    };

    /// Rounds up to 128 elements, ties to even; what is missing to 128 is zero.
    ///
    /// Every division and rounding is IEEE's, so that all instruction sets give the same numbers.
    #[inline(always)]
    pub fn round(x: &[f32]) -> Self {
        let mut values = [0f32; BLOCK];
        values[..x.len()].copy_from_slice(x);
        // Bits of magnitudes order as the magnitudes do, with infinity and NaN at the end.
        let largest = values
            .iter()
            .fold(0, |largest, v| largest.max(v.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        let mut block = Self::ZERO;
        if largest == 0.0 {
            return block;
        }
        if !largest.is_finite() {
            block.scale = f32::NAN;
            return block;
        }
        // The step of a subnormal would lose bits, or be zero: such a block is lifted by 2^100 meanwhile.
        let lift = if largest < 1e-30 {
            f32::from_bits((127 + 100) << 23)
        } else {
            1.0
        };
        let step = largest * lift / 127.0;
        let mut q = [0i32; BLOCK];
        for (q, v) in q.iter_mut().zip(values) {
            let rounded = (v * lift / step).round_ties_even().clamp(-127.0, 127.0);
            // SAFETY: finite, as all values are and the step is not zero, and within -127 and 127.
            *q = unsafe { rounded.to_int_unchecked() };
        }
        for i in 0..BLOCK / 2 {
            block.even[i] = q[2 * i] as i8;
            block.odd[i] = q[2 * i + 1] as i8;
        }
        for (correction, q) in block.corrections.iter_mut().zip(q.chunks_exact(8)) {
            *correction = -12 * q.iter().sum::<i32>();
        }
        block.correction = block.corrections.iter().sum();
        block.scale = step / lift / 2.0;
        block
    }
}

/// Blocks a row of `k` elements has.
pub(super) fn blocks(k: usize) -> usize {
    k.div_ceil(BLOCK)
}

/// Rounded rows: block `b` of row `r` lies at `b · rows + r`, so that what meets one decoded block of weights lies
/// together.
#[derive(Clone, Copy)]
pub(super) struct Rounded<'a> {
    pub blocks: &'a [Block],
    pub rows: usize,
}
