//! [`Kernels`](super::Kernels) tables: the loops compiled for an instruction set.

/// Makes a table for an implementation of [`Simd`](super::Simd): tile products keep `registers` registers of weights'
/// rows times `rows` rows of activations in registers.
macro_rules! kernels {
    ($simd:ident, registers: $registers:literal, rows: $rows:literal $(, features: $features:literal)?) => {
        mod kernels {
            use super::super::{
                Fp4Rows, Int8Rows, Kernels, Order, Scratch, Selection, attention, columns, elementwise, exact, int8, limits, paged, w4a8,
            };
            use crate::cpu::activations::{Block, Rounded};
            use crate::cpu::attention::Task;
            use crate::cpu::paged::Chunk;
            use crate::fp4::Weight;
            use crate::kv::Encoding;
            use std::ops::Range;

            $(#[target_feature(enable = $features)])?
            unsafe fn round(x: &[f32], row: usize, rows: usize, blocks: *mut Block) {
                // SAFETY: as the caller promises.
                unsafe { elementwise::round(x, row, rows, blocks) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn w4a8(
                weights: Fp4Rows<'_>,
                x: Rounded<'_>,
                selection: Selection<'_>,
                order: Order,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { w4a8::w4a8::<super::$simd, $registers, $rows>(weights, x, selection, order, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn int8(
                weights: Int8Rows<'_>,
                x: Rounded<'_>,
                selection: Selection<'_>,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { int8::int8::<super::$simd>(weights, x, selection, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn exact(
                weight: &Weight,
                rows: Range<usize>,
                x: &[f32],
                selection: Selection<'_>,
                order: Order,
                out: &mut [f32],
                scratch: &mut Scratch,
            ) {
                // SAFETY: as the caller promises.
                unsafe { exact::exact::<super::$simd, $registers, $rows>(weight, rows, x, selection, order, out, scratch) }
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
                unsafe { columns::columns::<super::$simd, $registers, $rows>(weight, rows, columns, x, selection, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn swiglu(gate: &mut [f32], up: &[f32]) {
                elementwise::swiglu(gate, up)
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn attend(task: &Task<'_>, out: &mut [f32], scratch: &mut Scratch) {
                // SAFETY: as the caller promises.
                unsafe { attention::attend::<super::$simd, $registers, $rows>(task, out, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn read(bytes: &[u8]) -> u8 {
                // SAFETY: as the caller promises.
                unsafe { limits::read::<super::$simd>(bytes) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn dots(rounds: u32) -> u64 {
                // SAFETY: as the caller promises.
                unsafe { limits::dots::<super::$simd>(rounds) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn prepare(query: &[f32], to: &mut [f32]) {
                paged::prepare(query, to)
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn chunk(chunk: &Chunk<'_>, out: &mut [f32], totals: &mut [[f32; 2]], scratch: &mut Scratch) {
                // SAFETY: as the caller promises.
                unsafe { paged::chunk::<super::$simd, $registers, $rows>(chunk, out, totals, scratch) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn fold(out: &mut [f32], total: &mut [f32; 2], part: &[f32], part_total: [f32; 2]) {
                paged::fold(out, total, part, part_total)
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn decode(encoding: Encoding, codes: &[u8], scales: &[u8], numbers: &mut [f32]) {
                // SAFETY: as the caller promises.
                unsafe { paged::decode::<super::$simd>(encoding, codes, scales, numbers) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn products(rounds: u32) -> u64 {
                // SAFETY: as the caller promises.
                unsafe { limits::products::<super::$simd>(rounds) }
            }

            const PAGED: paged::PagedKernels = paged::PagedKernels {
                query_stride: paged::query_stride,
                prepare,
                chunk,
                fold,
                decode,
                products,
            };

            pub const TABLE: Kernels = Kernels {
                round,
                w4a8,
                int8,
                exact,
                columns,
                swiglu,
                attend,
                paged: PAGED,
                read,
                dots,
            };
            pub static KERNELS: Kernels = TABLE;
        }
        pub(super) use kernels::KERNELS;
    };
}
pub(super) use kernels;
