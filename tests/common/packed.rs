//! A layer's experts in one parameter, as ModelOpt has those of models that have them so.

use super::draft::{Draft, Stored};
use safetensors::Dtype;

/// How a layer's experts lie in one parameter.
#[derive(Clone, Copy, PartialEq)]
pub enum Lie {
    /// `[E, R, …]`.
    Rows,
    /// `[E, …, R]`.
    Columns,
}

/// What multiplies them.
#[derive(Clone, Copy, PartialEq)]
pub enum Factors {
    /// One an expert, or its gate and one its up.
    Each,
    /// One for all gates, one for all ups and one for all downs.
    Halves,
    /// One for all.
    One,
}

/// Puts the experts of each layer of a model in ModelOpt's layout into `gate_up_proj` and `down_proj`. With less than one
/// factor each they are those of the first expert.
pub fn pack_experts(draft: &mut Draft, lie: Lie, factors: Factors) {
    let experts = draft.config["n_routed_experts"].as_u64().unwrap() as usize;
    let prefix = |name: &String| Some(name.strip_suffix(".0.down_proj.weight")?.to_string());
    let layers: Vec<_> = draft.tensors.keys().filter_map(prefix).collect();
    for prefix in layers {
        for (stack, parts) in [
            ("gate_up_proj", &["gate_proj", "up_proj"][..]),
            ("down_proj", &["down_proj"]),
        ] {
            let each = (0..experts).flat_map(|expert| parts.iter().map(move |part| (expert, part)));
            let mut take = |from: &str| -> Vec<Stored> {
                let names = each
                    .clone()
                    .map(|(expert, part)| format!("{prefix}.{expert}.{part}.{from}"));
                names.filter_map(|name| draft.tensors.remove(&name)).collect()
            };
            let [codes, scales, by, inputs] =
                ["weight", "weight_scale", "weight_scale_2", "input_scale"].map(&mut take);
            assert_eq!(codes.len(), experts * parts.len(), "{prefix}");
            let mut put =
                |suffix: &str, tensor| draft.tensors.insert(format!("{prefix}.{stack}{suffix}"), tensor);
            put("", matrices(&codes, parts.len(), lie));
            put("_weight_scale", matrices(&scales, parts.len(), lie));
            put("_weight_scale_2", numbers(&by, parts.len(), factors));
            // Not every checkpoint has them.
            if !inputs.is_empty() {
                put("_input_scale", numbers(&inputs, parts.len(), factors));
            }
        }
    }
}

/// Matrices, so many of each expert, as one tensor.
fn matrices(tensors: &[Stored], parts: usize, lie: Lie) -> Stored {
    let (rows, width) = (tensors[0].shape[0] * parts, tensors[0].shape[1]);
    let mut bytes = Vec::new();
    for expert in tensors.chunks(parts) {
        let of_rows: Vec<u8> = expert.iter().flat_map(|part| part.bytes.clone()).collect();
        match lie {
            Lie::Rows => bytes.extend(of_rows),
            Lie::Columns => {
                let columns = (0..width).flat_map(|k| (0..rows).map(move |row| row * width + k));
                bytes.extend(columns.map(|at| of_rows[at]));
            }
        }
    }
    let experts = tensors.len() / parts;
    Stored {
        dtype: tensors[0].dtype,
        shape: match lie {
            Lie::Rows => vec![experts, rows, width],
            Lie::Columns => vec![experts, width, rows],
        },
        bytes,
    }
}

/// Numbers, so many of each expert, as one tensor.
fn numbers(tensors: &[Stored], parts: usize, factors: Factors) -> Stored {
    let mut bytes: Vec<u8> = tensors.iter().flat_map(|number| number.bytes.clone()).collect();
    let shape = match (factors, parts) {
        (Factors::Each, _) => vec![tensors.len() / parts, parts],
        (Factors::Halves, _) => vec![parts],
        (Factors::One, _) => vec![],
    };
    bytes.truncate(4 * shape.iter().product::<usize>());
    Stored {
        dtype: Dtype::F32,
        shape,
        bytes,
    }
}
