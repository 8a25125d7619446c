//! What is measured.

use super::{CHOICES, COLUMNS, Data, EXPERTS, HIDDEN, MLP_WIDTH, ROWS, TOP_K, WIDTH};
use crate::Result;
use crate::cpu::{HeadRows, Pairing, Routing};
use crate::doctor::runner::Runner;
use crate::fp4::Weight;
use crate::ops::{LatentRows, Linear, Orientation, PerHead, RmsNorm, Rope, Route, Router, add_norm};
use crate::random::Random;
use candle_core::{DType, Device, Tensor};

/// Of GLM-4.7-Flash: its heads, what they turn, its latents.
const HEADS: usize = 20;
const ROTARY: usize = 64;
const LATENT: usize = 512;

type Call = Box<dyn Fn() -> Result<()>>;

/// One thing that is measured: calls in turn, of which each moves or computes as much as every other.
pub(super) struct Case {
    pub name: String,
    /// Bytes that a call cannot do without: weights, activations and outputs, each once.
    pub bytes: u64,
    /// Multiplications and additions, where these are the limit rather than the bytes.
    pub operations: Option<u64>,
    pub calls: Vec<Call>,
}

/// What cases are made of.
struct Maker<'a> {
    runner: &'a Runner,
    data: &'a Data,
    dtype: DType,
    device: Device,
    cases: Vec<Case>,
}

/// All cases in a dtype of activations.
pub(super) fn cases(runner: &Runner, data: &Data, dtype: DType) -> Result<Vec<Case>> {
    let mut maker = Maker {
        runner,
        data,
        dtype,
        device: runner.device(),
        cases: Vec::new(),
    };
    maker.products()?;
    maker.experts()?;
    maker.rows()?;
    maker.many_rows()?;
    Ok(maker.cases)
}

impl Maker<'_> {
    fn noise(&self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        let mut random = Random::new(4);
        let len: usize = dims.iter().product();
        let values: Vec<_> = (0..len).map(|_| (random.uniform() - 0.5) as f32).collect();
        let x = Tensor::from_vec(values, dims, &Device::Cpu)?;
        Ok(x.to_dtype(dtype)?.to_device(&self.device)?)
    }

    fn activations(&self, elements: usize) -> u64 {
        (elements * self.dtype.size_in_bytes()) as u64
    }

    fn add(&mut self, name: &str, bytes: u64, operations: Option<usize>, calls: Vec<Call>) {
        let name = match self.runner.is_cpu() {
            true => name.into(),
            false => format!("{name}, {:?}", self.dtype),
        };
        self.cases.push(Case {
            name,
            bytes,
            operations: operations.map(|count| count as u64),
            calls,
        });
    }

    /// A row of activations: weights are what is read.
    fn products(&mut self) -> Result<()> {
        let of_weight = self.data.weights[0].size_in_bytes() as u64;
        let x = self.noise(&[1, COLUMNS], self.dtype)?;
        let linear = calls(&self.data.weights, |weight| {
            let (op, x) = (Linear::new(weight.clone(), None)?, x.clone());
            Ok(move || op.forward(&x).map(drop))
        })?;
        let bytes = of_weight + self.activations(COLUMNS + ROWS);
        self.add("linear, 1 row", bytes, None, linear);

        let (head, x) = (&self.data.head, self.noise(&[1, HIDDEN], self.dtype)?);
        let head_calls = calls(std::slice::from_ref(head), |weight| {
            let (op, x) = (Linear::new(weight.clone(), None)?, x.clone());
            Ok(move || op.forward(&x).map(drop))
        })?;
        let bytes = head.size_in_bytes() as u64 + self.activations(HIDDEN + ROWS);
        self.add("a head in BF16, 1 row", bytes, None, head_calls);

        let heads = 64;
        let len = ROWS / heads;
        let rows = HeadRows {
            heads,
            stride: len,
            start: 0,
            len,
        };
        for (name, orientation, from, to) in [
            ("per head", Orientation::Ordinary, COLUMNS, len),
            ("per head, transposed", Orientation::Transposed, len, COLUMNS),
        ] {
            let x = self.noise(&[1, heads, from], self.dtype)?;
            let per_head = calls(&self.data.weights, |weight| {
                let (op, x) = (PerHead::new(weight.clone(), rows, orientation)?, x.clone());
                Ok(move || op.forward(&x).map(drop))
            })?;
            let bytes = of_weight + self.activations(heads * (from + to));
            self.add(name, bytes, None, per_head);
        }
        Ok(())
    }

    /// A token through router, experts, and an MLP.
    fn experts(&mut self) -> Result<()> {
        let x = self.noise(&[1, HIDDEN], self.dtype)?;
        let routing = Routing {
            top_k: TOP_K,
            n_group: 1,
            topk_group: 1,
            normalize: true,
            scaling_factor: 1.8,
        };
        let gate = &self.data.gate;
        let route = Route::new(routing, vec![0.0; CHOICES])?;
        let router = Router::new(Linear::new(gate.clone(), None)?, route);
        let slots = TOP_K * (size_of::<u32>() + size_of::<f32>());
        let of_router = gate.size_in_bytes() + 2 * CHOICES * size_of::<f32>() + slots;
        let input = x.clone();
        let router: Call = Box::new(move || Ok(router.forward(&input).map(drop)?));
        let bytes = of_router as u64 + self.activations(HIDDEN);
        self.add("router, 1 token", bytes, None, vec![router]);

        let moe = &self.data.moe;
        let weights = Tensor::full(0.25f32, (1, TOP_K), &self.device)?;
        let of_expert = moe.shared()[0].size_in_bytes() as u64;
        let tokens: Vec<_> = (0..EXPERTS / TOP_K).collect();
        let mixture = calls(&tokens, |token| {
            let chosen: Vec<_> = (0..TOP_K).map(|slot| (token * TOP_K + slot) as u32).collect();
            let ids = Tensor::from_vec(chosen, (1, TOP_K), &self.device)?;
            let (op, x, weights) = (moe.clone(), x.clone(), weights.clone());
            Ok(move || op.forward(&x, &ids, &weights).map(drop))
        })?;
        let bytes = (TOP_K + 1) as u64 * of_expert + self.activations(2 * HIDDEN) + slots as u64;
        self.add("mixture of experts, 1 token", bytes, None, mixture);

        let mlp = calls(&self.data.mlps, |mlp| {
            let (op, x) = (mlp.clone(), x.clone());
            Ok(move || op.forward(&x).map(drop))
        })?;
        // What is between gate and down is kept in F32.
        let between = (2 * MLP_WIDTH * size_of::<f32>()) as u64;
        let bytes =
            self.data.mlps[0].weights().size_in_bytes() as u64 + self.activations(2 * HIDDEN) + between;
        self.add("MLP, 1 row", bytes, None, mlp);
        Ok(())
    }

    /// What reads activations more than weights.
    fn rows(&mut self) -> Result<()> {
        // On a CPU, tens of megabytes of output would measure how fast the system hands out pages.
        let m = if self.runner.is_cpu() { 256 } else { 16_384 };
        let of_weight = |len: usize| (len * size_of::<f32>()) as u64;
        let x = self.noise(&[m, HIDDEN], self.dtype)?;
        let norm = RmsNorm::new(vec![1.0; HIDDEN], 1e-5)?;
        let (op, input) = (norm.clone(), x.clone());
        let alone: Call = Box::new(move || Ok(op.forward(&input).map(drop)?));
        let bytes = self.activations(2 * m * HIDDEN) + of_weight(HIDDEN);
        self.add("RMS norm", bytes, None, vec![alone]);

        let delta = self.noise(&[m, HIDDEN], self.dtype)?;
        let added: Call = Box::new(move || Ok(add_norm(&x, &delta, &norm).map(drop)?));
        let bytes = self.activations(4 * m * HIDDEN) + of_weight(HIDDEN);
        self.add("RMS norm of a sum", bytes, None, vec![added]);

        let cos = self.noise(&[m, ROTARY / 2], DType::F32)?;
        let sin = self.noise(&[m, ROTARY / 2], DType::F32)?;
        let of_angles = of_weight(m * ROTARY);
        let queries = self.noise(&[m, HEADS, ROTARY], self.dtype)?;
        let (op, angles, input) = (
            Rope::new(Pairing::Interleaved),
            (cos.clone(), sin.clone()),
            queries.clone(),
        );
        let rope: Call = Box::new(move || Ok(op.forward(&input, &angles.0, &angles.1).map(drop)?));
        let bytes = self.activations(2 * m * HEADS * ROTARY) + of_angles;
        self.add("RoPE", bytes, None, vec![rope]);

        let op = LatentRows::new(RmsNorm::new(vec![1.0; LATENT], 1e-5)?, Pairing::Interleaved);
        let kv = self.noise(&[m, LATENT + ROTARY], self.dtype)?;
        let latent: Call =
            Box::new(move || Ok(op.forward_with_queries(&kv, &queries, &cos, &sin).map(drop)?));
        let elements = 2 * m * (LATENT + ROTARY + HEADS * ROTARY);
        let bytes = self.activations(elements) + of_angles + of_weight(LATENT);
        self.add("latent rows", bytes, None, vec![latent]);
        Ok(())
    }

    /// What computing is the limit for: a prompt.
    fn many_rows(&mut self) -> Result<()> {
        // A CPU's plain code would take seconds for what a GPU does in a moment.
        let on_cpu = self.runner.is_cpu();
        let (n, k, m) = match on_cpu {
            true => (HIDDEN, WIDTH, 64),
            false => (ROWS, COLUMNS, 512),
        };
        let weights: Vec<Weight> = match on_cpu {
            true => self.data.moe.experts()[..4]
                .iter()
                .map(|expert| expert.down.clone())
                .collect(),
            false => self.data.weights.clone(),
        };
        let x = self.noise(&[m, k], self.dtype)?;
        let linear = calls(&weights, |weight| {
            let (op, x) = (Linear::new(weight.clone(), None)?, x.clone());
            Ok(move || op.forward(&x).map(drop))
        })?;
        let bytes = weights[0].size_in_bytes() as u64 + self.activations(m * (k + n));
        self.add(&format!("linear, {m} rows"), bytes, Some(2 * m * n * k), linear);

        let m = if on_cpu { 16 } else { 512 };
        let op = self.data.moe.clone();
        let x = self.noise(&[m, HIDDEN], self.dtype)?;
        let chosen = |slot: usize| ((slot / TOP_K + slot % TOP_K * (EXPERTS / TOP_K)) % EXPERTS) as u32;
        let ids: Vec<u32> = (0..m * TOP_K).map(chosen).collect();
        let ids = Tensor::from_vec(ids, (m, TOP_K), &self.device)?;
        let weights = Tensor::full(0.25f32, (m, TOP_K), &self.device)?;
        let mixture: Call = Box::new(move || Ok(op.forward(&x, &ids, &weights).map(drop)?));
        let of_expert = self.data.moe.shared()[0].size_in_bytes() as u64;
        let bytes = (EXPERTS + 1) as u64 * of_expert + self.activations(2 * m * HIDDEN);
        let operations = 3 * 2 * m * (TOP_K + 1) * WIDTH * HIDDEN;
        self.add(
            &format!("mixture of experts, {m} tokens"),
            bytes,
            Some(operations),
            vec![mixture],
        );
        Ok(())
    }
}

/// A call for each of `items`.
fn calls<T, F>(items: &[T], make: impl Fn(&T) -> Result<F>) -> Result<Vec<Call>>
where
    F: Fn() -> candle_core::Result<()> + 'static,
{
    let boxed = |call: F| -> Call { Box::new(move || Ok(call()?)) };
    items.iter().map(|item| make(item).map(boxed)).collect()
}
