//! Whole models by Metal kernels over contiguous caches: everything but attention over the cache, which the CPU computes on
//! Linux and Candle's own kernels on a Mac.

use crate::backend::Backend;
#[cfg(target_os = "linux")]
use crate::common::largest_difference;
use crate::common::{Case, Golden, bf16_demo, goldens, mmfp4_demo, repository, rewritten, top};
use crate::{nmse, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::checkpoint::{Checkpoint, LoadOptions, StoredTensor};
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::{Factor, Format, Fp4Tensor, Parts, ScaleKind, ScaleRule, quantize};
use candle_mmfp4::generation::{
    Event, FinishReason, Message, Options, Output, Pipeline, RenderOptions, Sampling, Session,
};
use candle_mmfp4::kv::CacheKind;
use candle_mmfp4::models::glm4_moe_lite::{Logits, Model};
use safetensors::Dtype;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// All that no kernel of this crate computes.
const ON_CPU: [&str; 1] = ["mmfp4-attention"];
/// Below this lead of the best logit over the next, what BF16 rounds may decide.
pub const NEAR_TIE: f32 = 0.1;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Normalised mean-square error of logits that rounding explains: at most, and in half of all cases. Half precision is that
/// of what goes from op to op; sums are in f32 whatever it is. Rounded scores of two experts that were close may choose
/// another one, which is most of the error where it happens.
pub fn tolerance(dtype: DType) -> [f64; 2] {
    match dtype {
        DType::F16 => [1e-3, 1e-5],
        DType::BF16 => [1e-2, 5e-4],
        _ => [1e-9, 1e-9],
    }
}

pub fn load(folder: &Path, quantize: Option<Format>, activations: DType, device: &Device) -> Model {
    let options = LoadOptions {
        quantize,
        activations: Some(activations),
        // What the kernels compute, and what they are compared with.
        arithmetic: Arithmetic::Exact,
        ..LoadOptions::default()
    };
    Model::from_folder(folder, &options, device).unwrap().0
}

/// Logits of `tokens`, fed in chunks, on the CPU.
fn feed(model: &Model, tokens: &[u32], chunk: usize) -> Tensor {
    let (mut cache, mut position) = (model.new_cache(), 0);
    let logits: Vec<_> = tokens
        .chunks(chunk)
        .map(|chunk| {
            let logits = model.forward(chunk, position, &mut cache, Logits::All).unwrap();
            position += chunk.len();
            logits
        })
        .collect();
    let logits = Tensor::cat(&logits, 0).unwrap();
    logits.to_device(&Device::Cpu).unwrap()
}

/// What a model of that folder is compared over: its longest case whole, its shortest token by token.
pub fn feeds(golden: &Golden) -> [(&[u32], usize); 2] {
    let by_length = |case: &&Case| case.input_ids.len();
    let longest = golden.cases.iter().max_by_key(by_length).unwrap();
    let shortest = golden.cases.iter().min_by_key(by_length).unwrap();
    [
        (&longest.input_ids, longest.input_ids.len()),
        (&shortest.input_ids, 1),
    ]
}

/// What the stored tensor `name` of a checkpoint is once its weight is multiplied out: F32, in which each value of four bits
/// times its scale is exact. Weights in floating point are rounded to `format` first, if there is one.
fn multiplied_out(
    checkpoint: &Checkpoint,
    format: Option<Format>,
    name: &str,
    stored: &StoredTensor,
) -> Option<Vec<crate::common::Written>> {
    if name.ends_with(".scales") {
        return Some(Vec::new());
    }
    let module = name.strip_suffix(".weight")?;
    let scales = checkpoint.find(&format!("{module}.scales"));
    let is_linear = module.ends_with("_proj") || module.ends_with("kv_a_proj_with_mqa");
    let packed = match (scales, format) {
        (Some(scales), _) => {
            let (n, groups) = (scales.shape[0], scales.shape[1]);
            let k = stored.shape[1] * 8;
            let parts = Parts {
                shape: (n, k),
                group: k / groups,
                codes: stored.bytes.clone(),
                scales: scales.bytes.clone(),
                kind: ScaleKind::F16,
                factor: Factor::None,
            };
            Fp4Tensor::new(name, parts).unwrap()
        }
        (None, Some(format)) if is_linear => {
            let shape = (stored.shape[0], stored.shape[1]);
            let values = stored.matrix(name, shape.0, shape.1).unwrap().to_f32();
            quantize(name, &values, shape, format, ScaleRule::default()).unwrap()
        }
        _ => return None,
    };
    let (n, k) = packed.shape();
    let bytes = packed.dequantize().into_iter().flat_map(f32::to_le_bytes);
    Some(vec![(name.into(), Dtype::F32, vec![n, k], bytes.collect())])
}

/// The model in four bits with the cases of those goldens, and how it is to be quantised while it loads.
pub fn in_four_bits(golden: &Golden) -> (PathBuf, Option<Format>) {
    match golden.folder == bf16_demo() {
        // As its users have it.
        true => (mmfp4_demo(), None),
        false => (golden.folder.clone(), Some(Format::mxfp4())),
    }
}

#[test]
fn models_in_four_bits_give_the_logits_of_their_weights_multiplied_out() {
    let Some(backend) = Backend::alone() else { return };
    let mut errors = DTYPES.map(|dtype| (dtype, Vec::new()));
    for golden in goldens() {
        let (folder, format) = in_four_bits(&golden);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let exact = rewritten(&folder, |name, stored| {
            multiplied_out(&checkpoint, format, name, stored)
        });
        // In floating point, as tests/golden.rs compares with transformers.
        let plain = load(exact.path(), None, DType::F32, &Device::Cpu);
        let expected = feeds(&golden).map(|(tokens, chunk)| values(&feed(&plain, tokens, chunk)));
        for (dtype, errors) in &mut errors {
            let model = load(&folder, format, *dtype, backend.device());
            for ((tokens, chunk), expected) in feeds(&golden).into_iter().zip(&expected) {
                let found = backend.within(|| feed(&model, tokens, chunk));
                let error = nmse(&values(&found), expected);
                errors.push(error);
                let what = format!("{}, chunks of {chunk}, {dtype:?}", golden.folder.display());
                assert!(error <= tolerance(*dtype)[0], "{what}: {error:e}");
            }
        }
    }
    for (dtype, mut errors) in errors {
        errors.sort_by(f64::total_cmp);
        let (median, largest) = (errors[errors.len() / 2], errors[errors.len() - 1]);
        println!("{dtype:?}: NMSE of logits {median:e} in the middle, {largest:e} at most");
        assert!(median <= tolerance(dtype)[1], "{dtype:?}: {errors:?}");
    }
    assert_eq!(backend.on_cpu(), ON_CPU);
}

/// What a model says next, greedily, up to so many tokens, and by how much it preferred each to the next best.
fn say(model: &Model, backend: Option<&Backend>, prompt: &[u32], count: usize) -> Vec<(u32, f32)> {
    let (mut cache, mut said) = (model.new_cache(), Vec::new());
    let mut next = prompt.to_vec();
    while said.len() < count {
        let position = cache.len();
        let mut forward = || model.forward(&next, position, &mut cache, Logits::Last).unwrap();
        let logits = match backend {
            Some(backend) => backend.within(forward),
            None => forward(),
        };
        said.push(top(&values(&logits.to_device(&Device::Cpu).unwrap())));
        next = vec![said[said.len() - 1].0];
    }
    said
}

/// The references are of the weights in BF16. In four bits the demo model says the same to the word, but where four bits
/// change its mind: there it says what its weights, multiplied out, say.
#[test]
fn the_demo_model_says_the_golden_words() {
    let Some(backend) = Backend::alone() else { return };
    let golden = Golden::read(&bf16_demo());
    let checkpoint = Checkpoint::open(mmfp4_demo()).unwrap();
    let exact = rewritten(&mmfp4_demo(), |name, stored| {
        multiplied_out(&checkpoint, None, name, stored)
    });
    let plain = load(exact.path(), None, DType::F32, &Device::Cpu);
    let chats = golden.cases.iter().filter(|case| case.name.starts_with("chat"));
    let chats: Vec<_> = chats
        .map(|case| (case, say(&plain, None, &case.input_ids, case.greedy_ids.len())))
        .collect();
    for dtype in DTYPES {
        let model = load(&mmfp4_demo(), None, dtype, backend.device());
        let mut golden_words = 0;
        for (case, expected) in &chats {
            let found = say(&model, Some(&backend), &case.input_ids, expected.len());
            for (index, ((found, _), (id, gap))) in found.iter().zip(expected).enumerate() {
                let what = format!("{dtype:?}, {}: token {index}, which led by {gap}", case.name);
                assert_eq!(found, id, "{what}");
            }
            let of_bf16 = expected
                .iter()
                .map(|(id, _)| *id)
                .eq(case.greedy_ids.iter().copied());
            golden_words += usize::from(of_bf16);
        }
        println!(
            "{dtype:?}: {golden_words} of {} as transformers says in BF16",
            chats.len()
        );
        assert!(golden_words >= 2, "{dtype:?}: {golden_words}");
    }
    assert_eq!(backend.on_cpu(), ON_CPU);
}

/// Norms, rotations, routers and products with floating-point weights. On Linux alone: a Mac has no kernel for experts and
/// MLPs in floating point, which is an error there; here the CPU runs them.
#[cfg(target_os = "linux")]
#[test]
fn golden_logits_of_floating_point_models() {
    let Some(backend) = Backend::alone() else { return };
    for golden in goldens() {
        let model = load(&golden.folder, None, DType::F32, backend.device());
        for case in &golden.cases {
            let found = backend.within(|| feed(&model, &case.input_ids, case.input_ids.len()));
            let difference = largest_difference(&found, golden.logits(case));
            let what = format!("{}, {}", golden.folder.display(), case.name);
            assert!(difference <= 2e-4, "{what}: differs by {difference}");
            let last = found.get(case.input_ids.len() - 1).unwrap();
            let (id, gap) = top(&last.to_vec1().unwrap());
            assert!(gap < 1e-3 || id == case.greedy_ids[0], "{what}: chooses {id}");
        }
    }
    let others = ["mmfp4-gated-mlp", "mmfp4-moe"];
    let on_cpu = backend.on_cpu();
    assert!(
        on_cpu.iter().all(|op| ON_CPU.contains(op) || others.contains(op)),
        "{on_cpu:?}"
    );
}

#[derive(Deserialize)]
struct Fact {
    question: String,
    answer: String,
}

fn demo(backend: &Backend, activations: DType) -> Pipeline {
    let options = LoadOptions {
        activations: Some(activations),
        kv_cache: CacheKind::Contiguous,
        ..LoadOptions::default()
    };
    Pipeline::from_folder(mmfp4_demo(), &options, backend.device())
        .unwrap()
        .0
}

/// The demo model by the CPU's kernels, in exact arithmetic.
fn plain() -> Pipeline {
    let options = LoadOptions {
        arithmetic: Arithmetic::Exact,
        kv_cache: CacheKind::Contiguous,
        ..LoadOptions::default()
    };
    Pipeline::from_folder(mmfp4_demo(), &options, &Device::Cpu)
        .unwrap()
        .0
}

fn greedy() -> Options {
    Options {
        sampling: Sampling::default(),
        max_tokens: Some(256),
        ..Options::default()
    }
}

fn prompt(pipeline: &Pipeline, messages: &[Message]) -> Vec<u32> {
    let no_thinking = RenderOptions {
        enable_thinking: Some(false),
        ..RenderOptions::default()
    };
    pipeline.chat_prompt(messages, &no_thinking).unwrap()
}

/// All facts with answers of at most so many characters.
fn facts(longest: usize) -> Vec<Fact> {
    let text = std::fs::read_to_string(repository("tests/data/demo-model/facts.json")).unwrap();
    let facts: Vec<Fact> = serde_json::from_str(&text).unwrap();
    let short = |fact: &Fact| fact.answer.chars().count() <= longest;
    facts.into_iter().filter(short).collect()
}

/// So many of them, spread over all.
fn some(facts: Vec<Fact>, count: usize) -> Vec<Fact> {
    let step = facts.len() / count;
    facts.into_iter().step_by(step).take(count).collect()
}

/// What a model answers, and by how much it preferred each token to the next best.
fn ask(pipeline: &Pipeline, facts: &[Fact]) -> (Vec<Output>, Vec<Vec<f32>>) {
    let prompts: Vec<_> = facts
        .iter()
        .map(|fact| prompt(pipeline, &[Message::new("user", fact.question.as_str())]))
        .collect();
    let prompts: Vec<_> = prompts.iter().map(Vec::as_slice).collect();
    let mut gaps = vec![Vec::new(); facts.len()];
    let mut options = greedy();
    options.sampling.top_logprobs = 2;
    let outputs = pipeline.generate_batch(&prompts, &options, |index, event| {
        if let Event::Token { top, .. } = event {
            gaps[index].push(top[0].1 - top[1].1);
        }
    });
    (outputs.unwrap(), gaps)
}

/// How many are as the model was taught them.
fn exact(facts: &[Fact], answers: &[Output]) -> usize {
    let right = facts.iter().zip(answers).filter(|(fact, output)| {
        output.reason == FinishReason::Stop && output.text.trim() == fact.answer.trim()
    });
    right.count()
}

#[test]
fn two_hundred_questions_are_answered_as_on_the_cpu() {
    let Some(backend) = Backend::alone() else { return };
    let facts = some(facts(usize::MAX), 200);
    let (pipeline, plain) = (demo(&backend, DType::F32), plain());
    let (found, _) = backend.within(|| ask(&pipeline, &facts));
    let (expected, _) = ask(&plain, &facts);
    for ((fact, found), expected) in facts.iter().zip(&found).zip(&expected) {
        assert_eq!(found.text, expected.text, "{}", fact.question);
    }
    let right = exact(&facts, &found);
    println!("{right} of {} questions answered exactly", facts.len());
    assert!(right * 100 >= 98 * facts.len(), "{right} of {}", facts.len());
    assert_eq!(backend.on_cpu(), ON_CPU);
}

/// What users get: in BF16 as on the CPU in f32, but where that was all but undecided between two tokens, which is counted.
/// Of the short answers, because one takes a second here.
#[test]
fn fifty_questions_are_answered_in_bf16() {
    let Some(backend) = Backend::alone() else { return };
    let facts = some(facts(40), 50);
    let (pipeline, plain) = (demo(&backend, DType::BF16), plain());
    let (found, _) = backend.within(|| ask(&pipeline, &facts));
    let (expected, gaps) = ask(&plain, &facts);
    let mut near_ties = 0;
    for (index, fact) in facts.iter().enumerate() {
        let (found, expected) = (&found[index], &expected[index]);
        if (&found.tokens, found.reason) == (&expected.tokens, expected.reason) {
            continue;
        }
        let pairs = found.tokens.iter().zip(&expected.tokens);
        let same = pairs.take_while(|(found, expected)| found == expected).count();
        let gap = gaps[index].get(same).copied().unwrap_or(f32::INFINITY);
        let told = format!(
            "{}: {:?} for {:?}, whose token {same} led by {gap}",
            fact.question, found.text, expected.text
        );
        println!("{told}");
        assert!(gap < NEAR_TIE, "{told}");
        near_ties += 1;
    }
    let right = exact(&facts, &found);
    println!(
        "{right} of {} questions answered exactly, {near_ties} near-ties",
        facts.len()
    );
    assert!(near_ties <= 2, "{near_ties}");
    assert!(right + near_ties + 1 >= facts.len(), "{right} of {}", facts.len());
    assert_eq!(backend.on_cpu(), ON_CPU);
}

#[test]
fn a_conversation_of_several_turns() {
    let Some(backend) = Backend::alone() else { return };
    let (pipeline, plain) = (demo(&backend, DType::BF16), plain());
    let questions = [
        "What does `Ordering::is_eq` do?",
        "What does `Option::insert` do?",
        "What does `Vec::push` do?",
    ];
    let (mut session, mut other) = (pipeline.new_session(), plain.new_session());
    let mut messages = Vec::new();
    for question in questions {
        messages.push(Message::new("user", question));
        let tokens = prompt(&pipeline, &messages);
        let held = session.tokens().len();
        let found = backend.within(|| answer(&pipeline, &mut session, &tokens));
        assert_eq!(found, answer(&plain, &mut other, &tokens), "{question}");
        assert!(!found.is_empty() && session.tokens().len() > held);
        messages.push(Message::new("assistant", found));
    }
    assert_eq!(backend.on_cpu(), ON_CPU);
}

fn answer(pipeline: &Pipeline, session: &mut Session, tokens: &[u32]) -> String {
    let mut text = String::new();
    for event in pipeline.generate_in(session, tokens, &greedy()).unwrap() {
        if let Event::Token { text: more, .. } = event.unwrap() {
            text += &more;
        }
    }
    text
}
