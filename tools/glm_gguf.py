"""GGUF files of GLM-4.7-Flash's shapes with random weights, to time llama.cpp on what our program runs.

Blocks are drawn in the block format itself, uniform codes under scales of the wanted size; nothing is quantised.
Speed does not depend on the values as long as they are ordinary, and they are: a weight matrix of K columns has
standard deviation 1 / sqrt(K), those that write into the residual stream 1 / sqrt(2 K layers), so that activations
stay of order 1. Routers are random in F32 with correction bias 0, so that tokens spread over all experts.

Three mixtures, named as llama.cpp names them:
  mxfp4      every matrix MXFP4: attention, experts, shared experts, output head, and the embedding too, which
             llama.cpp looks rows up in as it is. No tool of llama.cpp makes this one; it is what compares with ours.
  q4_k_m     what `llama-quantize … Q4_K_M` chooses: Q4_K, with Q6_K in the head and half of the down projections,
             and Q5_0 where 256 does not divide the columns (k_b: 192).
  mxfp4_moe  what `llama-quantize … MXFP4_MOE` chooses: three-dimensional tensors MXFP4, that is experts, k_b and v_b;
             the rest Q8_0.

The multi-token-prediction layer is left out: no timed run would read it. The file has no tokenizer ("no_vocab"):
llama-bench draws token numbers below the vocabulary's size.
"""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape

F32 = GGMLQuantizationType.F32
MXFP4 = GGMLQuantizationType.MXFP4
Q4_K = GGMLQuantizationType.Q4_K
Q5_0 = GGMLQuantizationType.Q5_0
Q6_K = GGMLQuantizationType.Q6_K
Q8_0 = GGMLQuantizationType.Q8_0

FILE_TYPES = {
    "mxfp4": LlamaFileType.MOSTLY_MXFP4_MOE,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "mxfp4_moe": LlamaFileType.MOSTLY_MXFP4_MOE,
}
# In the names of files: to be raised when the same name would hold other bytes, so that no stale file is timed.
GENERATION = 1
# Blocks drawn at a time, which bounds what is held beside the tensor being written (a block has at most 210 bytes).
CHUNK = 1 << 18


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of GLM-4.7-Flash's architecture; the defaults are the published ones."""

    layers: int
    dense_layers: int = 1
    hidden: int = 2048
    heads: int = 20
    q_lora: int = 768
    kv_lora: int = 512
    nope: int = 192
    rope: int = 64
    value: int = 256
    experts: int = 64
    experts_used: int = 4
    expert_width: int = 1536
    dense_width: int = 10240
    vocabulary: int = 154880


SHAPES = {"slice": Shape(layers=4), "full": Shape(layers=47)}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: shape as numpy has it (columns last), standard deviation of its values (0: `mean`
    throughout), and the share of its bytes that one decoded token reads."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    std: float
    mean: float = 0.0
    share: float = 1.0

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return tuple(quant_shape_to_byte_shape(self.shape, self.kind))

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.byte_shape))


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the layers whose down projections are Q6_K in Q4_K_M."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def kind_of(mixture: str, name: str, shape: tuple[int, ...], layer: int, layers: int) -> GGMLQuantizationType:
    """The type that `mixture` gives to a weight matrix."""
    if mixture == "mxfp4":
        return MXFP4
    if mixture == "mxfp4_moe":
        return MXFP4 if len(shape) == 3 else Q8_0
    larger = name == "output.weight" or ("ffn_down" in name and more_bits(layer, layers))
    kind = Q6_K if larger else Q4_K
    if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    return Q8_0 if larger else Q5_0


def tensors(shape: Shape, mixture: str) -> list[Tensor]:
    """All tensors of the model, in the order of the file."""
    s = shape
    result = []

    def matrix(name, *dims, layer=0, residual=False, share=1.0):
        std = (dims[-1] * (2 * s.layers if residual else 1)) ** -0.5
        kind = kind_of(mixture, name, dims, layer, s.layers)
        result.append(Tensor(name, dims, kind, std, share=share))

    def norm(name, size):
        result.append(Tensor(name, (size,), F32, 0.0, mean=1.0))

    # Order 1, as hidden states are: the first norm would hide any other size.
    embedding = (s.vocabulary, s.hidden)
    kind = kind_of(mixture, "token_embd.weight", embedding, 0, s.layers)
    result.append(Tensor("token_embd.weight", embedding, kind, 1.0, share=1 / s.vocabulary))
    norm("output_norm.weight", s.hidden)
    matrix("output.weight", s.vocabulary, s.hidden)

    for layer in range(s.layers):
        b = f"blk.{layer}."
        norm(b + "attn_norm.weight", s.hidden)
        matrix(b + "attn_q_a.weight", s.q_lora, s.hidden, layer=layer)
        norm(b + "attn_q_a_norm.weight", s.q_lora)
        matrix(b + "attn_q_b.weight", s.heads * (s.nope + s.rope), s.q_lora, layer=layer)
        matrix(b + "attn_kv_a_mqa.weight", s.kv_lora + s.rope, s.hidden, layer=layer)
        norm(b + "attn_kv_a_norm.weight", s.kv_lora)
        matrix(b + "attn_k_b.weight", s.heads, s.kv_lora, s.nope, layer=layer)
        matrix(b + "attn_v_b.weight", s.heads, s.value, s.kv_lora, layer=layer)
        matrix(b + "attn_output.weight", s.hidden, s.heads * s.value, layer=layer, residual=True)
        norm(b + "ffn_norm.weight", s.hidden)
        if layer < s.dense_layers:
            matrix(b + "ffn_gate.weight", s.dense_width, s.hidden, layer=layer)
            matrix(b + "ffn_up.weight", s.dense_width, s.hidden, layer=layer)
            matrix(b + "ffn_down.weight", s.hidden, s.dense_width, layer=layer, residual=True)
            continue
        result.append(Tensor(b + "ffn_gate_inp.weight", (s.experts, s.hidden), F32, s.hidden**-0.5))
        result.append(Tensor(b + "exp_probs_b.bias", (s.experts,), F32, 0.0))
        used = s.experts_used / s.experts
        matrix(b + "ffn_gate_exps.weight", s.experts, s.expert_width, s.hidden, layer=layer, share=used)
        matrix(b + "ffn_up_exps.weight", s.experts, s.expert_width, s.hidden, layer=layer, share=used)
        matrix(b + "ffn_down_exps.weight", s.experts, s.hidden, s.expert_width, layer=layer, residual=True, share=used)
        matrix(b + "ffn_gate_shexp.weight", s.expert_width, s.hidden, layer=layer)
        matrix(b + "ffn_up_shexp.weight", s.expert_width, s.hidden, layer=layer)
        matrix(b + "ffn_down_shexp.weight", s.hidden, s.expert_width, layer=layer, residual=True)
    return result


def bytes_per_token(all_tensors: list[Tensor]) -> int:
    """Bytes of weights that one decoded token reads: everything but the experts not chosen and all rows but one of
    the embedding; the cache is not counted."""
    return round(sum(t.nbytes * t.share for t in all_tensors))


def halves(size: float, jitter: np.ndarray) -> np.ndarray:
    """F16 scales around `size`, 0.75 to 1.25 times it by the random bytes `jitter`, as bytes [blocks, 2]."""
    scales = (size * (0.75 + jitter.astype(np.float32) / 510)).astype("<f2")
    return scales.view(np.uint8).reshape(-1, 2)


def draw(kind: GGMLQuantizationType, count: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """`count` blocks of random weights with standard deviation `std`, as bytes [count, bytes of a block]."""
    size = GGML_QUANT_SIZES[kind][1]
    words = rng.integers(0, 1 << 64, size=(count * size + 7) // 8, dtype=np.uint64)
    blocks = words.view(np.uint8)[: count * size].reshape(count, size)
    jitter = blocks[:, 0].copy()
    # Below, the number that divides `std` is the root mean square of a uniform code times its inner scale.
    if kind == MXFP4:
        # One E8M0 scale: a power of two, or the next one as often as the mean square wants it.
        target = std / 2.926
        power = np.floor(np.log2(target))
        often = ((target / 2.0**power) ** 2 - 1) / 3
        blocks[:, 0] = np.uint8(127 + int(power)) + (jitter < round(256 * often))
    elif kind == Q8_0:
        blocks[:, 0:2] = halves(std / 73.9, jitter)
    elif kind == Q5_0:
        blocks[:, 0:2] = halves(std / 9.233, jitter)
    elif kind == Q6_K:
        # 16 signed scales, here 48 to 79; the F16 scale of the block is its last two bytes.
        blocks[:, 192:208] = 48 + blocks[:, 192:208] % 32
        blocks[:, 208:210] = halves(std / (18.473 * 64.2), jitter)
    elif kind == Q4_K:
        # Eight scales of 6 bits, here 32 to 63, and eight minima equal to them; with the minimum's F16 scale 7.5
        # times the other, a weight is d · scale · (code - 7.5).
        inner = 32 + blocks[:, 4:12] % 32
        low, high = inner[:, :4], inner[:, 4:]
        blocks[:, 4:8] = blocks[:, 8:12] = low | (high >> 4) << 6
        blocks[:, 12:16] = (high & 15) | (high & 15) << 4
        blocks[:, 0:2] = halves(std / (4.610 * 48.4), jitter)
        blocks[:, 2:4] = (blocks[:, 0:2].copy().view("<f2") * np.float16(7.5)).astype("<f2").view(np.uint8)
    else:
        raise ValueError(f"no random blocks of type {kind.name}: only MXFP4, Q4_K, Q5_0, Q6_K and Q8_0")
    return blocks


def data_of(tensor: Tensor) -> np.ndarray:
    """The tensor's data, the same on every call: F32 values, or bytes of blocks."""
    rng = np.random.Generator(np.random.SFC64(zlib.crc32(tensor.name.encode())))
    if tensor.kind == F32:
        if tensor.std == 0:
            return np.full(tensor.shape, tensor.mean, dtype=np.float32)
        return rng.standard_normal(tensor.shape, dtype=np.float32) * np.float32(tensor.std)
    size = GGML_QUANT_SIZES[tensor.kind][1]
    count = tensor.nbytes // size
    data = np.empty((count, size), dtype=np.uint8)
    for start in range(0, count, CHUNK):
        end = min(start + CHUNK, count)
        data[start:end] = draw(tensor.kind, end - start, tensor.std, rng)
    return data.reshape(tensor.byte_shape)


def add_parameters(writer: GGUFWriter, shape: Shape, mixture: str) -> None:
    """The metadata that llama.cpp's converter writes for this architecture, but the tokenizer."""
    s = shape
    writer.add_name("GLM-4.7-Flash's shapes, random weights")
    writer.add_file_type(FILE_TYPES[mixture])
    writer.add_quantization_version(2)
    writer.add_block_count(s.layers)
    writer.add_context_length(202752)
    writer.add_vocab_size(s.vocabulary)
    writer.add_embedding_length(s.hidden)
    writer.add_feed_forward_length(s.dense_width)
    writer.add_leading_dense_block_count(s.dense_layers)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_head_count(s.heads)
    # Absorbed latent attention has one head of keys (latent and rope) and values (latent).
    writer.add_head_count_kv(1)
    writer.add_key_length(s.kv_lora + s.rope)
    writer.add_value_length(s.kv_lora)
    writer.add_key_length_mla(s.nope + s.rope)
    writer.add_value_length_mla(s.value)
    writer.add_q_lora_rank(s.q_lora)
    writer.add_kv_lora_rank(s.kv_lora)
    writer.add_rope_dimension_count(s.rope)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.experts_used)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(s.expert_width)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(1.8)
    # Without it llama.cpp runs softmax, silently, unless the model has 47 or 48 layers.
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_tokenizer_model("no_vocab")


def write(path: Path, shape: Shape, mixture: str, progress=lambda done, total: None) -> None:
    """Writes the model to `path`; a file of that name is always whole. One tensor is held at a time, of at most
    0.34 GB at the true sizes. `progress` is called with bytes written and bytes in all."""
    all_tensors = tensors(shape, mixture)
    total = sum(t.nbytes for t in all_tensors)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    writer = GGUFWriter(aside, "deepseek2")
    try:
        try:
            add_parameters(writer, shape, mixture)
            for t in all_tensors:
                if t.kind == F32:
                    writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes)
                else:
                    writer.add_tensor_info(t.name, t.byte_shape, np.dtype(np.uint8), t.nbytes, raw_dtype=t.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for t in all_tensors:
                writer.write_tensor_data(data_of(t))
                done += t.nbytes
                progress(done, total)
            writer.flush()
            # On the disk now, not while something is being timed.
            os.fsync(writer.fout[0].fileno())
        finally:
            writer.close()
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
