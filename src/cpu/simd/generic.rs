//! The loops, once for all instruction sets.
//!
//! Everything here is inlined into the functions that [`kernels!`] makes for an instruction set, and compiled
//! for it there. Sums run in an order that depends on nothing but the shapes.

// SAFETY, for the whole file: the functions are unsafe because the operations of `Simd` are; their callers promise
// the instructions. Memory is checked where pointers are made from slices.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::{Fp4Rows, Scratch, Selection, Simd, TILE, scales, sized};
use crate::cpu::activations::{BLOCK, Block, Rounded};
use crate::fp4::Weight;
use std::ops::Range;

/// Bytes of codes a block of 128 elements has.
const BLOCK_BYTES: usize = BLOCK / 2;
/// Lanes of 32 bits that these bytes fill.
const BLOCK_LANES: usize = BLOCK_BYTES / 4;

/// Makes a [`Kernels`](super::Kernels) table for an implementation of [`Simd`]: tile products keep `registers`
/// registers of weights' rows times `rows` rows of activations in registers.
macro_rules! kernels {
    ($simd:ident, registers: $registers:literal, rows: $rows:literal $(, features: $features:literal)?) => {
        mod kernels {
            use super::super::{Fp4Rows, Kernels, Scratch, Selection, attention, generic};
            use crate::cpu::activations::{Block, Rounded};
            use crate::cpu::attention::Task;
            use crate::fp4::Weight;
            use std::ops::Range;

            $(#[target_feature(enable = $features)])?
            unsafe fn round(x: &[f32], row: usize, rows: usize, blocks: *mut Block) {
                // SAFETY: as the caller promises.
                unsafe { generic::round(x, row, rows, blocks) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn w4a8(
                weights: Fp4Rows<'_>,
                x: Rounded<'_>,
                selection: Selection<'_>,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { generic::w4a8::<super::$simd, $registers, $rows>(weights, x, selection, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn exact(
                weight: &Weight,
                rows: Range<usize>,
                x: &[f32],
                selection: Selection<'_>,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { generic::exact::<super::$simd>(weight, rows, x, selection, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn columns(
                weight: &Weight,
                rows: Range<usize>,
                columns: Range<usize>,
                x: &[f32],
                selection: Selection<'_>,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { generic::columns::<super::$simd>(weight, rows, columns, x, selection, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn swiglu(gate: &mut [f32], up: &[f32]) {
                generic::swiglu(gate, up)
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn attend(task: &Task<'_>, out: &mut [f32], scratch: &mut Scratch) {
                // SAFETY: as the caller promises.
                unsafe { attention::attend::<super::$simd, $registers, $rows>(task, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn read(bytes: &[u8]) -> u64 {
                generic::read(bytes)
            }

            pub static KERNELS: Kernels = Kernels { round, w4a8, exact, columns, swiglu, attend, read };
        }
        pub(super) use kernels::KERNELS;
    };
}
pub(super) use kernels;

/// Rounds row `row` of `rows` to blocks that lie `rows` apart, the first at `blocks + row`.
#[inline(always)]
pub(super) unsafe fn round(x: &[f32], row: usize, rows: usize, blocks: *mut Block) {
    for (b, x) in x.chunks(BLOCK).enumerate() {
        unsafe { blocks.add(b * rows + row).write(Block::round(x)) };
    }
}

/// `out[i, r] = Σ_k x[i, k] · w[first + r, k]` for up to 64 rows of weights and the selected rows of rounded
/// activations; a row of `out` is 64 long.
///
/// One row of activations runs along the rows of weights as they lie, at the memory's speed. More run over blocks of
/// 64 rows by 128 codes, decoded once into the first-level cache.
#[inline(always)]
pub(super) unsafe fn w4a8<S: Simd, const NR: usize, const MR: usize>(
    weights: Fp4Rows<'_>,
    x: Rounded<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let k = weights.tensor.shape().1;
    let blocks = k.div_ceil(BLOCK);
    let m = selection.len();
    assert!(
        x.blocks.len() == blocks * x.rows
            && (0..m).all(|i| selection.row(i) < x.rows)
            && (m == 1 || weights.rows <= TILE)
            && out.len() >= if m == 1 { weights.rows } else { m * TILE },
        "w4a8"
    );
    unsafe {
        if m == 1 {
            one::<S>(weights, x, selection.row(0), out, scratch);
        } else {
            many::<S, NR, MR>(weights, x, selection, out, scratch);
        }
    }
}

/// Rows of weights that run side by side.
const SIDE_BY_SIDE: usize = 4;

/// Each row of weights along its codes, sums in the lanes of a register.
#[inline(always)]
unsafe fn one<S: Simd>(
    weights: Fp4Rows<'_>,
    x: Rounded<'_>,
    row: usize,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (tensor, k) = (weights.tensor, weights.tensor.shape().1);
    let codes = &tensor.codes()[weights.first * k / 2..][..weights.rows * k / 2];
    let groups = k / tensor.group();
    let scales = sized(&mut scratch.floats, weights.rows * groups);
    scales::decode(tensor, weights.first * groups, scales);
    let x = (&x.blocks[row..], x.rows);
    if tensor.group() == BLOCK {
        return unsafe { dots::<S, true>(codes, scales, x, &mut out[..weights.rows]) };
    }
    // A scale a lane, so that the loop is the same for all smaller groups.
    let lanes = tensor.group() / 8;
    let per_row = k.div_ceil(BLOCK) * BLOCK_LANES;
    let by_lane = sized(&mut scratch.weights, weights.rows * per_row);
    for (by_lane, scales) in by_lane.chunks_exact_mut(per_row).zip(scales.chunks_exact(groups)) {
        for (by_lane, scale) in by_lane.chunks_exact_mut(lanes).zip(scales) {
            by_lane.fill(*scale);
        }
        by_lane[groups * lanes..].fill(0.0);
    }
    unsafe { dots::<S, false>(codes, by_lane, x, &mut out[..weights.rows]) }
}

/// A row of weights for each element of `out`. `WIDE`: a scale a block of 128, else one a lane. `x` is a row's first
/// block, and how far apart its blocks lie.
#[inline(always)]
unsafe fn dots<S: Simd, const WIDE: bool>(
    codes: &[u8],
    scales: &[f32],
    x: (&[Block], usize),
    out: &mut [f32],
) {
    let (row_bytes, per_row) = (codes.len() / out.len(), scales.len() / out.len());
    let mut sets = out.chunks_exact_mut(SIDE_BY_SIDE);
    let mut r = 0;
    for out in &mut sets {
        let codes = &codes[r * row_bytes..][..SIDE_BY_SIDE * row_bytes];
        let scales = &scales[r * per_row..][..SIDE_BY_SIDE * per_row];
        let sums = unsafe { side_by_side::<S, WIDE, SIDE_BY_SIDE>(codes, scales, x) };
        out.copy_from_slice(&sums);
        r += SIDE_BY_SIDE;
    }
    for out in sets.into_remainder() {
        let codes = &codes[r * row_bytes..][..row_bytes];
        let scales = &scales[r * per_row..][..per_row];
        [*out] = unsafe { side_by_side::<S, WIDE, 1>(codes, scales, x) };
        r += 1;
    }
}

/// The products of `R` rows with one row of activations.
#[inline(always)]
unsafe fn side_by_side<S: Simd, const WIDE: bool, const R: usize>(
    codes: &[u8],
    scales: &[f32],
    (x, stride): (&[Block], usize),
) -> [f32; R] {
    let (row_bytes, per_row) = (codes.len() / R, scales.len() / R);
    let (whole, rest) = (row_bytes / BLOCK_BYTES, row_bytes % BLOCK_BYTES);
    unsafe {
        let mut sums = [S::splat(0.0); R];
        for b in 0..whole {
            let codes: [_; R] = std::array::from_fn(|r| codes.as_ptr().add(r * row_bytes + b * BLOCK_BYTES));
            let at = if WIDE { b } else { b * BLOCK_LANES };
            let scales: [_; R] = std::array::from_fn(|r| scales.as_ptr().add(r * per_row + at));
            block::<S, WIDE, R>(&mut sums, codes, scales, x.get_unchecked(b * stride));
        }
        if rest > 0 {
            let mut padded = [[0u8; BLOCK_BYTES]; R];
            for (r, padded) in padded.iter_mut().enumerate() {
                padded[..rest].copy_from_slice(&codes[r * row_bytes + whole * BLOCK_BYTES..][..rest]);
            }
            let at = if WIDE { whole } else { whole * BLOCK_LANES };
            let scales: [_; R] = std::array::from_fn(|r| scales.as_ptr().add(r * per_row + at));
            let codes = std::array::from_fn(|r| padded[r].as_ptr());
            block::<S, WIDE, R>(&mut sums, codes, scales, &x[whole * stride]);
        }
        sums.map(|sums| S::sum(sums))
    }
}

/// Adds the products with one block of 128.
#[inline(always)]
unsafe fn block<S: Simd, const WIDE: bool, const R: usize>(
    sums: &mut [S::Float; R],
    codes: [*const u8; R],
    scales: [*const f32; R],
    x: &Block,
) {
    unsafe {
        let step = S::splat(x.scale);
        for part in 0..BLOCK_LANES / S::LANES {
            let (bytes, lanes) = (part * 4 * S::LANES, part * S::LANES);
            let even = S::load_bytes(x.even.as_ptr().add(bytes).cast());
            let odd = S::load_bytes(x.odd.as_ptr().add(bytes).cast());
            let start = match S::BIASED {
                true => S::load_int(x.corrections.as_ptr().add(lanes)),
                false => S::splat_int(0),
            };
            for r in 0..R {
                let (low, high) = S::lookup(S::load_bytes(codes[r].add(bytes)));
                let whole = S::to_float(S::dot(S::dot(start, low, even), high, odd));
                let scale = match WIDE {
                    true => S::splat(*scales[r]),
                    false => S::load(scales[r].add(lanes)),
                };
                sums[r] = S::fma(whole, S::mul(scale, step), sums[r]);
            }
        }
    }
}

/// Blocks of 64 rows by 128 codes, decoded once each, times all selected rows of activations.
#[inline(always)]
unsafe fn many<S: Simd, const NR: usize, const MR: usize>(
    weights: Fp4Rows<'_>,
    x: Rounded<'_>,
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (tensor, k, m) = (weights.tensor, weights.tensor.shape().1, selection.len());
    let (row_bytes, group) = (k / 2, tensor.group());
    let codes = &tensor.codes()[weights.first * row_bytes..][..weights.rows * row_bytes];
    let groups = k / group;
    let scales = sized(&mut scratch.floats, weights.rows * groups);
    scales::decode(tensor, weights.first * groups, scales);

    let out = &mut out[..m * TILE];
    out.fill(0.0);
    let passes = m.div_ceil(MR);
    for b in 0..k.div_ceil(BLOCK) {
        unsafe { decode_block::<S>(codes, row_bytes, weights.rows, b, &mut scratch.codes.0) };
        let here = (k - b * BLOCK).min(BLOCK) / group;
        let mut by_row = [[0f32; TILE]; BLOCK / 16];
        for (g, by_row) in by_row[..here].iter_mut().enumerate() {
            let scales = scales.iter().skip(b * BLOCK / group + g).step_by(groups);
            for (by_row, scale) in by_row.iter_mut().zip(scales) {
                *by_row = *scale;
            }
        }
        let x = &x.blocks[b * x.rows..][..x.rows];
        for pass in 0..passes {
            // Passes of nearly equal size: one row left over would leave most of the processor idle.
            let (from, to) = (pass * m / passes, (pass + 1) * m / passes);
            let codes = &scratch.codes.0;
            macro_rules! pass {
                ($($rows:literal)*) => {
                    match to - from {
                        $($rows if $rows <= MR => {
                            let x: [&Block; $rows] = std::array::from_fn(|i| &x[selection.row(from + i)]);
                            let out = &mut out[from * TILE..to * TILE];
                            unsafe { micro::<S, NR, $rows>(codes, &by_row[..here], group, x, out) }
                        })*
                        _ => unreachable!("a pass has 1 to {MR} rows"),
                    }
                };
            }
            pass!(1 2 3 4 5 6);
        }
    }
}

/// Decodes 128 codes of up to 64 rows, from block `b` on; missing rows and codes are zero. Sets of `LANES` rows
/// follow each other; in a set, for each eight codes a word a row with the even ones and a word a row with the odd.
#[inline(always)]
unsafe fn decode_block<S: Simd>(
    codes: &[u8],
    row_bytes: usize,
    rows: usize,
    b: usize,
    to: &mut [u8; TILE * BLOCK],
) {
    let start = b * BLOCK_BYTES;
    let there = (row_bytes - start).min(BLOCK_BYTES);
    let mut padded = [[0u8; BLOCK_BYTES]; TILE];
    let mut words = [0u8; BLOCK_BYTES * 16];
    for set in 0..TILE / S::LANES {
        let mut pointers = [padded[0].as_ptr(); 16];
        for (lane, pointer) in pointers[..S::LANES].iter_mut().enumerate() {
            let row = set * S::LANES + lane;
            if row >= rows {
                *pointer = padded[TILE - 1].as_ptr();
            } else if there == BLOCK_BYTES {
                *pointer = codes[row * row_bytes + start..][..BLOCK_BYTES].as_ptr();
            } else {
                padded[row][..there].copy_from_slice(&codes[row * row_bytes + start..][..there]);
                *pointer = padded[row].as_ptr();
            }
        }
        unsafe {
            S::transpose(&pointers[..S::LANES], words.as_mut_ptr());
            let to = to.as_mut_ptr().add(set * S::LANES * BLOCK);
            for word in 0..16 {
                let (low, high) = S::lookup(S::load_bytes(words.as_ptr().add(word * 4 * S::LANES)));
                S::store_bytes(to.add(2 * word * 4 * S::LANES), low);
                S::store_bytes(to.add((2 * word + 1) * 4 * S::LANES), high);
            }
        }
    }
}

/// `MR` rows of activations times a decoded block: sums of whole numbers in `NR · MR` registers, added to `out` in
/// f32 after each group.
#[inline(always)]
unsafe fn micro<S: Simd, const NR: usize, const MR: usize>(
    codes: &[u8; TILE * BLOCK],
    scales: &[[f32; TILE]],
    group: usize,
    x: [&Block; MR],
    out: &mut [f32],
) {
    let words = group / 8;
    for set in 0..TILE / (NR * S::LANES) {
        let first = set * NR * S::LANES;
        for (g, scales) in scales.iter().enumerate() {
            unsafe {
                let mut sums = x.map(|x| {
                    let correction = match (S::BIASED, group == BLOCK) {
                        (false, _) => 0,
                        (true, true) => x.correction,
                        (true, false) => x.corrections[g * words..(g + 1) * words].iter().sum(),
                    };
                    [S::splat_int(correction); NR]
                });
                for word in g * words..(g + 1) * words {
                    for (parity, half) in [0, 1]
                        .into_iter()
                        .zip([|x: &Block| x.even.as_ptr(), |x: &Block| x.odd.as_ptr()])
                    {
                        let codes: [_; NR] = std::array::from_fn(|v| {
                            let set = (first / S::LANES + v) * S::LANES * BLOCK;
                            S::load_bytes(codes.as_ptr().add(set + (2 * word + parity) * 4 * S::LANES))
                        });
                        for (sums, x) in sums.iter_mut().zip(x) {
                            let x = S::splat_bytes(half(x).add(4 * word).cast::<[i8; 4]>().read());
                            for (sum, codes) in sums.iter_mut().zip(codes) {
                                *sum = S::dot(*sum, codes, x);
                            }
                        }
                    }
                }
                for (i, (sums, x)) in sums.into_iter().zip(x).enumerate() {
                    let step = S::splat(x.scale);
                    for (v, sum) in sums.into_iter().enumerate() {
                        let column = first + v * S::LANES;
                        let out = out[i * TILE + column..][..S::LANES].as_mut_ptr();
                        let scale = S::mul(S::load(scales[column..].as_ptr()), step);
                        S::store(out, S::fma(S::to_float(sum), scale, S::load(out)));
                    }
                }
            }
        }
    }
}

/// Writes the elements `start..start + row.len()` of row `n`, whole groups, in f32.
#[inline(always)]
unsafe fn decode_row<S: Simd>(
    weight: &Weight,
    n: usize,
    start: usize,
    row: &mut [f32],
    scales: &mut Vec<f32>,
) {
    let Weight::Fp4(tensor) = weight else {
        return weight.decode_row_part(n, start, row);
    };
    let (k, group) = (tensor.shape().1, tensor.group());
    let codes = &tensor.codes()[(n * k + start) / 2..][..row.len() / 2];
    let scales = sized(scales, row.len() / group);
    scales::decode(tensor, (n * k + start) / group, scales);
    let whole = row.len() / 32;
    for (i, row) in row.chunks_exact_mut(32).enumerate() {
        let scales = [scales[i * 32 / group], scales[(i * 32 + 16) / group]];
        unsafe { S::decode(codes[i * 16..][..16].as_ptr(), scales, row.as_mut_ptr()) };
    }
    if row.len() % 32 != 0 {
        tensor.decode_row_part(n, start + whole * 32, &mut row[whole * 32..]);
    }
}

/// From this many rows of activations on, a matrix product over decoded rows is faster than dot products.
const MANY: usize = 6;

/// `out[i, r] = Σ_k x[i, k] · w[rows.start + r, k]` in f32 for up to 64 rows of weights of any kind; `x` has rows
/// of K, a row of `out` is 64 long.
#[inline(always)]
pub(super) unsafe fn exact<S: Simd>(
    weight: &Weight,
    rows: Range<usize>,
    x: &[f32],
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (k, m, count) = (weight.shape().1, selection.len(), rows.len());
    if m < MANY {
        let row = sized(&mut scratch.weights, k);
        for (r, n) in rows.enumerate() {
            unsafe { decode_row::<S>(weight, n, 0, row, &mut scratch.floats) };
            for i in 0..m {
                out[i * TILE + r] = unsafe { dot::<S>(row, &x[selection.row(i) * k..][..k]) };
            }
        }
        return;
    }
    let decoded = sized(&mut scratch.weights, count * k);
    for (n, row) in rows.zip(decoded.chunks_exact_mut(k)) {
        unsafe { decode_row::<S>(weight, n, 0, row, &mut scratch.floats) };
    }
    let x = gather(x, k, selection, &mut scratch.gathered);
    let decoded = Matrix::rows(decoded, count, k).transposed();
    product(Matrix::rows(x, m, k), decoded, out, TILE);
}

/// `out[i, c] = Σ_r x[i, r] · w[rows.start + r, columns.start + c]`: the sum runs over output features. `columns` are
/// whole groups, 128 at most; `x` has rows of `rows.len()`, a row of `out` is 128 long.
#[inline(always)]
pub(super) unsafe fn columns<S: Simd>(
    weight: &Weight,
    rows: Range<usize>,
    columns: Range<usize>,
    x: &[f32],
    selection: Selection<'_>,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (count, width, m) = (rows.len(), columns.len(), selection.len());
    if m == 1 {
        let x = &x[selection.row(0) * count..][..count];
        let mut row = [0f32; BLOCK];
        let mut sums = [0f32; BLOCK];
        for (n, x) in rows.zip(x) {
            unsafe { decode_row::<S>(weight, n, columns.start, &mut row[..width], &mut scratch.floats) };
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += x * value;
            }
        }
        out[..width].copy_from_slice(&sums[..width]);
        return;
    }
    let decoded = sized(&mut scratch.weights, count * width);
    for (n, row) in rows.zip(decoded.chunks_exact_mut(width)) {
        unsafe { decode_row::<S>(weight, n, columns.start, row, &mut scratch.floats) };
    }
    let x = gather(x, count, selection, &mut scratch.gathered);
    product(
        Matrix::rows(x, m, count),
        Matrix::rows(decoded, count, width),
        out,
        BLOCK,
    );
}

/// The selected rows of `width` elements, one after the other; copied where they do not lie so.
#[inline(always)]
fn gather<'a>(x: &'a [f32], width: usize, selection: Selection<'_>, memory: &'a mut Vec<f32>) -> &'a [f32] {
    if let Selection::Every {
        first,
        step: 1,
        count,
    } = selection
    {
        return &x[first * width..][..count * width];
    }
    let gathered = sized(memory, selection.len() * width);
    for (i, row) in gathered.chunks_exact_mut(width).enumerate() {
        row.copy_from_slice(&x[selection.row(i) * width..][..width]);
    }
    gathered
}

/// The sum of `a[k] · b[k]`, in four registers of partial sums.
#[inline(always)]
unsafe fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let step = 4 * S::LANES;
    let whole = a.len() - a.len() % step;
    unsafe {
        let mut sums = [S::splat(0.0); 4];
        for start in (0..whole).step_by(step) {
            for (i, sum) in sums.iter_mut().enumerate() {
                let at = start + i * S::LANES;
                *sum = S::fma(S::load(a.as_ptr().add(at)), S::load(b.as_ptr().add(at)), *sum);
            }
        }
        let rest: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
        S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]))) + rest
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

/// Adds the bytes as 64-bit words: what reading them costs, and nothing else.
#[inline(always)]
pub(super) fn read(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 32];
    for line in bytes.chunks_exact(256) {
        for (sum, word) in sums.iter_mut().zip(line.chunks_exact(8)) {
            *sum ^= u64::from_le_bytes(word.try_into().expect("eight bytes"));
        }
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

/// A view of a matrix; `transposed` swaps the strides.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    shape: (usize, usize),
    strides: (isize, isize),
}

impl<'a> Matrix<'a> {
    fn rows(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns);
        Self {
            data,
            shape: (rows, columns),
            strides: (columns as isize, 1),
        }
    }

    fn transposed(self) -> Self {
        Self {
            data: self.data,
            shape: (self.shape.1, self.shape.0),
            strides: (self.strides.1, self.strides.0),
        }
    }
}

/// `out = a · b` on this thread; rows of `out` lie `stride` apart.
fn product(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32], stride: usize) {
    let ((m, k), (inner, n)) = (a.shape, b.shape);
    assert!(k == inner && n <= stride && (m == 0 || out.len() >= (m - 1) * stride + n));
    // SAFETY: `Matrix` is built over a slice of exactly rows · columns elements with the strides that reach
    // each of them once, in either orientation; `out` was checked to hold m rows of n elements `stride` apart and
    // is borrowed mutably, so that it overlaps neither operand. With `read_dst` false `out` is only written.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            false,
            a.data.as_ptr(),
            a.strides.1,
            a.strides.0,
            b.data.as_ptr(),
            b.strides.1,
            b.strides.0,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
