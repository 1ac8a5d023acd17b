"""interval_linear_iw: a linear layer of interval inputs and interval weights, lower, middle and upper in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.interval_bounds import weights as reference
from ...reference.interval_bounds.arguments import Ends
from .inputs import ROUNDINGS, Rounding, alike, rows

Triple = Sequence[Tensor]


def _backward(call: Call, grads: reference.Products) -> dict[str, Any]:
    given = (g.contiguous() for g in grads)
    made = INTERVAL_LINEAR_IW_BACKWARD.on(call.backend)(*given, call.ends, call.mode)
    return {name: getattr(made, f"d{name}") for name in Ends._fields}


INTERVAL_LINEAR_IW = define(
    reference.interval_linear_iw,
    fake=lambda ends, *_: tuple(ends.xl.new_empty((ends.xl.shape[0], ends.wl.shape[0])) for _ in range(3)),
    backward=_backward,
    saves=" ".join(Ends._fields),
    materialize=True,
    triton=Kernel(),
)

INTERVAL_LINEAR_IW_BACKWARD = define(
    reference.interval_linear_iw_backward,
    fake=lambda gl, gm, gu, ends, _: tuple(t.new_empty(t.shape) for t in ends),
    triton=Kernel(),
)


def _triple(op: str, name: str, value: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        checks.fail(op, name, "three tensors (lower, middle, upper)", type(value).__name__, error=TypeError)
    for i, tensor in enumerate(value):
        checks.is_float_tensor(op, f"{name}[{i}]", tensor)
        if tensor.shape != value[0].shape:
            checks.fail(op, f"{name}[{i}]", f"of the shape of {name}[0] {tuple(value[0].shape)}", tuple(tensor.shape))
    return tuple(value)


def _stepped(y: Tensor, known: Tensor, end: float) -> Tensor:
    """The next number towards ``end``, which a rounded sum cannot have passed; ``end`` where not known. dy = 1."""
    at = y.detach()
    step = torch.nextafter(at, torch.full_like(at, end)) - at  # exact, as is adding it
    return torch.where(known, y + torch.where(known, step, 0.0), end)


def _plain(
    x: Triple, weight: Triple, bias: Triple | None = None, *, mode: str = "nonneg", rounding: str = "fast"
) -> Any:
    if mode != "nonneg" or rounding != "fast" or bias is not None:
        return NotImplemented
    (lower, middle, upper), (w_lower, w_middle, w_upper) = x, weight
    low = F.linear(lower, w_lower.clamp_min(0)) + F.linear(upper, w_lower.clamp_max(0))
    high = F.linear(upper, w_upper.clamp_min(0)) + F.linear(lower, w_upper.clamp_max(0))
    return low, F.linear(middle, w_middle), high


@or_plain(_plain, replayed=True)
def interval_linear_iw(
    x: Triple,
    weight: Triple,
    bias: Triple | None = None,
    *,
    mode: Literal["nonneg", "general", "midrad"] = "nonneg",
    rounding: Rounding = "fast",
) -> tuple[Tensor, Tensor, Tensor]:
    """A linear layer whose input and weight are intervals: the layer of HyperInterval and InterContiNet networks.

    Each argument is (lower, middle, upper); the middle goes its own way, ``x_m W_m^T + b_m``, to nearest. Enclosures,
    for ``l <= u`` throughout:
    ``"nonneg"``: the exact hull for ``x_l >= 0`` (after ReLU), ``sum W_l (x_l where W_l >= 0 else x_u)`` below and
    ``sum W_u (x_u where W_u >= 0 else x_l)`` above. ``"general"``: the exact hull for any sign, the smallest and
    largest of the four products of ends. ``"midrad"``: with centres c and radii r,
    ``c_x c_W^T -+ (|c_x| r_W^T + r_x (|c_W| + r_W)^T)``, which contains the hull.

    Args:
        x: three tensors ``[..., K]``: float32, bfloat16, float16 or float64.
        weight: three tensors ``[N, K]`` of the same dtype.
        bias: None or three tensors ``[N]``.
        mode: ``"nonneg"`` (x >= 0 is not checked), ``"general"`` or ``"midrad"``.
        rounding: ``"fast"`` is round to nearest, for training. ``"sound"``: lower and upper contain the output of every
            x and W in the intervals in real arithmetic, whatever rounding did; overflow and NaN give (-inf, inf). Its
            gradient is that of ``"fast"``. Denormal numbers must not be flushed to 0.

    Returns:
        (lower, middle, upper), each ``[..., N]``. Differentiable, once, in all nine tensors. Deterministic. Nothing of
        size ``[B, N, K]`` is formed on a CPU.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> x = [torch.tensor([[v]]) for v in (1.0, 1.5, 2.0)]
        >>> w = [torch.tensor([[v]]) for v in (-1.0, 0.5, 3.0)]
        >>> w2s_fast.interval_linear_iw(x, w)
        (tensor([[-2.]]), tensor([[0.7500]]), tensor([[6.]]))
    """
    op = "interval_linear_iw"
    x, weight = _triple(op, "x", x), _triple(op, "weight", weight)
    if x[0].ndim < 1:
        checks.fail(op, "x[0]", "at least one-dimensional", tuple(x[0].shape))
    k = x[0].shape[-1]
    if weight[0].ndim != 2 or weight[0].shape[1] != k or k < 1:
        checks.fail(op, "weight[0]", f"of shape [N, {k}] with at least one column", tuple(weight[0].shape))
    named = [(f"x[{i}]", t) for i, t in enumerate(x)] + [(f"weight[{i}]", t) for i, t in enumerate(weight)]
    if bias is not None:
        bias = _triple(op, "bias", bias)
        if bias[0].shape != weight[0].shape[:1]:
            checks.fail(op, "bias[0]", f"of shape [{weight[0].shape[0]}]", tuple(bias[0].shape))
        named += [(f"bias[{i}]", t) for i, t in enumerate(bias)]
    found = alike(op, *named)
    x, weight, bias = found[:3], found[3:6], None if bias is None else found[6:]
    kind = reference.MODES.index(checks.choice(op, "mode", mode, reference.MODES))
    sound = checks.choice(op, "rounding", rounding, ROUNDINGS) == "sound"
    found = INTERVAL_LINEAR_IW(Ends(*(rows(t) for t in (*x, *weight))), kind, sound)
    if bias is not None:
        found = tuple(y + b for y, b in zip(found, bias, strict=True))
        if sound:
            known = found[0].isfinite() & found[2].isfinite()
            found = (_stepped(found[0], known, -torch.inf), found[1], _stepped(found[2], known, torch.inf))
    shape = (*x[0].shape[:-1], weight[0].shape[0])
    lower, middle, upper = (torch.reshape(y, shape) if x[0].ndim != 2 else y for y in found)
    return lower, middle, upper
