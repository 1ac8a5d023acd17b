"""Masks of pruned weights, and pruned models on the sparse kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.sparse_lowrank.support import SparseSupport
from .sparse_lowrank import Replaced, SparseLowRankLinear, model_size

SCOPES = ("tensor", "row")
SAMPLE = 1 << 16  # of the scores, from which the neighbourhood of the k-th largest is guessed
DEVIATIONS = 4  # of a random sample's rank, on each side of the guess
CHUNK = 1 << 18  # scores that a CPU looks at at a time, so that what is made of them stays in its cache


@torch.no_grad()
def topk_mask(
    scores: Tensor, k: int | None = None, *, density: float | None = None, scope: str = "tensor"
) -> Tensor:  # fmt: skip
    """True at exactly the k largest absolute scores.

    In the scope of the tensor the k-th largest is found by selection, not by sorting: the scores between two order
    statistics of a sample that enclose it with near certainty are few, and one of them is it (Floyd and Rivest, 1975);
    where the guess fails the whole tensor is searched. Three passes, no copy. Ties go to the lower index.

    Args:
        scores: any shape; floating point.
        k: how many, in the whole tensor or in each row.
        density: instead of k, a share: ``k = round(density n)``.
        scope: ``"tensor"``, or ``"row"``: k in every row of the last dimension (ties there go as torch.topk puts them).

    Returns:
        bool, of the shape of scores.

    Raises:
        ValueError: neither or both of k and density, one out of range, NaN. TypeError: no floating-point tensor.

    Example:
        >>> import torch
        >>> from w2s_fast.nn import topk_mask
        >>> topk_mask(torch.tensor([0.5, -2.0, 1.0, 1.0]), 2)
        tensor([False,  True,  True, False])
    """
    op = "nn.topk_mask"
    checks.is_float_tensor(op, "scores", scores)
    checks.choice(op, "scope", scope, SCOPES)
    if (k is None) == (density is None):
        checks.fail(op, "k or density", "given, one of them", "both" if k is not None else "neither")
    size = scores.shape[-1] if scope == "row" and scores.ndim else scores.numel()
    if density is not None:
        k = round(checks.number(op, "density", density, low=0.0, high=1.0) * size)
    assert k is not None
    k = checks.integer(op, "k", k, low=0, high=size)
    flat = scores.detach().flatten()
    parts = flat.split(CHUNK if flat.device.type == "cpu" else max(1, flat.numel()))
    for part in parts:
        _without_nan(op, "scores", part)
    if scope == "row":
        best = scores.detach().abs().topk(k, -1).indices
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, best, True)
    if k == 0 or k == size:
        return torch.full(scores.shape, k > 0, device=scores.device)
    threshold = _kth_largest(flat, parts, k)
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    kept = mask.split(parts[0].numel())
    missing = k
    for part, out in zip(parts, kept, strict=True):
        missing -= int(torch.gt(part.abs(), threshold, out=out).count_nonzero())
    for part, out in zip(parts, kept, strict=True):
        if missing:
            ties = (part.abs() == threshold).nonzero()[:missing, 0]
            out[ties] = True
            missing -= len(ties)
    return mask.view(scores.shape)


def _without_nan(op: str, name: str, values: Tensor) -> None:
    if bool(values.abs().sum(dtype=torch.float32 if values.element_size() < 8 else None).isnan()):
        checks.fail(op, name, "without NaN", "NaN")


def _kth_largest(s: Tensor, parts: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest absolute number of a vector, given in parts, 1 <= k < its length."""
    n = s.numel()
    if n > 4 * SAMPLE:
        sample = s[:: n // SAMPLE].abs().sort(descending=True).values
        m = sample.numel()
        rank, spread = k / n * m, DEVIATIONS * math.sqrt(k / n * (1 - k / n) * m) + 1
        first, last = math.floor(rank - spread), math.ceil(rank + spread)
        high = sample[first] if first >= 0 else sample.new_full((), math.inf)
        low = sample[last] if last < m else sample.new_zeros(())
        wanted, near = k, []
        for part in parts:
            size = part.abs()
            above = size > high
            wanted -= int(above.count_nonzero())
            near.append(size[(size >= low).logical_xor_(above)])  # what is above is not below
        candidates = torch.cat(near)
        if 1 <= wanted <= candidates.numel():
            return candidates.kthvalue(candidates.numel() - wanted + 1).values
    return s.abs().kthvalue(n - k + 1).values


@torch.no_grad()
def nm_mask(weight: Tensor, n: int = 2, m: int = 4, *, metric: Tensor | None = None) -> Tensor:
    """True at the n largest magnitudes of every m consecutive inputs.

    An entry's rank among its m is counted by comparisons, ``m (m - 1) / 2`` of a share 1 / m of the tensor each; the
    published code loops over groups with a topk each. Ties go to the lower index.

    Args:
        weight: ``[..., I]``, m divides I; floating point.
        n, m: 1 <= n <= m <= 32.
        metric: scores of the entries instead of ``|weight|``, of its shape, such as Wanda's ``|W| |x|``.

    Returns:
        bool, of the shape of weight.

    Raises:
        ValueError: sizes that do not fit, NaN. TypeError: no floating-point tensor.

    Example:
        >>> import torch
        >>> from w2s_fast.nn import nm_mask
        >>> nm_mask(torch.tensor([[1.0, -3.0, 2.0, 0.0, 5.0, 5.0, 5.0, 5.0]]))
        tensor([[False,  True,  True, False,  True,  True, False, False]])
    """
    op = "nn.nm_mask"
    checks.is_float_tensor(op, "weight", weight)
    m = checks.integer(op, "m", m, low=1, high=32)
    n = checks.integer(op, "n", n, low=1, high=m)
    if metric is not None:
        checks.is_float_tensor(op, "metric", metric)
        if metric.shape != weight.shape:
            checks.fail(op, "metric", f"of the weight's shape {list(weight.shape)}", list(metric.shape))
    if weight.ndim == 0 or weight.shape[-1] % m:
        checks.fail(op, "weight", f"of a last dimension that {m} divides", list(weight.shape))
    s = (weight if metric is None else metric).detach().abs()
    _without_nan(op, "weight" if metric is None else "metric", s)
    columns = s.reshape(-1, m).unbind(1)
    # an entry's rank: how many before it are as large, and how many behind it are larger
    ranks = [torch.full_like(columns[0], m - 1 - i, dtype=torch.int8) for i in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            first_wins = (columns[i] >= columns[j]).view(torch.int8)
            ranks[i] -= first_wins
            ranks[j] += first_wins
    return torch.stack([rank < n for rank in ranks], 1).view(weight.shape)


def sparsify(
    model: nn.Module, *, target: str | Sequence[str] = "", sparsity: float = 0.6, layout: str | None = None
) -> Replaced:  # fmt: skip
    """Put the pruned linear layers of a model on the sparse kernels, in place.

    A layer whose weight is zero in at least a share ``sparsity`` becomes a `SparseLowRankLinear` of rank 0 with the
    values that are left, on a fixed support: the same results up to the order of sums, and it can be trained on. Made
    for what magnitude pruning, Wanda or SparseGPT leave; what is shared stays shared.

    Args:
        model: any module.
        target: only layers with one of these in their path; default: all.
        sparsity: of a layer, at least.
        layout: of the supports, ``"csr16"`` or ``"csr32"``; default: csr16 where it can.

    Returns:
        `Replaced`: paths, and sizes before and after.

    Raises:
        ValueError: if no layer fits. The model is then unchanged.

    Example:
        >>> import torch
        >>> from w2s_fast.nn import sparsify, topk_mask
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> model[0].weight.data *= topk_mask(model[0].weight, density=0.25)
        >>> sparsify(model).layers
        ['0']
    """
    op = "nn.sparsify"
    parts = (target,) if isinstance(target, str) else tuple(target)
    share = checks.number(op, "sparsity", sparsity, low=0.0, high=1.0)
    if layout is not None:
        checks.choice(op, "layout", layout, ("csr16", "csr32"))
    places = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False) if name]
    made: dict[int, SparseLowRankLinear] = {}
    for name, layer in places:
        fits = type(layer) is nn.Linear and any(part in name for part in parts) and id(layer) not in made
        if fits and float((layer.weight == 0).float().mean()) >= share:
            made[id(layer)] = _sparse(layer, layout)
    if not made:
        checks.fail(op, "model", f"one with a linear layer of {share:.0%} zeros at least", type(model).__name__)
    before = model_size(model)
    names = [name for name, layer in places if id(layer) in made]
    for name, layer in places:
        if id(layer) in made:
            model.set_submodule(name, made[id(layer)])
    return Replaced(names, before, model_size(model))


@torch.no_grad()
def _sparse(layer: nn.Linear, layout: str | None) -> SparseLowRankLinear:
    weight = layer.weight.detach()
    made = SparseLowRankLinear(
        layer.in_features, layer.out_features, 0, 0.0, bias=layer.bias is not None, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip
    at = weight.flatten().nonzero()[:, 0]
    kind = layout or ("csr16" if layer.in_features <= 1 << 16 else "csr32")
    made.support = SparseSupport.from_flat(at, (layer.out_features, layer.in_features), kind)
    made.values = nn.Parameter(weight.flatten()[at], layer.weight.requires_grad)
    made.density = at.numel() / weight.numel()
    if layer.bias is not None:
        made.bias = layer.bias
    return made.train(layer.training)
