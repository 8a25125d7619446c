"""What a paged cache stores of new tokens, in torch: src/kv/codec.rs and src/kv/hadamard.rs, bit for bit."""
import torch

LARGEST_SCALE, INFINITE_SCALE, NAN_SCALE = 0xF7, 0xF8, 0xFF
BORDERS = [(0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)]
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def _bytes(values):
    return values.contiguous().view(torch.uint8)


def _power_of_two(exponent):
    return ((exponent + 127) << 23).int().view(torch.float32)


def rotated(x, block):
    """Blocks of a vector by the Hadamard matrix over √block, signs turned first."""
    if block == 1:
        return x
    i = torch.arange(block, device=x.device)
    turns = ((i * 0x9E3779B1) & 0xFFFFFFFF) >> 31 == 1
    x = x.view(*x.shape[:-1], -1, block)
    x, distance = torch.where(turns, -x, x), 1
    while distance < block:
        pairs = x.view(*x.shape[:-1], -1, 2, distance)
        a, b = pairs.unbind(-2)
        x = torch.stack([a + b, a - b], -2).view(x.shape)
        distance *= 2
    root = torch.tensor(float(block), device=x.device).sqrt()
    return (x * (1.0 / root)).flatten(-2)


def fp8(x):
    """Codes and scales of numbers: E4M3, a power of two every 128."""
    codes, scales = [], []
    for group in x.split(128, 1):
        largest = torch.where(group.isfinite(), group.abs(), 0).amax(1, keepdim=True)
        exponent = (((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 127 - 8).clamp(min=-126)
        scales.append(_power_of_two(exponent))
        scaled = group * _power_of_two(-exponent)
        code = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        codes.append(torch.where(group.isfinite(), code, 0x7F))
    return torch.cat(codes, 1), _bytes(torch.cat(scales, 1))


def _ue5m3(x):
    exponent = ((x.view(torch.int32) >> 23) - 127).clamp(min=-14)
    steps = (x * _power_of_two(3 - exponent)).round().int()
    return (((exponent + 14) << 3) + steps).clamp(max=INFINITE_SCALE)


def _value(scale):
    return (scale << 7).short().view(torch.float16).float()


def _code(a, scale):
    """The E2M1 code without a sign nearest to a."""
    return sum(((a >= border * scale) if inclusive else (a > border * scale)).int() for border, inclusive in BORDERS)


def fp4(x, size):
    """Codes and scales of numbers: E2M1, a UE5M3 every `size`; of eight scales the one with the least squared error."""
    groups = x.view(x.shape[0], -1, size)
    finite = groups.isfinite().all(2)
    largest = torch.where(finite, groups.abs().amax(2), 0)
    ideal = _ue5m3(largest * (1.0 / 6.0))
    first = (ideal - 2).clamp(min=0)
    tried = (first[..., None] + torch.arange(8, device=x.device)).clamp(max=LARGEST_SCALE)
    values, table = _value(tried), torch.tensor(VALUES, device=x.device)
    errors = torch.zeros_like(values)
    for i in range(size):
        a = groups[..., i, None].abs()
        distance = a - table[_code(a, values).long()] * values
        errors = errors + distance * distance
    # The first of the smallest: argmin promises none.
    best = (errors == errors.amin(2, keepdim=True)).int().argmax(2)
    chosen = tried.gather(2, best[..., None])[..., 0]
    chosen = torch.where(ideal == INFINITE_SCALE, INFINITE_SCALE, chosen)
    chosen = torch.where(finite, chosen, NAN_SCALE)
    code = torch.where(chosen[..., None] == 0, 0, _code(groups.abs(), _value(chosen)[..., None]))
    code = (code | torch.where((groups < 0) & (code > 0), 8, 0)).view(x.shape)
    return (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8), chosen.to(torch.uint8)


def encoded(x, cache):
    """Codes of vectors [tokens, width], and scales, if any."""
    if cache in ("f16", "bf16"):
        return _bytes(x.to(torch.float16 if cache == "f16" else torch.bfloat16)), None
    return fp8(x) if cache == "fp8" else fp4(x, 32 if "32" in cache else 16)


def stored(operands, meta, vectors):
    """The pool, of which only the tokens' bytes are not as they were (0xFF): their vectors, each [tokens, width] in F32."""
    pool = torch.full_like(operands["y.pool"], 0xFF)
    slots = operands["index"].view(torch.int32)[: meta["m"]].long()
    block, offset = slots // meta["block_tokens"], slots % meta["block_tokens"]
    # Behind a latent lies a rotary key, in 16 bits.
    rotary = "latent" in meta
    for i, (part, x) in enumerate(zip(meta["parts"], vectors, strict=True)):
        cache = meta["cache"]
        if rotary and i == 1:
            cache = "f16" if cache == "f16" else "bf16"
        codes, scales = encoded(rotated(x, part["rotation"]), cache)
        for name, stride, values in (("codes", "code_stride", codes), ("scales", "scale_stride", scales)):
            if values is not None:
                start = block * meta["block_bytes"] + part[name] + offset * part[stride]
                pool[start[:, None] + torch.arange(values.shape[1], device=pool.device)] = values
    return pool
