"""compressed-tensors, as llm-compressor writes a model whose weights alone are quantised.

Scales are the library's own choice (calculate_qparams), codes and packing its compressor's, the configuration its classes'.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from source import Model

PRESETS = {
    "compressed-nvfp4": ("NVFP4A16", "nvfp4-pack-quantized"),
    "compressed-mxfp4": ("MXFP4A16", "mxfp4-pack-quantized"),
}


def chosen_scales(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """What the library's observer of minimum and maximum would give."""
    groups = weight.float().unflatten(-1, (-1, scheme.weights.group_size))
    state = {}
    if scheme.weights.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.float().min(), weight.float().max())
    factor = state.get("weight_global_scale")
    state["weight_scale"], _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, factor)
    return state


def decode(state: dict[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """The library's values in F32, which its decompressor would round to BF16."""
    packed, scale = state["weight_packed"], state["weight_scale"]
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
    scale = decompress_mx_scale(scale).float() if scale.dtype == torch.uint8 else scale.float()
    factor = state.get("weight_global_scale")
    return dequantize(codes, scale, args=scheme.weights, dtype=torch.float32, global_scale=factor)


def write(model: Model, folder: Path, layout: str) -> tuple[str, list[np.ndarray]]:
    preset, name = PRESETS[layout]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(name)
    tensors, decoded = model.rest(), [model.tensors["lm_head.weight"].float().numpy()]
    for module, weight in model.linears().items():
        state = compressor.compress({"weight": weight.clone(), **chosen_scales(weight, scheme)}, scheme)
        state = {part: state[part] for part in compressor.compression_param_names(scheme)}
        tensors.update({f"{module}.{part}": tensor for part, tensor in state.items()})
        decoded.append(decode(state, scheme).numpy())
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=name,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head", "re:.*mlp.gate$"],
    )
    model.write(folder, tensors, config.model_dump(mode="json"))
    return f"compressed-tensors {version('compressed-tensors')}", decoded
