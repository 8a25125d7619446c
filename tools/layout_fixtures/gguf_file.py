"""GGUF files as llama.cpp's converter writes them: names, metadata and blocks by its library, gguf.

That library quantises to MXFP4, Q4_0, Q5_1 and Q8_0. NVFP4, Q4_K and Q6_K it only decodes: those blocks are packed in
gguf_blocks.py, and it is the library's decoding of them that counts. `gguf-q4_k_m` is llama.cpp's mixture of that name.
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import gguf_blocks
import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    ExpertGatingFuncType,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    get_tensor_name_map,
)
from gguf.quants import dequantize, quantize
from source import Model

sys.path.append(str(Path(__file__).parent.parent))
from glm_gguf import kind_of  # noqa: E402  (beside this folder)

F32, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16
ARCHITECTURE = MODEL_ARCH.DEEPSEEK2


def renamed(model: Model) -> dict[str, np.ndarray]:
    """Tensors in F32 as the converter has them: experts stacked, kv_b in halves, its keys transposed."""
    c = model.config
    names = get_tensor_name_map(ARCHITECTURE, c["num_hidden_layers"])
    result, experts = {}, {}

    def add(name: str, values: torch.Tensor) -> None:
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"the library knows no name of {name}")
        result[theirs] = values.float().numpy()

    for name, tensor in model.tensors.items():
        expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight", name)
        if expert:
            experts.setdefault(f"{expert[1]}.{expert[3]}.weight", {})[int(expert[2])] = tensor
        elif name.endswith("kv_b_proj.weight"):
            heads = tensor.unflatten(0, (c["num_attention_heads"], -1))
            add(name.replace("kv_b_proj", "k_b_proj"), heads[:, : c["qk_nope_head_dim"]].transpose(1, 2))
            add(name.replace("kv_b_proj", "v_b_proj"), heads[:, c["qk_nope_head_dim"] :])
        else:
            add(name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor)
    for name, found in experts.items():
        add(name, torch.stack([found[i] for i in range(len(found))]))
    return result


def type_of(layout: str, name: str, values: np.ndarray, layers: int) -> GGMLQuantizationType:
    if values.ndim == 1 or "ffn_gate_inp" in name:
        return F32
    kind = layout.removeprefix("gguf-")
    if kind == "q4_k_m":
        block = re.match(r"blk\.(\d+)\.", name)
        return kind_of(kind, name, values.shape, int(block[1]) if block else 0, layers)
    table = name in ("token_embd.weight", "output.weight")
    return BF16 if table and kind.endswith("fp4") else GGMLQuantizationType[kind.upper()]


def add_parameters(writer: GGUFWriter, c: dict) -> None:
    """The metadata that the converter writes for this architecture, but the tokenizer."""
    writer.add_name("a demo model")
    writer.add_quantization_version(2)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_leading_dense_block_count(c["mlp_layer_types"].count("dense"))
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_head_count(c["num_attention_heads"])
    # Absorbed latent attention has one head of keys (latent and rope) and values (latent).
    writer.add_head_count_kv(1)
    writer.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
    writer.add_value_length(c["kv_lora_rank"])
    writer.add_key_length_mla(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_kv_lora_rank(c["kv_lora_rank"])
    writer.add_rope_dimension_count(c["qk_rope_head_dim"])
    writer.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_weights_norm(c["norm_topk_prob"])
    writer.add_expert_weights_scale(c["routed_scaling_factor"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_tokenizer_model("no_vocab")


def decoded(path: Path) -> list[np.ndarray]:
    """Every matrix of a layer's products and of the output head as the library reads the file; each expert's alone."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    result = []
    for name, tensor in tensors.items():
        if any(part in name for part in ("token_embd", "norm", "ffn_gate_inp", "exp_probs_b", ".scale")):
            continue
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        matrices = list(values) if "_exps" in name else [values]
        scale = tensors.get(name.replace(".weight", ".scale"))
        factors = np.ones(len(matrices), dtype=np.float32) if scale is None else scale.data
        result += [matrix * factor for matrix, factor in zip(matrices, factors, strict=True)]
    return result


def write(model: Model, folder: Path, layout: str) -> tuple[str, list[np.ndarray]]:
    path = folder / "model.gguf"
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[ARCHITECTURE])
    add_parameters(writer, model.config)
    for name, values in renamed(model).items():
        kind = type_of(layout, name, values, model.config["num_hidden_layers"])
        if kind == GGMLQuantizationType.NVFP4:
            blocks, factors = gguf_blocks.nvfp4(values, len(values) if "_exps" in name else 1)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            writer.add_tensor(name.replace(".weight", ".scale"), factors)
        elif kind in gguf_blocks.PACKED:
            writer.add_tensor(name, gguf_blocks.PACKED[kind](values), raw_dtype=kind)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=None if kind == F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"gguf {version('gguf')}", decoded(path)
