"""moe_route: the experts of tokens, their weights, and the sums that losses of balance and size need, in one pass."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ... import checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.numerics import accumulate_dtype
from ...reference.routing import moe_route as reference
from ..layout import unit_stride

NAME = "moe_route"
Score = Literal["softmax", "topk", "sigmoid"]


class Route(NamedTuple):
    """Of one router and micro-batch: sums of probabilities ``[E]`` over its real tokens, their choices ``[E]`` and
    number ``[]``, both int64."""

    psum: Tensor
    counts: Tensor
    tokens: Tensor


class Routed(NamedTuple):
    """Weights ``[T, k]`` in float32 (float64), experts ``[T, k]`` from the largest score on, the sums over all tokens,
    and the log-sum-exp of the logits ``[T]``, 0 where the mask is."""

    weights: Tensor
    indices: Tensor
    load: Route
    lse: Tensor


def _fake(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, k: int, score: str, renormalize: bool
) -> tuple[Tensor, ...]:
    tokens, experts, acc = logits.shape[0], logits.shape[1], accumulate_dtype(logits)
    return (
        logits.new_empty((tokens, k), dtype=acc),
        logits.new_empty((tokens, k), dtype=torch.int64),
        logits.new_empty(tokens, dtype=acc),
        logits.new_empty(experts, dtype=torch.int64),
        logits.new_empty(experts, dtype=acc),
        logits.new_empty((), dtype=torch.int64),
    )


def _fake_backward(
    grad_weights: Tensor | None, grad_lse: Tensor | None, grad_psum: Tensor | None, logits: Tensor, *_: Any
) -> Tensor:
    return logits.new_empty(logits.shape)


MOE_ROUTE_BACKWARD = define(reference.moe_route_backward, fake=_fake_backward, triton=Kernel(rowwise="logits"))


def _backward(call: Call, grads: reference.Routing) -> dict[str, Any]:
    out = call.out
    given = (None if g is None else g.contiguous() for g in (grads.weights, grads.lse, grads.psum))
    dlogits = MOE_ROUTE_BACKWARD.on(call.backend)(
        *given, call.logits, call.mask, out.weights, out.indices, call.score, call.renormalize
    )
    return {"logits": dlogits}


MOE_ROUTE = define(
    reference.moe_route,
    fake=_fake,
    backward=_backward,
    saves="logits mask weights indices",
    carriers="weights lse psum",
    triton=Kernel(rowwise="logits"),
)


def moe_route(
    logits: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    renormalize: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routed:
    """The k experts of each token and their weights, with the sums for a loss of balance: logits are read once.

    ``"softmax"``: p = softmax(z) over all experts, weights are p of the k largest (arXiv 2101.03961). ``"topk"``: the
    softmax over the k largest logits (arXiv 2401.04088). ``"sigmoid"``: each expert's own score s = sigmoid(z), weights
    are s of the chosen, and p = s / sum s. A bias is added for the choice and not in the weights, which balances
    without a loss (`update_bias`, arXiv 2408.15664). Of equal scores the expert of the lower number is chosen; a NaN
    counts as the largest.

    Args:
        logits: ``[T, E]``; float32, bfloat16, float16 or float64. Arithmetic in float32 (float64).
        k: 1 to E. More than 32, or more than 1024 experts, are plain PyTorch's on a GPU.
        score: see above.
        renormalize: weights divided by their sum (those of "topk" have a sum of 1 already).
        bias: ``[E]``, added to p or s for the choice alone, not with "topk"; no gradient goes to it.
        mask: bool ``[T]``, True at real tokens. The others (padding) are in no sum and have lse 0; their weights and
            experts are what they are without it.

    Returns:
        Routed: weights, indices, load = (psum ``sum_t p_t``, counts of the choices, tokens) and lse for a z-loss.
        Differentiable, once, in logits through weights, psum and lse. Deterministic. Memory: these results.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> found = w2s_fast.moe_route(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), 2, score="topk")
        >>> found.indices.tolist(), found.load.counts.tolist()
        ([[1, 2], [0, 1]], [1, 2, 1])
    """
    checks.is_float_tensor(NAME, "logits", logits)
    if logits.ndim != 2:
        checks.fail(NAME, "logits", "of shape (T, E)", tuple(logits.shape))
    checks.integer(NAME, "k", k, low=1, high=logits.shape[1])
    checks.choice(NAME, "score", score, get_args(Score))
    if bias is not None:
        checks.is_float_tensor(NAME, "bias", bias)
        if score == "topk":
            checks.fail(NAME, "bias", "None with score 'topk'", tuple(bias.shape))
        if bias.shape != logits.shape[1:]:
            checks.fail(NAME, "bias", f"of shape ({logits.shape[1]},)", tuple(bias.shape))
        bias = bias.detach()
    if mask is not None:
        checks.is_tensor(NAME, "mask", mask)
        if mask.dtype != torch.bool:
            checks.fail(NAME, "mask", "bool", mask.dtype, error=TypeError)
        if mask.shape != logits.shape[:1]:
            checks.fail(NAME, "mask", f"of shape ({logits.shape[0]},)", tuple(mask.shape))
    checks.same_device(NAME, [("logits", logits), ("bias", bias), ("mask", mask)])
    found: reference.Routing = MOE_ROUTE(unit_stride(logits), bias, mask, k, score, renormalize)
    return Routed(found.weights, found.indices, Route(found.psum, found.counts, found.tokens), found.lse)


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, rate: float = 1e-3) -> Tensor:
    """Balance without a loss (arXiv 2408.15664): ``bias_i += rate sign(mean counts - counts_i)``, in place.

    To be called once after every optimizer step, with the choices of all its tokens (`moe_route`'s ``load.counts``,
    summed over micro-batches and processes).

    Args:
        bias: ``[E]``, float; what `moe_route` is given.
        counts: ``[E]``.
        rate: u of the paper.

    Returns:
        bias itself.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch
        >>> from w2s_fast.ops.routing.moe_route import update_bias
        >>> update_bias(torch.zeros(3), torch.tensor([5, 1, 3]))
        tensor([-0.0010,  0.0010,  0.0000])
    """
    checks.is_float_tensor("update_bias", "bias", bias)
    checks.is_tensor("update_bias", "counts", counts)
    if bias.ndim != 1 or counts.shape != bias.shape:
        checks.fail("update_bias", "counts", f"of the shape of bias, {tuple(bias.shape)}", tuple(counts.shape))
    checks.number("update_bias", "rate", rate, low=0.0)
    many = counts.double()
    return bias.add_((many.mean() - many).sign().to(bias), alpha=rate)
