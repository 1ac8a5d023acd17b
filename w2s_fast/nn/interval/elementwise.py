"""Activations: functions of each entry, monotone or with one lowest point, and their linear bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backward import relaxed_back, relu_back, smooth_back
from .boxes import Box, Call, Ends, ends, finished, increasing, refuse, wide
from .products import hull
from .registry import layer


@layer("relu", shows="ReLU", kind="elementwise", back=relu_back)
def _relu(call: Call, *, self: Box) -> Ends:
    return F.relu(self.lower), F.relu(self.upper)


def _piecewise(call: Call, function: Callable[[Tensor], Tensor], box: Box, corners: tuple[float, ...]) -> Ends:
    """A function that is monotone between corners: the hull of its values at both ends and at the corners inside.

    PyTorch evaluates it to a few units of its value.
    """
    low, high = ends(call, box)
    lower, upper = hull(function(low), function(high))
    for corner in corners:
        value = function(torch.full_like(low, corner))
        inside = (low <= corner) & (high >= corner)
        lower = torch.where(inside, torch.minimum(lower, value), lower)
        upper = torch.where(inside, torch.maximum(upper, value), upper)
    nothing = low.isnan() | high.isnan()
    return (
        finished(call, torch.where(nothing, -torch.inf, lower), torch.where(nothing, torch.inf, upper))
        if call.sound
        else (lower, upper)
    )


def _kinks(call: Call, given: dict[str, Any]) -> tuple[float, ...]:
    """Where a piecewise linear function bends."""
    name = call.op._schema.name.split("::")[1]
    if name in ("hardtanh", "clamp"):
        low, high = given.get("min_val", given.get("min")), given.get("max_val", given.get("max"))
        return tuple(float(v) for v in (low, high) if v is not None)
    if name in ("clamp_min", "clamp_max"):
        return (float(given["min" if name == "clamp_min" else "max"]),)
    return {"relu6": (0.0, 6.0), "hardsigmoid": (-3.0, 3.0), "leaky_relu": (0.0,), "abs": (0.0,)}[name]


@layer(
    "relu6",
    "hardtanh",
    "leaky_relu",
    "abs",
    "hardsigmoid",
    "clamp",
    "clamp_min",
    "clamp_max",
    shows="ReLU6, LeakyReLU, Hardtanh, Hardsigmoid, abs, clamp",
    kind="elementwise",
    back=relaxed_back(_kinks),
)
def _bent(call: Call, *, self: Box, **given: Any) -> Ends:
    if any(isinstance(v, (Box, Tensor)) for v in given.values()):
        return _clamp_by_tensors(call, self, **given)
    options = [given[a.name] for a in call.op._schema.arguments[1:]]
    return _piecewise(call, lambda t: call.op(t, *options), self, _kinks(call, given))


def _clamp_by_tensors(call: Call, box: Box, min: Any = None, max: Any = None) -> Ends:
    if isinstance(min, Box) or isinstance(max, Box) or not isinstance(box, Box):
        refuse(f"{call.where} with limits that have bounds")
    low, high = ends(call, box)
    limits = [wide(call, v) for v in (min, max)]
    return finished(call, torch.clamp(low, *limits), torch.clamp(high, *limits))


@layer("prelu", "_prelu_kernel", "rrelu", shows="PReLU", kind="elementwise", back=None)
def _prelu(
    call: Call,
    *,
    self: Box,
    weight: Any = None,
    lower: float = 0.0,
    upper: float = 0.0,
    training: bool = False,
    generator: Any = None,
) -> Ends:
    if isinstance(weight, Box) or training:
        refuse(f"{call.where} with a slope that has bounds")
    low, high = ends(call, self)
    slope = (lower + upper) / 2 if weight is None else wide(call, weight)
    if isinstance(slope, Tensor) and slope.numel() > 1 and slope.ndim == 1:
        slope = slope.reshape(-1, *(1,) * (low.ndim - 2))
    values = [torch.where(t >= 0, t, t * slope) for t in (low, high)]
    found = hull(*values)
    inside = (low < 0) & (high > 0)
    return finished(
        call, torch.where(inside, found[0].clamp_max(0), found[0]), torch.where(inside, found[1].clamp_min(0), found[1])
    )


@layer(
    "threshold",
    "hardshrink",
    "softshrink",
    "sign",
    "floor",
    "ceil",
    "round",
    shows="Threshold, Softshrink",
    kind="elementwise",
)
def _steps(call: Call, *, self: Box, **given: Any) -> Ends:
    name = call.op._schema.name.split("::")[1]
    if name == "threshold":
        edge, value = float(given["threshold"]), float(given["value"])
        low, high = ends(call, self)
        below, above = low <= edge, high > edge
        lower = torch.where(below, torch.where(above, low.clamp_min(edge).clamp_max(value), value), low)
        upper = torch.where(above, torch.where(below, high.clamp_min(value), high), value)
        return finished(call, torch.minimum(lower, torch.where(above & below, edge, torch.inf)), upper)
    arguments = call.op._schema.arguments[1:]
    options = [given[a.name] for a in arguments if not a.kwarg_only]
    named = {a.name: given[a.name] for a in arguments if a.kwarg_only}
    return finished(call, *(call.op(t, *options, **named) for t in ends(call, self)))


@layer("exp", "expm1", "atan", "erf", "sinh", "asinh", shows="exp, atan, erf", kind="elementwise")
def _growing(call: Call, *, self: Box) -> Ends:
    return increasing(call, call.op, self)


@layer("log", "log1p", shows="log", kind="elementwise")
def _log(call: Call, *, self: Box) -> Ends:
    low, high = ends(call, self)
    edge = 0.0 if call.op._schema.name.endswith("log") else -1.0
    known = low > edge
    lower, upper = (call.op(torch.where(known, t, 1.0)) for t in (low, high))
    return finished(call, torch.where(known, lower, -torch.inf), torch.where(known, upper, torch.inf))


@layer("sin", "cos", shows="sin, cos", kind="elementwise")
def _wave(call: Call, *, self: Box) -> Ends:
    low, high = ends(call, self)
    shift = 0.25 if call.op._schema.name.endswith("sin") else 0.0  # of a turn, to the highest point
    one, two = hull(call.op(low), call.op(high))
    turns = [(t / (2 * math.pi)) for t in (low, high)]
    lost = 1e-9 + (low.abs() + high.abs()) * 1e-15

    def passes(at: float) -> Tensor:
        return torch.floor(turns[1] - at + lost) >= torch.ceil(turns[0] - at - lost)

    lower, upper = torch.where(passes(shift + 0.5), -1.0, one), torch.where(passes(shift), 1.0, two)
    size = torch.ones_like(low) if call.sound else None
    found = finished(call, lower, upper, size)
    known = low.abs().maximum(high.abs()) < 1e6
    return torch.where(known, found[0], -1.0), torch.where(known, found[1], 1.0)


#: Where functions that fall before and rise after are lowest, as a bracket, from a bisection of their derivative.
_LOWEST = {
    "gelu": (-0.7517915246935645, -0.16997120747990369),
    "gelu_tanh": (-0.7524614220710162, -0.17004075057125412),
    "silu": (-1.2784645427610738, -0.27846454276107380),
    "mish": (-1.1924312014153030, -0.30884350211155590),
    "hardswish": (-1.5, -0.375),
}


def _valley(call: Call, function: Callable[[Tensor], Tensor], box: Box, key: str) -> Ends:
    """A function with one lowest point, falling before it and rising after; sizes are those of x: 1 + erf cancels."""
    low, high = ends(call, box)
    at, value = _LOWEST[key]
    near = 1e-6 * abs(at)
    lower, upper = hull(function(low), function(high))
    # far below, x times something that underflows; at -inf that is no number
    values = [
        torch.where(t == -torch.inf, 0.0, torch.where(t == torch.inf, torch.inf, v))
        for t, v in ((low, function(low)), (high, function(high)))
    ]
    lower, upper = hull(*values)
    inside = (low <= at + near) & (high >= at - near)
    lower = torch.where(inside, value, lower)
    if not call.sound:
        return lower, upper
    lower = torch.where(inside, value - 1e-12, lower)
    size = low.abs().clamp_max(40.0) + lower.abs(), high.abs().clamp_max(40.0) + low.abs().clamp_max(40.0) + upper.abs()
    first, second = finished(call, lower, upper, size[0] + size[1])
    nothing = low.isnan() | high.isnan()
    return torch.where(nothing, -torch.inf, first), torch.where(nothing, torch.inf, second)


@layer("gelu", shows="GELU", kind="elementwise", back=smooth_back)
def _gelu(call: Call, *, self: Box, approximate: str = "none") -> Ends:
    key = "gelu" if approximate == "none" else "gelu_tanh"
    return _valley(call, lambda t: F.gelu(t, approximate=approximate), self, key)


@layer("silu", shows="SiLU", kind="elementwise", back=smooth_back)
def _silu(call: Call, *, self: Box) -> Ends:
    return _valley(call, F.silu, self, "silu")


@layer("mish", "hardswish", shows="Mish, Hardswish", kind="elementwise")
def _mish(call: Call, *, self: Box) -> Ends:
    return _valley(call, call.op, self, call.op._schema.name.split("::")[1])


@layer("sigmoid", "tanh", shows="Sigmoid, Tanh", kind="elementwise", back=smooth_back)
def _sigmoid(call: Call, *, self: Box) -> Ends:
    low, high = increasing(call, call.op, self)
    return low.clamp_min(0.0 if call.op._schema.name.endswith("sigmoid") else -1.0), high.clamp_max(1.0)


@layer("elu", "celu", "selu", shows="ELU, CELU, SELU", kind="elementwise")
def _elu(call: Call, *, self: Box, **given: Any) -> Ends:
    options = [given[a.name] for a in call.op._schema.arguments[1:]]
    if any(isinstance(v, (int, float)) and v < 0 for v in options):
        refuse(f"{call.where} with a negative parameter")
    low, high = ends(call, self)
    # exp(x) - 1 cancels where PyTorch forms it so: sizes are those of the exponential
    size = _magnitude(call, low, high, max([1.7581, *(abs(float(v)) for v in options)]))
    return finished(call, call.op(low, *options), call.op(high, *options), size)


def _magnitude(call: Call, low: Tensor, high: Tensor, factor: float) -> Tensor | None:
    return (low.abs() + high.abs()).clamp_max(1e300) * factor + factor if call.sound else None


@layer("softplus", shows="Softplus", kind="elementwise", back=smooth_back)
def _softplus(call: Call, *, self: Box, beta: Any = 1, threshold: Any = 20) -> Ends:
    if beta <= 0:
        refuse(f"{call.where} with a negative beta")
    low, high = (call.op(t, beta, threshold) for t in ends(call, self))
    jump = math.log1p(math.exp(-float(threshold))) / float(beta) * 1.001  # down, where PyTorch takes x itself
    if not call.sound:
        across = (self.lower * beta <= threshold) & (self.upper * beta > threshold)
        return torch.where(across, low - jump, low), torch.where(across, high + jump, high)
    return finished(call, (low - jump).clamp_min(0), high + jump)


@layer("log_sigmoid", "log_sigmoid_forward", "softsign", shows="LogSigmoid, Softsign", kind="elementwise")
def _rising(call: Call, *, self: Box) -> Ends:
    function = F.softsign if call.op._schema.name.endswith("softsign") else F.logsigmoid
    return increasing(call, function, self)


@layer("neg", "negative", shows="negation", kind="elementwise", back=None)
def _neg(call: Call, *, self: Box) -> Ends:
    return -self.upper, -self.lower


@layer("gt", "ge", "lt", "le", shows="comparisons (in where)", kind="elementwise")
def _compare(call: Call, *, self: Any, other: Any) -> Ends:
    """Certainly true, and possibly true."""
    low, high = ends(call, self) if isinstance(self, Box) else (wide(call, self),) * 2
    a, b = ends(call, other) if isinstance(other, Box) else (wide(call, other),) * 2
    if call.op._schema.name.split("::")[1] in ("gt", "ge"):
        return call.op(low, b), call.op(high, a)
    return call.op(high, a), call.op(low, b)


@layer("where", shows="where", kind="elementwise")
def _where(call: Call, *, condition: Any, self: Any, other: Any) -> Ends:
    sure, possible = (condition.lower, condition.upper) if isinstance(condition, Box) else (condition, condition)
    one, two = (
        (v.lower.to(call.dtype), v.upper.to(call.dtype))
        if isinstance(v, Box)
        else finished(
            call, *(wide(call, v) if isinstance(v, Tensor) else torch.tensor(float(v), dtype=torch.float64),) * 2
        )
        for v in (self, other)
    )
    low = torch.where(sure, one[0], torch.where(possible, torch.minimum(one[0], two[0]), two[0]))
    return low, torch.where(sure, one[1], torch.where(possible, torch.maximum(one[1], two[1]), two[1]))


@layer("fill", shows="filling", kind="elementwise")
def _fill(call: Call, *, self: Any, value: Any) -> Ends:
    if isinstance(value, Box):
        sides = ends(call, value)
    else:
        number = wide(call, value) if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        sides = number, number
    own = self.lower if isinstance(self, Box) else self
    return tuple(t.to(own.device).expand(call.shape) for t in finished(call, *sides))  # type: ignore[return-value]


@layer("glu", shows="GLU", kind="other")
def _glu(call: Call, *, self: Box, dim: int = -1) -> Ends:
    (al, bl), (au, bu) = (t.chunk(2, dim) for t in ends(call, self))
    low, high = torch.sigmoid(bl), torch.sigmoid(bu)
    return finished(call, *hull(al * low, al * high, au * low, au * high))
