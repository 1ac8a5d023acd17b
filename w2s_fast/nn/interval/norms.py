"""Batch-norm with known statistics, and norms over a sample: layer, group, instance and root-mean-square norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...ops.interval_bounds.affine import interval_affine, interval_batchnorm_stats
from . import deployed
from .backward import norm_back
from .boxes import OP, Box, Call, Ends, Statistics, finished, wide
from .numbers import scale_of
from .registry import layer


def _trains(norm: dict[str, Any]) -> bool:
    return bool(norm.get("training", norm.get("train", False)))


def statistics_of(norm: dict[str, Any], clean: Tensor | None) -> Statistics:
    """(mean, variance) of each channel: of the clean activations in training mode, otherwise the running ones."""
    if not _trains(norm):
        return norm["running_mean"], norm["running_var"]
    assert clean is not None
    return interval_batchnorm_stats(clean)


def norm_clean(norm: dict[str, Any], clean: Tensor | None) -> Tensor | None:
    """The norm of the clean activations; in training mode the running statistics move."""
    if clean is None:
        return None
    own: tuple[Any, ...] = (norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"])
    own = (
        tuple(t if t is None else t.to(clean.dtype) for t in own)
        if own[2] is not None and own[2].dtype != clean.dtype
        else own
    )
    momentum = norm["momentum"]
    if isinstance(momentum, Tensor):  # batches so far: running statistics are averages over all of them
        momentum = 1 / float(momentum)
    return F.batch_norm(clean, *own[:4], _trains(norm), momentum, norm["eps"])  # type: ignore[call-arg]


def norm_ends(call: Call, box: Box, **norm: Any) -> Box:
    """Batch-norm by itself: an affine map of each channel, bounds exchanged where the scale is negative."""
    mean, variance = statistics = statistics_of(norm, box.clean)
    clean = norm_clean(norm, box.clean)
    axes = (1, -1) + (1,) * (box.lower.ndim - 2)
    if not call.sound:
        s, t = (v.to(box.lower.dtype) for v in scale_of(norm, mean, variance))
        return Box(*interval_affine(box.lower, box.upper, s, t), clean, statistics)
    weight, bias = wide(call, norm["weight"]), wide(call, norm["bias"])
    if call.mode.deployed:  # of a step of its own, or of one merged with the product before it
        call = call._replace(lost=deployed.lost("batch_norm", {}, call.dtype))
    scale = torch.rsqrt(variance.double() + norm["eps"]) * (1.0 if weight is None else weight)
    center, beta = mean.double().reshape(axes), 0.0 if bias is None else bias.reshape(axes)
    s = scale.reshape(axes)
    first, second = torch.where(s >= 0, box.lower, box.upper), torch.where(s >= 0, box.upper, box.lower)
    found = []
    for x, lower in ((first.double(), True), (second.double(), False)):
        size = (x.abs() + center.abs()) * s.abs() + abs(beta)
        found.append(finished(call, *((x - center) * s + beta,) * 2, size)[0 if lower else 1])
    return Box(found[0], found[1], clean, statistics)


@layer("batch_norm", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training", "native_batch_norm",
       "cudnn_batch_norm", shows="BatchNorm1d, BatchNorm2d, BatchNorm3d",
    kind="elementwise", back=norm_back)  # fmt: skip
def _batch_norm(call: Call, *, input: Box, **norm: Any) -> Box:
    return norm_ends(call, input, **norm)


def _normalised(call: Call, low: Tensor, high: Tensor, axes: list[int], eps: float, centred: bool) -> Ends:
    """``c / sqrt(mean c^2 + eps)`` over axes, c the entries less their mean (or the entries themselves).

    Of its own entry each output is an increasing function, of the others' squares a falling one where it is positive
    and a rising one where it is negative.
    """
    n = 1
    for axis in axes:
        n *= low.shape[axis]
    size = torch.maximum(low.abs(), high.abs())
    if centred:
        lows, highs = (t.sum(axes, keepdim=True) for t in (low, high))
        first = low * (1 - 1 / n) - (highs - high) / n
        second = high * (1 - 1 / n) - (lows - low) / n
        size = size + size.sum(axes, keepdim=True) / n
        low, high = first, second
    slack = size * (4 * n + 64) * 2.0**-52 + 1e-300 if call.sound else torch.zeros_like(size)
    low, high = low - slack, high + slack
    top = torch.maximum(low.square(), high.square())
    bottom = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.square(), high.square()))
    sums = [t.sum(axes, keepdim=True) for t in (bottom, top)]
    lost = sums[1] * ((4 * n + 64) * 2.0**-52) if call.sound else 0.0
    least, most = (sums[0] - bottom - lost).clamp_min(0) / n, (sums[1] - top + lost).clamp_min(0) / n

    def value(c: Tensor, rest: Tensor) -> Tensor:
        return c * torch.rsqrt(c.square() / n + rest + eps)

    lower = torch.where(low >= 0, value(low, most), value(low, least))
    upper = torch.where(high >= 0, value(high, least), value(high, most))
    if call.sound:
        limit = n**0.5 * (1 + 1e-9)  # whatever happens; and what rounds is relative to the value
        known = (size < torch.inf) & lower.isfinite() & upper.isfinite()
        lower, upper = torch.where(known, lower, -limit), torch.where(known, upper, limit)
        lower, upper = lower - lower.abs() * 2.0**-44 - 1e-300, upper + upper.abs() * 2.0**-44 + 1e-300
    return lower, upper


def _scaled(call: Call, lower: Tensor, upper: Tensor, weight: Tensor | None, bias: Tensor | None) -> Ends:
    if weight is not None:
        one, two = lower * wide(call, weight), upper * wide(call, weight)
        lower, upper = torch.minimum(one, two), torch.maximum(one, two)
    size = lower.abs() + upper.abs() if call.sound else None
    if bias is not None:
        shift = wide(call, bias)
        lower, upper = lower + shift, upper + shift
        size = size + shift.abs() if size is not None else None
    return finished(call, lower, upper, size)


@layer("layer_norm", "native_layer_norm", "rms_norm", shows="LayerNorm, RMSNorm")
def _layer_norm(
    call: Call, *, input: Box, normalized_shape: Any, weight: Any, bias: Any = None, eps: Any, **_: Any
) -> Ends:
    axes = list(range(-len(normalized_shape), 0))
    centred = "rms" not in call.op._schema.name
    if eps is None:  # what PyTorch takes: that of its sums, which are float32 for 16-bit numbers
        eps = torch.finfo(torch.float64 if input.lower.dtype == torch.float64 else torch.float32).eps
    low, high = _normalised(call, wide(call, input.lower), wide(call, input.upper), axes, eps, centred)
    return _scaled(call, low, high, weight, bias)


def _in_groups(call: Call, box: Box, groups: int, eps: float, weight: Any, bias: Any) -> Ends:
    batch, channels = box.lower.shape[:2]
    low, high = (wide(call, t).reshape(batch, groups, -1) for t in (box.lower, box.upper))
    low, high = (t.reshape(box.lower.shape) for t in _normalised(call, low, high, [-1], eps, True))
    shape = (channels,) + (1,) * (box.lower.ndim - 2)
    return _scaled(call, low, high, *(None if t is None else t.reshape(shape) for t in (weight, bias)))


@layer("group_norm", shows="GroupNorm")
def _group_norm(call: Call, *, input: Box, num_groups: int, weight: Any, bias: Any, eps: float, **_: Any) -> Ends:
    return _in_groups(call, input, num_groups, eps, weight, bias)


@layer("instance_norm", shows="InstanceNorm1d, InstanceNorm2d")
def _instance_norm(
    call: Call, *, input: Box, weight: Any, bias: Any, use_input_stats: bool, eps: float, **given: Any
) -> Any:
    if not use_input_stats:
        return norm_ends(call, input, weight=weight, bias=bias, training=False, eps=eps, **given)
    if given.get("running_mean") is not None:
        checks.fail(OP, "model", "in eval mode where it has InstanceNorm with running statistics", call.where)
    return _in_groups(call, input, input.lower.shape[1], eps, weight, bias)
