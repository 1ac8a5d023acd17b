"""The accuracy policy itself: it fails what is worse than eager, and nothing for eager's luck on a few numbers."""

from __future__ import annotations

import pytest
import torch

from w2s_fast.testing.accuracy import Errors, assert_accurate, measure, pooled
from w2s_fast.testing.compare import DRAWS

ULP = 2.0**-24


def _errors(size: int, worse: float, generator: torch.Generator, eager_is_exact: bool = False) -> Errors:
    """One draw of results near 1: eager errs about a rounding, ours ``worse`` times as much."""
    exact = 1 + torch.rand(size, generator=generator, dtype=torch.float64)
    eager = exact + (0 if eager_is_exact else 1) * ULP * torch.randn(size, generator=generator, dtype=torch.float64)
    ours = exact + worse * ULP * torch.randn(size, generator=generator, dtype=torch.float64)
    return measure(ours, eager, exact, torch.float32)


def _pooled(size: int, worse: float, seed: int, lucky: int = 0) -> Errors:
    generator = torch.Generator().manual_seed(seed)
    return pooled([_errors(size, worse, generator, eager_is_exact=i < lucky) for i in range(DRAWS)])


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_equal_quality_passes_over_several_draws(size: int):
    """Also where eager was exact in the first draw."""
    assert all(_pooled(size, 1.0, seed, lucky=1).worst <= 1.0 for seed in range(200))


@pytest.mark.parametrize("size", [300, 1000])
def test_six_times_eagers_error_always_fails(size: int):
    generator = torch.Generator().manual_seed(0)
    assert all(_errors(size, 6.0, generator).worst > 1.0 for _ in range(200))
    assert all(_pooled(size, 6.0, seed).worst > 1.0 for seed in range(200))


def test_a_single_number_is_judged_by_its_draws():
    """One number twenty times as wrong as eager's fails over several draws, whatever one of them shows."""
    assert sum(_pooled(1, 20.0, seed).worst > 1.0 for seed in range(200)) >= 190


def test_one_bad_draw_is_not_averaged_away():
    generator = torch.Generator().manual_seed(0)
    good = [_errors(1000, 1.0, generator) for _ in range(DRAWS - 1)]
    exact = torch.ones(1000, dtype=torch.float64)
    wrong = exact.clone()
    wrong[17] += 1e-5
    assert pooled([*good, measure(wrong, exact, exact, torch.float32)]).worst > 1.0


def test_pooling_keeps_the_pattern():
    exact = torch.ones(4, dtype=torch.float64)
    bad = exact.clone()
    bad[0] = torch.nan
    draws = [measure(ours, exact, exact, torch.float32) for ours in (exact, bad)]
    assert pooled(draws).worst == float("inf")


def test_the_message_says_both_errors():
    exact = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"loss: .* times the allowed error: max error 0.1 of .* eager's 0 and 0"):
        assert_accurate(exact + 0.1, exact, exact, torch.float32, name="loss")
