"""Samples of the interval ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..accuracy import EPS
from . import Make, Sample, tensors

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _box(m: Make, *shape: int, width: float = 0.2) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds around normal numbers; one in four has width 0."""
    lower = m.logits(*shape, scale=1.0)
    extent = (m.uniform(*shape) - 0.25).clamp_min(0) * width
    return lower, (lower.float() + extent).to(m.dtype)


def _layer(m: Make, n: int, k: int) -> tuple[Tensor, Tensor]:
    """A weight with some zeros and a bias."""
    weight = m.logits(n, k, scale=k**-0.5)
    weight[::3, ::2] = 0
    return weight, m.logits(n, scale=0.5)


def _linear(batch: int, k: int, n: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        return (*_box(m, batch, k), *_layer(m, n, k)), dict(kwargs)

    return make


def _centered(m: Make) -> Inputs:
    lower, upper = _box(m, 3, 2, 33)
    return (lower, (upper - lower), *_layer(m, 17, 33)), {"form": "cr"}


def _linear_layouts(m: Make) -> Inputs:
    """A permuted lower bound, an expanded upper one, a sliced weight; more leading axes than one."""
    lower = m.logits(40, 6, 3, scale=0.3).permute(2, 1, 0)
    upper = (lower.amax((0, 1)) + 0.1).expand(3, 6, 40)
    return (lower, upper, m.logits(19, 60, scale=0.2)[:, 7:47], None), {"act": "relu"}


def _linear_transposed(batch: int) -> Callable[[Make], Inputs]:
    """A weight stored [K, N]; most units are dead."""

    def make(m: Make) -> Inputs:
        lower, upper = _box(m, batch, 50)
        alive = torch.arange(50, device=lower.device) % 5 == 0
        return (lower * alive, upper * alive, m.logits(50, 131, scale=0.2).t(), m.logits(131)), {}

    return make


def _linear_extreme(m: Make) -> Inputs:
    """A width far below the rounding of the centre, and a huge bias."""
    lower = m.logits(4, 65, offset=100.0)
    return (lower, lower + 0.01, *_layer(m, 9, 65)[:1], torch.full((9,), 1e4, dtype=m.dtype, device=m.device)), {}


def _holds(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any, terms: Tensor, count: int) -> None:
    """Sound bounds contain those of float64, and are wider by no more than a chain of ``count`` float32 terms costs.

    ``terms`` is sum |x| |W|. The C++ kernels stay far below; tests/test_interval_soundness.py holds them to 1 %.
    """
    import w2s_fast

    with torch.no_grad(), w2s_fast.backend("reference"):
        exact = getattr(w2s_fast, op)(*args, **{**kwargs, "rounding": "fast"})
    (x, *_, y), (low, *_, high) = tensors(found), tensors(exact)  # interval weights have a middle between
    eps = EPS[x.dtype]
    x, y = x.double(), y.double()
    scale = low.abs() + high.abs()
    if "cr" in (kwargs.get("out_form"), kwargs.get("form")):
        x, y, low, high = x - y, x + y, low - high, low + high
        low, high = low + 1e-14 * scale, high - 1e-14 * scale  # the exact form was rounded to float64
    assert bool((x <= low).all() and (high <= y).all()), "a bound lies inside the exact one"
    excess = (y - x) - (high - low)
    allowed = 0.01 * (high - low) + 4 * eps * (scale + 1) + 2 * (count + 20) * 2.0**-23 * (terms + 1)
    worst = float((excess / allowed).max())
    assert worst <= 1.0, f"{worst:.3g} times as much wider as allowed"


def _holds_linear(args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
    terms = torch.maximum(args[0].abs(), args[1].abs()) @ args[2].abs().t()
    _holds("interval_linear", args, kwargs, found, terms, args[2].shape[1])


def _holds_weights(args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
    x, w = (torch.maximum(t[0].abs(), t[2].abs()) for t in args[:2])
    count = w.shape[1] * (4 if kwargs.get("mode") == "midrad" else 1)  # it widens both, for centre and radius
    _holds("interval_linear_iw", args, kwargs, found, x @ w.t(), count)


def _holds_conv(args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
    options = {k: v for k, v in kwargs.items() if k in ("stride", "padding", "dilation", "groups")}
    terms = F.conv2d(torch.maximum(args[0].abs(), args[1].abs()), args[2].abs(), **options)
    _holds("interval_conv2d", args, kwargs, found, terms, args[2][0].numel())


def _soundly(make: Callable[[Make], Inputs]) -> Callable[[Make], Inputs]:
    def combined(m: Make) -> Inputs:
        args, kwargs = make(m)
        return args, {**kwargs, "rounding": "sound"}

    return combined


def _margins(batch: int, d: int, classes: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        weight, bias = _layer(m, classes, d)
        if classes > 4:
            weight[3] = weight[1]  # classes with one and the same weight
        y = m.integers(classes, batch)
        if batch > 1:
            y[0], y[-1] = 0, classes - 1
        return (*_box(m, batch, d), weight, bias, y), dict(kwargs)

    return make


def _margins_centered(m: Make) -> Inputs:
    lower, upper = _box(m, 3, 2, 33)
    return (lower, (upper - lower), m.logits(7, 40, scale=0.2)[:, 3:36], None, m.integers(7, 3, 2)), {"form": "cr"}


def _holds_margins(args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
    """Sound margins are at least the exact ones, each x_k at an end, and hardly more than with the larger |x_k|."""
    lower, upper, weight, bias, y = args
    spread = kwargs.get("spread", 0.0)
    each, most = weight - weight[y].unsqueeze(1), spread * (weight.abs() + weight[y].abs().unsqueeze(1))
    step = bias - bias[y].unsqueeze(1) + spread * (bias.abs() + bias[y].abs().unsqueeze(1))

    def margins(*sizes: Tensor) -> Tensor:
        ends = [each * x.unsqueeze(1) + most * s.unsqueeze(1) for x, s in zip((lower, upper), sizes, strict=True)]
        found: Tensor = (torch.maximum(*ends).sum(-1) + step).scatter(1, y.unsqueeze(1), 0.0)
        return found

    largest = torch.maximum(lower.abs(), upper.abs())
    exact, most_said = margins(lower.abs(), upper.abs()), margins(largest, largest)
    eps = EPS[found.dtype]
    found = found.double()
    assert bool((found >= exact).all()), "a margin lies below the exact maximum"
    assert bool((found - most_said <= 1e-4 + 0.01 * most_said.abs() + 40 * eps).all()), "wider than needed"


def _conv(
    batch: int, size: tuple[int, int], channels: int, out: int, kernel: tuple[int, int] = (3, 3), **kwargs: Any
) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        groups = kwargs.get("groups", 1)
        inner = channels // groups
        weight = m.logits(out, inner, *kernel, scale=(inner * kernel[0] * kernel[1]) ** -0.5)
        weight[::3, :, 0] = 0
        return (*_box(m, batch, channels, *size), weight, m.logits(out, scale=0.5)), dict(kwargs)

    return make


def _conv_layouts(m: Make) -> Inputs:
    """Channels last, an expanded upper bound, a sliced weight, no bias."""
    lower = m.logits(2, 9, 7, 5, scale=0.3).permute(0, 3, 1, 2)
    upper = (lower.amax((0, 2, 3)) + 0.1)[None, :, None, None].expand(lower.shape)
    return (lower, upper, m.logits(6, 5, 3, 8, scale=0.2)[..., 2:5]), {"padding": 1}


CONVS: dict[str, Callable[[Make], Inputs]] = {
    "plain": _conv(2, (9, 7), 3, 5),
    "padded": _conv(3, (8, 16), 4, 6, padding=1, act="relu"),
    "strided": _conv(2, (11, 13), 3, 7, padding=(1, 2), stride=(2, 3), act="relu"),
    "dilated": _conv(1, (12, 11), 2, 3, kernel=(2, 3), dilation=(2, 2), padding=2),
    "grouped": _conv(2, (6, 6), 6, 4, groups=2, padding=1, stride=2),
    "many": _conv(1, (10, 10), 18, 9, padding=1),
    "one-position": _conv(9, (3, 3), 4, 2, act="relu"),
    "center-radius": _conv(2, (5, 5), 2, 3, form="cr"),
    "layouts": _conv_layouts,
    "empty": _conv(0, (5, 5), 2, 3),
}


def _affine(*shape: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        return (*_box(m, *shape), m.logits(shape[1], scale=1.0), m.logits(shape[1], scale=1.0)), dict(kwargs)

    return make


def _holds_affine(args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
    axes = (1, -1) + (1,) * (args[0].ndim - 2)
    terms = torch.maximum(args[0].abs(), args[1].abs()) * args[2].abs().reshape(axes) + args[3].abs().reshape(axes)
    _holds("interval_affine", args, kwargs, found, terms, 1)


def _triple(m: Make, *shape: int, width: float = 0.3, low: float = -1e9) -> list[Tensor]:
    """Lower, middle, upper around normal numbers, at least ``low``."""
    middle = m.logits(*shape, scale=1.0).float().clamp_min(low)
    extents = [m.uniform(*shape) * width for _ in range(2)]
    lower = (middle - extents[0]).clamp_min(low)
    return [t.to(m.dtype) for t in (lower, middle, middle + extents[1])]


def _interval_weights(batch: tuple[int, ...], k: int, n: int, mode: str, bias: bool = True) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        x = _triple(m, *batch, k, low=0.0 if mode == "nonneg" else -1e9)
        return (x, _triple(m, n, k), _triple(m, n) if bias else None), {"mode": mode}

    return make


def _weights_layouts(m: Make) -> Inputs:
    x = [t.t() for t in _triple(m, 20, 5, low=0.0)]
    return (x, [t[:, 3:23] for t in _triple(m, 6, 30)]), {}


WEIGHTS: dict[str, Callable[[Make], Inputs]] = {
    "nonneg": _interval_weights((7,), 33, 19, "nonneg"),
    "general": _interval_weights((6,), 20, 17, "general"),
    "midrad": _interval_weights((2, 3), 40, 9, "midrad"),
    "one-row": _interval_weights((1,), 50, 35, "nonneg", bias=False),
    "layouts": _weights_layouts,
    "empty": _interval_weights((0,), 5, 4, "general"),
}

AFFINES: dict[str, Callable[[Make], Inputs]] = {
    "planes": _affine(3, 5, 4, 7, act="relu"),
    "rows": _affine(9, 33),
    "long": _affine(2, 3, 1100, act="relu"),
    "empty": _affine(0, 5, 3),
}

STATS: dict[str, Callable[[Make], Inputs]] = {
    "planes": lambda m: ((m.logits(4, 5, 3, 7),), {}),
    "rows": lambda m: ((m.logits(33, 70),), {}),
    "large-mean": lambda m: ((m.logits(6, 3, 40, offset=100.0),), {}),
    "permuted": lambda m: ((m.logits(3, 8, 5).permute(1, 2, 0),), {}),
}


def _reg(*shapes: tuple[int, ...], offset: float = 0.0) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        pairs = []
        for shape in shapes:
            lower = m.logits(*shape, offset=offset)
            pairs.append((lower, (lower.float() + m.uniform(*shape)).to(m.dtype)))
        return (pairs, _box(m, 5, 7)), {}

    return make


def _reg_layouts(m: Make) -> Inputs:
    lower = m.logits(9, 6).t()
    return (
        [(lower, lower + 0.5), (m.logits(4, 40, offset=-1.0)[:, 3:20], m.logits(4, 17, offset=2.0))],
        _box(m, 3),
    ), {}


REGS: dict[str, Callable[[Make], Inputs]] = {
    "plain": _reg((5, 33), (5, 3, 4, 4)),
    "long": _reg((3, 1100)),
    "large-mean": _reg((7, 40), offset=100.0),
    "all-dead": _reg((7, 40), offset=-100.0),
    "one-entry": _reg((1,)),
    "layouts": _reg_layouts,
}


def _tightness(*batch: int, sizes: tuple[int, ...] = (9, 33, 20), rows: int = 5) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        weights = [m.logits(n, k, scale=k**-0.5) for k, n in pairwise(sizes)]
        patterns = [m.uniform(*batch, n) < 0.6 for n in sizes[1:]] if batch else None
        return (weights, patterns, m.logits(*batch, rows, sizes[-1], scale=1.0)), {"radius": 0.1}

    return make


MARGINS: dict[str, Callable[[Make], Inputs]] = {
    "plain": _margins(7, 33, 10),
    "many": _margins(6, 70, 65),
    "two": _margins(5, 16, 2),
    "one-class": _margins(3, 8, 1),
    "center-radius": _margins_centered,
    "empty": _margins(0, 5, 4),
}


def _rows(count: int, batch: int, *shape: int) -> Callable[[Make], Inputs]:
    """Rows, some of them 0, over boxes that are dead, alive and neither."""

    def make(m: Make) -> Inputs:
        a = m.logits(count, batch, *shape, scale=1.0)
        a[..., ::7] = 0
        return (a, *_box(m, batch, *shape, width=2.0)), {}

    return make


def _rows_layouts(m: Make) -> Inputs:
    """Permuted rows, an expanded lower bound, a sliced upper one."""
    a = m.logits(6, 3, 20, scale=1.0).permute(1, 0, 2)
    lower = (m.logits(20, scale=1.0) - 1.5).expand(6, 20)
    return (a, lower, m.uniform(6, 30).to(m.dtype)[:, 5:25]), {}


def _rows_extreme(m: Make) -> Inputs:
    """Infinite ends, NaN, large numbers, boxes of one point and of none."""
    lower = torch.tensor([-torch.inf, -1.0, 0.0, -1e4, 2.0, float("nan"), -1.0, 0.0, -3.0], dtype=m.dtype)
    upper = torch.tensor([1.0, torch.inf, 0.0, 1e4, 2.0, 1.0, float("nan"), 1e4, -3.0], dtype=m.dtype)
    a = m.logits(4, 2, 9, scale=1.0)
    a[0, 0, 3], a[1, 1, 4] = torch.inf, torch.nan
    device = a.device
    return (a, lower.to(device).expand(2, 9), upper.to(device).expand(2, 9)), {}


ROWS: dict[str, Callable[[Make], Inputs]] = {
    "planes": _rows(4, 3, 5, 4, 7),
    "units": _rows(9, 7, 33),
    "long": _rows(2, 2, 4, 1100),
    "one": _rows(1, 1, 1),
    "layouts": _rows_layouts,
    "no-samples": _rows(3, 0, 5),
    "no-rows": _rows(0, 2, 5),
}

LINEAR: dict[str, Callable[[Make], Inputs]] = {
    "plain": _linear(7, 33, 19),
    "relu": _linear(9, 64, 70, act="relu"),
    "wide": _linear(5, 1100, 13, act="relu"),
    "one-row": _linear(1, 47, 130, act="relu"),
    "center-radius": _centered,
    "relu-to-center": _linear(6, 20, 12, act="relu", out_form="cr"),
    "layouts": _linear_layouts,
    "transposed": _linear_transposed(2),
    "extreme": _linear_extreme,
    "empty": _linear(0, 5, 4),
    "one-output": _linear(3, 8, 1),
}

SAMPLES: list[Sample] = [
    *(Sample("interval_linear", name, make) for name, make in LINEAR.items()),
    *(
        Sample(
            "interval_linear",
            f"sound-{name}",
            _soundly(LINEAR[name]),
            grad=False,
            verify=_holds_linear,
        )
        for name in ("plain", "relu", "wide", "one-row", "center-radius", "layouts", "transposed")
    ),
    *(Sample("margin_logits", name, make) for name, make in MARGINS.items()),
    Sample("margin_logits", "sound", _margins(9, 65, 10, rounding="sound"), grad=False, verify=_holds_margins),
    Sample(
        "margin_logits", "spread", _margins(9, 65, 10, rounding="sound", spread=0.01), grad=False, verify=_holds_margins
    ),
    *(Sample("margin_cross_entropy", name, make) for name, make in MARGINS.items() if name != "empty"),
    Sample("margin_cross_entropy", "none", _margins(9, 20, 12, reduction="none")),
    Sample("margin_cross_entropy", "sum-empty", _margins(0, 5, 4, reduction="sum")),
    *(Sample("relu_rows", name, make) for name, make in ROWS.items()),
    Sample("relu_rows", "extreme", _rows_extreme, grad=False),
    *(Sample("interval_conv2d", name, make) for name, make in CONVS.items()),
    *(
        Sample("interval_conv2d", f"sound-{name}", _soundly(CONVS[name]), grad=False, verify=_holds_conv)
        for name in ("padded", "strided", "grouped", "many", "layouts")
    ),
    *(Sample("fast_reg", name, make) for name, make in REGS.items()),
    Sample("tightness_rows", "linear", _tightness()),
    Sample("tightness_rows", "patterns", _tightness(3)),
    *(Sample("interval_affine", name, make) for name, make in AFFINES.items()),
    *(
        Sample("interval_affine", f"sound-{name}", _soundly(AFFINES[name]), grad=False, verify=_holds_affine)
        for name in ("planes", "rows")
    ),
    *(Sample("interval_batchnorm_stats", name, make) for name, make in STATS.items()),
    *(Sample("interval_linear_iw", name, make) for name, make in WEIGHTS.items()),
    *(
        Sample("interval_linear_iw", f"sound-{name}", _soundly(WEIGHTS[name]), grad=False, verify=_holds_weights)
        for name in ("nonneg", "general", "midrad", "layouts")
    ),
]
