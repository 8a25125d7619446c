//! Weights that were rotated before they were quantised, as configurations tell of them. A product with such a weight takes
//! activations that are rotated alike; no kernel here does that, so they are refused.

use serde_json::Value;

/// What to do about it.
pub(super) const INSTEAD: &str =
    "take a checkpoint without rotation, or the original in BF16 with --quantize mmfp4";

/// A rotation, and what tells of it.
#[derive(Debug)]
pub(super) struct Rotation {
    pub key: String,
    pub value: String,
    pub problem: String,
}

/// What a configuration says of rotations, if it does: Metal Marlin's `use_hadamard` and `hadamard_block_size`, of which the
/// first decides where it is there, and compressed-tensors' `transform_config`.
pub(super) fn told(config: &Value) -> Option<Rotation> {
    let present = |key: &str| config.get(key).filter(|value| !value.is_null());
    let rotation = |key: &str, value: &Value, what: &str| Rotation {
        key: key.into(),
        value: value.to_string(),
        problem: format!("weights rotated by {what} are not implemented; {INSTEAD}"),
    };
    let hadamard = |key: &str, value: &Value| Some(rotation(key, value, "a Hadamard matrix"));
    match (present("use_hadamard"), present("hadamard_block_size")) {
        (Some(Value::Bool(false)), _) => {}
        (Some(used), _) => return hadamard("use_hadamard", used),
        (None, Some(block)) if !matches!(block.as_u64(), Some(0 | 1)) => {
            return hadamard("hadamard_block_size", block);
        }
        (None, _) => {}
    }
    let transforms = present("transform_config")?;
    let groups = transforms.get("config_groups").and_then(Value::as_object);
    match groups {
        Some(groups) if groups.is_empty() => None,
        None if transforms.as_object().is_some_and(serde_json::Map::is_empty) => None,
        _ => Some(rotation(
            "transform_config",
            transforms,
            "compressed-tensors' transforms",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_changes_nothing_is_no_rotation() {
        for config in [
            json!({}),
            json!({"use_hadamard": false, "hadamard_block_size": 64}),
            json!({"use_hadamard": null, "hadamard_block_size": 1}),
            json!({"hadamard_block_size": 0}),
            json!({"transform_config": {}}),
            json!({"transform_config": null}),
            json!({"transform_config": {"config_groups": {}}}),
        ] {
            assert!(told(&config).is_none(), "{config}");
        }
        for (config, key) in [
            (json!({"use_hadamard": true}), "use_hadamard"),
            (json!({"use_hadamard": "yes"}), "use_hadamard"),
            (json!({"hadamard_block_size": 64}), "hadamard_block_size"),
            (json!({"hadamard_block_size": "64"}), "hadamard_block_size"),
            (
                json!({"transform_config": {"config_groups": {"R1": {}}}}),
                "transform_config",
            ),
            (json!({"transform_config": {"other": 1}}), "transform_config"),
        ] {
            assert_eq!(
                told(&config).map(|found| found.key).as_deref(),
                Some(key),
                "{config}"
            );
        }
    }
}
