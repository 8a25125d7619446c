"""Blocks of the types that the gguf library decodes and does not write (`ggml-common.h`, llama.cpp's project).

Plain rounding, not llama.cpp's searches: what is tested is how blocks are read.
"""

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import NVFP4

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def rows(values: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Blocks `[count, bytes]` as bytes `[…, N, bytes of a row]`."""
    return np.ascontiguousarray(blocks).reshape(*values.shape[:-1], -1)


def nvfp4(values: np.ndarray, matrices: int) -> tuple[np.ndarray, np.ndarray]:
    """NVFP4 blocks, and a factor for each of so many matrices, a power of two: four scales, then each one's 16 codes, the
    first half of them in low nibbles."""
    stack = values.reshape(matrices, -1)
    factors = np.exp2(np.ceil(np.log2(np.abs(stack).max(-1) / (6 * 448)))).astype(np.float32)
    groups = (stack / factors[:, None]).reshape(-1, 16)
    scales = NVFP4.fp32_to_ue4m3(np.abs(groups).max(-1) / np.float32(6))
    # The library's scales are half of what is stored, its codes' values double.
    decoded = 2 * NVFP4.ue4m3_to_fp32(scales).astype(np.float32)
    scaled = groups / np.where(decoded == 0, np.float32(1), decoded)[:, None]
    codes = np.abs(np.abs(scaled)[..., None] - VALUES).argmin(-1).astype(np.uint8)
    codes |= ((scaled < 0) & (codes > 0)).astype(np.uint8) << 3
    packed = (codes[:, :8] | codes[:, 8:] << 4).reshape(-1, 32)
    return rows(values, np.concatenate([scales.reshape(-1, 4), packed], axis=1)), factors


def halves(values: np.ndarray) -> np.ndarray:
    """F16 values as bytes `[count, 2]`."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def quotient(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Division to whole numbers; by zero, to zero."""
    return np.rint(np.divide(values, by, out=np.zeros_like(values), where=by != 0))


def q4_k(values: np.ndarray) -> np.ndarray:
    """Blocks of 256: F16 `d` and `dmin`, eight scales and minima of six bits in twelve bytes, codes, two in a byte."""
    groups = values.reshape(-1, 8, 32)
    low = np.minimum(groups.min(-1), 0)
    size = (groups.max(-1) - low) / 15
    d = (size.max(-1, keepdims=True) / 63).astype(np.float16)
    dmin = ((-low).max(-1, keepdims=True) / 63).astype(np.float16)
    wide = d.astype(np.float32), dmin.astype(np.float32)
    scales = quotient(size, np.broadcast_to(wide[0], size.shape)).clip(0, 63)
    minima = quotient(-low, np.broadcast_to(wide[1], low.shape)).clip(0, 63)
    step, start = (scales * wide[0])[..., None], (minima * wide[1])[..., None]
    codes = quotient(groups + start, np.broadcast_to(step, groups.shape)).clip(0, 15).astype(np.uint8)
    scales, minima = scales.astype(np.uint8), minima.astype(np.uint8)
    packed = np.concatenate(
        [
            scales[:, :4] | scales[:, 4:] >> 4 << 6,
            minima[:, :4] | minima[:, 4:] >> 4 << 6,
            scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    pairs = codes.reshape(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return rows(values, np.concatenate([halves(d), halves(dmin), packed, nibbles], axis=1))


def q6_k(values: np.ndarray) -> np.ndarray:
    """Blocks of 256: codes' lower four bits, their upper two, sixteen signed scales, F16 `d`."""
    groups = values.reshape(-1, 16, 16)
    size = np.abs(groups).max(-1) / 31
    d = (size.max(-1, keepdims=True) / 127).astype(np.float16)
    wide = d.astype(np.float32)
    scales = quotient(size, np.broadcast_to(wide, size.shape)).clip(0, 127)
    step = (scales * wide)[..., None]
    codes = (quotient(groups, np.broadcast_to(step, groups.shape)).clip(-32, 31) + 32).astype(np.uint8)
    # Two halves of 128, each of four runs of 32.
    runs = codes.reshape(-1, 2, 4, 32)
    lower = np.stack([runs[:, :, 0] & 15 | runs[:, :, 2] << 4, runs[:, :, 1] & 15 | runs[:, :, 3] << 4], axis=2)
    upper = sum((runs[:, :, i] >> 4 << 2 * i for i in range(1, 4)), start=runs[:, :, 0] >> 4)
    parts = [lower.reshape(-1, 128), upper.reshape(-1, 64), scales.astype(np.int8).view(np.uint8), halves(d)]
    return rows(values, np.concatenate(parts, axis=1))


PACKED = {GGMLQuantizationType.Q4_K: q4_k, GGMLQuantizationType.Q6_K: q6_k}
