"""tightness_rows: how tight interval bounds of a network are against the best box around its linear map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ..numbers import number
from .inputs import alike
from .linear import interval_linear


def _plain(
    weights: Sequence[Tensor], patterns: Sequence[Tensor | None] | None, rows: Tensor, radius: float = 1.0
) -> Any:
    if isinstance(radius, Tensor):
        return NotImplemented
    optimal, layerwise = rows, rows.abs()
    for i in reversed(range(len(weights))):
        weight, mask = weights[i], None if patterns is None else patterns[i]
        if mask is not None:
            keep = mask.unsqueeze(-2).to(rows.dtype)
            optimal, layerwise = optimal * keep, layerwise * keep
        optimal, layerwise = optimal @ weight, layerwise @ weight.abs()
    size = number(radius, rows.dtype)
    ends = [(part.sum(-1) * size).clamp_min(1e-8) for part in (optimal.abs(), layerwise)]
    return ends[0] / ends[1]


@or_plain(_plain)
def tightness_rows(
    weights: Sequence[Tensor], patterns: Sequence[Tensor | None] | None, rows: Tensor, radius: float | Tensor = 1.0
) -> Tensor:
    """Tightness of interval bound propagation (arXiv 2306.10426): optimal over layer-wise radius, of each output row.

    For the linear map ``rows P_L W_L ... P_1 W_1`` (P_i the 0/1 pattern of a ReLU),
    ``tau = |rows P_L W_L ... P_1 W_1| radius / (|rows| P_L |W_L| ... P_1 |W_1| radius)``, in (0, 1]. Numerator and
    denominator go backward together: each layer is one dual product (`interval_linear`), one read of its weight.

    Args:
        weights: W_1 ... W_L, each ``[N_i, N_{i-1}]``, of one dtype: float32, bfloat16, float16 or float64.
        patterns: L tensors ``[B, N_i]`` of 0 and 1 (any dtype), the active units after each W_i; an entry or the whole
            may be None: no ReLU there, a deep linear network.
        rows: ``[B, M, N_L]``, the rows of the next layer's map; for margins ``W_k - W_y`` of the last layer, elided
            before the absolute value. ``[M, N_L]`` without a batch.
        radius: of the input box, a number, ``[N_0]`` or ``[B, N_0]``.

    Returns:
        tau ``[B, M]`` (or ``[M]``) of the dtype of rows, numerator and denominator clamped at 1e-8. Differentiable,
        once, in weights and rows.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> weight, rows = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0]])
        >>> w2s_fast.tightness_rows([weight], None, rows)
        tensor([0.5000])
    """
    op = "tightness_rows"
    checks.is_float_tensor(op, "rows", rows)
    if rows.ndim not in (2, 3):
        checks.fail(op, "rows", "of shape [B, M, N] or [M, N]", tuple(rows.shape))
    if not isinstance(weights, (list, tuple)) or not weights:
        checks.fail(op, "weights", "a nonempty list of tensors", type(weights).__name__, error=TypeError)
    if patterns is not None and not isinstance(patterns, (list, tuple)):
        checks.fail(op, "patterns", "a list of tensors or None", type(patterns).__name__, error=TypeError)
    masks = [None] * len(weights) if patterns is None else list(patterns)
    if len(masks) != len(weights):
        checks.fail(op, "patterns", f"one a weight ({len(weights)})", f"{len(masks)}")
    optimal, layerwise = rows, rows.abs()
    for i, (weight, mask) in reversed(list(enumerate(zip(weights, masks, strict=True)))):
        checks.is_float_tensor(op, f"weights[{i}]", weight)
        if weight.ndim != 2 or weight.shape[0] != optimal.shape[-1]:
            checks.fail(op, f"weights[{i}]", f"of shape [{optimal.shape[-1]}, K]", tuple(weight.shape))
        optimal, layerwise, weight = alike(op, ("rows", optimal), ("rows", layerwise), (f"weights[{i}]", weight))
        if mask is not None:
            wanted = (*rows.shape[:-2], weight.shape[0])
            if tuple(checks.is_tensor(op, f"patterns[{i}]", mask).shape) != wanted:
                checks.fail(op, f"patterns[{i}]", f"of shape {wanted}", tuple(mask.shape))
            checks.same_device(op, [("rows", rows), (f"patterns[{i}]", mask)])
            keep = mask.unsqueeze(-2).to(rows.dtype)
            optimal, layerwise = optimal * keep, layerwise * keep
        optimal, layerwise = interval_linear(optimal, layerwise, weight.t(), form="cr")
    if isinstance(radius, Tensor):
        checks.same_device(op, [("rows", rows), ("radius", radius)])
        fits = (layerwise.shape[-1:], (*rows.shape[:-2], layerwise.shape[-1])) if radius.ndim else ((),)
        if tuple(radius.shape) not in fits:
            shapes = " or ".join(str(list(shape)) for shape in fits)
            checks.fail(op, "radius", f"a number or of shape {shapes}", tuple(radius.shape))
    ends = []
    for part in (optimal.abs(), layerwise):
        if isinstance(radius, Tensor):
            each = radius.to(part.dtype)
            total = (part * (each.unsqueeze(-2) if each.ndim > 1 else each)).sum(-1)
        else:
            total = part.sum(-1) * checks.number(op, "radius", radius, low=0.0)
        ends.append(total.clamp_min(1e-8))
    return ends[0] / ends[1]
