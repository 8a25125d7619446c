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


def stats(size, meta, random):
    """Of each part of attention its largest score and the sum of its weights."""
    largest = _noise(size // 2, torch.float32, random) * 3
    return _bytes(torch.stack([largest, torch.rand(largest.shape, device=DEVICE, generator=random) + 0.5], 1))


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


def _section(pool, meta, first, stride, size):
    """Bytes that each token has of a vector, [blocks, tokens of a block, size]."""
    tokens, block = meta["block"]
    return pool.as_strided((pool.numel() // block, tokens, size), (block, stride, 1), pool.storage_offset() + first)


def pool(size, meta, random):
    """Blocks whose vectors are stored as `parts` says."""
    made = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    for encoding, group, _, width, codes, code_stride, scales, scale_stride in meta["parts"]:
        tokens = size // meta["block"][1] * meta["block"][0]
        if encoding in ("f16", "bf16"):
            values = _bytes(_noise(tokens * width * 2, DTYPES[encoding], random).to(DTYPES[encoding]))
            of_scales = None
        elif encoding == "fp8":
            # No NaN.
            values = torch.randint(0, 0x7F, (tokens * width,), device=DEVICE, generator=random)
            values += 0x80 * torch.randint(0, 2, values.shape, device=DEVICE, generator=random)
            groups = -(-width // group)
            powers = torch.randint(-9, -6, (tokens * groups,), device=DEVICE, generator=random)
            of_scales = _bytes(torch.exp2(powers.float()))
        else:
            values = torch.randint(0, 256, (tokens * width // 2,), device=DEVICE, generator=random)
            of_scales = torch.randint(0x60, 0x70, (tokens * width // group,), device=DEVICE, generator=random)
        for data, first, stride in ((values, codes, code_stride), (of_scales, scales, scale_stride)):
            if data is not None:
                each = data.numel() // tokens
                section = _section(made, meta, first, stride, each)
                section.copy_(data.to(torch.uint8).view(section.shape))
    return made


def vectors(pool, meta):
    """Each vector's numbers in f64, [slots, width], rotated back."""
    found = []
    for encoding, group, rotation, width, codes, code_stride, scales, scale_stride in meta["parts"]:
        size = {"f16": 2 * width, "bf16": 2 * width, "fp8": width, "fp4": width // 2}[encoding]
        bytes_ = _section(pool, meta, codes, code_stride, size).reshape(-1, size)
        if encoding in ("f16", "bf16"):
            values = bytes_.view(DTYPES[encoding]).double()
        elif encoding == "fp8":
            groups = -(-width // group)
            factors = _section(pool, meta, scales, scale_stride, 4 * groups).reshape(-1, 4 * groups).view(torch.float32)
            factors = factors.double().repeat_interleave(group, 1)[:, :width]
            values = bytes_.view(torch.float8_e4m3fn).double() * factors
        else:
            factors = _section(pool, meta, scales, scale_stride, width // group).reshape(-1, width // group)
            factors = (factors.to(torch.int16) << 7).view(torch.float16).double()
            table = torch.tensor(VALUES + [-value for value in VALUES], device=pool.device, dtype=torch.float64)
            nibbles = torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(1)
            values = table[nibbles.long()] * factors.repeat_interleave(group, 1)
        found.append(_unrotated(values, rotation) if rotation else values)
    return found


def _unrotated(values, block):
    """src/kv/hadamard.rs: the transform of each block, then the signs."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=values.device)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    signs = [-1.0 if (i * 0x9E3779B1 & 0xFFFFFFFF) >> 31 else 1.0 for i in range(block)]
    signs = torch.tensor(signs, dtype=torch.float64, device=values.device)
    blocks = values.view(values.shape[0], -1, block)
    return ((blocks @ matrix) * block**-0.5 * signs).view(values.shape)


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
    "rotary": activations,
    "pool": pool,
    "bias": floats,
    "norm": floats,
    "parts": floats,
    "stats": stats,
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
