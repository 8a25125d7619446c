"""The floating-point model that layouts are made from, and what all writers share."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r"(model\.layers\.\d+\.\S+_proj(?:_with_mqa)?)\.weight")
# As small as every layout allows: rows of 64, a block of GGUF's NVFP4, and some of 192, which is no power of two.
PART = {
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "hidden_size": 64,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "n_routed_experts": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 80,
    "v_head_dim": 32,
    "vocab_size": 64,
    "eos_token_id": [1],
    "pad_token_id": 0,
}


@dataclass
class Model:
    """A configuration as config.json has it, and BF16 tensors by name."""

    config: dict
    tensors: dict[str, torch.Tensor]

    def linears(self) -> dict[str, torch.Tensor]:
        """The weights `[N, K]` of the decoder's linear layers, by module."""
        matches = ((LINEAR.fullmatch(name), tensor) for name, tensor in self.tensors.items())
        return {match[1]: tensor for match, tensor in matches if match}

    def rest(self) -> dict[str, torch.Tensor]:
        """Everything else: embeddings, output head, routers, norms, biases."""
        return {name: tensor for name, tensor in self.tensors.items() if not LINEAR.fullmatch(name)}

    def write(self, folder: Path, tensors: dict[str, torch.Tensor], quantisation: dict | None) -> None:
        """One safetensors file of `tensors`, and a config.json that tells of `quantisation`."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        noted = {} if quantisation is None else {"quantization_config": quantisation}
        write_json(folder / "config.json", {**self.config, **noted})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def read(folder: Path) -> Model:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("golden"):
            tensors.update(load_file(path))
    return Model(json.loads((folder / "config.json").read_text()), dict(sorted(tensors.items())))


def part(model: Model) -> Model:
    """The first rows and columns of the first tensors: values of a trained model, though they mean nothing."""
    config = {**model.config, **PART}
    tensors = {}
    for name, tensor in model.tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if layer and int(layer[1]) >= config["num_hidden_layers"]:
            continue
        if expert and int(expert[1]) >= config["n_routed_experts"]:
            continue
        sizes = part_shape(name, config)
        tensors[name] = tensor[tuple(slice(size) for size in sizes)].clone()
        if tuple(tensors[name].shape) != sizes:
            raise ValueError(f"{name}: {tuple(tensor.shape)} is smaller than {sizes}")
    return Model(config, tensors)


def part_shape(name: str, c: dict) -> tuple[int, ...]:
    """The shape of a tensor in a model of configuration `c`."""
    heads, nope, rope, value = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    hidden, queries, latent = c["hidden_size"], c["q_lora_rank"], c["kv_lora_rank"]
    experts = ".experts." in name or "shared_experts" in name
    width = c["moe_intermediate_size"] if experts else c["intermediate_size"]
    known = {
        "q_a_proj.weight": (queries, hidden),
        "q_a_layernorm.weight": (queries,),
        "q_b_proj.weight": (heads * (nope + rope), queries),
        "kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (nope + value), latent),
        "o_proj.weight": (hidden, heads * value),
        "gate_proj.weight": (width, hidden),
        "up_proj.weight": (width, hidden),
        "down_proj.weight": (hidden, width),
        "mlp.gate.weight": (c["n_routed_experts"], hidden),
        "mlp.gate.e_score_correction_bias": (c["n_routed_experts"],),
        "embed_tokens.weight": (c["vocab_size"], hidden),
        "lm_head.weight": (c["vocab_size"], hidden),
        "norm.weight": (hidden,),
        "layernorm.weight": (hidden,),
    }
    return next(shape for suffix, shape in known.items() if name.endswith(suffix))


def digest(matrix: np.ndarray) -> str:
    """The bits of all values in F32, in order, as the digits of a number in an odd base, modulo 2^64; zeros have no sign,
    which not every library's codes have."""
    bits = (np.ascontiguousarray(matrix, dtype=np.float32).ravel() + np.float32(0)).view(np.uint32).astype(np.uint64)
    powers = np.cumprod(np.full(bits.size, 0x9E3779B97F4A7C15, dtype=np.uint64))
    return f"{int(((bits + np.uint64(1)) * powers[::-1]).sum(dtype=np.uint64)):016x}"
