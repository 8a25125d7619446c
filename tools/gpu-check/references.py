"""What each op should give, in torch: a function an op, over its operands by role. Products in f64."""
import data
import torch


def _typed(operands, role, meta):
    return operands[role].view(data.DTYPES[meta["dtype"]])


def _product(x, w):
    """x · wᵀ in f64, some rows of w at a time."""
    return torch.cat([x.double() @ part.double().T for part in w.split(1 << 14)], 1)


def linear(operands, meta):
    """`n`: rows of each weight, side by side in the output; `eps`: x is normalised first."""
    m, k = meta["m"], meta["k"]
    x = _typed(operands, "x", meta).view(m, k).double()
    if "eps" in meta:
        norm = operands["norm"].view(torch.float32).double()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + meta["eps"]) * norm
    parts = []
    for i in range(len(meta["n"])):
        end = f".{i}" if i else ""
        y = _product(x, data.weight(operands["codes" + end], operands["scales" + end], meta, k))
        if "bias" + end in operands:
            y = y + operands["bias" + end].view(torch.float32).double()
        parts.append(y)
    return [torch.cat(parts, 1)]


def per_head(operands, meta):
    """Each head's own rows of the weight, `start..start + len` of every `stride`; `transposed`: sums over those rows."""
    m, k, heads = meta["m"], meta["k"], meta["heads"]
    w = data.weight(operands["codes"], operands["scales"], meta, k).view(heads, meta["stride"], k)
    w = w[:, meta["start"] : meta["start"] + meta["len"]].double()
    x = _typed(operands, "x", meta).view(m, heads, -1).double()
    return [torch.einsum("mhr,hrk->mhk" if meta["transposed"] else "mhk,hrk->mhr", x, w)]


REFERENCES = {"linear": linear, "per_head": per_head}
