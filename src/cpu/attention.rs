//! Softmax attention in blocks: no score matrix, no mask, no copy of keys or values.

use super::Executor;
use super::simd::{Order, out_stride, sized};
use super::tile::{self, SharedSlice};
use std::ops::Range;

/// Rows of numbers, a part of each row belonging to each head, as they lie in memory: row `i` of head `h` is
/// `data[i · row + h · head..][..width]`.
#[derive(Debug, Clone, Copy)]
pub struct HeadView<'a> {
    /// The numbers.
    pub data: &'a [f32],
    /// Elements from one row to the next.
    pub row: usize,
    /// Elements from one head to the next; 0 where all heads share a row.
    pub head: usize,
    /// Elements of a head in a row.
    pub width: usize,
}

impl<'a> HeadView<'a> {
    /// Row `i` of head `h`.
    #[inline(always)]
    pub fn get(&self, i: usize, h: usize) -> &'a [f32] {
        &self.data[i * self.row + h * self.head..][..self.width]
    }

    /// Whether so many rows of so many heads are there.
    pub(super) fn holds(&self, rows: usize, heads: usize) -> bool {
        let last = |count: usize, stride: usize| (count - 1).checked_mul(stride);
        let end = last(rows, self.row)
            .zip(last(heads, self.head))
            .and_then(|(row, head)| row.checked_add(head)?.checked_add(self.width));
        end.is_some_and(|end| end <= self.data.len())
    }
}

/// What attention reads. Queries and keys may come in parts that lie apart (MLA: one without position and a
/// rotary one): a row is its parts side by side, and the keys' may be cut elsewhere than the queries'.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Heads.
    pub heads: usize,
    /// The queries' parts, a row a new token.
    pub queries: &'a [HeadView<'a>],
    /// The keys' parts, a row a token from position 0 on.
    pub keys: &'a [HeadView<'a>],
    /// The values, a row a token from position 0 on.
    pub values: HeadView<'a>,
    /// The position of the first query. Query `i`, at `position + i`, sees the keys up to its own position.
    pub position: usize,
    /// How many positions a query sees, its own included; `None`: all.
    pub window: Option<usize>,
    /// What scores are multiplied by.
    pub scale: f32,
}

impl Attention<'_> {
    /// The keys that query `i` sees.
    #[inline(always)]
    pub fn visible(&self, i: usize) -> Range<usize> {
        let end = self.position + i + 1;
        end.saturating_sub(self.window.unwrap_or(end))..end
    }

    /// Elements of a query, and of a key.
    pub(super) fn width(&self) -> usize {
        self.queries.iter().map(|part| part.width).sum()
    }

    /// Whether all heads share keys and values: then queries of all heads meet them together.
    fn shared(&self) -> bool {
        let mut all = self.keys.iter().chain([&self.values]);
        self.heads == 1 || all.all(|view| view.head == 0)
    }

    /// The query and the head of row `r` among those that meet the same keys.
    #[inline(always)]
    fn row(&self, group: Group, r: usize) -> (usize, usize) {
        match group {
            Group::Head(h) => (r, h),
            Group::All => (r / self.heads, r % self.heads),
        }
    }
}

/// Rows that meet the same keys.
#[derive(Debug, Clone, Copy)]
enum Group {
    /// Of one head.
    Head(usize),
    /// Of all heads, token by token.
    All,
}

/// Some rows of a group, and the work for one thread.
#[derive(Debug, Clone)]
pub(super) struct Task<'a> {
    pub attention: Attention<'a>,
    pub order: Order,
    group: Group,
    rows: Range<usize>,
}

impl Task<'_> {
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The query and the head of each row.
    #[inline(always)]
    pub fn row(&self, index: usize) -> (usize, usize) {
        self.attention.row(self.group, self.rows.start + index)
    }

    /// A head whose keys and values are those of all rows.
    pub fn head(&self) -> usize {
        match self.group {
            Group::Head(h) => h,
            Group::All => 0,
        }
    }
}

/// The most rows of a task.
const ROWS: usize = 64;
/// Where there are few rows, as in decoding, they are cut into so many tasks…
const TASKS: usize = 4;
/// … if each has this many.
const FEW: usize = 5;

/// `y[i, h] = Σ_t softmax_t(scale · queries[i, h] · keys[t, h]) · values[t, h]` over the keys that query `i` sees:
/// `y` is `[n, heads, values.width]`, and `n` follows from its length.
///
/// All in f32, keys taken in blocks with a running maximum and sum. Keys that no query of a block sees are not read. NaN
/// and infinite scores give NaN.
///
/// # Panics
/// If a view is shorter than its rows, `y` has no whole number of rows, the window is 0, or the keys' parts are not
/// as wide as the queries'.
pub fn attend(executor: &Executor, attention: Attention<'_>, y: &mut [f32]) {
    let Attention {
        heads,
        queries,
        keys,
        values,
        position,
        window,
        ..
    } = attention;
    assert!(heads > 0 && values.width > 0, "attend: heads");
    let row = heads * values.width;
    let n = y.len() / row;
    if n == 0 {
        return;
    }
    let width = attention.width();
    assert!(y.len() == n * row && window != Some(0), "attend");
    assert!(
        width > 0 && keys.iter().map(|part| part.width).sum::<usize>() == width,
        "attend: widths"
    );
    assert!(queries.iter().all(|part| part.holds(n, heads)), "attend: queries");
    let total = position + n;
    assert!(
        keys.iter().chain([&values]).all(|part| part.holds(total, heads)),
        "attend: keys and values"
    );

    let shared = attention.shared();
    let (groups, rows) = if shared { (1, n * heads) } else { (heads, n) };
    // Few rows of all heads together would be one task; of a head alone they are one among many.
    let least = if shared { TASKS.min(rows / FEW) } else { 1 };
    let tasks = rows.div_ceil(ROWS).max(least);
    let y = SharedSlice::new(y);
    let (kernel, stride) = (executor.kernels().attend, out_stride(values.width));
    executor.run(groups * tasks, |index| {
        // Later rows see more keys: the longest tasks first.
        let (part, group) = (tasks - 1 - index / groups, index % groups);
        let task = Task {
            attention,
            order: executor.order(),
            group: if shared { Group::All } else { Group::Head(group) },
            rows: part * rows / tasks..(part + 1) * rows / tasks,
        };
        tile::with_scratch(|scratch| {
            let mut memory = std::mem::take(&mut scratch.other_tile);
            let out = sized(&mut memory, task.len() * stride);
            // SAFETY: the executor has checked the instructions; the views hold all rows.
            unsafe { kernel(&task, out, scratch) };
            for (index, out) in out.chunks_exact(stride).enumerate() {
                let (i, h) = task.row(index);
                let start = (i * heads + h) * values.width;
                // SAFETY: this row and head are this task's alone.
                unsafe { y.part(start..start + values.width) }.copy_from_slice(&out[..values.width]);
            }
            scratch.other_tile = memory;
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{reference, testing::*};

    /// Numbers for a call, laid out as MLA does.
    struct Case {
        heads: usize,
        n: usize,
        position: usize,
        window: Option<usize>,
        /// Widths: of the part without position, the rotary part and the values.
        widths: [usize; 3],
        query: Vec<f32>,
        rotary: Vec<f32>,
        /// Keys without position and values of all heads, `[T, heads, nope + value]`.
        expanded: Vec<f32>,
        /// `[T, nope + rope]`: what all heads share.
        cached: Vec<f32>,
    }

    impl Case {
        fn new(heads: usize, n: usize, position: usize, widths: [usize; 3]) -> Self {
            let [nope, rope, value] = widths;
            let total = position + n;
            Self {
                heads,
                n,
                position,
                window: None,
                widths,
                // Between queries without position lie the rotary parts before rotation.
                query: noise(n * heads * (nope + rope), 1),
                rotary: noise(n * heads * rope, 2),
                expanded: noise(total * heads * (nope + value), 3),
                cached: noise(total * (nope + rope), 4),
            }
        }

        fn with<R>(&self, materialised: bool, f: impl FnOnce(Attention<'_>) -> R) -> R {
            let [nope, rope, value] = self.widths;
            let view = |data, row, head, width| HeadView {
                data,
                row,
                head,
                width,
            };
            let queries = [
                view(&self.query, self.heads * (nope + rope), nope + rope, nope),
                view(&self.rotary, self.heads * rope, rope, rope),
            ];
            let (both, one) = (nope + rope, nope + value);
            let apart = [
                view(&self.expanded, self.heads * one, one, nope),
                view(&self.cached[nope..], both, 0, rope),
            ];
            let together = [view(&self.cached, both, 0, both)];
            f(Attention {
                heads: self.heads,
                queries: &queries,
                keys: if materialised { &apart } else { &together },
                values: match materialised {
                    true => view(&self.expanded[nope..], self.heads * one, one, value),
                    false => view(&self.cached, both, 0, nope),
                },
                position: self.position,
                window: self.window,
                scale: 1.0 / (both as f32).sqrt(),
            })
        }

        /// Some of the queries, over the keys that were there when they came.
        fn part(&self, rows: &Range<usize>) -> Self {
            let [nope, rope, value] = self.widths;
            let cut = |values: &[f32], row: usize, rows: Range<usize>| {
                values[rows.start * row..rows.end * row].to_vec()
            };
            let keys = 0..self.position + rows.end;
            Self {
                n: rows.len(),
                position: self.position + rows.start,
                query: cut(&self.query, self.heads * (nope + rope), rows.clone()),
                rotary: cut(&self.rotary, self.heads * rope, rows.clone()),
                expanded: cut(&self.expanded, self.heads * (nope + value), keys.clone()),
                cached: cut(&self.cached, nope + rope, keys),
                ..*self
            }
        }

        fn run(&self, executor: &Executor, materialised: bool) -> Vec<f32> {
            self.with(materialised, |attention| {
                let mut y = vec![f32::NAN; self.n * self.heads * attention.values.width];
                attend(executor, attention, &mut y);
                y
            })
        }

        fn check(&self) {
            for materialised in [false, true] {
                let expected = self.with(materialised, |a| reference::attention(a, self.n));
                for executor in executors() {
                    let what = format!(
                        "{} heads, {} at {}, {:?}, window {:?}, materialised: {materialised}, {:?}",
                        self.heads,
                        self.n,
                        self.position,
                        self.widths,
                        self.window,
                        executor.isa()
                    );
                    assert_close(&self.run(executor, materialised), &expected, &what);
                }
            }
        }
    }

    const N: [usize; 8] = [1, 2, 3, 7, 16, 17, 64, 65];

    #[test]
    fn agrees_with_the_reference_over_the_grid() {
        for heads in [1, 3, 20] {
            for n in N {
                for position in [0, 1, 15, 100] {
                    Case::new(heads, n, position, [32, 16, 24]).check();
                }
            }
        }
        for n in N {
            Case::new(3, n, 1000, [32, 16, 24]).check();
        }
    }

    #[test]
    fn odd_widths() {
        for widths in [[1, 1, 1], [7, 3, 5], [17, 15, 33], [64, 1, 65], [100, 20, 70]] {
            for (n, position) in [(1, 0), (1, 70), (9, 3), (66, 5)] {
                Case::new(3, n, position, widths).check();
                Case::new(20, n, position, widths).check();
            }
        }
    }

    #[test]
    fn the_widths_of_the_full_model() {
        for (n, position) in [(1, 0), (1, 130), (5, 60), (70, 3)] {
            Case::new(20, n, position, [512, 64, 256]).check();
        }
    }

    #[test]
    fn a_window_hides_what_lies_before_it() {
        for window in [1, 2, 63, 64, 65, 100] {
            for (n, position) in [(1, 0), (1, 200), (7, 66), (65, 0), (130, 100)] {
                let mut case = Case::new(3, n, position, [16, 16, 16]);
                case.window = Some(window);
                case.check();
            }
        }
    }

    #[test]
    fn outliers_among_scores() {
        for outlier in [1e4, -1e4] {
            for at in [0, 40, 99] {
                let mut case = Case::new(3, 30, 70, [16, 16, 16]);
                // All queries agree about this key, whatever else they look for.
                case.rotary.iter_mut().step_by(16).for_each(|v| *v = 5.6);
                case.cached[at * 32 + 16] = outlier;
                case.check();
            }
        }
    }

    #[test]
    fn nan_and_infinity_stay_visible() {
        for executor in executors() {
            for bad in [f32::NAN, f32::INFINITY] {
                for (n, position) in [(1, 0), (1, 90), (80, 3)] {
                    // In the last key: only the last query sees it.
                    let mut case = Case::new(3, n, position, [16, 16, 16]);
                    let last = case.cached.len() - 1;
                    case.cached[last] = bad;
                    for materialised in [false, true] {
                        let y = case.run(executor, materialised);
                        assert!(y[(n - 1) * 48..].iter().any(|v| v.is_nan()), "key {bad}");
                        assert!(y[..(n - 1) / 2 * 48].iter().all(|v| v.is_finite()));
                    }
                    let mut case = Case::new(3, n, position, [16, 16, 16]);
                    case.query[0] = bad;
                    for materialised in [false, true] {
                        let y = case.run(executor, materialised);
                        assert!(y[..16].iter().all(|v| v.is_nan()), "query {bad}");
                        assert!(y[16..].iter().all(|v| v.is_finite()));
                    }
                }
            }
        }
    }

    #[test]
    fn a_query_gives_the_same_bits_alone_and_among_many() {
        let all = [[32, 16, 24], [17, 15, 33], [192, 64, 256]];
        for (heads, widths) in [(3, all[0]), (20, all[0]), (3, all[1]), (2, all[2])] {
            for window in [None, Some(40), Some(64)] {
                let (n, position) = (150, 30);
                let mut case = Case::new(heads, n, position, widths);
                case.window = window;
                for executor in executors().iter().map(|executor| executor.uniform()) {
                    for materialised in [false, true] {
                        let whole = case.run(&executor, materialised);
                        for ranges in cuts(n) {
                            let what = format!(
                                "{heads} heads, {widths:?}, window {window:?}, {:?}: {:?}",
                                executor.isa(),
                                ranges[0]
                            );
                            let part =
                                |rows: &std::ops::Range<usize>| case.part(rows).run(&executor, materialised);
                            let cut: Vec<_> = ranges.iter().flat_map(part).collect();
                            assert_same_bits(&cut, &whole, &what);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        for (heads, n, position) in [(20, 1, 300), (20, 3, 0), (3, 22, 17), (3, 130, 17)] {
            let case = Case::new(heads, n, position, [32, 16, 24]);
            for materialised in [false, true] {
                assert_same_bits_for_any_threads(|executor| case.run(executor, materialised));
            }
        }
    }

    #[test]
    fn no_queries_give_no_rows() {
        for executor in executors() {
            assert!(Case::new(3, 0, 4, [8, 8, 8]).run(executor, true).is_empty());
        }
    }
}
