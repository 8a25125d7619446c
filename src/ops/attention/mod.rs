//! Softmax attention over keys and values as they lie.

mod on_device;
mod sdpa;

use super::activations::{View, view};
use crate::cpu::{self, Executor, HeadView};
use crate::{Error, Result};
use candle_core::{Device, Layout, Storage, Tensor};
use std::ops::Deref;

const OP: &str = "mmfp4-attention";

/// Attention of one sequence without a score matrix or a mask: who sees whom follows from positions.
///
/// Computed in f32. Queries and keys may come in parts that lie apart, and any of the tensors may be narrowed out of
/// others: nothing is concatenated or copied where rows are f32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_mmfp4::ops::Attention;
///
/// // Two new tokens, two heads, after one token cached; the heads share keys and values.
/// let query = Tensor::ones((2, 2, 4), candle_core::DType::F32, &Device::Cpu)?;
/// let keys = Tensor::new(&[[0f32, 0., 0., 0.], [1., 1., 1., 1.], [0., 0., 0., 0.]], &Device::Cpu)?;
/// let values = Tensor::new(&[[1f32], [2.], [6.]], &Device::Cpu)?;
/// let y = Attention::new(2, 0.0, None)?.forward(&[&query], &[&keys], &values, 1)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[1.5], [1.5]], [[3.], [3.]]]);
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    heads: usize,
    scale: f32,
    window: Option<usize>,
}

impl Attention {
    /// Attention of so many heads; scores are multiplied by `scale`; a query sees the last `window` positions, its own
    /// included, or (`None`) all before it.
    ///
    /// # Errors
    /// [`Error::Argument`] without heads, or for a window of 0.
    pub fn new(heads: usize, scale: f32, window: Option<usize>) -> Result<Self> {
        if heads == 0 {
            return Err(Error::argument(OP, "heads", "at least 1", "0"));
        }
        if window == Some(0) {
            return Err(Error::argument(OP, "window", "at least 1, the query itself", "0"));
        }
        Ok(Self { heads, scale, window })
    }

    /// `queries` are parts `[n, heads, d]` of the new tokens' queries, the first at `position`; `keys` parts of the
    /// keys of all tokens from position 0 on, `[T, heads, d]` or, shared by all heads, `[T, d]`, and `values` is shaped
    /// likewise; `T` is `position + n` or more. Gives `[n, heads, v]` in the queries' dtype. Parts are F32, F16 or BF16; on a
    /// device, all of one dtype.
    ///
    /// # Errors
    /// [`Error::Argument`] names the argument at fault where shape, dtype or device do not fit.
    pub fn forward(
        &self,
        queries: &[&Tensor],
        keys: &[&Tensor],
        values: &Tensor,
        position: usize,
    ) -> Result<Tensor> {
        super::without_kernel(OP);
        let Some(&[n, ..]) = queries.first().map(|part| part.dims()) else {
            return Err(Error::argument(OP, "queries", "parts [n, heads, d]", "none"));
        };
        let total = position.saturating_add(n);
        let heads = self.heads;
        let rows_of_heads = |dims: &[usize], rows: usize| dims.len() == 3 && dims[..2] == [rows, heads];
        let query = |part: &Tensor| rows_of_heads(part.dims(), n);
        let key = |part: &Tensor| match part.dims() {
            &[rows, _] => rows >= total,
            dims => dims
                .first()
                .is_some_and(|rows| *rows >= total && rows_of_heads(dims, *rows)),
        };
        for (argument, parts, fits, expected) in [
            (
                "queries",
                queries,
                &query as &dyn Fn(&Tensor) -> bool,
                format!("[{n}, {heads}, d]"),
            ),
            (
                "keys",
                keys,
                &key,
                format!("[T, {heads}, d] or [T, d], T at least {total}"),
            ),
            (
                "values",
                &[values],
                &key,
                format!("[T, {heads}, v] or [T, v], T at least {total}"),
            ),
        ] {
            if let Some(part) = parts
                .iter()
                .find(|part| !fits(part) || part.dims().last() == Some(&0))
            {
                return Err(Error::argument(
                    OP,
                    argument,
                    expected,
                    format!("shape {:?}", part.dims()),
                ));
            }
        }
        let width = |parts: &[&Tensor]| parts.iter().filter_map(|part| part.dims().last()).sum::<usize>();
        if width(keys) != width(queries) {
            let expected = format!("a width of {}, as the queries, in all parts", width(queries));
            return Err(Error::argument(OP, "keys", expected, width(keys).to_string()));
        }

        if !queries[0].device().is_cpu() {
            return on_device::Call {
                queries,
                keys,
                values,
                position,
                heads,
                scale: self.scale,
                window: self.window,
                scores: on_device::SCORES,
            }
            .run();
        }
        let like = queries[0].dtype();
        let inputs = [("queries", queries), ("keys", keys), ("values", &[values])]
            .map(|(argument, parts)| parts.iter().map(|part| open(argument, part)).collect::<Vec<_>>());
        let mut parts = Vec::with_capacity(3);
        for inputs in &inputs {
            parts.push(
                inputs
                    .iter()
                    .map(Input::part)
                    .collect::<candle_core::Result<Vec<_>>>()?,
            );
        }
        let [queries, keys, values] =
            [0, 1, 2].map(|i: usize| parts[i].iter().map(Part::heads).collect::<Vec<_>>());
        let mut y = vec![0.0; n * heads * values[0].width];
        cpu::attend(
            &*Executor::current()?,
            cpu::Attention {
                heads,
                queries: &queries,
                keys: &keys,
                values: values[0],
                position,
                window: self.window,
                scale: self.scale,
            },
            &mut y,
        );
        Ok(Tensor::from_vec(y, (n, heads, values[0].width), &Device::Cpu)?.to_dtype(like)?)
    }
}

/// A tensor, held for reading by a guard.
struct Input<'a, G> {
    argument: &'static str,
    storage: G,
    layout: &'a Layout,
}

/// Holds a tensor.
fn open<'a>(argument: &'static str, tensor: &'a Tensor) -> Input<'a, impl Deref<Target = Storage> + 'a> {
    let (storage, layout) = tensor.storage_and_layout();
    Input {
        argument,
        storage,
        layout,
    }
}

impl<G: Deref<Target = Storage>> Input<'_, G> {
    fn part(&self) -> candle_core::Result<Part<'_>> {
        let Storage::Cpu(storage) = &*self.storage else {
            return super::no_metal(OP);
        };
        Ok(Part {
            view: view(OP, self.argument, storage, self.layout)?,
            dims: self.layout.dims(),
        })
    }
}

/// A tensor's elements and shape.
struct Part<'a> {
    view: View<'a>,
    dims: &'a [usize],
}

impl Part<'_> {
    /// As the kernel takes it; all heads share what has two dimensions.
    fn heads(&self) -> HeadView<'_> {
        let strides = &self.view.strides;
        HeadView {
            data: &self.view.data,
            row: strides[0],
            head: if self.dims.len() == 3 { strides[1] } else { 0 },
            width: self.dims[self.dims.len() - 1],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    fn tensor(shape: impl Into<candle_core::Shape>) -> Tensor {
        Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn strides_and_half_precision_change_nothing_but_rounding() {
        let attention = Attention::new(3, 0.3, None).unwrap();
        let (query, rotary, rows) = (tensor((4, 3, 8)), tensor((4, 3, 6)), tensor((9, 16)));
        let expanded = tensor((9, 3, 12));
        let narrow = |t: &Tensor, start, len| t.narrow(candle_core::D::Minus1, start, len).unwrap();
        let run = |change: &dyn Fn(Tensor) -> Tensor| {
            let queries = [change(narrow(&query, 1, 7)), change(rotary.clone())];
            let keys = [change(narrow(&expanded, 0, 7)), change(narrow(&rows, 10, 6))];
            let y = attention.forward(
                &[&queries[0], &queries[1]],
                &[&keys[0], &keys[1]],
                &change(narrow(&expanded, 7, 5)),
                5,
            );
            let y = y.unwrap().to_dtype(DType::F32).unwrap();
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let expected = run(&|t| t.contiguous().unwrap());
        assert_eq!(run(&|t| t), expected);
        let last = |t: &Tensor| t.rank() - 1;
        assert_eq!(
            run(&|t| t
                .transpose(0, last(&t))
                .unwrap()
                .contiguous()
                .unwrap()
                .transpose(0, last(&t))
                .unwrap()),
            expected
        );
        for dtype in [DType::F16, DType::BF16] {
            let rounded = run(&|t| t.to_dtype(dtype).unwrap());
            let same = rounded.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 0.05);
            assert!(same && rounded != expected, "{dtype:?}");
        }
    }

    #[test]
    fn what_devices_run_gives_the_same() {
        for window in [None, Some(1), Some(4), Some(100)] {
            for (n, position) in [(1, 0), (1, 9), (6, 0), (5, 7), (0, 3)] {
                let total = position + n;
                let (heads, scale) = (3, 0.3);
                let queries = [tensor((n, heads, 8)), tensor((n, heads, 6))];
                let (rows, expanded) = (tensor((total + 2, 16)), tensor((total + 2, heads, 12)));
                let narrow = |t: &Tensor, start, len| t.narrow(candle_core::D::Minus1, start, len).unwrap();
                let ways = [
                    // Absorbed: all heads share keys and values. Materialised: they share the rotary key alone.
                    (vec![narrow(&rows, 2, 14)], narrow(&rows, 0, 9)),
                    (
                        vec![narrow(&expanded, 0, 8), narrow(&rows, 10, 6)],
                        narrow(&expanded, 8, 4),
                    ),
                ];
                for (keys, values) in ways {
                    let queries: Vec<_> = queries.iter().collect();
                    let keys: Vec<_> = keys.iter().collect();
                    let attention = Attention::new(heads, scale, window).unwrap();
                    let expected = attention.forward(&queries, &keys, &values, position).unwrap();
                    let call = on_device::Call {
                        queries: &queries,
                        keys: &keys,
                        values: &values,
                        position,
                        heads,
                        scale,
                        window,
                        scores: on_device::SCORES,
                    };
                    let found = call.run().unwrap();
                    assert_eq!(found.dims(), expected.dims());
                    let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    for (a, b) in flat(found).into_iter().zip(flat(expected)) {
                        assert!(
                            (a - b).abs() < 1e-5,
                            "{n} after {position}, {window:?}: {a} for {b}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let attention = Attention::new(3, 1.0, None).unwrap();
        let (q, k, v) = (tensor((2, 3, 8)), tensor((7, 8)), tensor((7, 3, 4)));
        let wrong = |argument: &str, queries: &[&Tensor], keys: &[&Tensor], values: &Tensor, position| {
            let error = attention
                .forward(queries, keys, values, position)
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("`{argument}`")), "{argument}: {error}");
        };
        assert!(attention.forward(&[&q], &[&k], &v, 5).is_ok());
        wrong("queries", &[], &[&k], &v, 5);
        wrong("queries", &[&tensor((2, 2, 8))], &[&k], &v, 5);
        wrong("queries", &[&tensor((2, 24))], &[&k], &v, 5);
        wrong("queries", &[&q, &tensor((1, 3, 8))], &[&k, &k], &v, 5);
        wrong(
            "queries",
            &[&Tensor::zeros((2, 3, 8), DType::U32, &Device::Cpu).unwrap()],
            &[&k],
            &v,
            5,
        );
        wrong("keys", &[&q], &[&k], &v, 6);
        wrong("keys", &[&q], &[&k], &v, usize::MAX);
        wrong("keys", &[&q], &[&tensor((7, 2, 8))], &v, 5);
        wrong("keys", &[&q], &[&k, &k], &v, 5);
        wrong("keys", &[&q], &[], &v, 5);
        wrong("values", &[&q], &[&k], &tensor((6, 4)), 5);
        wrong("values", &[&q], &[&k], &tensor((7, 3, 0)), 5);
        wrong("values", &[&q], &[&k], &tensor(7), 5);
        assert!(Attention::new(0, 1.0, None).is_err() && Attention::new(1, 1.0, Some(0)).is_err());
        assert_eq!(
            attention
                .forward(&[&tensor((0, 3, 8))], &[&k], &v, 5)
                .unwrap()
                .dims(),
            [0, 3, 4]
        );
    }
}
