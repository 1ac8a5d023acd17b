"""IntervalModule: agreement with auto_LiRPA and with hand-written bounds, training, what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from w2s_fast.nn import IntervalModule, bound, verify
from w2s_fast.testing.networks import made
from w2s_fast.testing.peers import lirpa_bounds

MODELS = ("mlp", "conv", "residual")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eps", [0.001, 0.05])
def test_agrees_with_auto_lirpa(name, eps):
    model, x, _ = made(name)
    model.eval()
    try:
        theirs = lirpa_bounds(model, x)(x, eps)
    except ImportError as error:
        pytest.skip(f"auto_LiRPA cannot be imported: {error}")
    for ours, other in zip(bound(model).bounds(x, eps, "fast"), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    low, high = bound(model).bounds(x, eps, "sound")
    torch.testing.assert_close(low, theirs[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(high, theirs[1], rtol=1e-3, atol=1e-4)


def by_hand(model, lower, upper, clean):
    """Bounds of a Sequential of Linear, Conv2d, BatchNorm in training mode, ReLU and Flatten, layer by layer."""
    for layer in model:
        m, r = (lower + upper) / 2, (upper - lower) / 2
        if isinstance(layer, nn.Linear):
            m, r, clean = F.linear(m, layer.weight, layer.bias), F.linear(r, layer.weight.abs()), layer(clean)
        elif isinstance(layer, nn.Conv2d):
            options = layer.stride, layer.padding
            m, r = F.conv2d(m, layer.weight, layer.bias, *options), F.conv2d(r, layer.weight.abs(), None, *options)
            clean = layer(clean)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            axes = [0, *range(2, clean.ndim)]
            mean, variance = clean.mean(axes, keepdim=True), clean.var(axes, correction=0, keepdim=True)
            s = (layer.weight.reshape(mean.shape)) / (variance + layer.eps).sqrt()
            shift = layer.bias.reshape(mean.shape) - mean * s
            m, r, clean = m * s + shift, r * s.abs(), clean * s + shift
        if isinstance(layer, (nn.ReLU, nn.Flatten)):
            plain = F.relu if isinstance(layer, nn.ReLU) else layer
            lower, upper, clean = plain(lower), plain(upper), plain(clean)
        else:
            lower, upper = m - r, m + r
    return lower, upper


def test_training_mode_takes_the_statistics_of_the_clean_pass():
    model, x, _ = made("conv")
    model.double().train()
    x = x.double()
    results = []
    for bounds in (lambda: bound(model).bounds(x, 0.02, "fast"), lambda: by_hand(model, x - 0.02, x + 0.02, x)):
        low, high = bounds()
        results.append([low, high, *torch.autograd.grad(low.square().sum() + high.sum(), list(model.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_running_statistics_come_from_the_clean_pass_once():
    model, x, _ = made("conv")
    twin, _, _ = made("conv")
    bound(model.train()).bounds(x, 0.1, "fast")
    twin.train()(x)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_eps_zero_is_the_forward_pass(name):
    model, x, y = made(name)
    model.eval()
    low, high = bound(model).bounds(x, 0.0, "fast")
    torch.testing.assert_close(low, model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low, high, rtol=1e-5, atol=1e-6)
    z = bound(model).margins(x, y, 0.0)
    f = model(x)
    torch.testing.assert_close(z, f - f.gather(1, y[:, None]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.cross_entropy(z, y), F.cross_entropy(f, y), rtol=1e-4, atol=1e-5)


def test_uses_the_parameters_of_the_model():
    model, x, y = made("mlp")
    module = bound(model)
    assert [p.data_ptr() for p in module.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert list(module.state_dict()) == [f"model.{name}" for name in model.state_dict()]
    before = module.bounds(x, 0.1)[0]
    with torch.no_grad():
        model[1].weight.mul_(2)
    assert not torch.equal(before, module.bounds(x, 0.1)[0])
    F.cross_entropy(module.margins(x, y, 0.1), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_without_a_last_linear_has_looser_margins():
    model, x, y = made("mlp")
    loose = nn.Sequential(model, nn.Unflatten(1, (5, 1)), nn.Flatten())
    z, wide = bound(model).margins(x, y, 0.05), bound(loose).margins(x, y, 0.05)
    low, high = bound(model).bounds(x, 0.05, "fast")
    expected = (high - low.gather(1, y[:, None])).scatter(1, y[:, None], 0.0)
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-5)
    assert bool((wide >= z - 1e-5).all())


def test_compiles_in_one_graph():
    model, x, y = made("conv")
    module = bound(model.eval())
    torch._dynamo.reset()
    for call in (lambda: module.margins(x, y, 0.01), lambda: module.bounds(x, 0.01)[0]):
        found = torch.compile(call, fullgraph=True, backend="aot_eager")()
        torch.testing.assert_close(found, call(), rtol=0, atol=0)


def test_clip_and_a_radius_a_channel():
    model, x, _ = made("conv")
    module, eps = bound(model.eval()), torch.tensor([0.0, 0.1, 0.2]).reshape(1, 3, 1, 1)
    low, high = module.bounds(x, eps, "fast", clip=(0.0, 1.0))
    box = [(x - eps).clamp_min(0), (x + eps).clamp_max(1)]
    center, radius = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
    inside = model(center + radius * (2 * torch.rand_like(x) - 1))
    assert bool((inside >= low - 1e-4).all() and (inside <= high + 1e-4).all())
    wide = module.bounds(x, eps, "fast")
    assert bool((wide[1] - wide[0]).sum() > (high - low).sum())


PADDINGS = [(3, 1, "same"), ((1, 5), 2, "same"), (3, 1, "valid"), (2, 1, "same")]


@pytest.mark.parametrize("kernel, dilation, padding", PADDINGS)
def test_padding_by_name(kernel, dilation, padding):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 3, kernel, dilation=dilation, padding=padding)), torch.rand(2, 2, 6, 7)
    torch.testing.assert_close(bound(model).bounds(x, 0.0, "fast")[0], model(x), rtol=1e-5, atol=1e-5)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        h = self.first(x).relu()
        return self.second(torch.flatten(h, 1) + h)


def test_functions_and_a_shared_activation():
    torch.manual_seed(0)
    model, x = Functional(), torch.rand(4, 3, 4)
    low, high = bound(model).bounds(x, 0.0)
    assert bool((low <= model(x) + 1e-5).all() and (model(x) <= high + 1e-5).all())


@pytest.mark.parametrize(
    "layer, text",
    [
        (nn.LPPool2d(3, 2), "got 1: LPPool2d (pow) with the exponent"),
        (nn.FractionalMaxPool2d(2, output_size=2), "1: FractionalMaxPool2d"),
        (nn.MaxPool2d(2, return_indices=True), "1: MaxPool2d"),
    ],
)
def test_refuses_by_name(layer, text):
    with pytest.raises(TypeError, match=re.escape(text)):
        bound(nn.Sequential(nn.Identity(), layer)).bounds(torch.rand(2, 2, 6, 6), 0.1)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Gamma(nn.Module):
    def forward(self, x):
        return torch.lgamma(x)


def test_refuses_what_it_cannot_follow():
    with pytest.raises(TypeError, match=r"one that torch\.fx can trace"):
        bound(Branching()).bounds(torch.zeros(1, 2), 0.1)
    with pytest.raises(TypeError, match=r"got lgamma\. Supported"):
        IntervalModule(Gamma()).bounds(torch.zeros(1, 2), 0.1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        bound(3)
    model, x, y = made("conv")
    with pytest.raises(ValueError, match="model must be in eval mode for sound bounds"):
        verify(model.train(), x, y, 0.1)
    with pytest.raises(ValueError, match="eps must be a finite number >= 0, got -1"):
        bound(model.eval()).bounds(x, -1)
    with pytest.raises(ValueError, match="model must be in eval mode where it has Dropout"):
        bound(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))).bounds(torch.zeros(1, 2), 0.1)


def test_compute_is_a_permission_that_a_cpu_does_not_need():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(2, 4)
    for rounding in ("fast", "sound"):
        found = (bound(model, compute=c).bounds(x, 0.1, rounding) for c in ("fp32", "bf16"))
        torch.testing.assert_close(*found, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"compute must be one of .* got 'fp8'"):
        bound(model, compute="fp8")


def test_weights_stored_for_verification():
    """The same parameters and certificates from weights stored [K, N], which a batch of one reads in part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5)).eval()
    with torch.no_grad():
        model[0].bias.sub_(2.0)  # most units are dead
    x, y = torch.randn(6, 20), torch.arange(6) % 5
    bounded, before = bound(model), {name: t.clone() for name, t in model.state_dict().items()}
    parameters, out = list(model.parameters()), model(x)
    expected = [bounded.bounds(x[i : i + 1], 0.01) for i in range(6)]
    certain = bounded.verified(x, y, 1e-3)
    assert bounded.store_transposed() is bounded
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [m.weight.stride(0) for m in model if isinstance(m, nn.Linear)] == [1, 1, 1]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    torch.testing.assert_close(model(x), out)
    for i, (lower, upper) in enumerate(expected):
        torch.testing.assert_close(bounded.bounds(x[i : i + 1], 0.01), (lower, upper), rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([bounded.verified(x[i : i + 1], y[i : i + 1], 1e-3) for i in range(6)]), certain)
    model.load_state_dict(before)
    assert model[0].weight.stride(0) == 1
