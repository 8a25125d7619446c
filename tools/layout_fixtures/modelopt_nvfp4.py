"""ModelOpt's NVFP4, as its export writes a quantised checkpoint: codes, scales and factors by NVFP4QTensor.

`modelopt-nvfp4` has the factors that the library chooses. Those of `modelopt-nvfp4-power` are the next powers of two, given
to it: this crate's own files divide by their factor, and only for a power of two are dividing and multiplying by the
reciprocal the same to the last bit.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from source import Model, write_json

GROUP = 16


def write(model: Model, folder: Path, layout: str) -> tuple[str, list[np.ndarray]]:
    library = version("nvidia-modelopt")
    tensors, decoded = model.rest(), [model.tensors["lm_head.weight"].float().numpy()]
    for module, weight in model.linears().items():
        factor = NVFP4QTensor.get_weights_scaling_factor_2(weight)
        if layout.endswith("power"):
            factor = torch.exp2(torch.ceil(torch.log2(factor)))
        packed, scales, factor = NVFP4QTensor.quantize(weight.clone(), GROUP, weights_scaling_factor_2=factor)
        tensors[f"{module}.weight"] = packed._quantized_data
        tensors[f"{module}.weight_scale"] = scales
        tensors[f"{module}.weight_scale_2"] = factor
        # What W4A4 exports have beside each weight: the activations' factor, of no use here.
        tensors[f"{module}.input_scale"] = torch.tensor(1 / 64)
        values = packed.dequantize(torch.float32, scale=scales, double_scale=factor, block_sizes={-1: GROUP})
        decoded.append(values.numpy())
    noted = {
        "producer": {"name": "modelopt", "version": library},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": GROUP,
            "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"],
        },
    }
    write_json(folder / "hf_quant_config.json", noted)
    model.write(folder, tensors, convert_hf_quant_config_format(noted))
    return f"nvidia-modelopt {library}", decoded
