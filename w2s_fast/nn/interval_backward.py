"""CROWN-IBP: linear upper bounds of outputs, taken backward through the layers over the boxes of an interval pass.

Rows ``a [B, M, ...]`` of a layer's output become rows of its input: ``a . f(x) <= a' . x + constant`` for every x in
the layer's box. With sound rounding all of it is float64, and each layer adds to the bound what rounding can have done
to it: at most gamma_n |a| . size, where size bounds the terms of f over the box. This is so because the value of a row
changed by e at x is changed by e . x, and because bounds of every x are at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.interval_bounds.boxes import outward
from .interval_layers import Box, Mode, padding_of, refuse, scale_of


class Rows(NamedTuple):
    """Rows of a layer's input, their constant (0 if None), and the size of the layer's terms (None: no rounding)."""

    a: Tensor
    constant: Tensor | None = None
    size: Tensor | None = None


#: (mode, rows of the output, box of the input, box of the output)
Backward = Callable[[Mode, Tensor, Box, Box], Rows]


def dot(a: Tensor, v: Tensor) -> Tensor:
    """``[B, M]``: rows ``[B, M, ...]`` times a vector ``[B, ...]`` (either B may be 1)."""
    return torch.matmul(a.flatten(2), v.flatten(1).unsqueeze(-1)).squeeze(-1)


def ends(mode: Mode, box: Box) -> tuple[Tensor, Tensor]:
    """Lower and upper, in float64 if sound."""
    return (box.lower.double(), box.upper.double()) if mode.sound else (box.lower, box.upper)


def largest(box: Box) -> Tensor:
    """Largest absolute value in the box, float64."""
    return torch.maximum(box.lower.double().abs(), box.upper.double().abs())


def _channels(v: Tensor, like: Tensor, before: int) -> Tensor:
    """``[C]`` that broadcasts to ``like`` with C after ``before`` axes."""
    return v.reshape((1,) * before + (-1,) + (1,) * (like.ndim - before - 1))


def affine_backward(layer: Any, norm: Any) -> Backward:
    """Linear or Conv2d (None: neither), then a batch-norm or None."""

    def product(weight: Tensor, a: Tensor, box: Box) -> Tensor:
        if isinstance(layer, nn.Linear):
            return a @ weight
        (rows, columns), padding = box.lower.shape[-2:], padding_of(layer)
        rest = [
            size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, out, s, p, d, k in zip(
                (rows, columns), a.shape[-2:], layer.stride, padding, layer.dilation, layer.kernel_size, strict=True
            )
        ]
        back = F.conv_transpose2d(
            a.flatten(0, 1), weight, None, layer.stride, padding, rest, layer.groups, layer.dilation
        )
        return back.reshape(*a.shape[:2], *back.shape[1:])

    def size(weight: Tensor, bias: Tensor | None, box: Box) -> Tensor:
        x = largest(box)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight.abs(), None if bias is None else bias.abs())
        found = F.conv2d(x, weight.abs(), None, layer.stride, padding_of(layer), layer.dilation, layer.groups)
        return found if bias is None else found + _channels(bias.abs(), found, 1)

    def run(mode: Mode, a: Tensor, box: Box, out: Box) -> Rows:
        def wide(v: Any) -> Any:
            return v.double() if mode.sound and v is not None else v

        weight: Any = None if layer is None else wide(layer.weight)
        bias = None if layer is None else wide(layer.bias)
        terms = None
        if mode.sound:
            terms = largest(box) if layer is None else size(weight, bias, box)
        if norm is not None:
            assert out.statistics is not None
            mean, variance = (wide(v) for v in out.statistics)
            s, t = (v.to(a.dtype) for v in scale_of(norm, mean, variance))
            if terms is not None:
                terms = (terms + _channels(mean.abs(), terms, 1)) * _channels(s.abs(), terms, 1)
                terms = terms if norm.bias is None else terms + _channels(wide(norm.bias).abs(), terms, 1)
            bias = t if bias is None else bias * s + t
        constant = None if bias is None else dot(a, _channels(bias, a[0], 1).expand(1, *a.shape[2:]))
        a = a if norm is None else a * _channels(s, a, 2)
        return Rows(a if layer is None else product(weight, a, box), constant, terms)

    return run


def relaxation(lower: Tensor, upper: Tensor, sound: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``low x <= relu(x) <= slope x + intercept`` on the box; low is 1 or 0, whichever leaves the smaller area."""
    left, right = lower.clamp_max(0), upper.clamp_min(0)
    top = torch.maximum(right, left + 1e-8)
    slope = top / (top - left)
    low = (slope > 0.5).to(slope.dtype)
    if not sound:
        return low, slope, -left * slope
    # any slope in [0, 1] will do, if the line is above relu at both ends of the box
    slope = slope.clamp(0, 1)
    intercept = torch.maximum(-left * slope, right * (1 - slope)) * (1 + 2.0**-50)
    unstable = (left < 0) & (right > 0)
    return low, slope, torch.where(unstable, intercept + torch.finfo(slope.dtype).tiny, intercept)


def relu_backward(mode: Mode, a: Tensor, box: Box, out: Box) -> Rows:
    """The line above where the row is positive, the one below where it is negative."""
    low, slope, intercept = relaxation(*ends(mode, box), mode.sound)
    up = a.clamp_min(0)
    found = torch.addcmul(a * low.unsqueeze(1), up, (slope - low).unsqueeze(1))
    return Rows(found, dot(up, intercept), largest(box) + intercept if mode.sound else None)


def reshape_backward(mode: Mode, a: Tensor, box: Box, out: Box) -> Rows:
    """Flatten, view, Identity: the same numbers in the input's shape."""
    return Rows(a.reshape(*a.shape[:2], *box.lower.shape[1:]))


def add_backward(mode: Mode, a: Tensor, box: Box, out: Box) -> Rows:
    """One summand; summed where it was broadcast."""
    if box.lower.shape == out.lower.shape:
        return Rows(a)
    size = largest(box).expand(out.lower.shape) if mode.sound else None
    return Rows(a.sum_to_size(*a.shape[:2], *box.lower.shape[1:]), None, size)


def average_backward(function: Callable[[Tensor], Tensor]) -> Backward:
    """A linear map without parameters: its adjoint, by automatic differentiation."""

    def run(mode: Mode, a: Tensor, box: Box, out: Box) -> Rows:
        flat = a.flatten(0, 1)
        pull: Any = torch.func.vjp(function, flat.new_zeros((len(flat), *box.lower.shape[1:])))[1]
        back: Tensor = pull(flat)[0]
        return Rows(back.reshape(*a.shape[:2], *back.shape[1:]), None, function(largest(box)) if mode.sound else None)

    return run


def maxpool_backward(pool: nn.MaxPool2d) -> Backward:
    """Below: the input of largest lower bound. Above: the same where it beats all others, or the largest bound."""
    options = pool.kernel_size, pool.stride, pool.padding, pool.dilation

    def run(mode: Mode, a: Tensor, box: Box, out: Box) -> Rows:
        if pool.ceil_mode:
            refuse("MaxPool2d with ceil_mode, by method crown-ibp")
        lower, upper = ends(mode, box)
        lowest, index = F.max_pool2d(lower, *options, return_indices=True)
        highest = F.max_pool2d(upper, *options)
        down, right = (pool.padding,) * 2 if isinstance(pool.padding, int) else pool.padding
        padded = F.pad(upper, (right, right, down, down), value=-torch.inf)
        windows = F.unfold(padded, pool.kernel_size, pool.dilation, 0, pool.stride).unflatten(1, (lower.shape[1], -1))
        rivals = (windows > lowest.flatten(2).unsqueeze(2)).sum(2).reshape(lowest.shape)
        own = upper.flatten(2).gather(2, index.flatten(2)).reshape(lowest.shape)
        alone = rivals == (own > lowest).to(rivals.dtype)
        up = a.clamp_min(0) * (~alone).unsqueeze(1)
        target = a.new_zeros(*a.shape[:2], *lower.shape[1:]).expand(len(up), -1, -1, -1, -1).flatten(3)
        places = index.flatten(2).unsqueeze(1).expand(-1, a.shape[1], -1, -1)
        back = target.scatter_add(3, places, (a - up).flatten(3)).reshape(*up.shape[:2], *lower.shape[1:])
        terms = F.max_pool2d(largest(box), *options) if mode.sound else None
        return Rows(back, dot(up, highest), terms)

    return run


def module_backward(module: nn.Module) -> Backward:
    """Of one module that stands alone; `interval_layers.layer_of` has refused what is not supported."""
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return affine_backward(None, module)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return affine_backward(module, None)
    if isinstance(module, nn.ReLU):
        return relu_backward
    if isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
        return average_backward(module)
    if isinstance(module, nn.MaxPool2d):
        return maxpool_backward(module)
    return reshape_backward


class Upper:
    """The bound as it is gathered on the way back."""

    def __init__(self, mode: Mode, steps: int, rows: Tensor) -> None:
        self.mode, self.steps = mode, steps
        self.constant = self.slack = rows.new_zeros(1, 1)

    def rounds(self, a: Tensor, size: Tensor | None, box: Box) -> None:
        """Products of the rows ``a`` with terms of that size have been rounded; the inputs lie in ``box``."""
        if size is not None:
            gamma = (size.shape[1:].numel() + 2 * self.steps + 64) * 2.0**-52
            tiny = largest(box).flatten(1).sum(1, keepdim=True) * 2.0**-1000  # what was too small for float64
            self.slack = self.slack + gamma * dot(a.abs(), size) + tiny

    def total(self, dtype: torch.dtype) -> Tensor:
        """``[B, M]``; with sound rounding moved up, and infinite where anything overflowed or was NaN."""
        if not self.mode.sound:
            return self.constant
        found = self.constant + 1.01 * self.slack + 2.0**-990
        return outward(torch.where(found < torch.inf, found, torch.inf), dtype, False)


def upper_bounds(mode: Mode, steps: list[Any], env: dict[str, Any], output: str, rows: Tensor) -> Tensor:
    """``[B, M]``: at least ``rows . output`` for every input of the box ``env[""]``; ``rows`` is float64 if sound."""
    upper, pending = Upper(mode, len(steps), rows), {output: rows}
    for step in reversed(steps):
        a = pending.pop(step.name, None)
        if a is None:
            continue
        for name in step.inputs:
            found = step.back(mode, a, env[name], env[step.name])
            upper.rounds(a, found.size, env[name])
            if found.constant is not None:
                upper.constant = upper.constant + found.constant
            together = found.a
            if name in pending:
                together = pending[name] + found.a
                upper.rounds(together, largest(env[name]) if mode.sound else None, env[name])
            pending[name] = together
    a, (low, high) = pending[""], ends(mode, env[""])
    if mode.sound:
        upper.constant = upper.constant + dot(a.clamp_min(0), high) + dot(a.clamp_max(0), low)
        upper.rounds(a, largest(env[""]), env[""])
    else:
        radius = (high - low) * 0.5
        upper.constant = upper.constant + dot(a, low + radius) + dot(a.abs(), radius)
    return upper.total(env[""].lower.dtype)
