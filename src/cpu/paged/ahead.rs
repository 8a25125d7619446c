//! What a thread asks memory for while it computes a chunk.
//!
//! Memory answers some dozens of questions at a time, and a processor drops those beyond: of many lines asked for at once
//! half are not there when they are read. So they are spread over the products, one between some.

use std::ops::Range;

/// Bytes of a line of the processor's caches, or of fewer than it has.
const LINE: usize = 64;

/// What is read of some consecutive tokens of a sequence.
#[derive(Debug, Clone)]
pub(in crate::cpu) struct Tokens<'a> {
    /// The sequence's blocks.
    pub table: &'a [u32],
    pub positions: Range<usize>,
    /// Tokens and bytes of a block.
    pub block: (usize, usize),
    /// Where in a block the first token's bytes begin, and how many a token has: those of a block lie together.
    pub start: usize,
    pub share: usize,
}

impl<'a> Tokens<'a> {
    /// The bytes of the next block with tokens that are left, if any.
    fn next_bytes(&mut self, pool: &'a [u8]) -> Option<&'a [u8]> {
        let (tokens, bytes) = self.block;
        let position = self.positions.start;
        let place = position % tokens;
        let count = (tokens - place).min(self.positions.len());
        let block = *self.table.get(position / tokens).filter(|_| count > 0)?;
        self.positions.start += count;
        let start = block as usize * bytes + self.start + place * self.share;
        pool.get(start..start + count * self.share)
    }

    /// Lines of all tokens, or a few more where blocks are no whole ones.
    fn lines(&self) -> usize {
        let count = self.positions.len();
        (count * self.share + count.div_ceil(self.block.0) * (self.block.0 * self.share % LINE))
            .div_ceil(LINE)
    }
}

/// What is read while a chunk is computed, or after it.
pub(in crate::cpu) struct Ahead<'a> {
    pub pool: &'a [u8],
    /// Tokens of the chunk itself that nobody has asked for.
    pub own: Option<Tokens<'a>>,
    /// The next chunk's.
    pub next: Option<Tokens<'a>>,
}

impl<'a> Ahead<'a> {
    /// Begins with the first line.
    pub fn asking(&self) -> Asking<'a> {
        let lines = |tokens: &Option<Tokens<'_>>| tokens.as_ref().map_or(0, Tokens::lines);
        let own = lines(&self.own);
        Asking {
            pool: self.pool,
            tokens: [self.own.clone(), self.next.clone()],
            own,
            lines: own + lines(&self.next),
            line: std::ptr::null(),
            left: 0,
            asked: 0,
            due: 0,
            per_call: 0,
        }
    }
}

/// How far lines have been asked for.
pub(in crate::cpu) struct Asking<'a> {
    pool: &'a [u8],
    /// What is left behind the block whose lines are asked for.
    tokens: [Option<Tokens<'a>>; 2],
    /// Lines of the chunk itself, and of both.
    own: usize,
    lines: usize,
    /// The next line, and how many are left of its block.
    line: *const u8,
    left: usize,
    /// Lines asked for.
    asked: usize,
    /// How many are to have been asked for by now, in lines and 2^-16 of one: so much more with each call.
    due: usize,
    per_call: usize,
}

/// Lines to ask for, one a step: from the next one to the last one, which the steps left over ask for again (looking
/// whether any is left would cost more).
#[derive(Debug, Clone, Copy)]
pub(in crate::cpu) struct Lines {
    next: *const u8,
    last: *const u8,
}

impl Lines {
    /// A step's line.
    #[inline(always)]
    pub fn step(&mut self) -> *const u8 {
        let line = self.next;
        self.next = line.wrapping_add(LINE).min(self.last);
        line
    }
}

/// Bits of a line's fractions.
const FRACTION: u32 = 16;

impl Asking<'_> {
    /// So many calls for scores follow: they ask for the chunk's own lines, or for half of the next one's.
    pub fn scores(&mut self, calls: usize) {
        self.begin(if self.own > 0 { self.own } else { self.lines / 2 }, calls);
    }

    /// So many calls for outputs follow: they ask for the rest.
    pub fn outputs(&mut self, calls: usize) {
        self.begin(self.lines, calls);
    }

    fn begin(&mut self, end: usize, calls: usize) {
        self.due = self.asked << FRACTION;
        self.per_call = (end.saturating_sub(self.asked) << FRACTION) / calls.max(1);
    }

    /// What the next call asks for, which has so many steps, at least one. Where it has more lines than steps, products wait
    /// for memory, which `at_once` is to ask for what would come too late.
    #[inline(always)]
    pub fn next(&mut self, steps: usize, mut at_once: impl FnMut(*const u8)) -> Lines {
        self.due += self.per_call;
        let due = self.due >> FRACTION;
        if self.per_call > steps << FRACTION {
            let spread = steps / 2;
            while self.asked + spread < due {
                let before = self.asked;
                let mut lines = self.take(due - spread - before);
                if self.asked == before {
                    break;
                }
                (before..self.asked).for_each(|_| at_once(lines.step()));
            }
        }
        self.take(due.saturating_sub(self.asked).min(steps))
    }

    /// Up to so many lines that lie together. Where none are left, one that costs nothing to ask for.
    #[inline(always)]
    fn take(&mut self, most: usize) -> Lines {
        if self.left == 0 {
            self.next_block();
        }
        let count = most.min(self.left);
        if count == 0 {
            let known = std::ptr::from_ref(self).cast();
            return Lines {
                next: known,
                last: known,
            };
        }
        let next = self.line;
        (self.line, self.left) = (next.wrapping_add(count * LINE), self.left - count);
        self.asked += count;
        Lines {
            next,
            last: next.wrapping_add((count - 1) * LINE),
        }
    }

    /// Goes on to the lines of the next block, if any.
    fn next_block(&mut self) {
        let mut tokens = self.tokens.iter_mut().flatten();
        if let Some(bytes) = tokens.find_map(|tokens| tokens.next_bytes(self.pool)) {
            let place = bytes.as_ptr().addr() % LINE;
            self.line = bytes.as_ptr().wrapping_sub(place);
            self.left = (place + bytes.len()).div_ceil(LINE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A phase asks for all its lines, in the order of tokens, those of a call one after the other.
    #[test]
    fn all_lines_are_asked_for_in_turn() {
        let memory = vec![0u8; 1 << 16];
        // Blocks that are no whole lines, as a pool may begin anywhere.
        let pool = &memory[memory.as_ptr().align_offset(LINE) + 16..];
        let of_pool = pool.as_ptr_range();
        let table = [9, 3, 11, 2, 5];
        // Blocks of 16 tokens of 208 bytes; some tokens begin in the middle of a line.
        let tokens = |positions: Range<usize>| Tokens {
            table: &table,
            positions,
            block: (16, 16 * 208),
            start: 0,
            share: 208,
        };
        let lines = |positions: Range<usize>| {
            let mut lines: Vec<usize> = positions
                .flat_map(|position| {
                    let start = table[position / 16] as usize * 16 * 208 + position % 16 * 208;
                    let line = |place: usize| pool[place..].as_ptr().addr() / LINE;
                    line(start)..=line(start + 207)
                })
                .collect();
            lines.dedup();
            lines
        };
        for (calls, steps) in [(3, 80), (9, 36), (40, 8), (40, 1), (200, 1)] {
            let ahead = Ahead {
                pool,
                own: Some(tokens(10..40)),
                next: Some(tokens(40..75)),
            };
            let mut asking = ahead.asking();
            let mut seen: Vec<usize> = Vec::new();
            let expected = [lines(10..40), lines(10..75)];
            for (phase, expected) in expected.into_iter().enumerate() {
                match phase {
                    0 => asking.scores(calls),
                    _ => asking.outputs(calls),
                }
                for _ in 0..calls {
                    let before = seen.len();
                    let mut lines = asking.next(steps, |line| seen.push(line.addr() / LINE));
                    let spread = (0..steps)
                        .map(|_| lines.step())
                        .filter(|line| of_pool.contains(line));
                    seen.extend(spread.map(|line| line.addr() / LINE));
                    seen.dedup();
                    assert!(seen.len() - before <= expected.len().div_ceil(calls) + steps);
                }
                // A block's end may cut off some of the last call's lines, and each block has one more than were counted.
                let missing = expected.len() - seen.len();
                assert!(
                    missing <= table.len() + expected.len().div_ceil(calls).min(steps),
                    "{missing} of {calls} calls of {steps}"
                );
                assert_eq!(seen, expected[..seen.len()], "{calls} calls of {steps}");
            }
        }
    }
}
