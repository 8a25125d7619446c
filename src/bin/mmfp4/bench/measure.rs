//! One test, in the process that was started for it.

use super::row::{Row, Samples, Setup, is_noisy};
use super::{Arguments, Kind, Test};
use candle_core::Tensor;
use candle_mmfp4::bandwidth::ReadBandwidth;
use candle_mmfp4::cpu::Arithmetic;
use candle_mmfp4::generation::Options;
use candle_mmfp4::kv::{CacheKind, SequenceId};
use candle_mmfp4::memory;
use candle_mmfp4::models::glm4_moe_lite::{Cache, Logits, Model};
use candle_mmfp4::models::{Phase, Profile};
use candle_mmfp4::nn::CacheSize;
use std::time::Instant;

pub fn measure(arguments: &Arguments, test: Test) -> anyhow::Result<Vec<Row>> {
    let files = arguments.files()?;
    let options = arguments.model.load_options();
    let executor = arguments.model.start()?;
    let start = Instant::now();
    let (model, report) = Model::from_files(&files, &options, &arguments.model.device()?)?;
    let load_ms = milliseconds(start);
    let tokens = test.depth + test.tokens.max(LATENCY);
    // As large as the test needs, unless it was said; a cache on a GPU has to be there before.
    let size = arguments
        .memory
        .size(test.kv_cache)?
        .unwrap_or(CacheSize::Tokens(tokens));
    let mut cache = model.new_kv_cache(test.kv_cache, Some(size))?;
    let mut run = Run {
        sequence: cache.start(&[]).0,
        cache,
        kv_cache: test.kv_cache,
        memory: ReadBandwidth::new(&model)?,
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
        Kind::Prompt | Kind::Decode => Ok(vec![run.throughput(
            test,
            arguments.repetitions,
            arguments.profile,
        )?]),
    }
}

struct Run<'a> {
    model: &'a Model,
    cache: Cache,
    sequence: SequenceId,
    kv_cache: CacheKind,
    memory: ReadBandwidth,
    setup: Setup,
    /// Tokens drawn so far.
    drawn: u64,
}

impl Run<'_> {
    fn throughput(&mut self, test: Test, repetitions: u32, profiled: bool) -> anyhow::Result<Row> {
        self.feed(0, test.depth, chunk())?;
        let step = if test.kind == Kind::Decode { 1 } else { chunk() };
        let first_ms = self.feed(test.depth, test.tokens, step)?;
        self.memory.read_all();
        let (mut times, mut rates) = (Samples(Vec::new()), Samples(vec![self.memory.measure()]));
        for _ in 0..repetitions {
            times.0.push(self.feed(test.depth, test.tokens, step)?);
            rates.0.push(self.memory.measure());
        }
        let (prompt, generated) = match test.kind {
            Kind::Decode => (0, test.tokens),
            Kind::Prompt | Kind::Latency => (test.tokens, 0),
        };
        let name = if test.kind == Kind::Decode { "tg" } else { "pp" };
        let mut row = self.row(name, prompt, generated, &times, step)?;
        row.depth = test.depth;
        row.first_ms = Some(first_ms);
        if profiled {
            // By itself: on a GPU a profile takes time.
            let mut profile = Profile::new(self.model.device());
            let phase = match test.kind {
                Kind::Decode => Phase::Generation,
                Kind::Prompt | Kind::Latency => Phase::Prompt,
            };
            self.pass_through(test.depth, test.tokens, step, Some((&mut profile, phase)))?;
            row.profile = Some(profile.report());
        }
        Ok(row.beside(&rates))
    }

    /// One token at the start of a sequence, and one after it: each for the first time, then again and again.
    fn latency(&mut self, load_ms: f64, repetitions: u32) -> anyhow::Result<Vec<Row>> {
        // Each row is made at once, with the memory as it is then.
        let mut rows = vec![self.row("load", 0, 0, &Samples(vec![load_ms]), 1)?];
        let first = Samples(vec![self.feed(0, 1, 1)?]);
        rows.push(self.row("first_prompt", 1, 0, &first, 1)?);
        let first = Samples(vec![self.feed(1, 1, 1)?]);
        rows.push(self.row("first_decode", 0, 1, &first, 1)?);
        self.memory.read_all();
        let (mut prompts, mut decodes) = (Samples(Vec::new()), Samples(Vec::new()));
        let mut rates = Samples(vec![self.memory.measure()]);
        for _ in 0..repetitions {
            prompts.0.push(self.feed(0, 1, 1)?);
            decodes.0.push(self.feed(1, 1, 1)?);
            rates.0.push(self.memory.measure());
        }
        rows.push(self.row("later_prompt", 1, 0, &prompts, 1)?);
        rows.push(self.row("later_decode", 0, 1, &decodes, 1)?);
        Ok(rows.into_iter().map(|row| row.beside(&rates)).collect())
    }

    /// Adds `tokens` random tokens behind the first `depth` that the cache holds, `step` at a time; gives the
    /// milliseconds that took.
    fn feed(&mut self, depth: usize, tokens: usize, step: usize) -> anyhow::Result<f64> {
        self.pass_through(depth, tokens, step, None)
    }

    /// [`feed`](Self::feed), with the time of each op where there is a profile for it.
    fn pass_through(
        &mut self,
        depth: usize,
        tokens: usize,
        step: usize,
        mut profile: Option<(&mut Profile, Phase)>,
    ) -> anyhow::Result<f64> {
        let vocabulary = self.model.config().vocab_size as u64;
        let drawn: Vec<u32> = (self.drawn..self.drawn + tokens as u64)
            .map(|index| (mix(index) % vocabulary) as u32)
            .collect();
        self.drawn += tokens as u64;
        self.cache.truncate(self.sequence, depth)?;
        let start = Instant::now();
        for tokens in drawn.chunks(step) {
            let alone = [(self.sequence, tokens)];
            let Some((profile, phase)) = &mut profile else {
                self.model
                    .forward_cached(&mut self.cache, &alone, Logits::Last, None)?;
                continue;
            };
            profile.begin(*phase);
            let mut observer = |site, _: &Tensor, _: &Tensor| profile.see(site);
            self.model
                .forward_cached(&mut self.cache, &alone, Logits::Last, Some(&mut observer))?;
        }
        Ok(milliseconds(start))
    }

    fn row(
        &self,
        test: &str,
        prompt: usize,
        generated: usize,
        times: &Samples,
        step: usize,
    ) -> anyhow::Result<Row> {
        let cached = self.cache.len(self.sequence)? as u64;
        let tokens = prompt + generated;
        let passes = (0..tokens).step_by(step).map(|start| step.min(tokens - start));
        let bytes: u64 = passes.map(|tokens| self.model.bytes_read(tokens)).sum();
        Ok(Row {
            test: test.into(),
            setup: self.setup.clone(),
            prompt_tokens: prompt,
            generated_tokens: generated,
            depth: 0,
            kv_cache: self.kv_cache.to_string(),
            tokens_per_s: tokens as f64 * 1e3 / times.median(),
            spread: times.spread(),
            latency_ms: times.median(),
            first_ms: None,
            bytes_per_token: bytes.checked_div(tokens as u64).unwrap_or(0),
            cache_bytes: self.model.cache_bytes_per_token(self.kv_cache)? * cached,
            read_bandwidth_gb_s: 0.0,
            bandwidth_spread: 0.0,
            share_of_bandwidth: 0.0,
            noisy: false,
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

/// Tokens that a latency is measured over at most: a prompt of one, and what follows it.
const LATENCY: usize = 2;

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
