"""CROWN-IBP of IntervalModule: agreement with auto_LiRPA, exact containment, gradients, what it refuses."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s_fast.nn import bound, verify
from w2s_fast.nn.interval import passes
from w2s_fast.nn.interval.backward import relaxation
from w2s_fast.testing import networks
from w2s_fast.testing.networks import MODELS
from w2s_fast.testing.peers import lirpa_bounds


def made(name):
    model, x, y = networks.made(name)
    return model.eval(), x, y


def peer(model, x):
    try:
        return lirpa_bounds(model, x, "CROWN-IBP")
    except ImportError as error:
        pytest.skip(f"auto_LiRPA cannot be imported: {error}")


def differences(y, classes=5):
    """C f = f_y - f_k for every k."""
    one = torch.eye(classes)
    return one[y].unsqueeze(1) - one


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eps", [0.002, 0.05])
def test_agrees_with_auto_lirpa(name, eps):
    model, x, y = made(name)
    theirs, module = peer(model, x), bound(model)
    for rounding, tolerance in (("fast", {"rtol": 1e-4, "atol": 1e-5}), ("sound", {"rtol": 1e-3, "atol": 1e-4})):
        ours = module.bounds(x, eps, rounding, method="crown-ibp")
        for a, b in zip(ours, theirs(x, eps), strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        z = module.margins(x, y, eps, rounding, method="crown-ibp")
        torch.testing.assert_close(z, -theirs(x, eps, differences(y))[0], **tolerance)
        assert bool((z.gather(1, y[:, None]) == 0).all())


@pytest.mark.filterwarnings("ignore")
def test_training_agrees_with_auto_lirpa_gradients_included():
    model, x, y = made("conv")
    twin = made("conv")[0].train()
    theirs, parameters = peer(twin, x), dict(twin.named_parameters())
    z = bound(model.train()).margins(x, y, 0.02, method="crown-ibp")
    other = -theirs(x, 0.02, differences(y))[0]
    torch.testing.assert_close(z, other, rtol=1e-4, atol=1e-5)
    F.cross_entropy(z, y).backward()
    F.cross_entropy(other, y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, parameters[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_one_hidden_layer_is_the_formula():
    torch.manual_seed(1)
    model, x, eps = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double(), torch.rand(4, 6).double(), 0.2
    first, last = model[0], model[2]
    center, radius = first(x), eps * first.weight.abs().sum(1)
    low, high = center - radius, center + radius
    assert bool(((low < 0) & (high > 0)).any() and (low > 0).any() and (high < 0).any())
    upper = torch.zeros(4, 3).double()
    for i in range(4):
        for k in range(3):
            row, constant = torch.zeros(6).double(), last.bias[k]
            for j in range(9):
                w, (a, b) = last.weight[k, j], (low[i, j], high[i, j])
                if b <= 0:
                    continue
                slope, shift = (1.0, 0.0) if a >= 0 else (b / (b - a), -a * b / (b - a))
                if w < 0 and a < 0:
                    slope, shift = (1.0, 0.0) if b > -a else (0.0, 0.0)
                row = row + w * slope * first.weight[j]
                constant = constant + w * (slope * first.bias[j] + shift)
            upper[i, k] = row @ x[i] + eps * row.abs().sum() + constant
    torch.testing.assert_close(bound(model).bounds(x, eps, "fast", method="crown-ibp")[1], upper)


@pytest.mark.parametrize("name", MODELS)
def test_contains_points_of_the_box(name):
    model, x, y = made(name)
    module, eps = bound(model), 0.05
    low, high = module.bounds(x, eps, method="crown-ibp")
    z, clipped = (module.margins(x, y, eps, "sound", clip, "crown-ibp") for clip in (None, (0.0, 1.0)))
    assert bool((clipped <= z + 1e-5).all())
    wide, double = made(name)[0].double(), x.double()
    generator = torch.Generator().manual_seed(0)
    for i in range(100):
        step = 2 * torch.rand(x.shape, generator=generator).double() - 1
        found = wide(double + eps * (step.sign() if i % 2 else step))
        assert bool((found >= low).all() and (found <= high).all())
        assert bool((found - found.gather(1, y[:, None]) <= z).all())


def exact_upper(weights, biases, center, radius):
    """max over |x - center| <= radius of a deep linear network's outputs, in rationals."""
    rows = [[Fraction(int(i == j)) for j in range(len(biases[-1]))] for i in range(len(biases[-1]))]
    constant = [Fraction(0)] * len(rows)
    for weight, bias in zip(reversed(weights), reversed(biases), strict=True):
        w, b = [[Fraction(v) for v in r] for r in weight.tolist()], [Fraction(v) for v in bias.tolist()]
        constant = [c + sum(p * q for p, q in zip(row, b, strict=True)) for c, row in zip(constant, rows, strict=True)]
        rows = [[sum(p * r[j] for p, r in zip(row, w, strict=True)) for j in range(len(w[0]))] for row in rows]
    m, r = [Fraction(v) for v in center.tolist()], [Fraction(v) for v in radius.tolist()]
    return [
        c + sum(p * q + abs(p) * s for p, q, s in zip(row, m, r, strict=True))
        for c, row in zip(constant, rows, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sound_where_round_to_nearest_is_not(dtype):
    """Without ReLUs the bound is the exact maximum, so that one rounding in the wrong direction shows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8), nn.Linear(8, 6)).to(dtype)
    x, eps = torch.randn(5, 12).to(dtype), 0.25  # the radius is exact
    weights, biases = [m.weight for m in model], [m.bias for m in model]
    missed = 0
    sound, fast = (bound(model).bounds(x, eps, rounding, method="crown-ibp")[1] for rounding in ("sound", "fast"))
    for i in range(5):
        exact = exact_upper(weights, biases, x[i], torch.full((12,), eps))
        assert all(Fraction(found) >= true for found, true in zip(sound[i].tolist(), exact, strict=True))
        missed += sum(Fraction(found) < true for found, true in zip(fast[i].tolist(), exact, strict=True))
    assert missed >= 5, "the fast bounds should fail here, or this test has no power"
    torch.testing.assert_close(sound, fast, rtol=1e-6, atol=1e-6)


def test_the_lines_are_above_and_below_exactly():
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 1e-9, 1e-8, 1e-30, 1e-300, 1e30, 1e300], dtype=torch.float64)[:, None]
    lower, upper = -torch.rand(7, 50).double() * scale, torch.rand(7, 50).double() * scale
    lower, upper = torch.cat((lower, lower, upper)), torch.cat((upper, lower * 0.5, upper * 2))
    low, slope, intercept = relaxation(lower, upper, sound=True)
    columns = (v.flatten().tolist() for v in (lower, upper, low, slope, intercept))
    for left, right, a, s, t in zip(*columns, strict=True):
        assert a in (0.0, 1.0)
        for end in (left, right):  # relu is convex: above at both ends is above between them
            assert Fraction(s) * Fraction(end) + Fraction(t) >= max(0, Fraction(end)) >= Fraction(a) * Fraction(end)


def test_overflow_and_nan_bound_nothing():
    model, x, y = made("mlp")
    with torch.no_grad():
        model[1].weight.mul_(1e30)
        model[3].weight.mul_(1e30)
    low, high = bound(model).bounds(x, 0.1, method="crown-ibp")
    assert bool((high == torch.inf).all() and (low == -torch.inf).all())
    assert not verify(model, x, y, 0.1, method="crown-ibp").any()
    model, x, _ = made("mlp")
    x[2, 0, 0, 0] = torch.nan
    low, high = bound(model).bounds(x, 0.1, method="crown-ibp")
    assert bool((high[2] == torch.inf).all() and high[[0, 1, 3]].isfinite().all())


@pytest.mark.parametrize("name", MODELS)
def test_radius_zero_is_the_forward_pass(name):
    model, x, _ = made(name)
    low, high = bound(model).bounds(x, 0.0, "fast", method="crown-ibp")
    torch.testing.assert_close(low, model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(high, model(x), rtol=1e-4, atol=1e-5)


def test_verifies_what_either_bound_does():
    """Margins of a network trained a little: backward bounds are tighter, and the certificate takes the better."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    module = bound(model)
    found = [module.verified(x, y, 0.02, method=method) for method in ("ibp", "crown-ibp")]
    assert bool((found[1] >= found[0]).all()) and found[1].sum() > found[0].sum() > 0
    with torch.no_grad():
        ibp, crown = (module.margins(x, y, 0.02, method=method) for method in ("ibp", "crown-ibp"))
    assert (crown < ibp).double().mean() > 0.45  # half of all margins are the label's own


class Shared(nn.Module):
    """An activation with three users, a sum with itself, and one that is broadcast."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.second = nn.Linear(6, 6), nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.second(h + h + self.one(h))


@pytest.mark.parametrize("rounding", ["fast", "sound"])
def test_shared_activations(rounding):
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(4, 6)
    low, high = bound(model).bounds(x, 0.0, rounding, method="crown-ibp")
    torch.testing.assert_close(low, model(x), rtol=1e-4, atol=1e-5)
    low, high = bound(model).bounds(x, 0.1, rounding, method="crown-ibp")
    inside = model(x + 0.1 * (2 * torch.rand(2000, 4, 6) - 1))
    assert bool((inside >= low - 1e-5).all() and (inside <= high + 1e-5).all())
    loose = bound(model).bounds(x, 0.1, rounding)
    assert bool((high < loose[1]).all()), "the way back sees that the summands are the same"


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1, 0, 2), nn.AdaptiveAvgPool2d(2),
                                  nn.AvgPool2d(3, 2, 1, count_include_pad=False)])  # fmt: skip
def test_pools_that_overlap(pool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), pool, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.rand(3, 1, 6, 6)
    model(x)
    low, high = bound(model).bounds(x, 0.05, method="crown-ibp")
    inside = torch.stack([model(x + 0.05 * (2 * torch.rand_like(x) - 1).sign()) for _ in range(200)])
    assert bool((inside >= low - 1e-6).all() and (inside <= high + 1e-6).all())
    point = bound(model).bounds(x, 0.0, "fast", method="crown-ibp")
    torch.testing.assert_close(point[1], model(x), rtol=1e-5, atol=1e-5)


def test_gradcheck():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model.double()
    module, x, y = bound(model), torch.rand(3, 1, 4, 4).double(), torch.tensor([0, 2, 1])
    names = [name for name, _ in module.named_parameters()]
    before = [b.clone() for b in module.buffers()]

    def margins(x, *values):
        given = dict(zip(names, values, strict=True)) | dict(zip(dict(module.named_buffers()), before, strict=True))
        return torch.func.functional_call(module, given, (x,))

    module.forward = lambda x: module.margins(x, y, 0.05, method="crown-ibp")
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    torch.autograd.gradcheck(margins, (x.requires_grad_(), *values))


@pytest.mark.parametrize("stride, padding, dilation, groups", [(1, 1, 1, 1), (2, 1, 1, 2), (3, 0, 2, 1)])
def test_the_way_through_a_convolution(stride, padding, dilation, groups):
    """One function, and its gradient, are those of the transposed convolution; an autocast around lowers neither."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 10, 11)
    weight, bias = (torch.randn(s, requires_grad=True) for s in ((6, 4 // groups, 3, 3), (6,)))
    out = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    a = torch.randn(3, *out.shape, requires_grad=True)
    rest = [n - F.conv_transpose2d(out, weight, None, stride, padding, 0, groups, dilation).shape[i]
            for i, n in ((2, 10), (3, 11))]  # fmt: skip
    options = [stride] * 2, [padding] * 2, rest, groups, [dilation] * 2
    plain = F.conv_transpose2d(a.flatten(0, 1), weight, None, *options).unflatten(0, a.shape[:2])
    expected = plain, torch.einsum("mbchw,c->mb", a, bias)
    rows, total = passes.conv(a, weight, bias, *options)
    grads = [torch.randn_like(t) for t in expected]
    leaves = (a, weight, bias)
    want = torch.autograd.grad(expected, leaves, grads)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad((rows, total), leaves, grads)
    for got, exact in zip((rows, total, *found), (*expected, *want), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-3)


def test_gradients_under_autocast():
    """Of the way back as of intervals: the same in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    x, y = torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    found = []
    for lowered in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            loss = bound(model).margins(x, y, 0.1, method="crown-ibp").square().sum()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiles_in_one_graph():
    model, x, y = made("conv")
    module = bound(model)
    torch._dynamo.reset()

    def call():
        return module.margins(x, y, 0.01, method="crown-ibp")

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(), call(), rtol=0, atol=0)


def test_one_pass_gives_all():
    model, x, y = made("conv")
    twin = made("conv")[0]
    found = bound(model.train()).propagate(x, 0.03)
    torch.testing.assert_close(found.margins(y), bound(twin.train()).margins(x, y, 0.03))
    before = found.before_relu
    torch.testing.assert_close(found.logits, made("conv")[0].train()(x))
    assert [tuple(low.shape) for low, _ in before] == [(7, 6, 4, 4), (7, 6, 2, 2), (7, 12)]
    assert all(bool((low < 0).any() and (low <= high).all()) for low, high in before)
    found.bounds("crown-ibp"), found.margins(y, "crown-ibp")
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=f"{name}: the clean pass ran once")
    torch.testing.assert_close(found.input_box, (x - 0.03, x + 0.03))
    evaluated = bound(model.eval()).propagate(x, 0.03, clean=True)
    torch.testing.assert_close(evaluated.logits, model(x))


def test_refuses():
    model, x, y = made("pooled")
    with pytest.raises(ValueError, match="method must be one of 'ibp', 'crown-ibp', 'crown', got 'lp'"):
        bound(model).margins(x, y, 0.1, method="lp")
    with pytest.raises((ValueError, IndexError), match="y must"):
        bound(model).margins(x, y + 1, 0.1, method="crown-ibp")
    with pytest.raises(ValueError, match="clean must be True in propagate for logits"):
        _ = bound(model).propagate(x, 0.1).logits
    model[1] = nn.MaxPool2d(2, ceil_mode=True)
    bound(model).bounds(x, 0.1)
    loose, ends = (bound(model).bounds(x, 0.1, method=m) for m in ("ibp", "crown-ibp"))
    assert bool((ends[0] <= model(x)).all() and (ends[1] >= model(x)).all() and loose[0].isfinite().all())
    with pytest.raises(ValueError, match=r"one whose output is \[B, C\] for margins"):
        bound(nn.Sequential(nn.Conv2d(3, 2, 3))).margins(x, y, 0.1, method="crown-ibp")


class Written(nn.Module):
    """Entries of one sample's row are constants, in an order in which samples are not in front."""

    def __init__(self, write) -> None:
        super().__init__()
        self.write, self.a, self.b = write, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.write(self.a(x)))


def _entry(h: Tensor) -> Tensor:
    h.reshape(-1)[3] = 9.0
    return h


def _column(h: Tensor) -> Tensor:
    h[:, 0] += 1
    return h


@pytest.mark.parametrize("write", [
    _entry, _column, lambda h: torch.nn.functional.pad(h.t(), (1, 1), value=5.0)[:, 1:-1].t(),
    lambda h: torch.nn.functional.pad(h, (0, 1), value=5.0)[:, 1:],
    lambda h: torch.cat((h.t(), torch.full((1, len(h)), 2.0)))[1:].t(),
], ids=["entry", "column", "across", "along", "cat"])  # fmt: skip
@pytest.mark.parametrize("method", ["crown-ibp", "crown"])
def test_constants_among_entries_count_for_their_sample(write, method):
    torch.manual_seed(0)
    model, x = Written(write).eval(), torch.randn(7, 4)
    try:
        low, high = bound(model).bounds(x, 0.1, method=method)
    except TypeError as error:
        assert "no sample's among those of several" in str(error)
        return
    with torch.no_grad():
        y = model(x.clone())
    assert bool(((low <= y) & (y <= high)).all())
