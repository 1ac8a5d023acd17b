"""What losses of balance and size take of a router's logits, beside the op `w2s_fast.moe_route`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...ops.routing.moe_route import Route, Routed, moe_route


def route(logits: Tensor, indices: Tensor, mask: Tensor | None = None) -> Route:
    """From router logits ``[T, E]`` and experts ``[T, k]`` chosen elsewhere; ``mask`` ``[T]`` is True at real tokens.

    Raises:
        ValueError: naming `indices` or `mask` of another shape.
    """
    op = "methods.global_balance"
    if logits.ndim != 2 or indices.ndim != 2 or len(indices) != len(logits):
        checks.fail(op, "indices", f"[{len(logits)}, k] beside logits [{len(logits)}, E]", list(indices.shape))
    if mask is not None and mask.shape != logits.shape[:1]:
        checks.fail(op, "mask", f"[{len(logits)}]", list(mask.shape))
    load = moe_route(logits, 1, mask=None if mask is None else mask.bool()).load
    return Route(load.psum, _counted(indices, logits.shape[1], mask), load.tokens)


def z_loss(found: Routed, coef: float = 1e-3) -> Tensor:
    """``coef mean_t lse_t^2`` over the real tokens: keeps logits small (arXiv 2202.08906)."""
    return coef * found.lse.square().sum() / found.load.tokens.clamp_min(1)


@torch.no_grad()
def _counted(indices: Tensor, experts: int, mask: Tensor | None) -> Tensor:
    """Choices of real tokens ``[E]``, int64."""
    counts: Any = indices.new_zeros(experts, dtype=torch.int64)
    ones = torch.ones_like(indices) if mask is None else mask.to(indices.dtype)[:, None].expand_as(indices)
    found: Tensor = counts.index_add_(0, indices.flatten(), ones.flatten().long())
    return found
