"""CROWN: linear upper bounds of outputs, taken backward through the operations over boxes that are known.

Rows ``a [M, *shape]`` of an operation's output become rows of its inputs: ``a . f(x) <= a' . x + constant`` for every x
in the operation's box; an operation without linear bounds ends them at its own box. With sound rounding all of it is
float64, and each operation adds to the bound what rounding can have done to it: at most gamma_n |a| . size, where size
bounds the terms of f over the box. This is so because the value of a row changed by e at x is changed by e . x, and
because bounds of every x are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.interval_bounds.relu_rows import relu_rows
from ...reference.interval_bounds.relu_rows import lines
from . import deployed, passes
from .boxes import Box, Call, Lost, ends, largest, wide
from .numbers import each, scale_of, sides_of
from .registry import UNCHANGED
from .samples import Samples
from .trace import Ref, references

if TYPE_CHECKING:
    from .program import Env, Step

#: Entries that the rows of one pass backward may have, at the largest operation.
ROWS = 1 << 25


class Rows(NamedTuple):
    """Rows of the inputs by name; pairs (rows, vector) that make the constant; size of the terms, None if exact.

    total: a constant ``[M, B]`` that has been summed already.
    """

    a: dict[str, Tensor]
    constants: tuple[tuple[Tensor, Tensor], ...] = ()
    size: Tensor | None = None
    total: Tensor | None = None


class Way(NamedTuple):
    """What a way back is told: the call, the step, its arguments by name, its box, whether samples are in front."""

    call: Call
    step: Step
    given: dict[str, Any]
    env: Env
    out: Box
    ordered: bool = False

    @property
    def fused(self) -> bool:
        """Whether `passes` do it: sound bounds need every term's size."""
        return self.ordered and not self.sound

    @property
    def sound(self) -> bool:
        """Whether rounding is outward."""
        return self.call.sound

    def box(self, name: str) -> Box:
        """The box of a value by its name in the trace."""
        found: Box = self.env.values[name]
        return found

    @property
    def only(self) -> tuple[str, Box]:
        """The one box that goes in."""
        name = self.step.boxes[0]
        return name, self.box(name)


Back = Callable[[Way, Tensor], Rows]


def _end(way: Way, value: Any, size: bool, one: str = "", given: Tensor | None = None) -> Any:
    """An argument for the linear function: zeros for boxes but ``one``; absolute constants for ``size``."""
    if isinstance(value, Ref):
        found = way.env.values.get(value.name)
        if isinstance(found, Box):
            return given if value.name == one else torch.zeros_like(wide(way.call, found.lower))
        found = wide(way.call, way.env.state(value.name))
        return found.abs() if size and isinstance(found, Tensor) and found.is_floating_point() else found
    if isinstance(value, (list, tuple)):
        return [_end(way, v, size, one, given) for v in value]
    return value


def _evaluate(way: Way, size: bool = False, one: str = "", given: Tensor | None = None) -> Tensor:
    node = way.step.node
    args = [_end(way, v, size, one, given) for v in node.args]
    options = {k: _end(way, v, size, one, given) for k, v in node.kwargs}
    name = node.target._schema.name.split("::")[1]
    if name in ("view", "_unsafe_view"):
        found: Tensor = args[0].reshape(args[1])
    elif name == "copy":
        found = torch.zeros_like(args[0]) + args[1]
    elif name in UNCHANGED:
        found = args[0]
    else:
        if options.get("dtype") is not None and way.sound:
            options["dtype"] = torch.float64
        found = node.target(*args, **options)
    return found


def linear_back(argument: str = "", *, one: bool = False) -> Back:
    """Any operation that is affine in its boxes: its adjoint, by automatic differentiation.

    Args:
        argument: the only one that may have bounds; with others (a weight) the bounds end here.
        one: affine in one box at a time only; with two the bounds end here.
    """

    def run(way: Way, a: Tensor) -> Rows:
        if way.step.affine is not None:
            return affine_back(way, a)
        names = way.step.boxes
        elsewhere = argument and any(isinstance(v, Box) for k, v in way.given.items() if k != argument)
        if elsewhere or (one and (len(names) > 1 or _twice(way))):
            return ended(way, a)
        rows: dict[str, Tensor] = {}
        zero = _evaluate(way)
        size = zero.abs()
        blank = _evaluate(way, size=True) if way.sound else zero
        for name in names:
            box = way.box(name)

            def function(t: Tensor, name: str = name) -> Tensor:
                return _evaluate(way, one=name, given=t)

            start = torch.zeros_like(wide(way.call, box.lower))
            pull: Any = torch.func.vjp(function, start)[1]
            rows[name] = torch.vmap(lambda r, pull=pull: pull(r)[0])(a)
            if way.sound:
                size = size + (_evaluate(way, size=True, one=name, given=largest(box)) - blank).abs()
        return Rows(rows, ((a, zero),), size if way.sound else None)

    run.straight = not one and not argument  # type: ignore[attr-defined]
    return run


def _twice(way: Way) -> bool:
    """Whether the one box is there more than once, as in x * x."""
    node = way.step.node
    return sum(r.name == way.step.boxes[0] for r in references((node.args, node.kwargs))) > 1


def ended(way: Way, a: Tensor) -> Rows:
    """The bounds end at the operation's own box."""
    low, high = ends(way.call, way.out)
    return Rows({}, ((a.clamp_min(0), high), (a.clamp_max(0), low)), largest(way.out) if way.sound else None)


def _channels(v: Tensor, ndim: int) -> Tensor:
    """``[C]`` that broadcasts to ``[B, C, ...]``."""
    return v.reshape((1, -1) + (1,) * (ndim - 2))


def affine_back(way: Way, a: Tensor) -> Rows:
    """Linear or Conv2d, then a batch-norm or nothing."""
    step, call = way.step, way.call
    assert step.affine is not None
    if way.fused and (found := _affine_passes(way, a)) is not None:
        return found
    name, box = way.only
    given = {k: wide(call, way.env.filled(v)) for k, v in step.bound.items() if k in ("weight", "bias")}
    weight, bias, x = given["weight"], given["bias"], largest(box) if way.sound else None
    linear = step.affine.linear
    shift = None if bias is None else (bias if linear else bias.reshape(-1, *(1,) * (weight.ndim - 2)))
    terms = None
    if x is not None:
        if linear:
            terms = F.linear(x, weight.abs(), None if shift is None else shift.abs())
        else:
            terms = step.affine.target(x, weight.abs(), None, *[step.bound[k] for k in list(step.bound)[3:]])
            terms = terms if shift is None else terms + shift.abs()
    vector = None if shift is None else shift.expand(way.out.lower.shape)
    if step.affine.norm is not None:
        assert way.out.statistics is not None
        norm = {k: wide(call, v) for k, v in way.env.filled(dict(step.affine.norm)).items()}
        mean, variance = (wide(call, v) for v in way.out.statistics)
        s, t = (_channels(v.to(a.dtype), a.ndim - 1) for v in scale_of(norm, mean, variance))
        if terms is not None:
            terms = (terms + _channels(mean.abs(), a.ndim - 1)) * s.abs()
            terms = terms if norm["bias"] is None else terms + _channels(norm["bias"].abs(), a.ndim - 1)
        vector = t.expand(way.out.lower.shape) if vector is None else vector * s + t
        constants: tuple[tuple[Tensor, Tensor], ...] = ((a, vector),)
        a = a * s
    else:
        constants = () if vector is None else ((a, vector),)
    if linear:
        return Rows({name: a @ weight}, constants, terms)
    sides, stride, rest, *options = _geometry(way, weight, a)
    (up, down), (left, right) = sides
    size = box.lower.shape[-2:]
    flat = a.flatten(0, 1) if box.lower.ndim == 4 else a
    if up == down and left == right:
        back = F.conv_transpose2d(flat, weight, None, stride, [up, left], rest, *options)
    else:
        back = F.pad(F.conv_transpose2d(flat, weight, None, stride, 0, 0, *options), [0, rest[1], 0, rest[0]])
        back = back[..., up : up + size[0], left : left + size[1]]
    return Rows({name: back.reshape(a.shape[0], *box.lower.shape)}, constants, terms)


def _geometry(way: Way, weight: Tensor, a: Tensor) -> tuple[Any, ...]:
    """Of a convolution's adjoint: padding, stride, what of the input no window reaches, groups, dilation."""
    bound, kernel, size = way.step.bound, weight.shape[2:], way.only[1].lower.shape[-2:]
    stride, dilation = each(bound["stride"], 2), each(bound["dilation"], 2)
    sides = sides_of(bound["padding"], kernel, dilation)
    rest = [
        n + p + q - ((out - 1) * s + d * (k - 1) + 1)
        for n, (p, q), out, s, d, k in zip(size, sides, a.shape[-2:], stride, dilation, kernel, strict=True)
    ]
    return sides, stride, rest, bound["groups"], dilation


def _affine_passes(way: Way, a: Tensor) -> Rows | None:
    """By `passes`, a batch-norm folded into the weight, which is smaller than the rows; None where they do not fit."""
    affine, (name, _) = way.step.affine, way.only
    assert affine is not None
    weight, bias = (way.env.filled(way.step.bound[k]) for k in ("weight", "bias"))
    if a.ndim != weight.ndim + 1 or (bias is None and affine.norm is None):
        return None
    if affine.norm is not None:
        assert way.out.statistics is not None
        s, t = (v.to(a.dtype) for v in scale_of(way.env.filled(dict(affine.norm)), *way.out.statistics))
        weight = weight * s.reshape(-1, *(1,) * (weight.ndim - 1))
        bias = t if bias is None else bias * s + t
    if affine.linear:
        rows, total = passes.linear(a, weight, bias)
    else:
        sides, stride, rest, *options = _geometry(way, weight, a)
        if any(first != last for first, last in sides):
            return None
        rows, total = passes.conv(a, weight, bias, stride, [first for first, _ in sides], rest, *options)
    return Rows({name: rows}, total=total)


def norm_back(way: Way, a: Tensor) -> Rows:
    """Batch-norm by itself."""
    name, box = way.only
    assert way.out.statistics is not None
    norm = {k: wide(way.call, v) for k, v in way.given.items()}
    mean, variance = (wide(way.call, v) for v in way.out.statistics)
    s, t = (_channels(v.to(a.dtype), a.ndim - 1) for v in scale_of(norm, mean, variance))
    terms = None
    if way.sound:
        terms = (largest(box) + _channels(mean.abs(), a.ndim - 1)) * s.abs()
        terms = terms if norm["bias"] is None else terms + _channels(norm["bias"].abs(), a.ndim - 1)
    return Rows({name: a * s}, ((a, t.expand(box.lower.shape)),), terms)


norm_back.straight = True  # type: ignore[attr-defined]


def relaxation(lower: Tensor, upper: Tensor, sound: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``low x <= relu(x) <= slope x + intercept`` on the box; low is 1 or 0, whichever leaves the smaller area."""
    low, slope, intercept, left, _ = lines(lower, upper)
    if not sound:
        return low, slope, intercept
    # any slope in [0, 1] will do, if the line is above relu at both ends of the box
    slope, right = slope.clamp(0, 1), upper.clamp_min(0)
    intercept = torch.maximum(-left * slope, right * (1 - slope)) * (1 + 2.0**-50)
    unstable = (left < 0) & (right > 0)
    return low, slope, torch.where(unstable, intercept + torch.finfo(slope.dtype).tiny, intercept)


def relu_back(way: Way, a: Tensor) -> Rows:
    """The line above where the row is positive, the one below where it is negative."""
    name, box = way.only
    if way.fused and a.dtype == box.lower.dtype == box.upper.dtype and box.lower.ndim:
        rows, total = relu_rows(a, box.lower, box.upper)
        return Rows({name: rows}, total=total.to(a.dtype))
    low, slope, intercept = relaxation(*ends(way.call, box), way.sound)
    up = a.clamp_min(0)
    return Rows({name: torch.addcmul(a * low, up, slope - low)}, ((up, intercept),),
                largest(box) + intercept if way.sound else None)  # fmt: skip


class Lines(NamedTuple):
    """``low x + below <= f(x) <= slope x + above`` on a box."""

    low: Tensor
    below: Tensor
    slope: Tensor
    above: Tensor


def by_lines(way: Way, a: Tensor, lines: Lines) -> Rows:
    """Rows by lines; where a line is not finite, or knows less than the box, the ends of the box are taken."""
    name, box = way.only
    (low, high), (first, second) = ends(way.call, way.out), ends(way.call, box)
    fine = (
        (first.abs() < torch.inf)
        & (second.abs() < torch.inf)
        & torch.isfinite(lines.low + lines.below + lines.slope + lines.above)
    )
    zero = torch.zeros_like(lines.low)
    slopes = [torch.where(fine, v, zero) for v in (lines.low, lines.slope)]
    shifts = [torch.where(fine, v, end) for v, end in ((lines.below, low), (lines.above, high))]
    up, down = a.clamp_min(0), a.clamp_max(0)
    size = None
    if way.sound:
        size = torch.where(fine, largest(box), 0.0) * torch.maximum(slopes[0].abs(), slopes[1].abs())
        size = size + torch.maximum(shifts[0].abs(), shifts[1].abs())
    return Rows({name: up * slopes[1] + down * slopes[0]}, ((up, shifts[1]), (down, shifts[0])), size)


def _secant(low: Tensor, high: Tensor, first: Tensor, second: Tensor) -> Tensor:
    width = high - low
    fine = width > 0
    return torch.where(fine, (second - first) / torch.where(fine, width, 1.0), 0.0)


def _widened(way: Way, lines: Lines, size: Tensor) -> Lines:
    if not way.sound:
        return lines
    slack = size * 2.0**-44 + 1e-300
    return lines._replace(below=lines.below - slack, above=lines.above + slack)


def relaxed_back(kinks: Callable[[Call, dict[str, Any]], tuple[float, ...]]) -> Back:
    """Piecewise linear functions: f - slope x is largest at an end or a bend."""

    def run(way: Way, a: Tensor) -> Rows:
        options = [way.given[arg.name] for arg in way.call.op._schema.arguments[1:]]
        if any(isinstance(v, (Box, Tensor)) for v in options):
            return ended(way, a)
        _, box = way.only
        low, high = ends(way.call, box)
        values = [way.call.op(t, *options) for t in (low, high)]
        slope = _secant(low, high, *values)
        below = slope
        if way.call.op._schema.name.endswith("leaky_relu") and 0 <= options[0] <= 1:
            # convex: one of its own slopes, whichever leaves the smaller area
            below = torch.where(high > -low, 1.0, torch.full_like(low, options[0]))
            below = torch.where(low >= 0, 1.0, torch.where(high <= 0, options[0], below))
        places = [(low, values[0]), (high, values[1])]
        for kink in kinks(way.call, way.given):
            inside = torch.full_like(low, kink).clamp(low, high)
            places.append((inside, way.call.op(inside, *options)))
        above = torch.stack([v - slope * x for x, v in places]).amax(0)
        under = torch.stack([v - below * x for x, v in places]).amin(0)
        size = largest(box) * (slope.abs() + below.abs()) + values[0].abs() + values[1].abs()
        return by_lines(way, a, _widened(way, Lines(below, under, slope, above), size))

    return run


def _derivative(
    call: Call, given: dict[str, Any]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]:
    """A smooth function, its derivative, and more than its second derivative ever is."""
    name = call.op._schema.name.split("::")[1]
    if name == "sigmoid":
        return torch.sigmoid, lambda t: torch.sigmoid(t) * torch.sigmoid(-t), 0.0963
    if name == "tanh":
        return torch.tanh, lambda t: 1 - torch.tanh(t).square(), 0.7699
    if name == "silu":
        return F.silu, lambda t: torch.sigmoid(t) * (1 + t * torch.sigmoid(-t)), 0.5001
    if name == "softplus":
        beta, threshold = float(given["beta"]), float(given["threshold"])
        return lambda t: F.softplus(t, beta, threshold), lambda t: torch.sigmoid(beta * t), beta * 0.2501
    if given["approximate"] == "none":

        def slope(t: Tensor) -> Tensor:
            return 0.5 * (1 + torch.erf(t * math.sqrt(0.5))) + t * torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)

        return F.gelu, slope, 0.7980
    c, d = math.sqrt(2 / math.pi), 0.044715

    def slope_tanh(t: Tensor) -> Tensor:
        h = torch.tanh(c * (t + d * t**3))
        return 0.5 * (1 + h) + 0.5 * t * (1 - h * h) * c * (1 + 3 * d * t * t)

    return lambda t: F.gelu(t, approximate="tanh"), slope_tanh, 0.9


#: Cells of a box in which a smooth function is compared with its lines.
CELLS = 16


def smooth_back(way: Way, a: Tensor) -> Rows:
    """Parallel lines of the secant's slope.

    In a cell of half width h around c, f - slope x differs from its value at c by at most
    ``h (|f'(c) - slope| + h max |f''|)``.
    """
    _, box = way.only
    function, derivative, bend = _derivative(way.call, way.given)
    low, high = ends(way.call, box)
    slope = _secant(low, high, function(low), function(high))
    half = (high - low) / (2 * CELLS)
    above = below = None
    for cell in range(CELLS):
        c = low + half * (2 * cell + 1)
        value = function(c) - slope * c
        reach = half * ((derivative(c) - slope).abs() + half * bend)
        above = value + reach if above is None else torch.maximum(above, value + reach)
        below = value - reach if below is None else torch.minimum(below, value - reach)
    assert above is not None and below is not None
    size = largest(box) * (1 + slope.abs()) + 2.0
    if way.call.op._schema.name.endswith("softplus"):  # its jump where PyTorch takes x itself
        jump = math.log1p(math.exp(-float(way.given["threshold"]))) / float(way.given["beta"]) * 1.001
        above, below = above + jump, below - jump
    return by_lines(way, a, _widened(way, Lines(slope, below, slope, above), size))


def maxpool_back(way: Way, a: Tensor) -> Rows:
    """Below: the input of largest lower bound. Above: the same where it beats all others, or the largest bound."""
    given, (name, box) = way.given, way.only
    if given["ceil_mode"] or box.lower.ndim != 4:
        return ended(way, a)
    options = given["kernel_size"], given["stride"] or given["kernel_size"], given["padding"], given["dilation"]
    lower, upper = ends(way.call, box)
    lowest, index = F.max_pool2d(lower, *options, return_indices=True)
    highest = F.max_pool2d(upper, *options)
    pads = options[2] if len(options[2]) == 2 else [options[2][0]] * 2
    padded = F.pad(upper, (pads[1], pads[1], pads[0], pads[0]), value=-torch.inf)
    kernel = options[0] if len(options[0]) == 2 else [options[0][0]] * 2
    windows = F.unfold(padded, tuple(kernel), options[3], 0, options[1]).unflatten(1, (lower.shape[1], -1))
    rivals = (windows > lowest.flatten(2).unsqueeze(2)).sum(2).reshape(lowest.shape)
    own = upper.flatten(2).gather(2, index.flatten(2)).reshape(lowest.shape)
    alone = rivals == (own > lowest).to(rivals.dtype)
    up = a.clamp_min(0) * (~alone)
    target = a.new_zeros(len(a), *lower.shape).flatten(3)
    places = index.flatten(2).unsqueeze(0).expand(len(a), -1, -1, -1)
    back = target.scatter_add(3, places, (a - up).flatten(3)).reshape(len(a), *lower.shape)
    return Rows({name: back}, ((up, highest),), F.max_pool2d(largest(box), *options) if way.sound else None)


class Upper:
    """The bound as it is gathered on the way back."""

    def __init__(self, samples: Samples, sound: bool, steps: int, rows: Tensor) -> None:
        self.samples, self.sound, self.steps = samples, sound, steps
        self.constant = self.slack = rows.new_zeros(len(rows), samples.count)

    def deployed(self, a: Tensor, size: Tensor | None, name: str, lost: Lost, out: Box) -> None:
        """A deployed evaluation of ``name`` is off by what it loses of terms of that size; unknown where its box is."""
        if not bool((out.upper - out.lower < torch.inf).all()):
            self.slack = self.slack + torch.inf
        if lost.size:
            assert size is not None
            limit = torch.finfo(torch.float64 if lost.least < 1e-200 else torch.float32).max / 4
            size = torch.where(size < limit, size * (lost.size + lost.rough) * (1 + 2.0**-40) + lost.least, torch.inf)
            self.slack = self.slack + self.samples.dot(name, a.abs(), size)

    def rounds(self, a: Tensor, size: Tensor | None, name: str) -> None:
        """Products of the rows ``a`` of ``name`` with terms of that size have been rounded."""
        if size is not None:
            gamma = (size.numel() // self.samples.count + 2 * self.steps + 64) * 2.0**-52
            tiny = torch.where(size < torch.inf, size, 0.0).sum() * 2.0**-1000  # what was too small for float64
            self.slack = self.slack + gamma * self.samples.dot(name, a.abs(), size) + tiny

    def total(self) -> Tensor:
        """``[M, B]``; with sound rounding moved up, and infinite where anything overflowed or was NaN."""
        if not self.sound:
            return self.constant
        found = self.constant + 1.01 * self.slack + 2.0**-990
        return torch.where(found < torch.inf, found, torch.inf)


def upper_bounds(env: Env, samples: Samples, output: str, rows: Tensor) -> Tensor:
    """``[M, B]``: at least ``rows . output`` for every input in its box; ``rows [M, *shape]`` is float64 if sound."""
    sound, steps = env.mode.sound, env.program.steps
    upper, pending = Upper(samples, sound, len(steps), rows), {output: rows}
    for step in reversed(steps):
        a = pending.pop(step.name, None)
        if a is None:
            continue
        ordered = samples.owners.get(step.name, a) is None and a.shape[1:2] == (samples.count,)
        found = _through(env, step, a, ordered)
        if found.total is not None:
            upper.constant = upper.constant + found.total
        upper.rounds(a, found.size, step.name)
        if env.mode.deployed and found.a:  # elsewhere the bounds have ended at a deployed box
            upper.deployed(a, found.size, step.name, _lost(env, step), env.values[step.name])
        for own, vector in found.constants:
            upper.constant = upper.constant + samples.dot(step.name, own, vector)
        for name, more in found.a.items():
            together = more if sound else more.to(env.values[name].lower.dtype)  # of a model of several dtypes
            if name in pending:
                together = pending[name] + together
                box = env.values[name]
                upper.rounds(together, largest(box) if sound else None, name)
            pending[name] = together
    for name, a in pending.items():
        _at_input(env, upper, name, a)
    return upper.total()


def _lost(env: Env, step: Step) -> Lost:
    """What a deployed evaluation of the step loses; a merged batch-norm loses its own besides."""
    if step.rule is None:
        return Lost()
    dtype = step.nodes[-1].dtype or torch.float32
    given = env.filled(step.bound)
    parts = [deployed.lost(deployed.name_of(node.target), given, dtype) for node in step.nodes]
    return Lost(*(sum(values) for values in zip(*parts, strict=True)))


def _through(env: Env, step: Step, a: Tensor, ordered: bool) -> Rows:
    call = Call(env.mode, step.node.target, step.node.dtype or a.dtype, step.node.shape, step.node.where)
    out = env.values[step.name]
    way = Way(call, step, {}, env, out)
    if step.rule is None:  # an item of what several results have
        return Rows({step.boxes[0]: a}) if isinstance(env.values[step.boxes[0]], Box) else _part_back(way, a)
    boxes = [env.values[n] for n in step.boxes]
    numbers = all(isinstance(b, Box) and b.lower.is_floating_point() for b in boxes)
    if step.rule.back is None or not numbers or env.lowers(step):
        return ended(way, a)
    found: Rows = step.rule.back(way._replace(given=env.filled(step.bound), ordered=ordered), a)
    return found


def _part_back(way: Way, a: Tensor) -> Rows:
    """One part of what split, chunk or unbind make: zeros for the others."""
    whole = next(s for s in way.env.program.steps if s.name == way.step.boxes[0])
    box, place = way.env.values[whole.boxes[0]], way.step.node.args[1]
    rest, start = whole.node.args[1:], torch.zeros_like(wide(way.call, box.lower))
    pull: Any = torch.func.vjp(lambda t: whole.node.target(t, *rest)[place], start)[1]
    return Rows({whole.boxes[0]: torch.vmap(lambda r: pull(r)[0])(a)})


def _at_input(env: Env, upper: Upper, name: str, a: Tensor) -> None:
    """The largest value of the rows over the input's box, and over its ball."""
    samples, box = upper.samples, env.values[name]
    if not isinstance(box, Box):
        raise AssertionError(name)
    low, high = (box.lower.double(), box.upper.double()) if upper.sound else (box.lower, box.upper)
    if upper.sound:
        found = samples.dot(name, a.clamp_min(0), high) + samples.dot(name, a.clamp_max(0), low)
    else:
        radius = (high - low) * 0.5
        if samples.owners.get(name, a) is None and low.ndim > 1:
            found = passes.box(a, low + radius, radius)
        else:
            found = samples.dot(name, a, low + radius) + samples.dot(name, a.abs(), radius)
    if box.ball is not None:
        center, scale, slack = (t.expand(low.shape) for t in box.ball[1:])
        by_ball = samples.dot(name, a, center) + samples.dot(name, a.abs(), slack)
        scaled = (a * scale).reshape(len(a), samples.count, -1)
        norm = scaled.abs().amax(2) if box.ball.p == 1 else scaled.square().sum(2).sqrt()
        by_ball = by_ball + (norm * (1 + 2.0**-40) if upper.sound else norm)
        upper.rounds(a, center.abs() + scale if upper.sound else None, name)
        found = torch.minimum(found, by_ball)
    upper.constant = upper.constant + found
    upper.rounds(a, torch.maximum(low.abs(), high.abs()) if upper.sound else None, name)
