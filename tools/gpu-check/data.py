"""Operands, made on the GPU: what a role's bytes are like, and what FP4 bytes are worth."""
import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def generator(seed):
    return torch.Generator(device="cuda").manual_seed(seed)


def _bytes(values):
    return values.contiguous().view(torch.uint8).flatten()


def codes(size, meta, random):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda", generator=random)


def scales(size, meta, random):
    kind = meta["scales"]
    if kind in ("f16", "bf16"):
        return _bytes((torch.rand(size // 2, device="cuda", generator=random) * 0.02 + 0.01).to(DTYPES[kind]))
    low, high = {"e8m0": (118, 123), "e4m3": (0x20, 0x60)}[kind]
    return torch.randint(low, high, (size,), dtype=torch.uint8, device="cuda", generator=random)


def activations(size, meta, random):
    dtype = DTYPES[meta["dtype"]]
    return _bytes(torch.randn(size // dtype.itemsize, device="cuda", generator=random).to(dtype))


def floats(size, meta, random):
    return _bytes(torch.randn(size // 4, device="cuda", generator=random))


def output(size, meta, random):
    """Full of NaN: what is not written shows."""
    return torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")


# A role's name may go on behind a dot: `codes.1`.
ROLES = {"codes": codes, "scales": scales, "x": activations, "bias": floats, "norm": floats, "y": output, "scratch": output}


def operand(role, size, meta, random):
    return ROLES[role.split(".")[0]](size, meta, random)


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


def weight(codes, scales, meta, k):
    """FP4 bytes as f32, [rows, k]."""
    table = torch.tensor(VALUES + [-value for value in VALUES], device="cuda")
    nibbles = torch.stack([codes & 15, codes >> 4], -1).view(-1, k)
    values = scale_values(scales, meta["scales"], meta.get("factor")).view(-1, k // meta["group"])
    return table[nibbles.int()] * values.repeat_interleave(meta["group"], 1)
