//! How a call is cut into pieces of work.

use super::{CHUNK, PagedAttention, out_stride, value_width};
use std::cell::RefCell;
use std::ops::Range;

/// The most rows of a group, where a query's heads are not more.
pub(super) const ROWS: usize = 64;
/// From so many groups on there is work for all threads without taking them apart.
const GROUPS: usize = 64;
/// Parts of outputs take at most so many elements, 64 MiB.
const PARTS: usize = 1 << 24;
/// Where there are fewer items, as near a sequence's start, rows are cut into so many groups…
const ITEMS: usize = 4;
/// … if each has this many.
const FEW: usize = 5;

/// What a thread keeps from one call to the next.
#[derive(Default)]
pub(super) struct Kept {
    pub groups: Vec<Group>,
    pub queries: Vec<f32>,
    pub parts: Vec<f32>,
    pub totals: Vec<[f32; 2]>,
}

thread_local! {
    static KEPT: RefCell<Kept> = RefCell::default();
}

/// Runs `f` with what this thread keeps.
pub(super) fn with_kept<R>(f: impl FnOnce(&mut Kept) -> R) -> R {
    let mut kept = KEPT.take();
    let result = f(&mut kept);
    KEPT.set(kept);
    result
}

/// Rows that meet the same tokens: some consecutive queries of a sequence, heads that share keys.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub sequence: usize,
    /// The head of keys.
    pub head: usize,
    /// The sequence's first query among those of the call.
    pub first_query: usize,
    /// The first one of the group among the sequence's.
    pub query: usize,
    /// Of the rows from that query on, `[queries, heads of a kv head]`, those of the group.
    pub rows: Range<usize>,
    /// The chunks that its rows see.
    pub chunks: Range<usize>,
    /// Items and rows of the groups before, and rows of their parts.
    items_before: usize,
    rows_before: usize,
    parts_before: usize,
}

impl Group {
    /// Its chunks.
    pub fn items(&self) -> impl Iterator<Item = Item<'_>> {
        self.chunks.clone().map(|chunk| Item { group: self, chunk })
    }
}

/// A chunk of a group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item<'a> {
    pub group: &'a Group,
    pub chunk: usize,
}

impl Item<'_> {
    /// Where its rows' parts of the outputs are, counted in rows.
    pub fn part(&self) -> Range<usize> {
        let Group {
            parts_before,
            chunks,
            rows,
            ..
        } = self.group;
        let start = parts_before + (self.chunk - chunks.start) * rows.len();
        start..start + rows.len()
    }
}

/// What is to be done.
pub(super) struct Plan<'a> {
    pub groups: &'a [Group],
    /// Whether each chunk of a group is an item, whose parts are folded afterwards; else a group is one. The result is the
    /// same.
    pub split: bool,
    pub items: usize,
    pub rows: usize,
    /// Rows of all parts.
    pub parts: usize,
}

impl<'a> Plan<'a> {
    pub fn new(attention: &PagedAttention<'_>, groups: &'a mut Vec<Group>) -> Self {
        let kv_heads = attention.kv_heads();
        let per_query = attention.heads / kv_heads;
        let queries = (ROWS / per_query).max(1);
        groups.clear();
        let mut first_query = 0;
        for (index, sequence) in attention.sequences.iter().enumerate() {
            for query in (0..sequence.queries).step_by(queries) {
                let count = queries.min(sequence.queries - query);
                let position = sequence.len - sequence.queries + query;
                let first = attention.visible(position).start / CHUNK;
                let end = (position + count).div_ceil(CHUNK);
                for head in 0..kv_heads {
                    let all = count * per_query;
                    // A query alone may have more rows than a group.
                    for start in (0..all).step_by(ROWS) {
                        groups.push(Group {
                            sequence: index,
                            head,
                            first_query,
                            query,
                            rows: start..(start + ROWS).min(all),
                            chunks: first..end,
                            items_before: 0,
                            rows_before: 0,
                            parts_before: 0,
                        });
                    }
                }
            }
            first_query += sequence.queries;
        }
        let chunks: usize = groups.iter().map(|group| group.chunks.len()).sum();
        if chunks < ITEMS {
            cut_rows(groups, ITEMS.div_ceil(chunks));
        }
        let (mut items, mut rows, mut parts) = (0, 0, 0);
        for group in &mut *groups {
            (group.items_before, group.rows_before, group.parts_before) = (items, rows, parts);
            items += group.chunks.len();
            rows += group.rows.len();
            parts += group.chunks.len() * group.rows.len();
        }
        let size = parts.saturating_mul(out_stride(value_width(attention.layout)));
        let split = groups.len() < GROUPS && size <= PARTS;
        Self {
            split,
            items: if split { items } else { groups.len() },
            rows,
            parts,
            groups,
        }
    }

    /// An item.
    pub fn item(&self, index: usize) -> Item<'_> {
        let group = self.groups.partition_point(|group| group.items_before <= index) - 1;
        let group = &self.groups[group];
        Item {
            group,
            chunk: group.chunks.start + index - group.items_before,
        }
    }

    /// A row: a group and its row.
    pub fn row(&self, index: usize) -> (&Group, usize) {
        let group = self.groups.partition_point(|group| group.rows_before <= index) - 1;
        let group = &self.groups[group];
        (group, index - group.rows_before)
    }
}

/// Cuts each group's rows into so many groups.
fn cut_rows(groups: &mut Vec<Group>, parts: usize) {
    for index in 0..groups.len() {
        let rows = groups[index].rows.clone();
        let parts = parts.min(rows.len() / FEW).max(1);
        for part in 1..parts {
            let start = rows.start + part * rows.len() / parts;
            let end = rows.start + (part + 1) * rows.len() / parts;
            groups.push(Group {
                rows: start..end,
                ..groups[index].clone()
            });
        }
        groups[index].rows.end = rows.start + rows.len() / parts;
    }
}
