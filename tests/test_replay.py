"""A call that was seen before goes straight to its kernel: with the same results, and not where it would differ."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import w2s_fast
from w2s_fast import calibration, extension, replay
from w2s_fast.library import Op
from w2s_fast.testing.samples import all_samples

pytestmark = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
REPLAYED = sorted(name for name, routes in calibration.ROUTES.items() if routes.replayed)


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a user's process in which our kernels are always faster."""
    monkeypatch.setenv("W2S_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "SETTING", "auto")
    monkeypatch.setattr(calibration, "race", lambda ours, plain: 2.0)
    calibration.forget()
    yield
    calibration.forget()


def replays(name: str) -> list[replay.Replay]:
    """Those that are known of a function."""
    ways = calibration.ROUTES[name].known.values()
    return [way for way in ways if callable(way) and not isinstance(way, replay.Graded)]


def same(found: Any, expected: Any) -> bool:
    """Whether two results have the same bits and layout."""
    a, b = tree_leaves(found), tree_leaves(expected)
    return type(found) is type(expected) and len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
        and torch.equal(torch.nan_to_num(x, 7.0), torch.nan_to_num(y, 7.0))
        for x, y in zip(a, b, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("name", REPLAYED)
def test_every_sample_gives_the_same_twice_and_with_other_values(name: str):
    function, inner = getattr(w2s_fast, name), calibration.ROUTES[name].function
    kept = 0
    for sample in all_samples():
        if sample.op != name:
            continue
        for dtype in sample.dtypes:
            for seed in (0, 1, 0):
                args, kwargs = sample.inputs(dtype, seed=seed)
                assert same(function(*args, **kwargs), inner(*args, **kwargs)), f"{sample.id}, {dtype}, seed {seed}"
        kept = max(kept, len(replays(name)))
    assert kept, "none of its samples has a replay"


def fused() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base, expert, anti = (torch.randn(2, 16, generator=generator) for _ in range(3))
    w2s_fast.fuse_logits(base, [expert], anti)
    assert len(replays("fuse_logits")) == 1
    return base, expert, anti


def test_it_is_taken_and_looks_at_nothing_twice(monkeypatch: pytest.MonkeyPatch):
    base, expert, anti = fused()
    monkeypatch.setattr(Op, "run", lambda *_: pytest.fail("the op's own way was taken"))
    torch.testing.assert_close(w2s_fast.fuse_logits(expert, [base], anti), expert + base - anti)


def test_tensors_that_are_not_plain_go_the_long_way():
    base, expert, anti = fused()
    known = replays("fuse_logits")[0]

    class Mine(Tensor):
        pass

    apart = torch.zeros(16, 2).t().copy_(base)
    for odd in (apart, torch._neg_view(base), base.as_subclass(Mine), torch._efficientzerotensor((2, 16))):
        assert known(odd, [expert], anti) is None and known(base, [odd], anti) is None
        plain = odd + expert - anti
        torch.testing.assert_close(w2s_fast.fuse_logits(odd, [expert], anti), plain.as_subclass(type(odd)))


def test_one_tensor_twice_is_not_written_down():
    """Or a later call of two would read the first twice."""
    x = torch.randn(1, 3, 8)
    w2s_fast.gate_residual(x, x)
    assert not replays("gate_residual")
    y = torch.randn(1, 3, 8)
    torch.testing.assert_close(w2s_fast.gate_residual(x, y), x + y)
    torch.testing.assert_close(w2s_fast.gate_residual(y, x[:, :3]), x + y)


def test_a_gradient_has_none():
    base, expert, anti = fused()
    base.requires_grad_()
    for _ in range(3):
        found = w2s_fast.fuse_logits(base, [expert], anti)
        assert torch.equal(torch.autograd.grad(found.sum(), base)[0], torch.ones_like(base))
    assert len(replays("fuse_logits")) == 1
    with torch.no_grad():
        assert not w2s_fast.fuse_logits(base, [expert], anti).requires_grad


def test_who_looks_on_sees_the_op():
    base, expert, anti = fused()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        w2s_fast.fuse_logits(base, [expert], anti)
    assert any("w2s_fast::fuse_logits" in event.name for event in seen.events())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(base, torch.ones_like(base))
        with pytest.raises((RuntimeError, NotImplementedError)):
            w2s_fast.fuse_logits(dual, [expert], anti)
    found = torch.func.vmap(lambda x: w2s_fast.fuse_logits(x, [expert[0]], anti[0]))(base)
    torch.testing.assert_close(found, base + expert[0] - anti[0])


def test_an_error_stays_one():
    base, expert, anti = fused()
    for _ in range(3):
        with pytest.raises(ValueError, match="vocab_size"):
            w2s_fast.fuse_logits(base, [expert[:, :8]], anti, strict_vocab=True)
        with pytest.raises(TypeError, match="experts"):
            w2s_fast.fuse_logits(base, [expert.long()], anti)


def test_what_is_made_is_new():
    base, expert, anti = fused()
    first, second = (w2s_fast.fuse_logits(base, [expert], anti) for _ in range(2))
    before = second.clone()
    first.zero_()
    assert torch.equal(second, before)


def test_inputs_are_left_alone():
    base, expert, anti = given = fused()
    copies = tree_map_only(Tensor, torch.clone, given)
    w2s_fast.fuse_logits(base, [expert], anti)
    assert all(map(torch.equal, given, copies))


def test_a_function_that_calls_another():
    """Both are seen for the first time: the layer's record waited for its own end."""
    x, weight, scale, shift = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3), torch.rand(3), torch.rand(3)
    found: list[Any] = []

    def call() -> None:
        options = {"rounding": "sound", "bn_scale": scale, "bn_shift": shift}
        found.append(w2s_fast.interval_conv2d(x, x + 1, weight, **options))

    for _ in range(2):
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert same(*found) and not replays("interval_conv2d")


COMPILED = pytest.mark.skipif(extension.CALLS is None, reason="w2s_fast._call is not built for this torch")


@COMPILED
def test_a_second_call_asks_python_nothing(monkeypatch: pytest.MonkeyPatch):
    base, expert, anti = fused()
    (known,) = calibration.ROUTES["fuse_logits"].known.values()
    calibration.ROUTES["fuse_logits"].known.clear()
    monkeypatch.setattr(calibration, "alone", lambda: pytest.fail("the call was not found"))
    found = w2s_fast.fuse_logits(expert, [base], anti)
    torch.testing.assert_close(found, expert + base - anti)
    assert same(found, known(expert, [base], anti)) and not calibration.ROUTES["fuse_logits"].known


@COMPILED
def test_calls_are_told_apart_by_all_that_is_looked_at():
    """Shapes, dtypes, layouts, gradients, options and their types, how arguments are spelled, and grad mode."""
    x, wide = torch.ones(2, 4), torch.ones(4, 2)
    spelled: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}), ((torch.ones(2, 5),), {}), ((torch.ones(1, 2, 4),), {}), ((x.double(),), {}), ((wide.t(),), {}),
        ((torch.ones(2, 4, requires_grad=True),), {}), ((x, 1), {}), ((x, 1.0), {}), ((x, True), {}), ((x, None), {}),
        ((x, 2), {}), ((x, "a"), {}), ((x, torch.float32), {}), ((x, torch.float64), {}), ((x, [1, 2]), {}),
        ((x, (1, 2)), {}), ((x, [(1, 2)]), {}), ((x, [x]), {}), ((x, x), {}), ((x,), {"y": 1}), ((x,), {"z": 1}),
    ]  # fmt: skip
    for i, (args, kwargs) in enumerate(spelled):
        calls = extension.CALLS()
        assert calls.put(args, kwargs, True), f"call {i} can be remembered"
        assert [j for j, other in enumerate(spelled) if calls.find(*other) is not None] == [i]
        with torch.no_grad():
            assert calls.find(args, kwargs) is None
            assert calls.put(args, kwargs, False) and calls.find(args, kwargs) is False
        assert calls.find(args, kwargs) is True
        calls.clear()
        assert calls.find(args, kwargs) is None


@COMPILED
def test_what_no_two_calls_are_compared_by_is_not_remembered():
    calls = extension.CALLS()

    class Mine(Tensor):
        pass

    x = torch.ones(2)
    for odd in (object(), {"a": 1}, x.as_subclass(Mine), torch._neg_view(x), torch.empty(0), 1 << 80, x.to_sparse(),
                torch.ones(2, device="meta"), torch.complex(x, x).conj()):  # fmt: skip
        assert not calls.put((odd,), {}, True) and calls.find((odd,), {}) is None
        assert not calls.put(([odd],), {}, True)
    for wrong in ((1,), (1, 2), ((), {}, 1, 2)):
        with pytest.raises((TypeError, ValueError)):
            calls.find(*wrong)


@COMPILED
def test_who_looks_on_is_asked_of_python():
    calls, x = extension.CALLS(), torch.ones(2)
    assert calls.put((x,), {}, True)
    with torch.autocast("cpu"):
        assert calls.find((x,), {}) is None
    with torch.autograd.graph.save_on_cpu():
        assert calls.find((x,), {}) is None
    with torch.autograd.forward_ad.dual_level():
        assert calls.find((x,), {}) is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert calls.find((x,), {}) is None
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert calls.find((x,), {}) is None
    with torch.overrides.TorchFunctionMode():
        assert calls.find((x,), {}) is None
    seen: list[Any] = []
    torch.func.vmap(lambda row: (seen.append(calls.find((row,), {})), row)[1])(torch.ones(3, 2))
    torch.jit.trace(lambda t: (seen.append(calls.find((t,), {})), t + 1)[1], (x,), check_trace=False)
    assert seen and set(seen) == {None}
    torch.use_deterministic_algorithms(True)
    try:
        assert calls.find((x,), {}) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls.find((x,), {}) is True
    with torch.inference_mode():
        assert calls.find((x,), {}) is None and calls.put((x,), {}, True) and calls.find((x,), {})


@COMPILED
def test_another_shape_of_an_argument_leaves_the_argument_alone():
    """As `fuse_logits` on rows of several leading dimensions: the kernel sees a view, and what it makes is new."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 3, 16, generator=generator) for _ in range(3)]
    first = w2s_fast.fuse_logits(logits[0], [logits[1]], logits[2])
    routes = calibration.ROUTES["fuse_logits"]
    found = routes.calls.find((logits[0], [logits[1]], logits[2]), {})
    assert same(found, first) and [t.shape for t in logits] == [(2, 3, 16)] * 3 and found.shape == (2, 3, 16)


@COMPILED
def test_threads_share_what_is_known():
    base, expert, anti = fused()
    routes = calibration.ROUTES["fuse_logits"]
    expected, wrong = base + expert - anti, []

    def work(forget: bool) -> None:
        for _ in range(50):
            if forget:
                routes.forget()
            found = w2s_fast.fuse_logits(base, [expert], anti)
            if not torch.allclose(found, expected):
                wrong.append(found)

    workers = [threading.Thread(target=work, args=(i == 0,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_without_the_compiled_memory_python_does_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extension, "CALLS", None)
    decorated = calibration.or_plain(lambda x, y: x + y, replayed=True)(calibration.ROUTES["gate_residual"].function)
    calibration.ROUTES["gate_residual"] = getattr(w2s_fast.gate_residual, "routes")  # noqa: B009
    assert decorated.routes.calls is None  # type: ignore[attr-defined]
    x, y = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    for _ in range(3):
        torch.testing.assert_close(decorated(x, y), x + y)
    assert [way for way in decorated.routes.known.values() if callable(way)]  # type: ignore[attr-defined]
