"""Operands, made on the GPU: what a role's bytes are like, and what bytes of weights are worth."""
import torch

DEVICE = "cuda"
# Numbers without a sign are of 32 bits, and small.
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "u32": torch.int32}
DTYPES |= {"bytes": torch.uint8, "most bytes": torch.uint8}
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def generator(seed):
    return torch.Generator(device=DEVICE).manual_seed(seed)


def _bytes(values):
    return values.contiguous().view(torch.uint8).flatten()


def _noise(size, dtype, random):
    return torch.randn(size // dtype.itemsize, device=DEVICE, generator=random)


def codes(size, meta, random):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE, generator=random)


def scales(size, meta, random):
    kind = meta["scales"]
    if kind in ("f16", "bf16"):
        return _bytes((torch.rand(size // 2, device=DEVICE, generator=random) * 0.02 + 0.01).to(DTYPES[kind]))
    low, high = {"e8m0": (118, 123), "e4m3": (0x20, 0x60)}[kind]
    return torch.randint(low, high, (size,), dtype=torch.uint8, device=DEVICE, generator=random)


def dense(size, meta, random):
    """So that products are about as large as activations."""
    dtype = DTYPES[meta["weight"]]
    return _bytes((_noise(size, dtype, random) * meta["k"] ** -0.5).to(dtype))


def activations(size, meta, random):
    dtype = DTYPES[meta["dtype"]]
    return _bytes(_noise(size, dtype, random).to(dtype))


def floats(size, meta, random):
    return _bytes(_noise(size, torch.float32, random))


def shares(size, meta, random):
    return _bytes(torch.rand(size // 4, device=DEVICE, generator=random))


def ids(size, meta, random):
    """Each token's experts, all of them others. Tokens share none where there are enough; else the first experts are chosen
    often, and the last hardly ever."""
    tokens, top_k, experts = meta["m"], meta["top_k"], meta["experts"]
    if tokens * top_k <= experts:
        chosen = torch.randperm(experts, device=DEVICE, generator=random)[: tokens * top_k]
    else:
        late = torch.linspace(0, 1, experts, device=DEVICE)
        chosen = (torch.rand(tokens, experts, device=DEVICE, generator=random) + late).argsort(1)[:, :top_k]
    return _bytes(chosen.int())


def output(size, meta, random):
    """Full of NaN: what is not written shows."""
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE)


# A role's name may go on behind a dot: `codes.1`.
ROLES = {
    "codes": codes,
    "scales": scales,
    "w": dense,
    "x": activations,
    "delta": activations,
    "kv": activations,
    "queries": activations,
    "bias": floats,
    "norm": floats,
    "cos": floats,
    "sin": floats,
    "ids": ids,
    "weights": shares,
    "y": output,
    "scratch": output,
}


def operand(described, meta, random):
    """As works.json describes it."""
    if "contents" in described:
        return torch.frombuffer(bytearray.fromhex(described["contents"]), dtype=torch.uint8).to(DEVICE)
    return ROLES[described["role"].split(".")[0]](described["len"], meta, random)


def scale_values(data, kind, factor=None):
    """Scales in f32, the tensor's factor included: ["mul" or "div", value]."""
    if kind == "e8m0":
        values = torch.exp2(data.float() - 127)
    elif kind == "e4m3":
        values = data.view(torch.float8_e4m3fn).float()
    else:
        values = data.view(DTYPES[kind]).float()
    if factor is None:
        return values
    by, number = factor
    return values * number if by == "mul" else values / number


def fp4(codes, scales, meta, k, factor=None):
    """FP4 bytes as f32, [rows, k]."""
    table = torch.tensor(VALUES + [-value for value in VALUES], device=codes.device)
    nibbles = torch.stack([codes & 15, codes >> 4], -1).view(-1, k)
    values = scale_values(scales, meta["scales"], factor).view(-1, k // meta["group"])
    return table[nibbles.long()] * values.repeat_interleave(meta["group"], 1)


def weight(operands, meta, end=""):
    """The weight of these operands as f32, [rows, k], however it is stored."""
    if "weight" in meta:
        return operands["w" + end].view(DTYPES[meta["weight"]]).view(-1, meta["k"]).float()
    return fp4(operands["codes" + end], operands["scales" + end], meta, meta["k"], meta["factor"])
