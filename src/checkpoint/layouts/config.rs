//! What a `config.json` says of quantisation. The tensors decide how they are read; this refuses by name what no reader
//! is for, and what only a configuration tells: rotations.

use super::rotation::{self, Rotation};
use crate::checkpoint::files::ModelFiles;
use crate::error::shortened;
use crate::{Error, Result};
use serde_json::Value;

const INSTEAD: &str =
    "take an FP4 checkpoint (MMFP4, NVFP4 or MXFP4), or the original in BF16 with --quantize mmfp4";

/// What Metal Marlin's quantisers write beside `config.json`, which they leave as it was.
const BESIDE: &str = "quantization_config.json";

/// Checks what a file of its own says of quantisation, where there is one: rotations, which no tensor may tell of.
///
/// # Errors
/// [`Error::File`] names the key that tells of something that is not implemented; [`Error::Io`] where it cannot be read.
pub(crate) fn check_beside(files: &ModelFiles) -> Result<()> {
    let Some(text) = files.text_if_present(BESIDE)? else {
        return Ok(());
    };
    let path = files.path(BESIDE);
    let value: Value = serde_json::from_str(&text)
        .map_err(|error| Error::file(&path, format!("not JSON: {error}"), "fetch the file again"))?;
    match rotation::told(&value) {
        None => Ok(()),
        Some(Rotation { key, value, problem }) => {
            let value = shortened(value);
            Err(Error::file(path, format!("{key} = {value}: {problem}"), ""))
        }
    }
}

/// Checks `quantization_config` (or MLX's `quantization`), called `field`.
///
/// # Errors
/// [`Error::Config`] names the field that tells of something that is not implemented.
pub(crate) fn check(field: &str, value: &Value) -> Result<()> {
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    let refuse = |name: &str, found: &str, problem: String| {
        Err(Error::Config {
            field: format!("{field}.{name}"),
            value: shortened(found.to_string()),
            problem,
        })
    };
    if let Some(Rotation { key, value, problem }) = rotation::told(value) {
        return refuse(&key, &value, problem);
    }
    let one_of = |name: &str, known: &[&str]| match text(name) {
        Some(found) if known.contains(&found) => Ok(()),
        found => {
            let problem = format!("only {} is implemented there; {INSTEAD}", known.join(" and "));
            refuse(name, found.unwrap_or("missing"), problem)
        }
    };
    match (text("quant_method"), text("mode")) {
        (Some("mmfp4"), _) => Ok(()),
        (Some("compressed-tensors"), _) => one_of(
            "format",
            &["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"],
        ),
        // Mixtures are told apart by their tensors.
        (Some("modelopt"), _) => one_of("quant_algo", &["NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"]),
        (Some(other), _) => {
            let problem = format!("integers and eight bits are not implemented; {INSTEAD}");
            refuse("quant_method", other, problem)
        }
        (None, Some("mxfp4" | "nvfp4")) => Ok(()),
        // MLX's own way, where no mode is the first that there was.
        (None, mode) if value.get("bits").is_some() => {
            let problem = format!(
                "MLX's affine quantisation, integers with a bias, is no 4-bit floating point; {INSTEAD}"
            );
            refuse("mode", mode.unwrap_or("affine"), problem)
        }
        (None, _) if text("format").is_some() => one_of("format", &["mmfp4_e2m1_marlin"]),
        (None, _) => refuse(
            "quant_method",
            "missing",
            format!("expected to be told; {INSTEAD}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fp4_of_all_kinds_is_accepted_and_the_rest_refused_by_name() {
        let accepted = [
            json!({"quant_method": "mmfp4", "bits": 4}),
            json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
            json!({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}),
            json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}),
            json!({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}),
            json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}),
            json!({"group_size": 32, "bits": 4, "mode": "mxfp4"}),
            json!({"group_size": 16, "bits": 4, "mode": "nvfp4"}),
            json!({"format": "mmfp4_e2m1_marlin", "use_hadamard": false}),
        ];
        for value in accepted {
            check("quantization", &value).unwrap();
        }
        let refused = [
            (json!({"quant_method": "gptq", "bits": 4}), "quant_method = gptq"),
            (json!({"quant_method": "fp8"}), "quant_method = fp8"),
            (
                json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
                "format = pack-quantized",
            ),
            (
                json!({"quant_method": "modelopt", "quant_algo": "FP8"}),
                "quant_algo = FP8",
            ),
            (
                json!({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}),
                "quant_algo = NVFP4_AWQ",
            ),
            (json!({"group_size": 64, "bits": 4}), "mode = affine"),
            (
                json!({"format": "mmfp4_e2m1_marlin", "use_hadamard": true}),
                "use_hadamard = true",
            ),
            (
                json!({"quant_method": "mmfp4", "hadamard_block_size": 64}),
                "hadamard_block_size = 64",
            ),
            (
                json!({
                    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
                    "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}},
                }),
                "transform_config = ",
            ),
            (json!({"quant_method": "awq", "bits": 4}), "quant_method = awq"),
            (
                json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
                "quant_method = bitsandbytes",
            ),
            (json!({"quant_method": "exl2"}), "quant_method = exl2"),
            (json!({"quant_method": "exl3"}), "quant_method = exl3"),
            (json!({"quant_method": "hqq"}), "quant_method = hqq"),
            (json!({"quant_method": "mxfp4"}), "quant_method = mxfp4"),
            (
                json!({"quant_method": "compressed-tensors", "format": "float-quantized"}),
                "format = float-quantized",
            ),
            (
                json!({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}),
                "quant_algo = NVFP4_AWQ",
            ),
            (json!({"format": "other"}), "format = other"),
            (json!({}), "quant_method = missing"),
        ];
        for (value, part) in refused {
            let error = check("quantization_config", &value).unwrap_err().to_string();
            assert!(error.contains(&format!("quantization_config.{part}")), "{error}");
            assert!(error.contains("--quantize mmfp4"), "{error}");
        }
    }
}
