//! candle-transformers' masks and caches, model by model: whole prefill, chunked prefill, token by token, a
//! second sequence on a used cache, and a position that does not continue it, in F32, BF16 and F16.
//!
//! On the released crate every known fault is asserted, so that a release that mends one is noticed and the
//! patch dropped. With `MMFP4_CANDLE_PATCHED=1` and the crate that `tools/apply-patches.sh` makes, their
//! absence is. `tools/test-candle-patches.sh` does both.
//!
//! What is right comes from one of three references, each free of the mask at fault:
//! - [`Reference::Plain`]: a decoder of our own in `f64`, without masks and caches (reference.rs). For the
//!   family of llama, mistral, qwen and gemma, with and without a sliding window, and for deepseek2.
//! - [`Reference::OneByOne`]: the model itself in F32, one token at a time on a fresh cache. A single query
//!   may see every key there is, so no mask takes part, and the released crate is right here. For models of
//!   other shapes, none with a window. Their token-by-token run in F32 is then the reference itself.
//! - [`Reference::LastTokens`]: as before, but only the tokens within the window, from position 0. In a
//!   single layer with rotary (relative) positions this is what a window means, again without a mask.

#[path = "candle_masks/models.rs"]
mod models;
#[path = "candle_masks/reference.rs"]
mod reference;
#[path = "candle_masks/weights.rs"]
mod weights;

use candle_core::{DType, Device, Result, Tensor};

use Schedule::{Chunked, Gap, Single, Stale, Whole};
use models::Build;
#[allow(unused_imports)] // nothing is lacking in the patched crate
use models::Lacking as _;
use reference::{Mla, Mlp, Norm, PLAIN, Plain};

const SEQUENCE: [u32; 7] = [11, 3, 27, 8, 35, 19, 2];
const EARLIER: [u32; 2] = [30, 14];

/// Where the right logits come from; see above.
enum Reference {
    Plain(Box<Plain>),
    OneByOne,
    LastTokens(usize),
}

/// What is run.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Schedule {
    Whole,
    Chunked,
    Single,
    /// After another sequence, from position 0 on the same cache.
    Stale,
    /// Chunked, with each later chunk first offered one position too far: to be refused, without harm.
    Gap,
}

/// What comes of it.
enum Outcome {
    Right(f64),
    Wrong(f64),
    Error(String),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Right(error) => write!(f, "right, to {error:.1e}"),
            Self::Wrong(error) => write!(f, "wrong, by {error:.1e}"),
            Self::Error(error) => write!(f, "error: {error}"),
        }
    }
}

/// What is to come of it.
#[derive(Clone, Copy, Debug)]
enum Expected {
    Right,
    Wrong,
    Error(&'static str),
}

struct Case {
    name: &'static str,
    build: Build,
    reference: Reference,
    dtypes: &'static [DType],
    schedules: &'static [Schedule],
    /// What the released crate does.
    released: fn(Schedule, DType) -> Expected,
}

fn half(dtype: DType) -> bool {
    dtype != DType::F32
}

/// The faults of the released crate, by kind.
mod released {
    use super::*;
    use Expected::{Error, Right, Wrong};

    pub fn cache_and_u8_mask(schedule: Schedule, _: DType) -> Expected {
        match schedule {
            Stale | Gap => Error("cannot broadcast [5, "),
            _ => Right,
        }
    }

    pub fn the_message(schedule: Schedule, dtype: DType) -> Expected {
        match schedule {
            Stale => Error("cannot broadcast [5, 5] to [1, 32, 5, 7]"),
            _ => cache_and_u8_mask(schedule, dtype),
        }
    }

    pub fn llama2_c(schedule: Schedule, dtype: DType) -> Expected {
        match schedule {
            Single => Right,
            _ if half(dtype) => Error("dtype mismatch in where"),
            _ => cache_and_u8_mask(schedule, dtype),
        }
    }

    pub fn cache_and_additive_mask(schedule: Schedule, _: DType) -> Expected {
        match schedule {
            Stale | Gap => Error("shape mismatch in broadcast_add"),
            _ => Right,
        }
    }

    pub fn window(schedule: Schedule, dtype: DType) -> Expected {
        match schedule {
            Whole | Chunked | Single => Wrong,
            _ => cache_and_additive_mask(schedule, dtype),
        }
    }

    pub fn half_in_cat(schedule: Schedule, dtype: DType) -> Expected {
        match schedule {
            Chunked | Gap if half(dtype) => Error("dtype mismatch in cat"),
            _ => cache_and_additive_mask(schedule, dtype),
        }
    }

    pub fn half_in_cat_and_window(schedule: Schedule, dtype: DType) -> Expected {
        match schedule {
            Chunked | Gap if half(dtype) => half_in_cat(schedule, dtype),
            _ => window(schedule, dtype),
        }
    }

    /// The window is applied to prefill though the configuration says not to use it.
    pub fn unused_window(schedule: Schedule, dtype: DType) -> Expected {
        match schedule {
            Single => Right,
            _ => half_in_cat_and_window(schedule, dtype),
        }
    }

    /// The window's width is right as it counts the query differently.
    pub fn based(schedule: Schedule, dtype: DType) -> Expected {
        match schedule {
            Whole => Right,
            _ => half_in_cat_and_window(schedule, dtype),
        }
    }

    pub fn mixtral(schedule: Schedule, dtype: DType) -> Expected {
        match half(dtype) {
            true => Error("dtype mismatch in mul"),
            false => cache_and_additive_mask(schedule, dtype),
        }
    }

    pub fn mixtral_window(schedule: Schedule, dtype: DType) -> Expected {
        match half(dtype) {
            true => Error("dtype mismatch in mul"),
            false => window(schedule, dtype),
        }
    }

    pub fn silent(schedule: Schedule, _: DType) -> Expected {
        match schedule {
            Stale => Wrong,
            Gap => Error("accepted"),
            _ => Right,
        }
    }

    pub fn inverted_mask(schedule: Schedule, dtype: DType) -> Expected {
        match schedule {
            Whole | Chunked => Wrong,
            _ => silent(schedule, dtype),
        }
    }

    pub fn gemma3(schedule: Schedule, _: DType) -> Expected {
        match schedule {
            Single => Right,
            _ => Error("slice-set only supports contiguous tensors"),
        }
    }

    pub fn norm_topk_prob(_: Schedule, _: DType) -> Expected {
        Error("shape mismatch in div")
    }

    pub fn group_limited(_: Schedule, _: DType) -> Expected {
        Error("gather")
    }

    pub fn square_u8_mask(schedule: Schedule, _: DType) -> Expected {
        match schedule {
            Chunked | Stale => Error("shape mismatch in where_cond"),
            _ => Right,
        }
    }

    pub fn square_additive_mask(schedule: Schedule, _: DType) -> Expected {
        match schedule {
            Chunked | Stale => Error("shape mismatch in broadcast_add"),
            _ => Right,
        }
    }

    pub fn chatglm(schedule: Schedule, dtype: DType) -> Expected {
        match schedule {
            Single => Right,
            _ if half(dtype) => Error("dtype mismatch in where"),
            _ => square_u8_mask(schedule, dtype),
        }
    }

    pub fn phi(schedule: Schedule, dtype: DType) -> Expected {
        match half(dtype) {
            true => Error("unsupported dtype for rope"),
            false => square_u8_mask(schedule, dtype),
        }
    }

    pub fn mpt(schedule: Schedule, _: DType) -> Expected {
        match schedule {
            Chunked | Stale => Error("cannot broadcast"),
            _ => Right,
        }
    }
}

fn case(
    name: &'static str,
    build: Build,
    reference: Reference,
    released: fn(Schedule, DType) -> Expected,
) -> Case {
    const DTYPES: &[DType] = &[DType::F32, DType::BF16, DType::F16];
    Case {
        name,
        build,
        reference,
        dtypes: DTYPES,
        schedules: &[Whole, Chunked, Single, Stale, Gap],
        released,
    }
}

/// A model that counts its positions itself: there is no gap to offer it.
fn counting(name: &'static str, build: Build, released: fn(Schedule, DType) -> Expected) -> Case {
    let case = case(name, build, Reference::OneByOne, released);
    Case {
        schedules: &[Whole, Chunked, Single, Stale],
        ..case
    }
}

/// Quantised models compute in F32.
fn f32_only(case: Case) -> Case {
    Case {
        dtypes: &[DType::F32],
        ..case
    }
}

/// The models that take a position and whose family the plain decoder covers.
fn family() -> Vec<Case> {
    let llama = Plain {
        hidden: 64,
        heads: 32,
        kv_heads: 8,
        head_dim: 2,
        ..PLAIN
    };
    let moe = |shared| {
        let names = ["gate_proj", "up_proj", "down_proj"];
        Mlp::Moe {
            folder: "mlp",
            names,
            shared,
        }
    };
    let names = ["w1", "w3", "w2"];
    let mixtral = Plain {
        mlp: Mlp::Moe {
            folder: "block_sparse_moe",
            names,
            shared: false,
        },
        ..PLAIN
    };
    let qwen2 = Plain {
        qkv_bias: true,
        ..PLAIN
    };
    let qwen2_moe = Plain {
        mlp: moe(true),
        ..qwen2.clone()
    };
    let qwen3 = Plain {
        qk_norm: true,
        ..PLAIN
    };
    let qwen3_moe = Plain {
        mlp: moe(false),
        ..qwen3.clone()
    };
    let gemma = Plain {
        norm: Norm::RmsPlusOne,
        mlp: Mlp::Geglu,
        scale_embeddings: true,
        tied: true,
        ..PLAIN
    };
    let gemma2 = Plain {
        sandwich: true,
        attention_cap: Some(5.),
        final_cap: Some(30.),
        ..gemma.clone()
    };
    let first = |layer| (layer == 0).then_some(16);
    let gemma3 = Plain {
        sandwich: true,
        qk_norm: true,
        local_theta: Some(1000.),
        window: first,
        ..gemma.clone()
    };
    let starcoder2 = Plain {
        norm: Norm::Layer,
        mlp: Mlp::Gelu,
        qkv_bias: true,
        o_bias: true,
        tied: true,
        ..PLAIN
    };
    let deepseek2 = |norm_topk, groups| Plain {
        mlp: Mlp::Deepseek { norm_topk, groups },
        experts: 8,
        mla: Some(Mla {
            nope: 8,
            rope: 4,
            value: 8,
            rank: 16,
            routed_scaling: 1.5,
        }),
        ..PLAIN
    };
    // A window of three in every layer, in the first, in all but the first.
    let in_all = |plain: &Plain| Plain {
        window: |_| Some(3),
        ..plain.clone()
    };
    let in_first = |plain: &Plain| Plain {
        window: |layer| (layer == 0).then_some(3),
        ..plain.clone()
    };
    let in_later = |plain: &Plain| Plain {
        window: |layer| (layer > 0).then_some(3),
        ..plain.clone()
    };

    use models::*;
    let plain = |name, build, plain: &Plain, released| {
        case(name, build, Reference::Plain(Box::new(plain.clone())), released)
    };
    let additive = released::cache_and_additive_mask;
    vec![
        plain("llama", LLAMA, &llama, released::the_message),
        plain("granite", GRANITE, &PLAIN, released::cache_and_u8_mask),
        plain(
            "voxtral_llama",
            VOXTRAL_LLAMA,
            &PLAIN,
            released::cache_and_u8_mask,
        ),
        plain("mistral", MISTRAL, &PLAIN, additive),
        plain(
            "mistral, window",
            MISTRAL_WINDOW,
            &in_all(&PLAIN),
            released::window,
        ),
        f32_only(plain("quantized_mistral", QUANTIZED_MISTRAL, &PLAIN, additive)),
        f32_only(plain(
            "quantized_mistral, window",
            QUANTIZED_MISTRAL_WINDOW,
            &in_all(&PLAIN),
            released::window,
        )),
        plain("mixtral", MIXTRAL, &mixtral, released::mixtral),
        plain(
            "mixtral, window",
            MIXTRAL_WINDOW,
            &in_all(&mixtral),
            released::mixtral_window,
        ),
        plain("qwen2", QWEN2, &qwen2, released::half_in_cat),
        plain(
            "qwen2, unused window",
            QWEN2_UNUSED_WINDOW,
            &qwen2,
            released::unused_window,
        ),
        plain(
            "qwen2, window",
            QWEN2_WINDOW,
            &in_later(&qwen2),
            released::half_in_cat_and_window,
        ),
        plain("qwen2_moe", QWEN2_MOE, &qwen2_moe, additive),
        plain(
            "qwen2_moe, window",
            QWEN2_MOE_WINDOW,
            &in_later(&qwen2_moe),
            released::window,
        ),
        plain("qwen3", QWEN3, &qwen3, released::silent),
        plain("qwen3_moe", QWEN3_MOE, &qwen3_moe, released::silent),
        plain("gemma", GEMMA, &gemma, additive),
        plain("gemma2", GEMMA2, &gemma2, additive),
        plain(
            "gemma2, window",
            GEMMA2_WINDOW,
            &in_first(&gemma2),
            released::window,
        ),
        plain("gemma3", GEMMA3, &gemma3, released::gemma3),
        plain(
            "gemma3, window",
            GEMMA3_WINDOW,
            &in_first(&gemma3),
            released::gemma3,
        ),
        plain("starcoder2", STARCODER2, &starcoder2, additive),
        plain(
            "starcoder2, window",
            STARCODER2_WINDOW,
            &in_all(&starcoder2),
            released::window,
        ),
        plain("deepseek2", DEEPSEEK2_PLAIN, &deepseek2(false, None), additive),
        plain(
            "deepseek2, norm",
            DEEPSEEK2_NORM,
            &deepseek2(true, None),
            released::norm_topk_prob,
        ),
        plain(
            "deepseek2, groups",
            DEEPSEEK2_GROUPS,
            &deepseek2(false, Some((4, 2))),
            released::group_limited,
        ),
    ]
}

/// The others.
fn others() -> Vec<Case> {
    use models::*;
    let alone = |name, build, released| case(name, build, Reference::OneByOne, released);
    let additive = released::cache_and_additive_mask;
    vec![
        alone(
            "granitemoehybrid",
            GRANITE_MOE_HYBRID,
            released::cache_and_u8_mask,
        ),
        alone("llama2_c", LLAMA2_C, released::llama2_c),
        alone("phi3", PHI3, additive),
        alone("helium", HELIUM, additive),
        alone("olmo", OLMO, released::half_in_cat),
        alone("olmo2", OLMO2, released::half_in_cat),
        alone("stable_lm", STABLE_LM, additive),
        f32_only(alone("quantized_stable_lm", QUANTIZED_STABLE_LM, additive)),
        alone("glm4_new", GLM4_NEW, additive),
        alone("qwen3_vl", QWEN3_VL, released::inverted_mask),
        case(
            "based, window",
            BASED_WINDOW,
            Reference::LastTokens(3),
            released::based,
        ),
        counting("glm4", GLM4, released::square_u8_mask),
        counting("codegeex4_9b", CODEGEEX4, released::square_u8_mask),
        counting("chatglm", CHATGLM, released::chatglm),
        counting("phi", PHI, released::phi),
        counting("falcon", FALCON, released::square_additive_mask),
        counting("mixformer", MIXFORMER, released::square_additive_mask),
        f32_only(counting(
            "quantized_mixformer",
            QUANTIZED_MIXFORMER,
            released::square_u8_mask,
        )),
    ]
}

fn tokens(ids: &[u32]) -> Result<Tensor> {
    Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)
}

/// The logits after the last token: some models return only these, some all.
fn last(logits: &Tensor) -> Result<Vec<f32>> {
    let vocab = logits.dim(candle_core::D::Minus1)?;
    let logits = logits.to_dtype(DType::F32)?.flatten_all()?;
    logits.narrow(0, logits.elem_count() - vocab, vocab)?.to_vec1()
}

/// The error's own text, without the backtrace.
fn first_line(error: candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

fn nmse(a: &[f32], reference: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let error: f64 = a.iter().zip(reference).map(|(a, r)| square(a - r)).sum();
    error / reference.iter().copied().map(square).sum::<f64>()
}

/// The largest normalised mean-square error that counts as right. The smallest fault here is 4.6e-2.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-9,
        DType::F16 => 1e-4,
        _ => 1e-2,
    }
}

impl Case {
    fn reference(&self, sequence: &[u32]) -> Result<Vec<Vec<f32>>> {
        let fed = |ids: &[u32]| {
            let mut model = (self.build)(DType::F32)?;
            let step = |(i, id): (usize, &u32)| last(&model(&tokens(&[*id])?, i)?);
            ids.iter().enumerate().map(step).collect::<Result<Vec<_>>>()
        };
        match &self.reference {
            Reference::Plain(plain) => Ok(plain.logits(sequence)),
            Reference::OneByOne => fed(sequence),
            Reference::LastTokens(n) => (1..=sequence.len())
                .map(|end| {
                    Ok(fed(&sequence[end.saturating_sub(*n)..end])?
                        .pop()
                        .expect("a token"))
                })
                .collect(),
        }
    }

    /// The largest error after any chunk.
    fn run(&self, schedule: Schedule, dtype: DType, sequence: &[u32], right: &[Vec<f32>]) -> Result<f64> {
        let n = sequence.len();
        let chunkings = match schedule {
            Whole => vec![vec![n]],
            Single => vec![vec![1; n]],
            Chunked | Gap => vec![vec![2, n - 2], vec![n - 2, 1, 1], vec![1, n - 3, 2]],
            Stale => vec![vec![n - 2], vec![n - 2, 2]],
        };
        let mut worst = 0f64;
        for chunks in chunkings {
            let mut model = (self.build)(dtype)?;
            if schedule == Stale {
                model(&tokens(&EARLIER)?, 0)?;
            }
            let mut position = 0;
            for chunk in chunks {
                let ids = tokens(&sequence[position..position + chunk])?;
                if schedule == Gap && position > 0 {
                    match model(&ids, position + 1) {
                        Ok(_) => candle_core::bail!("position {} accepted after {position}", position + 1),
                        Err(error) if error.to_string().contains("does not continue the KV cache") => (),
                        Err(error) => return Err(error),
                    }
                }
                let logits = last(&model(&ids, position)?)?;
                position += chunk;
                worst = worst.max(nmse(&logits, &right[position - 1]));
            }
        }
        Ok(worst)
    }

    fn outcome(&self, schedule: Schedule, dtype: DType, sequence: &[u32], right: &[Vec<f32>]) -> Outcome {
        match self.run(schedule, dtype, sequence, right) {
            Err(error) => Outcome::Error(first_line(error)),
            Ok(error) if error <= tolerance(dtype) => Outcome::Right(error),
            Ok(error) => Outcome::Wrong(error),
        }
    }

    /// Runs it all and returns what is not as expected.
    fn surprises(&self, sequence: &[u32]) -> Vec<String> {
        let right = match self.reference(sequence) {
            Ok(right) => right,
            Err(error) => return vec![format!("{}: no reference: {}", self.name, first_line(error))],
        };
        let mut surprises = vec![];
        for &dtype in self.dtypes {
            for &schedule in self.schedules {
                let expected = if patched() {
                    Expected::Right
                } else {
                    (self.released)(schedule, dtype)
                };
                let outcome = self.outcome(schedule, dtype, sequence, &right);
                let line = format!("{}, {dtype:?}, {schedule:?}: {outcome}", self.name);
                println!("{line}");
                let as_expected = match (expected, &outcome) {
                    (Expected::Right, Outcome::Right(_)) | (Expected::Wrong, Outcome::Wrong(_)) => true,
                    (Expected::Error(part), Outcome::Error(error)) => error.contains(part),
                    _ => false,
                };
                if !as_expected {
                    surprises.push(format!("{line}, expected {expected:?}"));
                }
            }
        }
        surprises
    }
}

fn patched() -> bool {
    std::env::var("MMFP4_CANDLE_PATCHED").is_ok_and(|value| value == "1")
}

fn check(cases: &[Case], sequence: &[u32]) {
    let surprises: Vec<_> = cases.iter().flat_map(|case| case.surprises(sequence)).collect();
    assert!(
        surprises.is_empty(),
        "{} of candle-transformers are not as patches/README.md says:\n{}\nWhere a newer release has mended \
         a fault, drop its patch and its entry here.",
        surprises.len(),
        surprises.join("\n")
    );
}

#[test]
fn families_of_the_plain_decoder() {
    check(&family(), &SEQUENCE);
}

#[test]
fn other_models() {
    check(&others(), &SEQUENCE);
}

/// On its own as its configuration cannot be made small: 32 layers of 3072, all with the same weights.
#[test]
fn mpt() {
    let mpt = counting("mpt", models::MPT, released::mpt);
    check(
        &[f32_only(Case {
            schedules: &[Whole, Chunked, Stale],
            ..mpt
        })],
        &SEQUENCE[..4],
    );
}

/// As mpt: 32 layers of 4096, all with the same weights.
#[test]
fn yi() {
    let yi = case(
        "yi",
        models::YI,
        Reference::OneByOne,
        released::cache_and_additive_mask,
    );
    check(
        &[f32_only(Case {
            schedules: &[Whole, Chunked, Stale],
            ..yi
        })],
        &SEQUENCE[..4],
    );
}

/// A reset cache holds nothing, which only a refused position can show.
#[test]
fn llama_cache_is_reset() -> Result<()> {
    let (model, mut cache) = models::llama_and_cache(DType::F32)?;
    model.forward(&tokens(&EARLIER)?, 0, &mut cache)?;
    cache.reset();
    let outcome = model.forward(&tokens(&SEQUENCE)?, EARLIER.len(), &mut cache);
    match (patched(), outcome) {
        // The released crate has no reset: the sequence just continues.
        (false, Ok(_)) => Ok(()),
        (true, Err(error)) if error.to_string().contains("which holds 0 positions") => Ok(()),
        (_, outcome) => panic!("{:?}", outcome.map_err(first_line)),
    }
}
