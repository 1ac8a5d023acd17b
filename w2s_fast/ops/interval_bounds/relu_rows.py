"""relu_rows: CROWN's linear upper bounds taken back through a ReLU, one read and one write of the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.interval_bounds import relu_rows as reference
from .inputs import alike, box


def _kind(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _backward(call: Call, grads: reference.ReluRows) -> dict[str, Any]:
    needs = call.needs
    made = RELU_ROWS_BACKWARD.on(call.backend)(
        grads.rows.contiguous(), grads.total.contiguous(), call.a, call.lower, call.upper, needs.a,
        needs.lower or needs.upper,
    )  # fmt: skip
    return {name: getattr(made, f"d{name}") for name in ("a", "lower", "upper") if getattr(needs, name)}


RELU_ROWS = define(
    reference.relu_rows,
    fake=lambda a, lower, upper: (a.new_empty(a.shape), a.new_empty(a.shape[:2], dtype=_kind(a))),
    backward=_backward,
    saves="a lower upper",
    materialize=True,
    triton=Kernel(),
)

RELU_ROWS_BACKWARD = define(
    reference.relu_rows_backward,
    fake=lambda grad, more, a, lower, upper, need_a, need_box: (
        a.new_empty(a.shape if need_a else (0,)),
        a.new_empty(lower.shape if need_box else (0,)),
        a.new_empty(lower.shape if need_box else (0,)),
    ),
    triton=Kernel(),
)


def relu_rows(a: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Linear upper bounds taken back through a ReLU: ``a . relu(x) <= rows . x + total`` for every x of the box.

    CROWN's relaxation (arXiv 1811.00866): with l = min(lower, 0), u = max(upper, 0, l + 1e-8) the ReLU lies below
    ``s x - l s``, s = u / (u - l), and above x or 0, whichever leaves the smaller area. A row takes the line above
    where it is positive and the one below elsewhere. Round to nearest, for training.

    Args:
        a: rows ``[M, B, ...]`` at the ReLU's output, M of each sample; float32, bfloat16, float16 or float64.
        lower, upper: bounds ``[B, ...]`` at its input, of the same dtype.

    Returns:
        (rows, total): rows like a, and ``sum max(a, 0) (-l s)`` as ``[M, B]``, float32 (float64 for float64 inputs).
        Differentiable, once, in all three tensors. Deterministic.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> l, u = torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, 2.0]])
        >>> w2s_fast.relu_rows(torch.tensor([[[1.0, 2.0]], [[-1.0, -2.0]]]), l, u)
        (tensor([[[ 0.5000,  2.0000]],
        <BLANKLINE>
                [[-0.0000, -2.0000]]]), tensor([[0.5000],
                [0.0000]]))
    """
    op = "relu_rows"
    checks.is_float_tensor(op, "a", a)
    box(op, lower, upper, ("lower", "upper"))
    if a.ndim < 2:
        checks.fail(op, "a", "of shape [M, B, ...]", tuple(a.shape))
    if lower.shape != a.shape[1:]:
        checks.fail(op, "lower", f"of shape {tuple(a.shape[1:])}", tuple(lower.shape))
    a, lower, upper = alike(op, ("a", a), ("lower", lower), ("upper", upper))
    count = a.shape[2:].numel()
    flat = a.reshape(*a.shape[:2], count), *(t.reshape(a.shape[1], count) for t in (lower, upper))
    rows, total = RELU_ROWS(*(t.contiguous() for t in flat))
    return rows.reshape(a.shape), total
