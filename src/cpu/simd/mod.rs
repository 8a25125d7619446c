//! The kernels' inner loops, one set for each instruction set.
//!
//! Each loop is there once, written over the few operations of [`Simd`]; an instruction set is an implementation of
//! those and a [`Kernels`] table of the loops compiled for it. The loops are inlined into the functions of that table,
//! and run their sums in an order that depends on nothing but the shapes.
//!
//! # Safety
//! The loops are `unsafe` because the operations of [`Simd`] are: whoever calls one promises the instruction set. Where one
//! is given pointers, or a shape beside slices, its own text says what else is to be there.

// Loops over registers are written with indices: closures would have to be inlined to be compiled for the instruction
// set, which nothing guarantees.
#![allow(clippy::needless_range_loop)]

mod across;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
mod blocks;
mod columns;
mod decode;
mod elementwise;
mod exact;
mod few;
#[cfg(target_arch = "aarch64")]
mod i8mm;
mod int8;
mod limits;
#[cfg(target_arch = "aarch64")]
mod neon;
mod paged;
mod portable;
mod product;
mod scales;
mod table;
mod w4a8;

pub(super) use attention::out_stride;
pub(super) use columns::COLUMNS;
pub(super) use product::aligned;

use super::Isa;
use super::activations::{BLOCK, Block, Rounded};
use super::attention::Task;
use crate::fp4::{Fp4Tensor, Int8Tensor, Weight};
use std::ops::Range;

/// Rows of weights in a tile.
pub(super) const TILE: usize = 64;

/// Bytes of codes that a block of 128 elements has.
const BLOCK_BYTES: usize = BLOCK / 2;
/// Lanes of 32 bits that these bytes fill.
const BLOCK_LANES: usize = BLOCK_BYTES / 4;

/// How many bytes ahead codes are asked for, in the rows to come too: what memory takes to answer, at its speed. (Found
/// by trial: 2 KiB gave four fifths of the speed of plain reading, 4 to 8 KiB all of it.)
const DISTANCE: usize = 6144;

/// Some rows of an FP4 matrix, as bytes.
#[derive(Clone, Copy)]
pub(super) struct Fp4Rows<'a> {
    pub tensor: &'a Fp4Tensor,
    pub first: usize,
    pub rows: usize,
}

/// Some rows of a matrix of eight bits.
#[derive(Clone, Copy)]
pub(super) struct Int8Rows<'a> {
    pub tensor: &'a Int8Tensor,
    pub first: usize,
    pub rows: usize,
}

/// Which rows of activations a product takes, in order.
#[derive(Clone, Copy)]
pub(super) enum Selection<'a> {
    /// `first`, `first + step`, …
    Every { first: usize, step: usize, count: usize },
    /// These.
    Rows(&'a [u32]),
}

impl<'a> Selection<'a> {
    /// Some consecutive ones of them.
    #[inline(always)]
    pub fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::Every { first, step, .. } => Self::Every {
                first: first + range.start * step,
                step,
                count: range.len(),
            },
            Self::Rows(rows) => Self::Rows(&rows[range]),
        }
    }

    #[inline(always)]
    pub fn len(&self) -> usize {
        match self {
            Self::Every { count, .. } => *count,
            Self::Rows(rows) => rows.len(),
        }
    }

    #[inline(always)]
    pub fn row(&self, i: usize) -> usize {
        match self {
            Self::Every { first, step, .. } => first + i * step,
            Self::Rows(rows) => rows[i] as usize,
        }
    }
}

/// In which order a product sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// The one that is fastest for so many rows of activations.
    Fastest,
    /// The same for any number of them: that of many.
    Uniform,
}

/// Memory that a thread keeps from one tile to the next.
#[derive(Default)]
pub(super) struct Scratch {
    /// Decoded scales, f32 rows, gathered activations.
    pub floats: Vec<f32>,
    pub weights: Vec<f32>,
    pub gathered: Vec<f32>,
    /// Gathered rounded activations.
    pub blocks: Vec<Block>,
    /// The right side of a product, register by register.
    pub packed: Vec<f32>,
    /// A tile's result before it goes where it belongs.
    pub tile: Vec<f32>,
    pub other_tile: Vec<f32>,
    /// Decoded codes, a block each.
    pub codes: Vec<CodeTile>,
}

/// 64 rows of 128 codes, doubled, as bytes, in the order in which a tile product reads them.
#[repr(C, align(64))]
pub(super) struct CodeTile(pub [u8; TILE * 128]);

impl Default for CodeTile {
    fn default() -> Self {
        Self([0; TILE * 128])
    }
}

/// The first `len` elements; the vector grows where it is too short, and never shrinks.
#[inline(always)]
pub(super) fn sized<T: Copy + Default>(memory: &mut Vec<T>, len: usize) -> &mut [T] {
    if memory.len() < len {
        memory.resize(len, T::default());
    }
    &mut memory[..len]
}

/// The loops of an instruction set.
///
/// All of them are `unsafe` for one reason: the processor must have the instructions, which [`Kernels::of`]
/// checks before it hands out a table.
#[derive(Debug)]
#[expect(clippy::type_complexity, reason = "each is used once")]
pub(super) struct Kernels {
    /// Rounds a row of activations; see [`elementwise::round`].
    pub round: unsafe fn(x: &[f32], row: usize, rows: usize, blocks: *mut Block),
    /// FP4 weights times rounded activations; see [`w4a8::w4a8`].
    pub w4a8: unsafe fn(Fp4Rows<'_>, Rounded<'_>, Selection<'_>, Order, &mut [f32], &mut Scratch),
    /// Weights of eight bits times rounded activations; see [`int8::int8`].
    pub int8: unsafe fn(Int8Rows<'_>, Rounded<'_>, Selection<'_>, &mut [f32], &mut Scratch),
    /// Any weights times f32 activations; see [`exact::exact`].
    pub exact: unsafe fn(&Weight, Range<usize>, &[f32], Selection<'_>, Order, &mut [f32], &mut Scratch),
    /// The transposed product; see [`columns::columns`].
    pub columns:
        unsafe fn(&Weight, Range<usize>, Range<usize>, &[f32], Selection<'_>, &mut [f32], &mut Scratch),
    /// `silu(gate) · up` in place of `gate`; see [`elementwise::swiglu`].
    pub swiglu: unsafe fn(gate: &mut [f32], up: &[f32]),
    /// Some rows of attention; see [`attention::attend`].
    pub attend: unsafe fn(&Task<'_>, &mut [f32], &mut Scratch),
    /// Attention over a paged cache.
    pub paged: paged::PagedKernels,
    /// Reads bytes, for the sake of it; see [`limits::read`].
    pub read: unsafe fn(&[u8]) -> u8,
    /// Multiplies bytes, for the sake of it; see [`limits::dots`].
    pub dots: unsafe fn(rounds: u32) -> u64,
}

impl Kernels {
    /// The loops of an instruction set, if this machine can run it.
    pub fn of(isa: Isa) -> Option<&'static Self> {
        match isa {
            Isa::Reference => Some(&portable::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if avx2::available() => Some(&avx2::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni if avxvnni::available() => Some(&avxvnni::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if avx512::available() => Some(&avx512::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 if avx512bf16::available() => Some(&avx512bf16::KERNELS),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon if neon::available() => Some(&neon::KERNELS),
            #[cfg(target_arch = "aarch64")]
            Isa::I8mm if i8mm::available() => Some(&i8mm::KERNELS),
            _ => None,
        }
    }
}

/// Operations of [`Simd`] that are expressions of intrinsics.
macro_rules! operations {
    ($(
        $(#[$doc:meta])*
        fn $name:ident $(<const $c:ident: usize>)? ($($arg:ident: $ty:ty),*) $(-> $result:ty)? { $($body:tt)* }
    )*) => {$(
        $(#[$doc])*
        #[inline(always)]
        unsafe fn $name $(<const $c: usize>)? ($($arg: $ty),*) $(-> $result)? {
            // SAFETY: the caller promises the instructions, and the memory behind pointers.
            unsafe { $($body)* }
        }
    )*};
}
use operations;

/// The operations that the loops are written in, on registers of [`LANES`](Self::LANES) 32-bit lanes.
///
/// # Safety
/// Every function needs the instructions of its implementation; pointers are read and written for a whole
/// register unless a function says otherwise, at any alignment.
pub(super) trait Simd: Sized {
    /// 32-bit lanes in a register: 4, 8 or 16.
    const LANES: usize;
    /// Whether doubled codes are bytes with 12 added (see [`Block::corrections`]).
    const BIASED: bool;
    /// A register of i32.
    type Int: Copy;
    /// A register of f32.
    type Float: Copy;
    /// A register of bytes.
    type Bytes: Copy;

    unsafe fn load_bytes(from: *const u8) -> Self::Bytes;
    unsafe fn store_bytes(to: *mut u8, bytes: Self::Bytes);
    unsafe fn xor(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// The four bytes in each lane.
    unsafe fn splat_bytes(bytes: i32) -> Self::Bytes;
    /// The doubled values of the low and of the high nibbles.
    unsafe fn lookup(codes: Self::Bytes) -> (Self::Bytes, Self::Bytes);
    /// Adds in each lane the products of four bytes: doubled codes times activations.
    unsafe fn dot(sums: Self::Int, codes: Self::Bytes, x: Self::Bytes) -> Self::Int;

    /// Adds in each lane the products of four bytes, weights of eight bits times activations: both from -127 to 127.
    ///
    /// What `dot` does already where it takes signed codes.
    #[inline(always)]
    unsafe fn dot_int8(sums: Self::Int, weights: Self::Bytes, x: Self::Bytes) -> Self::Int {
        const { assert!(!Self::BIASED) };
        // SAFETY: the caller's promise.
        unsafe { Self::dot(sums, weights, x) }
    }

    unsafe fn load_int(from: *const i32) -> Self::Int;
    unsafe fn splat_int(value: i32) -> Self::Int;
    unsafe fn add_int(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn to_float(values: Self::Int) -> Self::Float;

    unsafe fn load(from: *const f32) -> Self::Float;
    unsafe fn store(to: *mut f32, values: Self::Float);
    unsafe fn splat(value: f32) -> Self::Float;
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a · b + c`.
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float;
    /// The sum of all lanes.
    unsafe fn sum(values: Self::Float) -> f32;

    /// Asks for the line of the cache that holds this byte.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    /// Reads 64 bytes at each of `LANES` rows and writes their 32-bit words transposed: `to[word][row]`.
    #[inline(always)]
    unsafe fn transpose(rows: &[*const u8], to: *mut u8) {
        for (r, row) in rows.iter().enumerate() {
            for word in 0..16 {
                // SAFETY: the caller's promise: 64 bytes a row, `LANES` rows of 16 words at `to`.
                unsafe {
                    let value = row.cast::<u32>().add(word).read_unaligned();
                    to.cast::<u32>()
                        .add(word * Self::LANES + r)
                        .write_unaligned(value);
                }
            }
        }
    }

    /// The order in which a decoded block keeps the even and the odd codes of `LANES` rows, for [`tile`](Self::tile).
    #[inline(always)]
    unsafe fn arrange(even: Self::Bytes, odd: Self::Bytes) -> (Self::Bytes, Self::Bytes) {
        (even, odd)
    }

    /// `MR` rows of activations times a decoded block; see [`blocks::tile`].
    #[inline(always)]
    unsafe fn tile<const NR: usize, const MR: usize>(
        codes: &[u8; TILE * BLOCK],
        scales: &[f32],
        group: usize,
        x: [&Block; MR],
        out: &mut [f32],
    ) {
        // SAFETY: the caller's promise.
        unsafe { blocks::tile::<Self, NR, MR>(codes, scales, group, x, out) }
    }

    /// Products and sums in a lane of [`widest`](Self::widest).
    const LANE_OPERATIONS: u64 = 8;

    /// The product that tile products are made of.
    #[inline(always)]
    unsafe fn widest(sums: Self::Int, codes: Self::Bytes, x: Self::Bytes) -> Self::Int {
        // SAFETY: the caller's promise.
        unsafe { Self::dot(sums, codes, x) }
    }

    /// The first number in the first `SHARE` lanes (2, 4 or 8), the next in the next, and so on; eight may be read.
    unsafe fn spread<const SHARE: usize>(from: *const f32) -> Self::Float;
    /// `low` in the lower half of the lanes, `high` in the upper one.
    unsafe fn splat_halves(low: f32, high: f32) -> Self::Float;
    /// The values of the low and of the high nibbles of `LANES` bytes.
    unsafe fn values(codes: *const u8) -> (Self::Float, Self::Float);
    /// Whether [`next_values`](Self::next_values) and [`next_bf16`](Self::next_bf16) are there.
    const HAS_NEXT: bool = false;
    /// The values of the lowest nibbles of the lanes, and the lanes without them.
    #[inline(always)]
    unsafe fn next_values(_: Self::Int) -> (Self::Float, Self::Int) {
        unreachable!("HAS_NEXT says that it is not there")
    }
    /// The lower halves of the lanes, which are BF16 numbers, and the lanes without them.
    #[inline(always)]
    unsafe fn next_bf16(_: Self::Int) -> (Self::Float, Self::Int) {
        unreachable!("HAS_NEXT says that it is not there")
    }
    /// `LANES` signed bytes.
    unsafe fn signed(from: *const u8) -> Self::Float;
    /// The even and the odd ones of `2 · LANES` BF16 numbers.
    unsafe fn bf16(from: *const u8) -> (Self::Float, Self::Float);
    /// Writes `2 · LANES` numbers, the even ones from the first register, the odd ones from the second.
    unsafe fn store_interleaved(to: *mut f32, even: Self::Float, odd: Self::Float);
}
