//! What a `config.json` says of quantisation. The tensors decide how they are read; this refuses by name what no reader
//! is for, and what only a configuration tells: rotations.

use crate::error::shortened;
use crate::{Error, Result};
use serde_json::Value;

const INSTEAD: &str =
    "take an FP4 checkpoint (MMFP4, NVFP4 or MXFP4), or the original in BF16 with --quantize mmfp4";

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
    if value.get("use_hadamard").and_then(Value::as_bool) == Some(true) {
        let problem = format!("weights rotated by a Hadamard matrix are not implemented; {INSTEAD}");
        return refuse("use_hadamard", "true", problem);
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
        (Some("modelopt"), _) => one_of("quant_algo", &["NVFP4"]),
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
            (json!({"group_size": 64, "bits": 4}), "mode = affine"),
            (
                json!({"format": "mmfp4_e2m1_marlin", "use_hadamard": true}),
                "use_hadamard = true",
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
