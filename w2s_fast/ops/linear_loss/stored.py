"""Gradients that a loss made in its forward pass, kept for its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks
from .gradient import by_name
from .inputs import Linear


def keep_gradients(ctx: Any, given: Linear, need: tuple[Any, ...], grads: Any, *others: Tensor | None) -> None:
    """Save (dhiddens, dheads, dbiases, dweights) and the tensors ``others``."""
    dhiddens, dheads, dbiases, dweights = grads
    flat = (*dhiddens, *dheads, *dbiases, dweights)
    ctx.mark_non_differentiable(*flat)
    ctx.counts, ctx.need = (len(given.hiddens), len(given.biases)), need
    ctx.save_for_backward(*flat, given.weights, *others)


def lists(ctx: Any, tensors: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One a hidden, one a head, one a bias."""
    n, biased = ctx.counts
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n : 2 * n + biased])


def kept(ctx: Any) -> tuple[list[Tensor], Tensor | None, list[Any]]:
    """The saved gradients, the models' weights and the other saved tensors."""
    size = 2 * ctx.counts[0] + ctx.counts[1] + 1
    saved = ctx.saved_tensors
    return list(saved[:size]), saved[size], list(saved[size + 1 :])


def stored_gradients(ctx: Any, grad: Tensor | None, need: tuple[Any, ...]) -> dict[str, Any]:
    """The saved gradients times that of the loss, by argument name."""
    found, weights, _ = kept(ctx)
    if grad is None:
        return by_name((*lists(ctx, found), found[-1]), (0, 0, 0, False), None)
    found = scaled(grad, found)
    return by_name((*lists(ctx, found), found[-1]), need, weights)


def scaled(grad: Tensor | None, found: Sequence[Tensor]) -> list[Tensor]:
    """Saved gradients times the upstream gradient of the loss, which is usually 1: then as they are."""
    if grad is None:
        return [torch.zeros_like(g) for g in found]
    # a tracer's tensor is a subclass
    if type(grad) is Tensor and checks.readable(grad) and float(grad.detach()) == 1.0:
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # then they must outlive what the caller does
        return [g.clone() if again else g for g in found]
    # a number keeps its own dtype: a loss scale need not fit into float16
    return [g * grad if g.numel() else torch.empty_like(g) for g in found]
