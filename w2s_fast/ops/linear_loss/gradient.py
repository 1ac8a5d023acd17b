"""The gradient of all linear losses from coefficients of their rows, the logits computed again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...gradients import Call
from ...library import Kernel, define
from ...reference.linear_loss import ce as reference
from ...reference.linear_loss.arguments import Gradients, Linear, Need


def fake_gradients(model: Linear, need: Need) -> Gradients:
    """Shapes of the gradients that are wanted."""
    lists = []
    for tensors, mask in (
        (model.hiddens, need.need_hiddens), (model.heads, need.need_heads), (model.biases, need.need_biases)
    ):  # fmt: skip
        lists.append([t.new_empty(t.shape if mask >> i & 1 else (0,)) for i, t in enumerate(tensors)])
    shape = (model.rows, len(model.hiddens)) if need.need_weights else (0,)
    return Gradients(*lists, model.hiddens[0].new_empty(shape, dtype=model.accumulate))  # type: ignore[arg-type, call-arg]


LINEAR_LOSS_BACKWARD = define(
    reference.linear_loss_backward,
    fake=lambda model, _, need, kept: fake_gradients(model, need),
    triton=Kernel("gradient", rowwise="hiddens heads dense"),
)


def wanted(call: Call) -> Need:
    """The gradients that the call's model is asked for, of those that there are."""
    need, weights = call.needs.model, call.needs.model.weights
    lists = (need.hiddens, need.heads, need.biases)
    hiddens, heads, biases = (sum(1 << i for i, flag in enumerate(flags) if flag) for flags in lists)
    return Need(hiddens, heads, biases, bool(weights and call.model.weights is not None))


def by_name(found: Gradients, need: Need, weights: Tensor | None) -> dict[str, Any]:
    """Gradients as backward returns them: by argument name, None where not wanted."""
    lists = {
        "hiddens": (found.dhiddens, need.need_hiddens),
        "heads": (found.dheads, need.need_heads),
        "biases": (found.dbiases, need.need_biases),
    }
    made: dict[str, Any] = {
        name: [t if mask >> i & 1 else None for i, t in enumerate(tensors)] for name, (tensors, mask) in lists.items()
    }
    made["weights"] = found.dweights.to(weights.dtype) if weights is not None and need.need_weights else None
    return made
