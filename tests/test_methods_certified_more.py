"""Tightness, interval embeddings and word substitution at small sizes: their mathematics, files and effects."""

import json
import math

import pytest
import torch

from w2s_fast.methods._common.digits import digits
from w2s_fast.methods.certified import tightness


def test_predicted_tightness_is_the_quotient_of_the_expectations():
    draw = torch.Generator().manual_seed(0)
    for width in (3, 20):
        first, second = (torch.randn(200_000, width, generator=draw, dtype=torch.float64) for _ in range(2))
        optimal, layerwise = (first * second).sum(1).abs().mean(), (first * second).abs().sum(1).mean()
        assert tightness.predicted(width) == pytest.approx(float(optimal / layerwise), rel=0.01)
    assert tightness.predicted(10_000) == pytest.approx(math.sqrt(math.pi / 20_000), rel=1e-4)


def test_local_tightness_is_that_of_the_linear_map_at_each_picture():
    _, test = digits()
    data = type(test)(test.x[:4], test.y[:4])
    model = tightness.network(24, 3, seed=1)
    found, _ = tightness.local_tightness(model, data, 0.1)
    shares = []
    first, second, last = (m.weight.detach() for m in model if isinstance(m, torch.nn.Linear))
    for x, y in zip(data.x, data.y.tolist(), strict=True):
        radius = ((x + 0.1).clamp(max=1) - (x - 0.1).clamp(min=0)) / 2
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
        h = (first @ x).relu()
        on, then = torch.diag((h > 0).float()), torch.diag((second @ h > 0).float())
        for k in {*range(10)} - {y}:
            wide = (last[k] - last[y]).abs() @ then @ second.abs() @ on @ first.abs()
            shares.append(float((jacobian[k] - jacobian[y]).abs() @ radius / (wide @ radius)))
    assert found == pytest.approx(sum(shares) / len(shares), rel=1e-4)


def test_tightness_falls_with_width_and_depth_and_rises_with_ibp_training(tmp_path):
    assert tightness.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "tightness.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "tightness.json").read_text())["runs"][0]
    for kind, widths, depth in (("linear", tightness.LINEAR_WIDTHS, 2), ("ReLU", tightness.WIDTHS, 3)):
        at = [tightness.key(kind, w, depth) for w in widths]
        assert sorted(at, key=found["untrained"].get, reverse=True) == at
        assert [found["untrained"][k] for k in at] == pytest.approx([found["predicted"][k] for k in at], rel=0.15)
    at = [tightness.key("ReLU", 128, d) for d in tightness.DEPTHS]
    assert sorted(at, key=found["untrained"].get, reverse=True) == at
    for name, plain in found["plain"].items():
        assert found["untrained"][name] < plain < found["IBP"][f"{name}, eps {tightness.EPS}"]
