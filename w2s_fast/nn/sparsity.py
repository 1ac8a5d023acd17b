"""Pruned models on the sparse kernels, layers under masks, and masks as bits; the masks themselves are ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..ops.sparse_lowrank.masks import nm_mask, topk_mask
from ..ops.sparse_lowrank.support import SparseSupport
from .sparse_lowrank import Replaced, SparseLowRankLinear, model_size

__all__ = [
    "nm_mask", "pack_mask", "sparsify", "ste_nm_linear", "straight_through", "supermask", "supermask_linear",
    "topk_mask", "unpack_mask",
]  # fmt: skip


def pack_mask(mask: Tensor) -> Tensor:
    """Bits of a boolean tensor, uint8 ``[ceil(n / 8)]``, the first the lowest; an eighth of its memory.

    Raises:
        TypeError: naming `mask`.

    Example:
        >>> import torch
        >>> from w2s_fast.nn import pack_mask
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    checks.is_tensor("nn.pack_mask", "mask", mask)
    if mask.dtype != torch.bool:
        checks.fail("nn.pack_mask", "mask", "boolean", mask.dtype, error=TypeError)
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    places = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (flat << places).sum(1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of `pack_mask`.

    Raises:
        ValueError: naming `bits`, if they are not those of that shape.
    """
    count = torch.Size(shape).numel()
    if bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),):
        expected = f"uint8 of shape ({-(-count // 8)},) for {count} entries"
        checks.fail("nn.unpack_mask", "bits", expected, f"{bits.dtype} of shape {tuple(bits.shape)}")
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[:, None] >> places & 1).flatten()[:count].view(torch.Size(shape)).bool()


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Supermask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, density: float) -> Tensor:
        ctx.save_for_backward(scores)
        return topk_mask(scores, density=density).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0].sign(), None


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` where the mask is, 0 elsewhere; the gradient is that of all of it, as if there were no mask."""
    return cast(Tensor, _Straight.apply(weight, mask))


def supermask(scores: Tensor, density: float) -> Tensor:
    """1 at the share ``density`` of the largest ``|s|``, else 0, in scores' dtype; the gradient passes to ``|s|``."""
    return cast(Tensor, _Supermask.apply(scores, density))


def ste_nm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, n: int = 2, m: int = 4, *, mask: Tensor | None = None
) -> Tensor:  # fmt: skip
    """``x (W * mask)^T + b`` with the n largest of every m inputs kept, and the gradient of all of W.

    The layer of AST (arXiv 2407.20584). Plain PyTorch: at 512 rows and more, mask and masking take at most a tenth of
    forward and backward (AMD EPYC, Zen 4).

    Args:
        x: ``[..., I]``.
        weight, bias: ``[O, I]``, ``[O]``.
        n, m: of the mask.
        mask: boolean ``[O, I]``, instead of that of the weight as it is; AST renews it every few steps only.

    Raises:
        ValueError, TypeError: as `nm_mask`.
    """
    return F.linear(x, straight_through(weight, nm_mask(weight, n, m) if mask is None else mask), bias)


def supermask_linear(
    x: Tensor, weight: Tensor, scores: Tensor, density: float, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """``x (W * mask)^T + b`` with the mask of the largest ``|scores|``, which are trained (ExSSNeT, arXiv 2210.10209).

    Plain PyTorch: at 512 rows the mask takes an eighth to a fifth of forward and backward (AMD EPYC, Zen 4).

    Args:
        x: ``[..., I]``.
        weight, bias: ``[O, I]``, ``[O]``.
        scores: like weight; its gradient is ``dW * W * sign(scores)``.
        density: share of the weight that is kept.

    Raises:
        ValueError, TypeError: as `topk_mask`.
    """
    return F.linear(x, weight * supermask(scores, density), bias)


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
