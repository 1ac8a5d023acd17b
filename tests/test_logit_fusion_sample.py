"""fused_sample: the law of the draw, the filters by hand, reproducibility, rows that go wrong."""

from __future__ import annotations

import math

import pytest
import torch

import w2s_fast
from w2s_fast.testing.accuracy import assert_accurate
from w2s_fast.testing.calls import Calls
from w2s_fast.testing.synthetic import CPU_BACKENDS, language_models, plain_fusion

INF, NAN = math.inf, math.nan
BY_HAND = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


def _same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert x is y is None or torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


_NUCLEUS = pytest.mark.parametrize(
    ("kind", "top_p"),
    [(kind, p) for kind in ("plain", "peaks", "equal", "masked", "one", "in order") for p in (0.1, 0.9, 0.995)],
)


# the law


def _counts(base, expert, anti, uniform, **settings) -> torch.Tensor:
    """How often each token comes up over all numbers in ``uniform``; one row of logits, read through stride 0."""
    width = base.shape[-1]
    count = torch.zeros(width, dtype=torch.int64)
    for part in uniform.split(4000):
        rows = [t.expand(len(part), width) for t in (base, expert, anti)]
        token = w2s_fast.fused_sample(rows[0], [rows[1]], rows[2], uniform=part, **settings).token
        count += torch.bincount(token, minlength=width)
    return count


def test_law_of_many_draws(backend):
    """Chi-square over the tokens expected at least 5 times, and every token within binomial bounds."""
    # the reference holds whole rows for every draw
    width, number = (2000, 200_000) if backend != "reference" else (500, 120_000)
    m = language_models(1, width, peak=4.0, seed=1)
    uniform = torch.rand(number, generator=torch.Generator().manual_seed(2))
    count = _counts(m.base, m.experts[0], m.anti, uniform, temperature=0.8).double()
    p = plain_fusion(*m, temperature=0.8, dtype=torch.float64).softmax(-1)[0]
    expected = p * number
    common = expected >= 5
    statistic = ((count - expected).square() / expected)[common].sum()
    rest, rest_expected = count[~common].sum(), expected[~common].sum()
    statistic = statistic + (rest - rest_expected).square() / rest_expected.clamp_min(1e-9)
    freedom = int(common.sum())
    assert freedom > 200
    assert abs(float(statistic) / freedom - 1) < 5 * math.sqrt(2 / freedom)
    assert bool(((count - expected).abs() <= 6 * (expected * (1 - p)).sqrt() + 6).all())


@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"plausible": ("top_p", 0.8)}], ids=str
)
def test_evenly_spaced_numbers_give_exact_shares(backend, filters):
    """With u = (i + 1/2) / N each kept token comes up N P times, one more or less."""
    m = language_models(1, 300, peak=5.0, seed=3)
    number = 20_000
    uniform = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    count = _counts(m.base, m.experts[0], m.anti, uniform, **filters)
    z = plain_fusion(*m, dtype=torch.float64)
    p = torch.where(_kept(m.base.double(), z, filters), z, -INF).softmax(-1)[0]
    assert bool(((count - number * p).abs() <= 1.05).all()), (count - number * p).abs().max()
    assert bool((count[p == 0] == 0).all())


def _kept(base: torch.Tensor, z: torch.Tensor, filters: dict) -> torch.Tensor:
    """The kept set in float64 by sorting."""

    def nucleus(x: torch.Tensor, level: float) -> torch.Tensor:
        ordered, order = x.softmax(-1).sort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered < level)

    keep = torch.isfinite(z)
    kind, level = filters.get("plausible", ("", 0.0))
    if kind:
        keep &= nucleus(base, level) if kind == "top_p" else base >= base.amax(-1, keepdim=True) + math.log(level)
    if "top_k" in filters:
        order = torch.where(keep, z, -INF).sort(dim=-1, descending=True, stable=True).indices
        keep &= torch.zeros_like(keep).scatter(-1, order[..., : filters["top_k"]], True)
    if "top_p" in filters:
        keep &= nucleus(torch.where(keep, z, -INF), filters["top_p"])
    if "min_p" in filters:
        best = torch.where(keep, z, -INF).amax(-1, keepdim=True)
        keep &= z >= best + math.log(filters["min_p"])
    return keep


# filters


@pytest.mark.parametrize("filters, kept", [
    ({"top_p": 0.49}, [0]), ({"top_p": 0.51}, [0, 1]), ({"top_p": 0.79}, [0, 1]), ({"top_p": 0.81}, [0, 1, 2]),
    ({"min_p": 0.29}, [0, 1, 2]), ({"min_p": 0.31}, [0, 1]), ({"min_p": 0.61}, [0]), ({"top_k": 2}, [0, 1]),
    ({"top_k": 4}, [0, 1, 2, 3]), ({"top_k": 9}, [0, 1, 2, 3]), ({}, [0, 1, 2, 3]), ({"top_p": 1e-9}, [0]),
    ({"top_k": 2, "top_p": 0.62}, [0]),  # 0.5 of 0.8 is 0.625: renormalised
    ({"top_k": 2, "top_p": 0.63}, [0, 1]), ({"top_k": 3, "min_p": 0.31}, [0, 1]),
    ({"top_p": 0.96, "min_p": 0.2}, [0, 1, 2]),
    ({"min_p": 1.0}, [0]), ({"top_k": 1}, [0]),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]], ids=str)
def test_truncation_by_hand(backend, filters, kept, order):
    logits = BY_HAND.log()[:, order].repeat(512, 1) + 2.0
    uniform = torch.arange(512) / 512
    found = w2s_fast.fused_sample(logits, uniform=uniform, **filters)
    places = sorted(order.index(i) for i in kept)
    assert found.kept.dtype == torch.int32 and found.kept.tolist() == [len(kept)] * 512
    assert found.token.unique().tolist() == places
    assert found.token[0] == places[0] and found.token[-1] == places[-1]
    assert bool((found.token.diff() >= 0).all())
    torch.testing.assert_close(found.logprob, BY_HAND.log()[0, order][found.token])
    torch.testing.assert_close(found.lse, torch.full((512,), 2.0))


def test_ties_are_kept_by_index(backend):
    equal = torch.zeros(2, 4)
    uniform = torch.tensor([0.1, 0.99])
    assert w2s_fast.fused_sample(equal, top_k=2, uniform=uniform).token.tolist() == [0, 1]
    found = w2s_fast.fused_sample(equal, top_p=0.7, uniform=uniform)
    assert found.kept.tolist() == [3, 3] and found.token.tolist() == [0, 2]
    many = torch.zeros(1, 5003)
    many[:, 2500:] = 1.0  # 2503 equal best
    for k in (1, 7, 1000):
        last = w2s_fast.fused_sample(many, top_k=k, uniform=torch.tensor([1 - 2.0**-24]))
        assert last.kept.item() == k and last.token.item() == 2500 + k - 1


def test_filters_on_language_models(backend):
    """The number of kept tokens against sorting in float64."""
    m = language_models(16, 8009, seed=4)
    z = plain_fusion(*m, temperature=0.9, dtype=torch.float64)
    uniform = torch.rand(16, generator=torch.Generator().manual_seed(5))
    for filters in ({"top_p": 0.9}, {"top_p": 0.5}, {"top_p": 0.999}, {"top_k": 50}, {"top_k": 1}, {"top_k": 4000},
                    {"min_p": 0.02}, {"top_k": 100, "top_p": 0.8}, {"top_k": 60, "top_p": 0.95, "min_p": 0.01},
                    {"plausible": ("min_p", 0.05), "top_p": 0.9}, {"plausible": ("top_p", 0.9), "top_k": 30}):
        found = w2s_fast.fused_sample(*m, temperature=0.9, uniform=uniform, **filters)
        keep = _kept(m.base.double(), z, filters)
        # float32 logits decide the last token of a nucleus up to 1e-6 of mass, hundreds of tokens at 0.999
        levels = [{"top_p": filters["top_p"] * (1 + e)} if "top_p" in filters else {} for e in (-1e-6, 1e-6)]
        fewest, most = (_kept(m.base.double(), z, {**filters, **level}) for level in levels)
        assert bool(((fewest.sum(-1) <= found.kept) & (found.kept <= most.sum(-1))).all()), filters
        mass = torch.where(keep, z, -INF).softmax(-1)
        cumulative = mass.cumsum(-1)
        at = found.token.unsqueeze(1)
        assert bool(most.gather(1, at).all())
        # u lies within the token's own interval, up to the rounding of float32 sums
        assert bool((cumulative.gather(1, at)[:, 0] >= uniform - 1e-5).all())
        assert bool((cumulative.gather(1, at) - mass.gather(1, at) <= uniform.unsqueeze(1) + 1e-5).all())
        plausible = _kept(m.base.double(), z, {"plausible": filters.get("plausible", ("", 0.0))})
        logp = torch.where(plausible, z, -INF).log_softmax(-1).gather(1, at)[:, 0]
        torch.testing.assert_close(found.logprob.double(), logp, atol=2e-5, rtol=1e-5)


@_NUCLEUS
def test_a_nucleus_of_a_long_row_is_the_sorted_one(kind, top_p):
    """Long rows are bracketed by a sample; where it does not tell, as for equal or few tokens, they are not."""
    random = torch.Generator().manual_seed(3)
    z = torch.randn(4, 40_001, generator=random) * 2
    if kind == "peaks":
        z[:, torch.randperm(40_001, generator=random)[:20]] += 12
    elif kind == "equal":
        z = z.round().clamp(0, 2)
    elif kind == "masked":
        z[torch.rand(z.shape, generator=random) < 0.6] = -INF
    elif kind == "one":
        z[:, 39_999] = 60.0
    elif kind == "in order":
        z = z.sort(-1).values
    p, order = z.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = (p.cumsum(-1) - p < top_p) & (p > 0)
    for u in (0.0, 0.25, 0.75, 1 - 2.0**-24):
        found = w2s_fast.fused_sample(z, uniform=torch.full((4,), u), top_p=top_p)
        assert torch.allclose(found.kept.double(), kept.sum(-1).double(), rtol=1e-3, atol=1)  # the last may be a tie
        mass = torch.zeros(z.shape, dtype=torch.float64).scatter_(1, order, torch.where(kept, p, 0.0)).cumsum(-1)
        before = mass.gather(1, (found.token[:, None] - 1).clamp(min=0)).where(found.token[:, None] > 0, 0.0)
        whole, at = mass[:, -1:], mass.gather(1, found.token[:, None])
        assert (before <= (u + 1e-5) * whole).all() and (at >= (u - 1e-5) * whole).all()
        assert mass.gather(1, found.token[:, None]).sub(before).min() > 0  # one that was kept


def test_ends_of_the_unit_interval(backend):
    m = language_models(6, 777, seed=6)
    base = m.base.clone()
    base[:, :5], base[:, -7:] = -INF, -INF
    first = w2s_fast.fused_sample(base, uniform=torch.zeros(6))
    assert first.token.tolist() == [5] * 6
    assert first.kept.tolist() == [777 - 12] * 6
    flat = torch.zeros(3, 777)
    flat[:, -7:] = -INF
    last = w2s_fast.fused_sample(flat, uniform=torch.full((3,), 1 - 2.0**-24))
    assert last.token.tolist() == [769] * 3
    double = w2s_fast.fused_sample(flat, uniform=torch.full((3,), 1 - 2.0**-53, dtype=torch.float64))
    assert double.token.tolist() == [769] * 3
    underflow = torch.full((2, 50), -2000.0)
    underflow[0, 20], underflow[1, 30] = 0.0, 0.0
    for u in (0.0, 0.5, 1 - 2.0**-24):
        assert w2s_fast.fused_sample(underflow, uniform=torch.full((2,), u)).token.tolist() == [20, 30]


def test_greedy(backend):
    m = language_models(5, 4099, seed=7)
    z = plain_fusion(*m, dtype=torch.float64)
    found = w2s_fast.fused_sample(*m, temperature=0)
    assert found.token.tolist() == z.argmax(-1).tolist() and found.kept.tolist() == [1] * 5 and found.alpha is None
    eager = plain_fusion(*m)
    assert_accurate(found.lse, eager.logsumexp(-1), z.logsumexp(-1), torch.float32)
    assert_accurate(found.logprob, eager.log_softmax(-1).amax(-1), z.log_softmax(-1).amax(-1), torch.float32)
    ties = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert w2s_fast.fused_sample(ties, temperature=0.0).token.item() == 1
    heat = torch.tensor([0.0, 1.0, 0.0, 0.5, 2.0])
    uniform = torch.rand(5, generator=torch.Generator().manual_seed(8))
    mixed = w2s_fast.fused_sample(*m, temperature=heat, uniform=uniform, top_p=0.9)
    assert mixed.token[[0, 2]].tolist() == z.argmax(-1)[[0, 2]].tolist() and mixed.kept[[0, 2]].tolist() == [1, 1]
    for row, value in ((1, 1.0), (3, 0.5), (4, 2.0)):
        one = w2s_fast.fused_sample(m.base[row], [m.experts[0][row]], m.anti[row], temperature=value,
                                    uniform=uniform[row], top_p=0.9)  # fmt: skip
        _same([t[row] for t in (mixed.token, mixed.kept)], [one.token, one.kept])


def test_greedy_uses_no_randomness():
    state = torch.get_rng_state()
    w2s_fast.fused_sample(torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), temperature=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_number_a_row_from_the_generator(backend):
    m = language_models(64, 500, peak=2.0, seed=9)
    draws = [w2s_fast.fused_sample(*m, generator=torch.Generator().manual_seed(s)).token for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(w2s_fast.fused_sample(*m, uniform=uniform).token, draws[0])


# values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 2, 17, 1000, 4099])
def test_log_probability_and_normaliser(backend, width, dtype):
    m = language_models(24, width, 2, seed=width, dtype=dtype)
    heat, uniform = torch.rand(24) + 0.5, torch.rand(24, generator=torch.Generator().manual_seed(3))
    found = w2s_fast.fused_sample(*m, [0.5, 1.5], temperature=heat, uniform=uniform, top_p=0.95)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    eager, exact = (plain_fusion(*m, [0.5, 1.5], temperature=heat, dtype=t) for t in (acc, torch.float64))
    assert found.logprob.dtype == found.lse.dtype == acc and found.token.dtype == torch.int64
    at = found.token.unsqueeze(1)
    picked = [z.log_softmax(-1).gather(1, at)[:, 0] for z in (eager, exact)]
    for actual, a, b in ((found.lse, eager.logsumexp(-1), exact.logsumexp(-1)), (found.logprob, *picked)):
        if dtype == torch.float64:
            torch.testing.assert_close(actual, b, rtol=1e-12, atol=1e-12)
        else:
            assert_accurate(actual, a, b, acc)


def test_without_experts_it_is_a_plain_sampler(backend):
    base = torch.randn(8, 333, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(8, generator=torch.Generator().manual_seed(2))
    found = w2s_fast.fused_sample(base, uniform=uniform, base_weight=2.0)
    cumulative = (2.0 * base.double()).softmax(-1).cumsum(-1)
    assert found.token.tolist() == (cumulative > uniform.unsqueeze(1)).int().argmax(-1).tolist()


# layouts


@pytest.mark.parametrize("weights", [0.5, "dynamic"])
def test_a_slice_is_read_in_place(backend, weights):
    whole = [torch.randn(3, 5, 257) for _ in range(3)]
    last = [t[:, -1, :] for t in whole]
    uniform = torch.rand(3)
    with Calls() as calls:
        found = w2s_fast.fused_sample(last[0], [last[1]], last[2], weights, uniform=uniform)
    ours = calls.ours()
    assert len(ours) == 1 and ours[0][:3] == [t.data_ptr() for t in last]
    assert not calls.copies(whole), "a copy in front of the kernel"
    copy = [t.contiguous() for t in last]
    _same(found, w2s_fast.fused_sample(copy[0], [copy[1]], copy[2], weights, uniform=uniform))


@pytest.mark.parametrize("weights", [0.5, "dynamic"])
def test_nothing_of_the_logits_size_is_allocated(weights):
    if "cpp" not in CPU_BACKENDS:
        pytest.skip("needs the compiled extension")
    m = language_models(4, 50000, seed=10)
    with w2s_fast.backend("cpp"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                                         profile_memory=True) as profile:  # fmt: skip
        w2s_fast.fused_sample(*m, weights, temperature=0.7, uniform=torch.rand(4))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < m.base.nbytes // 20


@pytest.mark.parametrize("weights", [0.5, "dynamic"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_same_bits_in_any_layout_and_batch(backend, weights, filters):
    m = language_models(7, 3001, seed=11, dtype=torch.bfloat16)
    uniform = torch.rand(7, generator=torch.Generator().manual_seed(4))
    whole = w2s_fast.fused_sample(*m, weights, uniform=uniform, **filters)
    _same(whole, w2s_fast.fused_sample(*m, weights, uniform=uniform, **filters))
    rows = slice(2, 5)
    part = w2s_fast.fused_sample(
        m.base[rows], [m.experts[0][rows]], m.anti[rows], weights, uniform=uniform[rows], **filters
    )
    _same([None if t is None else t[rows] for t in whole], part)
    tensors = (m.base, m.experts[0], m.anti)
    wide = [torch.nn.functional.pad(t, (0, pad), value=NAN) for t, pad in zip(tensors, (5, 3, 9), strict=True)]
    strided = [torch.stack((t, t.new_full(t.shape, NAN)), 1)[:, 0] for t in tensors]
    for base, expert, anti in (wide, strided):
        found = w2s_fast.fused_sample(base, [expert], anti, weights, uniform=uniform, vocab_size=3001, **filters)
        _same(whole, found)


def test_batched_and_empty(backend):
    base, expert, anti, uniform = torch.randn(2, 3, 40), torch.randn(2, 3, 40), torch.randn(40), torch.rand(2, 3)
    found = w2s_fast.fused_sample(base, [expert], anti, uniform=uniform)
    flat = w2s_fast.fused_sample(base.view(6, 40), [expert.view(6, 40)], anti, uniform=uniform.view(6))
    _same([t if t is None else t.reshape(6) for t in found], flat)
    for weights in (1.0, "dynamic"):
        none = w2s_fast.fused_sample(torch.randn(0, 40), [torch.randn(0, 40)], torch.randn(0, 40), weights)
        assert none.token.shape == none.logprob.shape == none.kept.shape == (0,)
    one = w2s_fast.fused_sample(torch.randn(()).expand(1), uniform=torch.tensor(0.3))
    assert one.token.item() == 0 and one.logprob.item() == 0.0 and one.kept.item() == 1


# rows that go wrong


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0}, {"min_p": 0.2}], ids=str)
def test_rows_without_a_distribution(backend, filters):
    base = torch.randn(5, 99)
    base[1] = -INF
    base[2, 50] = NAN
    base[3, 1:] = -INF
    found = w2s_fast.fused_sample(base, uniform=torch.full((5,), 0.5), **filters)
    assert found.token[1:3].tolist() == [-1, -1] and found.kept[1:3].tolist() == [0, 0]
    assert bool(found.logprob[1:3].isnan().all()) and found.lse[1] == -INF and bool(found.lse[2].isnan())
    assert found.token[3].item() == 0 and found.logprob[3].item() == 0.0 and found.kept[3].item() == 1
    clean = w2s_fast.fused_sample(base[[0, 4]], uniform=torch.full((2,), 0.5), **filters)
    _same([t if t is None else t[[0, 4]] for t in found], clean)
