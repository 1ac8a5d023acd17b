"""rounding="deployed": no floating-point evaluation of the model lies outside, in any order of sums; sound ones do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from w2s_fast.nn import bound, verify
from w2s_fast.testing.orders import AnyOrder
from w2s_fast.testing.selection import FULL, sampled

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
METHODS = ("ibp", "crown-ibp", "crown")


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.n = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.b(F.leaky_relu(self.n(self.a(x)), 0.1)))


class Normalised(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.tensor([0.49, 0.31])[:, None, None])
        self.register_buffer("std", torch.tensor([0.21, 0.35])[:, None, None])

    def forward(self, x):
        return self.inner((x - self.mean) / self.std * 1.1)


def mlp(g, k=70):
    return nn.Sequential(nn.Linear(k, 33), nn.ReLU(), nn.Linear(33, 17), nn.Hardtanh(-0.3, 2.1), nn.Linear(17, 5))


def conv_net(g):
    return Normalised(nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Residual(4), nn.MaxPool2d(2),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ))  # fmt: skip


def pooled(g):
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


NETS = {"mlp": (mlp, (70,)), "conv": (conv_net, (2, 16, 16)), "pooled": (pooled, (2, 9, 9))}


def made(name: str, seed: int, dtype: torch.dtype):
    """A network of large weights that cancel, its inputs, and what chance is left."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    make, shape = NETS[name]
    model, x = make(g).eval(), torch.randn(3, *shape, generator=g) * 10 ** float(torch.randint(-2, 2, (), generator=g))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for t in (module.running_mean, module.weight, module.bias):
                    t.copy_(torch.randn(t.shape, generator=g))
                module.running_var.uniform_(0.1, 3, generator=g)
            elif hasattr(module, "weight") and seed % 2:
                w = module.weight.flatten(1)  # pairs that cancel: the order of sums decides what is left
                w[:, 1::2] = -w[:, 0::2][:, : w[:, 1::2].shape[1]] * (1 + 1e-4 * torch.rand((), generator=g))
    return model.to(dtype), x.to(dtype), g


def points(x, eps, g):
    corner = torch.where(torch.rand(x.shape, generator=g) < 0.5, -eps, eps)
    return [x, (x.double() + corner).to(x.dtype), (x.double() + corner * torch.rand(x.shape, generator=g)).to(x.dtype)]


def outside(found, y):
    low, high = found
    return int(((y < low) | (y > high)).sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*DTYPES, "autocast"])
@pytest.mark.parametrize("name", NETS)
def test_no_evaluation_is_outside(name, kind, method):
    dtype = DTYPES.get(kind, torch.float32)
    for seed in range(40 if FULL else 2):
        model, x, g = made(name, seed, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"), torch.no_grad():
            for eps in (0.0, 1e-3 * float(x.abs().max())):
                found = bound(model).bounds(x, eps, "deployed", method=method)
                for point in points(x, eps, g):
                    inside = (point.double() - x.double()).abs() <= eps
                    point = torch.where(inside, point, x)
                    assert outside(found, model(point)) == 0
                    for _ in range(20 if FULL else 3):
                        with AnyOrder(g):
                            y = model(point)
                        assert outside(found, y) == 0, (seed, eps)


def order_dependent(k: int):
    """f_0 = 2^24 + 1 + ... + 1 - 2^24 = k, of which float32 loses what is added to 2^24; f_1 = k / 2."""
    model = nn.Sequential(nn.Linear(k + 2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.stack((torch.ones(k + 2), torch.zeros(k + 2))))
        model[0].weight[0, 0], model[0].weight[0, -1] = 2.0**24, -(2.0**24)
        model[0].bias.copy_(torch.tensor([0.0, k / 2]))
        model[2].weight.copy_(torch.eye(2))
        model[2].bias.zero_()
    return model, torch.ones(1, k + 2)


def test_a_thousand_parentheses():
    """Sound bounds certify what a deployed network does not always say; deployed ones never do."""
    g = torch.Generator().manual_seed(0)
    model, x = order_dependent(300)
    y = torch.tensor([0])
    assert bool(verify(model, x, y, 0.0)) and not bool(verify(model, x, y, 0.0, rounding="deployed"))
    sound, found = (bound(model).bounds(x, 0.0, rounding) for rounding in ("sound", "deployed"))
    margin = bound(model).margins(x, y, 0.0, "deployed")[0, 1]
    escaped = wrong = 0
    with torch.no_grad(), AnyOrder(g):
        for _ in range(1000):
            f = model(x)
            escaped += outside(sound, f) > 0
            wrong += bool(f[0, 1] >= f[0, 0])
            assert outside(found, f) == 0
            assert f[0, 1].double() - f[0, 0].double() <= margin.double()
    assert escaped > 200 and wrong > 100


@pytest.mark.parametrize("kind", [*DTYPES, "autocast"])
def test_margins_and_certificates(kind):
    dtype = DTYPES.get(kind, torch.float32)
    for seed in range(30 if FULL else 3):
        model, x, g = made("mlp", seed, dtype)
        y = torch.randint(5, (3,), generator=g)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"), torch.no_grad():
            b = bound(model)
            for method in METHODS:
                z = b.margins(x, y, 0.0, "deployed", method=method).double()
                C = F.one_hot(torch.arange(5))[None].to(dtype) - F.one_hot(y, 5)[:, None].to(dtype)
                _, high = b.propagate(x, 0.0, "deployed").specified(C, method)
                sure = b.verified(x, y, 0.0, method=method, rounding="deployed")
                for _ in range(5):
                    with AnyOrder(g):
                        f = model(x).double()
                    difference = f - f.gather(1, y[:, None])
                    assert bool((difference <= z).all() and (difference <= high.double()).all())
                    others = difference.scatter(1, y[:, None], -math.inf)
                    assert bool((others.amax(1) < 0)[sure].all())


@pytest.mark.parametrize("norm", [1, 2])
def test_balls(norm):
    for seed in range(1, 4):
        model, x, g = made("conv", seed, torch.float32)
        found = bound(model).bounds(x, 0.0, "deployed", norm=norm)
        with torch.no_grad(), AnyOrder(g):
            assert sum(outside(found, model(x)) for _ in range(10)) == 0


def test_widens_little():
    """Of float32 networks."""
    for name in ("mlp", "pooled"):
        model, x, _ = made(name, 2, torch.float32)
        b = bound(model)
        (lo, hi), (low, high) = (b.bounds(x, 0.01, r) for r in ("sound", "deployed"))
        assert bool((low <= lo).all() and (high >= hi).all())
        assert float(((high - low) / (hi - lo)).max()) < 1.01


def test_specifications_of_16_bit_logits():
    """Each logit is rounded to 16 bits, their difference is not."""
    model = nn.Sequential(nn.Linear(1, 2)).to(torch.bfloat16).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[257.0], [255.0]]))
        model[0].bias.copy_(torch.tensor([0.1, -0.2]))
    x = torch.linspace(1, 2, 50, dtype=torch.bfloat16)[:, None]
    C = torch.tensor([[[1.0, -1.0]]], dtype=torch.bfloat16)
    f = model(x).double()
    for method in METHODS:
        low, high = (t.double()[:, 0] for t in bound(model).propagate(x, 0.0, "deployed").specified(C, method))
        assert bool(((low <= f[:, 0] - f[:, 1]) & (f[:, 0] - f[:, 1] <= high)).all())


def test_a_last_operation_that_overflows():
    model, x = nn.Sequential(nn.AdaptiveAvgPool2d(1)).eval(), torch.full((1, 1, 32, 32), 100.0, dtype=torch.float16)
    for method in METHODS:
        assert bool(bound(model).bounds(x, 0.0, "deployed", method=method)[1].isinf().all())
    assert bool(bound(model).bounds(x / 10, 0.0, "deployed")[1].isfinite().all())


def test_dead_units_stay_dead():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    nn.init.constant_(model[0].bias, -100.0)
    found = bound(model).propagate(torch.zeros(1, 3), 0.1, "deployed")
    found.bounds()
    hidden = found.before_relu[0]
    assert bool((hidden[1] < 0).all())
    low, high = bound(nn.Sequential(model[0], nn.ReLU()).eval()).bounds(torch.zeros(1, 3), 0.1, "deployed")
    assert not bool(low.any() or high.any())


def test_overflow_is_unknown():
    """Partial sums of 6e38 overflow where the whole sum does not; a clamp makes nothing known of it again."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Hardtanh(0, 1), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3e38, 3e38, -3e38]]))
    x = torch.ones(1, 3)
    low, high = bound(model).bounds(x, 0.0, "deployed")
    assert bool((low == -math.inf).all() and (high == math.inf).all())
    assert not bool(verify(model, x, torch.tensor([0]), 0.0, rounding="deployed"))
    half = nn.Sequential(nn.AdaptiveAvgPool2d(1)).eval()  # its sum leaves float16
    low, high = bound(half).bounds(torch.full((1, 1, 32, 32), 100.0, dtype=torch.float16), 0.0, "deployed")
    assert bool(high.isinf().all())


def test_refusals():
    b = bound(nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)).eval())
    with pytest.raises(ValueError, match=r"1: GELU.*analysed for.*linear"):
        b.bounds(torch.zeros(1, 3), 0.1, "deployed")
    b.bounds(torch.zeros(1, 3), 0.1)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))).eval()
    with pytest.raises(ValueError, match="a constant that is computed"):
        bound(model).bounds(torch.zeros(1, 3), 0.1, "deployed")
    with pytest.raises(ValueError, match="for a certificate"):
        bound(model).verified(torch.zeros(1, 3), torch.tensor([0]), 0.1, rounding="fast")
    long = nn.Linear(1 << 23, 1).eval()
    with pytest.raises(ValueError, match="sums of this length"):
        bound(long).bounds(torch.zeros(1, 1 << 23), 0.1, "deployed")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ValueError, match="fp32_precision"):
            bound(nn.Linear(3, 2).eval()).bounds(torch.zeros(1, 3), 0.1, "deployed")
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradients_are_those_of_fast_rounding():
    torch.manual_seed(0)
    model, x, y = mlp(None), torch.randn(6, 70), torch.arange(6) % 5
    grads = []
    for rounding in ("fast", "deployed"):
        loss = F.cross_entropy(bound(model).margins(x, y, 0.01, rounding), y)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


class Of(nn.Module):
    def __init__(self, function, *layers, **buffers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.function(self, x)


def points_of_layers():
    """Single layers and short chains, whose boxes of a point are as narrow as rounding allows."""
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(shape, generator=g)

    first = lambda m, x: m.layers[0](x)  # noqa: E731
    return {
        "linear": (Of(lambda m, x: m.layers[0](x).relu(), nn.Linear(40, 7)), r(3, 5, 40)),
        "bias": (Of(lambda m, x: m.layers[0](x) + m.b, nn.Linear(40, 7), b=r(7) * 1e3), r(3, 40)),
        "groups": (Of(first, nn.Conv2d(4, 8, 3, groups=2, padding=1)), r(2, 4, 8, 8)),
        "conv1d": (Of(first, nn.Conv1d(4, 6, 3, stride=2)), r(2, 4, 11)),
        "conv3d": (Of(first, nn.Conv3d(2, 3, 2)), r(2, 2, 4, 4, 4)),
        "scalars": (Of(lambda m, x: 0.3 - (x * 1.1 - 0.7) / 3.0), r(3, 9)),
        "alpha": (Of(lambda m, x: torch.add(x, m.layers[0](x), alpha=0.3), nn.Linear(9, 9)), r(3, 9)),
        "mean": (Of(lambda m, x: m.layers[0](x.mean((2, 3))), nn.Linear(4, 3)), r(2, 4, 9, 9)),
        "two": (Of(lambda m, x: m.layers[0](x) @ x.transpose(1, 2), nn.Linear(6, 6)), r(2, 5, 6)),
        "matmul": (Of(lambda m, x: m.w @ x, w=r(4, 5)), r(2, 5, 6)),
        "hardtanh": (Of(lambda m, x: F.hardtanh(m.layers[0](x), -0.1, 0.3), nn.Linear(9, 9)), r(3, 9)),
        "leaky": (Of(lambda m, x: F.leaky_relu(m.layers[0](x), 0.123), nn.PReLU(9)), r(3, 9)),
        "cat": (Of(lambda m, x: torch.cat((x, m.layers[0](x)), 1), nn.Linear(9, 4)), r(3, 9)),
        "gate": (Of(lambda m, x: torch.mul(*m.layers[0](x).chunk(2, -1)), nn.Linear(9, 8)), r(3, 9)),
        "addmm": (Of(lambda m, x: torch.addmm(m.b, x, m.w), b=r(4), w=r(9, 4)), r(3, 9)),
        "huge": (Of(lambda m, x: m.layers[0](x * 3e4), nn.Linear(9, 9)), r(3, 9)),
    }


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "auto bfloat16", "auto float16"])
def test_the_box_of_a_point_holds_every_evaluation(kind):
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    dtype, auto = DTYPES[kind.split()[-1]], kind.startswith("auto")
    for name, (model, x) in sampled(points_of_layers().items(), 6, seed=len(kind)):
        model = model.eval().to(torch.float32 if auto else dtype)
        x = x.to(torch.float32 if auto else dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=auto):
            found = [model(x), torch.cat([model(x[i : i + 1]) for i in range(len(x))])]
            with torch.backends.mkldnn.flags(enabled=False):
                found.append(model(x))
            with AnyOrder(g):
                found += [model(x) for _ in range(3)]
            for method in ("ibp", "crown-ibp"):
                bounds = bound(model).bounds(x, 0.0, "deployed", method=method)
                assert [outside(bounds, y) for y in found] == [0] * len(found), (name, method)


def test_a_transposed_convolution_may_be_summed_in_16_bits():
    model = nn.ConvTranspose2d(4, 3, 3).to(torch.bfloat16).eval()
    with pytest.raises(ValueError, match="transposed convolution"):
        bound(model).bounds(torch.zeros(1, 4, 5, 5, dtype=torch.bfloat16), 0.1, "deployed")


def test_margins_of_one_layer_under_autocast():
    """Autocast rounds the operands of a layer that is the first and the last."""
    g = torch.Generator().manual_seed(0)
    model, x, y = nn.Linear(50, 4).eval(), torch.randn(20, 50, generator=g), torch.zeros(20, dtype=torch.int64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        f = model(x).double()
        for method in METHODS:
            z = bound(model).margins(x, y, 0.0, "deployed", method=method).double()
            assert bool((f - f[:, :1] <= z).all())
            C = (torch.eye(4)[None, 1:] - torch.eye(4)[:1][None]).expand(20, -1, -1)
            high = bound(model).propagate(x, 0.0, "deployed").specified(C, method)[1].double()
            assert bool((f[:, 1:] - f[:, :1] <= high).all())


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="PyTorch without NNPACK")
def test_refuses_convolutions_by_winograds_algorithm():
    """Whose rounding errors are those of numbers that the output does not depend on."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(8, 8, 3, padding=1).eval(), torch.randn(16, 8, 32, 32)
    x[:, :, 16, 16] = 1e8
    low, high = bound(model).bounds(x, 0.0, "deployed")
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        own = torch._C._select_conv_backend(x, model.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, None).name
        if own != "NnpackSpatial":
            pytest.skip(f"PyTorch takes {own} here")
        y = model(x)
        assert bool(((y < low) | (y > high)).any())
        with pytest.raises(ValueError, match="convolutions that are sums of products, got NnpackSpatial"):
            bound(model).bounds(x, 0.0, "deployed")
