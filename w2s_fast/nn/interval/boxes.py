"""Boxes, and the one place where a rounding mode decides how their ends are computed and moved outward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...ops.interval_bounds.inputs import Compute
from ...ops.interval_bounds.inputs import Rounding as OwnRounding
from ...reference.interval_bounds.boxes import center_radius, outward, sound_bounds, sound_operand, spread_limit, unit

OP = "nn.IntervalModule"
Ends = tuple[Tensor, Tensor]
Statistics = tuple[Tensor, Tensor]
Rounding = Literal["fast", "sound", "deployed"]
ROUNDINGS = ("fast", "sound", "deployed")
HALVES = (torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """``x = center + scale z + e`` with ``|z|_p <= 1`` over a sample, p = 1 or 2, and rounding ``|e| <= slack``.

    It cuts the box that it comes with; float64 with sound rounding.
    """

    p: float
    center: Tensor
    scale: Tensor
    slack: Tensor


class Box(NamedTuple):
    """Bounds, the clean activations where they are wanted, and (mean, variance) of the batch-norm they came through."""

    lower: Tensor
    upper: Tensor
    clean: Tensor | None = None
    statistics: Statistics | None = None
    ball: Norm | None = None


class Choices(NamedTuple):
    """Token ids of which each may be any of ``options [..., S]``; ``options[..., 0]`` are the clean ones."""

    options: Tensor

    @property
    def clean(self) -> Tensor:
        """The clean ids, ``[...]``."""
        return self.options[..., 0]


class Lost(NamedTuple):
    """What another evaluation of an operation may be off by (`deployed`).

    size, value: relative to the sum of absolute terms, and to the result; least: absolute; rough: relative to the sum
    of terms, for all that rounding to 16 bits does.
    """

    size: float = 0.0
    value: float = 0.0
    least: float = 0.0
    rough: float = 0.0


EXACT = Lost()


class Mode(NamedTuple):
    """How numbers are rounded, in the bounds and (deployed) in the model."""

    rounding: Rounding
    compute: Compute = "fp32"

    @property
    def sound(self) -> bool:
        """Whether the bounds are rounded outward."""
        return self.rounding != "fast"

    @property
    def deployed(self) -> bool:
        """Whether the bounds hold for what the deployed model computes, with its own rounding."""
        return self.rounding == "deployed"

    @property
    def own(self) -> OwnRounding:
        """Rounding of the ops."""
        return "sound" if self.sound else "fast"


class Call(NamedTuple):
    """What a layer's rule is told besides its arguments: the op, the result's dtype and shape, the layer's name."""

    mode: Mode
    op: Any
    dtype: torch.dtype
    shape: tuple[int, ...]
    where: str
    lost: Lost = Lost()

    @property
    def sound(self) -> bool:
        """Whether rounding is outward."""
        return self.mode.sound


def refuse(what: Any, error: type[Exception] = TypeError) -> Any:
    """Raise: the model has something that no rule covers.

    Raises:
        TypeError, or ``error``: naming ``what``, with the list of layers that have rules.
    """
    from .registry import supported

    checks.fail(OP, "model", "made of supported layers", what, f"Supported: {supported()}.", error=error)


def moved(found: Tensor, size: Tensor, lower: bool, dtype: torch.dtype, terms: int = 1, lost: Lost = EXACT) -> Tensor:
    """float64 ``found`` in ``dtype``, moved outward by more than ``terms`` roundings in float64 of terms of ``size``.

    2^-40 is 8192 roundings; longer sums add theirs. What a deployed evaluation has lost comes on top. NaN and overflow
    leave nothing known.
    """
    slack = size * (max(2.0**-40, 4 * terms * 2.0**-53) + lost.size) + max(1e-300, lost.least)
    limit = torch.inf
    if lost.size:
        slack = slack + found.abs() * lost.value
        limit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max / 4
    end = torch.where(size < limit, found - slack if lower else found + slack, -torch.inf if lower else torch.inf)
    return outward(end, dtype, lower)


def wide(call: Call, value: Any) -> Any:
    """Tensors in float64 if sound."""
    return value.double() if call.sound and isinstance(value, Tensor) and value.is_floating_point() else value


def ends(call: Call, box: Box) -> Ends:
    """Lower and upper, in float64 if sound."""
    return wide(call, box.lower), wide(call, box.upper)


def largest(box: Box) -> Tensor:
    """Largest absolute value in the box, float64."""
    return torch.maximum(box.lower.double().abs(), box.upper.double().abs())


def finished(call: Call, lower: Tensor, upper: Tensor, size: Tensor | None = None, terms: int = 1) -> Ends:
    """Ends in the result's dtype; sound: moved outward by what terms of ``size`` (default: the ends' own) round."""
    if not call.sound:
        return lower.to(call.dtype), upper.to(call.dtype)
    both = size is not None
    low = moved(lower, size if both else lower.abs(), True, call.dtype, terms, call.lost)  # type: ignore[arg-type]
    high = moved(upper, size if both else upper.abs(), False, call.dtype, terms, call.lost)  # type: ignore[arg-type]
    return low, high


def increasing(call: Call, function: Callable[[Tensor], Tensor], box: Box) -> Ends:
    """A non-decreasing function that PyTorch evaluates in float64 to a few units of its value."""
    low, high = ends(call, box)
    return finished(call, function(low), function(high))


def point(tensor: Tensor) -> Box:
    """A constant as a box."""
    return Box(tensor, tensor)


def linear_map(
    call: Call, function: Callable[[Tensor, bool], Tensor], box: Box, terms: int, bias: Tensor | None = None
) -> Ends:
    """An affine map: ``function(x, False)`` is linear in x, ``function(x, True)`` the same with |coefficients|.

    Sound: the centre in float64; its rounding, gamma |coefficients| |centre|, goes to the radius before its product.
    """
    if not call.sound:
        m, r = center_radius(box.lower, box.upper)
        m, r = function(m, False), function(r, True)
        m = m if bias is None else m + bias
        return (m - r).to(call.dtype), (m + r).to(call.dtype)
    lost = call.lost
    m, r, gamma = sound_operand(box.lower, box.upper, True, terms + 8, lost.size)
    center, radius = function(m, False), function(r, True) * (1 + 2 * gamma)
    if bias is not None:
        center = center + bias.double()
        radius = radius + bias.double().abs() * (unit(torch.float64) + lost.size) * (1 + 2.0**-50)
    radius = radius + lost.least
    limit = spread_limit(lost.size, torch.float64 if call.dtype == torch.float64 else torch.float32)
    lower, upper = sound_bounds(center, radius, 4 * unit(torch.float64), limit)
    if lost.rough:
        lower, upper = rounded_twice(call, (lower, upper), bias)
    return outward(lower, call.dtype, True), outward(upper, call.dtype, False)


def rounded_twice(call: Call, found: Ends, bias: Tensor | None) -> Ends:
    """Bounds of a product and its bias, of which another evaluation rounds the product to 16 bits, then the sum.

    The first moves the sum by at most ``u (|y| + |b|)`` and the least, the second is left to rounding outward.
    """
    lower, upper = found
    share = unit(call.dtype) * 1.01
    moves = 0.0 if bias is None else bias.to(lower.dtype).abs() * share
    return (
        lower - (lower.abs() * share + moves + call.lost.least),
        upper + (upper.abs() * share + moves + call.lost.least),
    )


def finished_margins(mode: Mode, upper: Tensor, own: Tensor) -> Tensor:
    """``upper - own``; sound: rounded up."""
    if not mode.sound:
        return upper - own
    wide_upper, wide_own = upper.double(), own.double()
    return moved(wide_upper - wide_own, wide_upper.abs() + wide_own.abs(), False, upper.dtype)
