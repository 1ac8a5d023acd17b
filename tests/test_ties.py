"""Discrete choices at their boundaries: the same in the reference and in the C++ kernels, and what the definition says.

The rule is stated in w2s_fast/reference/logit_fusion/filters.py. The Triton kernels' part is in test_interpreter.py.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

import w2s_fast
from w2s_fast.testing.selection import amount
from w2s_fast.testing.synthetic import CPU_BACKENDS
from w2s_fast.testing.ties import Tie, nucleus_ties

ROWS = 10
DRAWS = range(amount(6, 200))


def _plausible(z: Tensor, kind: str, level: float) -> Tensor:
    return torch.isfinite(w2s_fast.fused_log_softmax(z, [z], weights=0.0, plausible=(kind, level)))


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


@pytest.mark.parametrize("seed", DRAWS)
def test_nucleus_ties(backend: str, seed: int):
    """50 fractions times 10 rows a seed, 10^5 ties in all: the prefix that reaches top_p exactly is enough."""
    for tie in nucleus_ties(random.Random(seed), 50, ROWS):
        for dtype in (torch.float32, torch.float64) if tie.exact else (torch.float32,):
            z = tie.logits.to(dtype)
            drawn = w2s_fast.fused_sample(z, top_p=tie.top_p, uniform=torch.full((len(z),), 0.5))
            assert drawn.kept.tolist() == tie.kept.sum(-1).tolist(), tie.name
            assert torch.equal(_plausible(z, "top_p", tie.top_p), tie.kept), tie.name


def test_half_precision_ties(backend: str):
    for n, k in ((10, 3), (10, 7), (8, 2), (8, 6), (1000, 300), (3, 1), (7, 5)):
        for dtype in (torch.bfloat16, torch.float16):
            kept = w2s_fast.fused_sample(torch.full((1, n), 2.5, dtype=dtype), top_p=k / n).kept
            assert kept.item() == k


def test_large_vocabularies(backend: str):
    """As many equal tokens as a vocabulary has: none is gained or lost by the slack."""
    for n in (32_000, 151_936, 1_000_003):
        for k in (1, n // 3, n - 1):
            assert w2s_fast.fused_sample(torch.zeros(1, n), top_p=k / n).kept.item() == k


def _transformers(z: Tensor, top_p: float) -> int:
    from transformers.generation.logits_process import TopPLogitsWarper

    return int(torch.isfinite(TopPLogitsWarper(top_p)(None, z)).sum())


def test_transformers_keeps_the_same(backend: str):
    """Away from ties the same number; at a tie the same or, where its float32 sums say so, one more."""
    pytest.importorskip("transformers")
    for tie in nucleus_ties(random.Random(0), 100, 1):
        kept = w2s_fast.fused_sample(tie.logits, top_p=tie.top_p).kept.item()
        theirs = _transformers(tie.logits, tie.top_p)
        assert theirs - kept in (0, 1), tie.name
        for p in (tie.top_p * (1 - 1e-4), tie.top_p + 1e-4 * (1 - tie.top_p)):
            kept = w2s_fast.fused_sample(tie.logits, top_p=p).kept.item()
            assert kept == _transformers(tie.logits, p), (tie.name, p)


@pytest.mark.parametrize("level", [1.0, 0.5, 0.25, 0.1, 1 / 3, 0.001])
@pytest.mark.parametrize("offset", [0.0, 100.0, -37.3, 5000.0])
def test_min_p_ties(backend: str, level: float, offset: float):
    """A token of exactly min_p of the largest probability stays, in the draw and in the plausible set."""
    near = math.log(level)
    z = torch.tensor([[0.0, near, near - 0.01, -math.inf, near, 0.0]], dtype=torch.float64) + offset
    expected = torch.tensor([[True, True, False, False, True, True]])
    for dtype in (torch.float64, torch.float32):
        rows = z.to(dtype)
        if dtype == torch.float32:  # what the rounded logits say
            expected = (rows - rows.amax() >= math.log(level) - 2.0**-21) & rows.isfinite()
        assert torch.equal(_plausible(rows, "min_p", level), expected)
        assert w2s_fast.fused_sample(rows, min_p=level).kept.item() == int(expected.sum())


def test_top_k_ties(backend: str):
    """Equal tokens are kept by index, also next to larger ones and across tiles of the kernels."""
    z = torch.zeros(1, 3000)
    z[0, 2500:] = 1.0
    for k in (1, 499, 500, 501, 1700, 2999):
        ends = [w2s_fast.fused_sample(z, top_k=k, uniform=torch.tensor([u])) for u in (0.0, 1 - 2**-24)]
        assert [e.kept.item() for e in ends] == [k, k]
        assert ends[0].token.item() == (2500 if k <= 500 else 0)
        assert ends[1].token.item() == (2500 + k - 1 if k <= 500 else 2999)


TEMPERATURES = (5e-324, 1e-300, 1e-45, 1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e38, 1e300)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("per_row", [False, True])
def test_any_positive_temperature(backend: str, temperature: float, per_row: bool):
    """Cold: a draw among the largest; hot: among all that are not -inf. No overflow makes a row unusable."""
    none = -math.inf
    z = torch.tensor([[1.0, 3.0, -2.0, 3.0, none], [-5.0, -1e4, -5.0, -6.0, none], [0.0, 0.0, -1.0, -1.0, 1e4]])
    best, open_ = z == z.amax(-1, keepdim=True), z.isfinite()
    dtypes = (torch.float32, torch.float64)
    for dtype in dtypes:
        heat = torch.full((3,), temperature, dtype=torch.float64) if per_row else temperature
        logp = w2s_fast.fused_log_softmax(z.to(dtype), [z.to(dtype)], weights=0.0, temperature=heat)
        allowed = best if temperature < 1 else open_
        expected = torch.where(allowed, -allowed.sum(-1, keepdim=True).log().double(), -math.inf)
        hot = 10.0 if temperature == 1e10 else 1.0  # logits of 1e4 still tell tokens apart by 1e-6
        torch.testing.assert_close(logp.double().exp(), expected.exp(), rtol=0, atol=1e-6 * hot)
        for u in (0.0, 0.49, 0.99):
            drawn = w2s_fast.fused_sample(z.to(dtype), temperature=heat, uniform=torch.full((3,), u))
            assert bool(allowed.gather(1, drawn.token[:, None]).all())
            assert not bool(drawn.logprob.isnan().any())
            for filters in ({"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 4}):
                kept = w2s_fast.fused_sample(z.to(dtype), temperature=heat, **filters).kept
                assert bool((kept >= 1).all())


def test_a_draw_at_the_boundary_of_two_tokens(backend: str):
    """The cumulative mass must exceed u times the total: at equality the next token is taken."""
    for n in (2, 4, 8, 64):
        z = torch.zeros(n, n)
        drawn = w2s_fast.fused_sample(z, uniform=torch.arange(n) / n)
        assert drawn.token.tolist() == list(range(n))
        drawn = w2s_fast.fused_sample(z, uniform=torch.arange(n) / n, top_p=0.999)
        assert drawn.token.tolist() == list(range(n))


def test_argmax_takes_the_first_of_equals(backend: str):
    z = torch.zeros(2, 4000)
    z[0, [7, 1030, 3999]] = 2.0
    z[1, [1500, 2500]] = 1.0
    assert w2s_fast.fused_sample(z, temperature=0).token.tolist() == [7, 1500]
    assert w2s_fast.fused_stats(z, [z], weights=0.0).argmax.tolist() == [7, 1500]


@pytest.mark.parametrize("two", [False, True])
def test_confidence_threshold_at_equality(two: bool):
    """Backends agree on which side of the threshold an equal probability falls."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, 2 if two else 5, generator=g).round(decimals=1)
    z = torch.cat((z, z, torch.zeros_like(z)))  # doubles, and rows at one half
    labels = torch.softmax(torch.randn(z.shape, generator=g), -1)
    found = []
    for name in CPU_BACKENDS:
        with w2s_fast.backend(name):
            for balance in ("weak_prior", "median", "none") if two else ("weak_prior", "none"):
                found.append((name, balance, w2s_fast.w2s_confidence_loss(z, labels, balance=balance)))
    for name, balance, loss in found:
        expected = next(x for n, b, x in found if n == "reference" and b == balance)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, msg=f"{name} {balance}")


def test_the_ties_are_ties():
    """In exact arithmetic the kept prefix has the mass top_p, to the rounding of that number."""
    from fractions import Fraction

    for tie in nucleus_ties(random.Random(3), 20, 3):
        assert isinstance(tie, Tie)
        for masses, kept in zip(tie.masses, tie.kept, strict=True):
            share = Fraction(sum(m for m, k in zip(masses, kept.tolist(), strict=True) if k), sum(masses))
            assert abs(share - Fraction(tie.top_p)) < Fraction(1, 10**15)
