//! Products with what attention's parts come to: metal/merged.metal.

mod cases;
#[cfg(target_os = "linux")]
pub mod faults;
#[cfg(target_os = "linux")]
pub mod plan_faults;
#[cfg(target_os = "linux")]
pub mod works;

use crate::backend::Backend;
use crate::values;
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::fp4::FloatKind;
use candle_mmfp4::metal::merged::{Operand, Product, takes};
use cases::{Case, Stored, rows};

#[test]
fn merged_products_agree_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::start() else { return };
    let cases = [cases::fp4(), cases::in_floating_point()].concat();
    for case in &cases {
        case.check(&backend);
    }
    println!("{} cases", cases.len());
}

/// GLM-4.7-Flash's heads at a depth of 8,192 and a token more: the last split has one.
#[test]
fn the_widest_rows_and_many_splits() {
    let Some(backend) = Backend::start() else { return };
    for (dtype, stored) in [
        (DType::BF16, Case::default().stored),
        (DType::F16, Stored::Dense(FloatKind::BF16)),
    ] {
        for (m, splits) in [(1, 33), (8, 33), (2, 129)] {
            let case = Case {
                dtype,
                stored,
                m,
                rows: rows(2, 448, 192, 256),
                k: 512,
                splits,
                ..Case::default()
            };
            case.check(&backend);
        }
    }
}

#[test]
fn nan_and_infinity_stay_visible_in_their_row() {
    let Some(backend) = Backend::start() else { return };
    for stored in [Case::default().stored, Stored::Dense(FloatKind::F16)] {
        for m in [1, 3, 8] {
            for (bad, in_stats) in [
                (f32::NAN, false),
                (f32::INFINITY, false),
                (f32::NAN, true),
                (f32::INFINITY, true),
            ] {
                let case = Case {
                    m,
                    splits: 33,
                    stored,
                    ..Case::default()
                };
                let (op, mut inputs) = (case.op(), case.inputs());
                // Of the last token's split 32; its largest score where it is one of those.
                let bad_input = usize::from(in_stats);
                let width = [case.k, 2][bad_input];
                let mut numbers = values(&inputs[bad_input]);
                let place = numbers.len() - width;
                numbers[place] = bad;
                let shape = inputs[bad_input].shape().clone();
                inputs[bad_input] = Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap();
                let y = backend.run(|device| {
                    let [parts, stats] = inputs.map(|input| input.to_device(device));
                    Ok(op.forward_merged(&parts?, &stats?, DType::F32)?)
                });
                let y = values(&y.unwrap());
                let (before, last) = y.split_at((m - 1) * case.rows.len);
                let what = format!("m {m} {bad} {in_stats}");
                assert!(before.iter().all(|v| v.is_finite()), "{what}");
                assert!(last.iter().all(|v| !v.is_finite()), "{what}");
            }
        }
    }
}

#[test]
fn what_no_kernel_takes_is_refused() {
    let product = |case: &Case, changed: &dyn Fn(&mut Product<'_>)| {
        let op = case.op();
        let mut product = Product {
            weight: Operand::from(op.weight(), 0).unwrap(),
            rows: case.rows,
            parts: 2,
            stats: 3,
            y: 4,
            dtype: case.dtype,
            m: case.m,
            splits: case.splits,
        };
        changed(&mut product);
        product.launch().map_err(|error| error.to_string())
    };
    let plain = Case::default();
    product(&plain, &|_| ()).unwrap();
    type Change<'a> = &'a dyn Fn(&mut Product<'_>);
    let refused: [(&str, Change<'_>); 5] = [
        ("`parts`", &|product| product.m = 9),
        ("`parts`", &|product| product.m = 0),
        ("`splits`", &|product| product.splits = 0),
        ("`splits`", &|product| product.splits = 1 << 32),
        ("`x`", &|product| product.dtype = DType::U32),
    ];
    for (argument, change) in refused {
        let error = product(&plain, change).unwrap_err();
        assert!(error.contains(argument), "{error}");
    }
    let wide = Case { k: 544, ..plain };
    assert!(product(&wide, &|_| ()).unwrap_err().contains("1 to 512"));
    let odd = Case { shift: 2, ..plain };
    assert!(product(&odd, &|_| ()).unwrap_err().contains("4 bytes"));
    // What is launched is what is said to be taken.
    let weight = plain.op().weight().clone();
    assert!(takes(&weight, 1) && takes(&weight, 8));
    assert!(!takes(&weight, 0) && !takes(&weight, 9) && !takes(wide.op().weight(), 1));
}
