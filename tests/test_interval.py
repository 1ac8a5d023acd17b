"""Interval ops: closed forms, gradients in float64, layouts, invariances and error texts."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import w2s_fast
from w2s_fast import extension

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
needs_cpp = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_box(*shape, seed=0, width=0.4, dtype=torch.float64):
    lower = random(*shape, seed=seed)
    return lower.to(dtype), (lower + random(*shape, seed=seed + 1).abs() * width).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_is_attained_at_corners(backend):
    lower, upper = a_box(3, 6)
    weight, bias = random(4, 6, seed=5), random(4, seed=6)
    with w2s_fast.backend(backend):
        low, high = w2s_fast.interval_linear(lower, upper, weight, bias)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)
    values = F.linear(lower + corners[:, None] * (upper - lower), weight, bias)
    torch.testing.assert_close(low, values.amin(0))
    torch.testing.assert_close(high, values.amax(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["fast", "sound"])
def test_a_point_gives_the_forward_pass(backend, rounding):
    x, weight, bias = (
        random(5, 37, dtype=torch.float32),
        random(9, 37, dtype=torch.float32),
        random(9, dtype=torch.float32),
    )
    image, kernel = random(2, 3, 8, 8, dtype=torch.float32), random(4, 3, 3, 3, dtype=torch.float32)
    with w2s_fast.backend(backend):
        linear = w2s_fast.interval_linear(x, x, weight, bias, act="relu", rounding=rounding)
        conv = w2s_fast.interval_conv2d(image, image, kernel, padding=1, rounding=rounding)
    for (low, high), plain in ((linear, F.linear(x, weight, bias).relu()), (conv, F.conv2d(image, kernel, padding=1))):
        if rounding == "fast":
            assert torch.equal(low, high)
        torch.testing.assert_close(low, plain, rtol=1e-5, atol=2e-4)
        torch.testing.assert_close(high, plain, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3, 9])  # a batch that streams, and one that does not
@pytest.mark.parametrize("form", ["lu", "cr"])
@pytest.mark.parametrize("act", [None, "relu"])
def test_linear_gradcheck(backend, batch, form, act):
    a, b = a_box(batch, 5) if form == "lu" else (random(batch, 5), random(batch, 5, seed=1).abs())
    leaves = [t.requires_grad_() for t in (a, b, random(4, 5, seed=2), random(4, seed=3))]

    def call(*args):
        return w2s_fast.interval_linear(*args, act=act, form=form)

    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride, padding, dilation, groups", [(1, 0, 1, 1), (2, 1, 1, 2), ((1, 3), (2, 1), (2, 1), 1)])
@pytest.mark.parametrize("act", [None, "relu"])
def test_conv_gradcheck(backend, stride, padding, dilation, groups, act):
    a, b = a_box(2, 2, 5, 6)
    leaves = [t.requires_grad_() for t in (a, b, random(4, 2 // groups, 3, 2, seed=2), random(4, seed=3))]

    def call(*args):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return w2s_fast.interval_conv2d(*args, **options, act=act)

    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", ["both", "scale", "shift"])
@pytest.mark.parametrize("biased", [False, True])
def test_conv_takes_a_batchnorm_and_a_clean_stream(backend, parts, biased):
    low, high = a_box(2, 3, 5, 5)
    weight, bias = random(4, 3, 3, 3, seed=2), random(4, seed=3) if biased else None
    scale, shift = (None if parts == "shift" else random(4, seed=4)), (None if parts == "scale" else random(4, seed=5))
    clean = random(2, 3, 5, 5, seed=6)
    leaves = [t.requires_grad_() for t in (low, high, weight, bias, scale, shift, clean) if t is not None]
    given = {"padding": 1, "bn_scale": scale, "bn_shift": shift}
    ones, zeros = low.new_ones(4), low.new_zeros(4)
    with w2s_fast.backend(backend):
        x, y, through = w2s_fast.interval_conv2d(low, high, weight, bias, **given, act="relu", clean=clean)
        grads = torch.autograd.grad((x * y.sin()).sum() + (through**2).sum(), leaves)
        apart = w2s_fast.interval_conv2d(low, high, weight, bias, padding=1)
        norm = (ones if scale is None else scale, zeros if shift is None else shift)
        a, b = w2s_fast.interval_affine(*apart, *norm, act="relu")
        plain = F.conv2d(clean, weight, bias, padding=1)
        expected = torch.autograd.grad((a * b.sin()).sum() + (plain**2).sum(), leaves)
        sound = w2s_fast.interval_conv2d(low, high, weight, bias, **given, rounding="sound")
        steps = w2s_fast.interval_conv2d(low, high, weight, bias, padding=1, rounding="sound")
        steps = w2s_fast.interval_affine(*steps, *norm, rounding="sound")
    for got, want in zip((x, y, through, *grads), (a, b, plain, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for got, want in zip(sound, steps, strict=True):  # the two layers as they are, not one with a rounded product
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 3, 5), (6, 7)])
@pytest.mark.parametrize("act", [None, "relu"])
def test_affine_gradcheck(backend, shape, act):
    leaves = [t.requires_grad_() for t in (*a_box(*shape), random(shape[1], seed=2), random(shape[1], seed=3))]
    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: w2s_fast.interval_affine(*t, act=act), leaves)
        assert torch.autograd.gradcheck(w2s_fast.interval_batchnorm_stats, leaves[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_through_a_relu(backend):
    """A row lies above a . relu on the box, on it at the ends of each x_k that it takes up; and its gradient."""
    a, lower = random(3, 4, 9, seed=1), random(4, 9, seed=2) * 1.5
    upper = lower + random(4, 9, seed=3).abs() * 2
    leaves = [t.requires_grad_() for t in (a, lower, upper)]
    with w2s_fast.backend(backend):
        rows, total = w2s_fast.relu_rows(*leaves)
        assert torch.autograd.gradcheck(w2s_fast.relu_rows, leaves)
    for share in (0.0, 0.2, 0.7, 1.0):
        x = lower + share * (upper - lower)
        gap = (rows * x).sum(2) + total - (a * x.relu()).sum(2)
        assert bool((gap >= -1e-12).all())
    ends = [rows * x - a * x.relu() for x in (lower, upper)]
    torch.testing.assert_close(torch.where(a > 0, ends[0], 0), torch.where(a > 0, ends[1], 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_margins_whose_terms_may_overflow(backend):
    """Partial sums of 6e38 leave nothing known of the margins that they are part of."""
    a, y = torch.ones(1, 3), torch.tensor([2])
    weight = torch.tensor([[3e38, 3e38, -3e38], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with w2s_fast.backend(backend):
        z = w2s_fast.margin_logits(a, a, weight, None, y, rounding="sound", spread=1e-6)
    assert z[0].tolist()[0] == torch.inf and bool((z[0, 1:].abs() < 1e-4).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_affine_is_batch_norm(backend):
    lower, upper = a_box(6, 4, 5, 5)
    clean, norm = random(6, 4, 5, 5, seed=5) * 3 + 2, torch.nn.BatchNorm2d(4).double()
    norm.weight.data, norm.bias.data = random(4, seed=6), random(4, seed=7)
    with w2s_fast.backend(backend):
        mean, variance = w2s_fast.interval_batchnorm_stats(clean)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        low, high = w2s_fast.interval_affine(lower, upper, scale, norm.bias - mean * scale)
        point, _ = w2s_fast.interval_affine(clean, clean, scale, norm.bias - mean * scale)
    torch.testing.assert_close(point, norm(clean))
    turned = (norm.weight < 0)[:, None, None]
    axes = (slice(None), None, None)
    first, second = (x * scale[axes] + (norm.bias - mean * scale)[axes] for x in (lower, upper))
    torch.testing.assert_close(low, torch.where(turned, second, first))
    torch.testing.assert_close(high, torch.where(turned, first, second))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["lu", "cr"])
def test_margin_gradcheck(backend, form):
    a, b = a_box(5, 7) if form == "lu" else (random(5, 7), random(5, 7, seed=1).abs())
    leaves = [t.requires_grad_() for t in (a, b, random(4, 7, seed=2), random(4, seed=3))]
    y = torch.tensor([0, 3, 1, 1, 2])
    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: w2s_fast.margin_logits(*t, y, form=form), leaves)
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda *t, r=reduction: w2s_fast.margin_cross_entropy(*t, y, form=form, reduction=r).loss, leaves
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_zero_weights_and_dead_units(backend):
    """sign(0) = 0 and a slope of 0 at 0, as autograd of |.| and relu has them."""
    lower, upper = a_box(6, 8)
    weight = random(5, 8, seed=2)
    weight[::2, ::3] = 0
    weight[4] = 0  # its bounds are exactly 0: ties at the ReLU
    leaves = [t.requires_grad_() for t in (lower, upper, weight)]
    up = [random(6, 5, seed=7), random(6, 5, seed=8)]

    def plain(a, b, w):
        m, r = F.linear((a + b) / 2, w), F.linear((b - a) / 2, w.abs())
        return (m - r).relu(), (m + r).relu()

    with w2s_fast.backend(backend):
        found = torch.autograd.grad(w2s_fast.interval_linear(*leaves, act="relu"), leaves, up)
    for ours, theirs in zip(found, torch.autograd.grad(plain(*leaves), leaves, up), strict=True):
        torch.testing.assert_close(ours, theirs)


def specification(lower, upper, weight, bias, y):
    """The peers' form: C W of shape [B, C, d]."""
    c = F.one_hot(torch.arange(len(weight))).double()[None] - F.one_hot(y, len(weight)).double()[:, None]
    w, shift = c @ weight, (c @ bias[:, None])[..., 0]
    m, r = (lower + upper) / 2, (upper - lower) / 2
    return (w @ m[..., None] + w.abs() @ r[..., None])[..., 0] + shift


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 3, 10, 200])
def test_margins_are_the_specification_layer(backend, classes):
    lower, upper = a_box(9, 33)
    weight, bias = random(classes, 33, seed=2), random(classes, seed=3)
    weight[-1] = weight[0]
    y = torch.arange(9) * 7 % classes
    y[0], y[-1] = 0, classes - 1
    leaves = [t.requires_grad_() for t in (lower, upper, weight, bias)]
    expected = specification(*leaves, y)
    with w2s_fast.backend(backend):
        z = w2s_fast.margin_logits(*leaves, y)
        loss, verified = w2s_fast.margin_cross_entropy(*leaves, y)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(loss, F.cross_entropy(expected, y))
    others = expected.detach().scatter(1, y[:, None], -torch.inf)
    assert torch.equal(verified, others.amax(1) < 0)
    theirs = torch.autograd.grad(F.cross_entropy(expected, y), leaves)
    for a, b in zip(torch.autograd.grad(loss, leaves), theirs, strict=True):
        torch.testing.assert_close(a, b)


@needs_cpp
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("dead", [0.0, 0.8, 1.0])
def test_skipping_dead_columns_changes_nothing(batch, dead):
    lower, upper = a_box(batch, 200, dtype=torch.float32)
    alive = torch.rand(200, generator=torch.Generator().manual_seed(0)) >= dead
    lower, upper, weight = lower * alive, upper * alive, random(77, 200, dtype=torch.float32) * 0.1
    plain = w2s_fast.interval_linear(lower, upper, weight)
    stored = weight.t().contiguous().t()
    for ours, theirs in zip(w2s_fast.interval_linear(lower, upper, stored), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_cpp
def test_nan_in_a_dead_column_of_the_weight_is_skipped_only_with_it():
    x, weight = torch.tensor([[0.0, 1.0]]), torch.tensor([[float("nan"), 2.0]] * 3)
    low, _ = w2s_fast.interval_linear(x, x, weight.t().contiguous().t())
    assert bool((low == 2.0).all())
    assert bool(w2s_fast.interval_linear(x, x, weight)[0].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_batches_do_not_change_a_row(backend):
    lower, upper = a_box(20, 70, dtype=torch.float32)
    weight, y = random(11, 70, dtype=torch.float32), torch.arange(20) % 11
    with w2s_fast.backend(backend):
        whole = w2s_fast.margin_logits(lower, upper, weight, None, y)
        parts = [w2s_fast.margin_logits(lower[i:j], upper[i:j], weight, None, y[i:j]) for i, j in ((0, 6), (6, 20))]
    torch.testing.assert_close(
        whole, torch.cat(parts), rtol=0 if backend == "cpp" else 1e-6, atol=0 if backend == "cpp" else 1e-5
    )


@pytest.mark.usefixtures("own_products")
@needs_cpp
@pytest.mark.parametrize("batch", [130, 21])
def test_results_do_not_depend_on_threads(batch):
    lower, upper = a_box(batch, 300, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (lower, upper, random(190, 300, dtype=torch.float32))]
    image = [
        t.requires_grad_() for t in (*a_box(5, 3, 9, 9, dtype=torch.float32), random(4, 3, 3, 3, dtype=torch.float32))
    ]
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = [*w2s_fast.interval_linear(*leaves, act="relu"), *w2s_fast.interval_conv2d(*image, padding=1)]
            grads = torch.autograd.grad(sum(o.square().sum() for o in out), leaves + image)
            found.append([*out, *grads])
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 4), out=st.integers(1, 5), height=st.integers(3, 9),
    width=st.integers(3, 20), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), stride=st.integers(1, 3),
    padding=st.integers(0, 2), dilation=st.integers(1, 2),
)  # fmt: skip
@needs_cpp
def test_any_convolution(batch, channels, out, height, width, kernel, stride, padding, dilation):
    if min(height, width) + 2 * padding < dilation * 2 + 1:
        return
    leaves = [
        t.requires_grad_() for t in (*a_box(batch, channels, height, width), random(out, channels, *kernel, seed=3))
    ]
    results = []
    for backend in ("reference", "cpp"):
        with w2s_fast.backend(backend):
            found = w2s_fast.interval_conv2d(*leaves, stride=stride, padding=padding, dilation=dilation, act="relu")
        results.append([*found, *torch.autograd.grad(found[0].sum() + found[1].square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def regularisers(bounds, box, tol=0.5):
    """The formulas of arXiv 2103.17268, term by term."""
    radius, tight, relu = ((box[1] - box[0]) / 2).mean(), [], []
    for lower, upper in bounds:
        c, active, dead = (lower + upper) / 2, lower > 0, upper < 0
        tight.append((tol - radius / ((upper - lower) / 2).mean()).relu() / tol)
        spread = (c - c.mean()).square()
        a = (c * active).mean() / -(c * dead).mean()
        v = (spread * active).sum() / (spread * dead).sum()
        value = sum((tol - torch.minimum(x, 1 / x.clamp_min(1e-12))).relu() for x in (a, v)) / tol
        relu.append(value if bool(torch.isfinite(value)) else value.new_zeros(()))
    return sum(tight) / len(bounds), sum(relu) / len(bounds)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [(0.0, 0.5), (0.0, 100.0), (-0.7, 0.0), (3.0,)])
def test_fast_reg(backend, offsets):
    bounds = []
    for i, offset in enumerate(offsets):
        lower, upper = a_box(6, 40, seed=10 * i, width=0.5)
        bounds.append(((lower + offset).requires_grad_(), (upper + offset).requires_grad_()))
    box = a_box(6, 5, seed=99)
    leaves = [t for pair in bounds for t in pair]
    expected = regularisers(bounds, box)
    with w2s_fast.backend(backend):
        found = w2s_fast.fast_reg(bounds, box)
        assert torch.autograd.gradcheck(
            lambda *t: w2s_fast.fast_reg(list(zip(t[::2], t[1::2], strict=True)), box), leaves, atol=1e-4
        )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fast_reg_cancels_nothing_at_a_large_mean(backend):
    lower, upper = a_box(50, 60, dtype=torch.float32)
    far = [((lower - 3000).requires_grad_(), (upper - 3000).requires_grad_())]
    far[0][0].data[0] += 6000.0
    far[0][1].data[0] += 6000.0
    with w2s_fast.backend(backend):
        found = w2s_fast.fast_reg(far, (lower, upper))
    expected = regularisers([(far[0][0].double(), far[0][1].double())], (lower.double(), upper.double()))
    torch.testing.assert_close(found.relu, expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [50.0, -50.0])
def test_fast_reg_of_a_layer_all_on_one_side(offset):
    lower, upper = a_box(4, 9)
    bounds = [((lower + offset).requires_grad_(), (upper + offset).requires_grad_())]
    found = w2s_fast.fast_reg(bounds, (lower, upper))
    grads = torch.autograd.grad(found.tight + found.relu, bounds[0])
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    assert found.relu.item() == (0.0 if offset > 0 else 2.0)


def gaussian(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width, expected", [(8, 0.430), (32, 0.2198), (128, 0.1106), (512, 0.0554)])
def test_tightness_of_two_gaussian_layers(width, expected):
    """E optimal / E layer-wise = sqrt(pi) G((d + 1) / 2) / (d G(d / 2)), about sqrt(pi / (2 d)); arXiv 2306.10426."""
    first, second = gaussian(width, 400, seed=1), gaussian(400, width, seed=2)
    optimal = (second @ first).abs().sum()
    _, layerwise = w2s_fast.interval_linear(second, second.abs(), first.t(), form="cr")
    assert abs(float(optimal / layerwise.sum()) / expected - 1) < 0.05


def test_tightness_falls_as_a_power_of_the_depth():
    weights = [gaussian(64, 64, seed=i) for i in range(5)]
    tau = [float(w2s_fast.tightness_rows(weights[:n], None, weights[4]).mean()) for n in (1, 2, 3, 4)]
    for n, found in enumerate(tau, 1):
        assert abs(found / 0.156**n - 1) < 0.25


def test_propagation_invariance():
    """All weights positive: nothing is lost, tau = 1. A sign that differs loses something."""
    weights = [gaussian(9, 7, seed=1).abs(), gaussian(8, 9, seed=2).abs()]
    torch.testing.assert_close(w2s_fast.tightness_rows(weights, None, gaussian(3, 8, seed=3).abs()), torch.ones(3))
    weights[0][0, 0] *= -1
    assert bool((w2s_fast.tightness_rows(weights, None, gaussian(3, 8, seed=3).abs()) < 1).all())


def test_tightness_is_the_formula():
    weights = [random(9, 7, seed=1), random(8, 9, seed=2)]
    patterns = [random(4, 9, seed=3) > 0, random(4, 8, seed=4) > 0]
    rows, radius = random(4, 3, 8, seed=5), random(4, 7, seed=6).abs()
    found = w2s_fast.tightness_rows(weights, patterns, rows, radius)
    for b in range(4):
        first, second = (torch.diag(p[b].double()) for p in patterns)
        signed = rows[b] @ second @ weights[1] @ first @ weights[0]
        absolute = rows[b].abs() @ second @ weights[1].abs() @ first @ weights[0].abs()
        torch.testing.assert_close(found[b], (signed.abs() @ radius[b]) / (absolute @ radius[b]))


def a_triple(*shape, seed, low=None):
    middle = random(*shape, seed=seed)
    middle = middle if low is None else middle.clamp_min(low)
    lower, upper = (random(*shape, seed=seed + i).abs() * 0.4 for i in (1, 2))
    lower = middle - lower
    return [lower if low is None else lower.clamp_min(low), middle, middle + upper]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["nonneg", "general", "midrad"])
def test_interval_weights_against_all_corners(backend, mode):
    """The hull is attained at corners of inputs and weights; midrad contains it."""
    x, w = a_triple(2, 3, seed=1, low=0.0 if mode == "nonneg" else None), a_triple(2, 3, seed=9)
    with w2s_fast.backend(backend):
        lower, middle, upper = w2s_fast.interval_linear_iw(x, w, mode=mode)
    choices = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    ends = [torch.where(choices[:, None] == 0, t[0], t[2]) for t in (x, w)]  # [8, rows, 3]
    values = torch.einsum("abk,cnk->acbn", *ends).flatten(0, 1)
    torch.testing.assert_close(middle, x[1] @ w[1].t())
    if mode == "midrad":
        assert bool((lower <= values.amin(0) + 1e-12).all() and (upper >= values.amax(0) - 1e-12).all())
    else:
        torch.testing.assert_close(lower, values.amin(0))
        torch.testing.assert_close(upper, values.amax(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["nonneg", "general", "midrad"])
def test_interval_weights_gradcheck(backend, mode):
    x, w = a_triple(5, 6, seed=1, low=0.1 if mode == "nonneg" else None), a_triple(4, 6, seed=9)
    leaves = [t.requires_grad_() for t in (*x, *w, *a_triple(4, seed=20))]

    def call(*t):
        return w2s_fast.interval_linear_iw(t[:3], t[3:6], t[6:], mode=mode)

    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(call, leaves)


def test_double_backward_is_refused():
    lower, upper = a_box(2, 3)
    weight = random(2, 3, seed=2).requires_grad_()
    low, _ = w2s_fast.interval_linear(lower, upper, weight)
    (grad,) = torch.autograd.grad(low.square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        grad.sum().backward()


X, W = torch.zeros(2, 3), torch.zeros(4, 3)
IMAGE, FILTER = torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 3, 3)
Y = torch.zeros(2, dtype=torch.int64)
ERRORS = [
    (lambda: w2s_fast.interval_linear(X, X[:1], W), ValueError, "b must be of the shape of a (2, 3), got (1, 3)."),
    (lambda: w2s_fast.interval_linear(X, X.double(), W), TypeError, "b must be"),
    (lambda: w2s_fast.interval_linear(X, X, W.t()), ValueError, "weight must be of shape [N, 3]"),
    (lambda: w2s_fast.interval_linear(X, X, W.double()), TypeError, "weight must be of the dtype of a (torch.float32)"),
    (lambda: w2s_fast.interval_linear(X, X, W, X[0]), ValueError, "bias must be of shape [4], got (3,)."),
    (lambda: w2s_fast.interval_linear(X, X, W, form="ul"), ValueError, "form must be one of 'lu', 'cr', got 'ul'."),
    (lambda: w2s_fast.interval_linear(X, X, W, rounding="up"), ValueError, "rounding must be one of"),
    (lambda: w2s_fast.interval_linear(X, X, W, act="gelu"), ValueError, "act must be one of"),
    (lambda: w2s_fast.interval_conv2d(X, X, FILTER), ValueError, "a must be of shape [B, I, H, W]"),
    (lambda: w2s_fast.interval_conv2d(IMAGE, IMAGE, FILTER, groups=2), ValueError, "weight must be of shape"),
    (lambda: w2s_fast.interval_conv2d(IMAGE, IMAGE, FILTER, bn_scale=X), ValueError, "bn_scale must be of shape ["),
    (lambda: w2s_fast.interval_conv2d(IMAGE, IMAGE, FILTER, clean=X), ValueError, "clean must be of the shape of a"),
    (lambda: w2s_fast.interval_conv2d(IMAGE, IMAGE, FILTER, stride=0), ValueError, "stride must be >= 1, got 0."),
    (lambda: w2s_fast.interval_conv2d(IMAGE, IMAGE, FILTER, dilation=3), ValueError, "a must be at least as large"),
    (lambda: w2s_fast.margin_logits(X, X, W, None, Y + 4), ValueError, "y must be in [0, 4), got 4."),
    (lambda: w2s_fast.margin_logits(X, X, W, None, Y.float()), TypeError, "y must be int64 or int32"),
    (lambda: w2s_fast.relu_rows(X, X, X), ValueError, "lower must be of shape (3,), got (2, 3)."),
    (lambda: w2s_fast.relu_rows(X[0], X, X), ValueError, "a must be of shape [M, B, ...], got (3,)."),
    (lambda: w2s_fast.relu_rows(X[None], X, X[:1]), ValueError, "upper must be of the shape of lower (2, 3)"),
    (lambda: w2s_fast.relu_rows(X[None], X.double(), X), TypeError, "must be of the dtype"),
    (lambda: w2s_fast.margin_logits(X, X, W, None, Y, spread=2.0), ValueError, "spread must be"),
    (lambda: w2s_fast.margin_cross_entropy(X, X, W, None, Y[:1]), ValueError, "y must be of shape (2,), got (1,)."),
    (lambda: w2s_fast.interval_affine(X, X, X[0], X[0, :2]), ValueError, "shift must be of shape [3], got (2,)."),
    (lambda: w2s_fast.interval_affine(X[0], X[0], X[0], X[0]), ValueError, "lower must be of shape [B, C, ...]"),
    (lambda: w2s_fast.interval_batchnorm_stats(X[:0]), ValueError, "x must be of shape [B, C, ...] and not empty"),
    (
        lambda: w2s_fast.interval_linear_iw([X] * 2, [W] * 3),
        TypeError,
        "x must be three tensors (lower, middle, upper)",
    ),
    (lambda: w2s_fast.interval_linear_iw([X] * 3, [X.t()] * 3), ValueError, "weight[0] must be of shape [N, 3]"),
    (lambda: w2s_fast.interval_linear_iw([X] * 3, [W] * 3, mode="hull"), ValueError, "mode must be one of"),
    (lambda: w2s_fast.tightness_rows([], None, X), TypeError, "weights must be a nonempty list of tensors"),
    (lambda: w2s_fast.tightness_rows([W], None, X), ValueError, "weights[0] must be of shape [3, K], got (4, 3)."),
    (lambda: w2s_fast.tightness_rows([W], [X, X], X), ValueError, "patterns must be one a weight (1), got 2."),
    (lambda: w2s_fast.fast_reg([], (X, X)), TypeError, "bounds must be a nonempty list of (lower, upper), got list."),
    (lambda: w2s_fast.fast_reg([(X, X[:1])], (X, X)), ValueError, "bounds[0][1] must be of the shape of bounds[0][0]"),
    (lambda: w2s_fast.fast_reg([(X, X)], (X, X), tol=0), ValueError, "tol must be in (0, 1], got 0."),
    (lambda: w2s_fast.margin_cross_entropy(X, X, W, None, Y, reduction="max"), ValueError, "reduction must be one of"),
]


@pytest.mark.parametrize("call, error, text", ERRORS)
def test_errors(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()
