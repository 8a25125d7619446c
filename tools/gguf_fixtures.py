"""Writes tests/data/gguf: small GGUF files by llama.cpp's own library, and what that library decodes them to.

    python tools/gguf_fixtures.py        (needs the package gguf; see requirements-bench.txt)

Models of GLM-4.7-Flash's architecture with random weights (see glm_gguf.py), a file a mixture of types. Beside them lies
digests.json: of each file the FNV-1a digests of every matrix of a layer and of the output head, decoded to F32 by the
library. tests/gguf.rs decodes the same with this crate: the digests are the same if every value is, bit by bit.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize

import glm_gguf
from glm_gguf import F32, Shape, Tensor

NVFP4 = GGMLQuantizationType.NVFP4
# K of 256 for K-quants where hidden states come in; 64, NVFP4's block, everywhere else.
SHAPE = Shape(
    layers=2,
    hidden=256,
    heads=2,
    q_lora=64,
    kv_lora=64,
    nope=64,
    rope=16,
    value=32,
    experts=3,
    experts_used=2,
    expert_width=64,
    dense_width=64,
    vocabulary=64,
)
FOLDER = Path(__file__).parent.parent / "tests/data/gguf"


def draw_nvfp4(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random NVFP4 blocks: four scales around 1/8, none with a sign, and 32 bytes of codes."""
    blocks = rng.integers(0, 256, size=(count, 36), dtype=np.uint8)
    blocks[:, :4] = 0x18 + blocks[:, :4] % 16
    return blocks


def data_of(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    if tensor.kind != NVFP4:
        return glm_gguf.data_of(tensor)
    return draw_nvfp4(tensor.nbytes // 36, rng).reshape(tensor.byte_shape)


def tensors_of(mixture: str) -> list[Tensor]:
    if mixture != "nvfp4":
        return glm_gguf.tensors(SHAPE, mixture)
    all_tensors = glm_gguf.tensors(SHAPE, "mxfp4")
    return [t if t.kind == F32 else replace(t, kind=NVFP4) for t in all_tensors]


def factors_of(tensor: Tensor) -> np.ndarray:
    """Powers of two, which multiply without rounding: one a tensor, or one an expert."""
    count = SHAPE.experts if "_exps" in tensor.name else 1
    return np.array([0.5 * 2.0 ** (i % 2) for i in range(count)], dtype=np.float32)


def write(path: Path, mixture: str) -> None:
    rng = np.random.default_rng(7)
    writer = GGUFWriter(path, "deepseek2")
    glm_gguf.add_parameters(writer, SHAPE, "mxfp4" if mixture == "nvfp4" else mixture)
    for tensor in tensors_of(mixture):
        data = data_of(tensor, rng)
        raw = None if tensor.kind == F32 else tensor.kind
        writer.add_tensor(tensor.name, data, raw_dtype=raw)
        if tensor.kind == NVFP4:
            writer.add_tensor(tensor.name.replace(".weight", ".scale"), factors_of(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fnv(values: np.ndarray) -> str:
    """FNV-1a, 64 bits, over the values' bytes."""
    digest = 0xCBF29CE484222325
    for byte in np.ascontiguousarray(values, dtype="<f4").tobytes():
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{digest:016x}"


def digests(path: Path) -> list[str]:
    """Of each matrix of a layer's products and of the output head; of each expert's, where they are stacked."""
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    result = []
    for name, tensor in tensors.items():
        left_out = ("token_embd", "norm", "ffn_gate_inp", "exp_probs_b", ".scale")
        if any(part in name for part in left_out):
            continue
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        scale = tensors.get(name.replace(".weight", ".scale"))
        matrices = list(values) if "_exps" in name else [values]
        factors = np.ones(len(matrices)) if scale is None else scale.data
        result += [fnv(m * np.float32(f)) for m, f in zip(matrices, factors, strict=True)]
    return sorted(result)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = {}
    for mixture in ["mxfp4", "nvfp4", "q4_k_m", "mxfp4_moe"]:
        path = FOLDER / f"{mixture}.gguf"
        write(path, mixture)
        found[mixture] = digests(path)
    (FOLDER / "digests.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
