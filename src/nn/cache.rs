//! A cache of rows a token, which grows by blocks.

use super::memory::zeros;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Tokens a block holds.
const BLOCK: usize = 256;

/// What attention has to remember of one sequence: in each layer a row of `width` numbers a token. MLA keeps
/// the latent and the rotary key in it; a model with keys and values can keep both side by side.
///
/// Memory grows by blocks of 256 tokens (by a quarter, once that is more) instead of by concatenation a
/// token, and is kept by [`reset`](Self::reset) for the next conversation. A forward pass *begins* at a
/// position, *appends* in each layer and *commits*: if it fails between, the cache is as it was, or empty where the pass
/// began at position 0.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_mmfp4::nn::TokenCache;
///
/// let mut cache = TokenCache::new(1, 4, 1024, DType::F32, &Device::Cpu);
/// let rows = |n| Tensor::ones((n, 4), DType::F32, &Device::Cpu);
/// cache.begin(0, 5)?;
/// assert_eq!(cache.append(0, &rows(5)?)?.dims(), [5, 4]);
/// cache.commit();
/// cache.begin(5, 2)?; // the next turn
/// assert_eq!(cache.append(0, &rows(2)?)?.dims(), [7, 4]);
/// cache.commit();
/// assert!(cache.begin(6, 1).is_err()); // neither a continuation nor a new sequence
/// cache.begin(0, 3)?; // position 0 starts a new sequence
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Debug)]
pub struct TokenCache {
    layers: Vec<Option<Tensor>>,
    width: usize,
    limit: usize,
    dtype: DType,
    device: Device,
    len: usize,
    capacity: usize,
    pending: usize,
}

impl TokenCache {
    /// An empty cache for `layers` layers, rows of `width` numbers and at most `limit` tokens.
    pub fn new(layers: usize, width: usize, limit: usize, dtype: DType, device: &Device) -> Self {
        Self {
            layers: vec![None; layers],
            width,
            limit,
            dtype,
            device: device.clone(),
            len: 0,
            capacity: 0,
            pending: 0,
        }
    }

    /// An empty one that is like this one.
    pub(crate) fn another(&self) -> Self {
        let (layers, device) = (self.layers.len(), &self.device);
        Self::new(layers, self.width, self.limit, self.dtype, device)
    }

    /// Tokens cached.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most tokens it may hold.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes of memory it holds.
    pub fn size_in_bytes(&self) -> usize {
        let layers = self.layers.iter().flatten().count();
        layers * self.capacity * self.width * self.dtype.size_in_bytes()
    }

    /// Forgets all tokens; the memory is kept for the next sequence.
    pub fn reset(&mut self) {
        (self.len, self.pending) = (0, 0);
    }

    /// Forgets all but the first `len` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] where fewer are cached.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            let expected = format!("at most {}, the tokens cached", self.len);
            return Err(Error::argument("truncate", "len", expected, len.to_string()));
        }
        (self.len, self.pending) = (len, 0);
        Ok(())
    }

    /// Begins a pass that adds `tokens` tokens at `position`: 0 starts a new sequence whatever is cached.
    ///
    /// # Errors
    /// [`Error::Position`] where `position` is neither 0 nor the number of tokens cached;
    /// [`Error::ContextLength`] where they do not fit the limit.
    pub fn begin(&mut self, position: usize, tokens: usize) -> Result<()> {
        let total = self.check(position, tokens)?;
        self.len = position;
        self.pending = tokens;
        if total > self.capacity {
            // What is cached is moved layer by layer as it is appended to: see `append`.
            let grown = self.capacity.saturating_add(self.capacity / 4).max(total);
            let blocks = grown.checked_next_multiple_of(BLOCK);
            self.capacity = blocks.unwrap_or(self.limit).min(self.limit);
        }
        Ok(())
    }

    /// Whether a pass may [begin](Self::begin) so; gives the tokens it ends with.
    pub(crate) fn check(&self, position: usize, tokens: usize) -> Result<usize> {
        if position != 0 && position != self.len {
            return Err(Error::Position {
                position,
                cached: self.len,
            });
        }
        let total = position.saturating_add(tokens);
        if total > self.limit {
            return Err(Error::ContextLength {
                tokens: total,
                limit: self.limit,
            });
        }
        Ok(total)
    }

    /// Writes the pass's rows `[tokens, width]` of a layer; gives a view of all of the layer's rows so far,
    /// `[position + tokens, width]`. The view shares the cache's memory: a later sequence overwrites it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that is not there, or another shape than [`begin`](Self::begin) announced;
    /// those of the device.
    pub fn append(&mut self, layer: usize, rows: &Tensor) -> Result<Tensor> {
        if layer >= self.layers.len() {
            let expected = format!("below {}, the number of layers", self.layers.len());
            return Err(Error::argument("append", "layer", expected, layer.to_string()));
        }
        if rows.dims() != [self.pending, self.width] {
            let expected = format!("[{}, {}]", self.pending, self.width);
            return Err(Error::argument(
                "append",
                "rows",
                expected,
                format!("{:?}", rows.dims()),
            ));
        }
        let storage = match &self.layers[layer] {
            Some(storage) if storage.dim(0)? >= self.capacity => storage.clone(),
            old => {
                let grown = zeros((self.capacity, self.width), self.dtype, &self.device)?;
                if let Some(old) = old.as_ref().filter(|_| self.len > 0) {
                    grown.slice_set(&old.narrow(0, 0, self.len)?, 0, 0)?;
                }
                self.layers[layer] = Some(grown.clone());
                grown
            }
        };
        storage.slice_set(&rows.to_dtype(self.dtype)?.contiguous()?, 0, self.len)?;
        Ok(storage.narrow(0, 0, self.len + self.pending)?)
    }

    /// Ends the pass: its tokens are cached.
    pub fn commit(&mut self) {
        self.len += std::mem::take(&mut self.pending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(limit: usize) -> TokenCache {
        TokenCache::new(2, 3, limit, DType::F32, &Device::Cpu)
    }

    fn rows(from: usize, n: usize) -> Tensor {
        let values = (from * 3..(from + n) * 3).map(|v| v as f32);
        Tensor::from_iter(values, &Device::Cpu)
            .unwrap()
            .reshape((n, 3))
            .unwrap()
    }

    fn add(cache: &mut TokenCache, position: usize, n: usize) -> Result<Vec<Vec<f32>>> {
        cache.begin(position, n)?;
        cache.append(0, &rows(position, n))?;
        let all = cache.append(1, &rows(position, n))?.to_vec2()?;
        cache.commit();
        Ok(all)
    }

    #[test]
    fn growth_keeps_every_row() {
        let mut cache = cache(100_000);
        let (mut position, mut allocations, mut capacity) = (0, 0, 0);
        for n in [1, 254, 1, 1, 300, 2, 5000]
            .into_iter()
            .chain(std::iter::repeat_n(1, 2000))
        {
            let all = add(&mut cache, position, n).unwrap();
            position += n;
            assert_eq!(all.len(), position);
            assert_eq!(all.last().unwrap()[0], (3 * (position - 1)) as f32);
            if cache.capacity != capacity {
                (capacity, allocations) = (cache.capacity, allocations + 1);
            }
        }
        let all = add(&mut cache, position, 1).unwrap();
        assert_eq!(all, rows(0, position + 1).to_vec2::<f32>().unwrap());
        assert!(allocations <= 6, "{allocations} allocations");
        assert_eq!(cache.size_in_bytes(), 2 * 3 * 4 * capacity);
    }

    #[test]
    fn a_failed_pass_leaves_the_cache_as_it_was() {
        let mut cache = cache(64);
        add(&mut cache, 0, 4).unwrap();
        cache.begin(4, 2).unwrap();
        cache.append(0, &rows(4, 2)).unwrap();
        assert!(cache.append(1, &rows(4, 3)).is_err());
        assert_eq!(cache.len(), 4);
        assert_eq!(
            add(&mut cache, 4, 1).unwrap(),
            rows(0, 5).to_vec2::<f32>().unwrap()
        );
    }

    #[test]
    fn positions_continue_start_or_are_refused() {
        let mut cache = cache(64);
        add(&mut cache, 0, 4).unwrap();
        for position in [1, 3, 5] {
            let error = cache.begin(position, 1).unwrap_err().to_string();
            assert!(
                error.contains(&format!("position {position}")) && error.contains("holds 4"),
                "{error}"
            );
        }
        assert!(matches!(
            cache.begin(4, 61),
            Err(Error::ContextLength {
                tokens: 65,
                limit: 64
            })
        ));
        add(&mut cache, 4, 60).unwrap();
        cache.truncate(10).unwrap();
        assert!(cache.truncate(11).is_err());
        assert_eq!(add(&mut cache, 10, 1).unwrap().len(), 11);
        assert_eq!(add(&mut cache, 0, 2).unwrap().len(), 2);
        cache.reset();
        assert!(cache.is_empty() && cache.begin(2, 1).is_err());
    }
}
