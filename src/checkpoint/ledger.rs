//! What a model's weights take, module by module: from which [`LoadReport`](super::LoadReport) says it by component.

use super::Layout;
use super::component::Component;
use super::report::{OwnMemory, OwnReason, Share};
use crate::fp4::{Format, ScaleKind, Weight};
use std::collections::BTreeMap;

/// A weight, or a vector, of one module.
#[derive(Debug)]
struct Entry {
    component: Component,
    format: String,
    layout: Option<Layout>,
    /// Bytes in the file.
    stored: usize,
    /// Bytes in use.
    used: usize,
    own: Option<Own>,
}

/// What of it lies in memory of the process's own.
#[derive(Debug, Clone, Copy)]
struct Own {
    reason: OwnReason,
    bytes: usize,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// By the names of modules, of vectors by their own.
    entries: BTreeMap<String, Entry>,
    /// What lies between weights that were brought together, so that each begins aligned.
    padding: Vec<Own>,
}

impl Ledger {
    /// A weight of `stored` bytes in the file, of which `own` bytes lie in memory of the process's own because of `reason`.
    pub fn weight(
        &mut self,
        module: &str,
        weight: &Weight,
        layout: Option<Layout>,
        stored: usize,
        (reason, own): (OwnReason, usize),
    ) {
        let entry = Entry {
            component: Component::of(module),
            format: format_of(weight),
            layout,
            stored,
            used: weight.size_in_bytes(),
            own: (own > 0).then_some(Own { reason, bytes: own }),
        };
        self.entries.insert(module.to_string(), entry);
    }

    /// A vector of `len` numbers, a norm or biases: decoded.
    pub fn vector(&mut self, name: &str, len: usize, stored: usize) {
        let module = name.strip_suffix(".weight").or(name.strip_suffix(".bias"));
        let bytes = len * size_of::<f32>();
        let entry = Entry {
            component: Component::of(module.unwrap_or(name)),
            format: "F32".into(),
            layout: None,
            stored,
            used: bytes,
            own: Some(Own {
                reason: OwnReason::Decoded,
                bytes,
            }),
        };
        self.entries.insert(name.to_string(), entry);
    }

    /// The weights of the MLP or the experts of `module` were brought together, in `total` bytes with what lies between them.
    pub fn gathered(&mut self, module: &str, total: usize) {
        if total == 0 {
            return;
        }
        let prefix = format!("{module}.");
        let range = self.entries.range_mut(prefix.clone()..);
        let mut entries: Vec<&mut Entry> = range
            .take_while(|(name, _)| name.starts_with(&prefix))
            .map(|(_, entry)| entry)
            .filter(|entry| entry.component.is_gathered())
            .collect();
        let used: usize = entries.iter().map(|entry| entry.used).sum();
        let own = |entry: &&mut Entry| entry.own.is_some_and(|own| own.bytes == entry.used);
        let mut reason = OwnReason::Gathered;
        if entries.iter().all(own) {
            // They were the process's own before: their copies take the place of these.
            reason = (entries.first().and_then(|entry| entry.own)).map_or(reason, |own| own.reason);
        } else {
            for entry in &mut entries {
                let bytes = entry.used;
                entry.own = Some(Own { reason, bytes });
            }
        }
        let bytes = total.saturating_sub(used);
        self.padding.push(Own { reason, bytes });
    }

    /// What the components take, and what of it is the process's own.
    pub fn told(&self) -> (Vec<Share>, Vec<OwnMemory>) {
        let mut shares: BTreeMap<_, Share> = BTreeMap::new();
        let mut owned: BTreeMap<OwnReason, OwnMemory> = BTreeMap::new();
        let mut keep = |own: Own, weights: usize, first: &str| {
            let memory = owned.entry(own.reason).or_insert_with(|| OwnMemory {
                reason: own.reason,
                weights: 0,
                bytes: 0,
                first: first.to_string(),
            });
            memory.weights += weights;
            memory.bytes += own.bytes;
        };
        for (name, entry) in &self.entries {
            let key = (entry.component, entry.format.as_str(), entry.layout);
            let share = shares.entry(key).or_insert_with(|| Share {
                component: entry.component,
                format: entry.format.clone(),
                layout: entry.layout,
                weights: 0,
                stored: 0,
                bytes: 0,
                own: 0,
            });
            share.weights += 1;
            share.stored += entry.stored;
            share.bytes += entry.used;
            if let Some(own) = entry.own {
                share.own += own.bytes;
                keep(own, 1, name);
            }
        }
        for padding in &self.padding {
            keep(*padding, 0, "");
        }
        (shares.into_values().collect(), owned.into_values().collect())
    }
}

/// What a weight is in.
fn format_of(weight: &Weight) -> String {
    let tensor = match weight {
        Weight::Dense(dense) => return format!("{:?}", dense.kind()),
        Weight::Int8(_) => return "INT8".into(),
        Weight::Blocks(blocks) => return format!("{:?}", blocks.kind()),
        Weight::Fp4(tensor) => tensor,
    };
    let (group, kind) = (tensor.group(), tensor.scale_kind());
    match (Format { group, kind }, kind) {
        (format, _) if format == Format::mmfp4() => "MMFP4".into(),
        (format, _) if format == Format::nvfp4() => "NVFP4".into(),
        (format, _) if format == Format::mxfp4() => "MXFP4".into(),
        (_, ScaleKind::F16) => format!("MMFP4, group {group}"),
        (_, ScaleKind::BF16) => format!("MMFP4, group {group}, BF16 scales"),
        _ => format!("FP4, group {group}, {kind:?} scales"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp4::Bytes;
    use crate::fp4::{DenseTensor, FloatKind};

    fn dense(n: usize) -> Weight {
        let bytes = Bytes::unwritten(n * 8 * 2).unwrap();
        DenseTensor::new("w", (n, 8), FloatKind::BF16, bytes)
            .unwrap()
            .into()
    }

    fn owned(ledger: &Ledger) -> Vec<(OwnReason, usize, usize)> {
        let (_, owned) = ledger.told();
        owned
            .iter()
            .map(|own| (own.reason, own.weights, own.bytes))
            .collect()
    }

    #[test]
    fn what_is_brought_together_is_counted_once() {
        let expert = |n: usize| format!("model.layers.1.mlp.experts.{n}.up_proj");
        let ledger = |own: [usize; 2]| {
            let mut ledger = Ledger::default();
            for (index, own) in own.into_iter().enumerate() {
                let own = (OwnReason::Repacked, own);
                ledger.weight(&expert(index), &dense(3), None, 48, own);
            }
            ledger.vector("model.layers.1.mlp.gate.e_score_correction_bias", 2, 4);
            ledger.gathered("model.layers.1.mlp", 112);
            ledger.gathered("model.layers.2.mlp", 0);
            ledger
        };
        let bias = (OwnReason::Decoded, 1, 8);
        // Both repacked: copies of copies. One of them not: all of it is copied.
        assert_eq!(owned(&ledger([48, 48])), [(OwnReason::Repacked, 2, 112), bias]);
        assert_eq!(owned(&ledger([48, 0])), [(OwnReason::Gathered, 2, 112), bias]);
        assert_eq!(owned(&ledger([0, 0])), [(OwnReason::Gathered, 2, 112), bias]);
        let (shares, _) = ledger([0, 0]).told();
        assert_eq!(shares.len(), 2);
        assert_eq!((shares[1].weights, shares[1].bytes, shares[1].own), (2, 96, 96));
    }
}
