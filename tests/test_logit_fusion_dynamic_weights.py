"""dynamic_fusion_weights: closed forms, accuracy of the solve, the grid, rows that go wrong."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import w2s_fast
from w2s_fast.testing.synthetic import CPU_BACKENDS, kl_at, language_models, targets_of, tilted_kl

INF, NAN, LN3 = math.inf, math.nan, math.log(3.0)
KL_075 = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


def _row(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([values], dtype=dtype)


#: base, anti, expert, target_kl (given if not None), KL(Q || Q_0), alpha, saturated (None: either)
CLOSED = {
    "halves": ((0, 0), (0, 0), (LN3, 0), None, KL_075, 1.0, False),
    "against": ((0, LN3), (0, 0), (LN3, 0), None, KL_075, 0.9558364618, False),
    "along": ((LN3, 0), (0, 0), (LN3, 0), None, KL_075, 1.5456362573, False),
    "four": ((0,) * 4, (0,) * 4, (LN3, 0, 0, 0), None, 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 1.0, False),
    "out of reach": ((0,) * 4, (0, 5, 5, 5), (20, 0, 0, 0), None, 6.1008556, 2.0, True),
    "constant shift": ((1, 2, 3), (0, 1, 0), (7, 8, 7), None, 0.0, 0.0, False),
    "same base": ((1, 2, 3, 0, -1), (1.5, 2.5, 3.5, 0.5, -0.5), (0, 3, 1, 2, -2), None, 0.9104713, 1.0, False),
    "peaked": ((10, 0, 0), (0, 0, 0), (-3, 1, 2), None, 0.4883053, 1.4723213, False),
    "boundary": ((0, 0), (0, 0), (0.5 * LN3, 0), KL_075, KL_075, 2.0, None),
    "twice the shift": ((0, 0), (0, 0), (2 * LN3, 0), KL_075, KL_075, 0.5, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(backend, name, dtype):
    base, anti, expert, given, kl, alpha, saturated = CLOSED[name]
    target = None if given is None else torch.tensor([given], dtype=dtype)
    found = w2s_fast.dynamic_fusion_weights(
        _row(*base, dtype=dtype), [_row(*expert, dtype=dtype)], _row(*anti, dtype=dtype), target_kl=target, tol=1e-6,
        nodes=32,
    )
    assert found.alpha.shape == (1, 1) and found.alpha.dtype == dtype
    assert found.alpha.item() == pytest.approx(alpha, abs=1e-4 if name == "boundary" else 3e-5)
    assert found.target_kl.item() == pytest.approx(kl, abs=2e-6)
    assert saturated is None or found.saturated.item() is saturated
    if name == "out of reach":
        assert found.alpha.item() == 2.0 and found.achieved_kl.item() == pytest.approx(math.log(4), abs=1e-5)
    if name == "constant shift":
        assert found.alpha.item() == 0.0 and found.achieved_kl.item() == pytest.approx(0.0, abs=1e-7)
    if saturated is False:
        assert found.achieved_kl.item() == pytest.approx(kl, abs=3e-6)


@pytest.mark.parametrize("p, delta, target", [(0.25, 1.3, 0.2), (0.5, -2.0, 0.3), (0.9, 3.0, 0.05), (0.03, 2.5, 1.1)])
def test_two_tokens(backend, p, delta, target):
    """P_alpha(0) = sigmoid(logit p + alpha delta), KL by hand; and the same shift on a set of tokens of mass p."""
    base, goal = _row(math.log(p), math.log(1 - p)), torch.tensor([target])
    found = w2s_fast.dynamic_fusion_weights(base, [_row(delta, 0.0)], _row(0.0, 0.0), target_kl=goal, tol=1e-6)
    q = 1 / (1 + math.exp(-(math.log(p / (1 - p)) + found.alpha.item() * delta)))
    kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert kl == pytest.approx(target, abs=5e-6)
    inside = torch.rand(1, 700, generator=torch.Generator().manual_seed(1)) < 0.3
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(2))
    mass = logits.exp()
    scaled = torch.where(inside, p * mass / mass[inside].sum(), (1 - p) * mass / mass[~inside].sum()).log()
    many = w2s_fast.dynamic_fusion_weights(scaled, [inside * delta], torch.zeros(1, 700), target_kl=goal, tol=1e-6)
    torch.testing.assert_close(many.alpha, found.alpha, atol=1e-4, rtol=0)


def _solved(m, found, tol: float, alpha_max: float = 2.0) -> None:
    """Rows in reach meet their target to tol max(1, T); the others stand at the end, or where F has stopped to grow."""
    ones = torch.ones_like(found.alpha)
    target, got, reach = targets_of(m).mean(-1), kl_at(m, found.alpha), kl_at(m, alpha_max * ones)
    allowed = tol * target.clamp_min(1.0)
    inside = target < reach - allowed
    assert bool(((got - target).abs() <= allowed)[inside].all()), (got - target)[inside].abs().max()
    assert not bool(found.saturated[inside].any())
    outside = target > reach + allowed
    at_end = (found.alpha == alpha_max).all(-1) | (reach - got <= 1e-6)
    assert bool(at_end[outside].all())
    assert bool(((found.achieved_kl.double() - got).abs() <= allowed).all())


@pytest.mark.parametrize("peak, shift", [(0.0, 1.0), (9.0, 0.5), (9.0, 1.5), (14.0, 1.0), (14.0, 3.0)])
def test_accuracy_on_language_models(backend, peak, shift):
    """KL residual below 1e-5 nats with 20 nodes at V = 32,000; the target itself to 1e-5."""
    m = language_models(12, 32000, peak=peak, shift=shift, seed=int(peak))
    found = w2s_fast.dynamic_fusion_weights(m.base, m.experts, m.anti, nodes=20)
    _solved(m, found, 1e-5)
    torch.testing.assert_close(found.target_kl.double(), targets_of(m), atol=1e-5, rtol=1e-5)
    low = language_models(4, 32000, peak=peak, shift=shift, seed=int(peak), dtype=torch.bfloat16)
    _solved(low, w2s_fast.dynamic_fusion_weights(*low, nodes=20), 1e-5)


@pytest.mark.parametrize("nodes", [2, 5, 8, 16, 32])
def test_few_nodes_are_repaired_to_the_tolerance(backend, nodes):
    m = language_models(12, 5003, shift=2.0, seed=3)
    _solved(m, w2s_fast.dynamic_fusion_weights(*m, nodes=nodes, tol=1e-4), 1e-4)
    _solved(m, w2s_fast.dynamic_fusion_weights(*m, nodes=nodes, alpha_max=1.5), 1e-4, 1.5)


@pytest.mark.parametrize("seed", range(4))
def test_adversarial_rows(backend, seed):
    """Spikes of 40 and shifts of up to 40: the sweep alone is off by 1e-2 there."""
    m = language_models(24, 1009, peak=5.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    spikes = torch.randint(1009, (24, 2), generator=generator)
    base = m.base.scatter_add(1, spikes[:, :1], torch.rand(24, 1, generator=generator) * 45)
    expert = m.experts[0].scatter_add(1, spikes, torch.rand(24, 2, generator=generator) * 80 - 40)
    hard = type(m)(base, [expert], m.anti)
    _solved(hard, w2s_fast.dynamic_fusion_weights(base, [expert], m.anti, tol=1e-4), 1e-4)


def test_offsets_change_nothing(backend):
    """A constant a row on any model (here 3.7, -120, 55) leaves alpha; offsets of 1e4 leave it finite."""
    m = language_models(8, 3001, seed=4)
    plain = w2s_fast.dynamic_fusion_weights(*m, tol=1e-6)
    moved = w2s_fast.dynamic_fusion_weights(m.base + 3.7, [m.experts[0] - 120.0], m.anti + 55.0, tol=1e-6)
    torch.testing.assert_close(moved.alpha, plain.alpha, atol=1e-4, rtol=0)
    torch.testing.assert_close(moved.target_kl, plain.target_kl, atol=2e-5, rtol=0)
    far = w2s_fast.dynamic_fusion_weights(m.base + 1e4, [m.experts[0] - 1e4], m.anti + 1e4)
    assert all(bool(torch.isfinite(t).all()) for t in far[:3])
    same = w2s_fast.dynamic_fusion_weights(m.base, [m.experts[0] + 8.0], m.base + 16.0, tol=1e-6)
    alone = w2s_fast.dynamic_fusion_weights(m.base, m.experts, m.base, tol=1e-6)
    torch.testing.assert_close(same.alpha, alone.alpha, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone.alpha, torch.ones_like(alone.alpha), atol=1e-4, rtol=0)  # z_0 = z_L: alpha = 1


# the grid


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_grid_is_the_naive_grid(backend, first, shift):
    m = language_models(32, 8009, shift=shift, seed=5)
    grid = torch.arange(first, 21) / 10
    found = w2s_fast.dynamic_fusion_weights(*m, solver="grid", grid=grid)
    values = torch.stack([kl_at(m, torch.full((32, 1), float(a))) for a in grid.double()], 1)
    misfit = (values - targets_of(m)).square()
    best = misfit.argmin(1)
    ordered = misfit.sort(1).values
    clear = ordered[:, 1] - ordered[:, 0] > 1e-5
    assert int(clear.sum()) > 8
    chosen = (found.alpha[:, 0] * 10).round().long() - first
    torch.testing.assert_close(found.alpha[:, 0], grid[chosen], atol=1e-6, rtol=0)
    assert torch.equal(chosen[clear], best[clear])
    # rows whose two best candidates are this close are decided by rounding; the objective tells no difference
    taken = misfit.gather(1, chosen.unsqueeze(1))[:, 0]
    assert float((taken - ordered[:, 0]).max()) <= 1e-5
    if backend == "reference":
        assert torch.equal(chosen, best)
    achieved = values.gather(1, chosen.unsqueeze(1))[:, 0]
    torch.testing.assert_close(found.achieved_kl.double(), achieved, atol=1e-5, rtol=1e-5)


def test_grid_ties_and_ends(backend):
    zero = torch.zeros(1, 3)
    flat = w2s_fast.dynamic_fusion_weights(zero, [zero + 2.0], zero, solver="grid", target_kl=torch.tensor([0.3]))
    assert flat.alpha.item() == pytest.approx(0.1) and not flat.saturated.item()
    from_zero = w2s_fast.dynamic_fusion_weights(zero, [zero + 2.0], zero, solver="grid", grid=[0.0, 0.5, 1.0])
    assert from_zero.alpha.item() == 0.0
    far = w2s_fast.dynamic_fusion_weights(
        zero, [_row(1.0, 0.0, 0.0)], zero, solver="grid", grid=[0.25, 0.5, 0.75], target_kl=torch.tensor([5.0])
    )
    assert far.alpha.item() == 0.75 and far.saturated.item()
    unbounded = w2s_fast.dynamic_fusion_weights(zero, [_row(1.0, 0, 0)], _row(-INF, 0, 0), solver="grid")
    assert unbounded.alpha.item() == 2.0 and unbounded.saturated.item() and unbounded.target_kl.item() == INF


def test_product_grid(backend):
    m = language_models(4, 300, 2, seed=6)
    found = w2s_fast.dynamic_fusion_weights(*m, solver="grid", multi="grid", grid=[0.5, 1.0, 1.5, 2.0])
    goal = targets_of(m)
    for row in range(4):
        objective = {}
        for point in itertools.product([0.5, 1.0, 1.5, 2.0], repeat=2):
            value = kl_at(m, torch.tensor([point] * 4))[row]
            objective[point] = float((value - goal[row]).square().sum())
        best = min(objective.values())
        assert objective[tuple(found.alpha[row].tolist())] <= best + 1e-6
    assert found.achieved_kl.shape == (4,)


# rows that go wrong, layouts


def test_masked_columns(backend):
    m = language_models(5, 401, seed=12)
    base, expert, anti = m.base.clone(), m.experts[0].clone(), m.anti.clone()
    base[:, ::3] = -INF
    expert[1, 30:60], anti[1, 30:60] = -INF, -INF  # both mask: not shifted, part of base's distribution
    anti[2, 5] = -INF  # KL infinite
    anti[3, 6], expert[3, 9] = -INF, -INF  # KL infinite, under base's mask
    found = w2s_fast.dynamic_fusion_weights(base, [expert], anti, tol=1e-6)
    live = base > -INF
    assert found.target_kl[2:4].tolist() == [[INF], [INF]]
    assert found.alpha[2:4].tolist() == [[2.0], [2.0]] and found.saturated[2:4].tolist() == [[True], [True]]
    for row in (0, 1, 4):
        columns = live[row]
        d = (expert[row] - anti[row]).nan_to_num(0.0)[columns]
        got = tilted_kl(base[row : row + 1, columns], found.alpha[row].double() * d.double().unsqueeze(0))
        small = anti[row] > -INF
        goal = tilted_kl(anti[row : row + 1, small], (expert[row] - anti[row])[small].double().unsqueeze(0))
        assert found.target_kl[row].item() == pytest.approx(goal.item(), abs=1e-5)
        assert found.saturated[row].item() or got.item() == pytest.approx(goal.item(), abs=1e-5)


def test_an_expert_that_masks_tokens(backend):
    """d = -inf on some tokens: finite weights, no NaN, and the target is met on what is left."""
    m = language_models(4, 301, peak=3.0, seed=13)
    expert = m.experts[0].clone()
    expert[:, 40:80] = -INF
    found = w2s_fast.dynamic_fusion_weights(m.base, [expert], m.anti)
    assert all(bool(torch.isfinite(t).all()) for t in found[:3])
    assert bool((found.alpha > 0).all())
    goal = (expert.double().softmax(-1) * (expert.log_softmax(-1).double() - m.anti.log_softmax(-1).double())
            .nan_to_num(neginf=0.0)).sum(-1)  # fmt: skip
    torch.testing.assert_close(found.target_kl[:, 0].double(), goal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["base", "expert", "anti"])
def test_nan_stays_in_its_row(backend, where):
    m = language_models(3, 257, seed=14)
    clean = w2s_fast.dynamic_fusion_weights(*m)
    tensors = {"base": m.base.clone(), "expert": m.experts[0].clone(), "anti": m.anti.clone()}
    tensors[where][1, 100] = NAN
    found = w2s_fast.dynamic_fusion_weights(tensors["base"], [tensors["expert"]], tensors["anti"])
    assert found.alpha.isnan()[:, 0].tolist() == [False, True, False] and not bool(found.saturated.any())
    assert bool(found.achieved_kl[1].isnan())
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_rows_without_a_distribution(backend):
    m = language_models(3, 65, seed=15)
    base, expert = m.base.clone(), m.experts[0].clone()
    base[1], expert[2] = -INF, -INF
    found = w2s_fast.dynamic_fusion_weights(base, [expert], m.anti)
    assert found.alpha.isnan()[:, 0].tolist() == [False, True, True]
    assert not bool(found.saturated[1:].any())


def test_layouts_and_batches_change_no_bits(backend):
    m = language_models(7, 1031, 2, seed=16, dtype=torch.bfloat16)
    whole = w2s_fast.dynamic_fusion_weights(*m)
    again = w2s_fast.dynamic_fusion_weights(*m)
    part = w2s_fast.dynamic_fusion_weights(m.base[3:5], [e[3:5] for e in m.experts], m.anti[3:5])
    rows = [torch.stack((t, t.new_full(t.shape, NAN)), 1)[:, 0] for t in (m.base, *m.experts, m.anti)]
    strided = w2s_fast.dynamic_fusion_weights(rows[0], rows[1:3], rows[3])
    wide = [torch.nn.functional.pad(t, (0, i + 1), value=NAN) for i, t in enumerate((m.base, *m.experts, m.anti))]
    padded = w2s_fast.dynamic_fusion_weights(wide[0], wide[1:3], wide[3], vocab_size=1031)
    for a, b, c, d, e in zip(whole, again, part, strided, padded, strict=True):
        assert torch.equal(a, b) and torch.equal(a[3:5], c) and torch.equal(a, d) and torch.equal(a, e)


def test_odd_shapes(backend):
    for shape in ((0, 17), (2, 0, 17), (2, 3, 17), (3, 1), (17,)):
        base, expert, anti = torch.randn(shape), torch.randn(2, *shape), torch.randn(shape)
        found = w2s_fast.dynamic_fusion_weights(base, expert, anti)
        assert found.alpha.shape == found.target_kl.shape == found.saturated.shape == (*shape[:-1], 2)
        assert found.achieved_kl.shape == shape[:-1]
    one = w2s_fast.dynamic_fusion_weights(torch.randn(3, 1), [torch.randn(3, 1)], torch.randn(3, 1))
    assert bool((one.alpha == 0).all()) and not bool(one.saturated.any())


def test_mixed_dtypes(backend):
    m = language_models(5, 800, 2, seed=17)
    mixed = type(m)(m.base.half(), [m.experts[0].bfloat16(), m.experts[1]], m.anti.half())
    _solved(mixed, w2s_fast.dynamic_fusion_weights(*mixed, tol=1e-5), 1e-5)
    wide = w2s_fast.dynamic_fusion_weights(m.base.double(), m.experts, m.anti)
    assert wide.alpha.dtype == wide.achieved_kl.dtype == torch.float64
