//! Floating-point weights on the CPU against transformers' float32 results: logits and greedy continuations,
//! whatever way the tokens are fed.

mod common;

use candle_core::{Device, Tensor};
use candle_mmfp4::checkpoint::{LoadOptions, ModelFiles};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::Format;
use candle_mmfp4::models::Site;
use candle_mmfp4::models::glm4_moe_lite::{AttentionPath, Logits, Model, Sequence};
use common::{Golden, goldens, largest_difference, top};

const TOLERANCE: f32 = 2e-4;
/// Below this distance of the two best logits, which of them is chosen is rounding's choice.
const NEAR_TIE: f32 = 1e-3;

fn load(golden: &Golden) -> Model {
    let files = ModelFiles::folder(&golden.folder);
    common::load(&files, &Default::default()).unwrap().0
}

/// The largest difference of logits, as a share of the largest logit.
fn relative_difference(a: &Tensor, b: &Tensor) -> f32 {
    largest_difference(a, b) / largest_difference(b, &b.zeros_like().unwrap())
}

/// Logits of `tokens`, fed in chunks of `chunk` into `cache` from position 0.
fn feed(model: &Model, cache: &mut candle_mmfp4::nn::TokenCache, tokens: &[u32], chunk: usize) -> Tensor {
    let mut position = 0;
    let logits: Vec<_> = tokens
        .chunks(chunk)
        .map(|chunk| {
            let logits = model.forward(chunk, position, cache, Logits::All).unwrap();
            position += chunk.len();
            logits
        })
        .collect();
    Tensor::cat(&logits, 0).unwrap()
}

#[test]
fn logits_agree_however_the_tokens_are_fed() {
    for golden in goldens() {
        let model = load(&golden);
        let mut reused = model.new_cache();
        for case in &golden.cases {
            let (tokens, expected) = (&case.input_ids, golden.logits(case));
            for chunk in [tokens.len(), 1, 2, 3, 5] {
                for fresh in [true, false] {
                    let logits = match fresh {
                        true => feed(&model, &mut model.new_cache(), tokens, chunk),
                        // Whatever the last case left in it: position 0 begins anew.
                        false => feed(&model, &mut reused, tokens, chunk),
                    };
                    let difference = largest_difference(&logits, expected);
                    let what = format!(
                        "{}, {}, chunks of {chunk}, fresh: {fresh}",
                        golden.folder.display(),
                        case.name
                    );
                    assert!(difference <= TOLERANCE, "{what}: differs by {difference}");
                }
            }
        }
    }
}

#[test]
fn experts_one_by_one_give_what_the_fused_op_gives() {
    for golden in goldens() {
        for quantize in [None, Some(Format::mxfp4())] {
            let load = |separate_experts| {
                let options = LoadOptions {
                    quantize,
                    separate_experts,
                    // Rounded activations would make much of little: the last bit decides between two steps.
                    arithmetic: Arithmetic::Exact,
                    ..LoadOptions::default()
                };
                Model::from_folder(&golden.folder, &options, &Device::Cpu)
                    .unwrap()
                    .0
            };
            let (fused, separate) = (load(false), load(true));
            for case in &golden.cases {
                for chunk in [case.input_ids.len(), 1] {
                    let expected = feed(&fused, &mut fused.new_cache(), &case.input_ids, chunk);
                    let logits = feed(&separate, &mut separate.new_cache(), &case.input_ids, chunk);
                    let difference = relative_difference(&logits, &expected);
                    let what = format!("{}, {}, chunks of {chunk}", golden.folder.display(), case.name);
                    assert!(
                        difference <= 1e-5,
                        "{what}, {quantize:?}: differs by {difference}"
                    );
                    assert_eq!(fused.bytes_read(3), separate.bytes_read(3));
                }
            }
        }
    }
}

#[test]
fn greedy_continuations_agree_however_the_prompt_is_fed() {
    for golden in goldens() {
        let model = load(&golden);
        let mut reused = model.new_cache();
        for case in &golden.cases {
            for chunk in [case.input_ids.len(), 1, 2, 3, 5] {
                let what = format!("{}, {}, chunks of {chunk}", golden.folder.display(), case.name);
                let fed = feed(&model, &mut reused, &case.input_ids, chunk);
                let mut logits = fed.get(case.input_ids.len() - 1).unwrap();
                let mut compared = 0;
                for expected in &case.greedy_ids {
                    let (id, gap) = top(&logits.to_vec1().unwrap());
                    if gap < NEAR_TIE {
                        break;
                    }
                    assert_eq!(id, *expected, "{what}: token {compared}");
                    let next = model
                        .forward(&[id], reused.len(), &mut reused, Logits::Last)
                        .unwrap();
                    logits = next.get(0).unwrap();
                    compared += 1;
                }
                assert!(compared > 0, "{what}: nothing was compared");
            }
        }
    }
}

#[test]
fn both_ways_of_attention_agree_at_every_chunk_size() {
    for golden in goldens() {
        let mut model = load(&golden);
        let case = golden
            .cases
            .iter()
            .max_by_key(|case| case.input_ids.len())
            .unwrap();
        for chunk in 1..=case.input_ids.len() {
            let logits = [AttentionPath::Absorbed, AttentionPath::Materialised].map(|path| {
                model.set_attention_path(path);
                feed(&model, &mut model.new_cache(), &case.input_ids, chunk)
            });
            let difference = largest_difference(&logits[0], &logits[1]);
            assert!(
                difference <= 1e-4,
                "{}, chunks of {chunk}: {difference}",
                golden.folder.display()
            );
        }
    }
}

#[test]
fn a_batch_gives_what_each_sequence_gives_alone() {
    for golden in goldens() {
        let model = load(&golden);
        // The first half of each prompt is cached; the batch adds the other halves, of different lengths.
        let mut caches: Vec<_> = golden.cases.iter().map(|_| model.new_cache()).collect();
        for (case, cache) in golden.cases.iter().zip(&mut caches) {
            let half = &case.input_ids[..case.input_ids.len() / 2];
            if !half.is_empty() {
                model.forward(half, 0, cache, Logits::Last).unwrap();
            }
        }
        let mut sequences: Vec<_> = golden
            .cases
            .iter()
            .zip(&mut caches)
            .map(|(case, cache)| Sequence {
                tokens: &case.input_ids[cache.len()..],
                position: cache.len(),
                cache: Some(cache),
            })
            .collect();
        let logits = model.forward_batch(&mut sequences, Logits::Last, None).unwrap();
        for (index, case) in golden.cases.iter().enumerate() {
            let expected = golden.logits(case).get(case.input_ids.len() - 1).unwrap();
            let difference = largest_difference(&logits.get(index).unwrap(), &expected);
            assert!(
                difference <= TOLERANCE,
                "{}, {}: {difference}",
                golden.folder.display(),
                case.name
            );
            assert_eq!(caches[index].len(), case.input_ids.len());
        }
    }
}

#[test]
fn without_a_cache_the_numbers_are_the_same() {
    for golden in goldens() {
        let model = load(&golden);
        for case in &golden.cases {
            let mut alone = [Sequence {
                tokens: &case.input_ids,
                position: 0,
                cache: None,
            }];
            let logits = model.forward_batch(&mut alone, Logits::All, None).unwrap();
            assert!(
                largest_difference(&logits, golden.logits(case)) <= TOLERANCE,
                "{}",
                golden.folder.display()
            );
        }
    }
}

#[test]
fn hidden_states_agree_layer_by_layer() {
    let mut compared = 0;
    for golden in goldens() {
        let model = load(&golden);
        let layers = model.config().layers.len();
        for case in &golden.cases {
            let Some(first) = golden.tensors.get(&format!("{}.hidden.0", case.name)) else {
                continue;
            };
            let mut hidden = Vec::new();
            let mut observe = |site: Site, _: &Tensor, output: &Tensor| {
                // Transformers lists the last layer's output after the final norm.
                let wanted = match (site.layer, site.op) {
                    (None, "embed_tokens" | "norm") => true,
                    (Some(layer), "layer") => layer + 1 < layers,
                    _ => false,
                };
                if wanted {
                    hidden.push(output.clone());
                }
                Ok(())
            };
            let mut alone = [Sequence {
                tokens: &case.input_ids,
                position: 0,
                cache: None,
            }];
            model
                .forward_batch(&mut alone, Logits::All, Some(&mut observe))
                .unwrap();
            assert_eq!(first.dims(), [case.input_ids.len(), model.config().hidden_size]);
            for (index, hidden) in hidden.iter().enumerate() {
                let expected = &golden.tensors[&format!("{}.hidden.{index}", case.name)];
                let difference = largest_difference(hidden, expected);
                assert!(
                    difference <= TOLERANCE,
                    "{}, hidden state {index}: {difference}",
                    golden.folder.display()
                );
            }
            assert_eq!(hidden.len(), layers + 1);
            compared += 1;
        }
    }
    assert!(compared > 0 || std::env::var_os("MMFP4_GOLDEN_DIR").is_some());
}
