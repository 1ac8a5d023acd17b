"""A box's way through each layer that `IntervalModule` supports: fast, or sound in floating point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..ops.interval_bounds.affine import interval_affine, interval_batchnorm_stats
from ..ops.interval_bounds.conv import interval_conv2d
from ..ops.interval_bounds.inputs import Compute, Rounding
from ..ops.interval_bounds.linear import interval_linear
from ..reference.interval_bounds.boxes import outward

OP = "nn.IntervalModule"
SUPPORTED = (
    "Linear, Conv2d (zero padding), BatchNorm1d, BatchNorm2d, ReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Flatten, "
    "Identity, Dropout (in eval mode), and the functions relu, flatten, view, reshape, size and +"
)


Statistics = tuple[Tensor, Tensor]


class Box(NamedTuple):
    """Bounds, the clean activations where they are wanted, and (mean, variance) of the batch-norm they came through."""

    lower: Tensor
    upper: Tensor
    clean: Tensor | None = None
    statistics: Statistics | None = None


class Mode(NamedTuple):
    sound: bool
    compute: Compute = "fp32"

    @property
    def rounding(self) -> Rounding:
        return "sound" if self.sound else "fast"


Layer = Callable[[Mode, Box], Box]


def moved(found: Tensor, size: Tensor, lower: bool, dtype: torch.dtype) -> Tensor:
    """float64 ``found``, moved outward by far more than terms of ``size`` round in float64, in ``dtype``."""
    slack = size * 2.0**-40 + 1e-300
    end = torch.where(size < torch.inf, found - slack if lower else found + slack, -torch.inf if lower else torch.inf)
    return outward(end, dtype, lower)


def rounded(mode: Mode, function: Callable[..., Tensor], *tensors: Tensor, lower: bool) -> Tensor:
    """``function`` of the tensors; sound: in float64, moved outward by more than it rounds there, then in the dtype."""
    if not mode.sound:
        return function(*tensors)
    found = function(*(t.double() for t in tensors))
    size = function(*(t.double().abs() for t in tensors)).abs() + found.abs()
    return moved(found, size, lower, tensors[0].dtype)


def both(function: Callable[[Tensor], Tensor]) -> Layer:
    """A monotone function that does not round, on bounds and clean activations alike."""

    def run(mode: Mode, box: Box) -> Box:
        clean = None if box.clean is None else function(box.clean)
        return Box(function(box.lower), function(box.upper), clean)

    return run


def _average(function: Callable[[Tensor], Tensor]) -> Layer:
    def run(mode: Mode, box: Box) -> Box:
        clean = None if box.clean is None else function(box.clean)
        lower = rounded(mode, function, box.lower, lower=True)
        return Box(lower, rounded(mode, function, box.upper, lower=False), clean)

    return run


def add_boxes(mode: Mode, a: Box, b: Box) -> Box:
    clean = None if a.clean is None or b.clean is None else a.clean + b.clean
    lower = rounded(mode, torch.add, a.lower, b.lower, lower=True)
    return Box(lower, rounded(mode, torch.add, a.upper, b.upper, lower=False), clean)


def uses_batch(norm: nn.Module) -> bool:
    return isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) and (norm.training or norm.running_mean is None)


def _statistics(norm: Any, clean: Tensor | None) -> Statistics:
    """(mean, variance) of each channel: of the clean activations in training mode, otherwise the running ones."""
    if not uses_batch(norm):
        return norm.running_mean, norm.running_var
    assert clean is not None
    return interval_batchnorm_stats(clean)


def scale_of(norm: Any, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """s and t of ``s x + t``."""
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _norm(norm: Any) -> Layer:
    """Batch-norm by itself: an affine map of each channel, bounds exchanged where the scale is negative."""

    def run(mode: Mode, box: Box) -> Box:
        mean, variance = statistics = _statistics(norm, box.clean)
        clean = None if box.clean is None else norm(box.clean)
        axes = (1, -1) + (1,) * (box.lower.ndim - 2)
        if not mode.sound:
            s, t = (v.to(box.lower.dtype) for v in scale_of(norm, mean, variance))
            return Box(*interval_affine(box.lower, box.upper, s, t), clean, statistics)
        wide = [None if v is None else v.double() for v in (norm.weight, norm.bias)]
        scale = torch.rsqrt(variance.double() + norm.eps) * (1.0 if wide[0] is None else wide[0])
        center, beta = mean.double().reshape(axes), 0.0 if wide[1] is None else wide[1].reshape(axes)
        s = scale.reshape(axes)
        first, second = torch.where(s >= 0, box.lower, box.upper), torch.where(s >= 0, box.upper, box.lower)
        ends = []
        for x, lower in ((first.double(), True), (second.double(), False)):
            found, size = (x - center) * s + beta, (x.abs() + center.abs()) * s.abs() + abs(beta)
            ends.append(moved(found, size, lower, box.lower.dtype))
        return Box(ends[0], ends[1], clean, statistics)

    return run


def affine(layer: Any, norm: Any, relu: bool) -> Layer:
    """Linear or Conv2d with a batch-norm and a ReLU: one op, the norm folded into the weight.

    Sound rounding certifies the model itself, not one with a folded (and rounded) weight, so there the norm is a step.
    """
    alone = None if norm is None else _norm(norm)

    def apply(mode: Mode, box: Box, weight: Tensor, bias: Tensor | None, act: Any) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"act": act, "rounding": mode.rounding, "compute": mode.compute}
        if isinstance(layer, nn.Linear):
            return interval_linear(box.lower, box.upper, weight, bias, **options)
        options |= {"stride": layer.stride, "padding": padding_of(layer), "dilation": layer.dilation}
        lower, upper = interval_conv2d(box.lower, box.upper, weight, bias, groups=layer.groups, **options)
        return lower, upper

    def run(mode: Mode, box: Box) -> Box:
        clean = None if box.clean is None else layer(box.clean)
        weight, bias = layer.weight, layer.bias
        act: Any = "relu" if relu else None
        statistics = None
        if alone is not None and mode.sound:
            lower, upper = apply(mode, box, weight, bias, None)
            found = alone(mode, Box(lower, upper, clean))
            return both(F.relu)(mode, found) if relu else found
        if norm is not None:
            statistics = _statistics(norm, clean)
            s, t = scale_of(norm, *statistics)
            clean = None if clean is None else norm(clean)
            if isinstance(layer, nn.Linear) and weight.numel() > len(box.lower) * len(weight):
                # a scaled copy of a large weight costs more than a pass over a few outputs
                lower, upper = interval_affine(*apply(mode, box, weight, bias, None), s, t, act=act)
                return Box(lower, upper, F.relu(clean) if relu and clean is not None else clean, statistics)
            weight = weight * s.reshape(-1, *(1,) * (weight.ndim - 1))
            bias = t if bias is None else bias * s + t
        lower, upper = apply(mode, box, weight, bias, act)
        return Box(lower, upper, F.relu(clean) if relu and clean is not None else clean, statistics)

    return run


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    if isinstance(conv.padding, str):
        sides = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "valid":
            return 0, 0
        if any(side % 2 for side in sides):
            checks.fail(OP, "model", "made of convolutions padded alike on both sides", conv)
        return sides[0] // 2, sides[1] // 2
    return conv.padding  # type: ignore[return-value]


def refuse(what: Any) -> Any:
    checks.fail(OP, "model", "made of supported layers", what, f"Supported: {SUPPORTED}.", error=TypeError)


def layer_of(module: nn.Module, name: str) -> Layer:
    """The box's way through one module that stands alone."""
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return _norm(module)
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"):
        return affine(module, None, False)
    if isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
        return _average(module)
    if isinstance(module, (nn.ReLU, nn.Flatten, nn.Identity)) or (
        isinstance(module, nn.MaxPool2d) and not module.return_indices
    ):
        plain = F.relu if isinstance(module, nn.ReLU) else module  # never in place: bounds are shared
        return both(plain)
    if isinstance(module, nn.Dropout):

        def dropout(mode: Mode, box: Box) -> Box:
            if module.training and module.p > 0:
                checks.fail(OP, "model", "in eval mode where it has Dropout", f"{name} in training mode")
            return box

        return dropout
    found: Layer = refuse(f"{name}: {type(module).__name__}")
    return found


def input_box(x: Tensor, eps: Any, sound: bool, clip: Any) -> tuple[Tensor, Tensor]:
    """``[x - eps, x + eps]`` within ``clip``; sound: rounded outward."""
    if not isinstance(eps, Tensor):
        eps = checks.number(OP, "eps", eps, low=0.0)
    if not sound:
        lower, upper = x - eps, x + eps
        return (lower, upper) if clip is None else (lower.clamp_min(clip[0]), upper.clamp_max(clip[1]))
    wide = x.double()
    radius = eps.double() if isinstance(eps, Tensor) else torch.full((), eps, dtype=torch.float64, device=x.device)
    end = torch.full((), torch.inf, dtype=torch.float64, device=x.device)
    lower, upper = torch.nextafter(wide - radius, -end), torch.nextafter(wide + radius, end)
    lower, upper = torch.where(radius == 0, wide, lower), torch.where(radius == 0, wide, upper)
    if clip is not None:
        lower, upper = lower.clamp_min(clip[0]), upper.clamp_max(clip[1])
    return outward(lower, x.dtype, True), outward(upper, x.dtype, False)
