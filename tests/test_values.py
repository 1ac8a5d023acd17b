"""A look at values before a plain way serves: the same whether compiled or by operators."""

from __future__ import annotations

import pytest
import torch

import w2s_fast
from w2s_fast import calibration, values
from w2s_fast.ops.linear_loss.linear_ce import _plain as plain_ce
from w2s_fast.ops.logit_fusion.fuse import _plain as plain_fuse

BY = [pytest.param(True, id="compiled"), pytest.param(False, id="operators")]


@pytest.fixture(params=BY)
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(values, "_LOOK", None)
    elif values._LOOK is None:
        pytest.skip("w2s_fast._C is not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 4096, 4099, 9000, 200_000])
def test_one_element_that_is_not_finite_is_found(look: None, dtype: torch.dtype, size: int):
    t = torch.randn(size, dtype=dtype) * 1e30
    assert values.all_finite(t) and values.all_finite(t[::2]) and values.all_finite(t[:0])
    for place in {0, size // 2, size - 1}:
        for wrong in (torch.inf, -torch.inf, torch.nan):
            other = t.clone()
            other[place] = wrong
            assert not values.all_finite(other)


def test_infinities_that_cancel_are_found(look: None):
    assert not values.all_finite(torch.tensor([torch.inf, -torch.inf, 1.0]))
    assert values.all_finite(torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_one_index_outside_is_found(look: None, dtype: torch.dtype):
    index = torch.arange(9, dtype=dtype)
    assert values.all_inside(index, 9) and values.all_inside(index[::2], 9) and values.all_inside(index[:0], 1)
    assert not values.all_inside(index, 8) and not values.all_inside(index[::2], 8)
    for wrong in (-1, -100, torch.iinfo(dtype).min, torch.iinfo(dtype).max):
        other = index.clone()
        other[4] = wrong
        assert not values.all_inside(other, 9)


def test_plain_ways_leave_impossible_tokens_and_ignored_targets_to_ours(look: None):
    base, expert, anti = torch.randn(3, 2, 5)
    assert plain_fuse(base, [expert], anti) is not NotImplemented
    base[1, 3] = -torch.inf
    assert plain_fuse(base, [expert], anti) is NotImplemented
    h, head, target = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 4, 1, 2])
    assert plain_ce(h, head, target) is not NotImplemented
    target[2] = -100
    assert plain_ce(h, head, target) is NotImplemented


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_stats_as_a_product(dtype: torch.dtype, padded: bool):
    x, labels = torch.randn(40, 15, dtype=dtype), torch.randint(7, (40,))
    x = x[:, :9] if padded else x
    routes = w2s_fast.class_stats.routes
    found, ours = routes.plain(x, labels, 7), routes.function(x, labels, 7)
    assert torch.equal(found.counts, ours.counts) and found.sums.dtype is ours.sums.dtype
    torch.testing.assert_close(found.sums, ours.sums, rtol=1e-5, atol=1e-5)
    x[3, 2] = torch.inf  # in its own class alone
    assert routes.plain(x, labels, 7) is NotImplemented
    assert routes.plain(torch.ones(1, 2), torch.tensor([7]), 7) is NotImplemented


def test_nearest_prototypes_of_a_whole_product():
    p = torch.randn(6, 4)
    x = torch.cat((p[[3, 0]] + 0.01, torch.zeros(1, 4)))
    p[[1, 2]] = 0.0  # equal distances go by index
    routes = w2s_fast.prototype_distance.routes
    found, ours = routes.plain(x, p), routes.function(x, p)
    assert torch.equal(found.indices, ours.indices) and found.indices[2] == 1
    torch.testing.assert_close(found.distance, ours.distance, rtol=1e-4, atol=1e-5)
    assert routes.plain(x, p, return_distance=False).distance is None
    grads = [
        torch.autograd.grad(way(x.requires_grad_(), p).distance.sum(), x)[0] for way in (routes.plain, routes.function)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        x[0, 0] = torch.nan
    assert routes.plain(x, p) is NotImplemented


def test_values_on_another_device_are_left_to_operators():
    """Their address is none of this process's."""
    with pytest.raises(RuntimeError):
        values.all_inside(torch.ones(3, dtype=torch.long, device="meta"), 7)
    with pytest.raises(RuntimeError):
        values.all_finite(torch.ones(3, device="meta"))


def test_a_call_with_a_tensor_elsewhere_is_none_that_was_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibration, "SETTING", "auto")
    h, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    for _ in range(3):
        w2s_fast.linear_ce(h, weight, target)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        w2s_fast.linear_ce(h, weight, target.to("meta"))
