//! A forward pass works on this crate's threads alone.
//!
//! Candle's own CPU ops go through rayon, whose threads sleep between ops (waking them costs a decoded token more than
//! many an op takes), or through a pool of Candle's, whose threads spin beside ours.

mod common;

use candle_core::Device;
use candle_mmfp4::kv::{CacheFormat, SequenceId};
use candle_mmfp4::models::glm4_moe_lite::{Logits, Model};
use candle_mmfp4::nn::CacheSize;

#[test]
fn threads_of_candle_and_rayon_have_nothing_to_do_in_a_forward_pass() {
    let (model, _) = Model::from_folder(common::mmfp4_demo(), &Default::default(), &Device::Cpu).unwrap();
    let mut cache = model.new_cache();
    let prompt: Vec<u32> = (1..400).collect();
    model.forward(&prompt, 0, &mut cache, Logits::All).unwrap();
    model
        .forward(&[1], prompt.len(), &mut cache, Logits::Last)
        .unwrap();
    let mut paged = model
        .new_paged_cache(CacheFormat::fp4(), CacheSize::Tokens(1024))
        .unwrap();
    let (long, short) = (paged.start(&[]).0, paged.start(&[]).0);
    let mut forward = |pass: &[(SequenceId, &[u32])]| {
        model.forward_paged(&mut paged, pass, Logits::All, None).unwrap();
    };
    forward(&[(long, &prompt)]);
    // One sequence by each form of attention.
    forward(&[(long, &[1]), (short, &prompt[..200])]);
    #[cfg(target_os = "linux")]
    for thread in std::fs::read_dir("/proc/self/task").unwrap() {
        let name = std::fs::read_to_string(thread.unwrap().path().join("comm")).unwrap();
        // The threads of Candle's quantised and of its long elementwise ops.
        assert!(!name.starts_with("candle"), "the forward pass has started {name}");
    }
    // Rayon makes its threads at the first use, and refuses to be configured after it.
    let unused = rayon::ThreadPoolBuilder::new().num_threads(1).build_global();
    assert!(unused.is_ok(), "the forward pass has used rayon");
}
