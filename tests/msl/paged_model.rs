//! Whole models by Metal kernels over a paged cache, attention included.

use crate::backend::Backend;
use crate::common::{Golden, bf16_demo, goldens, mmfp4_demo, top};
use crate::model::{NEAR_TIE, feeds, in_four_bits, load};
use crate::{nmse, values};
use candle_core::{DType, Device};
use candle_mmfp4::kv::CacheFormat;
use candle_mmfp4::models::glm4_moe_lite::{AttentionPath, Logits, Model};
use candle_mmfp4::nn::CacheSize;

/// Logits of `tokens`, fed in chunks over a paged cache, whose latents are attended to as they are stored.
fn feed_paged(model: &mut Model, tokens: &[u32], chunk: usize, format: CacheFormat) -> Vec<f32> {
    model.set_attention_path(AttentionPath::Absorbed);
    let mut cache = model
        .new_paged_cache(format, CacheSize::Tokens(tokens.len()))
        .unwrap();
    let (sequence, _) = cache.start(&[]);
    let mut logits = Vec::new();
    for chunk in tokens.chunks(chunk) {
        let new = [(sequence, chunk)];
        let of_chunk = model.forward_paged(&mut cache, &new, Logits::All, None).unwrap();
        logits.extend(values(&of_chunk.to_device(&Device::Cpu).unwrap()));
    }
    logits
}

/// Normalised mean-square error of logits over a paged cache, by kernels, beside the CPU's over the same cache: at most, and in
/// half of all cases. Where what is stored lies in the middle between two codes, the last bit of a norm decides, and the CPU's
/// attention may round queries and weights to BF16; which may make the router choose another of two experts that were close.
fn tolerance_over(format: CacheFormat) -> [f64; 2] {
    match format {
        CacheFormat::Fp4 { .. } => [3e-2, 1e-3],
        _ => [1e-2, 1e-5],
    }
}

/// Whole models with everything by kernels: attention over the cache in the format in which it is stored.
#[test]
fn models_over_a_paged_cache_give_the_logits_of_the_cpu() {
    let Some(backend) = Backend::alone() else { return };
    for format in [CacheFormat::BF16, CacheFormat::fp4()] {
        let mut errors = Vec::new();
        for golden in goldens() {
            let (folder, quantize) = in_four_bits(&golden);
            let mut model = load(&folder, quantize, DType::F32, backend.device());
            if model.new_paged_cache(format, CacheSize::Tokens(1)).is_err() {
                // Its latents are no multiple of what shares a scale.
                continue;
            }
            let mut plain = load(&folder, quantize, DType::F32, &Device::Cpu);
            for (tokens, chunk) in feeds(&golden) {
                let expected = feed_paged(&mut plain, tokens, chunk, format);
                let found = backend.within(|| feed_paged(&mut model, tokens, chunk, format));
                let error = nmse(&found, &expected);
                let what = format!("{}, chunks of {chunk}, {format}", folder.display());
                println!("{what}: {error:e}");
                errors.push(error);
            }
        }
        errors.sort_by(f64::total_cmp);
        assert!(errors.len() >= 4, "{format}: {errors:?}");
        let [most, middle] = tolerance_over(format);
        assert!(errors[errors.len() - 1] <= most, "{format}: {errors:?}");
        assert!(errors[errors.len() / 2] <= middle, "{format}: {errors:?}");
    }
    #[cfg(target_os = "linux")]
    assert!(backend.on_cpu().is_empty(), "{:?}", backend.on_cpu());
}

/// What a model says next, greedily, over a paged cache.
fn say_paged(
    model: &mut Model,
    backend: Option<&Backend>,
    prompt: &[u32],
    count: usize,
    format: CacheFormat,
) -> Vec<(u32, f32)> {
    model.set_attention_path(AttentionPath::Absorbed);
    let room = CacheSize::Tokens(prompt.len() + count);
    let mut cache = model.new_paged_cache(format, room).unwrap();
    let (sequence, _) = cache.start(&[]);
    let (mut said, mut next) = (Vec::new(), prompt.to_vec());
    while said.len() < count {
        let mut forward = || {
            let new = [(sequence, next.as_slice())];
            model.forward_paged(&mut cache, &new, Logits::Last, None).unwrap()
        };
        let logits = match backend {
            Some(backend) => backend.within(forward),
            None => forward(),
        };
        said.push(top(&values(&logits.to_device(&Device::Cpu).unwrap())));
        next = vec![said[said.len() - 1].0];
    }
    said
}

/// Nothing falls back: not attention either.
#[test]
fn the_demo_model_says_over_a_paged_cache_what_it_says_on_the_cpu() {
    let Some(backend) = Backend::alone() else { return };
    let golden = Golden::read(&bf16_demo());
    let mut plain = load(&mmfp4_demo(), None, DType::F32, &Device::Cpu);
    let mut model = load(&mmfp4_demo(), None, DType::F32, backend.device());
    let chats = golden.cases.iter().filter(|case| case.name.starts_with("chat"));
    let chats: Vec<_> = chats.collect();
    for format in [CacheFormat::BF16, CacheFormat::fp4()] {
        let mut golden_words = 0;
        for chat in &chats {
            let count = chat.greedy_ids.len();
            let expected = say_paged(&mut plain, None, &chat.input_ids, count, format);
            let found = say_paged(&mut model, Some(&backend), &chat.input_ids, count, format);
            let other = found
                .iter()
                .zip(&expected)
                .position(|(found, expected)| found.0 != expected.0);
            if let Some(index) = other {
                // What comes behind is of another text.
                let gap = expected[index].1;
                assert!(
                    gap < NEAR_TIE,
                    "{format}, {}: token {index}, which led by {gap}",
                    chat.name
                );
            }
            let words = found.iter().map(|(id, _)| *id);
            golden_words += usize::from(words.eq(chat.greedy_ids.iter().copied()));
        }
        println!(
            "{format}: {golden_words} of {} as transformers says in BF16",
            chats.len()
        );
        // In four bits the model changes its mind in some.
        assert!(golden_words >= 2, "{format}: {golden_words}");
    }
    #[cfg(target_os = "linux")]
    assert!(backend.on_cpu().is_empty(), "{:?}", backend.on_cpu());
}
