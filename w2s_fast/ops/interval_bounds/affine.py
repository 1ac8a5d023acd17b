"""interval_affine and interval_batchnorm_stats: batch-norm of a box with the statistics of clean activations."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.interval_bounds import affine as reference
from .inputs import ROUNDINGS, Rounding, alike, box


def _backward_affine(call: Call, grads: reference.Affine) -> dict[str, Any]:
    given = grads.low.contiguous(), grads.high.contiguous()
    out = call.out if call.relu else given
    made = INTERVAL_AFFINE_BACKWARD.on(call.backend)(*given, call.lower, call.upper, call.scale, *out, call.relu)
    return {name: getattr(made, f"d{name}") for name in ("lower", "upper", "scale", "shift")}


INTERVAL_AFFINE = define(
    reference.interval_affine,
    fake=lambda lower, upper, *_: (lower.new_empty(lower.shape), lower.new_empty(lower.shape)),
    backward=_backward_affine,
    saves=lambda call: "lower upper scale" + (" low high" if call.relu else ""),
    materialize=True,
    triton=Kernel(),
)

INTERVAL_AFFINE_BACKWARD = define(
    reference.interval_affine_backward,
    fake=lambda grad_lower, grad_upper, lower, upper, scale, *_: (
        lower.new_empty(lower.shape),
        lower.new_empty(lower.shape),
        scale.new_empty(scale.shape),
        scale.new_empty(scale.shape),
    ),
    triton=Kernel(),
)


def _fake_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[1],), dtype=kind), x.new_empty((x.shape[1],), dtype=kind)


def _backward_stats(call: Call, grads: reference.Moments) -> dict[str, Any]:
    kernel = INTERVAL_BATCHNORM_STATS_BACKWARD.on(call.backend)
    return {"x": kernel(grads.mean.contiguous(), grads.var.contiguous(), call.x, call.out.mean)}


INTERVAL_BATCHNORM_STATS = define(
    reference.interval_batchnorm_stats,
    fake=_fake_stats,
    backward=_backward_stats,
    saves="x mean",
    materialize=True,
    triton=Kernel(),
)

INTERVAL_BATCHNORM_STATS_BACKWARD = define(
    reference.interval_batchnorm_stats_backward,
    fake=lambda grad_mean, grad_var, x, mean: x.new_empty(x.shape),
    triton=Kernel(),
)


def _plain(
    lower: Tensor, upper: Tensor, scale: Tensor, shift: Tensor, *, act: str | None = None, rounding: str = "fast"
) -> Any:
    if rounding != "fast":
        return NotImplemented
    column = (-1, *[1] * (lower.ndim - 2))
    s, r = scale.reshape(column), (upper - lower) * 0.5
    m, r = (lower + r) * s + shift.reshape(column), r * s.abs()
    return ((m - r).relu(), (m + r).relu()) if act else (m - r, m + r)


@or_plain(_plain, replayed=True)
def interval_affine(
    lower: Tensor,
    upper: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    act: Literal["relu"] | None = None,
    rounding: Rounding = "fast",
) -> tuple[Tensor, Tensor]:
    """``scale x + shift`` of each channel of a box (arXiv 1810.12715), bounds exchanged where scale < 0, then ReLU.

    Batch-norm is ``scale = weight / sqrt(var + eps)``, ``shift = bias - mean scale``, with the statistics of the clean
    activations (`interval_batchnorm_stats`) in training. After a linear layer fold it into the weight instead.

    Args:
        lower, upper: bounds ``[B, C, ...]``; float32, bfloat16, float16 or float64.
        scale, shift: ``[C]`` of the same dtype.
        act: ``"relu"`` or None.
        rounding: ``"fast"``, or ``"sound"``: contains the exact image; overflow and NaN give (-inf, inf).

    Returns:
        Two tensors of the shape of lower. Differentiable, once, in all four tensors. Deterministic.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> l, u = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> w2s_fast.interval_affine(l, u, torch.tensor([2.0, -2.0]), torch.zeros(2))
        (tensor([[ 0., -2.]]), tensor([[2., 0.]]))
    """
    op = "interval_affine"
    box(op, lower, upper, ("lower", "upper"))
    if lower.ndim < 2:
        checks.fail(op, "lower", "of shape [B, C, ...]", tuple(lower.shape))
    for name, vector in (("scale", scale), ("shift", shift)):
        checks.is_float_tensor(op, name, vector)
        if vector.shape != lower.shape[1:2]:
            checks.fail(op, name, f"of shape [{lower.shape[1]}]", tuple(vector.shape))
    named = (("lower", lower), ("upper", upper), ("scale", scale), ("shift", shift))
    lower, upper, scale, shift = alike(op, *named)
    relu = checks.choice(op, "act", act, (None, "relu")) == "relu"  # type: ignore[arg-type]
    sound = checks.choice(op, "rounding", rounding, ROUNDINGS) == "sound"
    given = (lower.contiguous(), upper.contiguous(), scale.contiguous(), shift.contiguous())
    low, high = INTERVAL_AFFINE(*given, relu, sound)
    return low, high


def _plain_stats(x: Tensor) -> Any:
    if x.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return mean, variance


@or_plain(_plain_stats, replayed=True)
def interval_batchnorm_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of clean activations, for the batch-norm of a box (arXiv 2103.17268).

    Args:
        x: ``[B, C, ...]``, not empty; float32, bfloat16, float16 or float64.

    Returns:
        (mean, var), each ``[C]``, float32 (float64 for float64 inputs), from float64 sums. Differentiable, once, in x:
        certified training lets gradients flow through the statistics. Deterministic.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.interval_batchnorm_stats(torch.tensor([[1.0], [3.0]]))
        (tensor([2.]), tensor([1.]))
    """
    op = "interval_batchnorm_stats"
    checks.is_float_tensor(op, "x", x)
    if x.ndim < 2 or not x.numel():
        checks.fail(op, "x", "of shape [B, C, ...] and not empty", tuple(x.shape))
    mean, variance = INTERVAL_BATCHNORM_STATS(x.contiguous())
    return mean, variance
