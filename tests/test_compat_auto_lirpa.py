"""auto_LiRPA's interface over nn.bound: shapes and names of its examples, its numbers, CTRAIN's bound functions."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from w2s_fast.compat.auto_lirpa import BoundedModule, BoundedTensor, PerturbationLpNorm
from w2s_fast.testing import peers

EPS = 0.05


def _net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        layers = [nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)]
    else:
        layers = [nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 16), nn.ReLU(),
                  nn.Linear(16, 5)]  # fmt: skip
    return nn.Sequential(*layers).eval()


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 6, 6, generator=generator), torch.tensor([0, 4, 2])


def _margins(y: torch.Tensor, classes: int = 5) -> torch.Tensor:
    """The specification of auto_LiRPA's training example: f_y - f_k for the other classes."""
    C = torch.eye(classes)[y].unsqueeze(1) - torch.eye(classes)
    return C[~(y[:, None] == torch.arange(classes))].view(len(y), classes - 1, classes)


METHODS = [("IBP", {}), ("CROWN-IBP", {}), ("backward", {"IBP": True}), ("CROWN", {})]


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("specified", [False, True])
@pytest.mark.parametrize("method, options", METHODS)
def test_bounds_hold_at_samples(kind: str, specified: bool, method: str, options: dict):
    net, (x, y) = _net(kind), _inputs()
    model = BoundedModule(net, torch.empty_like(x), device="cpu")
    C = _margins(y) if specified else None
    with torch.no_grad():
        ball = PerturbationLpNorm(norm=math.inf, eps=EPS)
        lower, upper = model.compute_bounds(x=(BoundedTensor(x, ball),), method=method, C=C, **options)
        assert lower.shape == upper.shape == ((3, 4) if specified else (3, 5))
        for i in range(200):
            g = torch.Generator().manual_seed(i)
            step = torch.rand(x.shape, generator=g) * 2 - 1
            out = net(x + EPS * (step if i % 2 else step.sign()))
            z = out if C is None else (C @ out.unsqueeze(-1)).squeeze(-1)
            assert bool(((lower <= z) & (z <= upper)).all())


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP"])
@pytest.mark.parametrize("specified", [False, True])
def test_the_numbers_are_auto_lirpas(kind: str, method: str, specified: bool):
    try:
        theirs = peers.lirpa_bounds(_net(kind), _inputs()[0], method)
    except ImportError as error:
        pytest.skip(f"auto_LiRPA is not importable: {error}")
    net, (x, y) = _net(kind), _inputs()
    C = _margins(y) if specified else None
    expected = theirs(x, EPS, C)
    ball = PerturbationLpNorm(norm=math.inf, eps=EPS)
    found = BoundedModule(net, x).compute_bounds(x=(BoundedTensor(x, ball),), method=method, C=C)
    for ours, own in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def test_merging_the_last_layer_is_tighter_than_the_difference_of_bounds():
    net, (x, y) = _net("mlp"), _inputs()
    model, ball = BoundedModule(net, x), PerturbationLpNorm(norm=math.inf, eps=EPS)
    lower, _ = model.compute_bounds(x=(BoundedTensor(x, ball),), method="IBP", C=_margins(y))
    low, high = model.compute_bounds(method="IBP")  # the last call's input
    others = torch.arange(5)[None].expand(3, 5)[y[:, None] != torch.arange(5)].view(3, 4)
    apart = low.gather(1, y[:, None]) - high.gather(1, others)
    assert bool((lower >= apart - 1e-6).all()) and bool((lower > apart + 1e-4).any())


def test_training_takes_gradients_through_both_methods():
    net, (x, y) = _net("cnn").train(), _inputs()
    model, ball = BoundedModule(net, x), PerturbationLpNorm(norm=math.inf, eps=EPS)
    for method in ("IBP", "CROWN-IBP"):
        model.zero_grad()
        lower, none = model.compute_bounds(
            x=(BoundedTensor(x, ball),), method=method, C=_margins(y), bound_upper=False
        )
        assert none is None
        zero = torch.zeros(len(y), 1)
        nn.functional.cross_entropy(torch.cat((zero, -lower), 1), torch.zeros(len(y), dtype=torch.long)).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_a_box_of_its_own():
    net, (x, _) = _net("mlp"), _inputs()
    low, high = (x - 0.1).clamp(0, 1), (x + 0.02).clamp(0, 1)
    model = BoundedModule(net, x)
    with torch.no_grad():
        ball = PerturbationLpNorm(norm=math.inf, x_L=low, x_U=high)
        lower, upper = model.compute_bounds(x=(BoundedTensor(x, ball),), method="IBP")
        for corner in (low, high):
            assert bool(((lower <= net(corner)) & (net(corner) <= upper)).all())
    outside = PerturbationLpNorm(norm=math.inf, x_L=low + 0.5, x_U=high + 0.5)
    with pytest.raises(ValueError, match="x_L and x_U must be around the input"):
        model.compute_bounds(x=(BoundedTensor(x, outside),), method="IBP")


@pytest.mark.parametrize("norm", [1, 2])
def test_other_norms(norm: int):
    net, (x, _) = _net("mlp"), _inputs()
    model, ball = BoundedModule(net, x), PerturbationLpNorm(norm=norm, eps=0.3)
    with torch.no_grad():
        lower, upper = model.compute_bounds(x=(BoundedTensor(x, ball),), method="CROWN-IBP")
        for i in range(100):
            step = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            step = 0.3 * step / step.flatten(1).norm(p=norm, dim=1).reshape(-1, 1, 1, 1)
            assert bool(((lower <= net(x + step)) & (net(x + step) <= upper)).all())


def test_the_model_itself_and_its_output():
    net, (x, _) = _net("mlp"), _inputs()
    model = BoundedModule(net, x)
    bounded = BoundedTensor(x, PerturbationLpNorm(eps=EPS))
    assert torch.equal(model(bounded), net(x)) and type(model(bounded)) is torch.Tensor
    assert type(bounded + 1) is torch.Tensor and bounded.to(torch.float64).ptb is bounded.ptb
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in net.parameters()}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x: m.compute_bounds(x=(x,), method="CROWN-Optimized"), ValueError, "method must be IBP"),
        (lambda m, x: m.compute_bounds(x=(x,), return_A=True), NotImplementedError, "return_A is not supported"),
        (lambda m, x: m.compute_bounds(x=(x,), C=torch.ones(3, 2, 9)), ValueError, r"C must be of shape \(3, S, 5\)"),
        (lambda m, x: m.compute_bounds(x=(x.as_subclass(torch.Tensor),)), ValueError, "eps"),
        (lambda m, x: PerturbationLpNorm(norm=3), ValueError, "norm must be inf, 2 or 1"),
        (lambda m, x: PerturbationLpNorm(norm=2, x_L=x), ValueError, "x_L and x_U must be None unless norm is inf"),
    ],
)
def test_errors(call, error, message):
    x, _ = _inputs()
    model = BoundedModule(_net("mlp"), x)
    with pytest.raises((error, TypeError) if error is ValueError else error, match=message):
        call(model, BoundedTensor(x, PerturbationLpNorm(eps=EPS)))


_CTRAIN = """
import importlib.abc, importlib.machinery, sys, types
from unittest import mock
class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Stands in for what the wheel depends on and is not installed; none of it takes part in the bounds."
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if not name.startswith("CTRAIN") else None
    def create_module(self, spec):
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module
    def exec_module(self, module):
        pass
import torch
from w2s_fast.compat import auto_lirpa
auto_lirpa.install()
import auto_LiRPA
from auto_LiRPA.perturbations import PerturbationLpNorm
sys.meta_path.append(Missing())
from CTRAIN.bound import bound_crown, bound_crown_ibp, bound_ibp
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)).eval()
x, y = torch.rand(4, 3, 4), torch.tensor([0, 1, 2, 4])
model = auto_LiRPA.BoundedModule(net, x)
C = torch.eye(5)[y].unsqueeze(1) - torch.eye(5)
C = C[~(y[:, None] == torch.arange(5))].view(4, 4, 5)
z = (C @ net(x).unsqueeze(-1)).squeeze(-1)
for bound in (bound_ibp, bound_crown_ibp, bound_crown):
    lower, upper = bound(model, PerturbationLpNorm(norm=float("inf"), eps=0.05), x, y, n_classes=5, bound_upper=True)
    assert lower.shape == (4, 4) and bool(((lower <= z) & (z <= upper)).all()), bound
    print(bound.__name__, "holds")
"""
#: `make install` puts CTRAIN's wheel here, without what it depends on.
CTRAIN = Path(sys.prefix) / "ctrain"


@pytest.mark.skipif(not CTRAIN.exists(), reason="CTRAIN is not beside this environment (make install)")
def test_ctrains_bound_functions_run():
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(CTRAIN)]))
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", _CTRAIN], env=env, capture_output=True, text=True, check=False)
    assert run.stdout.count("holds") == 3, run.stdout + run.stderr[-3000:]


def test_install_refuses_beside_the_original():
    code = "import sys; sys.modules['auto_LiRPA'] = sys\nfrom w2s_fast.compat import auto_lirpa\nauto_lirpa.install()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has been imported already" in run.stderr
