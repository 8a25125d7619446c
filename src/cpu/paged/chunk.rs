//! What the loops of an instruction set see of a call: a chunk of tokens, and the rows of queries that meet it.

use super::ahead::Ahead;
use super::plan::Group;
use super::{CHUNK, PagedAttention};
use crate::kv::Part;
use std::ops::Range;

/// Some rows of queries that meet a chunk of a sequence.
pub(in crate::cpu) struct Chunk<'a> {
    /// Prepared queries, a row each.
    pub queries: &'a [f32],
    /// Elements from one of them to the next.
    pub stride: usize,
    /// The vectors that a key consists of: one, or two.
    pub(super) keys: [Vector; 2],
    pub(super) vectors: usize,
    /// A value's vector; `None`: the first of the key's.
    pub values: Option<Vector>,
    pub(super) attention: &'a PagedAttention<'a>,
    pub(super) group: &'a Group,
    /// Rows of a query.
    pub(super) per_query: usize,
    /// The position of the group's first query, and the chunk's first one.
    pub(super) position: usize,
    pub(super) first: usize,
    pub(super) seen: Range<usize>,
    /// Of each token the block's first byte and the place in the block.
    pub(super) places: [(usize, usize); CHUNK],
    /// What to ask memory for while the chunk is computed.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "the loops of other processors do not ask ahead")
    )]
    pub ahead: Ahead<'a>,
}

/// A vector of every token, and its sizes.
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct Vector {
    pub part: Part,
    code_bytes: usize,
    scale_bytes: usize,
}

impl Vector {
    pub(super) fn new(part: &Part) -> Self {
        Self {
            part: *part,
            code_bytes: part.code_bytes(),
            scale_bytes: part.scale_bytes(),
        }
    }
}

impl Chunk<'_> {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.group.rows.len()
    }

    /// The vectors that a key consists of.
    pub fn keys(&self) -> &[Vector] {
        &self.keys[..self.vectors]
    }

    /// Elements of a key.
    pub fn key_width(&self) -> usize {
        self.keys().iter().map(|vector| vector.part.width).sum()
    }

    /// Elements of a value.
    pub fn value_width(&self) -> usize {
        self.values.unwrap_or(self.keys[0]).part.width
    }

    /// The tokens of this chunk that a row sees.
    #[inline(always)]
    pub fn visible(&self, row: usize) -> Range<usize> {
        let query = (self.group.rows.start + row) / self.per_query;
        let visible = self.attention.visible(self.position + query);
        let start = visible.start.clamp(self.first, self.first + CHUNK) - self.first;
        let end = visible.end.clamp(self.first, self.first + CHUNK) - self.first;
        start..end
    }

    /// The tokens that any row sees: later rows see later ones.
    pub fn seen(&self) -> Range<usize> {
        self.seen.clone()
    }

    /// Calls `f` for runs of rows that see the same tokens of the chunk, if any.
    #[inline(always)]
    pub fn runs(&self, mut f: impl FnMut(Range<usize>, Range<usize>)) {
        let (mut start, rows) = (0, self.rows());
        while start < rows {
            let visible = self.visible(start);
            let mut end = start + 1;
            while end < rows && self.visible(end) == visible {
                end += 1;
            }
            if !visible.is_empty() {
                f(start..end, visible);
            }
            start = end;
        }
    }

    /// The codes and the scales of a token's vector; the token is one of those seen.
    #[inline(always)]
    pub fn vector(&self, vector: &Vector, token: usize) -> (&[u8], &[u8]) {
        let (block, place) = self.places[token];
        let codes = block + vector.part.codes + place * vector.part.code_stride;
        let scales = block + vector.part.scales + place * vector.part.scale_stride;
        let pool = self.attention.pool;
        (
            &pool[codes..codes + vector.code_bytes],
            &pool[scales..scales + vector.scale_bytes],
        )
    }
}
