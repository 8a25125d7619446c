//! When Candle's fused attention kernels for Metal (candle-nn 0.11.1, `ops::sdpa`) may be used, and how.
//!
//! What they need, read from their sources (`kernels/sdpa.rs` and `scaled_dot_product_attention.metal` of
//! candle-metal-kernels 0.11.1):
//!
//! - one width for queries, keys and values, of a list; one query has a kernel of its own with a shorter list, though the
//!   check in front of it is that of the longer one;
//! - tiles of queries and keys in 32 KiB of threadgroup memory: in F32 a width of 256 does not fit, which nothing checks;
//! - contiguous queries (one query), contiguous rows of keys and values;
//! - the causal flag rather than a mask: with both, some rows are masked whole and become NaN;
//! - a number of queries that is a multiple of [`QUERIES`]. Otherwise the last tile of queries goes on to tiles of keys
//!   behind the last, reads what lies there, and multiplies it by zero: NaN if it is one. And where the number of keys is a
//!   multiple of [`KEYS`] but that of the keys before the first query is not, the causal mask is left out of one tile of
//!   keys in three: queries see tokens that come after them. Queries and keys that are padded with zeros at their ends, by
//!   the same number, mend both: padded keys come after every query that counts.

use crate::Result;
use candle_core::{D, DType, Tensor};

/// Queries of a tile.
const QUERIES: usize = 32;
/// Keys of a tile: 16 from a width of 128 on, else 32.
const KEYS: usize = 16;
/// Widths that the kernel for one query has.
const ONE: [usize; 6] = [32, 64, 96, 128, 256, 512];
/// Widths that the kernel for more has. (512 is there in half precision, with other tiles.)
const MANY: [usize; 7] = [32, 64, 72, 80, 96, 128, 256];

/// How a fused kernel is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fused {
    /// Rows of zeros behind queries, keys and values.
    rows: usize,
    /// Zeros behind each value.
    value: usize,
}

impl Fused {
    /// For `n` new queries of this width and values of that; `None` where no kernel fits.
    pub fn choose(n: usize, width: usize, value_width: usize, dtype: DType) -> Option<Self> {
        let listed = match n {
            0 => return None,
            1 => ONE.contains(&width),
            _ => {
                MANY.contains(&width) && tiles(width, dtype) <= crate::metal::plan::limits::THREADGROUP_MEMORY
            }
        };
        let float = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
        (listed && float && value_width <= width).then(|| Self {
            rows: if n == 1 {
                0
            } else {
                n.next_multiple_of(QUERIES) - n
            },
            value: width - value_width,
        })
    }

    /// `[1, heads, rows, width]` as the kernel needs them.
    pub fn padded(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let rows = |tensor: &Tensor| -> candle_core::Result<_> {
            match self.rows {
                0 => tensor.contiguous(),
                rows => tensor.pad_with_zeros(2, 0, rows)?.contiguous(),
            }
        };
        let values = match self.value {
            0 => values.clone(),
            zeros => values.pad_with_zeros(D::Minus1, 0, zeros)?,
        };
        Ok((rows(queries)?, rows(keys)?, rows(&values)?))
    }

    /// The part of `[1, heads, rows, width]` that counts.
    pub fn trimmed(&self, output: &Tensor, n: usize) -> Result<Tensor> {
        let width = output.dim(D::Minus1)? - self.value;
        Ok(output.narrow(2, 0, n)?.narrow(D::Minus1, 0, width)?)
    }
}

/// Bytes of threadgroup memory that the kernel for many queries takes.
fn tiles(width: usize, dtype: DType) -> usize {
    let size = dtype.size_in_bytes();
    let pad = 16 / size;
    let keys = if width < 128 { 32 } else { KEYS };
    let shared = ((keys + pad) * width).max(keys * (width + pad));
    (QUERIES * (width + pad) + shared) * size
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// The widths of queries and keys, and of values, that a model of the repository attends with, as its configuration says:
    /// over expanded keys and values, and over latents.
    fn sizes(model: &str) -> [(usize, usize); 2] {
        let path = format!("{}/tests/data/{model}/config.json", env!("CARGO_MANIFEST_DIR"));
        let config: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let size = |name: &str| config[name].as_u64().unwrap() as usize;
        let (latent, rope) = (size("kv_lora_rank"), size("qk_rope_head_dim"));
        [
            (size("qk_nope_head_dim") + rope, size("v_head_dim")),
            (latent + rope, latent),
        ]
    }

    #[test]
    fn the_choice_for_the_sizes_of_models() {
        let padded = |rows, value| Some(Fused { rows, value });
        let choose = |n, (width, value), dtype| Fused::choose(n, width, value, dtype);
        // The demo model: 64 + 32, and values of 64; latents of 128 + 32.
        let demo = sizes("demo-model");
        assert_eq!(demo, [(96, 64), (160, 128)]);
        let mut tiny = 0;
        for entry in
            std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-models")).unwrap()
        {
            let name = entry.unwrap().file_name().into_string().unwrap();
            // 32 + 16, which no kernel has; latents of 64 + 16, which all but the kernel for one query have.
            assert_eq!(
                sizes(&format!("tiny-models/{name}")),
                [(48, 32), (80, 64)],
                "{name}"
            );
            tiny += 1;
        }
        assert_eq!(tiny, 6);
        for dtype in DTYPES {
            let half = dtype != DType::F32;
            assert_eq!(choose(512, demo[0], dtype), padded(0, 32));
            assert_eq!(choose(43, demo[0], dtype), padded(21, 32));
            assert_eq!(choose(1, demo[0], dtype), padded(0, 32));
            assert_eq!(choose(23, (80, 64), dtype), padded(9, 16));
            // One query has no kernel of 72 or 80, whatever Candle's check says.
            assert_eq!(choose(1, (80, 64), dtype), None);
            assert_eq!(choose(1, (72, 72), dtype), None);
            // GLM-4.7-Flash: 192 + 64, and values of 256, whose tiles of many queries are too large in F32.
            assert_eq!(
                choose(512, (256, 256), dtype),
                half.then_some(padded(0, 0)).flatten()
            );
            assert_eq!(
                choose(33, (256, 256), dtype),
                half.then_some(padded(31, 0)).flatten()
            );
            assert_eq!(choose(1, (256, 256), dtype), padded(0, 0));
            for n in [1, 2, 32, 512] {
                // The tiny models; the demo model's latents, GLM-4.7-Flash's; DeepSeek-V2's 192 and 128.
                for none in [(48, 32), demo[1], (576, 512), (192, 128)] {
                    assert_eq!(choose(n, none, dtype), None, "{n}, {none:?}, {dtype:?}");
                }
                // Values that are wider than keys cannot be padded.
                assert_eq!(choose(n, (64, 96), dtype), None);
            }
            assert_eq!(choose(0, (64, 64), dtype), None);
        }
        assert_eq!(choose(1, (64, 64), DType::F64), None);
    }

    /// What the kernel does with tiles, from its source: whether a query that counts sees a key that it must not, or reads
    /// behind the last key.
    fn wrong(n: usize, total: usize, keys_a_tile: usize) -> bool {
        let offset = total - n;
        let aligned = total.is_multiple_of(keys_a_tile);
        let tiles_of_keys = total.div_ceil(keys_a_tile);
        (0..n.div_ceil(QUERIES)).any(|tile| {
            let limit = ((tile + 1) * QUERIES + offset).div_ceil(keys_a_tile);
            let masked_from = limit as isize - QUERIES.div_ceil(keys_a_tile) as isize - isize::from(!aligned);
            let first = tile * QUERIES + offset;
            let unmasked =
                (0..limit).any(|keys| (keys as isize) < masked_from && (keys + 1) * keys_a_tile > first + 1);
            unmasked || limit > tiles_of_keys
        })
    }

    #[test]
    fn padding_mends_what_the_kernel_gets_wrong() {
        // Five tokens cached, 43 new: the first of them would see the fifteenth key.
        assert!(wrong(43, 48, 16));
        for keys_a_tile in [16, 32] {
            for offset in 0..70 {
                for n in 2..140 {
                    let width = if keys_a_tile == 16 { 128 } else { 64 };
                    let padding = Fused::choose(n, width, width, DType::F16).unwrap().rows;
                    assert!(
                        !wrong(n + padding, offset + n + padding, keys_a_tile),
                        "{n} after {offset}"
                    );
                }
            }
        }
    }

    #[test]
    fn padding_is_trimmed_again() {
        let fused = Fused::choose(3, 8 * 8, 40, DType::F32).unwrap();
        let of =
            |rows: usize, width: usize| Tensor::ones((1, 2, rows, width), DType::F32, &Device::Cpu).unwrap();
        let (queries, keys, values) = fused.padded(&of(3, 64), &of(10, 64), &of(10, 40)).unwrap();
        assert_eq!(queries.dims(), [1, 2, 32, 64]);
        assert_eq!(keys.dims(), [1, 2, 39, 64]);
        assert_eq!(values.dims(), [1, 2, 39, 64]);
        assert_eq!(fused.trimmed(&queries, 3).unwrap().dims(), [1, 2, 3, 40]);
    }
}
