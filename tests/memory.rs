//! Memory stays flat while a model talks, and is counted as it is. A process of its own, with one test, so that nothing
//! else moves it.
//!
//! Needs Linux' count of resident memory; elsewhere it says that it was skipped.

mod common;

use candle_core::Device;
use candle_mmfp4::checkpoint::LoadOptions;
use candle_mmfp4::generation::{Options, Pipeline, Session};
use candle_mmfp4::memory::resident;
use candle_mmfp4::models::glm4_moe_lite::Logits;
use candle_mmfp4::nn::CacheSize;
#[cfg(target_os = "linux")]
use candle_mmfp4::{
    fp4::Bytes,
    memory::{MemoryLog, available, private_resident},
};
use common::mmfp4_demo;

/// What may be gained between two moments: the allocator's play, most of all in the scores
/// of attention, which grow with the context (1.5 MiB were seen). It is a small part of what the smallest leak
/// would take: one hidden vector (256 f32) a layer and token are 12 MiB over 2,000 tokens, one row of logits
/// a token 31 MiB.
const ALLOWANCE: i64 = 4 << 20;

/// Continues `prompt` by exactly `tokens` tokens; end tokens are never chosen.
fn talk(pipeline: &Pipeline, session: &mut Session, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut options = Options {
        max_tokens: Some(tokens),
        prefill_chunk: 64,
        ..Options::default()
    };
    let ends = &pipeline.defaults().eos_token_id;
    options.sampling.logit_bias = ends.iter().map(|id| (*id, -1e4)).collect();
    let mut all = prompt.to_vec();
    for event in pipeline.generate_in(session, prompt, &options).unwrap() {
        if let candle_mmfp4::generation::Event::Token { id, .. } = event.unwrap() {
            all.push(id);
        }
    }
    assert_eq!(all.len(), prompt.len() + tokens);
    all
}

/// Memory that is touched shows, and its peak stays when it has gone.
#[cfg(target_os = "linux")]
fn what_is_touched_shows() {
    const SIZE: u64 = 256 << 20;
    let mut log = MemoryLog::new(&Device::Cpu);
    log.record("before");
    let memory = vec![1u8; SIZE as usize];
    log.record("with 256 MiB");
    drop(std::hint::black_box(memory));
    log.record("after");
    let [before, with, after] = log.entries() else {
        panic!("{} entries", log.entries().len());
    };
    let held = before.resident.unwrap() + SIZE - (1 << 20);
    assert!(with.resident.unwrap() >= held);
    assert!(with.peak.unwrap() >= held && after.peak.unwrap() >= held);
    assert!(after.resident.unwrap() < held);
    assert_eq!(with.device, None);
}

/// A mapped file's pages count as resident, not as the process's own.
#[cfg(target_os = "linux")]
fn a_mapped_file_is_not_private() {
    const SIZE: u64 = 64 << 20;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, vec![1; SIZE as usize]).unwrap();
    let map = Bytes::map_file(&path).unwrap();
    let (resident_before, private_before) = (resident().unwrap(), private_resident().unwrap());
    assert_eq!(map.iter().map(|byte| u64::from(*byte)).sum::<u64>(), SIZE);
    assert!(resident().unwrap() >= resident_before + SIZE - (1 << 20));
    assert!(private_resident().unwrap() <= private_before + (1 << 20));
    assert!(available().unwrap() > 1 << 20);
}

#[test]
fn memory_is_flat_over_2000_tokens_and_50_conversations() {
    let Some(_) = resident() else {
        println!("skipped: this system does not tell how much memory is resident");
        return;
    };
    #[cfg(target_os = "linux")]
    {
        what_is_touched_shows();
        a_mapped_file_is_not_private();
    }
    // Room for what is said here and no more, so that every block of it is written to in the end.
    let options = LoadOptions {
        kv_size: Some(CacheSize::Tokens(2_560)),
        ..LoadOptions::default()
    };
    let (pipeline, _) = Pipeline::from_folder(mmfp4_demo(), &options, &Device::Cpu).unwrap();
    let now = || resident().unwrap() as i64;

    // Every row of the embedding and, with them, every expert: the checkpoint's own pages count once touched.
    let vocab = pipeline.model().config().vocab_size as u32;
    for first in (0..vocab).step_by(64) {
        let tokens: Vec<u32> = (first..first + 64).collect();
        pipeline
            .model()
            .forward(&tokens, 0, &mut pipeline.model().new_cache(), Logits::Last)
            .unwrap();
    }
    let mut session = pipeline.new_session();
    // Whole blocks that nobody asks for again, until all of them have been written to.
    for first in (0..3_072).step_by(512) {
        let tokens: Vec<u32> = (first..first + 480).collect();
        talk(&pipeline, &mut pipeline.new_session(), &tokens, 30);
    }
    assert!(pipeline.cache_statistics().unwrap().evictions > 0);
    let started = talk(&pipeline, &mut session, &[1, 2, 3], 30);

    let before = now();
    let long = talk(&pipeline, &mut session, &started, 2_010);
    let gained = now() - before;
    println!("2,010 tokens: {gained} bytes gained");
    assert!(long.len() > 2_040 && session.tokens().len() > 2_000);
    assert!(gained <= ALLOWANCE, "2,010 tokens: {gained} bytes gained");

    let before = now();
    for conversation in 0..50 {
        session.reset();
        let turn: Vec<u32> = (0..40).map(|i| (conversation * 40 + i) % vocab).collect();
        let mut said = talk(&pipeline, &mut session, &turn, 20);
        said.extend(&turn);
        talk(&pipeline, &mut session, &said, 20);
        // And one whose cache ends with it.
        talk(&pipeline, &mut pipeline.new_session(), &turn, 10);
    }
    let gained = now() - before;
    println!("50 conversations: {gained} bytes gained");
    drop(session);
    assert_eq!(pipeline.cache_statistics().unwrap().used, 0);
    assert!(gained <= ALLOWANCE, "50 conversations: {gained} bytes gained");
}
