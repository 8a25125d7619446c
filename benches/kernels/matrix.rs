//! Products with one weight matrix, beside Candle's on the same shapes.

use crate::case::{Bound, Case, Contender, Ready, in_turn, regions};
use crate::inputs::{activations, candle, copies, dense, fp4, noise};
use candle_core::quantized::{GgmlDType, QMatMul};
use candle_core::{DType, Module};
use candle_mmfp4::cpu::{self, Arithmetic, Executor};
use candle_mmfp4::fp4::{Format, Weight};
use candle_mmfp4::nn::MmfP4Linear;
use std::cell::LazyCell;
use std::rc::Rc;
use std::sync::Arc;

/// Weights that several contenders and cases share, made when the first of them is called.
type Shared<T> = Rc<LazyCell<Vec<T>, Box<dyn FnOnce() -> Vec<T>>>>;

fn shared<T>(make: impl FnOnce() -> Vec<T> + 'static) -> Shared<T> {
    Rc::new(LazyCell::new(Box::new(make)))
}

/// FP4 formats, with the elements that share a scale, and its kind.
fn formats() -> [(&'static str, Format); 3] {
    [
        ("MMFP4 (128, F16)", Format::mmfp4()),
        ("MXFP4 (32, E8M0)", Format::mxfp4()),
        ("NVFP4 (16, E4M3)", Format::nvfp4()),
    ]
}

/// What others are compared with.
const PEER: &str = "Candle Q4K";

const QUANTIZED: [(&str, GgmlDType); 3] = [
    (PEER, GgmlDType::Q4K),
    ("Candle Q4_0", GgmlDType::Q4_0),
    ("Candle Q6K", GgmlDType::Q6K),
];

/// `[K → N]` for each number of rows, weights shared among them.
pub fn cases(executor: &Arc<Executor>, k: usize, n: usize, rows: &[usize]) -> Vec<Case> {
    let shape = (n, k);
    let ours = formats().map(|(name, format)| {
        let size = size(shape, format);
        (name, size, shared(move || copies(size, || fp4(shape, format))))
    });
    let most = rows.iter().copied().max().unwrap_or(1);
    let theirs = QUANTIZED.map(|(name, dtype)| {
        let size = n * k / dtype.block_size() * dtype.type_size();
        (
            name,
            size,
            shared(move || copies(size, || candle(shape, dtype, most))),
        )
    });
    let case = |&m: &usize| {
        let bound = if m == 1 { Bound::Bytes } else { Bound::Operations };
        let work = |bytes: usize| match bound {
            Bound::Bytes => bytes,
            Bound::Operations | Bound::Floats => 2 * m * n * k,
        };
        let mut contenders = Vec::new();
        for (name, size, weights) in &ours {
            let kernel = kernel(executor, weights, m, Arithmetic::W4A8);
            contenders.push(Contender::new(name, work(*size), kernel));
        }
        let (_, size, mmfp4) = &ours[0];
        let exact = kernel(executor, mmfp4, m, Arithmetic::Exact);
        contenders.push(Contender::new("MMFP4 exact", work(*size), exact));
        contenders.push(Contender::new("MmfP4Linear", work(*size), layer(mmfp4, m)));
        for (name, size, weights) in &theirs {
            contenders.push(Contender::new(name, work(*size), qmatmul(weights, k, m)));
        }
        let (name, title) = match bound {
            Bound::Bytes => ("vector", format!("Matrix-vector product [{k} → {n}]")),
            Bound::Operations | Bound::Floats => ("product", format!("Matrix product [{m} × {k} → {n}]")),
        };
        Case {
            name: format!("{name}-{m}x{k}x{n}"),
            title,
            bound,
            peer: Some(PEER),
            contenders,
        }
    };
    rows.iter().map(case).collect()
}

fn size((n, k): (usize, usize), format: Format) -> usize {
    n * k / 2 + n * k / format.group * format.kind.size()
}

/// The kernel alone, into memory that is there.
fn kernel(
    executor: &Arc<Executor>,
    weights: &Shared<Weight>,
    m: usize,
    arithmetic: Arithmetic,
) -> impl FnOnce() -> Ready + 'static {
    let (executor, weights) = (Arc::clone(executor), Rc::clone(weights));
    move || {
        let (n, k) = weights[0].shape();
        let regions = regions(&**weights);
        let (x, mut y, mut next) = (noise(m * k), vec![0.0; m * n], in_turn(weights.len()));
        Ready {
            call: Box::new(move || cpu::linear(&executor, &[&weights[next()]], &x, arithmetic, &mut y)),
            regions,
        }
    }
}

/// The layer, which makes its output as Candle's does: what is to be compared with Candle's.
fn layer(weights: &Shared<Weight>, m: usize) -> impl FnOnce() -> Ready + 'static {
    let weights = Rc::clone(weights);
    move || {
        let layers: Vec<_> = (weights.iter().cloned())
            .map(|weight| MmfP4Linear::new(weight, None).expect("no bias"))
            .collect();
        let regions = regions(&**weights);
        let (x, mut next) = (activations(m, weights[0].shape().1), in_turn(layers.len()));
        Ready {
            call: Box::new(move || drop(layers[next()].forward(&x).expect("shapes fit"))),
            regions,
        }
    }
}

fn qmatmul(weights: &Shared<QMatMul>, k: usize, m: usize) -> impl FnOnce() -> Ready + 'static {
    let weights = Rc::clone(weights);
    move || {
        let (x, mut next) = (activations(m, k), in_turn(weights.len()));
        Ready {
            call: Box::new(move || drop(weights[next()].forward(&x).expect("shapes fit"))),
            regions: Vec::new(),
        }
    }
}

/// A slice of an output head that stays in BF16.
pub fn head(executor: &Arc<Executor>, k: usize, n: usize) -> Case {
    let (shape, size) = ((n, k), 2 * n * k);
    let weights = shared(move || copies(size, || dense(shape)));
    Case {
        name: format!("head-1x{k}x{n}"),
        title: format!("Output head in BF16, a slice [{k} → {n}]"),
        bound: Bound::Bytes,
        peer: Some("Candle BF16"),
        contenders: vec![
            Contender::new("BF16", size, kernel(executor, &weights, 1, Arithmetic::default())),
            Contender::new("Candle BF16", size, move || {
                let make = || activations(n, k).to_dtype(DType::BF16).expect("floats");
                let weights = copies(size, make);
                let x = activations(1, k).to_dtype(DType::BF16).expect("floats");
                let mut next = in_turn(weights.len());
                Ready {
                    call: Box::new(move || {
                        let weight = weights[next()].t().expect("a matrix");
                        drop(x.matmul(&weight).expect("shapes fit"));
                    }),
                    regions: Vec::new(),
                }
            }),
        ],
    }
}
