"""fused_sample with dynamic weights: one op for the solve and the draw."""

from __future__ import annotations

import math

import pytest
import torch

import w2s_fast
from w2s_fast.testing.synthetic import CPU_BACKENDS, kl_at, language_models, plain_fusion

INF, NAN = math.inf, math.nan


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


@pytest.mark.parametrize("settings", [
    {}, {"solver": "grid"}, {"multi": "decoupled", "average": True}, {"direction": "target_kl"}, {"alpha_max": 0.5},
    {"solver": "grid", "multi": "grid", "grid": [0.5, 1.0, 1.5]},
], ids=str)  # fmt: skip
def test_dynamic_weights_then_sample(backend, settings):
    """One op for both: the weights of dynamic_fusion_weights, and the token that those weights give."""
    m = language_models(12, 2003, 2, shift=0.7, seed=12)
    uniform = torch.rand(12, generator=torch.Generator().manual_seed(5))
    sampling = {"uniform": uniform, "temperature": 0.8, "top_p": 0.95, "plausible": ("min_p", 1e-4)}
    found = w2s_fast.fused_sample(*m, "dynamic", dynamic={"tol": 1e-6, **settings}, **sampling)
    solved = w2s_fast.dynamic_fusion_weights(*m, tol=1e-6, **settings)
    torch.testing.assert_close(found.alpha, solved.alpha, atol=2e-4, rtol=0)
    again = w2s_fast.fused_sample(*m, found.alpha, **sampling)
    assert torch.equal(found.token, again.token) and torch.equal(found.kept, again.kept)
    torch.testing.assert_close(found.logprob, again.logprob, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found.lse, again.lse, atol=2e-6, rtol=1e-6)


def test_dynamic_greedy_and_bad_rows(backend):
    m = language_models(4, 301, seed=13)
    base = m.base.clone()
    base[1], base[2, 7] = -INF, NAN
    found = w2s_fast.fused_sample(base, m.experts, m.anti, "dynamic", temperature=0)
    assert found.token[1:3].tolist() == [-1, -1] and bool(found.logprob[1:3].isnan().all())
    assert found.alpha.isnan()[:, 0].tolist() == [False, True, True, False]
    solved = w2s_fast.dynamic_fusion_weights(*m)
    z = plain_fusion(*m, solved.alpha, dtype=torch.float64)
    assert found.token[[0, 3]].tolist() == z.argmax(-1)[[0, 3]].tolist()


def test_the_drawn_distribution_meets_the_target(backend):
    """Weights found in the same op as the draw are as exact as those found alone."""
    m = language_models(12, 8009, shift=1.5, seed=14)
    found = w2s_fast.fused_sample(*m, "dynamic", dynamic={"tol": 1e-5}, uniform=torch.full((12,), 0.5))
    solved = w2s_fast.dynamic_fusion_weights(*m, tol=1e-5)
    open_rows = ~solved.saturated[:, 0]
    assert int(open_rows.sum()) >= 8
    error = (kl_at(m, found.alpha) - solved.target_kl[:, 0].double())[open_rows].abs()
    assert float(error.max()) <= 2e-5
