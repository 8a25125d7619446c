//! Conversations on the trained model: positions, turns, sessions, batches, ends of all kinds.

mod common;

use candle_core::{Device, Tensor};
use candle_mmfp4::checkpoint::LoadOptions;
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::generation::{
    Cancel, ChatTemplate, Event, FinishReason, Generation, GenerationConfig, Message, Options, Output,
    OutputEvent, OutputParser, Pipeline, RenderOptions, Sampling, Statistics, Tokenizer,
};
use candle_mmfp4::kv::{CacheFormat, CacheKind};
use candle_mmfp4::models::glm4_moe_lite::{Logits, Model, Sequence};
use candle_mmfp4::{Error, nn::TokenCache};
use common::{largest_difference, mmfp4_demo};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

const QUESTION: &str = "What does `Option::insert` do?";
const OTHER_QUESTION: &str = "What does `Ordering::is_eq` do?";
const OTHER_ANSWER: &str = "Returns true if the ordering is the Equal variant.";
/// What rounding may change where the same is computed in another order.
const ROUNDING: f32 = 1e-4;

static PIPELINE: LazyLock<Pipeline> = LazyLock::new(|| load(CacheKind::default()));
/// Whose sequences share nothing: what one of them finds in the cache is its own.
static CONTIGUOUS: LazyLock<Pipeline> = LazyLock::new(|| load(CacheKind::Contiguous));

/// In exact arithmetic: with rounded activations the last bit, which the order of sums decides, can choose between two
/// steps.
fn load(kv_cache: CacheKind) -> Pipeline {
    let options = LoadOptions {
        kv_cache,
        arithmetic: Arithmetic::Exact,
        ..LoadOptions::default()
    };
    Pipeline::from_folder(mmfp4_demo(), &options, &Device::Cpu)
        .unwrap()
        .0
}

fn chat(messages: &[(&str, &str)]) -> Vec<u32> {
    let messages: Vec<_> = messages
        .iter()
        .map(|(role, text)| Message::new(*role, *text))
        .collect();
    let no_thinking = RenderOptions {
        enable_thinking: Some(false),
        ..RenderOptions::default()
    };
    PIPELINE.chat_prompt(&messages, &no_thinking).unwrap()
}

fn raw(text: &str) -> Vec<u32> {
    PIPELINE.tokenizer().encode(text).unwrap()
}

fn at_most(tokens: usize) -> Options {
    Options {
        max_tokens: Some(tokens),
        ..Options::default()
    }
}

/// No token ends the text: what is tested needs one of a certain length.
fn endless(tokens: usize) -> Options {
    let mut options = at_most(tokens);
    let ends = &PIPELINE.defaults().eos_token_id;
    options.sampling.logit_bias = ends.iter().map(|id| (*id, -1e4)).collect();
    options
}

fn collect(generation: Generation<'_>) -> Output {
    let (mut tokens, mut so_far) = (Vec::new(), String::new());
    let mut end = None;
    for event in generation {
        assert!(end.is_none(), "an event after the end");
        match event.unwrap() {
            Event::Prefill { done, total } => assert!(done <= total && tokens.is_empty()),
            Event::Token { id, text, .. } => {
                tokens.push(id);
                so_far += &text;
            }
            Event::Finished {
                reason,
                text,
                statistics,
            } => {
                so_far += &text;
                end = Some((reason, statistics));
            }
        }
    }
    let (reason, statistics) = end.expect("an end");
    Output {
        tokens,
        text: so_far,
        reason,
        statistics,
    }
}

fn generate(prompt: &[u32], options: &Options) -> Output {
    collect(PIPELINE.generate(prompt, options).unwrap())
}

fn refused(prompt: &[u32], options: &Options) -> Error {
    PIPELINE.generate(prompt, options).err().expect("an error")
}

fn forward(cache: &mut TokenCache, tokens: &[u32], position: usize) -> Tensor {
    PIPELINE
        .model()
        .forward(tokens, position, cache, Logits::All)
        .unwrap()
}

#[test]
fn five_tokens_at_position_0_after_a_warm_up_of_two() {
    let tokens = &raw("The quick brown fox jumps over it")[..5];
    let mut cache = PIPELINE.model().new_cache();
    forward(&mut cache, &tokens[3..], 0);
    assert_eq!(cache.len(), 2);
    let after = forward(&mut cache, tokens, 0);
    let fresh = forward(&mut PIPELINE.model().new_cache(), tokens, 0);
    assert_eq!(cache.len(), 5);
    assert_eq!(largest_difference(&after, &fresh), 0.0);
}

#[test]
fn a_position_that_does_not_continue_names_both_numbers() {
    let tokens = &raw("The quick brown fox jumps over it")[..7];
    let model = PIPELINE.model();
    let mut cache = model.new_cache();
    forward(&mut cache, &tokens[..2], 0);
    for position in [1, 3, usize::MAX] {
        let error = model
            .forward(&tokens[2..4], position, &mut cache, Logits::Last)
            .unwrap_err();
        let text = error.to_string();
        if position == usize::MAX {
            assert!(matches!(error, Error::ContextLength { .. }), "{text}");
        } else {
            assert!(
                text.contains(&format!("position {position}")) && text.contains("holds 2 tokens"),
                "{text}"
            );
        }
    }
    // Refused passes leave what was cached: going on gives the whole's numbers.
    let went_on = forward(&mut cache, &tokens[2..], 2);
    let whole = forward(&mut model.new_cache(), tokens, 0)
        .narrow(0, 2, 5)
        .unwrap();
    assert!(largest_difference(&went_on, &whole) <= ROUNDING);

    let error = model
        .forward(&tokens[..1], usize::MAX, &mut model.new_cache(), Logits::Last)
        .unwrap_err();
    assert!(matches!(error, Error::ContextLength { .. }), "{error}");
}

#[test]
fn bad_tokens_are_refused_and_leave_the_cache() {
    let model = PIPELINE.model();
    let tokens = &raw("The quick brown fox jumps over it")[..6];
    let mut cache = model.new_cache();
    forward(&mut cache, &tokens[..3], 0);
    let vocab = model.config().vocab_size as u32;
    for (bad, position) in [(&[][..], 3), (&[1, vocab][..], 3), (&[u32::MAX][..], 0)] {
        assert!(model.forward(bad, position, &mut cache, Logits::Last).is_err());
        assert_eq!(cache.len(), 3);
    }
    let whole = forward(&mut model.new_cache(), tokens, 0)
        .narrow(0, 3, 3)
        .unwrap();
    assert!(largest_difference(&forward(&mut cache, &tokens[3..], 3), &whole) <= ROUNDING);
}

#[test]
fn a_batch_with_one_bad_sequence_leaves_all_caches() {
    let model = PIPELINE.model();
    let tokens = raw("The quick brown fox jumps over it");
    let mut caches = [model.new_cache(), model.new_cache()];
    for cache in &mut caches {
        forward(cache, &tokens[..3], 0);
    }
    for (bad, position) in [(&tokens[..2], 5), (&[u32::MAX][..], 3), (&[][..], 3)] {
        let [first, second] = &mut caches;
        let mut sequences =
            [(first, &tokens[..2], 0), (second, bad, position)].map(|(cache, tokens, position)| Sequence {
                tokens,
                position,
                cache: Some(cache),
            });
        assert!(model.forward_batch(&mut sequences, Logits::Last, None).is_err());
        assert_eq!(caches.each_ref().map(TokenCache::len), [3, 3]);
    }
    let whole = forward(&mut model.new_cache(), &tokens, 0)
        .narrow(0, 3, tokens.len() - 3)
        .unwrap();
    assert!(largest_difference(&forward(&mut caches[0], &tokens[3..], 3), &whole) <= ROUNDING);
}

#[test]
fn truncate_and_reset_forget_exactly_that() {
    let tokens = raw("The quick brown fox jumps over it and");
    let model = PIPELINE.model();
    let mut cache = model.new_cache();
    let whole = forward(&mut cache, &tokens, 0);
    let n = tokens.len();
    for keep in [n - 1, n / 2, 1] {
        cache.truncate(keep).unwrap();
        assert_eq!(cache.len(), keep);
        let again = forward(&mut cache, &tokens[keep..], keep);
        let expected = whole.narrow(0, keep, n - keep).unwrap();
        assert!(largest_difference(&again, &expected) <= ROUNDING, "kept {keep}");
    }
    let error = cache.truncate(n + 1).unwrap_err().to_string();
    assert!(
        error.contains(&format!("at most {n}")) && error.contains(&format!("{}", n + 1)),
        "{error}"
    );
    cache.reset();
    assert!(cache.is_empty());
    assert!(model.forward(&tokens[..1], n, &mut cache, Logits::Last).is_err());
    assert_eq!(largest_difference(&forward(&mut cache, &tokens, 0), &whole), 0.0);
}

#[test]
fn the_cache_holds_one_latent_a_token() {
    let config = PIPELINE.model().config();
    let mut cache = PIPELINE.model().new_cache();
    forward(&mut cache, &[1; 300], 0);
    let row = (config.kv_lora_rank + config.qk_rope_head_dim) * size_of::<f32>();
    let blocks = 300usize.next_multiple_of(256);
    // Neither keys and values of all heads nor values beside the latent: that would be twice as much or more.
    assert_eq!(cache.size_in_bytes(), config.layers.len() * blocks * row);
}

#[test]
fn a_second_turn_continues_the_first() {
    let first = [("user", OTHER_QUESTION)];
    let prompt = chat(&first);
    let mut session = CONTIGUOUS.new_session();
    let answer = collect(
        CONTIGUOUS
            .generate_in(&mut session, &prompt, &at_most(60))
            .unwrap(),
    );
    assert_eq!(
        (answer.text.trim(), answer.reason),
        (OTHER_ANSWER, FinishReason::Stop)
    );
    assert_eq!(answer.statistics.cached_tokens, 0);
    assert_eq!(session.tokens(), [&prompt[..], &answer.tokens].concat());

    let second = chat(&[first[0], ("assistant", &answer.text), ("user", QUESTION)]);
    let held = session.tokens().len();
    assert_eq!(
        second[..held],
        *session.tokens(),
        "the template repeats the history"
    );
    let reused = collect(
        CONTIGUOUS
            .generate_in(&mut session, &second, &at_most(60))
            .unwrap(),
    );
    let fresh = collect(CONTIGUOUS.generate(&second, &at_most(60)).unwrap());
    assert_eq!(
        (&reused.tokens, &reused.text, reused.reason),
        (&fresh.tokens, &fresh.text, fresh.reason)
    );
    assert_eq!(reused.statistics.cached_tokens, held);
    assert_eq!(reused.statistics.prompt_tokens, second.len());
    assert_eq!(fresh.statistics.cached_tokens, 0);
}

#[test]
fn edited_history_is_computed_from_the_first_difference_on() {
    let mut session = CONTIGUOUS.new_session();
    let prompt = chat(&[("user", QUESTION)]);
    collect(
        CONTIGUOUS
            .generate_in(&mut session, &prompt, &at_most(60))
            .unwrap(),
    );

    let edited = chat(&[("user", "What does `Option::take` do?")]);
    let common = prompt.iter().zip(&edited).take_while(|(a, b)| a == b).count();
    assert!(common > 2 && common < edited.len());
    let output = collect(
        CONTIGUOUS
            .generate_in(&mut session, &edited, &at_most(60))
            .unwrap(),
    );
    assert_eq!(output.statistics.cached_tokens, common);
    let fresh = collect(CONTIGUOUS.generate(&edited, &at_most(60)).unwrap());
    assert_eq!((&output.tokens, &output.text), (&fresh.tokens, &fresh.text));

    // The same prompt again: all but its last token, whose logits are needed.
    let again = collect(
        CONTIGUOUS
            .generate_in(&mut session, &edited, &at_most(60))
            .unwrap(),
    );
    assert_eq!(again.statistics.cached_tokens, edited.len() - 1);
    assert_eq!(again.tokens, fresh.tokens);
    // A prefix of what is held.
    let shorter = &edited[..edited.len() - 2];
    let output = collect(
        CONTIGUOUS
            .generate_in(&mut session, shorter, &at_most(5))
            .unwrap(),
    );
    assert_eq!(output.statistics.cached_tokens, shorter.len() - 1);
    assert_eq!(
        output.tokens,
        collect(CONTIGUOUS.generate(shorter, &at_most(5)).unwrap()).tokens
    );

    session.reset();
    assert!(session.tokens().is_empty());
    let output = collect(
        CONTIGUOUS
            .generate_in(&mut session, &edited, &at_most(60))
            .unwrap(),
    );
    assert_eq!(
        (output.statistics.cached_tokens, output.tokens),
        (0, fresh.tokens)
    );
}

#[test]
fn a_session_survives_an_abandoned_generation() {
    let mut session = PIPELINE.new_session();
    let prompt = chat(&[("user", OTHER_QUESTION)]);
    let options = Options {
        prefill_chunk: 3,
        ..at_most(60)
    };
    // Dropped within the prompt, and within the answer.
    for events in [2, prompt.len().div_ceil(3) + 4] {
        let mut generation = PIPELINE.generate_in(&mut session, &prompt, &options).unwrap();
        for _ in 0..events {
            generation.next().unwrap().unwrap();
        }
        drop(generation);
        assert!(!session.tokens().is_empty());
    }
    let output = collect(PIPELINE.generate_in(&mut session, &prompt, &options).unwrap());
    assert_eq!(output.text.trim(), OTHER_ANSWER);
    assert_eq!(output.statistics.cached_tokens, prompt.len() - 1);
}

#[test]
fn without_a_cache_the_tokens_are_the_same() {
    let prompt = chat(&[("user", QUESTION)]);
    let cached = generate(&prompt, &at_most(40));
    let slow = generate(
        &prompt,
        &Options {
            use_cache: false,
            ..at_most(40)
        },
    );
    assert_eq!(
        (&slow.tokens, &slow.text, slow.reason),
        (&cached.tokens, &cached.text, cached.reason)
    );
    assert!(slow.tokens.len() > 5);

    // A lent session is left alone.
    let mut session = PIPELINE.new_session();
    collect(PIPELINE.generate_in(&mut session, &prompt, &at_most(3)).unwrap());
    let held = session.tokens().to_vec();
    let options = Options {
        use_cache: false,
        ..at_most(3)
    };
    let output = collect(PIPELINE.generate_in(&mut session, &prompt, &options).unwrap());
    assert_eq!(
        (output.statistics.cached_tokens, session.tokens()),
        (0, &held[..])
    );
}

#[test]
fn every_end_token_ends() {
    let ends = &PIPELINE.defaults().eos_token_id;
    assert_eq!(ends.len(), 3);
    let prompt = chat(&[("user", QUESTION)]);
    for end in ends {
        let mut options = at_most(50);
        options.sampling.logit_bias = [(*end, 1e4)].into();
        let output = generate(&prompt, &options);
        assert_eq!(
            (output.reason, output.tokens.len()),
            (FinishReason::Stop, 0),
            "token {end}"
        );
        assert_eq!(
            (output.text.as_str(), output.statistics.generated_tokens),
            ("", 0)
        );
    }
}

#[test]
fn without_a_generation_config_the_models_end_tokens_count() {
    let folder = mmfp4_demo();
    let (model, _) = Model::from_folder(&folder, &Default::default(), &Device::Cpu).unwrap();
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let cache = model.new_kv_cache(CacheKind::default(), None).unwrap();
    let pipeline = Pipeline::new(model, cache, tokenizer, None, GenerationConfig::default());
    assert_eq!(pipeline.defaults().eos_token_id, PIPELINE.defaults().eos_token_id);
    let error = pipeline
        .chat_prompt(&[Message::new("user", "hello")], &Default::default())
        .unwrap_err();
    assert!(matches!(error, Error::Template(_)), "{error}");
    assert!(ChatTemplate::from_dir(&folder).is_ok());
}

#[test]
fn stop_texts_end_and_are_not_shown() {
    let prompt = chat(&[("user", OTHER_QUESTION)]);
    // Within one token, over several, and none that comes.
    for stop in ["ordering", "the ordering is", "g is the Eq", "."] {
        let options = Options {
            stop: vec!["never".into(), stop.into()],
            ..at_most(60)
        };
        let output = generate(&prompt, &options);
        let whole = generate(&prompt, &at_most(60)).text;
        let before = &whole[..whole.find(stop).unwrap()];
        assert_eq!(
            (output.text.as_str(), output.reason),
            (before, FinishReason::Stop),
            "{stop:?}"
        );
    }
    let options = Options {
        stop: vec!["never".into(), "variant.!".into()],
        ..at_most(60)
    };
    assert_eq!(generate(&prompt, &options).text.trim(), OTHER_ANSWER);
    let empty = Options {
        stop: vec![String::new()],
        ..at_most(60)
    };
    assert!(refused(&prompt, &empty).to_string().contains("stop"));
}

#[test]
fn max_tokens_of_none_one_and_few() {
    let prompt = chat(&[("user", QUESTION)]);
    let whole = generate(&prompt, &at_most(60));
    let none = generate(&prompt, &at_most(0));
    assert_eq!(
        (none.tokens.len(), none.text.as_str(), none.reason),
        (0, "", FinishReason::Length)
    );
    for n in [1, 2, 5] {
        let output = generate(&prompt, &at_most(n));
        assert_eq!(
            (&output.tokens[..], output.reason),
            (&whole.tokens[..n], FinishReason::Length)
        );
        assert_eq!(output.statistics.generated_tokens, n);
    }
}

#[test]
fn a_full_context_ends_the_text() {
    let limit = PIPELINE.model().config().max_position_embeddings;
    let prompt = vec![17; limit - 3];
    let options = Options {
        max_tokens: None,
        ..endless(0)
    };
    let output = generate(&prompt, &options);
    // The last token needs no place: nothing is computed from it.
    assert_eq!((output.tokens.len(), output.reason), (4, FinishReason::Length));
    let output = generate(&vec![17; limit], &options);
    assert_eq!((output.tokens.len(), output.reason), (1, FinishReason::Length));

    let error = refused(&vec![17; limit + 1], &options).to_string();
    assert!(error.contains("2049") && error.contains("2048"), "{error}");
}

#[test]
fn bad_prompts_and_options_are_refused() {
    let options = at_most(3);
    assert!(matches!(refused(&[], &options), Error::EmptyPrompt));
    let error = refused(&[1, 2, 4096, 5000], &options);
    assert!(
        matches!(
            error,
            Error::TokenId {
                id: 4096,
                index: 2,
                vocab_size: 4096
            }
        ),
        "{error}"
    );
    let error = refused(
        &[1],
        &Options {
            prefill_chunk: 0,
            ..at_most(3)
        },
    )
    .to_string();
    assert!(error.contains("prefill_chunk"), "{error}");
    let mut cold = at_most(3);
    cold.sampling.temperature = -1.0;
    assert!(refused(&[1], &cold).to_string().contains("temperature"));
    let batch = PIPELINE.generate_batch(&[&[1, 2], &[]], &options, |_, _| {});
    assert!(matches!(batch, Err(Error::EmptyPrompt)));
    assert_eq!(PIPELINE.generate_batch(&[], &options, |_, _| {}).unwrap(), []);
}

#[test]
fn a_refused_prompt_leaves_the_session() {
    let mut session = PIPELINE.new_session();
    let prompt = chat(&[("user", QUESTION)]);
    collect(PIPELINE.generate_in(&mut session, &prompt, &at_most(3)).unwrap());
    let held = session.tokens().to_vec();
    for bad in [&[][..], &[5, 1 << 20][..], &vec![1; 4000][..]] {
        assert!(PIPELINE.generate_in(&mut session, bad, &at_most(3)).is_err());
        assert_eq!(session.tokens(), held);
    }
    let hot = Options {
        sampling: Sampling {
            top_p: 2.0,
            ..Sampling::default()
        },
        ..at_most(3)
    };
    assert!(PIPELINE.generate_in(&mut session, &[9, 9], &hot).is_err());
    assert_eq!(session.tokens(), held);
}

#[test]
fn cancelling_ends_within_a_step() {
    let prompt = chat(&[("user", QUESTION)]);
    let options = endless(100_000);
    let mut tokens = 0;
    let mut end = None;
    for event in PIPELINE.generate(&prompt, &options).unwrap() {
        match event.unwrap() {
            Event::Prefill { .. } => {}
            Event::Token { .. } => {
                tokens += 1;
                if tokens == 4 {
                    options.cancel.cancel();
                }
            }
            Event::Finished {
                reason, statistics, ..
            } => end = Some((reason, statistics.generated_tokens)),
        }
    }
    assert_eq!((tokens, end), (4, Some((FinishReason::Cancelled, 4))));

    // A handle that is used up ends everything at once, within a batch too.
    let output = generate(&prompt, &options);
    assert_eq!((output.tokens.len(), output.reason), (0, FinishReason::Cancelled));
    let outputs = PIPELINE
        .generate_batch(&[&prompt, &prompt], &options, |_, _| {})
        .unwrap();
    assert!(
        outputs
            .iter()
            .all(|o| o.reason == FinishReason::Cancelled && o.tokens.is_empty())
    );
}

#[test]
fn cancelling_from_another_thread() {
    let prompt = chat(&[("user", QUESTION)]);
    let cancel = Cancel::default();
    let options = Options {
        cancel: cancel.clone(),
        max_tokens: None,
        ..endless(0)
    };
    let started = Instant::now();
    let canceller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        cancel.cancel();
    });
    // Over and over, so that no speed of the machine lets it end before.
    loop {
        let output = generate(&prompt, &options);
        if output.reason == FinishReason::Cancelled {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(120), "never cancelled");
    }
    canceller.join().unwrap();
}

#[test]
fn a_batch_gives_what_each_gives_alone() {
    let prompts = [
        chat(&[("user", QUESTION)]),
        raw("The"),
        chat(&[
            ("system", "Answer."),
            ("user", OTHER_QUESTION),
            ("assistant", OTHER_ANSWER),
            ("user", QUESTION),
        ]),
        chat(&[("user", OTHER_QUESTION)]),
        chat(&[("user", OTHER_QUESTION)]),
    ];
    let alone: Vec<_> = prompts
        .iter()
        .map(|prompt| generate(prompt, &at_most(40)))
        .collect();
    let slices: Vec<_> = prompts.iter().map(Vec::as_slice).collect();
    for (chunk, use_cache) in [(1, true), (2, true), (7, true), (512, true), (512, false)] {
        let options = Options {
            prefill_chunk: chunk,
            use_cache,
            ..at_most(40)
        };
        let mut streamed = vec![String::new(); prompts.len()];
        let outputs = PIPELINE
            .generate_batch(&slices, &options, |index, event| match event {
                Event::Token { text, .. } | Event::Finished { text, .. } => streamed[index] += text,
                Event::Prefill { done, total } => assert!(done <= total && *total == slices[index].len()),
            })
            .unwrap();
        for (index, (output, alone)) in outputs.iter().zip(&alone).enumerate() {
            let what = format!("prompt {index}, chunks of {chunk}, cache: {use_cache}");
            assert_eq!(
                (&output.tokens, &output.text),
                (&alone.tokens, &alone.text),
                "{what}"
            );
            assert_eq!(output.reason, alone.reason, "{what}");
            assert_eq!(output.text, streamed[index], "{what}");
            assert_eq!(output.statistics.generated_tokens, alone.tokens.len(), "{what}");
        }
    }
}

#[test]
fn a_tiny_chunk_changes_nothing_and_tells_of_every_part() {
    let prompt = chat(&[("user", OTHER_QUESTION)]);
    let options = Options {
        prefill_chunk: 2,
        ..at_most(60)
    };
    let parts: Vec<_> = PIPELINE
        .generate(&prompt, &options)
        .unwrap()
        .filter_map(|event| match event.unwrap() {
            Event::Prefill { done, total } => Some((done, total)),
            _ => None,
        })
        .collect();
    let n = prompt.len();
    let expected: Vec<_> = (1..=n.div_ceil(2)).map(|part| ((2 * part).min(n), n)).collect();
    assert_eq!(parts, expected);
    assert_eq!(generate(&prompt, &options).text.trim(), OTHER_ANSWER);
}

/// With activations in eight bits, where the smallest difference can choose between two steps.
#[test]
fn chunks_of_any_size_give_the_same_bits() {
    for format in [CacheFormat::BF16, CacheFormat::fp4()] {
        let options = LoadOptions {
            kv_cache: format.into(),
            ..LoadOptions::default()
        };
        let prompts = [chat(&[("user", QUESTION)]), chat(&[("user", OTHER_QUESTION)])];
        let run = |prefill_chunk| {
            // Another one each time: what one has computed, the next would find in its cache.
            let (pipeline, _) = Pipeline::from_folder(mmfp4_demo(), &options, &Device::Cpu).unwrap();
            let options = Options {
                prefill_chunk,
                ..at_most(30)
            };
            prompts.each_ref().map(|prompt| {
                let events = pipeline.generate(prompt, &options).unwrap();
                let tokens = events.filter_map(|event| match event.unwrap() {
                    Event::Token { id, logprob, .. } => Some((id, logprob.to_bits())),
                    _ => None,
                });
                tokens.collect::<Vec<_>>()
            })
        };
        let whole = run(512);
        assert!(whole.iter().all(|said| said.len() > 3), "{whole:?}");
        for chunk in [1, 7, 64] {
            assert_eq!(run(chunk), whole, "{format}, chunks of {chunk}");
        }
    }
}

#[test]
fn a_seed_repeats_and_another_differs() {
    let with_seed = |seed| {
        let mut options = endless(30);
        options.sampling.temperature = 1.5;
        options.sampling.top_p = 0.95;
        options.sampling.seed = Some(seed);
        options
    };
    let prompt = raw("The");
    let first = generate(&prompt, &with_seed(7));
    assert_eq!(first.tokens, generate(&prompt, &with_seed(7)).tokens);
    assert_ne!(first.tokens, generate(&prompt, &with_seed(8)).tokens);
    // Each sequence of a batch has the seed to itself.
    let others = raw("A function");
    let batch = PIPELINE
        .generate_batch(&[&others, &prompt], &with_seed(7), |_, _| {})
        .unwrap();
    assert_eq!(batch[1].tokens, first.tokens);
}

#[test]
fn streamed_text_is_the_text_of_all_tokens() {
    let tokenizer = PIPELINE.tokenizer();
    for seed in 0..4 {
        // Far from what the model would say: characters of several tokens, and halves of them.
        let mut options = endless(120);
        options.sampling.temperature = 20.0;
        options.sampling.seed = Some(seed);
        for skip_special in [false, true] {
            let options = Options {
                skip_special,
                ..options.clone()
            };
            let output = generate(&raw("The"), &options);
            assert_eq!(output.tokens.len(), 120);
            assert_eq!(
                output.text,
                tokenizer.decode(&output.tokens, skip_special).unwrap()
            );
        }
    }
}

#[test]
fn log_probabilities_come_with_each_token() {
    let mut options = at_most(5);
    options.sampling.top_logprobs = 3;
    for event in PIPELINE.generate(&chat(&[("user", QUESTION)]), &options).unwrap() {
        if let Event::Token { id, logprob, top, .. } = event.unwrap() {
            assert_eq!((top.len(), top[0]), (3, (id, logprob)));
            assert!(logprob <= 0.0 && top[0].1 >= top[1].1 && top[1].1 >= top[2].1);
        }
    }
}

#[test]
fn statistics_count_and_time() {
    let started = Instant::now();
    let output = generate(&chat(&[("user", QUESTION)]), &endless(20));
    let Statistics {
        generated_tokens,
        prefill,
        decode,
        ..
    } = output.statistics;
    assert_eq!(generated_tokens, 20);
    assert!(!prefill.is_zero() && !decode.is_zero() && prefill + decode <= started.elapsed());
    assert!(output.statistics.prefill_rate() > 0.0 && output.statistics.decode_rate() > 0.0);
    assert_eq!(Statistics::default().decode_rate(), 0.0);
}

#[test]
fn thinking_and_answer_are_told_apart() {
    let question = [Message::new("user", OTHER_QUESTION)];
    let prompt = |thinking| {
        let options = RenderOptions {
            enable_thinking: Some(thinking),
            ..RenderOptions::default()
        };
        let prompt = PIPELINE.chat_prompt(&question, &options).unwrap();
        (PIPELINE.tokenizer().decode(&prompt, false).unwrap(), prompt)
    };
    let (text, off) = prompt(false);
    assert!(text.ends_with("<|assistant|></think>"), "{text}");
    let parse = |thinking, prompt: &[u32], options: &Options| {
        let mut parser = OutputParser::new(thinking, None);
        let (mut reasoning, mut content) = (String::new(), String::new());
        let mut events = Vec::new();
        for event in PIPELINE.generate(prompt, options).unwrap() {
            match event.unwrap() {
                Event::Token { text, .. } | Event::Finished { text, .. } => events.extend(parser.push(text)),
                Event::Prefill { .. } => {}
            }
        }
        events.extend(parser.finish());
        for event in events {
            match event {
                OutputEvent::Reasoning(text) => reasoning += &text,
                OutputEvent::Content(text) => content += &text,
                OutputEvent::ToolCall { .. } => panic!("no tools were given"),
            }
        }
        (reasoning, content)
    };
    let answer = parse(false, &off, &at_most(60));
    assert_eq!(answer, (String::new(), OTHER_ANSWER.to_string()));

    // With thinking on the model, which never learned to think, is made to end its thoughts at once.
    let (text, on) = prompt(true);
    assert!(text.ends_with("<|assistant|><think>"), "{text}");
    let end = PIPELINE.tokenizer().token_id("</think>").unwrap();
    let thoughts = raw("Easy.");
    let mut forced = on.clone();
    forced.extend(&thoughts);
    forced.push(end);
    let said = generate(&forced, &at_most(60)).text;
    let mut parser = OutputParser::new(true, None);
    let mut events = parser.push(PIPELINE.tokenizer().decode(&forced[on.len()..], false).unwrap());
    events.extend(parser.push(&said));
    events.extend(parser.finish());
    assert_eq!(events[0], OutputEvent::Reasoning("Easy.".into()));
    let content: String = events[1..]
        .iter()
        .map(|event| match event {
            OutputEvent::Content(text) => text.as_str(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(content, said.trim_start());
    assert!(!content.is_empty());
}

#[test]
fn broken_tags_of_a_template_are_errors_or_text() {
    for source in [
        "{%}",
        "{%}%}",
        "a{%",
        "{%%}",
        "{%-}",
        "{% generation",
        "{%}{% generation %}",
    ] {
        if let Err(error) = ChatTemplate::new(source) {
            assert!(matches!(error, Error::Template(_)), "{source}: {error}");
        }
    }
}

#[test]
fn a_base_model_with_a_tokenizer_config_needs_no_template() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(mmfp4_demo()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        if name != "chat_template.jinja" {
            std::fs::copy(&path, folder.path().join(name)).unwrap();
        }
    }
    std::fs::write(
        folder.path().join("tokenizer_config.json"),
        "{\"bos_token\": null}",
    )
    .unwrap();
    let load = || Pipeline::from_folder(folder.path(), &Default::default(), &Device::Cpu);
    let (pipeline, _) = load().unwrap();
    let error = pipeline
        .chat_prompt(&[Message::new("user", "Hello")], &RenderOptions::default())
        .unwrap_err();
    assert!(matches!(error, Error::Template(_)), "{error}");
    // What is malformed is still told.
    std::fs::write(
        folder.path().join("tokenizer_config.json"),
        "{\"chat_template\": 7}",
    )
    .unwrap();
    assert!(matches!(load().unwrap_err(), Error::File { .. }));
}
