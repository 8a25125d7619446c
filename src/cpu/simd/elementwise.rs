//! What is done to numbers one by one.

use crate::cpu::activations::{BLOCK, Block};

/// Rounds row `row` of `rows` to blocks that lie `rows` apart, the first at `blocks + row`.
///
/// # Safety
/// There is room for `rows` blocks for each 128 elements of `x`, and `row` is below `rows`.
#[inline(always)]
pub(super) unsafe fn round(x: &[f32], row: usize, rows: usize, blocks: *mut Block) {
    for (b, x) in x.chunks(BLOCK).enumerate() {
        // SAFETY: the caller's promise: these blocks are there to be written.
        unsafe { blocks.add(b * rows + row).write(Block::round(x)) };
    }
}

/// `gate[i] = silu(gate[i]) · up[i]`.
#[inline(always)]
pub(super) fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// e^x to within two units in the last place, in arithmetic that a compiler turns into vector instructions; x above
/// 88 counts as 88, below -87 as -87.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // 2^23 · 1.5: adding it leaves a whole number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first short enough that n times it is exact.
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + coefficient;
    }
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}
