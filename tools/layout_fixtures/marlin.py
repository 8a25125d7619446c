"""Metal Marlin's MMFP4, for which there is no library that could be installed: written after its format, by safetensors.

`marlin-a` is the published layout (`.weight`, `.scales`), `marlin-b` its quantiser's (`.weight.scales`,
`.weight.group_size` and a quantization_config.json). Scales are a group's maximum over 6, in F16, as its rounding to
nearest takes them.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from source import Model, write_json

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def quantised(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[N, K]` and scales in F16 `[N, K/group]`."""
    groups = weight.reshape(len(weight), -1, group)
    scales = (np.abs(groups).max(-1) / 6 + 1e-10).astype(np.float16)
    scaled = groups / scales.astype(np.float32)[..., None]
    # The first of two that are as near.
    codes = np.abs(np.abs(scaled)[..., None] - VALUES).argmin(-1).astype(np.uint8)
    codes |= ((scaled < 0) & (codes > 0)).astype(np.uint8) << 3
    return codes.reshape(weight.shape), scales


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    values = VALUES[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))
    return values * np.repeat(scales.astype(np.float32), codes.shape[1] // scales.shape[1], axis=1)


def write(model: Model, folder: Path, layout: str) -> tuple[str, list[np.ndarray]]:
    linears = model.linears()
    group = 128 if all(weight.shape[1] % 128 == 0 for weight in linears.values()) else 32
    tensors, decoded = model.rest(), [model.tensors["lm_head.weight"].float().numpy()]
    for module, weight in linears.items():
        codes, scales = quantised(weight.float().numpy(), group)
        words = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
        for i in range(8):
            words |= codes[:, i::8].astype(np.uint32) << np.uint32(4 * i)
        tensors[f"{module}.weight"] = torch.from_numpy(words)
        if layout == "marlin-a":
            tensors[f"{module}.scales"] = torch.from_numpy(scales)
        else:
            tensors[f"{module}.weight.scales"] = torch.from_numpy(scales)
            tensors[f"{module}.weight.group_size"] = torch.tensor([group], dtype=torch.int32)
        decoded.append(decode(codes, scales))
    if layout == "marlin-b":
        noted = {"format": "mmfp4_e2m1_marlin", "method": "mr_gptq_cuda", "group_size": group, "use_hadamard": False}
        write_json(folder / "quantization_config.json", noted)
    model.write(folder, tensors, None)
    return f"safetensors {version('safetensors')}", decoded
