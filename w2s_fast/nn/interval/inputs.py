"""What bounds are asked about: balls around inputs, checked in one place for every method."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import checks
from ...reference.interval_bounds.boxes import outward
from .boxes import OP, Box, Choices, Norm

Clip = tuple[Any, Any] | None
NORMS = (1, 2, math.inf)


class Ball(NamedTuple):
    """All inputs within ``eps`` of ``x``: one of several inputs, with a radius of its own.

    Args:
        x: inputs ``[B, ...]``.
        eps: radius, a number >= 0 or a tensor that broadcasts to x.
        clip: (lowest, highest) value an input may have, numbers or tensors that broadcast to x.
        norm: ``inf``, 2 or 1: of a whole sample ``[...]``.
    """

    x: Tensor
    eps: float | Tensor
    clip: Clip = None
    norm: float = math.inf


def looks(*tensors: Tensor) -> bool:
    """Whether values may be looked at: on a CPU, and not while a compiler traces or vmap maps."""
    if torch.compiler.is_compiling():
        return False
    return all(t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter) and not _mapped(t) for t in tensors)


def _mapped(t: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(t))


def _radius(eps: Any, x: Tensor) -> Any:
    if not isinstance(eps, Tensor):
        return checks.number(OP, "eps", eps, low=0.0)
    if eps.dtype == torch.bool or eps.is_complex():
        checks.fail(OP, "eps", "a real number or a tensor of them", eps.dtype, error=TypeError)
    _broadcasts("eps", eps, x)
    if eps.device != x.device and eps.ndim:
        checks.fail(OP, "eps", f"on the device of x ({x.device})", eps.device)
    if looks(eps) and not bool((eps >= 0).all() and eps.isfinite().all()):
        worst = eps[~((eps >= 0) & eps.isfinite())].flatten()[0].item()
        checks.fail(OP, "eps", "a finite number >= 0 in every entry", worst)
    return eps


def _broadcasts(name: str, value: Tensor, x: Tensor) -> None:
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        checks.fail(OP, name, f"of a shape that broadcasts to x {tuple(x.shape)}", tuple(value.shape))


def _limits(clip: Any, x: Tensor) -> tuple[Any, Any] | None:
    if clip is None:
        return None
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        checks.fail(OP, "clip", "None or (lowest, highest)", clip, error=TypeError)
    for side in clip:
        if isinstance(side, Tensor):
            _broadcasts("clip", side, x)
        elif isinstance(side, bool) or not isinstance(side, (int, float)):
            checks.fail(OP, "clip", "None or (lowest, highest)", clip, error=TypeError)
    low, high = clip
    tensors = [s for s in clip if isinstance(s, Tensor)]
    if looks(*tensors) and not bool(torch.as_tensor(low <= high).all()):
        checks.fail(OP, "clip", "(lowest, highest) with lowest <= highest", clip)
    return low, high


def _to(value: Any, like: Tensor) -> Tensor:
    """A number or tensor, exactly."""
    if isinstance(value, Tensor):
        moved: Tensor = value.to(like.device, like.dtype if like.dtype == torch.float64 else value.dtype)
        return moved
    return torch.full((), value, dtype=torch.float64, device=like.device)


def input_box(x: Tensor, eps: Any, sound: bool, clip: Clip = None, norm: float = math.inf, name: str = "x") -> Box:
    """``[x - eps, x + eps]`` within ``clip``; sound: rounded outward. An empty box is an error.

    Where values cannot be looked at, an empty box becomes one that nothing is known of: it certifies nothing.

    Raises:
        ValueError, TypeError: naming `norm`.
    """
    checks.is_float_tensor(OP, name, x)
    if norm not in NORMS:
        checks.fail(OP, "norm", "inf, 2 or 1", norm)
    eps, limits = _radius(eps, x), _limits(clip, x)
    if sound and x.dtype == torch.float32 and isinstance(eps, float) and not (limits and _tensors(limits)):
        lower, upper = _around(x, eps, limits)
    elif sound:
        wide, radius = x.double(), _to(eps, x).double()
        end = torch.full((), torch.inf, dtype=torch.float64, device=x.device)
        lower, upper = torch.nextafter(wide - radius, -end), torch.nextafter(wide + radius, end)
        lower, upper = torch.where(radius == 0, wide, lower), torch.where(radius == 0, wide, upper)
        if limits is not None:
            low, high = (_to(s, wide).double() for s in limits)
            lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
    else:
        lower, upper = x - eps, x + eps
        if limits is not None:
            lower, upper = lower.clamp_min(limits[0]), upper.clamp_max(limits[1])
        lower, upper = lower.to(x.dtype), upper.to(x.dtype)
    if limits is None and not isinstance(eps, Tensor):
        return _with_ball(x, eps, sound, norm, lower, upper)
    empty = lower > upper
    if looks(x):
        if bool(empty.any()):
            value = x[empty][0].item()
            checks.fail(OP, name, "within eps of clip: no input lies in both", f"an entry {value:g} with clip {clip}")
    elif limits is not None or isinstance(eps, Tensor):
        bad = empty if not isinstance(eps, Tensor) else empty | ~(eps >= 0).expand(x.shape)
        lower, upper = lower.masked_fill(bad, -torch.inf), upper.masked_fill(bad, torch.inf)
    return _with_ball(x, eps, sound, norm, lower, upper)


def _tensors(values: tuple[Any, ...]) -> bool:
    return any(isinstance(v, Tensor) for v in values)


#: Ends of the float32 numbers, by device: tensors that are made once.
_ENDS: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _around(x: Tensor, eps: float, limits: tuple[Any, Any] | None) -> tuple[Tensor, Tensor]:
    """float32 ``[x - eps, x + eps]`` within limits, which are numbers, rounded outward: few and small operations.

    ``x - e`` with e >= eps of float32 is rounded to nearest, so the number below it is beyond the exact one.
    """
    if eps == 0:
        lower = upper = x
    else:
        radius = _number(eps, False)
        ends = _ENDS.get(x.device)
        if ends is None or _mapped(x) or torch.compiler.is_compiling():
            ends = torch.tensor(-torch.inf, device=x.device), torch.tensor(torch.inf, device=x.device)
            if looks(x):
                _ENDS[x.device] = ends
        lower, upper = torch.nextafter(x - radius, ends[0]), torch.nextafter(x + radius, ends[1])
    if limits is not None:
        lower, upper = lower.clamp_min(_number(limits[0], True)), upper.clamp_max(_number(limits[1], False))
    return lower, upper


@lru_cache(maxsize=256)
def _number(value: float, lower: bool) -> float:
    """A float32 number at or beyond ``value``."""
    if not math.isfinite(value):
        return value
    return float(outward(torch.tensor(float(value), dtype=torch.float64), torch.float32, lower))


def _with_ball(x: Tensor, eps: Any, sound: bool, norm: float, lower: Tensor, upper: Tensor) -> Box:
    if sound and lower.dtype != x.dtype:
        lower, upper = outward(lower, x.dtype, True), outward(upper, x.dtype, False)
    ball = None
    if norm != math.inf:
        center = x.double() if sound else x
        scale = _to(eps, x).to(center.dtype).expand(x.shape)
        ball = Norm(float(norm), center, scale, torch.zeros_like(center))
    return Box(lower, upper, None, None, ball)


def labels(y: Any, batch: int, classes: int) -> Tensor:
    """Labels ``[B]`` in range, int64.

    Raises:
        ValueError, TypeError: naming `y`.
    """
    checks.is_tensor(OP, "y", y)
    if y.dtype not in (torch.int64, torch.int32):
        checks.fail(OP, "y", "int64 or int32", y.dtype, error=TypeError)
    if tuple(y.shape) != (batch,):
        checks.fail(OP, "y", f"of shape ({batch},)", tuple(y.shape))
    if looks(y):
        checks.index_range(OP, "y", y, classes)
    found: Tensor = y.long()
    return found


def boxes(x: Any, eps: Any, sound: bool, clip: Clip, norm: float, clean: bool) -> list[Any]:
    """What goes into the model: a `Box`, `Choices`, or a tensor as it is, for every input.

    Raises:
        ValueError, TypeError: naming `x`, `eps`.
    """
    given = list(x) if isinstance(x, (tuple, list)) and not isinstance(x, (Ball, Choices)) else [x]
    found: list[Any] = []
    for i, value in enumerate(given):
        name = "x" if len(given) == 1 else f"x[{i}]"
        if isinstance(value, Choices):
            if not isinstance(value.options, Tensor) or value.options.dtype not in (torch.int64, torch.int32):
                checks.fail(
                    OP, name, "Choices of int64 or int32 ids [B, L, S]", type(value.options).__name__, error=TypeError
                )
            found.append(value)
        elif isinstance(value, Ball):
            box = input_box(checks.is_float_tensor(OP, name, value.x), value.eps, sound, value.clip, value.norm, name)
            found.append(box._replace(clean=value.x if clean else None))
        elif isinstance(value, Tensor) and (len(given) == 1 or (value.is_floating_point() and eps is not None)):
            if eps is None:
                checks.fail(OP, "eps", "a number or a tensor", None, error=TypeError)
            box = input_box(value, eps, sound, clip, norm, name)
            found.append(box._replace(clean=value if clean else None))
        elif isinstance(value, Tensor):
            found.append(value)
        else:
            checks.fail(OP, name, "a tensor, a Ball, Choices or a tuple of them", type(value).__name__, error=TypeError)
    if not any(isinstance(v, (Box, Choices)) for v in found):
        checks.fail(OP, "x", "at least one input with a radius", "none")
    return found
