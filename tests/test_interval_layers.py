"""Every layer that has a rule, and random models: no point of a ball leaves the bounds, by any method and rounding."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from w2s_fast.nn import Ball, Choices, SparseLowRankLinear, bound, layer_table
from w2s_fast.testing.escapes import FUZZED, Random, escapes, points, seeds
from w2s_fast.testing.selection import amount, sampled

DOCS = Path(__file__).parents[1] / "docs" / "bounds.md"
FLAT, IMAGE, SEQUENCE = (3, 6), (2, 4, 6, 6), (2, 5, 8)


class Of(nn.Module):
    """A function of x as a model, between linear layers."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


class Spread(nn.Module):
    """Twice x, so that a radius of 0.3 crosses kinks and lowest points."""

    def forward(self, x):
        return x * 2.0 - 0.5


def sparse():
    layer = SparseLowRankLinear(6, 5, rank=2, density=0.3)
    nn.init.normal_(layer.B)
    return layer


def uneven(norm):
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.3, 2.0)
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    return norm


ACTIVATIONS = [
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    lambda: nn.LeakyReLU(-0.2),
    lambda: nn.LeakyReLU(1.5),
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Tanh,
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    lambda: nn.Softplus(3.0, 1.0),
    nn.LogSigmoid,
    nn.Softsign,
    nn.Softshrink,
    nn.Hardshrink,
    lambda: nn.Threshold(0.1, 0.7),
    lambda: nn.Threshold(0.1, -0.7),
    nn.Tanhshrink,
    nn.Identity,
    nn.Dropout,
    lambda: nn.Softmax(-1),
    lambda: nn.LogSoftmax(-1),
    lambda: nn.GLU(),
]

LAYERS = {
    f"{i}-{type(make()).__name__}": (lambda make=make: nn.Sequential(Spread(), make()), FLAT)
    for i, make in enumerate(ACTIVATIONS)
}
LAYERS |= {
    "linear": (lambda: nn.Linear(6, 4), FLAT),
    "sparse": (sparse, FLAT),
    "bn1d": (lambda: uneven(nn.BatchNorm1d(6)), FLAT),
    "bn1d on 3-D": (lambda: nn.Sequential(nn.Linear(8, 8), uneven(nn.BatchNorm1d(5)), nn.ReLU()), SEQUENCE),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3, 2, 1), SEQUENCE),
    "conv1d same": (lambda: nn.Conv1d(5, 4, 4, padding="same"), SEQUENCE),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), IMAGE),
    "conv2d dilated": (lambda: nn.Conv2d(4, 2, (3, 2), 1, (2, 1), dilation=2), IMAGE),
    "reflect": (lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), IMAGE),
    "circular": (lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), IMAGE),
    "replicate": (lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="replicate"), IMAGE),
    "conv3d": (lambda: nn.Conv3d(4, 2, 2, padding=1), (2, 4, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, 1), IMAGE),
    "transposed1d": (lambda: nn.ConvTranspose1d(5, 2, 3), SEQUENCE),
    "bn2d": (lambda: uneven(nn.BatchNorm2d(4)), IMAGE),
    "layernorm": (lambda: nn.LayerNorm(8), SEQUENCE),
    "rmsnorm": (lambda: nn.RMSNorm(8, 1e-6), SEQUENCE),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "instancenorm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "maxpool": (lambda: nn.MaxPool2d(3, 2, 1), IMAGE),
    "maxpool ceil": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), IMAGE),
    "maxpool1d": (lambda: nn.MaxPool1d(2), SEQUENCE),
    "avgpool": (lambda: nn.AvgPool2d(3, 2, 1, True), IMAGE),
    "avgpool1d": (lambda: nn.AvgPool1d(2), SEQUENCE),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d(4), IMAGE),
    "adaptive1": (lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    "adaptive max": (lambda: nn.AdaptiveMaxPool2d(2), IMAGE),
    "nearest": (lambda: nn.Upsample(scale_factor=2), IMAGE),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "shuffle": (lambda: nn.PixelShuffle(2), IMAGE),
    "attention": (lambda: Of(lambda x, a: a(x, x, x)[0], nn.MultiheadAttention(8, 2, batch_first=True)), SEQUENCE),
    "attention, no weights": (
        lambda: Of(lambda x, a: a(x, x, x, need_weights=False)[0], nn.MultiheadAttention(8, 2, batch_first=True)),
        SEQUENCE,
    ),
    "causal": (lambda: Of(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), SEQUENCE),
    "masked": (lambda: Of(lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(5).log())), SEQUENCE),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), SEQUENCE),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(6, 4)), FLAT),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), FLAT),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(6, 4)), FLAT),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5), FLAT),
}

FUNCTIONS = {
    "arithmetic": lambda x: 1.0 / (x * x + 2.0) + (x - 0.3) / 0.7 - 2.0 * x,
    "quotient of boxes": lambda x: x / (x.abs() + 1.0),
    "powers": lambda x: x**3 + x.pow(2) + x.square(),
    "roots": lambda x: (x.abs() + 0.1).sqrt() + (x * x + 0.5).rsqrt() + (x.abs() + 1).log() + x.exp(),
    "waves": lambda x: torch.sin(3 * x) + torch.cos(5 * x),
    "where": lambda x: torch.where(x > 0, x * 2, x.tanh()),
    "clamp": lambda x: x.clamp(-0.2, 0.4) + x.clamp(min=0.1) + torch.clamp(x, max=torch.full((6,), 0.3)),
    "two": lambda x: torch.maximum(x, 0.5 - x) + torch.minimum(x, x.flip(1)) + torch.max(x, -x),
    "mean and sum": lambda x: (
        x.mean(1, keepdim=True)
        + x.sum(1, keepdim=True)
        + x.cumsum(1)
        + x.amax(1, keepdim=True)
        + x.max(1, keepdim=True)[0]
    ),
    "shapes": lambda x: (
        x.view(x.shape[0], 2, -1).permute(0, 2, 1).reshape(-1, 6).unsqueeze(1).squeeze(1).contiguous()
        + x.view(x.size(0), 3, 2).transpose(1, 2).flatten(1)
    ),
    "slices": lambda x: torch.cat([x[:, :2], x[..., 2:3], torch.stack([x[:, i] for i in (5, 4, 3)], 1)], dim=1),
    "split": lambda x: sum(p * (i + 1.0) for i, p in enumerate(x.chunk(3, 1))) + x.split([2, 4], 1)[0],
    "indices": lambda x: x[:, [0, 3, 3]] + x.index_select(1, torch.tensor([1, 1, 2])),
    "roll, expand, repeat": lambda x: x.roll(1, 1) + x[:, :1].expand(-1, 6) + x[:, :2].repeat(1, 3),
    "matmul of boxes": lambda x: x.view(-1, 2, 3) @ x.view(-1, 3, 2),
    "einsum": lambda x: torch.einsum("bi,ij->bj", x, torch.linspace(-1, 1, 18, dtype=x.dtype).view(6, 3)),
    "einsum of boxes": lambda x: torch.einsum("bij,bkj->bik", x.view(-1, 2, 3), x.view(-1, 2, 3)),
    "padding": lambda x: F.pad(x, (1, 2), value=0.4) + F.pad(x.unsqueeze(1), (2, 1), mode="reflect").squeeze(1),
    "assignment": lambda x: _assigned(x),
    "masked_fill": lambda x: x.masked_fill(torch.tensor([True, False] * 3), 0.3),
    "relu6 at both bends": lambda x: F.relu6(x * 9.0),
    "weights of x": lambda x: F.linear(x, x),
    "a bias of x": lambda x: F.linear(x, torch.linspace(-1, 1, 18, dtype=x.dtype).view(3, 6), x[0, :3]),
    "a constant by x": lambda x: F.linear(torch.linspace(-1, 1, 18, dtype=x.dtype).view(3, 6), x),
    "a constant over x": lambda x: torch.div(torch.linspace(-1, 1, 6, dtype=x.dtype), x.abs() + 1),
    "powers in place": lambda x: (x * 1.0).pow_(2),
    "comparisons": lambda x: (x > 0) * x + (x > 0.1).to(x.dtype).sum(1, keepdim=True),
    "rounding": lambda x: x.round(decimals=1),
}


def _assigned(x):
    h = x * 1.0
    h[:, 0] = 0.5
    h[:, 1:3] = x[:, 3:5] * 2
    h[:, 4].mul_(-1.0)
    view = h.view(-1)
    view += 0.25
    return h


LAYERS |= {name: (lambda f=f: Of(f), FLAT) for name, f in FUNCTIONS.items()}
ONCE_WRONG = ("relu6 at both bends", "weights of x", "a bias of x", "a constant by x")


def made(name, dtype):
    torch.manual_seed(sum(map(ord, name)))
    make, shape = LAYERS[name]
    model = make()
    return (model if dtype == torch.float32 else model.to(dtype)).eval(), torch.randn(shape).to(dtype)


def exact(name, dtype):
    """The same model, its parameters exactly those of ``dtype``, in float64."""
    return made(name, dtype)[0].double()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", dict.fromkeys((*ONCE_WRONG, *sampled(LAYERS, 45))))
def test_no_point_leaves_the_bounds_of_a_layer(name):
    for dtype in sampled((torch.float32, torch.float64), 1, seed=len(name)):
        model, x = made(name, dtype)
        module, wide = bound(model), exact(name, dtype)
        for eps in (0.3, 1e-4):
            inside = points(x, eps, amount(30, 500), torch.Generator().manual_seed(0))
            for method in ("ibp", "crown-ibp", "crown"):
                for rounding, slack in (("sound", 0.0), ("fast", 1e-5)):
                    found = module.bounds(x, eps, rounding, method=method)
                    assert escapes(found, wide, inside, slack) == (0, pytest.approx(0, abs=math.inf)), (
                        method,
                        rounding,
                    )
        low, high = module.bounds(x, 0.0, "fast")
        torch.testing.assert_close(low, model(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(high, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed, images", sampled(seeds(60), 12))
def test_no_point_leaves_the_bounds_of_a_random_model(seed, images):
    """Shared modules, nested containers, views and in-place operations; every method and rounding."""
    model = Random(seed, images).eval()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((2, 3, 4, 4) if images else (4, 3), generator=generator)
    eps, wide, module = (1e-5, 0.03, 0.3)[seed % 3], copy.deepcopy(model).double(), bound(model)
    inside = points(x, eps, amount(20, 400), generator)
    for method in ("ibp", "crown-ibp", "crown"):
        for rounding, slack in (("sound", 0.0), ("fast", 1e-5)):
            found = module.bounds(x, eps, rounding, method=method)
            assert found[0].isfinite().all()
            assert escapes(found, wide, inside, slack)[0] == 0, (method, rounding, model.plan)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_balls(norm, method):
    torch.manual_seed(0)
    models = {
        (2, 6): nn.Sequential(Of(lambda x: (x - 0.3) / 0.5), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        (2, 2, 5, 5): nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(75, 3)
        ),
    }
    for shape, model in models.items():
        model.eval()
        x = torch.rand(shape)
        inside = points(x, 0.4, 300, torch.Generator().manual_seed(0), norm)
        ball = bound(model).bounds(x, 0.4, method=method, norm=norm)
        box = bound(model).bounds(x, 0.4, method=method)
        assert escapes(ball, copy.deepcopy(model).double(), inside)[0] == 0
        assert float((ball[1] - ball[0]).mean()) < 0.8 * float((box[1] - box[0]).mean())


MIXED = {
    "t": (lambda x: x.t(), 2), "one row": (lambda x: x.reshape(1, -1), 8), "flatten": (lambda x: x.flatten(), 8),
    "permute": (lambda x: x.reshape(2, 2, 2).permute(1, 0, 2).flatten(1), 4),
    "transpose": (lambda x: x.reshape(2, 2, 2).transpose(0, 1).flatten(1), 4),
    "select": (lambda x: x.reshape(2, 2, 2)[:, 0].t(), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("norm", [1, 2])
def test_a_ball_is_of_one_sample(name, norm):
    """Where entries of two samples meet, each may be anywhere in a ball of its own."""
    move, width = MIXED[name]
    head = nn.Linear(width, 1)
    nn.init.ones_(head.weight)
    model, x = nn.Sequential(Of(move), head).eval(), torch.zeros(2, 4)
    high = bound(model).bounds(x, 1.0, norm=norm)[1]
    for place in itertools.product(range(4), repeat=2):  # each sample at a corner of its 1-ball
        point = torch.zeros(2, 4)
        point[0, place[0]] = point[1, place[1]] = 1.0
        assert bool((model(point) <= high).all())
    assert bool((model(torch.full((2, 4), 0.5 if norm == 2 else 0.25)) <= high).all())


def test_an_unbatched_convolution_mixes_what_a_ball_takes_for_samples():
    layer = nn.Conv2d(2, 1, 1)
    nn.init.ones_(layer.weight)
    high = bound(layer.eval()).bounds(torch.zeros(2, 1, 1), 1.0, norm=2)[1]
    assert bool((layer(torch.ones(2, 1, 1)) <= high).all())


@pytest.mark.parametrize("join", ["cat", "stack"])
def test_a_constant_that_is_computed_is_rounded_outward(join):
    torch.manual_seed(0)

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(3) / 3), nn.Parameter(torch.rand(3) / 7)

        def forward(self, x):
            parts = (x, (self.a * self.b).expand(2, 3))
            return torch.cat(parts, 1) if join == "cat" else torch.stack(parts, 1).flatten(1)

    model = Joined().eval()
    low, high = bound(model).bounds(torch.zeros(2, 3), 0.1)
    exact = copy.deepcopy(model).double()(torch.zeros(2, 3, dtype=torch.float64))
    assert bool(((low.double() <= exact) & (exact <= high.double())).all())


def test_the_ball_of_a_linear_layer_is_exact():
    layer, x = nn.Linear(5, 4).double(), torch.randn(3, 5).double()
    for norm, dual in ((1, math.inf), (2, 2)):
        low, high = bound(layer).bounds(x, 0.7, "fast", norm=norm)
        radius = 0.7 * torch.linalg.vector_norm(layer.weight, dual, 1)
        torch.testing.assert_close(low, layer(x) - radius)
        torch.testing.assert_close(high, layer(x) + radius)


def test_words_that_may_be_substituted():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(20, 6), Of(lambda x: x.mean(1)), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)
    ).eval()
    options, y = torch.randint(0, 20, (3, 4, 3)), torch.tensor([0, 1, 1])
    for method in ("ibp", "crown-ibp", "crown"):
        low, high = bound(model).bounds(Choices(options), method=method)
        for _ in range(100):
            ids = options.gather(2, torch.randint(0, 3, (3, 4, 1))).squeeze(2)
            found = copy.deepcopy(model).double()(ids)
            assert bool((found >= low).all() and (found <= high).all())
        assert bound(model).verified(Choices(options), y, method=method).shape == (3,)
    same = Choices(options[..., :1].expand(-1, -1, 3))
    torch.testing.assert_close(bound(model).bounds(same, rounding="fast")[0], model(same.clean))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, a, b):
        return torch.relu(self.first(a)) * self.second(b)


def test_several_inputs():
    model, a, b = Two().eval(), torch.randn(6, 4), torch.randn(6, 3)
    module, wide = bound(model), copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    first, second = points(a, 0.1, 200, generator), points(b, 0.2, 200, generator)
    for method in ("ibp", "crown-ibp", "crown"):
        low, high = module.bounds((Ball(a, 0.1), Ball(b, 0.2)), method=method)
        for p, q in zip(first, second, strict=True):
            assert bool((wide(p, q) >= low).all() and (wide(p, q) <= high).all())
        low, high = module.bounds((Ball(a, 0.1), b), method=method)
        assert bool((wide(first[0], b.double()) <= high).all())
    torch.testing.assert_close(module(a, b, eps=0.1)[0], module.bounds((a, b), 0.1)[0])


def test_the_table_of_layers_is_what_there_is():
    table = layer_table()
    assert "| ReLU | interval | linear |" in table and "| softmax | interval | interval |" in table
    assert "| Conv1d | interval | linear |" in table
    assert table in DOCS.read_text(encoding="utf-8")


def test_the_documents_quote_the_last_fuzz():
    found = json.loads((DOCS.parents[1] / "bench/results/bounds-fuzz.json").read_text(encoding="utf-8"))
    rows = found["rows"]
    assert found["escaped"] == sum(row["escaped"] for row in rows) == 0 and found["distinct"] >= 10**6
    kinds = {(row["method"], row["rounding"], row["dtype"]) for row in rows}
    for dtype, (_, roundings) in FUZZED.items():
        assert {(m, r, dtype) for m in ("ibp", "crown-ibp", "crown") for r in roundings} <= kinds
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert f"{found['distinct']:,} points of {found['models']} models, {found['escaped']} outside" in text


@pytest.mark.parametrize("make, text", [
    (lambda: Of(lambda x: F.avg_pool2d(x, 2, divisor_override=-3)), "a negative divisor_override"),
    (lambda: Of(lambda x: F.conv2d(x, x[:, :, :3, :3])), "conv2d whose weight depends on the input"),
    (lambda: Of(lambda x: F.batch_norm(x, x[0, :, 0, 0], x[0, :, 0, 0])), "batch_norm whose running_mean depends on"),
    (lambda: Of(lambda x: (x > 0) & (x < 1)), "__and__"),
    (lambda: Of(lambda x: ((x > 0) + (x > 1)).to(x.dtype)), r"add of torch\.bool"),
    (lambda: Of(_foreach), "_foreach_mul"),
])  # fmt: skip
def test_refuses_by_name(make, text):
    with pytest.raises(TypeError, match=text):
        bound(make().eval()).bounds(torch.rand(IMAGE), 0.1)


def _foreach(x):
    h = x * 1.0
    torch._foreach_mul_([h], 2.0)
    return h


def test_statistics_of_a_batch_are_no_sound_bound():
    """Also those of a batch-norm without running ones in eval mode."""
    model, x = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)).eval(), torch.randn(IMAGE)
    for rounding in ("sound", "deployed"):
        with pytest.raises(ValueError, match="model must be in eval mode for sound bounds, got batch-norm by the stat"):
            bound(model).bounds(x, 0.1, rounding)
    assert bound(model).bounds(x, 0.1, "fast")[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_eps_of_a_norm_of_16_bits(dtype):
    model, x = nn.RMSNorm(8).to(dtype).eval(), (torch.randn(4, 8) * 1e-2).to(dtype)
    low, high = bound(model).bounds(x, 0.0)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    assert bool((low.double() <= exact).all() and (exact <= high.double()).all())
    torch.testing.assert_close(low, model(x), rtol=2e-2, atol=1e-2)


def test_nothing_is_known_of_a_softmax_without_entries():
    def function(x):
        return x.masked_fill(torch.tensor([[True] * 6, [False] * 6, [False] * 6]), -torch.inf).softmax(1)

    low, high = bound(Of(function)).bounds(torch.randn(FLAT), 0.1)
    assert bool((low[0] == -torch.inf).all() and (high[0] == torch.inf).all() and low[1:].isfinite().all())


@pytest.mark.parametrize("rounding", ["sound", "fast"])
def test_a_copy_into_another_dtype_is_rounded_outward(rounding):
    """Entries of float64 copied into a part of a tensor of float32."""

    def function(x, own):
        h = torch.zeros(x.shape)
        h[:, :3] = (x.double() * own)[:, :3]
        h[:, 3:].copy_(x.double()[:, 3:] / 3)
        return h

    x, third = torch.randn(FLAT), torch.tensor(1 / 3, dtype=torch.float64)
    model = Of(function)
    model.register_buffer("own", third)
    model.function = lambda x, m=model: function(x, m.own)
    low, high = bound(model).bounds(x, 0.0, rounding)
    exact = x.double() / 3
    slack = 0.0 if rounding == "sound" else 1e-6
    assert bool((low.double() <= exact + slack).all() and (exact - slack <= high.double()).all())


@pytest.mark.parametrize("rows", [1, 2])
def test_samples_that_are_joined_for_a_while(rows):
    """Two samples a row are still in order."""
    model = nn.Sequential(nn.Linear(4, 4), Of(lambda x: x.view(rows, -1).relu().view(4, 4)), nn.Linear(4, 3)).eval()
    apart = nn.Sequential(model[0], nn.ReLU(), model[2])
    x = torch.randn(4, 4)
    for rounding in ("fast", "sound"):
        found, wanted = (bound(m).bounds(x, 0.3, rounding, method="crown-ibp") for m in (model, apart))
        torch.testing.assert_close(found, wanted)


def test_a_part_that_is_filled_with_a_number_of_the_input():
    def function(x):
        h = x * 1.0
        h[:, 0].fill_(x.sum())
        return h

    x, model = torch.randn(FLAT), Of(function)
    found = bound(model).bounds(x, 0.1)
    assert escapes(found, model, points(x, 0.1, 100, torch.Generator().manual_seed(0)))[0] == 0


def nets():
    conv = nn.Conv2d

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), conv(c, 4, 3, padding=1)) for c in (4, 8)
            )
            self.first, self.last = conv(1, 4, 3, padding=1), nn.Linear(12, 5)

        def forward(self, x):
            x = self.first(x)
            for layer in self.layers:
                x = torch.cat((x, layer(x)), 1)
            return self.last(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.token = conv(1, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
            self.places = nn.Parameter(torch.randn(1, 5, 8))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")
                for _ in range(2)
            )
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.places
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    return {"dense": Dense, "vit": ViT}


@pytest.mark.parametrize("name", ["dense", "vit"])
def test_dense_nets_and_a_small_transformer(name):
    torch.manual_seed(0)
    model, x = nets()[name]().eval(), torch.rand(3, 1, 8, 8)
    module, wide = bound(model), copy.deepcopy(model).double()
    for eps in (1e-4, 0.01):
        inside = points(x, eps, 40, torch.Generator().manual_seed(0))
        for method in ("ibp", "crown-ibp"):
            found = module.bounds(x, eps, method=method)
            assert escapes(found, wide, inside)[0] == 0 and found[0].isfinite().all()
    assert bool(module.verified(x, model(x).argmax(1), 1e-7).any())
