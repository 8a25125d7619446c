"""MLX's mxfp4 and nvfp4, as `mlx_lm.convert --quantize --q-mode …` writes a folder: names, stacks of experts, halves of
kv_b and the choice of what is quantised (embeddings and output head too) are mlx-lm's, codes and scales MLX's."""

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from source import Model


def write(model: Model, folder: Path, layout: str) -> tuple[str, list[np.ndarray]]:
    mode = layout.removeprefix("mlx-")
    # The model's own folder, which mlx-lm reads.
    model.write(folder, model.tensors, None)
    network, config = load_model(folder)
    network, config = quantize_model(network, config, None, None, mode=mode)
    for path in folder.iterdir():
        path.unlink()
    save_model(folder, network)
    save_config(config, folder / "config.json")
    tensors = mx.load(str(folder / "model.safetensors"))
    decoded = []
    for name, codes in tensors.items():
        module = name.removesuffix(".weight")
        # Embeddings are no product's.
        if f"{module}.scales" not in tensors or name == module or "embed_tokens" in name:
            continue
        values = mx.dequantize(codes, tensors[f"{module}.scales"], mode=mode, dtype=mx.float32)
        values = np.array(values)
        # An expert a matrix; the heads of a half of kv_b lie below one another.
        decoded += list(values) if ".switch_mlp." in name else [values]
    return f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}", decoded
