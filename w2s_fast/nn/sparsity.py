"""Pruned models on the sparse kernels; the masks that prune them are ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import checks
from ..ops.sparse_lowrank.masks import nm_mask, topk_mask
from ..ops.sparse_lowrank.support import SparseSupport
from .sparse_lowrank import Replaced, SparseLowRankLinear, model_size

__all__ = ["nm_mask", "sparsify", "topk_mask"]


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
