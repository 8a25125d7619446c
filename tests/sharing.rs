//! One cache for all that a pipeline generates: what begins alike is computed once, what has ended leaves its room, and what
//! finds none is refused without harm.

mod common;

use candle_core::Device;
use candle_mmfp4::Error;
use candle_mmfp4::checkpoint::LoadOptions;
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::generation::{
    Cancel, Event, FinishReason, Message, Options, Output, Pipeline, RenderOptions, Session, Windows,
};
use candle_mmfp4::kv::{BlockStatistics, CacheFormat, CacheKind};
use candle_mmfp4::nn::CacheSize;
use common::mmfp4_demo;

/// Tokens of a block.
const BLOCK: usize = 16;

fn load(kind: impl Into<CacheKind>, tokens: usize) -> Pipeline {
    let options = LoadOptions {
        arithmetic: Arithmetic::Exact,
        kv_cache: kind.into(),
        kv_size: Some(CacheSize::Tokens(tokens)),
        ..LoadOptions::default()
    };
    Pipeline::from_folder(mmfp4_demo(), &options, &Device::Cpu)
        .unwrap()
        .0
}

fn statistics(pipeline: &Pipeline) -> BlockStatistics {
    pipeline.cache_statistics().unwrap()
}

/// Exactly so many tokens: none ends the text.
fn endless(pipeline: &Pipeline, tokens: usize) -> Options {
    let mut options = Options {
        max_tokens: Some(tokens),
        ..Options::default()
    };
    let ends = &pipeline.defaults().eos_token_id;
    options.sampling.logit_bias = ends.iter().map(|id| (*id, -1e4)).collect();
    options
}

fn words(pipeline: &Pipeline, text: &str) -> Vec<u32> {
    pipeline.tokenizer().encode(text).unwrap()
}

/// A prompt of five blocks and some, and two that begin as it does.
fn prompts(pipeline: &Pipeline) -> [Vec<u32>; 3] {
    let begin = "The standard library is documented in detail. Each function has a description, an example and, where it may \
                 fail, a section that says when. A vector is a contiguous growable array type; a string is a vector of bytes \
                 that are known to be text. An iterator yields one element after the other until there is none, and may be asked again. ";
    let begin = words(pipeline, begin);
    assert!(begin.len() > 5 * BLOCK, "{}", begin.len());
    ["A function", "An option is", "The"].map(|end| [&begin[..5 * BLOCK], &words(pipeline, end)].concat())
}

fn alone(pipeline: &Pipeline, prompt: &[u32], options: &Options) -> Output {
    let mut outputs = pipeline.generate_batch(&[prompt], options, |_, _| {}).unwrap();
    outputs.remove(0)
}

fn in_session(pipeline: &Pipeline, session: &mut Session, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let options = endless(pipeline, tokens);
    let mut said = Vec::new();
    for event in pipeline.generate_in(session, prompt, &options).unwrap() {
        if let Event::Token { id, .. } = event.unwrap() {
            said.push(id);
        }
    }
    said
}

/// Conversations that begin with the same turns, and how many tokens each finds of those before it.
fn conversations(pipeline: &Pipeline) -> ([Vec<u32>; 3], [usize; 3]) {
    let no_thinking = RenderOptions {
        enable_thinking: Some(false),
        ..RenderOptions::default()
    };
    let questions = [
        "What does `Option::insert` do?",
        "What does `Ordering::is_eq` do?",
        "What does `Vec::push` do?",
    ];
    let prompts = questions.map(|question| {
        let turns = [
            ("user", "What does `Ordering::is_eq` do?"),
            ("assistant", "Returns true if the ordering is the Equal variant."),
            ("user", "What does `Option::take` do?"),
            (
                "assistant",
                "Takes the value out of the option, leaving a None in its place.",
            ),
            ("user", question),
        ];
        let turns = turns.map(|(role, text)| Message::new(role, text));
        pipeline.chat_prompt(&turns, &no_thinking).unwrap()
    });
    let common = |a: usize, b: usize| {
        prompts[a]
            .iter()
            .zip(&prompts[b])
            .take_while(|(a, b)| a == b)
            .count()
    };
    let whole = |tokens: usize| tokens / BLOCK * BLOCK;
    let shared = [0, whole(common(0, 1)), whole(common(0, 2).max(common(1, 2)))];
    assert!(shared[1] >= 2 * BLOCK, "{shared:?}");
    (prompts, shared)
}

#[test]
fn what_begins_alike_is_computed_once_and_says_the_same() {
    for format in [
        CacheFormat::F16,
        CacheFormat::BF16,
        CacheFormat::Fp8,
        CacheFormat::fp4(),
    ] {
        let (prompts, shared) = conversations(&load(format, 16));
        for prefill_chunk in [512, 30, 1] {
            let options = Options {
                prefill_chunk,
                max_tokens: Some(40),
                ..Options::default()
            };
            let fresh: Vec<_> = prompts
                .iter()
                .map(|prompt| alone(&load(format, 2048), prompt, &options))
                .collect();
            let check = |found: &[Output], what: &str| {
                for (index, (found, fresh)) in found.iter().zip(&fresh).enumerate() {
                    let what = format!("{format}, chunks of {prefill_chunk}, {what}, prompt {index}");
                    assert_eq!(found.tokens, fresh.tokens, "{what}");
                    assert_eq!(found.statistics.cached_tokens, shared[index], "{what}");
                }
            };
            assert!(fresh.iter().all(|output| output.statistics.cached_tokens == 0));
            let pipeline = load(format, 2048);
            let found: Vec<_> = prompts
                .iter()
                .map(|prompt| alone(&pipeline, prompt, &options))
                .collect();
            check(&found, "one after the other");
            // Where nobody was before: the others wait for what the first one computes.
            let pipeline = load(format, 2048);
            let all: Vec<_> = prompts.iter().map(Vec::as_slice).collect();
            check(
                &pipeline.generate_batch(&all, &options, |_, _| {}).unwrap(),
                "together",
            );
        }
    }
}

#[test]
fn a_session_takes_what_others_have_and_leaves_its_room() {
    let pipeline = load(CacheFormat::BF16, 1024);
    let [prompt, other, _] = prompts(&pipeline);
    let mut first = pipeline.new_session();
    let said = in_session(&pipeline, &mut first, &prompt, 20);
    // Of the last token nothing is computed.
    let held = prompt.len() + said.len() - 1;
    assert_eq!(first.tokens(), &[&prompt[..], &said].concat()[..held]);
    assert_eq!(statistics(&pipeline).used, held.div_ceil(BLOCK));
    let row = 6 * 160 * 2;
    assert_eq!(first.size_in_bytes(), held.div_ceil(BLOCK) * BLOCK * row);

    // The same prompt in another session: its whole blocks, but for its last token.
    let mut second = pipeline.new_session();
    assert_eq!(in_session(&pipeline, &mut second, &prompt, 20), said);
    assert!(statistics(&pipeline).shared >= 5);
    // Another one in the first session: what it holds of it already.
    in_session(&pipeline, &mut first, &other, 5);
    assert_eq!(first.tokens()[..other.len()], other);
    // A conversation that another session had, in one that held something else.
    let mut third = pipeline.new_session();
    in_session(&pipeline, &mut third, &words(&pipeline, "The answer"), 3);
    let longer = [&prompt[..], &said, &words(&pipeline, "What then?")].concat();
    let options = endless(&pipeline, 3);
    let mut cached = 0;
    for event in pipeline.generate_in(&mut third, &longer, &options).unwrap() {
        if let Event::Finished { statistics, .. } = event.unwrap() {
            cached = statistics.cached_tokens;
        }
    }
    assert_eq!(cached, held / BLOCK * BLOCK);

    second.reset();
    assert!(second.tokens().is_empty() && second.size_in_bytes() == 0);
    drop((first, second, third));
    let after = statistics(&pipeline);
    assert_eq!((after.used, after.free), (0, after.total));
    // What has ended is still known.
    assert!(after.cached > 5);

    let mut foreign = load(CacheFormat::BF16, 64).new_session();
    let refused = pipeline.generate_in(&mut foreign, &prompt, &options).err();
    let text = refused.expect("an error").to_string();
    assert!(
        text.contains("`session`") && text.contains("another pipeline's"),
        "{text}"
    );
}

#[test]
fn without_a_cache_nothing_is_found_and_nothing_kept() {
    for kind in [CacheKind::Contiguous, CacheFormat::fp4().into()] {
        let pipeline = load(kind, 1024);
        let [prompt, ..] = prompts(&pipeline);
        let options = endless(&pipeline, 6);
        let cached = alone(&pipeline, &prompt, &options);
        let slow = Options {
            use_cache: false,
            ..options
        };
        let slow = alone(&pipeline, &prompt, &slow);
        assert_eq!(slow.tokens, cached.tokens, "{kind}");
        assert_eq!(slow.statistics.cached_tokens, 0);
        assert!(pipeline.cache_statistics().is_none_or(|all| all.used == 0));
    }
}

#[test]
fn out_of_blocks_is_an_error_that_costs_nothing() {
    let pipeline = load(CacheFormat::Fp8, 8 * BLOCK);
    let [prompt, other, _] = prompts(&pipeline);
    let (mut first, mut second) = (pipeline.new_session(), pipeline.new_session());
    let said = in_session(&pipeline, &mut first, &prompt, 10);
    let held = first.tokens().to_vec();
    // Another prompt altogether, too long for what is left.
    let long: Vec<u32> = (100..160).collect();
    let error = pipeline
        .generate_in(&mut second, &long, &endless(&pipeline, 1))
        .unwrap()
        .find_map(Result::err)
        .expect("an error");
    assert!(
        matches!(
            error,
            Error::OutOfBlocks {
                needed: 4,
                free: 2,
                total: 8,
                ..
            }
        ),
        "{error}"
    );
    let text = error.to_string();
    for part in ["--kv-memory", "free a sequence", "4 blocks of 16 tokens"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(first.tokens(), held);
    assert!(second.tokens().is_empty());
    assert_eq!(statistics(&pipeline).used, held.len().div_ceil(BLOCK));
    // In the middle of a text: what was said stays, and what follows it when there is room is what would have followed.
    let mut generation = pipeline
        .generate_in(&mut first, &prompt, &endless(&pipeline, 100))
        .unwrap();
    let mut answer = Vec::new();
    let error = loop {
        match generation.next().expect("no end") {
            Ok(Event::Token { id, .. }) => answer.push(id),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::OutOfBlocks { .. }), "{error}");
    assert!(generation.next().is_none());
    drop(generation);
    assert_eq!(answer[..10], said);
    assert_eq!(first.tokens().len(), 8 * BLOCK);
    // Together they do not fit either; alone each does, once the session has ended.
    drop((first, second));
    let options = endless(&pipeline, 20);
    let batch = pipeline.generate_batch(&[&long, &prompt], &options, |_, _| {});
    assert!(matches!(batch, Err(Error::OutOfBlocks { .. })));
    assert_eq!(statistics(&pipeline).used, 0);
    assert_eq!(alone(&pipeline, &prompt, &options).tokens, answer[..20]);
    assert_eq!(alone(&pipeline, &other, &options).tokens.len(), 20);
}

#[test]
fn what_is_cancelled_or_refused_leaves_its_room() {
    let pipeline = load(CacheFormat::BF16, 512);
    let prompts = prompts(&pipeline);
    let all: Vec<_> = prompts.iter().map(Vec::as_slice).collect();
    let cancel = Cancel::default();
    let options = Options {
        cancel: cancel.clone(),
        ..endless(&pipeline, 100)
    };
    let outputs = pipeline.generate_batch(&all, &options, |_, event| {
        if matches!(event, Event::Token { .. }) {
            cancel.cancel();
        }
    });
    let outputs = outputs.unwrap();
    assert!(
        outputs
            .iter()
            .all(|output| output.reason == FinishReason::Cancelled)
    );
    assert_eq!(statistics(&pipeline).used, 0);
    assert!(pipeline.generate(&[5000], &options).is_err());
    let watched = pipeline.generate(&prompts[0], &endless(&pipeline, 3)).unwrap();
    let mut watched = watched.observe(|_, _, _| Err(Error::EmptyPrompt));
    assert!(matches!(watched.next(), Some(Err(Error::EmptyPrompt))));
    drop(watched);
    assert_eq!(statistics(&pipeline).used, 0);
}

#[test]
fn threads_share_a_pipeline() {
    let pipeline = load(CacheFormat::fp4(), 2048);
    let prompts = prompts(&pipeline);
    let options = endless(&pipeline, 20);
    let expected: Vec<_> = prompts
        .iter()
        .map(|prompt| alone(&load(CacheFormat::fp4(), 512), prompt, &options).tokens)
        .collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            for (prompt, expected) in prompts.iter().zip(&expected) {
                let (pipeline, options) = (&pipeline, &options);
                scope.spawn(move || assert_eq!(&alone(pipeline, prompt, options).tokens, expected));
            }
        }
    });
    assert_eq!(statistics(&pipeline).used, 0);
}

#[test]
fn windows_of_a_text_find_room_in_a_small_cache() {
    let text = "A vector is a contiguous growable array type, written as Vec. ".repeat(12);
    let windows = Windows::disjoint(64);
    let measured = |tokens| load(CacheFormat::BF16, tokens).perplexity(&[text.as_str()], windows, |_, _| {});
    let (small, large) = (measured(64).unwrap(), measured(2048).unwrap());
    assert!(small.windows > 2 && (small.loss - large.loss).abs() < 1e-2 * large.loss);
    assert_eq!((small.tokens, small.windows), (large.tokens, large.windows));
    assert!(matches!(measured(48), Err(Error::OutOfBlocks { .. })));
}
