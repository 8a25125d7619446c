//! Sequences in the kind of cache that was chosen.

use super::config::Config;
use super::decoder::Model;
use super::forward::{Logits, Sequence};
use crate::checkpoint::LoadOptions;
use crate::kv::{BlockStatistics, CacheKind, RowLayout, SequenceId};
use crate::models::observe::Observer;
use crate::nn::{CacheSize, PagedKvCache, TokenCache};
use crate::ops::{self, PagedAttention};
use crate::{Error, Result, memory};
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;

const OP: &str = "kv-cache";

/// Tokens that a cache has room for where neither [`LoadOptions::kv_size`](crate::checkpoint::LoadOptions::kv_size) nor the
/// machine says otherwise.
const CONTEXT: usize = 8192;

/// The least, in tokens, that a cache on the CPU may grow to where the model's context is shorter: room for a batch.
const BATCH: usize = 65_536;

/// Any number of sequences in the cache of a user's choice: in [blocks](PagedKvCache) that they share, or each in a
/// [contiguous cache](TokenCache) of its own. Made by [`Model::new_kv_cache`], run by [`Model::forward_cached`].
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has one of them")]
pub enum Cache {
    /// Blocks.
    Paged(PagedKvCache),
    /// The reference that blocks are compared with.
    Contiguous(ContiguousCaches),
}

/// A contiguous cache a sequence.
#[derive(Debug)]
pub struct ContiguousCaches {
    /// What a new one is like.
    empty: TokenCache,
    sequences: HashMap<SequenceId, TokenCache>,
    next: u64,
    /// The most tokens of all sequences together.
    limit: Option<usize>,
}

impl ContiguousCaches {
    fn find(&self, sequence: SequenceId) -> Result<&TokenCache> {
        self.sequences.get(&sequence).ok_or_else(|| missing(sequence))
    }

    /// Tokens of all sequences.
    fn tokens(&self) -> usize {
        self.sequences.values().map(TokenCache::len).sum()
    }

    fn check_room(&self, sequences: &[(SequenceId, &[u32])]) -> Result<()> {
        let new = sequences.iter().map(|(_, tokens)| tokens.len());
        let total = new.fold(self.tokens(), usize::saturating_add);
        match self.limit {
            Some(limit) if total > limit => {
                let expected = format!(
                    "at most {limit} tokens of all sequences, the size of the cache: make it larger, or ask for less"
                );
                Err(Error::argument(OP, "sequences", expected, total.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// Takes the caches of a pass's sequences out and puts them back when it has ended.
    fn forward(
        &mut self,
        model: &Model,
        sequences: &[(SequenceId, &[u32])],
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Tensor> {
        self.check_room(sequences)?;
        let mut taken = Vec::with_capacity(sequences.len());
        for (id, _) in sequences {
            taken.push(self.sequences.remove(id).ok_or_else(|| missing(*id)));
        }
        let mut passed = Err(Error::EmptyPrompt);
        if taken.iter().all(Result::is_ok) {
            let inputs = taken.iter_mut().flatten().zip(sequences);
            let mut inputs: Vec<_> = inputs
                .map(|(cache, (_, tokens))| Sequence {
                    tokens,
                    position: cache.len(),
                    cache: Some(cache),
                })
                .collect();
            passed = model.forward_batch(&mut inputs, logits, observer);
        }
        for ((id, _), cache) in sequences.iter().zip(taken) {
            match cache {
                Ok(cache) => _ = self.sequences.insert(*id, cache),
                Err(error) => passed = Err(error),
            }
        }
        passed
    }
}

fn missing(sequence: SequenceId) -> Error {
    let expected = "one that was started and not freed, and each once";
    Error::argument(OP, "sequence", expected, sequence.to_string())
}

impl Cache {
    /// A new sequence that is to begin with these tokens, and how many of them it has already; see
    /// [`PagedKvCache::start`]. Contiguous caches share nothing.
    pub fn start(&mut self, prompt: &[u32]) -> (SequenceId, usize) {
        match self {
            Self::Paged(cache) => cache.start(prompt),
            Self::Contiguous(all) => {
                let id = SequenceId::new(all.next);
                all.next += 1;
                all.sequences.insert(id, all.empty.another());
                (id, 0)
            }
        }
    }

    /// Says that what a sequence goes on with, up to `len` tokens in all, is one prompt; see [`PagedKvCache::announce`].
    /// Over contiguous caches each pass is computed as it comes.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn announce(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        match self {
            Self::Paged(cache) => cache.announce(sequence, len),
            Self::Contiguous(all) => all.find(sequence).map(drop),
        }
    }

    /// How many of these tokens [`start`](Self::start) would find.
    pub fn cached(&self, prompt: &[u32]) -> usize {
        match self {
            Self::Paged(cache) => cache.cached(prompt),
            Self::Contiguous(_) => 0,
        }
    }

    /// Forgets all but the first `len` tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] where it has fewer, or is not there.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        match self {
            Self::Paged(cache) => cache.truncate(sequence, len),
            Self::Contiguous(all) => {
                let cache = all.sequences.get_mut(&sequence);
                cache.ok_or_else(|| missing(sequence))?.truncate(len)
            }
        }
    }

    /// Gives up a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn free(&mut self, sequence: SequenceId) -> Result<()> {
        match self {
            Self::Paged(cache) => cache.free(sequence),
            Self::Contiguous(all) => {
                let cache = all.sequences.remove(&sequence);
                cache.map(drop).ok_or_else(|| missing(sequence))
            }
        }
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn len(&self, sequence: SequenceId) -> Result<usize> {
        match self {
            Self::Paged(cache) => cache.len(sequence),
            Self::Contiguous(all) => Ok(all.find(sequence)?.len()),
        }
    }

    /// Whether a sequence has no tokens.
    ///
    /// # Errors
    /// As [`len`](Self::len).
    pub fn is_empty(&self, sequence: SequenceId) -> Result<bool> {
        Ok(self.len(sequence)? == 0)
    }

    /// Bytes that a sequence takes: of its blocks, whoever shares them, or of its own memory.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sequence that is not there.
    pub fn bytes_of(&self, sequence: SequenceId) -> Result<usize> {
        match self {
            Self::Paged(cache) => cache.bytes_of(sequence),
            Self::Contiguous(all) => Ok(all.find(sequence)?.size_in_bytes()),
        }
    }

    /// Bytes of memory it holds.
    pub fn size_in_bytes(&self) -> usize {
        match self {
            Self::Paged(cache) => cache.size_in_bytes(),
            Self::Contiguous(all) => all.sequences.values().map(TokenCache::size_in_bytes).sum(),
        }
    }

    /// How blocks are used, where there are any.
    pub fn statistics(&self) -> Option<BlockStatistics> {
        match self {
            Self::Paged(cache) => Some(cache.statistics()),
            Self::Contiguous(_) => None,
        }
    }

    /// How many sequences of so many tokens still find room; `None` where nothing limits them.
    pub(crate) fn room_for(&self, tokens: usize) -> Option<usize> {
        match self {
            Self::Paged(cache) => {
                let blocks = tokens.div_ceil(cache.layout().block_tokens()).max(1);
                Some(cache.statistics().free / blocks)
            }
            Self::Contiguous(all) => {
                let free = all.limit?.saturating_sub(all.tokens());
                Some(free / tokens.max(1))
            }
        }
    }
}

impl Model {
    /// A cache of this kind, without sequences. Blocks take all their memory now; `None`: on the CPU a
    /// quarter of the memory that is available, up to the model's context or 65,536 tokens, on a GPU 8,192 tokens. Contiguous
    /// caches grow with their tokens, to so many of all sequences where a size is given.
    ///
    /// # Errors
    /// As [`new_paged_cache`](Self::new_paged_cache); [`Error::Argument`] for bytes of a contiguous cache.
    pub fn new_kv_cache(&self, kind: CacheKind, size: Option<CacheSize>) -> Result<Cache> {
        match kind {
            CacheKind::Paged(format) => {
                let size = match size {
                    Some(size) => size,
                    None => {
                        let row = self.cache_bytes_per_token(kind)?;
                        default_size(&self.config, row, &self.device, memory::available())
                    }
                };
                Ok(Cache::Paged(self.new_paged_cache(format, size)?))
            }
            CacheKind::Contiguous => Ok(Cache::Contiguous(ContiguousCaches {
                empty: self.new_cache(),
                sequences: HashMap::new(),
                next: 0,
                limit: match size {
                    None => None,
                    Some(CacheSize::Tokens(tokens)) => Some(tokens),
                    Some(CacheSize::Bytes(_)) => return Err(bytes_of_contiguous()),
                },
            })),
        }
    }

    /// Runs new tokens of sequences in one pass, each behind what the cache holds of it, and adds them to it: as
    /// [`forward_paged`](Self::forward_paged), whatever kind of cache it is.
    ///
    /// # Errors
    /// As [`forward_paged`](Self::forward_paged).
    pub fn forward_cached(
        &self,
        cache: &mut Cache,
        sequences: &[(SequenceId, &[u32])],
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Tensor> {
        match cache {
            Cache::Paged(cache) => self.forward_paged(cache, sequences, logits, observer),
            Cache::Contiguous(all) => all.forward(self, sequences, logits, observer),
        }
    }
}

/// Bytes that a token takes in all layers of a cache of this kind; contiguous ones are of the activations' dtype.
///
/// # Errors
/// [`Error::Argument`] for a latent whose width the format does not take.
pub(super) fn cache_bytes_per_token(config: &Config, kind: CacheKind, activations: DType) -> Result<u64> {
    let (latent, rope) = (config.kv_lora_rank, config.qk_rope_head_dim);
    let row = kind.latent_bytes(latent, rope, activations.size_in_bytes())?;
    Ok((row as u64).saturating_mul(config.layers.len() as u64))
}

fn bytes_of_contiguous() -> Error {
    let expected = "a cache in blocks: contiguous ones grow with their tokens (leave out the size, give it in tokens, or take \
                    another cache)";
    Error::argument(OP, "size", expected, "contiguous")
}

/// Bytes of the cache that the options ask for or, where they do not, of the one that a GPU has.
///
/// # Errors
/// As [`cache_bytes_per_token`]; [`Error::Argument`] for bytes of a contiguous cache.
pub(super) fn cache_bytes(config: &Config, options: &LoadOptions, activations: DType) -> Result<u64> {
    let row = cache_bytes_per_token(config, options.kv_cache, activations)?;
    let of = |tokens: usize| row.saturating_mul(tokens as u64);
    match (options.kv_size, options.kv_cache) {
        (Some(CacheSize::Bytes(_)), CacheKind::Contiguous) => Err(bytes_of_contiguous()),
        (Some(CacheSize::Bytes(bytes)), _) => Ok(bytes),
        (Some(CacheSize::Tokens(tokens)), _) => Ok(of(tokens)),
        (None, _) => Ok(of(CONTEXT.min(config.max_position_embeddings))),
    }
}

/// Refuses rows in blocks that a device which runs launch plans has no kernel for: at the first token that would be late.
///
/// # Errors
/// [`Error::Argument`] says how wide they may be, and what takes any.
pub(super) fn check_kernels(layout: &RowLayout, device: &Device) -> Result<()> {
    if !ops::kernels_run_on(device) {
        return Ok(());
    }
    PagedAttention::check_kernels(layout).map_err(|error| match error {
        Error::Argument { expected, found, .. } => {
            let expected = format!(
                "{expected}: wider ones have no Metal kernel in a cache of blocks; take --kv-cache contiguous, or compute on \
                 the CPU (--device cpu)"
            );
            Error::argument(OP, "kv_cache", expected, found)
        }
        other => other,
    })
}

/// How large a cache is whose rows take `row` bytes in all layers, where nobody says it. On a GPU memory is taken when the
/// cache is made: 8,192 tokens. On the CPU a cache that nobody writes to costs nothing, so that it may have a quarter of
/// what is `available`, up to the model's context or 65,536 tokens, whichever is more.
fn default_size(config: &Config, row: u64, device: &Device, available: Option<u64>) -> CacheSize {
    let context = config.max_position_embeddings;
    match available.filter(|_| device.is_cpu()) {
        None => CacheSize::Tokens(CONTEXT.min(context)),
        Some(available) => {
            let most = context.max(BATCH);
            let tokens = usize::try_from(available / 4 / row.max(1)).unwrap_or(most);
            CacheSize::Tokens(tokens.clamp(1, most))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::CacheFormat;
    use crate::models::glm4_moe_lite::config::tests_support::flash;

    fn demo() -> Model {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model");
        let (model, _) = Model::from_folder(folder, &Default::default(), &Device::Cpu).unwrap();
        model
    }

    #[test]
    fn without_a_word_a_cache_takes_a_quarter_of_what_there_is() {
        let config = flash();
        let of = |available| default_size(&config, 54_144, &Device::Cpu, available);
        assert_eq!(of(Some(16 << 30)), CacheSize::Tokens((4 << 30) / 54_144));
        assert_eq!(
            of(Some(1 << 40)),
            CacheSize::Tokens(config.max_position_embeddings)
        );
        assert_eq!(of(Some(0)), CacheSize::Tokens(1));
        assert_eq!(of(None), CacheSize::Tokens(8192));
        let short = Config {
            max_position_embeddings: 2048,
            ..config
        };
        let of = |available| default_size(&short, 1920, &Device::Cpu, available);
        assert_eq!(of(Some(1 << 40)), CacheSize::Tokens(65_536));
        assert_eq!(of(None), CacheSize::Tokens(2048));
    }

    #[test]
    #[cfg(msl_host)]
    fn latents_that_no_kernel_takes_are_refused_at_load() {
        use crate::checkpoint::{Checkpoint, ModelFiles};
        let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model"));
        let checkpoint = Checkpoint::open(folder).unwrap();
        let config = Config {
            kv_lora_rank: 576,
            ..Config::from_files(&ModelFiles::folder(folder)).unwrap()
        };
        let load = |kv_cache| {
            let options = LoadOptions {
                kv_cache,
                ..LoadOptions::default()
            };
            Model::load(config.clone(), &checkpoint, &options, &Device::Cpu)
                .unwrap_err()
                .to_string()
        };
        // On the CPU what is at fault is a weight, which is of the demo model's width.
        assert!(
            load(CacheKind::default()).contains("kv_a_"),
            "{}",
            load(CacheKind::default())
        );
        let host = std::sync::Arc::new(crate::metal::host::Host::recorder(false));
        host.install(|| {
            let error = load(CacheKind::default());
            for part in ["`kv_cache`", "512", "576", "--kv-cache contiguous"] {
                assert!(error.contains(part), "{error}");
            }
            assert!(load(CacheKind::Contiguous).contains("kv_a_"));
            // Who makes a cache of another kind than was loaded for hears of it then.
            let layout = config.cache_layout(CacheFormat::F16).unwrap();
            assert!(check_kernels(&layout, &Device::Cpu).is_err());
        });
    }

    #[test]
    fn sequences_have_the_same_life_in_either_kind() {
        let model = demo();
        for kind in [CacheKind::Contiguous, CacheFormat::F16.into()] {
            let mut cache = model.new_kv_cache(kind, Some(CacheSize::Tokens(64))).unwrap();
            let (a, _) = cache.start(&[]);
            let (b, _) = cache.start(&[]);
            let run = |cache: &mut Cache, sequences: &[(SequenceId, &[u32])]| {
                model.forward_cached(cache, sequences, Logits::Last, None)
            };
            assert_eq!(
                run(&mut cache, &[(a, &[1, 2, 3]), (b, &[4])]).unwrap().dims(),
                [2, 4096]
            );
            // What fails leaves both.
            for bad in [
                &[(a, &[5][..]), (b, &[])][..],
                &[(a, &[5]), (a, &[6])],
                &[(a, &[5]), (b, &[u32::MAX])],
                &[],
            ] {
                assert!(run(&mut cache, bad).is_err());
                assert_eq!((cache.len(a).unwrap(), cache.len(b).unwrap()), (3, 1));
            }
            run(&mut cache, &[(b, &[5]), (a, &[6])]).unwrap();
            cache.truncate(a, 2).unwrap();
            assert!(cache.truncate(a, 3).is_err());
            assert_eq!((cache.len(a).unwrap(), cache.len(b).unwrap()), (2, 2));
            assert!(cache.bytes_of(a).unwrap() > 0 && cache.size_in_bytes() > 0);
            cache.free(a).unwrap();
            assert!(cache.len(a).is_err() && cache.free(a).is_err() && cache.truncate(a, 0).is_err());
            assert!(run(&mut cache, &[(b, &[7]), (a, &[8])]).is_err());
            assert_eq!(cache.len(b).unwrap(), 2);
            assert_eq!(cache.statistics().is_some(), kind != CacheKind::Contiguous);
            // A size is one in either kind: 2 of 64 tokens are there.
            assert_eq!((cache.room_for(16), cache.room_for(64)), (Some(3), Some(0)));
            let many = vec![1; 63];
            assert!(run(&mut cache, &[(b, &many)]).is_err());
            assert_eq!(cache.len(b).unwrap(), 2);
            run(&mut cache, &[(b, &many[1..])]).unwrap();
        }
    }
}
