//! One test, in the process that was started for it.

use super::Arguments;
use super::row::{Row, Samples, Setup, is_noisy};
use super::test::{Kind, Test};
use candle_core::Tensor;
use candle_mmfp4::bandwidth::ReadBandwidth;
use candle_mmfp4::checkpoint::LoadOptions;
use candle_mmfp4::cpu::{Arithmetic, Executor, roofline};
use candle_mmfp4::generation::Options;
use candle_mmfp4::kv::{CacheKind, SequenceId};
use candle_mmfp4::memory;
use candle_mmfp4::models::glm4_moe_lite::{Cache, Logits, Model};
use candle_mmfp4::models::{Observer, Phase, Profile};
use std::sync::Arc;
use std::time::Instant;

pub fn measure(arguments: &Arguments, test: &Test) -> anyhow::Result<Vec<Row>> {
    let files = arguments.files()?;
    let size = arguments.size(test)?;
    let options = LoadOptions {
        kv_cache: test.cache,
        kv_size: Some(size),
        base: arguments.model.base(&files)?,
        ..arguments.model.load_options()
    };
    let executor = arguments.model.start()?;
    let start = Instant::now();
    let (model, report) = Model::from_files(&files, &options, &arguments.model.device()?)?;
    let load_ms = milliseconds(start);
    let mut run = Run {
        limits: Limits::new(&model, Arc::clone(&executor))?,
        cache: model.new_kv_cache(test.cache, Some(size))?,
        kind: test.cache,
        model: &model,
        setup: Setup {
            model: arguments.name().to_string(),
            fused_moe: !options.separate_experts,
            int8_head: report.int8_head.is_some(),
            exact: options.arithmetic == Arithmetic::Exact,
            cpu: executor.isa().name().to_string(),
            threads: executor.threads(),
        },
        drawn: 0,
    };
    match test.kind {
        Kind::Latency => run.latency(load_ms, arguments.repetitions),
        Kind::Prompt | Kind::Decode => run.throughput(test, arguments.repetitions, arguments.profile),
    }
}

struct Run<'a> {
    model: &'a Model,
    cache: Cache,
    kind: CacheKind,
    limits: Limits,
    setup: Setup,
    /// Tokens drawn so far.
    drawn: u64,
}

/// What the machine reaches at best, measured again and again.
struct Limits {
    memory: ReadBandwidth,
    executor: Arc<Executor>,
    /// Bytes a second.
    rates: Samples,
    /// Float products a second.
    peaks: Samples,
}

impl Limits {
    fn new(model: &Model, executor: Arc<Executor>) -> anyhow::Result<Self> {
        Ok(Self {
            memory: ReadBandwidth::new(model)?,
            executor,
            rates: Samples(Vec::new()),
            peaks: Samples(Vec::new()),
        })
    }

    fn measure(&mut self) {
        self.rates.0.push(self.memory.measure());
        self.peaks.0.push(roofline::float_peak(&self.executor));
    }
}

/// A sequence, and the tokens that it has before a test.
#[derive(Clone, Copy)]
struct Behind {
    id: SequenceId,
    depth: usize,
}

impl Run<'_> {
    fn throughput(&mut self, test: &Test, repetitions: u32, profiled: bool) -> anyhow::Result<Vec<Row>> {
        let sequences = self.fill(&test.depths)?;
        let step = if test.kind == Kind::Decode { 1 } else { chunk() };
        let mut times = Vec::new();
        for behind in &sequences {
            let first = self.feed(*behind, test.tokens, step)?;
            times.push((first, Samples(Vec::new())));
        }
        self.limits.memory.read_all();
        self.limits.measure();
        for _ in 0..repetitions {
            for (behind, (_, times)) in sequences.iter().zip(&mut times) {
                times.0.push(self.feed(*behind, test.tokens, step)?);
                self.limits.measure();
            }
        }
        let (name, phase, prompt, generated) = match test.kind {
            Kind::Decode => ("tg", Phase::Generation, 0, test.tokens),
            Kind::Prompt | Kind::Latency => ("pp", Phase::Prompt, test.tokens, 0),
        };
        let mut rows = Vec::new();
        for (behind, (first, times)) in sequences.iter().zip(&times) {
            let held = behind.depth + test.tokens;
            let mut row = self.row(name, (prompt, generated), times, step, held)?;
            row.depth = behind.depth;
            row.first_ms = Some(*first);
            if profiled {
                // By itself: on a GPU a profile takes time.
                let mut profile = Profile::new(self.model.device());
                self.pass_through(*behind, test.tokens, step, Some((&mut profile, phase)))?;
                row.profile = Some(profile.report());
            }
            rows.push(row.beside(&self.limits.rates));
        }
        if test.kind == Kind::Decode {
            self.beside_depth_0(&mut rows)?;
        }
        Ok(rows)
    }

    /// One token at the start of a sequence, and one after it: each for the first time, then again and again.
    fn latency(&mut self, load_ms: f64, repetitions: u32) -> anyhow::Result<Vec<Row>> {
        let (id, _) = self.cache.start(&[]);
        let [start, next] = [0, 1].map(|depth| Behind { id, depth });
        // Each row is made at once, with the memory as it is then.
        let mut rows = vec![self.row("load", (0, 0), &Samples(vec![load_ms]), 1, 0)?];
        let first = Samples(vec![self.feed(start, 1, 1)?]);
        rows.push(self.row("first_prompt", (1, 0), &first, 1, 1)?);
        let first = Samples(vec![self.feed(next, 1, 1)?]);
        rows.push(self.row("first_decode", (0, 1), &first, 1, 2)?);
        self.limits.memory.read_all();
        let (mut prompts, mut decodes) = (Samples(Vec::new()), Samples(Vec::new()));
        self.limits.measure();
        for _ in 0..repetitions {
            prompts.0.push(self.feed(start, 1, 1)?);
            decodes.0.push(self.feed(next, 1, 1)?);
            self.limits.measure();
        }
        rows.push(self.row("later_prompt", (1, 0), &prompts, 1, 1)?);
        rows.push(self.row("later_decode", (0, 1), &decodes, 1, 2)?);
        let rates = &self.limits.rates;
        Ok(rows.into_iter().map(|row| row.beside(rates)).collect())
    }

    /// A sequence of random tokens for each of the depths, from few to many. All begin alike: blocks of the deepest, which
    /// comes first, are those of the others.
    fn fill(&mut self, depths: &[usize]) -> anyhow::Result<Vec<Behind>> {
        let tokens = self.draw(depths.last().copied().unwrap_or(0));
        let mut sequences = Vec::new();
        for &depth in depths.iter().rev() {
            let (id, cached) = self.cache.start(&tokens[..depth]);
            for tokens in tokens[cached..depth].chunks(chunk()) {
                self.forward(id, tokens, None)?;
            }
            sequences.push(Behind { id, depth });
        }
        sequences.reverse();
        Ok(sequences)
    }

    fn draw(&mut self, tokens: usize) -> Vec<u32> {
        let vocabulary = self.model.config().vocab_size as u64;
        let indices = self.drawn..self.drawn + tokens as u64;
        self.drawn = indices.end;
        indices.map(|index| (mix(index) % vocabulary) as u32).collect()
    }

    fn forward(
        &mut self,
        id: SequenceId,
        tokens: &[u32],
        observer: Option<&mut Observer<'_>>,
    ) -> anyhow::Result<()> {
        self.model
            .forward_cached(&mut self.cache, &[(id, tokens)], Logits::Last, observer)?;
        Ok(())
    }

    /// Adds `tokens` random tokens to a sequence as it was before, `step` at a time; gives the milliseconds that took.
    fn feed(&mut self, behind: Behind, tokens: usize, step: usize) -> anyhow::Result<f64> {
        self.pass_through(behind, tokens, step, None)
    }

    /// [`feed`](Self::feed), with the time of each op where there is a profile for it.
    fn pass_through(
        &mut self,
        Behind { id, depth }: Behind,
        tokens: usize,
        step: usize,
        mut profile: Option<(&mut Profile, Phase)>,
    ) -> anyhow::Result<f64> {
        let drawn = self.draw(tokens);
        self.cache.truncate(id, depth)?;
        if step > 1 {
            // A prompt, of which a pipeline tells the cache.
            self.cache.announce(id, depth + tokens)?;
        }
        let start = Instant::now();
        for tokens in drawn.chunks(step) {
            let Some((profile, phase)) = &mut profile else {
                self.forward(id, tokens, None)?;
                continue;
            };
            profile.begin(*phase);
            let mut observer = |site, _: &Tensor, _: &Tensor| profile.see(site);
            self.forward(id, tokens, Some(&mut observer))?;
        }
        Ok(milliseconds(start))
    }

    /// Tells of rows that were measured in turn what share of their speed at depth 0 is left and, on the CPU, how far they
    /// are from what the machine allows.
    fn beside_depth_0(&self, rows: &mut [Row]) -> anyhow::Result<()> {
        let Some(first) = rows.iter().find(|row| row.depth == 0) else {
            return Ok(());
        };
        let (rate, ms) = (first.tokens_per_s, first.latency_ms);
        let of_token = self.model.cache_bytes_per_token(self.kind)?;
        let config = self.model.config();
        // A head's scores are products with the latent and the rotary key, its output sums of latents.
        let widths = 2 * config.kv_lora_rank + config.qk_rope_head_dim;
        let operations = (2 * config.layers.len() * config.num_attention_heads * widths) as f64;
        let (bandwidth, peak) = (self.limits.rates.median(), self.limits.peaks.median());
        for row in rows {
            row.of_depth_0 = Some(row.tokens_per_s / rate);
            if self.model.device().is_cpu() {
                let seconds = (of_token as f64 / bandwidth).max(operations / peak);
                let bound = ms + (row.depth * row.generated_tokens) as f64 * seconds * 1e3;
                row.float_peak_gop_s = Some(peak / 1e9);
                row.bound_ms = Some(bound);
                row.of_bound = Some(row.latency_ms / bound);
            }
        }
        Ok(())
    }

    /// `held` are the tokens that the sequence has at the end.
    fn row(
        &self,
        test: &str,
        (prompt, generated): (usize, usize),
        times: &Samples,
        step: usize,
        held: usize,
    ) -> anyhow::Result<Row> {
        let tokens = prompt + generated;
        let passes = (0..tokens).step_by(step).map(|start| step.min(tokens - start));
        let bytes: u64 = passes.map(|tokens| self.model.bytes_read(tokens)).sum();
        Ok(Row {
            test: test.into(),
            setup: self.setup.clone(),
            prompt_tokens: prompt,
            generated_tokens: generated,
            kv_cache: self.kind.to_string(),
            depth: 0,
            tokens_per_s: tokens as f64 * 1e3 / times.median(),
            spread: times.spread(),
            latency_ms: times.median(),
            first_ms: None,
            bytes_per_token: bytes.checked_div(tokens as u64).unwrap_or(0),
            cache_bytes: self.model.cache_bytes_per_token(self.kind)? * held as u64,
            read_bandwidth_gb_s: 0.0,
            bandwidth_spread: 0.0,
            share_of_bandwidth: 0.0,
            noisy: false,
            of_depth_0: None,
            float_peak_gop_s: None,
            bound_ms: None,
            of_bound: None,
            peak_memory_bytes: memory::peak_resident(),
            private_memory_bytes: memory::private_resident(),
            repetitions: times.0.len(),
            samples_ms: times.0.clone(),
            profile: None,
        })
    }
}

impl Row {
    /// With what memory gave, in bytes a second, between the repetitions.
    fn beside(mut self, rates: &Samples) -> Self {
        let bandwidth = rates.median();
        self.share_of_bandwidth = self.tokens_per_s * self.bytes_per_token as f64 / bandwidth;
        self.read_bandwidth_gb_s = bandwidth / 1e9;
        self.bandwidth_spread = rates.spread();
        self.noisy = is_noisy(self.bandwidth_spread);
        self
    }
}

/// Tokens a pass of a prompt has, as in generation.
fn chunk() -> usize {
    Options::default().prefill_chunk
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// A number that looks random, always the same: splitmix64's output function.
fn mix(index: u64) -> u64 {
    let mut z = index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
