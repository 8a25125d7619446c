//! Attention over a paged cache in its stored format.
//!
//! A query's tokens are taken in chunks of 256, counted from position 0. A chunk's tokens are decoded once for all rows
//! that meet them (for MLA: all heads, whose keys are the latent with the rotary part and whose values are the latent;
//! else the heads that share a key), and give a part of the output with the largest score and the sum of weights. Parts
//! are folded in the order of positions. So nothing but a query's position and the stored bytes decides a bit of its
//! output: not the threads, not the other queries of the call, not how a prompt was cut.
//!
//! Work: for MLA 20 heads · (576 + 512) products, 43.5 kFLOP a query and cached token; 400 to 1,152 bytes.

#[cfg_attr(
    not(any(target_arch = "x86_64", test)),
    expect(dead_code, reason = "the loops of other processors do not ask ahead")
)]
mod ahead;
mod chunk;
mod gather;
mod plan;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
pub(super) use ahead::Lines;
use ahead::{Ahead, Tokens};
pub(super) use chunk::{Chunk, Vector};
pub use gather::gather;

use super::Executor;
use super::attention::HeadView;
use super::simd::{Scratch, aligned, sized};
use super::tile::{self, ROUND_TOGETHER, SharedSlice};
use crate::kv::{Part, RowKind, RowLayout, hadamard};
use crate::{Error, Result};
use plan::{Group, Item, Kept, Plan, ROWS};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

const OP: &str = "paged attention";

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 256;

/// A sequence of a call.
#[derive(Debug, Clone, Copy)]
pub struct PagedSequence<'a> {
    /// The blocks of the pool that hold its tokens, in order.
    pub table: &'a [u32],
    /// Tokens that it has in the cache, those of its queries included.
    pub len: usize,
    /// Its queries in this call: those of its last tokens.
    pub queries: usize,
}

/// What paged attention reads.
#[derive(Debug, Clone, Copy)]
pub struct PagedAttention<'a> {
    /// Where the numbers of a token lie in the pool.
    pub layout: &'a RowLayout,
    /// Whole blocks.
    pub pool: &'a [u8],
    /// Heads of queries.
    pub heads: usize,
    /// The queries' parts, which side by side are as wide as a key (MLA: latent and rotary part); a row a query, the first
    /// sequence's before the second's.
    pub queries: &'a [HeadView<'a>],
    /// The sequences.
    pub sequences: &'a [PagedSequence<'a>],
    /// How many positions a query sees, its own included; `None`: all up to its own.
    pub window: Option<usize>,
    /// What scores are multiplied by.
    pub scale: f32,
}

/// Elements of a value, and of what attention gives for a head.
pub fn value_width(layout: &RowLayout) -> usize {
    match layout.kind() {
        RowKind::Latent { latent, .. } => latent,
        RowKind::Heads { value_dim, .. } => value_dim,
    }
}

/// Elements of a key.
pub fn key_width(layout: &RowLayout) -> usize {
    match layout.kind() {
        RowKind::Latent { latent, rope } => latent + rope,
        RowKind::Heads { key_dim, .. } => key_dim,
    }
}

/// Elements from one row of a part of the output to the next: whole pairs of registers of any instruction set.
pub(super) fn out_stride(width: usize) -> usize {
    width.next_multiple_of(32)
}

impl<'a> PagedAttention<'a> {
    /// Sets of queries' heads with keys of their own.
    fn kv_heads(&self) -> usize {
        match self.layout.kind() {
            RowKind::Latent { .. } => 1,
            RowKind::Heads { kv_heads, .. } => kv_heads,
        }
    }

    /// The vectors that a key of a head consists of, and its value's, unless that is the first of these.
    fn parts(&self, kv_head: usize) -> (&'a [Part], Option<&'a Part>) {
        let parts = self.layout.parts();
        match self.layout.kind() {
            RowKind::Latent { .. } => (parts, None),
            RowKind::Heads { kv_heads, .. } => (&parts[kv_head..=kv_head], Some(&parts[kv_heads + kv_head])),
        }
    }

    /// The positions that the query at `position` sees.
    pub(crate) fn visible(&self, position: usize) -> Range<usize> {
        let end = position + 1;
        end.saturating_sub(self.window.unwrap_or(end))..end
    }

    /// Queries of all sequences.
    fn count(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.queries).sum()
    }

    /// Whether all of it is there.
    pub(crate) fn check(&self) -> Result<()> {
        let error =
            |argument, expected: String, found: String| Err(Error::argument(OP, argument, expected, found));
        let kv_heads = self.kv_heads();
        if self.heads == 0 || !self.heads.is_multiple_of(kv_heads) {
            let expected = format!("a multiple of the cache's {kv_heads}, at least 1");
            return error("heads", expected, self.heads.to_string());
        }
        if self.window == Some(0) {
            return error("window", "at least 1, the query itself".into(), "0".into());
        }
        let width: usize = self.queries.iter().map(|part| part.width).sum();
        if width != key_width(self.layout) {
            let expected = format!("a width of {}, as the keys, in all parts", key_width(self.layout));
            return error("queries", expected, width.to_string());
        }
        let count =
            (self.sequences.iter()).try_fold(0usize, |sum, sequence| sum.checked_add(sequence.queries));
        let held = |count: &usize| self.queries.iter().all(|part| part.holds(*count, self.heads));
        let Some(count) = count.filter(|count| *count == 0 || held(count)) else {
            let expected = "a row for each query of the sequences".into();
            return error("queries", expected, "fewer".into());
        };
        debug_assert_eq!(count, self.count());
        self.check_tables(self.pool.len())
    }

    /// Whether the blocks of the sequences are those of a pool of so many bytes.
    pub(crate) fn check_tables(&self, pool: usize) -> Result<()> {
        let error =
            |argument, expected: String, found: String| Err(Error::argument(OP, argument, expected, found));
        let (tokens, blocks) = (self.layout.block_tokens(), pool / self.layout.block_bytes());
        for (index, sequence) in self.sequences.iter().enumerate() {
            if sequence.queries > sequence.len {
                let expected = format!(
                    "at most the {} tokens in the cache of sequence {index}",
                    sequence.len
                );
                return error("queries", expected, sequence.queries.to_string());
            }
            if sequence.queries == 0 {
                continue;
            }
            let needed = sequence.len.div_ceil(tokens);
            if sequence.table.len() < needed {
                let expected = format!(
                    "{needed} blocks for the {} tokens of sequence {index}",
                    sequence.len
                );
                return error("tables", expected, sequence.table.len().to_string());
            }
            // What no query sees may have been let go.
            let first = self.visible(sequence.len - sequence.queries).start / tokens;
            let beyond = |block: &&u32| **block as usize >= blocks;
            if let Some(block) = sequence.table[first..needed].iter().find(beyond) {
                let expected = format!("blocks below {blocks}, the pool's, for sequence {index}");
                return error("tables", expected, block.to_string());
            }
        }
        Ok(())
    }
}

/// `y[i, h] = Σ_t softmax_t(scale · queries[i, h] · keys[t, h]) · values[t, h]` over the tokens that query `i` sees of its
/// sequence: `y` is `[queries of all sequences, heads, value width]`.
///
/// The queries' own tokens are in the cache already. In a cache that is stored [rotated](hadamard), queries are rotated,
/// and outputs rotated back. On instruction sets with BF16 products keys, queries, weights and values are rounded to
/// BF16 (of what is stored in FP8 and FP4 nothing is lost) and summed in f32; else all is f32. NaN and infinite scores give
/// NaN.
///
/// # Errors
/// [`Error::Argument`] names the argument at fault: heads that are no multiple of the cache's, queries that are not as wide as keys or
/// fewer than the sequences say, more queries than tokens, tables that are too short or name blocks beyond the pool, a window of 0,
/// `y` of another length.
pub fn attend_paged(executor: &Executor, attention: PagedAttention<'_>, y: &mut [f32]) -> Result<()> {
    attention.check()?;
    let (count, value) = (attention.count(), value_width(attention.layout));
    if y.len() != count * attention.heads * value {
        let expected = format!("[{count}, {}, {value}]", attention.heads);
        return Err(Error::argument(OP, "y", expected, y.len().to_string()));
    }
    if count > 0 {
        plan::with_kept(|kept| run(executor, &attention, y, kept));
    }
    Ok(())
}

fn run(executor: &Executor, attention: &PagedAttention<'_>, y: &mut [f32], kept: &mut Kept) {
    let plan = Plan::new(attention, &mut kept.groups);
    let kernels = &executor.kernels().paged;
    let call = Call {
        executor,
        attention,
        count: attention.count(),
        per_query: attention.heads / attention.kv_heads(),
        value: value_width(attention.layout),
        stride: (kernels.query_stride)(key_width(attention.layout)),
        y: SharedSlice::new(y),
    };
    let len = call.count * attention.heads * call.stride;
    let queries = aligned(&mut kept.queries, len);
    call.prepare(queries);
    let queries = &*queries;
    if !plan.split {
        executor.run(plan.items, |index| {
            // Later groups see more tokens: the longest ones first.
            call.whole(&plan.groups[plan.groups.len() - 1 - index], queries);
        });
        return;
    }
    let out_stride = out_stride(call.value);
    let parts = SharedSlice::new(sized(&mut kept.parts, plan.parts * out_stride));
    let totals = SharedSlice::new(sized(&mut kept.totals, plan.parts));
    let threads = executor.threads().min(plan.items);
    let next = AtomicUsize::new(threads);
    let take = || {
        let index = next.fetch_add(1, Ordering::Relaxed);
        (index < plan.items).then(|| plan.item(index))
    };
    // Where there are many items, a thread takes its next one before it computes one, so that it can ask memory for what it
    // will read. Of few, another thread may be free to take it first.
    let many = plan.items >= 4 * threads;
    executor.run(threads, |thread| {
        let (mut taken, mut asked) = (Some(plan.item(thread)), false);
        while let Some(item) = taken {
            let next = if many { take() } else { None };
            let turn = Turn { item, asked, next };
            asked = many;
            let rows = item.part();
            // SAFETY: these rows are this item's alone.
            let (out, totals) = unsafe {
                (
                    parts.part(rows.start * out_stride..rows.end * out_stride),
                    totals.part(rows),
                )
            };
            tile::with_scratch(|scratch| call.chunk(turn, queries, out, totals, scratch));
            taken = if many { next } else { take() };
        }
    });
    executor.run(plan.rows, |index| {
        let (group, row) = plan.row(index);
        let mut later = group.items().map(|item| item.part().start + row);
        let first = later.next().expect("a group sees a chunk");
        // SAFETY: this row's parts are this task's alone.
        let out = unsafe { parts.part(first * out_stride..(first + 1) * out_stride) };
        // SAFETY: likewise; what the first chunk gave lies where all of it is to be.
        let mut total = unsafe { totals.part(first..first + 1) }[0];
        for part in later {
            // SAFETY: the executor has checked the instructions; as above.
            unsafe {
                let from = parts.part(part * out_stride..(part + 1) * out_stride);
                (kernels.fold)(out, &mut total, from, totals.part(part..part + 1)[0]);
            }
        }
        call.finish(group, row, out, total);
    });
}

/// Tokens of a thread's first chunk that it does not ask for.
const AT_ONCE: usize = 16;

/// The total of a row that has seen nothing.
const EMPTY: [f32; 2] = [f32::NEG_INFINITY, 0.0];

/// What a thread computes now, and what it will.
struct Turn<'a> {
    item: Item<'a>,
    /// Whether memory was asked for the item's bytes already.
    asked: bool,
    next: Option<Item<'a>>,
}

/// What all tasks of a call share.
struct Call<'a> {
    executor: &'a Executor,
    attention: &'a PagedAttention<'a>,
    /// Queries.
    count: usize,
    per_query: usize,
    /// Elements of a value, and from one prepared query to the next.
    value: usize,
    stride: usize,
    y: SharedSlice<'a, f32>,
}

impl<'a> Call<'a> {
    /// Prepares all queries: `[kv heads, queries, heads of a kv head]`, so that a group's lie together.
    fn prepare(&self, to: &mut [f32]) {
        let heads = self.attention.heads;
        let prepared = SharedSlice::new(to);
        let prepare = |index: usize| {
            let (query, head) = (index / heads, index % heads);
            let (set, place) = (head / self.per_query, head % self.per_query);
            let start = ((set * self.count + query) * self.per_query + place) * self.stride;
            // SAFETY: this row is this task's alone.
            let to = unsafe { prepared.part(start..start + self.stride) };
            tile::with_scratch(|scratch| {
                let row = sized(&mut scratch.floats, key_width(self.attention.layout));
                let mut rest = &mut *row;
                for part in self.attention.queries {
                    let (numbers, tail) = rest.split_at_mut(part.width);
                    for (number, x) in numbers.iter_mut().zip(part.get(query, head)) {
                        *number = x * self.attention.scale;
                    }
                    rest = tail;
                }
                let (keys, _) = self.attention.parts(set);
                rotate(
                    self.attention.layout,
                    &mut row[..keys[0].width],
                    hadamard::rotate_whole,
                );
                // SAFETY: the executor has checked the instructions.
                unsafe { (self.executor.kernels().paged.prepare)(row, to) };
            });
        };
        let rows = self.count * heads;
        match rows * self.stride < ROUND_TOGETHER {
            true => (0..rows).for_each(prepare),
            false => self.executor.run(rows, prepare),
        }
    }

    /// The positions of a chunk that any of a group's rows sees; none, where later queries of the group alone see some.
    fn seen(&self, Item { group, chunk }: Item<'_>) -> Range<usize> {
        let sequence = &self.attention.sequences[group.sequence];
        let position = sequence.len - sequence.queries + group.query;
        let position = |row: usize| position + row / self.per_query;
        let (first, end) = (chunk * CHUNK, (chunk + 1) * CHUNK);
        let start = self.attention.visible(position(group.rows.start)).start;
        start.max(first)..(position(group.rows.end - 1) + 1).min(end)
    }

    /// The parts that a chunk has in the outputs of a group's rows.
    fn chunk(
        &self,
        turn: Turn<'_>,
        queries: &[f32],
        out: &mut [f32],
        totals: &mut [[f32; 2]],
        scratch: &mut Scratch,
    ) {
        let Item { group, chunk } = turn.item;
        let (first, seen) = (chunk * CHUNK, self.seen(turn.item));
        if seen.is_empty() {
            totals.fill(EMPTY);
            return;
        }
        let (layout, sequence) = (self.attention.layout, &self.attention.sequences[group.sequence]);
        let (keys, values) = self.attention.parts(group.head);
        let query = (group.head * self.count + group.first_query + group.query) * self.per_query;
        let rows = query + group.rows.start..query + group.rows.end;
        let mut chunk = Chunk {
            queries: &queries[rows.start * self.stride..rows.end * self.stride],
            stride: self.stride,
            keys: [keys[0], keys[keys.len() - 1]].map(|part| Vector::new(&part)),
            vectors: keys.len(),
            values: values.map(Vector::new),
            attention: self.attention,
            group,
            per_query: self.per_query,
            position: sequence.len - sequence.queries + group.query,
            first,
            seen: seen.start - first..seen.end - first,
            places: [(0, 0); CHUNK],
            ahead: self.ahead(&turn),
        };
        places(
            layout,
            sequence,
            seen.start,
            &mut chunk.places[seen.start - first..seen.end - first],
        );
        // SAFETY: the executor has checked the instructions.
        unsafe { (self.executor.kernels().paged.chunk)(&chunk, out, totals, scratch) };
    }

    /// What to ask memory for during a turn.
    fn ahead(&self, turn: &Turn<'a>) -> Ahead<'a> {
        let own = (!turn.asked).then(|| {
            // The first ones are read before memory could answer.
            let seen = self.seen(turn.item);
            self.tokens(turn.item.group, seen.start + AT_ONCE..seen.end)
        });
        let next = turn.next.map(|next| self.tokens(next.group, self.seen(next)));
        let pool = self.attention.pool;
        Ahead { pool, own, next }
    }

    /// What a group reads at these positions.
    fn tokens(&self, group: &Group, positions: Range<usize>) -> Tokens<'a> {
        let layout = self.attention.layout;
        Tokens {
            table: self.attention.sequences[group.sequence].table,
            positions,
            block: (layout.block_tokens(), layout.block_bytes()),
            // A head's bytes of a block are together, and so are a latent's of a token: of either a token has the same share.
            start: self.attention.parts(group.head).0[0].codes,
            share: layout.row_bytes() / self.attention.kv_heads(),
        }
    }

    /// All chunks of a group.
    fn whole(&self, group: &Group, queries: &[f32]) {
        let (rows, stride) = (group.rows.len(), out_stride(self.value));
        tile::with_scratch(|scratch| {
            let mut memory = std::mem::take(&mut scratch.other_tile);
            let (out, part) = sized(&mut memory, 2 * rows * stride).split_at_mut(rows * stride);
            let (mut totals, mut part_totals) = ([EMPTY; ROWS], [EMPTY; ROWS]);
            let (mut items, mut asked) = (group.items().peekable(), false);
            while let Some(item) = items.next() {
                let turn = Turn {
                    item,
                    asked,
                    next: items.peek().copied(),
                };
                asked = true;
                self.chunk(turn, queries, part, &mut part_totals[..rows], scratch);
                let parts = part.chunks_exact(stride).zip(part_totals);
                for ((out, total), (part, part_total)) in
                    out.chunks_exact_mut(stride).zip(&mut totals).zip(parts)
                {
                    // SAFETY: the executor has checked the instructions.
                    unsafe { (self.executor.kernels().paged.fold)(out, total, part, part_total) };
                }
            }
            for (row, (out, total)) in out.chunks_exact_mut(stride).zip(totals).enumerate() {
                self.finish(group, row, out, total);
            }
            scratch.other_tile = memory;
        });
    }

    /// Divides a row by its weights' sum, rotates it back and puts it where it belongs.
    fn finish(&self, group: &Group, row: usize, out: &mut [f32], [_, sum]: [f32; 2]) {
        let out = &mut out[..self.value];
        let factor = 1.0 / sum;
        out.iter_mut().for_each(|v| *v *= factor);
        rotate(self.attention.layout, out, hadamard::unrotate_whole);
        let row = group.rows.start + row;
        let query = group.first_query + group.query + row / self.per_query;
        let head = group.head * self.per_query + row % self.per_query;
        let start = (query * self.attention.heads + head) * self.value;
        // SAFETY: this row is this task's alone.
        unsafe { self.y.part(start..start + self.value) }.copy_from_slice(out);
    }
}

/// Rotates a vector one way or the other, where the layout's are.
fn rotate(layout: &RowLayout, vector: &mut [f32], how: fn(&mut [f32])) {
    if layout.rotation(vector.len()).is_some() {
        how(vector);
    }
}

/// Where the tokens from `position` on are: the block's first byte and the place in the block.
fn places(layout: &RowLayout, sequence: &PagedSequence<'_>, position: usize, places: &mut [(usize, usize)]) {
    let (tokens, bytes) = (layout.block_tokens(), layout.block_bytes());
    let (mut block, mut place) = (position / tokens, position % tokens);
    for to in places {
        *to = (sequence.table[block] as usize * bytes, place);
        place += 1;
        if place == tokens {
            (block, place) = (block + 1, 0);
        }
    }
}
