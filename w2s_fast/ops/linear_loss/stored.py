"""Gradients that a loss made in its forward pass, kept for its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...gradients import Call
from ...reference.linear_loss.arguments import Gradients, Need
from .gradient import by_name

_is_several = torch._C._functorch.is_legacy_batchedtensor

#: What `stored_gradients` needs; the arguments only say what the gradients depend on.
STORED = "hiddens heads biases weights dhiddens dheads dbiases dweights"


def stored_gradients(call: Call, grad: Tensor | None, need: Need) -> dict[str, Any]:
    """The gradients that forward made times that of the loss, by argument name."""
    made, weights = Gradients(*(getattr(call.out, name) for name in Gradients._fields)), call.model.weights
    if grad is None:
        return by_name(made, Need(0, 0, 0, False), None)
    flat = iter(scaled(grad, [*made.dhiddens, *made.dheads, *made.dbiases, made.dweights]))
    hiddens, heads, biases = ([next(flat) for _ in t] for t in (made.dhiddens, made.dheads, made.dbiases))
    return by_name(Gradients(hiddens, heads, biases, next(flat)), need, weights)


def scaled(grad: Tensor | None, found: Sequence[Tensor]) -> list[Tensor]:
    """Saved gradients times the upstream gradient of the loss, which is usually 1: then as they are."""
    if grad is None:
        return [torch.zeros_like(g) for g in found]
    # a tracer's tensor is a subclass; several gradients at once (is_grads_batched) are no number
    plain = type(grad) is Tensor and checks.readable(grad) and not _is_several(grad)
    if plain and float(grad.detach()) == 1.0:
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # then they must outlive what the caller does
        return [g.clone() if again else g for g in found]
    # a number keeps its own dtype: a loss scale need not fit into float16
    return [g * grad if g.numel() else torch.empty_like(g) for g in found]
