"""Properties of logit fusion that hold for any logits, searched by hypothesis."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import w2s_fast
from w2s_fast.testing.synthetic import CPU_BACKENDS, plain_fusion, tilted_kl

INF = math.inf
SETTINGS = hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)


@st.composite
def models(draw, least: int = 1, most: int = 3):
    """Rows of logits: random, in steps that make ties, with spikes; K experts and one anti."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 90))
    count, seed = draw(st.integers(least, most)), draw(st.integers(0, 2**31))
    scale, spike = draw(st.sampled_from([0.0, 0.3, 3.0, 12.0])), draw(st.sampled_from([0.0, 0.0, 30.0]))
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, width, generator=generator) * scale for _ in range(count + 2)]
    if draw(st.booleans()):
        tensors = [t.round() for t in tensors]
    where = torch.randint(width, (rows, 1), generator=generator)
    tensors[0] = tensors[0].scatter_add(1, where, torch.full((rows, 1), spike))
    return tensors[0], tensors[1:-1], tensors[-1], generator


BACKENDS = pytest.mark.parametrize("backend", CPU_BACKENDS)


@BACKENDS
@SETTINGS
@hypothesis.given(models(0), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
def test_fusion_is_linear_and_normalised(backend, given, heat, weight):
    base, experts, anti, _ = given
    args = (base, experts, anti if experts else None, weight)
    with w2s_fast.backend(backend):
        fused, lse = w2s_fast.fuse_logits(*args, temperature=heat, return_lse=True)
        logp = w2s_fast.fused_log_softmax(*args, temperature=heat)
        stats = w2s_fast.fused_stats(*args, temperature=heat)
    exact = plain_fusion(base, experts, anti, weight, temperature=heat, dtype=torch.float64)
    scale = 1e-6 * (1 + 10 * float(sum(t.abs().max() for t in (base, anti, *experts))) / heat)
    assert float((fused - exact).abs().max()) <= scale
    assert float((lse - exact.logsumexp(-1)).abs().max()) <= scale
    assert float((logp - exact.log_softmax(-1)).abs().max()) <= 2 * scale
    assert float((logp.double().exp().sum(-1) - 1).abs().max()) <= 1e-5 + scale
    assert torch.equal(fused.gather(1, stats.argmax.unsqueeze(1))[:, 0], stats.max)
    assert bool((stats.entropy >= -1e-5).all()) and bool((stats.entropy <= math.log(base.shape[1]) + 1e-4).all())


@BACKENDS
@SETTINGS
@hypothesis.given(models(), st.sampled_from(["ray", "decoupled"]), st.sampled_from([0.5, 2.0, 4.0]))
def test_weights_meet_the_target_or_stop_at_the_end(backend, given, multi, alpha_max):
    base, experts, anti, _ = given
    with w2s_fast.backend(backend):
        found = w2s_fast.dynamic_fusion_weights(base, experts, anti, multi=multi, alpha_max=alpha_max)
    assert bool(((found.alpha >= 0) & (found.alpha <= alpha_max)).all())
    goals = torch.stack([tilted_kl(anti, e.double() - anti) for e in experts], 1)
    torch.testing.assert_close(found.target_kl.double(), goals, atol=1e-5, rtol=1e-5)
    shifts = [e.double() - anti for e in experts]
    problems = [(shifts[k], k, goals[:, k]) for k in range(len(experts))]
    if multi == "ray":
        problems = [(sum(shifts), 0, goals.mean(1))]
    for shift, k, goal in problems:
        alpha, saturated = found.alpha[:, k], found.saturated[:, k]
        got, reach = tilted_kl(base, alpha.double().unsqueeze(1) * shift), tilted_kl(base, alpha_max * shift)
        allowed = 1e-4 * goal.clamp_min(1.0) + 1e-6
        met, ended = (got - goal).abs() <= allowed, (reach - got).abs() <= allowed
        assert bool((met | (ended & (goal >= got - allowed))).all()), (got, goal, reach)
        assert bool((alpha[saturated] == alpha_max).all())


@BACKENDS
@SETTINGS
@hypothesis.given(models(), st.floats(-30, 30, width=32), st.floats(-30, 30, width=32))
def test_a_constant_on_a_row_changes_nothing(backend, given, first, second):
    base, experts, anti, generator = given
    uniform = torch.rand(base.shape[0], generator=generator)
    with w2s_fast.backend(backend):
        plain = w2s_fast.dynamic_fusion_weights(base, experts, anti, tol=1e-6)
        moved = w2s_fast.dynamic_fusion_weights(base + first, [e + second for e in experts], anti, tol=1e-6)
        logp = w2s_fast.fused_log_softmax(base, experts, anti)
        shifted = w2s_fast.fused_log_softmax(base + first, [e + second for e in experts], anti)
        w2s_fast.fused_sample(base, experts, anti, uniform=uniform)
    torch.testing.assert_close(shifted, logp, atol=2e-4, rtol=1e-4)
    shift = sum(e.double() - anti for e in experts)
    for row in range(base.shape[0]):
        # where F is nearly flat alpha is free, the distribution is not
        one = slice(row, row + 1)
        a, b = (tilted_kl(base[one], x.alpha[one, :1].double() * shift[one]) for x in (plain, moved))
        assert abs(float(a - b)) <= 1e-4 * max(1.0, float(plain.target_kl[row].mean()))


@BACKENDS
@SETTINGS
@hypothesis.given(
    models(0), st.integers(0, 95), st.sampled_from([0.113, 0.537, 0.907, 1.0]), st.sampled_from([0.0, 0.0313])
)
def test_the_token_is_kept_and_the_filters_nest(backend, given, top_k, top_p, min_p):
    base, experts, anti, generator = given
    anti = anti if experts else None
    uniform = torch.rand(base.shape[0], generator=generator)
    with w2s_fast.backend(backend):
        found = w2s_fast.fused_sample(base, experts, anti, uniform=uniform, top_k=top_k, top_p=top_p, min_p=min_p)
        best = w2s_fast.fused_sample(base, experts, anti, temperature=0, uniform=uniform)
        loose = w2s_fast.fused_sample(base, experts, anti, uniform=uniform, top_k=top_k, min_p=min_p)
    logp = plain_fusion(base, experts, anti, dtype=torch.float64).log_softmax(-1)
    assert bool(((found.kept >= 1) & (found.kept <= loose.kept) & (found.kept <= (top_k or base.shape[1]))).all())
    own = logp.gather(1, found.token.unsqueeze(1))
    assert bool(((logp > own + 1e-5).sum(-1) < found.kept).all())
    torch.testing.assert_close(found.logprob.double(), own[:, 0], atol=2e-5, rtol=1e-5)
    assert bool((best.logprob >= found.logprob - 1e-5).all()) and best.kept.tolist() == [1] * base.shape[0]


@BACKENDS
@SETTINGS
@hypothesis.given(models(1, 1), st.integers(2, 32), st.booleans())
def test_the_grid_is_the_naive_grid(backend, given, steps, from_zero):
    base, experts, anti, _ = given
    grid = torch.arange(0 if from_zero else 1, steps + 1, dtype=torch.float64) * (2.0 / steps)
    with w2s_fast.backend(backend):
        found = w2s_fast.dynamic_fusion_weights(base, experts, anti, solver="grid", grid=grid)
    shift = experts[0].double() - anti
    goal = tilted_kl(anti, shift)
    misfit = torch.stack([(tilted_kl(base, a * shift) - goal).square() for a in grid], 1)
    chosen = (found.alpha.double() - grid).abs().argmin(1, keepdim=True)
    torch.testing.assert_close(found.alpha.double(), grid[chosen], atol=1e-6, rtol=0)
    # rounding may decide between candidates whose KL differs by less than float32 can tell
    allowed = 2e-5 * (1 + goal.square())
    assert bool((misfit.gather(1, chosen)[:, 0] <= misfit.amin(1) + allowed).all())
