//! What is known to cost quality, noticed while loading.

use crate::fp4::{Fp4Tensor, ScaleKind, Weight};

/// Blocks looked at a tensor, from its beginning: two pages of a mapped file.
const BLOCKS_A_TENSOR: usize = 32;
/// Blocks looked at in all.
const BLOCKS: usize = 4096;
/// Fewer say nothing.
const ENOUGH: usize = 256;

/// Counts what [`warnings`](Self::warnings) are about.
#[derive(Debug, Default)]
pub(super) struct Survey {
    mxfp4: usize,
    blocks: usize,
    full: usize,
    routers: usize,
    embeddings: bool,
    head: bool,
    int8_head: bool,
}

impl Survey {
    /// Looks at a linear layer's weight; `stored` says that it comes from the file as it is.
    pub fn linear(&mut self, tensor: &Fp4Tensor, stored: bool) {
        match tensor.scale_kind() {
            ScaleKind::E8M0 => self.mxfp4 += 1,
            ScaleKind::F16 | ScaleKind::BF16 if stored && self.blocks < BLOCKS => self.sample(tensor),
            _ => {}
        }
    }

    /// Looks at the weight of a router, the embeddings or the output head.
    pub fn sensitive(&mut self, module: &str, weight: &Weight) {
        // Integers in blocks have as many bits as whoever mixed them thought right for the tensor.
        if matches!(weight, Weight::Dense(_) | Weight::Blocks(_)) {
            return;
        }
        match module.rsplit('.').next() {
            Some("gate") => self.routers += 1,
            Some("embed_tokens") => self.embeddings = true,
            _ => self.head = true,
        }
    }

    /// An eight-bit head was asked for, and the head is quantised already.
    pub fn int8_head_without_effect(&mut self) {
        self.int8_head = true;
    }

    /// Maximum scales make the largest code of every block ±6, whatever the values. Scales of least squared
    /// error leave some blocks without one: 2 to 10 % of them in each tensor of a trained model.
    fn sample(&mut self, tensor: &Fp4Tensor) {
        for block in tensor
            .codes()
            .chunks_exact(tensor.group() / 2)
            .take(BLOCKS_A_TENSOR)
        {
            let largest = block.iter().map(|byte| (byte & 7).max(byte >> 4 & 7)).max();
            self.blocks += usize::from(largest != Some(0));
            self.full += usize::from(largest == Some(7));
        }
    }

    /// One sentence a finding: what it is, what it costs, what to use instead.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.mxfp4 > 0 {
            warnings.push(format!(
                "{} weights are MXFP4, whose power-of-two scales cost about 4 % of perplexity where MMFP4 and NVFP4 \
                 cost 1 %, unless the model was trained in it; quantise the BF16 original to mmfp4 or nvfp4 instead",
                self.mxfp4
            ));
        }
        if self.blocks >= ENOUGH && self.full * 500 >= self.blocks * 499 {
            warnings.push(
                "the scales look taken from each block's maximum, which costs about 3.5 % of perplexity where the \
                 scales of least squared error cost 1 %; unless the file was calibrated, quantise the BF16 original \
                 with this crate instead"
                    .into(),
            );
        }
        if self.routers > 0 {
            warnings.push(format!(
                "the routers (mlp.gate) of {} layers are in 4 bits: tokens go to other experts than they should; use \
                 a checkpoint that keeps routers in BF16",
                self.routers
            ));
        }
        let tables = [(self.embeddings, "embed_tokens"), (self.head, "lm_head")];
        let tables: Vec<_> = tables.into_iter().filter(|t| t.0).map(|t| t.1).collect();
        if !tables.is_empty() {
            warnings.push(format!(
                "{} in 4 bits: every token's input or output is rounded, for little memory; use a checkpoint that \
                 keeps embeddings and output head in BF16",
                tables.join(" and ")
            ));
        }
        if self.int8_head {
            warnings.push(
                "an output head in 8 bits was asked for, and it is quantised already: it stays as it is; leave the option \
                 out, or use a checkpoint that keeps the output head in BF16"
                    .into(),
            );
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::noise;
    use crate::fp4::{Format, ScaleRule, quantize};

    /// Sums of four: nearly normal, as weights are.
    fn normal(len: usize, seed: u64) -> Vec<f32> {
        noise(4 * len, seed).chunks(4).map(|c| c.iter().sum()).collect()
    }

    fn survey(format: Format, rule: ScaleRule, stored: bool) -> Vec<String> {
        let mut survey = Survey::default();
        for seed in 0..16 {
            let values = normal(64 * 256, seed);
            survey.linear(&quantize("w", &values, (64, 256), format, rule).unwrap(), stored);
        }
        survey.warnings()
    }

    #[test]
    fn maximum_scales_are_told_from_searched_ones() {
        for group in [32, 64, 128] {
            let format = Format {
                group,
                kind: ScaleKind::F16,
            };
            let warnings = survey(format, ScaleRule::Maximum, true);
            assert!(
                warnings.len() == 1 && warnings[0].contains("maximum"),
                "{warnings:?}"
            );
            assert!(survey(format, ScaleRule::SquaredError, true).is_empty());
            assert!(survey(format, ScaleRule::Maximum, false).is_empty());
        }
    }

    #[test]
    fn too_few_blocks_say_nothing() {
        let mut survey = Survey::default();
        let packed = quantize(
            "w",
            &noise(2 * 256, 1),
            (2, 256),
            Format::mmfp4(),
            ScaleRule::Maximum,
        )
        .unwrap();
        survey.linear(&packed, true);
        assert!(survey.warnings().is_empty());
    }

    #[test]
    fn mxfp4_is_told_once_wherever_it_comes_from() {
        for stored in [true, false] {
            let warnings = survey(Format::mxfp4(), ScaleRule::SquaredError, stored);
            assert!(
                warnings.len() == 1 && warnings[0].contains("16 weights are MXFP4"),
                "{warnings:?}"
            );
        }
    }

    #[test]
    fn sensitive_weights_are_named() {
        let values = noise(256, 3);
        let packed: Weight = quantize("w", &values, (2, 128), Format::mmfp4(), ScaleRule::Maximum)
            .unwrap()
            .into();
        let mut survey = Survey::default();
        for module in [
            "model.layers.1.mlp.gate",
            "model.layers.2.mlp.gate",
            "lm_head",
            "model.embed_tokens",
        ] {
            survey.sensitive(module, &packed);
        }
        let warnings = survey.warnings();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("of 2 layers"));
        assert!(warnings[1].starts_with("embed_tokens and lm_head in 4 bits"));
        survey.int8_head_without_effect();
        assert!(survey.warnings()[2].starts_with("an output head in 8 bits was asked for"));
    }
}
