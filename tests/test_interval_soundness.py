"""Sound rounding: no exact value of any point of a box lies outside, whatever the numbers; and it widens little."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn

import w2s_fast
from w2s_fast import extension
from w2s_fast.nn import bound, verify
from w2s_fast.testing.boxes import KINDS, assert_contains, exact_bounds, random

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
F32 = torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 37, 300])
def test_exact_arithmetic(backend, dtype, kind, k):
    g = torch.Generator().manual_seed(k)
    center, radius = KINDS[kind](g, k)
    lower, upper = (center - radius).to(dtype), (center + radius).to(dtype)
    weight, bias = random(g, 5, k, dtype=dtype), random(g, 5, dtype=dtype)
    if kind == "denormal":
        weight = weight * 1e30 if dtype in (F32, torch.float64, torch.bfloat16) else weight
    if not bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()):
        pytest.skip("beyond the range of the dtype")
    exact = exact_bounds(lower.double(), upper.double(), weight.double(), bias.double())
    with w2s_fast.backend(backend):
        found = w2s_fast.interval_linear(lower, upper, weight, bias, rounding="sound")
        center, radius = w2s_fast.interval_linear(lower, upper, weight, bias, rounding="sound", out_form="cr")
        skipping = w2s_fast.interval_linear(lower, upper, weight.t().contiguous().t(), bias, rounding="sound")
    for low, high in (found, (center.double() - radius.double(), center.double() + radius.double()), skipping):
        # the sum of centre and radius is rounded to float64 here, hence only where that is exact enough
        if low.dtype == torch.float64 and dtype == torch.float64:
            continue
        assert_contains((low, high), exact)
    assert_contains(found, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_sum(backend):
    g = torch.Generator().manual_seed(3)
    k = 100_000
    lower, weight, bias = random(g, 1, k, dtype=F32), random(g, 1, k, dtype=F32), torch.zeros(1)
    upper = lower + 1e-3 * random(g, 1, k, dtype=F32).abs()
    with w2s_fast.backend(backend):
        found = w2s_fast.interval_linear(lower, upper, weight, bias, rounding="sound")
    assert_contains(found, exact_bounds(lower, upper, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fast_rounding_is_not_sound(backend):
    """The test above has power: round to nearest puts about half of all bounds inside the exact ones."""
    g = torch.Generator().manual_seed(0)
    lower, weight, bias = random(g, 4, 300, dtype=F32), random(g, 20, 300, dtype=F32), random(g, 20, dtype=F32)
    upper = lower + 0.01
    with w2s_fast.backend(backend):
        low, high = w2s_fast.interval_linear(lower, upper, weight, bias)
    exact = exact_bounds(lower, upper, weight, bias)
    inside = [
        Fraction(float(low[i, j])) > a or Fraction(float(high[i, j])) < b
        for i, row in enumerate(exact)
        for j, (a, b) in enumerate(row)
    ]
    assert sum(inside) > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_known_after_overflow_or_nan(backend):
    big, inf, nan = 3e38, float("inf"), float("nan")
    lower = torch.tensor([[big, big], [nan, 0.0], [-inf, 0.0], [1.0, 1.0]])
    upper = torch.tensor([[big, big], [nan, 1.0], [inf, 1.0], [2.0, 2.0]])
    weight = torch.tensor([[2.0, -1.9], [1.0, 1.0], [inf, 1.0]])
    with w2s_fast.backend(backend):
        low, high = w2s_fast.interval_linear(lower, upper, weight, rounding="sound")
        z = w2s_fast.margin_logits(lower, upper, weight, None, torch.tensor([0, 1, 2, 0]), rounding="sound")
    assert not bool(low.isnan().any() or high.isnan().any() or z.isnan().any())
    unknown = torch.tensor([[0, 0, 1], [1, 1, 1], [1, 1, 1], [0, 0, 1]]).bool()
    assert bool(((low == -inf) & (high == inf))[unknown].all())
    assert bool(torch.isfinite(low[3, :2]).all() and torch.isfinite(high[3, :2]).all())
    exact = torch.tensor([[big * 0.1, 2.0 * big]], dtype=torch.float64)  # float64 may know what float32 cannot
    assert bool((low[0, :2] <= exact + 1e32).all() and (high[0, :2] >= exact - 1e32).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float64], ids=str)
def test_margins_in_exact_arithmetic(backend, dtype):
    g = torch.Generator().manual_seed(1)
    lower, weight, bias = random(g, 6, 70, dtype=dtype), random(g, 9, 70, dtype=dtype), random(g, 9, dtype=dtype)
    upper, y = lower + 0.05, torch.arange(6) % 9
    with w2s_fast.backend(backend):
        z = w2s_fast.margin_logits(lower, upper, weight, bias, y, rounding="sound")
    for i, k in itertools.product(range(6), range(9)):
        exact = Fraction(float(bias[k])) - Fraction(float(bias[y[i]]))
        for a, b, x, own in zip(*(t.tolist() for t in (lower[i], upper[i], weight[k], weight[y[i]])), strict=True):
            d = Fraction(x) - Fraction(own)
            exact += d * Fraction(b if d >= 0 else a)
        assert Fraction(float(z[i, k])) >= exact
        assert float(z[i, k]) <= float(exact) + 1e-3


def exact_hull(x, weight, bias):
    """Both ends of every output of interval inputs and weights, as fractions: extremes of the products of ends."""
    rows = []
    for low, high in zip(*(t.tolist() for t in x), strict=True):
        row = []
        for first, second, *shift in zip(*(t.tolist() for t in (*weight, *bias)), strict=True):
            ends = [Fraction(v) for v in shift]
            for xs, ws in zip(zip(low, high, strict=True), zip(first, second, strict=True), strict=True):
                products = [Fraction(a) * Fraction(b) for a in xs for b in ws]
                ends[0] += min(products)
                ends[1] += max(products)
            row.append(ends)
        rows.append(row)
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["nonneg", "general", "midrad"])
@pytest.mark.parametrize("kind", KINDS)
def test_interval_weights_in_exact_arithmetic(backend, dtype, mode, kind):
    for k in (1, 37, 150):
        g = torch.Generator().manual_seed(k)
        (center, radius), (middle, width) = KINDS[kind](g, k), KINDS["random" if kind != "point" else "point"](g, k)
        x, w = ([(c - r).to(dtype), (c + r).to(dtype)] for c, r in ((center, radius), (middle, width)))
        if mode == "nonneg":
            x = [t.clamp_min(0) for t in x]
        if not all(bool(t.isfinite().all()) for t in x):
            continue  # beyond the range of the dtype
        bias = [random(g, 2, dtype=dtype) - 0.01, random(g, 2, dtype=dtype).abs() + 3]
        with w2s_fast.backend(backend):
            found = w2s_fast.interval_linear_iw(
                (x[0], x[0], x[1]), (w[0], w[0], w[1]), (bias[0], bias[0], bias[1]), mode=mode, rounding="sound"
            )
        assert_contains(found[::2], exact_hull(x, w, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["nonneg", "general", "midrad"])
def test_interval_weights_to_nearest_are_not_sound_and_sound_ones_hardly_wider(backend, mode):
    g = torch.Generator().manual_seed(0)
    x, w = random(g, 4, 300, dtype=F32).abs(), random(g, 20, 300, dtype=F32)
    x, w = (x, x + 0.01), (w, w + 0.01)
    triples = (x[0], x[0], x[1]), (w[0], w[0], w[1])
    with w2s_fast.backend(backend):
        low, _, high = w2s_fast.interval_linear_iw(*triples, mode=mode)
        lower, _, higher = w2s_fast.interval_linear_iw(*triples, mode=mode, rounding="sound")
    exact = exact_hull(x, w, (torch.zeros(20), torch.zeros(20)))
    if mode != "midrad":  # whose enclosure is wider than the hull by more than rounding
        inside = [
            Fraction(float(low[i, j])) > a or Fraction(float(high[i, j])) < b
            for i, row in enumerate(exact)
            for j, (a, b) in enumerate(row)
        ]
        assert sum(inside) > 20
    assert_contains((lower, higher), exact)
    assert float(((higher - lower) / (high - low)).max()) < 1.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["nonneg", "general", "midrad"])
def test_interval_weights_know_nothing_after_overflow_or_nan(backend, mode):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[3e38, 3e38], [nan, 0.0], [inf, 0.0], [1.0, 1.0]])
    w = torch.tensor([[2.0, 2.0], [1.0, 1.0], [inf, 1.0]])
    for bias in (None, [torch.tensor([0.0, nan, 0.0])] * 3):
        with w2s_fast.backend(backend):
            low, _, high = w2s_fast.interval_linear_iw([x] * 3, [w] * 3, bias, mode=mode, rounding="sound")
        assert not bool(low.isnan().any() or high.isnan().any())
        unknown = torch.tensor([[0, 0, 1], [1, 1, 1], [1, 1, 1], [0, bias is not None, 1]]).bool()
        assert bool(((low == -inf) & (high == inf))[unknown].all())
        assert bool(low[3, 0] <= 4.0 <= high[3, 0]) and bool(low[3, 0] > 3.99) and bool(high[3, 0] < 4.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sound_interval_weights_have_the_gradient_of_the_fast_ones(backend):
    g = torch.Generator().manual_seed(5)
    found = []
    for rounding in ("fast", "sound"):
        g.manual_seed(5)
        x, w, b = ([random(g, *s).requires_grad_() for _ in range(3)] for s in ((3, 7), (4, 7), (4,)))
        with w2s_fast.backend(backend):
            made = w2s_fast.interval_linear_iw(x, w, b, mode="general", rounding=rounding)
        sum((i + 1) * t.square().sum() for i, t in enumerate(made)).backward()
        found.append([t.grad for t in (*x, *w, *b)])
    for fast, sound in zip(*found, strict=True):
        torch.testing.assert_close(fast, sound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float64], ids=str)
def test_affine_in_exact_arithmetic(backend, dtype):
    g = torch.Generator().manual_seed(4)
    lower, scale, shift = random(g, 5, 40, dtype=dtype), random(g, 40, dtype=dtype), random(g, 40, dtype=dtype)
    upper = lower + random(g, 5, 40, dtype=dtype).abs() * 1e-2
    with w2s_fast.backend(backend):
        low, high = w2s_fast.interval_affine(lower, upper, scale, shift, rounding="sound")
    for i, j in itertools.product(range(5), range(40)):
        s, t = Fraction(float(scale[j])), Fraction(float(shift[j]))
        ends = sorted(s * Fraction(float(x[i, j])) + t for x in (lower, upper))
        assert Fraction(float(low[i, j])) <= ends[0] and Fraction(float(high[i, j])) >= ends[1]


def mlp():
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


def residual():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), Block(6), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 10),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(-1.5, 1.5)
    return model


def points(lower, upper, count, generator):
    """Points of a box in float64: uniform ones, and corners."""
    shape = (count, *lower.shape)
    share = torch.rand(shape, generator=generator, dtype=torch.float64)
    share = torch.where(torch.rand(shape[:2], generator=generator).reshape(*shape[:2], *[1] * (len(shape) - 2)) < 0.5,
                        share, share.round())  # fmt: skip
    return lower.double() + share * (upper.double() - lower.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make, shape, count", [(mlp, (25, 40), 10_000), (residual, (5, 2, 8, 8), 2_000)])
@pytest.mark.parametrize("eps", [1e-6, 0.03])
def test_no_point_of_a_box_leaves_the_bounds(backend, make, shape, count, eps):
    """10^6 points over the cases, evaluated in float64."""
    torch.manual_seed(0)
    model, generator = make().eval(), torch.Generator().manual_seed(1)
    x = torch.rand(shape, generator=generator)
    with torch.no_grad(), w2s_fast.backend(backend):
        lower, upper = bound(model).bounds(x, eps)
        exact = make().eval().double()
        exact.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()})
        for part in points(x.double() - eps, x.double() + eps, count, generator).split(500):
            z = exact(part.flatten(0, 1)).unflatten(0, part.shape[:2])
            assert bool((z >= lower).all() and (z <= upper).all())


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
@pytest.mark.parametrize("make, shape", [(mlp, (50, 40)), (residual, (20, 2, 8, 8))])
def test_sound_margins_are_hardly_wider(make, shape):
    torch.manual_seed(0)
    model = make().eval()
    x, y = torch.rand(shape), torch.arange(shape[0]) % 10
    with torch.no_grad():
        slack = [bound(model).margins(x, y, e, r) for e, r in ((0.02, "sound"), (0.02, "fast"), (0.0, "fast"))]
    growth = (slack[0] - slack[2]).sum() / (slack[1] - slack[2]).sum()
    assert 1.0 <= float(growth) <= 1.01


@pytest.mark.parametrize("make, shape", [(mlp, (20, 40)), (residual, (8, 2, 8, 8))])
def test_larger_boxes_contain_smaller_ones_in_floating_point(make, shape):
    torch.manual_seed(0)
    model, x = make().eval(), torch.rand(shape)
    with torch.no_grad():
        boxes = [bound(model).bounds(x, e) for e in (0.0, 1e-6, 0.01, 0.0101, 0.05)]
    for (low, high), (lower, higher) in itertools.pairwise(boxes):
        assert bool((lower <= low).all() and (high <= higher).all())


def test_verified_says_what_the_margins_say():
    torch.manual_seed(0)
    model, x = mlp().eval(), torch.rand(30, 40)
    y = model(x).argmax(1)
    assert bool(verify(model, x, y, 1e-6).all())
    assert not bool(verify(model, x, (y + 1) % 10, 0.0).any())
    some = verify(model, x, y, 0.005)
    parts = torch.cat([verify(model, x[i : i + 7], y[i : i + 7], 0.005) for i in range(0, 30, 7)])
    assert torch.equal(some, parts) and int(some.sum()) > 0
