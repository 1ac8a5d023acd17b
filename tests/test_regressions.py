"""Defects that a reader found, each kept from coming back."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

import w2s_fast
from w2s_fast.testing.synthetic import CPU_BACKENDS


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_experts_gradient_is_not_rounded_to_the_bases_dtype(backend):
    torch.manual_seed(0)
    base, expert = torch.randn(2, 50).half(), torch.randn(2, 50, requires_grad=True)
    upstream = torch.randn(2, 50) * 1e-8  # underflows in float16
    with w2s_fast.backend(backend):
        (w2s_fast.fused_log_softmax(base, [expert]) * upstream).sum().backward()
    exact = expert.detach().double().requires_grad_()
    ((base.double() + exact).log_softmax(-1) * upstream).sum().backward()
    torch.testing.assert_close(expert.grad.double(), exact.grad, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("spike", [20.0, 30.0])
def test_a_confident_row_that_cannot_reach_its_target_is_saturated(backend, spike):
    base, expert, anti = torch.tensor([[spike, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)
    with w2s_fast.backend(backend):
        solved = w2s_fast.dynamic_fusion_weights(base, [expert], anti)
    assert solved.alpha.item() == 2.0
    assert solved.saturated.item()


def test_every_sampler_refuses_a_uniform_that_is_not_a_number():
    bad = torch.full((4,), math.nan)
    with pytest.raises(ValueError, match=r"uniform must be in \[0, 1\)"):
        w2s_fast.fused_sample(torch.randn(4, 9), uniform=bad)
    with pytest.raises(ValueError, match=r"uniform must be in \[0, 1\)"):
        w2s_fast.linear_fusion_sample([torch.randn(4, 6)], [torch.randn(9, 6)], uniform=bad)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"plausible": ([], 0.5)}, "plausible must be None"),
        ({"weights": math.inf}, "weights must be a finite number, got inf"),
        ({"weights": "dynamic", "dynamic": {"alpha": 1}}, "dynamic must be a dict with keys among"),
        ({"weights": "dynamic", "dynamic": {"direction": 1.0}}, "direction must be a list of numbers"),
        ({"weights": "dynamic", "dynamic": {"direction": torch.tensor([math.nan])}}, "direction must be finite"),
        ({"weights": "dynamic", "dynamic": {"solver": "grid", "grid": "abc"}}, "grid must be a list of numbers"),
        ({"weights": "dynamic", "dynamic": {"solver": "grid", "grid": [0.5]}}, "grid must be at least two"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        w2s_fast.fused_sample(torch.zeros(1, 4), [torch.zeros(1, 4)], torch.zeros(1, 4), **kwargs)


def test_linear_dynamic_weights_names_a_bad_direction():
    models = [torch.randn(4, 6)] * 3, [torch.randn(9, 6)] * 3
    with pytest.raises(ValueError, match="direction must be of shape"):
        w2s_fast.linear_dynamic_weights(*models, direction=torch.ones(4, 3))


@pytest.mark.parametrize("where", ["input", "gradient", "list"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_tangent_is_refused_and_not_dropped(backend, where):
    x, tangent = torch.randn(3, 8, requires_grad=where == "gradient"), torch.randn(3, 8)

    def loss(x):
        if where == "list":
            return w2s_fast.linear_fusion_logprobs([x], [torch.ones(4, 8)], torch.zeros(3, dtype=torch.int64))[0]
        return w2s_fast.pseudo_huber_loss(x, torch.zeros(3, 8), reduction="none")

    with w2s_fast.backend(backend), forward_ad.dual_level():
        if where == "gradient":
            made = loss(x)
            upstream = forward_ad.make_dual(torch.ones_like(made), torch.ones_like(made))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                made.backward(upstream)
        else:
            with pytest.raises(NotImplementedError, match="forward-mode"):
                loss(forward_ad.make_dual(x, tangent))
