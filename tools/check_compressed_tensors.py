#!/usr/bin/env python3
"""Reads an NVFP4 or MXFP4 folder of `mmfp4 quantize` through the compressed-tensors library.

    pip install compressed-tensors==0.20.0 safetensors
    mmfp4 quantize tests/data/demo-model nvfp4 --format nvfp4
    tools/check_compressed_tensors.py nvfp4 decoded
    mmfp4 validate decoded nvfp4 --json

Checks that the library's classes accept the configuration, that `ignore` names every linear layer that is not
quantised and none that is, and that the tensors have the names, dtypes and shapes that the library's compressor would
have written. Then writes what the library decodes as a floating-point folder: `mmfp4 validate` finds no difference
to what this crate decodes, where both agree to the bit. Exits with 1 at the first thing that is wrong.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.utils.match import match_name
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM


def check(condition: bool, problem: str) -> None:
    if not condition:
        sys.exit(f"error: {problem}")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            check((file.metadata() or {}).get("format") == "pt", f"{path}: transformers wants format = pt")
            for name in file.keys():
                tensors[name] = file.get_tensor(name)
    return tensors


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, decoded = map(Path, sys.argv[1:])
    check(not decoded.exists(), f"{decoded}: already there")
    text = json.loads((folder / "config.json").read_text())
    config = QuantizationConfig.model_validate(text["quantization_config"])
    check(config.quantization_status == QuantizationStatus.COMPRESSED, "not compressed")
    (scheme,) = config.config_groups.values()
    check(scheme.input_activations is None, "activations are to be quantised")
    preset = {"nvfp4-pack-quantized": "NVFP4A16", "mxfp4-pack-quantized": "MXFP4A16"}[config.format]
    weights = PRESET_SCHEMES[preset]["weights"]
    for field in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic"):
        found, expected = getattr(scheme.weights, field), getattr(weights, field)
        check(found == expected, f"weights.{field} is {found}; the library's {preset} has {expected}")

    compressor = BaseCompressor.get_value_from_registry(config.format)
    check(compressor.can_compress(torch.nn.Linear, scheme), "the compressor refuses the scheme")
    parameters = compressor.compression_param_names(scheme)
    tensors = tensors_of(folder)
    quantised = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    check(bool(quantised), "nothing is quantised")
    result = {}
    for module in sorted(quantised):
        state = {name: tensors.pop(f"{module}.{name}") for name in parameters}
        n, half = state["weight_packed"].shape
        like = torch.zeros(n, 2 * half, dtype=torch.bfloat16)
        scales = torch.ones(state["weight_scale"].shape, dtype=torch.bfloat16)
        written = compressor.compress({**state, "weight": like, "weight_scale": scales}, scheme)
        for name in parameters:
            same = written[name].dtype == state[name].dtype and written[name].shape == state[name].shape
            check(same, f"{module}.{name}: {state[name].dtype} {tuple(state[name].shape)}")
        result[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"].contiguous()
    for name in tensors:
        check(".weight_" not in name, f"{name}: a part of no quantised weight")

    plain = {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and not name.endswith("embed_tokens.weight")
    }
    ignored = lambda module: any(match_name(module, pattern) for pattern in config.ignore)
    check(all(ignored(module) for module in plain), "ignore is not complete")
    check(not any(ignored(module) for module in quantised), "ignore names what is quantised")
    # transformers' own idea of which modules are linear; experts are no modules there.
    with torch.device("meta"):
        plain_config = AutoConfig.from_pretrained(folder)
        if hasattr(plain_config, "quantization_config"):
            del plain_config.quantization_config
        model = AutoModelForCausalLM.from_config(plain_config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            check(name in quantised or ignored(name), f"{name} is neither quantised nor ignored")

    result.update(tensors)
    decoded.mkdir(parents=True)
    save_file(result, decoded / "model.safetensors", metadata={"format": "pt"})
    del text["quantization_config"]
    (decoded / "config.json").write_text(json.dumps(text, indent=2))
    print(f"{len(quantised)} weights decoded as {config.format}, {len(plain)} linear layers ignored")


if __name__ == "__main__":
    main()
