"""Gradients that a loss made in its forward pass, kept for its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...gradients import Call
from ...reference.linear_loss.arguments import Gradients, Need
from ..stored import scaled
from .gradient import by_name

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
