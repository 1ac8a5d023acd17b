"""Linear maps of boxes and of balls: Linear and convolutions on the fused ops, transposed and 3-D ones in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.interval_bounds.affine import interval_affine
from ...ops.interval_bounds.conv import interval_conv2d
from ...ops.interval_bounds.linear import linear_rows
from ...reference.interval_bounds.boxes import outward
from .backward import linear_back
from .boxes import HALVES, Box, Call, Ends, finished, linear_map, point, rounded_twice, wide
from .norms import norm_clean, norm_ends, statistics_of
from .numbers import each, scale_of, sides_of
from .products import product_sum
from .registry import layer

Apply = Callable[[Call, Box, Tensor, Tensor | None, Any], Ends]


def _own_dtype(call: Call, box: Box, weight: Tensor, bias: Tensor | None) -> bool:
    same = weight.dtype == box.lower.dtype == call.dtype and (bias is None or bias.dtype == weight.dtype)
    return same and not call.lost.rough


def _options(call: Call, act: Any) -> dict[str, Any]:
    """Of the fused ops; what rounds to 16 bits once more takes its ReLU after that."""
    relu = act == "relu" and not call.lost.rough
    return {"relu": relu, "compute": call.mode.compute, "sound": call.sound, "spread": call.lost.size}


def _operands(call: Call, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors of several dtypes in float64; those of a deployed layer of 16 bits, which is exact, in float32."""
    kind = torch.float32 if call.mode.deployed and call.dtype in HALVES else torch.float64
    return tuple(t if t is None else t.to(kind) for t in tensors)


def _narrowed(call: Call, found: tuple[Tensor, ...], bias: Tensor | None, act: Any = None) -> Ends:
    """Ends of `_operands` in the result's dtype, outward."""
    if call.lost.rough:
        found = rounded_twice(call, (found[0], found[1]), bias)
        found = (found[0].relu(), found[1].relu()) if act else found
    return outward(found[0], call.dtype, True), outward(found[1], call.dtype, False)


def apply_linear(call: Call, box: Box, weight: Tensor, bias: Tensor | None, act: Any = None) -> Ends:
    """A box through ``x W^T + b`` by the fused op."""
    flat = weight if weight.ndim == 2 else weight.unsqueeze(0)
    lower, upper = box.lower, box.upper
    if not weight.shape[-1]:  # of no inputs, which the op does not take
        shift = (lower.new_zeros(()) if bias is None else bias).to(call.dtype).expand(call.shape)
        return (shift.relu(), shift.relu()) if act else (shift, shift)
    if not (same := _own_dtype(call, box, weight, bias)):
        lower, upper, flat, bias = _operands(call, lower, upper, flat, bias)
    if weight.ndim == 2:
        found = linear_rows(lower, upper, flat, bias, **_options(call, act))
    else:
        found = linear_rows(lower, upper, flat, None if bias is None else bias.reshape(-1), **_options(call, act))
        found = found[0].squeeze(-1), found[1].squeeze(-1)
    return found if same else _narrowed(call, found, bias, act)


def apply_conv(
    call: Call, box: Box, weight: Tensor, bias: Tensor | None, act: Any = None, *, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Ends:  # fmt: skip
    """A box through a convolution of one, two or three axes."""
    axes = weight.ndim - 2
    stride, dilation = each(stride, axes), each(dilation, axes)
    sides = sides_of(padding, weight.shape[2:], dilation)
    lower, upper = box.lower, box.upper
    if single := lower.ndim == axes + 1:
        lower, upper = lower.unsqueeze(0), upper.unsqueeze(0)
    if any(a != b for a, b in sides):
        both = [side for pair in reversed(sides) for side in pair]
        lower, upper, sides = F.pad(lower, both), F.pad(upper, both), [(0, 0)] * axes
    pads = [a for a, _ in sides]
    if axes == 3:

        def conv(x: Tensor, size: bool) -> Tensor:
            w = weight.to(x.dtype)
            return F.conv3d(x, w.abs() if size else w, None, stride, pads, dilation, groups)

        shift = None if bias is None else bias.reshape(-1, 1, 1, 1)
        low, high = linear_map(call, conv, Box(lower, upper), weight[0].numel(), shift)
        low, high = (low.relu(), high.relu()) if act else (low, high)
    else:
        same = _own_dtype(call, box, weight, bias)
        if not same:
            lower, upper, weight, bias = _operands(call, lower, upper, weight, bias)
        options = _options(call, act)
        if axes == 1:
            lower, upper, weight = lower.unsqueeze(2), upper.unsqueeze(2), weight.unsqueeze(2)
            stride, pads, dilation = [1, *stride], [0, *pads], [1, *dilation]
        low, high = interval_conv2d(
            lower,
            upper,
            weight,
            bias,
            stride=stride,
            padding=(pads[0], pads[1]),
            dilation=dilation,
            groups=groups,
            act="relu" if options.pop("relu") else None,
            rounding="sound" if options.pop("sound") else "fast",
            **options,
        )
        shift = None if bias is None else bias.reshape(-1, 1, 1)
        low, high = (low, high) if same else _narrowed(call, (low, high), shift, act)
        low, high = (low.squeeze(2), high.squeeze(2)) if axes == 1 else (low, high)
    return (low.squeeze(0), high.squeeze(0)) if single else (low, high)


Map = Callable[[Tensor, Tensor], Tensor]


def within_ball(call: Call, found: Ends, box: Box, weight: Tensor, bias: Tensor | None, function: Map) -> Ends:
    """``found`` of the box, cut to what the ball in it allows: its centre, and the dual norm of each row of weights.

    ``function(x, weight)`` is the map. The 1-ball of a convolution is bounded by the 2-ball around it.
    """
    ball = box.ball
    if ball is None or (weight.ndim > 2 and box.lower.ndim < weight.ndim):  # without a batch, axis 0 is channels
        return found
    weight, shape = wide(call, weight), box.lower.shape
    center, scale, slack = (t.expand(shape) for t in ball[1:])
    middle = function(center, weight)
    if ball.p == 1 and weight.ndim == 2:
        spread = torch.stack([(scale * row).amax(-1) for row in weight.abs()], -1)
    else:
        spread = function(scale.square(), weight.square()).clamp_min(0).sqrt()
    if bias is not None:
        shift = wide(call, bias)
        middle = middle + (shift if weight.ndim == 2 else shift.reshape(-1, *(1,) * (weight.ndim - 2)))
    radius = spread + function(slack, weight.abs())
    size = None
    if call.sound:  # |W| |x| and, for what a deployed layer rounds to 16 bits twice, the result and the bias
        size = function(center.abs() + scale + slack, weight.abs()) * 2 + middle.abs()
        call = call._replace(lost=call.lost._replace(size=call.lost.size + call.lost.rough))
    low, high = finished(call, middle - radius, middle + radius, size, weight[0].numel())
    return torch.maximum(found[0], low), torch.minimum(found[1], high)


class Affine:
    """Linear or Conv2d with a batch-norm and a ReLU: one op, the norm folded into the weight.

    Sound rounding certifies the model itself, not one with a folded (and rounded) weight, so there the norm is a step.
    """

    def __init__(self, norm: tuple[tuple[str, Any], ...] | None, relu: bool, node: Any) -> None:
        self.linear = node.target._schema.name == "aten::linear"
        self.norm, self.relu, self.target = norm, relu, node.target

    def run(self, call: Call, norm: dict[str, Any] | None, **given: Any) -> Box:
        """The bounds of the layer's result; ``given``: the operation's arguments by name, its input a box."""
        box, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias")
        clean = None
        if box.clean is not None:
            own = (t if t is None else t.to(box.clean.dtype) for t in (weight, bias))
            clean = self.target(box.clean, *own, *given.values())
        act: Any = "relu" if self.relu else None
        plain = box._replace(ball=None)

        def apply(w: Tensor, b: Tensor | None, a: Any) -> Ends:
            return apply_linear(call, plain, w, b, a) if self.linear else apply_conv(call, plain, w, b, a, **given)

        if norm is None or call.sound or box.ball is not None:
            alone = norm is None and box.ball is None
            lower, upper = apply(weight, bias, act if alone else None)
            if not alone:
                lower, upper = within_ball(call, (lower, upper), box, weight, bias, self._map(given))
            found = Box(lower, upper, clean)
            if norm is not None:
                found = norm_ends(call, found, **norm)
            if self.relu and not alone:
                found = found._replace(lower=found.lower.relu(), upper=found.upper.relu())
            clean = found.clean
            return found._replace(clean=F.relu(clean) if self.relu and clean is not None else clean)
        statistics = statistics_of(norm, clean)
        s, t = scale_of(norm, *statistics)
        s, t = s.to(weight.dtype), t.to(weight.dtype)
        clean = norm_clean(norm, clean)
        if self.linear and weight.numel() > len(box.lower) * len(weight):
            # a scaled copy of a large weight costs more than a pass over a few outputs
            lower, upper = interval_affine(*apply(weight, bias, None), s, t, act=act)
        else:
            bias = t if bias is None else bias * s + t
            lower, upper = apply(weight * s.reshape(-1, *(1,) * (weight.ndim - 1)), bias, act)
        return Box(lower, upper, F.relu(clean) if self.relu and clean is not None else clean, statistics)

    def _map(self, given: dict[str, Any]) -> Map:
        return F.linear if self.linear else lambda x, w: self.target(x, w, None, *given.values())


@layer("linear", shows="Linear", back=linear_back("input"))
def _linear(call: Call, *, input: Any, weight: Any, bias: Any) -> Ends:
    """With bounds of the weight or the bias too: x by interval weights."""
    box, w = (v if isinstance(v, Box) else point(v) for v in (input, weight))
    low, high = product_sum(call, box, Box(w.lower.t(), w.upper.t()))
    if bias is None:
        return low, high
    b = bias if isinstance(bias, Box) else point(bias)
    parts = [wide(call, t) for t in (low, high, b.lower, b.upper)]
    size = torch.stack(torch.broadcast_tensors(*(t.abs() for t in parts))).sum(0) if call.sound else None
    return finished(call, parts[0] + parts[2], parts[1] + parts[3], size)


@layer("conv1d", "conv2d", "conv3d", shows="Conv1d, Conv2d, Conv3d", back=linear_back("input"))
def _conv(call: Call, *, input: Any, weight: Any, bias: Any, **options: Any) -> Ends:
    plain = input._replace(ball=None)
    return apply_conv(call, plain, weight, bias, None, **options)


@layer("conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
       shows="ConvTranspose1d, ConvTranspose2d, ConvTranspose3d", back=linear_back("input"))  # fmt: skip
def _conv_transpose(call: Call, *, input: Box, weight: Tensor, bias: Tensor | None, **options: Any) -> Ends:
    def function(x: Tensor, size: bool) -> Tensor:
        w = weight.to(x.dtype)
        found: Tensor = call.op(x, w.abs() if size else w, None, **options)
        return found

    shift = None if bias is None else bias.reshape(-1, *(1,) * (weight.ndim - 2))
    return linear_map(call, function, input, weight.shape[0] * weight[0, 0].numel(), shift)
