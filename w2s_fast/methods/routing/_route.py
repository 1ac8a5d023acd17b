"""Routing tokens to experts: the choice, its weights, and the sums that losses of balance and size need.

``softmax``: probabilities over all experts, the k largest are the weights (arXiv 2101.03961). ``topk``: the k largest
logits, the softmax is over them (arXiv 2401.04088). ``sigmoid``: each expert's own score; a bias may be added for the
choice, not for the weights, and balances without a loss (arXiv 2408.15664).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ... import checks

OP = "methods.moe_route"
Score = Literal["softmax", "topk", "sigmoid"]


class Route(NamedTuple):
    """Of one router and micro-batch: sums of probabilities ``[E]`` over its real tokens, their choices ``[E]`` and
    number ``[]``, both int64."""

    psum: Tensor
    counts: Tensor
    tokens: Tensor


class Routed(NamedTuple):
    """Weights ``[T, k]`` in float32 (float64), experts ``[T, k]`` from the largest score on, what `lbl` takes, and the
    log-sum-exp of the logits ``[T]``, 0 where the mask is."""

    weights: Tensor
    indices: Tensor
    load: Route
    lse: Tensor


def moe_route(
    logits: Tensor, k: int, *, score: Score = "softmax", renormalize: bool = False, bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routed:  # fmt: skip
    """The k experts of each token, ``[T, E]`` logits; of equal scores the expert of the lower number.

    Args:
        score: see above. The probabilities of `load` are the softmax over all experts, or the sigmoids divided by their
            sum.
        renormalize: weights divided by their sum (those of "topk" have a sum of 1 already).
        bias: ``[E]``, added to the sigmoids for the choice alone; no gradient goes to it.
        mask: ``[T]``, True at real tokens. The others have weights of 0 and are in no sum; their experts are numbers
            in range.

    Raises:
        ValueError: naming `logits`, `k`, `score`, `bias` or `mask`.

    Example:
        >>> import torch
        >>> found = moe_route(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), 2, score="topk")
        >>> found.indices.tolist(), found.load.counts.tolist()
        ([[1, 2], [0, 1]], [1, 2, 1])
    """
    checks.is_float_tensor(OP, "logits", logits)
    if logits.ndim != 2:
        checks.fail(OP, "logits", "[T, E]", list(logits.shape))
    checks.integer(OP, "k", k, low=1, high=logits.shape[1])
    checks.choice(OP, "score", score, get_args(Score))
    if bias is not None and (score != "sigmoid" or bias.shape != logits.shape[1:]):
        checks.fail(OP, "bias", f"[{logits.shape[1]}] beside score 'sigmoid'", f"{list(bias.shape)} beside {score!r}")
    real = real_tokens(OP, logits, mask)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = z.sigmoid() if score == "sigmoid" else z.softmax(-1)
    by = z if score == "topk" else p if bias is None else p + bias.to(p)
    indices = torch.sort(by.detach(), dim=-1, descending=True, stable=True).indices[:, :k]
    weights = z.gather(1, indices).softmax(-1) if score == "topk" else p.gather(1, indices)
    if score == "sigmoid":
        p = p / p.sum(-1, keepdim=True)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    load = Route((p * real[:, None]).sum(0), counted(indices, logits.shape[1], real), real.sum())
    lse = torch.where(real, z.logsumexp(-1), 0.0)
    return Routed(torch.where(real[:, None], weights, 0.0), indices, load, lse)


def route(logits: Tensor, indices: Tensor, mask: Tensor | None = None) -> Route:
    """From router logits ``[T, E]`` and the chosen experts ``[T, k]``; ``mask`` ``[T]`` is True at real tokens.

    Raises:
        ValueError: naming `indices` or `mask` of another shape.
    """
    op = "methods.global_balance"
    if logits.ndim != 2 or indices.ndim != 2 or len(indices) != len(logits):
        checks.fail(op, "indices", f"[{len(logits)}, k] beside logits [{len(logits)}, E]", list(indices.shape))
    real = real_tokens(op, logits, mask)
    p = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return Route((p * real[:, None]).sum(0), counted(indices, logits.shape[1], real), real.sum())


def z_loss(found: Routed, coef: float = 1e-3) -> Tensor:
    """``coef mean_t lse_t^2`` over the real tokens: keeps logits small (arXiv 2202.08906)."""
    return coef * found.lse.square().sum() / found.load.tokens.clamp_min(1)


def real_tokens(op: str, logits: Tensor, mask: Tensor | None) -> Tensor:
    """``[T]`` bool."""
    if mask is None:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if mask.shape != logits.shape[:1]:
        checks.fail(op, "mask", f"[{len(logits)}]", list(mask.shape))
    return mask.bool()


@torch.no_grad()
def counted(indices: Tensor, experts: int, real: Tensor) -> Tensor:
    """Choices of real tokens ``[E]``, int64."""
    counts: Any = indices.new_zeros(experts, dtype=torch.int64)
    found: Tensor = counts.index_add_(0, indices.flatten(), real.long()[:, None].expand_as(indices).flatten())
    return found
