"""The gradient of all linear losses from coefficients of their rows, the logits computed again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...library import Kernel, define
from ...reference.linear_loss import ce as reference
from .inputs import LINEAR, Linear

#: Which gradients are wanted; bit i of a mask is model i.
NEED = "int need_hiddens, int need_heads, int need_biases, bool need_weights"
#: A model's gradient that is not wanted has shape [0].
GRADIENTS = "Tensor[] dhiddens, Tensor[] dheads, Tensor[] dbiases, Tensor dweights"


def fake_gradients(given: Linear, need: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Shapes of `GRADIENTS` for the flags `NEED`."""
    lists = []
    for tensors, mask in zip((given.hiddens, given.heads, given.biases), need[:3], strict=True):
        lists.append([t.new_empty(t.shape if mask >> i & 1 else (0,)) for i, t in enumerate(tensors)])
    shape = (given.rows, len(given.hiddens)) if need[3] else (0,)
    return (*lists, given.hiddens[0].new_empty(shape, dtype=given.accumulate))  # type: ignore[return-value]


LINEAR_LOSS_BACKWARD = define(
    "linear_loss_backward",
    f"({LINEAR}, Tensor lse, Tensor ids, Tensor coef_ids, Tensor coef_lse, Tensor? coef_log, Tensor? coef_all, "
    f"Tensor? dense, Tensor? coef_dense, Tensor? classes, {NEED}) -> ({GRADIENTS})",
    reference=reference.linear_loss_backward,
    fake=lambda *args: fake_gradients(Linear(*args[:8]), args[17:]),
    triton=Kernel(
        "kernels.linear_loss.gradient:launch_linear_loss_backward",
        "kernels.linear_loss.gradient:supports_linear_loss_backward",
        rowwise="hiddens heads dense",
    ),
)


def bits(flags: Any) -> int:
    """Bit i is flag i (of a list from ``ctx.needs_input_grad``)."""
    return sum(1 << i for i, flag in enumerate(flags or ()) if flag)


def by_name(grads: Any, need: tuple[int, int, int, bool], weights: Tensor | None) -> dict[str, Any]:
    """`GRADIENTS` as backward returns them: by argument name, None where not wanted."""
    found: dict[str, Any] = {}
    for name, tensors, mask in zip(("hiddens", "heads", "biases"), grads[:3], need[:3], strict=True):
        found[name] = [t if mask >> i & 1 else None for i, t in enumerate(tensors)]
    found["weights"] = grads[3].to(weights.dtype) if weights is not None and need[3] else None
    return found
