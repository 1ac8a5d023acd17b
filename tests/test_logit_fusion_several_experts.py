"""dynamic_fusion_weights with several experts: the ray, decoupled problems, own antis, given targets."""

from __future__ import annotations

import itertools

import pytest
import torch

import w2s_fast
from w2s_fast.testing.synthetic import CPU_BACKENDS, kl_at, language_models, targets_of, tilted_kl


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


@pytest.mark.parametrize("direction", [None, "target_kl", [0.5, 1.0, 0.25]], ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_ray(backend, count, direction):
    m = language_models(8, 2003, count, shift=0.8, seed=7)
    m = type(m)(m.base, [m.experts[0], *(m.anti + 0.5 * (e - m.anti) for e in m.experts[1:])], m.anti)
    direction = direction[:count] if isinstance(direction, list) else direction
    found = w2s_fast.dynamic_fusion_weights(*m, direction=direction, tol=1e-5)
    goal = targets_of(m)
    assert found.alpha.shape == found.saturated.shape == (8, count) and found.achieved_kl.shape == (8,)
    given = {None: torch.ones(8, count), "target_kl": goal}
    u = torch.tensor([direction] * 8) if isinstance(direction, list) else given[direction]
    u = (u / u.amax(1, keepdim=True)).float()
    torch.testing.assert_close(found.alpha, found.alpha.amax(1, keepdim=True) * u, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.target_kl.double(), goal, atol=1e-5, rtol=1e-5)
    reach = kl_at(m, 2.0 * u)
    inside = reach > goal.mean(1) + 1e-4
    assert int(inside.sum()) >= 6
    error = (kl_at(m, found.alpha) - goal.mean(1)).abs()
    assert float(error[inside].max()) <= 2e-5


@pytest.mark.parametrize("average", [False, True])
def test_decoupled_is_one_problem_each(backend, average):
    m = language_models(6, 1500, 3, seed=8)
    found = w2s_fast.dynamic_fusion_weights(*m, multi="decoupled", average=average, tol=1e-6)
    assert found.alpha.shape == found.achieved_kl.shape == (6, 3)
    for k, expert in enumerate(m.experts):
        one = w2s_fast.dynamic_fusion_weights(m.base, [expert], m.anti, tol=1e-6)
        torch.testing.assert_close(found.alpha[:, k : k + 1] * (3 if average else 1), one.alpha, atol=2e-4, rtol=0)
        torch.testing.assert_close(found.achieved_kl[:, k], one.achieved_kl, atol=3e-6, rtol=1e-5)
        assert torch.equal(found.saturated[:, k : k + 1], one.saturated)


def test_an_anti_for_each_expert(backend):
    m = language_models(5, 700, 2, seed=9)
    anti = [m.anti, m.anti * 0.9]
    found = w2s_fast.dynamic_fusion_weights(m.base, m.experts, anti, tol=1e-6)
    shift = sum(found.alpha[:, k : k + 1].double() * (m.experts[k].double() - anti[k].double()) for k in range(2))
    goal = torch.stack([tilted_kl(a, e.double() - a.double()) for e, a in zip(m.experts, anti, strict=True)], 1)
    open_rows = ~found.saturated[:, 0]
    assert int(open_rows.sum()) >= 3
    torch.testing.assert_close(found.target_kl.double(), goal, atol=1e-5, rtol=1e-5)
    got = tilted_kl(m.base, shift)
    torch.testing.assert_close(got[open_rows], goal.mean(1)[open_rows], atol=1e-5, rtol=1e-5)


def test_target_overrides(backend):
    m = language_models(6, 900, 2, seed=10)
    target = torch.linspace(0.01, 0.2, 6)
    one = w2s_fast.dynamic_fusion_weights(m.base, m.experts[:1], m.anti, target_kl=target, tol=1e-6)
    assert torch.equal(one.target_kl[:, 0], target)
    open_rows = ~one.saturated[:, 0]
    torch.testing.assert_close(one.achieved_kl[open_rows], target[open_rows], atol=3e-6, rtol=1e-5)
    goals = torch.stack((target, 3 * target), 1)
    both = w2s_fast.dynamic_fusion_weights(*m, target_kl=goals, multi="decoupled", tol=1e-6)
    torch.testing.assert_close(both.alpha[:, 0], one.alpha[:, 0], atol=2e-4, rtol=0)
    none = w2s_fast.dynamic_fusion_weights(*m, target_kl=torch.zeros(6))
    assert bool((none.alpha == 0).all()) and not bool(none.saturated.any())
    negative = w2s_fast.dynamic_fusion_weights(*m, target_kl=torch.full((6,), -1.0))
    assert bool((negative.alpha == 0).all()) and not bool(negative.saturated.any())


def test_kl_grows_with_the_weight(backend):
    """F is monotone along the ray: a larger target never gives a smaller weight."""
    m = language_models(6, 900, seed=11)
    weights = [w2s_fast.dynamic_fusion_weights(*m, target_kl=torch.full((6,), t), tol=1e-6).alpha
               for t in (0.001, 0.01, 0.05, 0.2, 1.0, 5.0)]  # fmt: skip
    for small, large in itertools.pairwise(weights):
        assert bool((large >= small - 1e-5).all())
