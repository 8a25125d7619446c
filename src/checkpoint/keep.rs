//! Which weights stay in floating point while others are quantised.

use super::LoadOptions;
use crate::{Error, Result};
use std::cell::Cell;
use std::collections::BTreeSet;

/// What [`LoadOptions::skip_layers`] and [`LoadOptions::keep`] say, for a model of known depth.
pub(super) struct Keep<'a> {
    quantizing: bool,
    layers: BTreeSet<usize>,
    patterns: Vec<Pattern<'a>>,
}

struct Pattern<'a> {
    text: &'a str,
    matched: Cell<bool>,
}

impl<'a> Keep<'a> {
    /// # Errors
    /// [`Error::Argument`] for a layer that the model does not have, or an empty pattern.
    pub fn new(options: &'a LoadOptions, layers: usize) -> Result<Self> {
        let resolve = |index: &i64| {
            let count = i64::try_from(layers).unwrap_or(i64::MAX);
            let from_start = if *index < 0 { index + count } else { *index };
            match usize::try_from(from_start) {
                Ok(layer) if layer < layers => Ok(layer),
                _ => Err(Error::argument(
                    "load",
                    "skip_layers",
                    format!(
                        "-{layers} to {}, the model having {layers} layers",
                        layers.saturating_sub(1)
                    ),
                    index.to_string(),
                )),
            }
        };
        let pattern = |text: &'a String| match text.trim_matches('*') {
            "" => Err(Error::argument(
                "load",
                "keep",
                "a part of a tensor's name, or a name with * for any text",
                format!("`{text}`, which says nothing"),
            )),
            _ => Ok(Pattern {
                text,
                matched: Cell::new(false),
            }),
        };
        Ok(Self {
            quantizing: options.quantize.is_some(),
            layers: options.skip_layers.iter().map(resolve).collect::<Result<_>>()?,
            patterns: options.keep.iter().map(pattern).collect::<Result<_>>()?,
        })
    }

    /// Why the tensor `name` stays as it is, if it does.
    pub fn reason(&self, name: &str) -> Option<String> {
        let mut reason = None;
        for pattern in self.patterns.iter().filter(|p| matches(p.text, name)) {
            pattern.matched.set(true);
            reason.get_or_insert_with(|| format!("`keep` names it: {}", pattern.text));
        }
        let layer = layer_of(name).filter(|layer| self.layers.contains(layer));
        layer
            .map(|layer| format!("layer {layer} is one of `skip_layers`"))
            .or(reason)
    }

    /// What had no effect.
    pub fn warnings(&self) -> Vec<String> {
        if !self.quantizing {
            let unused = !self.layers.is_empty() || !self.patterns.is_empty();
            let text =
                "skip_layers and keep have no effect without quantize, which they make exceptions from";
            return unused.then(|| text.to_string()).into_iter().collect();
        }
        let unmatched = self.patterns.iter().filter(|pattern| !pattern.matched.get());
        unmatched
            .map(|pattern| {
                format!(
                    "`{}` in keep matches no weight that could be quantised; names look like \
                     model.layers.0.self_attn.o_proj.weight",
                    pattern.text
                )
            })
            .collect()
    }
}

fn layer_of(name: &str) -> Option<usize> {
    let (layer, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
    layer.parse().ok()
}

/// A pattern with `*`, each of which stands for any text, matches whole names; one without is part of a name.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return name.contains(pattern);
    };
    let Some(mut name) = name.strip_prefix(head) else {
        return false;
    };
    // The last part must end the name; those between are taken where they come first.
    let (middle, tail) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*') {
        let Some(at) = name.find(part) else { return false };
        name = &name[at + part.len()..];
    }
    name.ends_with(tail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp4::Format;

    const NAME: &str = "model.layers.3.mlp.experts.12.down_proj.weight";

    #[test]
    fn stars_match_whole_names_and_plain_text_a_part() {
        for pattern in [
            "down_proj",
            ".3.mlp",
            NAME,
            "*down_proj*",
            "model.layers.3.*",
            "*.weight",
            "model.*.experts.*.down_proj.weight",
            "model.**experts*",
            "*.mlp.*.12.*",
        ] {
            assert!(matches(pattern, NAME), "{pattern}");
        }
        for pattern in [
            "up_proj",
            "down_proj*",
            "*down_proj",
            "model.layers.4.*",
            "*.experts.*.mlp.*",
            "*weightweight",
            "model.layers.3.mlp.experts.12.down_proj.weight*weight",
        ] {
            assert!(!matches(pattern, NAME), "{pattern}");
        }
    }

    fn options(skip_layers: &[i64], keep: &[&str]) -> LoadOptions {
        LoadOptions {
            quantize: Some(Format::mmfp4()),
            skip_layers: skip_layers.to_vec(),
            keep: keep.iter().map(|p| p.to_string()).collect(),
            ..LoadOptions::default()
        }
    }

    #[test]
    fn layers_count_from_both_ends() {
        let options = options(&[0, -1, -2, -1], &["o_proj"]);
        let keep = Keep::new(&options, 6).unwrap();
        let kept: Vec<_> = (0..7)
            .filter(|layer| {
                keep.reason(&format!("model.layers.{layer}.mlp.up_proj.weight"))
                    .is_some()
            })
            .collect();
        assert_eq!(kept, [0, 4, 5]);
        assert!(keep.reason("lm_head.weight").is_none());
        assert_eq!(keep.warnings().len(), 1, "o_proj has not been seen");
        let reason = keep.reason("model.layers.2.self_attn.o_proj.weight").unwrap();
        assert!(reason.contains("o_proj"), "{reason}");
        let reason = keep.reason("model.layers.0.self_attn.o_proj.weight").unwrap();
        assert!(reason.contains("layer 0"), "{reason}");
        assert!(keep.warnings().is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for index in [6, -7, i64::MAX, i64::MIN] {
            let options = options(&[1, index], &[]);
            let error = Keep::new(&options, 6).err().unwrap().to_string();
            assert!(
                error.contains("skip_layers")
                    && error.contains("-6 to 5")
                    && error.contains(&index.to_string()),
                "{error}"
            );
        }
        for pattern in ["", "*", "**"] {
            let options = options(&[], &[pattern]);
            assert!(Keep::new(&options, 6).err().unwrap().to_string().contains("keep"));
        }
        let options = LoadOptions {
            quantize: None,
            ..options(&[1], &[])
        };
        assert!(Keep::new(&options, 6).unwrap().warnings()[0].contains("without quantize"));
    }
}
