//! Whole models by Metal kernels: everything but attention over the cache, which the CPU computes on Linux and Candle's own
//! kernels on a Mac.

use crate::backend::Backend;
use crate::common::{Golden, goldens, largest_difference, mmfp4_demo, repository, top};
use crate::{nmse, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::checkpoint::LoadOptions;
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::fp4::Format;
use candle_mmfp4::generation::{
    Event, FinishReason, Message, Options, Pipeline, RenderOptions, Sampling, Session,
};
use candle_mmfp4::models::glm4_moe_lite::{Logits, Model};
use serde::Deserialize;
use std::path::Path;

/// Normalised mean-square error of logits that rounding explains. Half precision is that of what goes from op to op; sums
/// are in f32 whatever it is. Rounded scores of two experts that were close choose another one.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1e-3,
        DType::BF16 => 1e-2,
        _ => 1e-9,
    }
}

fn load(folder: &Path, quantize: Option<Format>, activations: DType, device: &Device) -> Model {
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
fn feeds(golden: &Golden) -> [(&[u32], usize); 2] {
    let by_length = |case: &&crate::common::Case| case.input_ids.len();
    let longest = golden.cases.iter().max_by_key(by_length).unwrap();
    let shortest = golden.cases.iter().min_by_key(by_length).unwrap();
    [
        (&longest.input_ids, longest.input_ids.len()),
        (&shortest.input_ids, 1),
    ]
}

#[test]
fn models_in_four_bits_give_the_logits_of_the_plain_kernels() {
    let Some(backend) = Backend::start() else { return };
    let mut worst = [(DType::F32, 0.0), (DType::F16, 0.0), (DType::BF16, 0.0)];
    for golden in goldens() {
        let plain = load(&golden.folder, Some(Format::mxfp4()), DType::F32, &Device::Cpu);
        for (dtype, worst) in &mut worst {
            let model = load(&golden.folder, Some(Format::mxfp4()), *dtype, backend.device());
            for (tokens, chunk) in feeds(&golden) {
                let expected = feed(&plain, tokens, chunk);
                let found = backend.within(|| feed(&model, tokens, chunk));
                let error = nmse(&values(&found), &values(&expected));
                *worst = f64::max(*worst, error);
                let what = format!("{}, chunks of {chunk}, {dtype:?}", golden.folder.display());
                assert!(error <= tolerance(*dtype), "{what}: {error:e}");
            }
        }
    }
    println!("largest NMSE of logits: {worst:?}");
}

#[test]
fn golden_logits() {
    let Some(backend) = Backend::start() else { return };
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
}

#[derive(Deserialize)]
struct Fact {
    question: String,
    answer: String,
}

fn demo(backend: &Backend, activations: DType) -> Pipeline {
    let options = LoadOptions {
        activations: Some(activations),
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

#[test]
fn two_hundred_questions_are_answered_as_on_the_cpu() {
    let Some(backend) = Backend::start() else { return };
    let text = std::fs::read_to_string(repository("tests/data/demo-model/facts.json")).unwrap();
    let facts: Vec<Fact> = serde_json::from_str(&text).unwrap();
    // Spread over all of them.
    let facts: Vec<_> = facts.iter().step_by(facts.len() / 200).take(200).collect();
    let (pipeline, plain) = (demo(&backend, DType::F32), plain());
    let prompts: Vec<_> = facts
        .iter()
        .map(|fact| prompt(&pipeline, &[Message::new("user", fact.question.as_str())]))
        .collect();
    let prompts: Vec<_> = prompts.iter().map(Vec::as_slice).collect();
    let ask = |pipeline: &Pipeline| pipeline.generate_batch(&prompts, &greedy(), |_, _| {}).unwrap();
    let (found, expected) = (backend.within(|| ask(&pipeline)), ask(&plain));
    for ((fact, found), expected) in facts.iter().zip(&found).zip(&expected) {
        assert_eq!(found.text, expected.text, "{}", fact.question);
    }
    let right = facts.iter().zip(&found).filter(|(fact, output)| {
        output.reason == FinishReason::Stop && output.text.trim() == fact.answer.trim()
    });
    let right = right.count();
    println!("{right} of {} questions answered exactly", facts.len());
    assert!(right * 100 >= 98 * facts.len(), "{right} of {}", facts.len());
}

#[test]
fn a_conversation_of_several_turns() {
    let Some(backend) = Backend::start() else { return };
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
