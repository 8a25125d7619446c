//! The other kernels of a GLM-4.7-Flash layer, in its shape.

use crate::case::{Bound, Case, Contender, Ready, in_turn, regions};
use crate::inputs::{COLD, activations, candle, copies, fp4, noise};
use candle_core::Module;
use candle_core::quantized::GgmlDType;
use candle_mmfp4::cpu::{self, Arithmetic, Attention, Executor, Expert, HeadRows, HeadView};
use candle_mmfp4::fp4::{Bytes, Format};
use std::sync::Arc;

const HIDDEN: usize = 2048;
const HEADS: usize = 20;
const LATENT: usize = 512;
const NOPE: usize = 192;
const ROPE: usize = 64;
const VALUE: usize = 256;
const EXPERTS: usize = 64;
const WIDTH: usize = 1536;
const TOP_K: usize = 4;

/// A token's queries times the keys' half of `kv_b`: the sum over its rows, whose scales run across.
pub fn absorb_query(executor: &Arc<Executor>) -> Case {
    let rows = HeadRows {
        heads: HEADS,
        stride: NOPE + VALUE,
        start: 0,
        len: NOPE,
    };
    let weights = HEADS * NOPE * LATENT;
    // MMFP4: a scale of two bytes for 64 bytes of codes. Q4_0: 18 bytes for 32 weights.
    let (ours, theirs) = (weights / 2 + weights / 128 * 2, weights / 32 * 18);
    let executor = Arc::clone(executor);
    Case {
        name: "kv_b-transposed".into(),
        title: format!("kv_b transposed, {HEADS} heads of [{NOPE} → {LATENT}]"),
        bound: Bound::Bytes,
        peer: Some("Candle Q4_0"),
        contenders: vec![
            Contender::new("MMFP4 (128, F16)", ours, move || {
                let shape = (HEADS * (NOPE + VALUE), LATENT);
                let weights = copies(ours, || fp4(shape, Format::mmfp4()));
                let regions = regions(&weights);
                let mut next = in_turn(weights.len());
                let (x, mut y) = (noise(HEADS * NOPE), vec![0.0; HEADS * LATENT]);
                Ready {
                    call: Box::new(move || {
                        cpu::per_head_transposed(&executor, &weights[next()], rows, &x, &mut y);
                    }),
                    regions,
                }
            }),
            // One product a head, stored transposed; its K, 192, is no multiple of 256.
            Contender::new("Candle Q4_0", theirs, move || {
                let head = || candle((LATENT, NOPE), GgmlDType::Q4_0, 1);
                let weights = copies(theirs, || (0..HEADS).map(|_| head()).collect::<Vec<_>>());
                let (x, mut next) = (activations(1, NOPE), in_turn(weights.len()));
                Ready {
                    call: Box::new(move || {
                        for head in &weights[next()] {
                            drop(head.forward(&x).expect("shapes fit"));
                        }
                    }),
                    regions: Vec::new(),
                }
            }),
        ],
    }
}

/// The mixture of experts, `tokens` at once.
pub fn mixture(executor: &Arc<Executor>, tokens: usize) -> Case {
    let expert = 3 * HIDDEN * WIDTH;
    let (bound, work) = match tokens {
        1 => (Bound::Bytes, (TOP_K + 1) * (expert / 2 + expert / 128 * 2)),
        _ => (Bound::Operations, 2 * tokens * (TOP_K + 1) * expert),
    };
    let contender = |name, arithmetic| {
        let executor = Arc::clone(executor);
        Contender::new(name, work, move || mixture_ready(executor, tokens, arithmetic))
    };
    let mut contenders = vec![contender("MMFP4 (128, F16)", Arithmetic::W4A8)];
    if tokens == 1 {
        contenders.push(contender("MMFP4 exact", Arithmetic::Exact));
    }
    Case {
        name: format!("moe-{tokens}"),
        title: format!("Mixture of {EXPERTS} experts, top {TOP_K} and a shared one, tokens: {tokens}"),
        bound,
        peer: None,
        contenders,
    }
}

fn mixture_ready(executor: Arc<Executor>, tokens: usize, arithmetic: Arithmetic) -> Ready {
    let expert = || Expert {
        gate: fp4((WIDTH, HIDDEN), Format::mmfp4()),
        up: fp4((WIDTH, HIDDEN), Format::mmfp4()),
        down: fp4((HIDDEN, WIDTH), Format::mmfp4()),
    };
    let experts: Vec<_> = (0..EXPERTS).map(|_| expert()).collect();
    // A model's layers have a shared expert each: here too, none is read twice in a row.
    let shared: Vec<_> = (0..EXPERTS / TOP_K).map(|_| expert()).collect();
    let regions = regions(experts.iter().chain(&shared).flat_map(Expert::weights));
    let (x, mut y) = (noise(tokens * HIDDEN), vec![0.0; tokens * HIDDEN]);
    let weights = vec![1.0 / TOP_K as f32; tokens * TOP_K];
    let mut ids = vec![0; tokens * TOP_K];
    let mut next = in_turn(shared.len());
    Ready {
        call: Box::new(move || {
            let turn = next();
            for (slot, id) in ids.iter_mut().enumerate() {
                *id = ((turn * TOP_K + slot) % EXPERTS) as u32;
            }
            cpu::fused_moe(
                &executor,
                &experts,
                &shared[turn..=turn],
                &x,
                &ids,
                &weights,
                TOP_K,
                arithmetic,
                &mut y,
            );
        }),
        regions,
    }
}

/// Attention of a prompt over keys and values expanded for each head.
pub fn prefill(executor: &Arc<Executor>, tokens: usize) -> Case {
    let width = NOPE + VALUE;
    let operations = tokens * (tokens + 1) / 2 * HEADS * 2 * (NOPE + ROPE + VALUE);
    let executor = Arc::clone(executor);
    let build = move || {
        let expanded = noise(tokens * HEADS * width);
        let cached = noise(tokens * (LATENT + ROPE));
        let (nope, rope) = (noise(tokens * HEADS * NOPE), noise(tokens * HEADS * ROPE));
        let mut y = vec![0.0; tokens * HEADS * VALUE];
        Ready {
            call: Box::new(move || {
                let queries = [heads(&nope, NOPE), heads(&rope, ROPE)];
                let keys = HeadView {
                    data: &expanded,
                    row: HEADS * width,
                    head: width,
                    width: NOPE,
                };

                let key_parts = [keys, shared_row(&cached[LATENT..], ROPE)];
                let values = HeadView {
                    data: &expanded[NOPE..],
                    width: VALUE,
                    ..keys
                };
                let attention = attention(&queries, &key_parts, values, 0);
                cpu::attend(&executor, attention, &mut y);
            }),
            regions: Vec::new(),
        }
    };
    Case {
        name: format!("attention-prefill-{tokens}"),
        title: format!("Attention of {tokens} tokens, {HEADS} heads, keys and values expanded"),
        bound: Bound::Operations,
        peer: None,
        contenders: vec![Contender::new("f32", operations, build)],
    }
}

/// Attention of one token over the latents of `depth` tokens, itself included.
pub fn decode(executor: &Arc<Executor>, depth: usize) -> Case {
    let bytes = 4 * depth * (LATENT + ROPE);
    let executor = Arc::clone(executor);
    let build = move || {
        let caches = copies(bytes, || noise(depth * (LATENT + ROPE)));
        let (latent, rope) = (noise(HEADS * LATENT), noise(HEADS * ROPE));
        let (mut y, mut next) = (vec![0.0; HEADS * LATENT], in_turn(caches.len()));
        // Memory to measure, as much and as cold as the caches, which are not bytes.
        let memory = Bytes::build(COLD, |memory| {
            memory.fill(1);
            Ok(())
        });
        Ready {
            call: Box::new(move || {
                let cache = &caches[next()];
                let queries = [heads(&latent, LATENT), heads(&rope, ROPE)];
                let keys = [shared_row(cache, LATENT + ROPE)];
                let attention = attention(&queries, &keys, shared_row(cache, LATENT), depth - 1);
                cpu::attend(&executor, attention, &mut y);
            }),
            regions: vec![memory.expect("memory")],
        }
    };
    Case {
        name: format!("attention-decode-{depth}"),
        title: format!("Attention of one token over {depth} latents, {HEADS} heads"),
        bound: Bound::Bytes,
        peer: None,
        contenders: vec![Contender::new("f32", bytes, build)],
    }
}

/// Rows of all heads, one after the other.
fn heads(data: &[f32], width: usize) -> HeadView<'_> {
    HeadView {
        data,
        row: HEADS * width,
        head: width,
        width,
    }
}

/// Rows of a cache of latents and rotary keys, which all heads share.
fn shared_row(data: &[f32], width: usize) -> HeadView<'_> {
    HeadView {
        data,
        row: LATENT + ROPE,
        head: 0,
        width,
    }
}

fn attention<'a>(
    queries: &'a [HeadView<'a>],
    keys: &'a [HeadView<'a>],
    values: HeadView<'a>,
    position: usize,
) -> Attention<'a> {
    Attention {
        heads: HEADS,
        queries,
        keys,
        values,
        position,
        window: None,
        scale: 1.0 / ((NOPE + ROPE) as f32).sqrt(),
    }
}
