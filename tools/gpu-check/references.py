"""What each op should give, in torch: a function an op, over its operands by role. Sums and products in f64."""
import cache
import data
import torch

# Scores that are as near to each other as this may go either way.
TIE = 1e-6


def _typed(operands, role, meta):
    """An input in f64, as it lies in its operand where the work says so."""
    values = operands[role].view(data.DTYPES[meta["dtype"]])
    if f"lies.{role}" in meta:
        values = values.as_strided(*meta[f"lies.{role}"])
    return values.double()


def _floats(operands, role):
    return operands[role].view(torch.float32).double()


def _product(x, w):
    """x · wᵀ in f64, some rows of w at a time."""
    return torch.cat([x @ part.double().T for part in w.split(1 << 14)], 1)


def _norm(x, operands, meta):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + meta["eps"]) * _floats(operands, "norm")


def linear(operands, meta):
    """`n`: rows of each weight, side by side in the output; `eps`: x is normalised first."""
    x = _typed(operands, "x", meta).view(meta["m"], meta["k"])
    if "eps" in meta:
        x = _norm(x, operands, meta)
    parts = []
    for i in range(len(meta["n"])):
        end = f".{i}" if i else ""
        y = _product(x, data.weight(operands, meta, end))
        if "bias" + end in operands:
            y = y + _floats(operands, "bias" + end)
        parts.append(y)
    return [torch.cat(parts, 1)]


def per_head(operands, meta):
    """Each head's own rows of the weight, `start..start + len` of every `stride`; `transposed`: sums over those rows."""
    m, k, heads = meta["m"], meta["k"], meta["heads"]
    w = data.weight(operands, meta).view(heads, meta["stride"], k)
    w = w[:, meta["start"] : meta["start"] + meta["len"]].double()
    x = _typed(operands, "x", meta).view(m, heads, -1)
    return [torch.einsum("mhr,hrk->mhk" if meta["transposed"] else "mhk,hrk->mhr", x, w)]


def merged(operands, meta):
    """A product a head with what parts of attention come to, `splits` of each head of a token."""
    m, k, heads, splits = meta["m"], meta["k"], meta["heads"], meta["splits"]
    parts = _floats(operands, "parts").view(m, heads, splits, k)
    largest, sums = _floats(operands, "stats").view(m, heads, splits, 2).unbind(3)
    weights = torch.exp2(largest - largest.amax(2, keepdim=True))
    x = torch.einsum("mhs,mhsk->mhk", weights, parts) / (weights * sums).sum(2, keepdim=True)
    w = data.weight(operands, meta).view(heads, meta["stride"], k)
    w = w[:, meta["start"] : meta["start"] + meta["len"]].double()
    return [torch.einsum("mhk,hrk->mhr", x, w)]


class _Experts:
    """Weights that lie where a table says: for each expert, bytes of gate's codes and scales, up's and down's; three factors."""

    def __init__(self, operands, meta):
        self.operands, self.meta = operands, meta
        self.offsets = operands["places"].view(torch.int64).view(-1, 8)[:, :6].tolist()
        self.factors = operands["places"].view(torch.float32).view(-1, 16)[:, 12:15].tolist()

    def matrix(self, expert, part, n, k):
        """Gate (0), up (1) or down (2), [n, k], in f64."""
        codes, scales = self.offsets[expert][2 * part : 2 * part + 2]
        meta, factor = self.meta, self.meta["factor"]
        size = n * k // meta["group"] * (2 if meta["scales"] in ("f16", "bf16") else 1)
        codes = self.operands["codes"][codes : codes + n * k // 2]
        scales = self.operands["scales"][scales : scales + size]
        return data.fp4(codes, scales, meta, k, factor and [factor[0], self.factors[expert][part]]).double()


def experts(operands, meta):
    """`widths`: of routed experts, and of the `shared` ones, which stand behind them and weigh 1."""
    d, table = meta["k"], _Experts(operands, meta)
    x = _typed(operands, "x", meta).view(meta["m"], d)
    y = torch.zeros_like(x)

    def add(expert, width, tokens, weights):
        gate, up = (table.matrix(expert, part, width, d) for part in (0, 1))
        h = torch.nn.functional.silu(x[tokens] @ gate.T) * (x[tokens] @ up.T)
        y.index_add_(0, tokens, weights[:, None] * (h @ table.matrix(expert, 2, d, width).T))

    if meta["top_k"]:
        ids = operands["ids"].view(torch.int32).view(meta["m"], -1)
        weights = _floats(operands, "weights").view(meta["m"], -1)
        for expert in ids.unique().tolist():
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            add(expert, meta["widths"][0], tokens, weights[tokens, slots])
    every = torch.arange(meta["m"], device=x.device)
    for expert in range(meta["experts"], meta["experts"] + meta["shared"]):
        add(expert, meta["widths"][1], every, torch.ones_like(x[:, 0]))
    return [y]


def router(operands, meta):
    """One group; weights are normalised. An id whose score is as good as that of the id that belongs there is taken for it."""
    x = _typed(operands, "x", meta).view(meta["m"], meta["k"])
    logits = _product(x, data.weight(operands, meta))
    scores = torch.sigmoid(logits)
    corrected = scores + _floats(operands, "bias")
    best, ids = corrected.topk(meta["top_k"], 1)
    found = operands["y.ids"].view(torch.int32).view(meta["m"], -1).long()
    known = (found >= 0) & (found < meta["experts"])
    of_found = corrected.gather(1, found.where(known, ids))
    ids = found.where(known & ((of_found - best).abs() < TIE), ids)
    weights = scores.gather(1, ids)
    return [logits, ids, weights / (weights.sum(1, keepdim=True) + 1e-20) * meta["scaling"]]


def rms_norm(operands, meta):
    return [_norm(_typed(operands, "x", meta), operands, meta)]


def add(operands, meta):
    return [_typed(operands, "x", meta) + _typed(operands, "delta", meta)]


def add_norm(operands, meta):
    """The norm is of sums as they are stored."""
    [total] = add(operands, meta)
    stored = total.to(data.DTYPES[meta["dtype"]]).double()
    return [total, _norm(stored, operands, meta)]


def _turned(x, operands):
    """Pairs of neighbours in [tokens, heads, d], by each token's angles."""
    tokens, heads, d = x.shape
    cos, sin = (_floats(operands, role).view(tokens, 1, d // 2) for role in ("cos", "sin"))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).view(tokens, heads, d)


def rope(operands, meta):
    return [_turned(_typed(operands, "queries", meta), operands)]


def latent_rows(operands, meta):
    """The norm of the first `latent` elements, the rest turned; and queries turned, where there are any."""
    kv = _typed(operands, "kv", meta)
    latent, key = kv.split([meta["latent"], kv.shape[1] - meta["latent"]], 1)
    rows = torch.cat([_norm(latent, operands, meta), _turned(key.unsqueeze(1), operands).squeeze(1)], 1)
    return [rows, *(rope(operands, meta) if "queries" in operands else [])]


def append_latents(operands, meta):
    """The rows of latent_rows, stored; and queries."""
    rows, turned = latent_rows(operands, meta)
    vectors = rows.float().split([part["width"] for part in meta["parts"]], 1)
    return [cache.stored(operands, meta, vectors), turned]


def append_heads(operands, meta):
    """Keys and values, stored as they are."""
    vectors = []
    for role in ("x.keys", "x.values"):
        x = operands[role].view(data.DTYPES[meta["dtype"]]).float()
        vectors += x.view(meta["m"], meta["heads"], -1).unbind(1)
    return [cache.stored(operands, meta, vectors)]


def _tokens(operands, meta, first, end):
    """The vectors of the one sequence's tokens at these positions: [positions, width] of each."""
    index = operands["index"].view(torch.int32).long()
    tokens = meta["block"][0]
    at = torch.arange(first, end, device=index.device)
    slots = index[3 * meta["m"] :][at // tokens] * tokens + at % tokens
    return [vector[slots] for vector in data.vectors(operands["pool"], meta)]


def paged_attention(operands, meta):
    """One sequence, whose last tokens ask; `kv_heads`: 0 where all heads share latents, which are the values too."""
    m, heads, kv_heads = meta["m"], meta["heads"], meta["kv_heads"]
    positions = operands["index"].view(torch.int32)[m : 2 * m].long()
    end = int(positions.max()) + 1
    vectors = _tokens(operands, meta, 0, end)
    parts = [_typed(operands, role, meta).view(m, heads, -1) for role in ("queries", "rotary") if role in operands]
    queries = torch.cat(parts, 2)
    if kv_heads:
        of_heads = torch.arange(heads, device=queries.device) // (heads // kv_heads)
        keys, values = (torch.stack(half, 1)[:, of_heads] for half in (vectors[:kv_heads], vectors[kv_heads:]))
    else:
        keys, values = (x[:, None].expand(-1, heads, -1) for x in (torch.cat(vectors, 1), vectors[0]))
    scores = torch.einsum("mhd,thd->mht", queries, keys) * meta["scale"]
    hidden = torch.arange(end, device=queries.device)[None, None] > positions[:, None, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(2)
    return [torch.einsum("mht,thd->mhd", weights, values)]


def gather_paged(operands, meta):
    return [torch.cat(_tokens(operands, meta, *meta["positions"]), 1)]


REFERENCES = {
    "append_latents": append_latents,
    "append_heads": append_heads,
    "paged_attention": paged_attention,
    "gather_paged": gather_paged,
    "linear": linear,
    "per_head": per_head,
    "merged": merged,
    "experts": experts,
    "router": router,
    "rms_norm": rms_norm,
    "add_norm": add_norm,
    "add": add,
    "rope": rope,
    "latent_rows": latent_rows,
}
