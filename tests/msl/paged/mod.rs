//! Attention over a paged cache and its tokens as numbers: metal/paged_latents.metal, metal/paged_heads.metal,
//! metal/paged_rows.metal.

mod cases;

use crate::backend::Backend;
use crate::{bound, nmse, values};
use candle_core::{DType, Tensor};
use cases::Case;

fn run(backend: &Backend, case: &Case) -> (Tensor, Vec<f32>) {
    let (cache, queries) = (case.cache(), case.queries());
    let y = backend.run(|device| {
        let queries: Vec<_> = (queries.iter())
            .map(|part| part.to_device(device))
            .collect::<candle_core::Result<_>>()?;
        let pool = cache.tensor().to_device(device)?;
        let parts: Vec<_> = queries.iter().collect();
        Ok(case
            .op(&cache)
            .forward(&parts, &pool, &case.batch(&cache, device))?)
    });
    let y = y.unwrap_or_else(|error| panic!("{case:?}: {error}"));
    (y, case.expected(&cache, &queries))
}

#[test]
fn paged_attention_agrees_with_the_reference_over_the_grid() {
    let Some(backend) = Backend::alone() else { return };
    let mut worst = 0f64;
    for case in cases::grid() {
        let (y, expected) = run(&backend, &case);
        assert_eq!(
            (y.dims(), y.dtype()),
            ([case.tokens(), case.heads, case.value()].as_slice(), case.dtype)
        );
        let error = nmse(&values(&y), &expected);
        assert!(error <= bound(case.dtype), "{case:?}: {error:e}");
        if case.dtype == DType::F32 {
            worst = worst.max(error);
        }
    }
    println!("largest NMSE in f32 {worst:e}");
    assert!(backend.on_cpu().is_empty(), "{:?}", backend.on_cpu());
}
