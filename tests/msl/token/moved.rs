//! Bytes that a decoded token moves, from its launches.

use super::{ACTIVATION, Both, DECODED, VOCABULARY, head, size, sum};
use candle_mmfp4::kv::CacheFormat;
use candle_mmfp4::metal::host::Recorded;
use candle_mmfp4::metal::plan::{Binding, Launch};
use std::ops::Range;

/// Bytes that launches of a decoded token move.
#[derive(Clone, Copy, Default)]
pub struct Moved {
    pub dispatches: u64,
    pub weights: u64,
    pub cache: u64,
    pub activations: u64,
    /// What attention over splits of the context leaves, written and read.
    pub parts: u64,
    /// Of all that, what is read.
    pub read: u64,
}

impl Moved {
    /// Of a layer, for a token that attends to `total`, itself included, with rows of so many bytes.
    pub fn of(layer: &[Launch], total: usize, row: u64) -> Self {
        let kernels: Vec<_> = layer.iter().map(|launch| launch.kernel.as_str()).collect();
        assert!(layer.len() <= DECODED.len(), "{kernels:?}");
        let launch = |kernel: &str| match kernels.iter().position(|name| name.starts_with(kernel)) {
            Some(index) => &layer[index],
            None => panic!("no {kernel}: {kernels:?}"),
        };
        assert_cache_once(launch("paged_latents"), total, row);
        let work = |kernel: &str| launch(kernel).work;
        let (append, attention, merged) = (work("append_latents"), work("paged_latents"), work("merged_"));
        let cached = total as u64 * row;
        let turned = size("num_attention_heads") * size("qk_rope_head_dim") * ACTIVATION;
        assert_eq!(append.written, row + turned);
        // What is written and read again is the parts.
        assert_eq!(attention.written, merged.read);
        let read = sum(layer, |work| work.read);
        let (cache, parts) = (cached + row, attention.written + merged.read);
        let weights = sum(layer, |work| work.weights);
        Self {
            dispatches: layer.len() as u64,
            weights,
            cache,
            activations: read + sum(layer, |work| work.written) - cache - parts,
            parts,
            read: weights + read,
        }
    }

    fn plus(self, times: u64, other: Self) -> Self {
        Self {
            dispatches: self.dispatches + times * other.dispatches,
            weights: self.weights + times * other.weights,
            cache: self.cache + times * other.cache,
            activations: self.activations + times * other.activations,
            parts: self.parts + times * other.parts,
            read: self.read + times * other.read,
        }
    }

    pub fn all(self) -> u64 {
        self.weights + self.cache + self.activations + self.parts
    }

    /// What is read, of the weights and of what is cached.
    pub fn share(self, cached: u64) -> f64 {
        self.read as f64 / (self.weights + cached) as f64
    }
}

/// Requires that no two buffers of a launch have a byte in common, from where each begins to the end of its memory. Codes and scales
/// of experts are both told by a table of where they are in the file, whose tensors have no byte in common: these buffers are
/// to begin apart.
pub fn each_range_once(recorded: &Recorded) {
    for launch in &recorded.plan.launches {
        let mut seen: Vec<(usize, Range<usize>)> = Vec::new();
        for (index, binding) in &launch.bindings {
            if let Binding::Read { operand, offset } | Binding::Write { operand, offset } = binding {
                let found = &recorded.operands[*operand];
                let range = found.address + offset..found.address + found.len;
                for (other, taken) in &seen {
                    let by_table = launch.kernel.starts_with("moe_") && [*other, *index] == [0, 1];
                    assert!(
                        range.end <= taken.start
                            || taken.end <= range.start
                            || by_table && range.start != taken.start,
                        "{}: buffers {other} and {index} have bytes in common",
                        launch.kernel
                    );
                }
                seen.push((*index, range));
            }
        }
    }
}

/// Requires of attention over so many tokens, with rows of so many bytes, that what it reads is each row of the cache once, by one
/// threadgroup of all heads, and beside that the queries and where the rows lie.
fn assert_cache_once(attention: &Launch, total: usize, row: u64) {
    let heads = size("num_attention_heads");
    let width = size("kv_lora_rank") + size("qk_rope_head_dim");
    // The token's position and where its table begins; a table of blocks of 16 rows.
    let index = (2 + total.div_ceil(16) as u64) * 4;
    let read_besides = heads * width * ACTIVATION + index;
    assert_eq!(
        attention.work.read - read_besides,
        total as u64 * row,
        "{total} rows"
    );
    assert_eq!(attention.threadgroups[1..], [1, 1]);
}

/// What a decoded token of GLM-4.7-Flash moves, part by part and as a whole.
pub struct Token {
    pub parts: [(String, Moved); 4],
    pub all: Moved,
}

impl Token {
    pub fn new(both: &Both, total: usize, format: CacheFormat) -> Self {
        let (one, two, sparse) = both.pass(1, total, format);
        let (layers, hidden) = (size("num_hidden_layers"), size("hidden_size"));
        // A row of BF16 numbers, which the host decodes and hands over.
        let embedding = Moved {
            weights: hidden * 2,
            activations: hidden * ACTIVATION,
            read: hidden * 2,
            ..Moved::default()
        };
        let (launches, head_bytes) = head(size("vocab_size"), true);
        let read = sum(&launches, |work| work.weights + work.read);
        let head_moved = Moved {
            dispatches: launches.len() as u64,
            weights: sum(&launches, |work| work.weights),
            activations: sum(&launches, |work| work.read + work.written),
            read,
            ..Moved::default()
        };
        let dense = Moved::of(&one.launches[..one.launches.len() - 1], total, one.cache);
        let sparse = Moved::of(&sparse, total, one.cache);
        let none = Moved::default();
        let parts = [
            ("a row of the embedding".into(), embedding),
            ("layer 0, with a dense MLP".into(), dense),
            (
                format!("{} sparse layers", layers - 1),
                none.plus(layers - 1, sparse),
            ),
            ("output head in MMFP4".into(), head_moved),
        ];
        let all = parts.iter().fold(none, |all, (_, part)| all.plus(1, *part));
        // Counted apart from the plans: what models of one layer and of two say, with another head.
        let (_, small_head) = head(VOCABULARY, true);
        let needed = one.weights - small_head + head_bytes + (layers - 1) * (two.weights - one.weights);
        assert_planned(all.weights, needed);
        Self { parts, all }
    }
}

/// Requires that plans read the weights that a token needs, to a thousandth.
pub fn assert_planned(planned: u64, weights: u64) {
    assert!(
        planned.abs_diff(weights) * 1000 < weights,
        "plans read {planned} bytes of weights, of {weights} that a token needs"
    );
}
