"""The logit fusion references against what they are defined by: loops, autograd, finite differences."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from w2s_fast.reference import numerics
from w2s_fast.reference.logit_fusion import backward, dynamic_weights, fuse, log_softmax, sample, stats
from w2s_fast.reference.logit_fusion.arguments import Fusion, Solve
from w2s_fast.testing.synthetic import language_models, plain_fusion, tilted_kl

INF, NAN = math.inf, math.nan


def _logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


# numerics


def test_accumulate_dtype():
    single, half, double = (torch.zeros(1, dtype=t) for t in (torch.float32, torch.bfloat16, torch.float64))
    assert numerics.accumulate_dtype(half, single) == torch.float32
    assert numerics.accumulate_dtype(half, double) == torch.float64


def test_log_sum_exp_of_special_rows():
    x = torch.tensor([[-INF, -INF], [1e4, 1e4], [NAN, 0.0], [0.0, -INF], [-1e4, -1e4]], dtype=torch.float64)
    found = numerics.log_sum_exp(x)
    expected = torch.tensor([-INF, 1e4 + math.log(2), NAN, 0.0, -1e4 + math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_difference():
    a = torch.tensor([-INF, INF, -INF, 1.0, NAN, 2.5])
    b = torch.tensor([-INF, INF, 0.0, -INF, NAN, 2.0])
    torch.testing.assert_close(numerics.difference(a, b), torch.tensor([0.0, 0.0, -INF, INF, NAN, 0.5]), equal_nan=True)


def test_mass_before_and_unsort():
    x = _logits(3, 7).softmax(-1)
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    before = numerics.mass_before(ordered)
    assert bool((before[:, 0] == 0).all())
    torch.testing.assert_close(before[:, 1:], ordered.cumsum(-1)[:, :-1])
    mask = ordered > 0.2
    assert torch.equal(numerics.unsort(mask, order), x > 0.2)


# gradients


@pytest.mark.parametrize("count, anti_count", [(0, 0), (1, 0), (1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("plausible", [(0, 0.0), (1, 0.05), (2, 0.9)])
def test_fuse_backward_is_the_derivative(count: int, anti_count: int, plausible: tuple[int, float]):
    """Its general form against autograd through sums of z, lse, log-probabilities and entropy."""
    rows, width = 3, 11
    finite = _logits(rows, width).requires_grad_()
    base = finite.detach().clone()
    base[:, 4] = -INF
    experts = [_logits(rows, width + 2, seed=k + 1).requires_grad_() for k in range(count)]
    anti = [_logits(rows, width + 1, seed=k + 9).requires_grad_() for k in range(anti_count)]
    weights = _logits(rows, count, seed=20).requires_grad_()
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).requires_grad_()
    given = Fusion(base, experts, anti, weights, [], 0.7, temperature, 1.0, *plausible, width)
    with torch.no_grad():
        live = fuse.fused(given) > -INF
    assert live.any(-1).all() and not live[:, 4].any()
    z = plain_fusion(finite, [e[:, :width] for e in experts], [a[:, :width] for a in anti] or None, weights, 0.7,
                     temperature, torch.float64)
    z = torch.where(live, z, -1e4)  # whose exp is 0, without a derivative of -inf
    up, targets, flags = _logits(rows, width, seed=30), live.int().argmax(-1), _logits(3, rows, seed=31)
    logp = z.log_softmax(-1)
    lse, entropy = z.logsumexp(-1), -(logp.exp() * logp).sum(-1)
    up = torch.where(live, up, 0.0)
    picked = z.gather(1, targets.unsqueeze(1)).squeeze(1)
    loss = (logp * up).sum() + (flags[0] * lse + flags[1] * entropy + flags[2] * picked).sum()
    wanted = torch.autograd.grad(loss, [finite, *experts, *anti, *([weights] if count else []), temperature])
    with torch.no_grad():
        dz, dweights, dheat = backward.fuse_backward(
            given, up, lse, flags[0] + flags[1] * (lse - entropy), -flags[1], targets.unsqueeze(1),
            flags[2].unsqueeze(1), True, True,
        )
    assert bool((dz[~live] == 0).all())
    torch.testing.assert_close(0.7 * dz, wanted[0])
    for k in range(count):
        torch.testing.assert_close(weights[:, k : k + 1] * dz, wanted[1 + k][:, :width])
        assert bool((wanted[1 + k][:, width:] == 0).all())
    if anti_count == 1:
        torch.testing.assert_close(-weights.sum(1, keepdim=True) * dz, wanted[1 + count][:, :width])
    if count:
        torch.testing.assert_close(dweights, wanted[-2])
    torch.testing.assert_close(dheat, wanted[-1])


def test_fuse_backward_without_upstream_is_zero():
    base = _logits(2, 5)
    dz, dweights, dheat = backward.fuse_backward(
        Fusion(base, [base], [], None, [1.0], 1.0, None, 1.0, 0, 0.0, 5),
        None, base.logsumexp(-1), None, None, None, None, False, False,
    )
    assert dz.shape == base.shape and bool((dz == 0).all())
    assert dweights.shape == dheat.shape == (0,)


def test_fuse_backward_adds_repeated_indices():
    base = _logits(1, 4)
    dz = backward.fuse_backward(
        Fusion(base, [], [], None, [], 1.0, None, 2.0, 0, 0.0, 4), None, base.logsumexp(-1), None, None,
        torch.tensor([[2, 2]]), torch.tensor([[3.0, 5.0]]), False, False,
    )[0]
    torch.testing.assert_close(dz, torch.tensor([[0.0, 0.0, 4.0, 0.0]], dtype=torch.float64))


def _solve(base, experts, anti, multi=0, kind=0, direction=None, average=False, target=None, alpha_max=2.0):
    width = base.shape[1]
    given = Solve(base, experts, anti, alpha_max, 16, -1, 1e-4, multi, kind, direction, average, target, width)
    return dynamic_weights.dynamic_fusion_weights(given)


@pytest.mark.parametrize("multi, kind, average, shared, override", [
    (0, 0, False, True, False), (0, 0, False, False, True), (0, 2, False, True, False), (1, 0, False, True, False),
    (1, 0, True, False, False), (1, 0, True, True, True),
])  # fmt: skip
def test_dynamic_backward_is_the_derivative(multi: int, kind: int, average: bool, shared: bool, override: bool):
    """Central differences of the solver, every input column by column."""
    rows, width, count = 2, 5, 2
    base = _logits(rows, width)
    anti = [base + 0.3 * _logits(rows, width, seed=k + 5) for k in range(1 if shared else count)]
    experts = [anti[0 if shared else k] + 0.4 * _logits(rows, width, seed=k + 1) for k in range(count)]
    direction = torch.tensor([[1.0, 0.4], [0.3, 1.0]], dtype=torch.float64) if kind == 2 else None
    target = torch.tensor([[0.01, 0.02], [0.005, 0.03]], dtype=torch.float64) if override else None

    def alpha(*tensors: torch.Tensor) -> torch.Tensor:
        b, e, a = tensors[0], list(tensors[1 : 1 + count]), list(tensors[1 + count : 1 + count + len(anti)])
        t = tensors[-1] if override else None
        return _solve(b, e, a, multi, kind, direction, average, t, alpha_max=8.0)[0]

    inputs = [base, *experts, *anti, *([target] if target is not None else [])]
    solved = _solve(base, experts, anti, multi, kind, direction, average, target, alpha_max=8.0)
    assert not bool(solved[3].any()), "pick rows that have a root"
    up = _logits(rows, count, seed=40)
    dbase, dexperts, danti, dtarget = backward.dynamic_fusion_weights_backward(
        up, solved[0], solved[3], base, experts, anti, multi, kind, direction, average, override, width
    )
    found = [dbase, *dexperts, *danti, *([dtarget] if override else [])]
    step = 1e-5
    for index, (tensor, gradient) in enumerate(zip(inputs, found, strict=True)):
        for column in range(tensor.shape[1]):
            values = []
            for sign in (1, -1):
                moved = [t.clone() for t in inputs]
                moved[index][:, column] += sign * step
                values.append((alpha(*moved) * up).sum(1))
            torch.testing.assert_close(gradient[:, column], (values[0] - values[1]) / (2 * step), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("multi", [0, 1])
def test_dynamic_backward_sums_to_zero(multi: int):
    """A constant added to a row of any model changes no weight."""
    m = language_models(4, 300, 3, seed=3, dtype=torch.float64)
    alpha, _, _, saturated = _solve(m.base, m.experts, [m.anti], multi)
    up = torch.ones_like(alpha)
    dbase, dexperts, danti, _ = backward.dynamic_fusion_weights_backward(
        up, alpha, saturated, m.base, m.experts, [m.anti], multi, 0, None, False, False, 300
    )
    for gradient in (dbase, *dexperts, *danti):
        assert float(gradient.abs().max()) > 1e-4
        assert float(gradient.sum(-1).abs().max()) < 1e-12


def test_dynamic_backward_is_zero_at_the_bounds_and_past_the_vocabulary():
    base = torch.zeros(2, 4, dtype=torch.float64)
    anti = torch.tensor([[0.0, 5, 5, 5], [0.0, 0, 0, 0]], dtype=torch.float64)
    expert = torch.tensor([[20.0, 0, 0, 0], [3.0, 3, 3, 3]], dtype=torch.float64)
    expert = torch.nn.functional.pad(expert, (0, 3), value=NAN)
    alpha, _, _, saturated = _solve(base, [expert], [anti])
    assert alpha.tolist() == [[2.0], [0.0]] and saturated.tolist() == [[True], [False]]
    result = backward.dynamic_fusion_weights_backward(
        torch.ones_like(alpha), alpha, saturated, base, [expert], [anti], 0, 0, None, False, False, 4
    )
    for gradient, like in zip((result[0], result[1][0], result[2][0]), (base, expert, anti), strict=True):
        assert gradient.shape == like.shape and bool((gradient == 0).all())


# the solver


def test_solver_reaches_double_precision():
    m = language_models(24, 2000, shift=1.5, seed=1, dtype=torch.float64)
    alpha, target, achieved, saturated = _solve(m.base, m.experts, [m.anti])
    direct = tilted_kl(m.base, alpha * (m.experts[0] - m.anti))
    open_rows = ~saturated[:, 0]
    assert int(open_rows.sum()) > 16
    assert float((direct - target[:, 0])[open_rows].abs().max()) < 1e-12
    torch.testing.assert_close(achieved[:, 0], direct, atol=1e-12, rtol=0)


def test_solver_on_adversarial_rows():
    """Spikes of 40 and shifts of 40, where a polynomial between nodes errs by 1e-2."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    base[:, 0] += 40
    anti = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    expert = anti + 10 * torch.randn(40, 50, generator=generator, dtype=torch.float64)
    expert[::2, 1] += 40
    alpha, target, _, saturated = _solve(base, [expert], [anti])
    error = (tilted_kl(base, alpha * (expert - anti)) - target[:, 0]).abs() / target[:, 0].clamp_min(1.0)
    moves = tilted_kl(base, 2.0 * (expert - anti)) > 1e-12  # a spike that no shift moves keeps alpha = 0
    assert bool((alpha[~moves] == 0).all()) and 0 < int(saturated.sum()) < 20
    assert float(error[moves & ~saturated[:, 0]].max()) < 1e-12


@pytest.mark.parametrize("count", [1, 2, 3])
def test_product_search_is_the_loop(count: int):
    m = language_models(3, 60, count, seed=5, dtype=torch.float64)
    nodes = 4
    alpha, achieved, _ = dynamic_weights.search_product(
        dynamic_weights.log_probabilities(m.base, 60), [e - m.anti for e in m.experts],
        dynamic_weights.tilts(m.base, m.experts, [m.anti], 60).kl, 2.0, nodes, 1,
    )
    kl = torch.stack([tilted_kl(m.anti, e - m.anti) for e in m.experts], 1)
    for row in range(3):
        best, argument = INF, ()
        for point in itertools.product([0.5, 1.0, 1.5, 2.0], repeat=count):
            moved = sum(a * (e - m.anti)[row : row + 1] for a, e in zip(point, m.experts, strict=True))
            value = float((tilted_kl(m.base[row : row + 1], moved) - kl[row]).square().sum())
            if value < best - 1e-13:
                best, argument = value, point
        assert alpha[row].tolist() == list(argument)
        moved = sum(a * (e - m.anti)[row : row + 1] for a, e in zip(argument, m.experts, strict=True))
        torch.testing.assert_close(achieved[row], tilted_kl(m.base[row : row + 1], moved)[0], atol=1e-12, rtol=0)


def test_ray_directions():
    kl = torch.tensor([[0.2, 0.4], [0.0, 0.0], [INF, 0.3], [NAN, 0.1]], dtype=torch.float64)
    assert bool((dynamic_weights.ray_direction(0, None, kl) == 1).all())
    found = dynamic_weights.ray_direction(1, None, kl)
    assert found[:3].tolist() == [[0.5, 1.0], [1.0, 1.0], [1.0, 0.0]]
    given = torch.tensor([[3.0, 1.5], [0.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert dynamic_weights.ray_direction(2, given, kl).tolist() == [[1.0, 0.5], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]


# sampling and statistics against loops in Python


def _kept_by_hand(z: list[float], top_k: int, top_p: float, min_p: float) -> list[int]:
    order = sorted((i for i in range(len(z)) if z[i] > -INF), key=lambda i: (-z[i], i))
    if top_k:
        order = order[:top_k]
    masses = [math.exp(z[i] - z[order[0]]) for i in order]
    if top_p < 1.0:
        total, seen, size = math.fsum(masses), 0.0, 0
        while size < len(order) and seen < top_p * total:
            seen += masses[size]
            size += 1
        order = order[:size]
    return sorted(i for i in order if math.exp(z[i] - z[order[0]]) >= min_p)


def test_filters_and_draw_are_the_loop():
    rng = random.Random(0)
    for _ in range(300):
        width = rng.randint(1, 12)
        z = [rng.choice([-INF, 0.5, 1.5, rng.gauss(0, 2), rng.gauss(0, 2)]) for _ in range(width)]
        if max(z) == -INF:
            continue
        top_k, top_p = rng.choice([0, 1, 2, 5, 50]), rng.choice([1.0, 1.0, 0.317, 0.713, 0.951])
        min_p, u = rng.choice([0.0, 0.0, 0.051, 0.313]), rng.random()
        tensor = torch.tensor([z], dtype=torch.float64)
        keep = sample.filtered(tensor, top_k, top_p, min_p)
        kept = _kept_by_hand(z, top_k, top_p, min_p)
        assert keep[0].nonzero().flatten().tolist() == kept, (z, top_k, top_p, min_p)
        masses = [math.exp(z[i]) for i in kept]
        seen, token = 0.0, kept[-1]
        for i, mass in zip(kept, masses, strict=True):
            seen += mass
            if seen > u * math.fsum(masses):
                token = i
                break
        assert sample.draw(tensor, keep, torch.tensor([u], dtype=torch.float64)).item() == token


def test_stats_are_torch():
    m = language_models(5, 401, 2, seed=8, dtype=torch.float64)
    weights, targets = torch.rand(5, 2, dtype=torch.float64), torch.tensor([0, 400, 7, 7, 123])
    z = plain_fusion(m.base, m.experts, m.anti, weights, temperature=0.7, dtype=torch.float64)
    given = Fusion(m.base, m.experts, [m.anti], weights, [], 1.0, None, 0.7, 0, 0.0, 401)
    found = stats.fused_stats(given, targets)
    logp = z.log_softmax(-1)
    expected = (z.logsumexp(-1), z.amax(-1), z.argmax(-1), torch.distributions.Categorical(logits=z).entropy(),
                logp.gather(1, targets.unsqueeze(1)).squeeze(1))  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    again, lse = log_softmax.fused_log_softmax(given, torch.float64)
    torch.testing.assert_close(again, logp)
    torch.testing.assert_close(lse, z.logsumexp(-1))
