//! Attention of Llama 3 8B's shape with the cache that one writes today, and on a paged cache: what the change takes,
//! what it saves, and what it does to speed.
//!
//! `cargo run --release --example paged_llama`, with `-- --depths 512,2048 --repetitions 3` for less of it.
//!
//! `Concatenated` is what candle-transformers' Llama does; `Paged` is what takes its place. A model calls
//! `PagedKvCache::begin` once a forward pass, with the new tokens of one sequence or of many; each layer appends to its
//! own pool and attends; `commit` ends the pass.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Module, Tensor};
use candle_mmfp4::cpu::{Executor, roofline};
use candle_mmfp4::kv::{CacheFormat, RowLayout, SequenceId};
use candle_mmfp4::nn::{CacheSize, Mask, PagedKvCache, Pairing, RotaryEmbedding};
use candle_mmfp4::ops::{AppendHeads, PagedAttention};
use candle_nn::Linear;
use clap::Parser;

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD: usize = 128;
const HIDDEN: usize = HEADS * HEAD;
/// Bytes that are read before a token is timed, so that no cache of the processor still holds what the token reads.
const COLD: usize = 256_000_000;

#[derive(Parser)]
struct Arguments {
    /// Tokens in the cache before the one that is timed.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,4096,8192")]
    depths: Vec<usize>,
    /// How often each is timed; once more comes first and does not count.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Layers that a token passes; the time is that of one.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    layers: u32,
}

/// Keys and values as tensors that grow by concatenation, and are repeated for the heads that share them.
#[derive(Clone, Default)]
struct Concatenated(Option<(Tensor, Tensor)>);

impl Concatenated {
    /// `q` `[tokens, HEADS, HEAD]`, `k` and `v` `[tokens, KV_HEADS, HEAD]` of tokens from `position` on, to
    /// `[tokens, HEADS, HEAD]`.
    fn attend(&mut self, position: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let by_head = |x: &Tensor| x.unsqueeze(0)?.transpose(1, 2)?.contiguous();
        let (q, mut k, mut v) = (by_head(q)?, by_head(k)?, by_head(v)?);
        if let Some((keys, values)) = &self.0 {
            k = Tensor::cat(&[keys, &k], 2)?.contiguous()?;
            v = Tensor::cat(&[values, &v], 2)?.contiguous()?;
        }
        self.0 = Some((k.clone(), v.clone()));
        let (tokens, total) = (q.dim(2)?, k.dim(2)?);
        let repeated = |x: &Tensor| {
            let repeated = Tensor::cat(&[x; HEADS / KV_HEADS], 2)?;
            repeated.reshape((1, HEADS, total, HEAD))?.to_dtype(DType::F32)
        };
        let (k, v) = (repeated(&k)?, repeated(&v)?);
        let mut scores = (q.to_dtype(DType::F32)?.matmul(&k.t()?)? / (HEAD as f64).sqrt())?;
        if tokens > 1 {
            let mask = Mask::causal().tensor(position..total, 0..total, DType::F32, q.device())?;
            scores = scores.broadcast_add(&mask)?;
        }
        let weights = candle_nn::ops::softmax_last_dim(&scores)?;
        let y = weights.matmul(&v.contiguous()?)?.to_dtype(q.dtype())?;
        Ok(y.squeeze(0)?.transpose(0, 1)?)
    }
}

/// What takes its place: one cache for all layers and sequences.
struct Paged {
    cache: PagedKvCache,
    append: AppendHeads,
    attention: PagedAttention,
}

impl Paged {
    /// Room for so many tokens, of all sequences together, taken at once.
    fn new(format: CacheFormat, layers: usize, tokens: usize) -> Result<Self> {
        let layout = RowLayout::heads(format, KV_HEADS, HEAD, HEAD)?;
        let scale = 1.0 / (HEAD as f32).sqrt();
        Ok(Self {
            cache: PagedKvCache::new(
                layers,
                layout.clone(),
                CacheSize::Tokens(tokens),
                tokens,
                &Device::Cpu,
            )?,
            append: AppendHeads::new(layout.clone())?,
            attention: PagedAttention::new(layout, HEADS, scale, None)?,
        })
    }

    /// As [`Concatenated::attend`], of the tokens that the pass began with: no mask, no positions, no repeated heads;
    /// and of several sequences at once, where the pass began with several.
    fn attend(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (pool, batch) = (self.cache.pool(layer)?, self.cache.batch());
        self.append.forward(pool, k, v, batch)?;
        Ok(self.attention.forward(&[q], pool, batch)?)
    }
}

/// What is the same in both: the projections and the rotary embedding.
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    rotary: RotaryEmbedding,
}

impl Attention {
    fn random() -> Result<Self> {
        let linear = |heads| -> Result<Linear> {
            let weight = random((heads * HEAD, HIDDEN))? / (HIDDEN as f64).sqrt();
            Ok(Linear::new(weight?, None))
        };
        Ok(Self {
            q: linear(HEADS)?,
            k: linear(KV_HEADS)?,
            v: linear(KV_HEADS)?,
            o: linear(HEADS)?,
            // Llama's pairs of elements lie half a head apart.
            rotary: RotaryEmbedding::new(HEAD, 500_000.0, Pairing::Halves),
        })
    }

    /// `x` `[tokens, HIDDEN]` of tokens from `position` on, to queries, keys and values `[tokens, heads, HEAD]`.
    fn project(&self, x: &Tensor, position: usize) -> Result<[Tensor; 3]> {
        let positions: Vec<usize> = (position..position + x.dim(0)?).collect();
        let angles = self.rotary.angles(&positions, x.device())?;
        let by_head = |linear: &Linear| linear.forward(x)?.reshape((positions.len(), (), HEAD));
        let q = self.rotary.forward(&by_head(&self.q)?, &angles)?;
        let k = self.rotary.forward(&by_head(&self.k)?, &angles)?;
        Ok([q, k, by_head(&self.v)?])
    }

    fn before(&self, x: &Tensor, position: usize, cache: &mut Concatenated) -> Result<Tensor> {
        let [q, k, v] = self.project(x, position)?;
        let y = cache.attend(position, &q, &k, &v)?;
        Ok(self.o.forward(&y.flatten_from(1)?)?)
    }

    fn after(&self, x: &Tensor, position: usize, cache: &Paged) -> Result<Tensor> {
        let [q, k, v] = self.project(x, position)?;
        let y = cache.attend(0, &q, &k, &v)?; // of a model's first layer
        Ok(self.o.forward(&y.flatten_from(1)?)?)
    }
}

fn random(shape: impl Into<candle_core::Shape>) -> candle_core::Result<Tensor> {
    Tensor::randn(0f32, 1., shape, &Device::Cpu)
}

/// A prompt of 100 tokens and 28 more, one by one, through both; gives the normalised mean-square error of each paged
/// format.
fn errors(formats: &[CacheFormat]) -> Result<Vec<f64>> {
    let tokens: Vec<u32> = (0..128).collect();
    let (attention, x) = (Attention::random()?, random((tokens.len(), HIDDEN))?);
    let passes: Vec<(usize, usize)> = std::iter::once((0, 100))
        .chain((100..128).map(|i| (i, 1)))
        .collect();

    let mut concatenated = Concatenated::default();
    let expected = passes
        .iter()
        .map(|&(start, len)| attention.before(&x.narrow(0, start, len)?, start, &mut concatenated));
    let expected = Tensor::cat(&expected.collect::<Result<Vec<_>>>()?, 0)?;
    let square = |x: Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>();

    let error = |format: &CacheFormat| {
        let mut paged = Paged::new(*format, 1, tokens.len())?;
        let (sequence, _) = paged.cache.start(&tokens[..100]);
        let y = passes.iter().map(|&(start, len)| {
            paged.cache.begin(&[(sequence, &tokens[start..start + len])])?;
            let y = attention.after(&x.narrow(0, start, len)?, start, &paged)?;
            paged.cache.commit();
            Ok(y)
        });
        let y = Tensor::cat(&y.collect::<Result<Vec<_>>>()?, 0)?;
        Ok(f64::from(square((y - &expected)?)? / square(expected.clone())?))
    };
    formats.iter().map(error).collect()
}

/// A cache of `depth` tokens, in all layers, and what adds another one and forgets it again.
struct Contender {
    name: String,
    /// Of a token and a layer.
    bytes: usize,
    step: Box<dyn FnMut() -> Result<()>>,
}

/// The query, key and value of a token.
fn token() -> Result<[Tensor; 3]> {
    Ok([
        random((1, HEADS, HEAD))?,
        random((1, KV_HEADS, HEAD))?,
        random((1, KV_HEADS, HEAD))?,
    ])
}

fn concatenated(dtype: DType, layers: usize, depth: usize) -> Result<Contender> {
    let of_layer = || -> Result<Concatenated> {
        let random = || random((1, KV_HEADS, depth, HEAD))?.to_dtype(dtype);
        Ok(Concatenated(Some((random()?, random()?))))
    };
    let caches = (0..layers).map(|_| of_layer()).collect::<Result<Vec<_>>>()?;
    let [q, k, v] = token()?.map(|x| x.to_dtype(dtype));
    let (q, k, v) = (q?, k?, v?);
    Ok(Contender {
        name: format!("concatenated {}", dtype.as_str()),
        bytes: 2 * KV_HEADS * HEAD * dtype.size_in_bytes(),
        step: Box::new(move || {
            for cache in &caches {
                cache.clone().attend(depth, &q, &k, &v)?;
            }
            Ok(())
        }),
    })
}

fn paged(format: CacheFormat, layers: usize, depth: usize) -> Result<Contender> {
    let mut paged = Paged::new(format, layers, depth + 1)?;
    let sequence = filled(&mut paged, layers, depth)?;
    let [q, k, v] = token()?;
    Ok(Contender {
        name: format!("paged {format}"),
        bytes: paged.cache.layout().row_bytes(),
        step: Box::new(move || {
            paged.cache.begin(&[(sequence, &[0])])?;
            (0..layers).try_for_each(|layer| paged.attend(layer, &q, &k, &v).map(drop))?;
            paged.cache.forget();
            Ok(())
        }),
    })
}

/// A sequence of `depth` tokens with random keys and values.
fn filled(paged: &mut Paged, layers: usize, depth: usize) -> Result<SequenceId> {
    let tokens: Vec<u32> = (0..depth as u32).collect();
    let (sequence, _) = paged.cache.start(&[]);
    for tokens in tokens.chunks(512) {
        let rows = || random((tokens.len(), KV_HEADS, HEAD));
        let (keys, values) = (rows()?, rows()?);
        paged.cache.begin(&[(sequence, tokens)])?;
        for layer in 0..layers {
            let pool = paged.cache.pool(layer)?;
            paged.append.forward(pool, &keys, &values, paged.cache.batch())?;
        }
        paged.cache.commit();
    }
    Ok(sequence)
}

/// Milliseconds a token and a layer of each, the median of rounds in which all of them take turns, and what memory
/// delivered between them, in bytes a second.
fn times(contenders: &mut [Contender], arguments: &Arguments) -> Result<(Vec<f64>, f64)> {
    let (executor, cold) = (Executor::current()?, vec![1; COLD]);
    let (mut times, mut rates) = (vec![Vec::new(); contenders.len()], Vec::new());
    for round in 0..=arguments.repetitions {
        for (contender, times) in contenders.iter_mut().zip(&mut times) {
            let rate = roofline::read_bandwidth(&executor, &[&cold]);
            // Until then threads of the other side may still wait for work on the processor.
            std::thread::sleep(Duration::from_millis(2));
            let start = Instant::now();
            (contender.step)()?;
            if round > 0 {
                times.push(start.elapsed().as_secs_f64() * 1e3 / f64::from(arguments.layers));
                rates.push(rate);
            }
        }
    }
    Ok((times.into_iter().map(median).collect(), median(rates)))
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let n = samples.len();
    (samples[(n - 1) / 2] + samples[n / 2]) / 2.0
}

fn main() -> Result<()> {
    run(&Arguments::parse())
}

fn run(arguments: &Arguments) -> Result<()> {
    let formats = [
        CacheFormat::F16,
        CacheFormat::BF16,
        CacheFormat::Fp8,
        CacheFormat::fp4(),
    ];
    println!(
        "{HEADS} heads over {KV_HEADS} of {HEAD}. Normalised error of the layer's output beside `concatenated f32`:"
    );
    for (format, error) in formats.iter().zip(errors(&formats)?) {
        println!("  paged {format:<5} {error:.1e}");
        // What the rounding of elements comes to; products are of BF16 where the processor has them.
        let bar = match format {
            CacheFormat::F16 | CacheFormat::BF16 => 5e-5,
            CacheFormat::Fp8 => 5e-3,
            CacheFormat::Fp4 { .. } => 5e-2,
        };
        ensure!(
            error < bar,
            "paged {format}: expected an error below {bar:e}, found {error:e}"
        );
    }

    let layers = arguments.layers as usize;
    let (mut names, mut columns, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for &depth in &arguments.depths {
        let mut contenders = vec![
            concatenated(DType::F32, layers, depth)?,
            concatenated(DType::F16, layers, depth)?,
        ];
        for format in formats {
            contenders.push(paged(format, layers, depth)?);
        }
        let (times, rate) = times(&mut contenders, arguments)?;
        names = contenders
            .into_iter()
            .map(|contender| (contender.name, contender.bytes))
            .collect();
        columns.push(times);
        rates.push(format!("{:.1}", rate / 1e9));
    }
    println!(
        "\nAttention of one more token, milliseconds a layer (× as fast as `concatenated f32`, as `paged f16`):\n"
    );
    print!("| cache | bytes a token and layer |");
    arguments
        .depths
        .iter()
        .for_each(|depth| print!(" behind {depth} tokens |"));
    print!("\n|---|---|{}", "---|".repeat(columns.len()));
    for (row, (name, bytes)) in names.iter().enumerate() {
        print!(
            "\n| {name} | {bytes} (1 / {:.2}) |",
            names[0].1 as f64 / *bytes as f64
        );
        for times in &columns {
            let faster = |than: usize| times[than] / times[row];
            print!(" {:.3} ({:.1} ×, {:.2} ×) |", times[row], faster(0), faster(2));
        }
    }
    let (rates, threads) = (rates.join(", "), Executor::current()?.threads());
    println!("\n\nMemory delivered {rates} GB/s meanwhile, to {threads} threads.");
    Ok(())
}

#[cfg(test)]
#[test]
fn formats_agree_with_concatenation() {
    run(&Arguments {
        depths: vec![40],
        repetitions: 1,
        layers: 2,
    })
    .unwrap();
}
