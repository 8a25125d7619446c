"""ModelOpt's NVFP4.

`modelopt-nvfp4` is what its own export writes of transformers' model after its own calibration: names, scales, factors and
configuration. `modelopt-nvfp4-power` has factors that are powers of two, codes and scales by NVFP4QTensor: this crate's own
files divide by their factor, and only for a power of two are dividing and multiplying by the reciprocal the same to the
last bit.
"""

from importlib.metadata import version
from pathlib import Path

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from source import Model, write_json
from transformers import AutoModelForCausalLM

GROUP = 16


def export(model: Model, folder: Path) -> None:
    """By the library's own quantisation and export, calibrated with as many different tokens as there are."""
    # The model's own folder, which transformers read.
    model.write(folder, model.tensors, None)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for path in folder.iterdir():
        path.unlink()
    tokens = torch.arange(model.config["vocab_size"])[-256:].unsqueeze(0)
    with torch.no_grad():
        mtq.quantize(network, mtq.NVFP4_DEFAULT_CFG, lambda network: network(tokens))
        export_hf_checkpoint(network, export_dir=folder)


def write_powers(model: Model, folder: Path) -> None:
    """With the next powers of two above the factors that the library would choose."""
    tensors = model.rest()
    for module, weight in model.linears().items():
        factor = NVFP4QTensor.get_weights_scaling_factor_2(weight)
        factor = torch.exp2(torch.ceil(torch.log2(factor)))
        packed, scales, factor = NVFP4QTensor.quantize(weight.clone(), GROUP, weights_scaling_factor_2=factor)
        tensors[f"{module}.weight"] = packed._quantized_data
        tensors[f"{module}.weight_scale"] = scales
        tensors[f"{module}.weight_scale_2"] = factor
    noted = {
        "producer": {"name": "modelopt", "version": version("nvidia-modelopt")},
        "quantization": {
            "quant_algo": "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": GROUP,
            "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"],
        },
    }
    write_json(folder / "hf_quant_config.json", noted)
    model.write(folder, tensors, convert_hf_quant_config_format(noted))


def decoded(folder: Path) -> list[np.ndarray]:
    tensors = load_file(folder / "model.safetensors")
    result = [tensors["lm_head.weight"].float().numpy()]
    for name, scales in tensors.items():
        module = name.removesuffix(".weight_scale")
        if module != name:
            codes = tensors[f"{module}.weight"]
            packed = NVFP4QTensor(torch.Size([codes.shape[0], 2 * codes.shape[1]]), torch.float32, codes)
            factor = tensors[f"{module}.weight_scale_2"]
            values = packed.dequantize(torch.float32, scale=scales, double_scale=factor, block_sizes={-1: GROUP})
            result.append(values.numpy())
    return result


def write(model: Model, folder: Path, layout: str) -> tuple[str, list[np.ndarray]]:
    writer = write_powers if layout.endswith("power") else export
    writer(model, folder)
    return f"nvidia-modelopt {version('nvidia-modelopt')}", decoded(folder)
