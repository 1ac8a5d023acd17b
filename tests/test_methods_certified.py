"""Certified training: losses and schedules against the papers' formulas, and that the commands show their effect."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from w2s_fast.methods.certified import _common, _report, _training, fast, ibp
from w2s_fast.nn import bound

pytest.importorskip("sklearn")


def by_hand(model, x, y, eps):
    """(logits, worst-case margins, bounds before each ReLU, box) of a Sequential in training mode, in plain PyTorch."""
    lower, upper, clean, before = (x - eps).clamp_min(0), (x + eps).clamp_max(1), x, []
    box = lower, upper
    *layers, last = model
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            before.append((lower, upper))
        if isinstance(layer, (nn.ReLU, nn.Flatten)):
            lower, upper, clean = layer(lower), layer(upper), layer(clean)
            continue
        m, r = (lower + upper) / 2, (upper - lower) / 2
        if isinstance(layer, nn.Linear):
            m, r, clean = F.linear(m, layer.weight, layer.bias), F.linear(r, layer.weight.abs()), layer(clean)
        elif isinstance(layer, nn.Conv2d):
            options = layer.stride, layer.padding
            m, r = F.conv2d(m, layer.weight, layer.bias, *options), F.conv2d(r, layer.weight.abs(), None, *options)
            clean = layer(clean)
        else:
            axes = [0, *range(2, clean.ndim)]
            mean, variance = clean.mean(axes, keepdim=True), clean.var(axes, correction=0, keepdim=True)
            s = layer.weight.reshape(mean.shape) / (variance + layer.eps).sqrt()
            shift = layer.bias.reshape(mean.shape) - mean * s
            m, r, clean = m * s + shift, r * s.abs(), clean * s + shift
        lower, upper = m - r, m + r
    d = last.weight - last.weight[y].unsqueeze(1)
    m, r = (lower + upper) / 2, (upper - lower) / 2
    z = (d @ m.unsqueeze(2) + d.abs() @ r.unsqueeze(2)).squeeze(2) + last.bias - last.bias[y].unsqueeze(1)
    return last(clean), z, before, box


def pictures(count=12):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator).double(), torch.arange(count) % 10


def compared(model, ours, theirs):
    """Two losses and their gradients."""
    results = []
    for value in (ours, theirs):
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_ibp_loss_is_the_paper_s(share):
    x, y = pictures()
    model, x = _common.mlp((9, 7), 0).double(), x.flatten(1)
    stage = _training.Stage(share * 0.1, share, share < 1)
    logits, z, _, _ = by_hand(model, x, y, stage.eps)
    kappa = 1 - share / 2
    expected = kappa * F.cross_entropy(logits, y) + (1 - kappa) * F.cross_entropy(z, y)
    compared(model, ibp.ibp_loss(bound(model), x, y, stage), expected)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_crown_ibp_loss_mixes_the_margins(share):
    x, y = pictures()
    model, x = _common.mlp((9, 7), 0).double(), x.flatten(1)
    stage = _training.Stage(share * 0.1, share, share < 1)
    logits, z, _, _ = by_hand(model, x, y, stage.eps)
    backward = bound(model).margins(x, y, stage.eps, clip=(0.0, 1.0), method="crown-ibp")
    mixed = (1 - share) * backward + share * z
    kappa = 1 - share / 2
    expected = kappa * F.cross_entropy(logits, y) + (1 - kappa) * F.cross_entropy(mixed, y)
    compared(model, ibp.METHODS["CROWN-IBP"](bound(model), x, y, stage), expected)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_fast_loss_is_the_paper_s(share):
    x, y = pictures()
    model = fast.network(fast.VARIANTS["fast"], 0, width=2).double().train()
    for layer in model:
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.bias.data.fill_(0.7)  # more active than dead units, which the second regulariser sees
    stage = _training.Stage(share * 0.01, share, share < 1)
    logits, z, before, box = by_hand(model, x, y, max(stage.eps, fast.FLOOR))
    expected = F.cross_entropy(z if share else logits, y)
    if stage.ramp:
        tight, relu = [], []
        for low, high in before:
            c, width = (low + high) / 2, ((high - low) / 2).mean()
            tight.append((0.5 - ((box[1] - box[0]) / 2).mean() / width).clamp_min(0) / 0.5)
            active, dead, spread = low > 0, high < 0, (c - c.mean()) ** 2
            if not dead.any():  # adds nothing, as in the authors' code
                relu.append(0.0)
                continue
            ratios = (c * active).mean() / -(c * dead).mean(), (spread * active).sum() / (spread * dead).sum()
            relu.append(sum((0.5 - torch.minimum(r, 1 / r)).clamp_min(0) for r in ratios) / 0.5)
        assert sum(value != 0 for value in relu) >= 2
        expected = expected + 0.5 * (1 - share) * (sum(tight) + sum(relu)) / len(before)
    compared(model, fast.fast_loss(bound(model), x, y, stage), expected)


def test_fast_initialisation_keeps_the_radius():
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    last = model[-1].weight.clone()
    fast.initialise(model, 0)
    for layer in (model[0], model[2]):
        n = layer.weight.shape[1]
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / n, rel=0.02)
    assert torch.equal(model[-1].weight, last)
    # n E|w| = 2, of which a ReLU keeps about half: the gain of a layer is 1
    assert (model[2].weight.abs().sum(1) / 2).mean().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("ramp", [_training.linear, _training.smoothed])
def test_ramps_rise_from_0_to_1(ramp):
    values = [ramp(step, 20, 120) for step in range(141)]
    assert values[:21] == [0.0] * 21 and values[120:] == [1.0] * 21
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert all(s > 0 for s in steps[20:120])
    assert ramp(5, 5, 5) == 1.0


def test_smoothed_ramp_is_a_power_and_then_a_line():
    first, last, middle = 20, 120, 45
    values = [_training.smoothed(step, first, last) for step in range(141)]
    assert values[30] / values[40] == pytest.approx((10 / 20) ** 4)
    line = [b - a for a, b in zip(values[middle:last], values[middle + 1 : last + 1], strict=True)]
    assert max(line) == pytest.approx(min(line)), "one slope"
    slope = 4 * values[middle] / (middle - first)  # of the power where the line begins
    assert line[0] == pytest.approx(slope)


def test_verified_error_counts_what_has_no_certificate():
    model = _common.mlp((6,), 0)
    x, y = torch.rand(40, 64, generator=torch.Generator().manual_seed(1)), torch.zeros(40, dtype=torch.long)
    y[:20] = model(x).argmax(1)[:20]
    certain = bound(model).verified(x, y, 0.001, clip=(0.0, 1.0))
    assert _common.verified_error(model, x, y, 0.001) == pytest.approx(1 - certain.double().mean().item())
    assert _common.verified_error(model, x, y, 0.0) == pytest.approx(_common.error(model, x, y))
    found = _report.outcome(model, x, y, 0.001, 1.0)
    assert found.error <= found.tighter <= found.verified <= found.curve[-1]
    assert found.curve[0] == pytest.approx(found.error) and len(found.curve) == len(_report.radii(0.001))


def test_training_is_decided_by_the_seed():
    x, y = pictures(40)
    schedule = _training.Schedule(epochs=2, first=0, length=1, batch=16, rate=1e-2)
    weights = []
    for seed in (0, 0, 1):
        model = _common.mlp((5,), 0)
        losses = []
        data = x.float().flatten(1), y
        _training.train(model, *data, ibp.ibp_loss, 0.1, schedule, seed, _training.linear, losses.append)
        assert len(losses) == 2
        weights.append(model[0].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def verified(folder, name):
    found = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.png").stat().st_size > 10_000
    return {method: rows[0] for method, rows in found["methods"].items()}


def test_ibp_command(tmp_path, capsys):
    assert ibp.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    found = verified(tmp_path, "ibp")
    assert found["plain"]["verified"] > 0.9 and found["plain"]["error"] < 0.1
    for name in ("IBP", "CROWN-IBP"):
        assert found[name]["verified"] < 0.75 and found[name]["tighter"] <= found[name]["verified"]
    assert "CROWN-IBP" in capsys.readouterr().out


def test_fast_command(tmp_path):
    assert fast.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    found = verified(tmp_path, "fast")
    assert list(found) == list(fast.VARIANTS)
    assert all(0 <= row["error"] <= row["tighter"] <= row["verified"] <= 1 for row in found.values())
    # four epochs: what is cheap to certify is a small radius
    assert found["fast"]["curve"][1] < found["plain"]["curve"][1]


@pytest.mark.filterwarnings("ignore")
def test_benchmark_trains_both_sides_alike(tmp_path):
    from w2s_fast.bench import certified_training

    try:
        certified_training.auto_lirpa()
    except ImportError as error:
        pytest.skip(f"auto_LiRPA cannot be imported: {error}")
    options = ["--methods", "fast", "--seeds", "0", "--threads", "1", "--epochs", "2", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert certified_training.main(options) == 0
    finally:
        torch.set_num_threads(threads)
    (found,) = json.loads((tmp_path / "certified.json").read_text())["runs"]
    assert found["loss_difference"] < 1e-4
    assert [len(curve) for curve in found["curves"].values()] == [2, 2]
    assert all(curve[-1][0] == found["seconds"][name] > 0 for name, curve in found["curves"].items())
    assert (tmp_path / "certified.png").stat().st_size > 10_000
