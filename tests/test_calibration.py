"""`auto` takes plain PyTorch where it was found faster: how that is found, its bounds, and what stays as it was."""

from __future__ import annotations

import importlib
import json
import math
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from w2s_fast.bench import calibrate, domain

import w2s_fast
from w2s_fast import calibration, extension, info
from w2s_fast.calibration import Routes, Table

BUILT = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As a user's process begins: nothing known, nothing kept; afterwards everything is as it was."""
    monkeypatch.setenv("W2S_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "SETTING", "auto")
    calibration.forget()
    yield tmp_path
    calibration.forget()


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Sets what every race finds; returns a list that grows with each."""

    def to(ratio: float) -> list[int]:
        races: list[int] = []

        def race(ours: Callable[[], Any], plain: Callable[[], Any]) -> float:
            ours(), plain()
            races.append(1)
            return ratio

        monkeypatch.setattr(calibration, "race", race)
        return races

    return to


class Ways:
    """A function with two ways that counts how often each was taken; the plain one's values tell."""

    def __init__(self, holds: Callable[..., float] | None = None) -> None:
        self.taken: list[str] = []

        def plain(x: Tensor, factor: float = 1.0) -> Any:
            self.taken.append("plain")
            return NotImplemented if factor == 2 else x * factor * 1.0001

        @calibration.or_plain(plain, holds)
        def twice(x: Tensor, factor: float = 1.0, *, more: bool = False) -> Tensor:
            if factor < 0:
                raise ValueError("factor")
            self.taken.append("ours")
            return x * factor

        self.call = twice
        del calibration.ROUTES["twice"]
        self.routes: Routes = twice.routes  # type: ignore[attr-defined]

    def of(self, *args: Any, **kwargs: Any) -> list[str]:
        """The ways of one call."""
        del self.taken[:]
        self.call(*args, **kwargs)
        return self.taken[:]

    def gives(self, x: Tensor) -> str:
        """The way whose values a call returns."""
        return "ours" if torch.equal(self.call(x), x) else "plain"

    def settle(self, *args: Any, **kwargs: Any) -> None:
        """A first call, which is timed."""
        self.call(*args, **kwargs)


@BUILT
@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_all_calls_of_a_process_go_one_way(fresh: Path, raced: Any, ratio: float):
    """The first, which is timed, returns what the later ones do, or equal arguments would give other bits."""
    races, ways, x = raced(ratio), Ways(), torch.ones(3)
    way = "plain" if ratio < 1 else "ours"
    assert ways.gives(x) == way and len(races) == 1
    assert ways.of(x) == [way] == ways.of(torch.zeros(3)) and len(races) == 1
    assert ways.gives(torch.ones(2, 3)) == way
    assert ways.taken.count("ours") > (way == "ours"), "new arguments are looked at"


@BUILT
def test_the_slower_way_is_not_taken(fresh: Path, raced: Any):
    for size, ratio in enumerate((0.98, 1.0, 3.0, math.inf)):
        races, ways, x = raced(ratio), Ways(), torch.ones(1 + size)
        ways.settle(x)
        assert len(races) == 1 and ways.of(x) == ["ours"]


@BUILT
@pytest.mark.parametrize(
    "other", [torch.Tensor.double, lambda t: t * 1.01, lambda t: t[None], lambda t: (t,), lambda t: t / 0]
)
def test_a_way_that_returns_something_else_is_not_taken(fresh: Path, raced: Any, other: Any):
    @calibration.or_plain(lambda x: other(x))
    def same(x: Tensor) -> Tensor:
        return x * 1

    del calibration.ROUTES["same"]
    raced(0.5)
    x = torch.ones(3)
    for _ in range(3):
        assert torch.equal(same(x), x)


def test_what_agrees():
    x = torch.tensor([1.0, -2.0, math.inf, math.nan])
    assert calibration.agree((x, {"a": 1}), (x * (1 + 1e-5), {"a": 1}))
    for other in (x.bfloat16(), x.nan_to_num(), x + torch.tensor([0.01, 0, 0, 0]), -x):
        assert not calibration.agree(x, other)
    assert not calibration.agree({"a": x}, {"b": x}) and not calibration.agree((x, x), (x,))
    assert calibration.agree(x.bfloat16(), (x * 1.004).bfloat16())


@BUILT
def test_wide_experts_stay_wide(fresh: Path, raced: Any):
    """The plain way counted in the dtype of the base."""
    raced(0.5)
    base, expert = torch.randn(3, 7), torch.randn(3, 7).double()
    for _ in range(2):
        assert w2s_fast.fused_log_softmax(base, [expert], base).dtype == torch.float64


@BUILT
def test_calls_that_look_alike_are_timed_once(fresh: Path, raced: Any):
    races, ways = raced(0.5), Ways()
    ways.settle(torch.ones(1000))
    assert len(races) == 1
    assert ways.of(torch.ones(1010)) == ["ours", "plain"], "ours looks at arguments of another size"
    assert ways.of(torch.ones(1010)) == ["plain"] and len(races) == 1
    for other in (torch.ones(1300), torch.ones(1000).double(), torch.ones(1000, requires_grad=True)):
        before = len(races)
        ways.settle(other)
        assert len(races) == before + 1
    ways.settle(torch.ones(1000), 0.5)
    assert len(races) == 5, "another option"


def test_sizes_are_rounded_to_a_quarter_of_an_octave():
    kinds = [calibration.kind_of((torch.empty(n),), {}) for n in range(1, 4097)]
    assert len(set(kinds[:8])) == 8 and len(set(kinds)) < 48
    assert calibration.kind_of((torch.empty(64, 100),), {}) != calibration.kind_of((torch.empty(100, 64),), {})
    found = calibration.kind_of((1, 0.7, [torch.empty(3)]), {"b": None, "a": True})
    assert found == "plain 1 number (float32[3]) a=True b=None"


@BUILT
def test_an_error_is_ours_and_a_declined_call_too(fresh: Path, raced: Any):
    raced(0.5)
    ways, x = Ways(), torch.ones(3)
    for _ in range(4):
        with pytest.raises(ValueError, match="factor"):
            ways.call(x, -1.0)
    ways.settle(x, 2.0)
    assert ways.of(x, 2.0) == ["ours"], "the plain way declines"
    ways.settle(x, 3.0, more=True)
    assert ways.of(x, 3.0, more=True) == ["ours"], "the plain way has no such option"


@BUILT
def test_memory_is_bounded(fresh: Path, raced: Any):
    races = raced(0.5)
    for held, fits in ((calibration.ROOM, True), (calibration.ROOM + 1, False)):
        ways = Ways(lambda x, held=held: float(held))
        x = torch.ones(3 + fits)
        del ways.taken[:]
        ways.settle(x)
        assert ("plain" in ways.taken) == fits == bool(races), "the plain way was not even tried"
        assert ways.of(x) == (["plain"] if fits else ["ours"])
        del races[:]
    given = Ways(lambda x: 4.0 * x.numel() / 4)
    large = torch.empty(1, dtype=torch.float32).expand(64 << 20)
    assert given.routes.fits((large,), {}) and not Ways(lambda x: 65.0 * (1 << 20)).routes.fits((large,), {})


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """Under a clock of our own: a way takes what it says, and no race outlasts its bounds."""
    now = [0.0]
    monkeypatch.setattr(calibration, "clock", lambda: now[0])
    calls: list[int] = []

    def taking(seconds: float) -> Callable[[], None]:
        def run() -> None:
            now[0] += seconds
            calls.append(1)

        return run

    for ours, plain in ((1e-5, 5e-6), (1e-3, 1e-3), (0.02, 0.03), (1.0, 0.9), (1e-4, 10.0)):
        now[0] = 0.0
        del calls[:]
        assert calibration.race(taking(ours), taking(plain)) == pytest.approx(plain / ours)
        times = 2.01 if ours + plain > calibration.LONG else 3.01
        assert now[0] <= max(2.5 * calibration.SECONDS, times * (ours + plain))
    assert len(calls) <= 400


@BUILT
def test_nobody_times_inside_a_timing_or_beside_one(fresh: Path, raced: Any, monkeypatch: pytest.MonkeyPatch):
    races, ways, x = raced(0.5), Ways(), torch.ones(3)
    with calibration._LOCK:
        other = threading.Thread(target=ways.call, args=(x,))
        other.start()
        other.join(10)
    assert not other.is_alive() and not races
    ways.call(x)
    assert len(races) == 1


@BUILT
def test_the_generator_is_left_alone(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    def plain(x: Tensor) -> Tensor:
        return x + torch.rand(x.shape)

    @calibration.or_plain(plain)
    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand(x.shape)

    del calibration.ROUTES["noisy"]
    x = torch.zeros(4)
    torch.manual_seed(0)
    expected = [torch.rand(4) for _ in range(3)]
    torch.manual_seed(0)
    for value in expected:
        assert torch.equal(noisy(x), value)


@BUILT
def test_who_looks_on_gets_ours(fresh: Path, raced: Any):
    races, ways, x = raced(0.5), Ways(), torch.ones(3)
    ways.settle(x)
    assert ways.of(x) == ["plain"]
    torch.use_deterministic_algorithms(True)
    try:
        assert ways.of(x) == ["ours"]
    finally:
        torch.use_deterministic_algorithms(False)
    with w2s_fast.backend("cpp"):
        assert ways.of(x) == ["ours"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert ways.of(x) == ["ours"], "a checkpoint counts what is saved"
    with torch.autocast("cpu"):
        assert ways.of(x) == ["ours"]
    del ways.taken[:]
    torch.func.vmap(ways.call)(torch.ones(2, 3))
    torch.func.grad(lambda t: ways.call(t).sum())(x)
    torch.compile(ways.call, backend="eager")(x)
    torch._dynamo.reset()
    torch.jit.trace(ways.call, x, check_trace=False)
    assert set(ways.taken) == {"ours"} and len(races) == 1
    assert ways.of(x) == ["plain"]


@BUILT
def test_off_and_a_file(fresh: Path, raced: Any, monkeypatch: pytest.MonkeyPatch):
    races, ways, x = raced(0.5), Ways(), torch.ones(3)
    ways.settle(x)
    monkeypatch.setattr(calibration, "SETTING", "off")
    assert ways.of(x) == ["ours"]
    file = fresh / "table.jsonl"
    kind = calibration.kind_of((torch.ones(7),), {})
    Table({("twice", kind): 0.5}).save(file)
    monkeypatch.setattr(calibration, "SETTING", str(file))
    calibration.forget()
    before, others = file.read_text(), Ways()
    assert others.of(torch.ones(7)) == ["ours", "plain"] and others.of(torch.ones(7)) == ["plain"]
    others.settle(torch.ones(9))
    assert others.of(torch.ones(9)) == ["ours"] and len(races) == 1, "nothing is timed"
    assert file.read_text() == before


@BUILT
def test_another_process_knows_what_was_found(fresh: Path, raced: Any):
    races, ways, x = raced(0.5), Ways(), torch.ones(3)
    ways.settle(x)
    (file,) = fresh.glob("calibration-*.jsonl")
    head, line = file.read_text().splitlines()
    assert json.loads(head)["machine"]["torch"] == torch.__version__
    assert json.loads(line) == ["twice", "plain float32[3]", 0.5]
    calibration.forget()
    other = Ways()
    assert other.gives(x) == "plain" and other.of(x) == ["plain"] and len(races) == 1
    assert calibration.lines(calibration.table()) == ["twice: in 1 of 1 kinds of calls, down to 0.50"]
    assert dict(info.calibrated())["kinds of calls timed"] == "1"


def test_a_file_that_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "table.jsonl"
    path.write_text("{}")
    assert Table.load(path, kept=True).file is None and "is no calibration" in caplog.text
    assert Table.load(tmp_path / "none.jsonl").ratios == {}
    endless = Table({("f", "kind"): math.inf})
    endless.save(path)
    assert Table.load(path).ratios == endless.ratios


def test_a_folder_that_cannot_be_written(fresh: Path, raced: Any, monkeypatch: pytest.MonkeyPatch):
    blocked = fresh / "file"
    blocked.write_text("")
    table = Table(file=blocked / "below.jsonl")
    table.put("f", "kind", 0.5)
    assert table.get("f", "kind") == 0.5 and table.file is None


@BUILT
def test_explain_says_what_was_chosen(fresh: Path, raced: Any):
    races, x = raced(0.5), torch.randn(1, 4, 32)
    assert w2s_fast.explain(w2s_fast.gate_residual, x, x, x[:, :1]).backend == "cpp" and not races
    for _ in range(2):
        w2s_fast.gate_residual(x, x, x[:, :1])
    found = w2s_fast.explain(w2s_fast.gate_residual, x, x, x[:, :1])
    assert len(races) == 1 and found.backend == "reference"
    assert "plain PyTorch takes 0.50 of its time" in dict(found.rejected)["cpp"]


@BUILT
def test_checkpointing_counts_alike(fresh: Path, raced: Any):
    raced(0.5)
    x = torch.randn(1, 4, 32, requires_grad=True)
    for _ in range(3):
        w2s_fast.gate_residual(x, x, x[:, :1])
    found = torch.utils.checkpoint.checkpoint(lambda t: w2s_fast.gate_residual(t, t, t[:, :1]), x, use_reentrant=False)
    found.sum().backward()
    assert x.grad is not None


def test_tests_do_not_calibrate():
    assert calibration.SETTING == "off" and calibration.table().ratios == {}


def _small(op: str, number: int, dtype: torch.dtype, gradient: bool) -> domain.Call:
    found = domain.domains()[op]
    sizes = {name: (low, min(high, 2 * low + 24)) for name, (low, high) in found.sizes.items()}
    return replace(replace(found, sizes=sizes).draw(random.Random(number), number), dtype=dtype, gradient=gradient)


def _both(routes: Routes, args: Any, kwargs: Any, graded: bool) -> list[list[Tensor]]:
    found = []
    for way in (routes.function, routes.plain):
        given, named = calibration._own(args, kwargs)
        results = tree_leaves(way(*given, **named))
        if graded:
            made = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
            leaves = [t for t in calibration._tensors(given, named) if t.requires_grad]
            upstream = [torch.arange(t.numel()).cos().reshape(t.shape).to(t) for t in made]
            results = [*results, *torch.autograd.grad(made, leaves, upstream, allow_unused=True)]
        found.append([t.detach() for t in results if isinstance(t, Tensor)])
    return found


@BUILT
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("op", sorted(calibration.ROUTES))
def test_both_ways_are_one_function(op: str, gradient: bool, monkeypatch: pytest.MonkeyPatch):
    """Values and gradients of the everyday calls that the plain way serves; it serves some of them."""
    routes, everyday = calibration.ROUTES[op], domain.domains()[op]
    if gradient and not everyday.trained:
        pytest.skip("no gradient")
    seen: list[Any] = []
    monkeypatch.setattr(calibration, "SETTING", "none.jsonl")
    calibration.forget()

    def watched(key: Any, args: Any, kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return routes.function(*args, **kwargs)

    monkeypatch.setattr(routes, "call", watched)
    served = 0
    for dtype in everyday.dtypes:
        for number in range(3):
            call = _small(op, number, dtype, gradient)
            inputs = call.inputs(torch.Generator().manual_seed(number), torch.device("cpu"))
            del seen[:]
            call.ways()["ours"](*inputs)
            args, kwargs = seen[0]
            if routes.plain(*args, **kwargs) is NotImplemented:
                continue
            served += 1
            ours, plain = _both(routes, args, kwargs, gradient)
            tolerance = 2 * everyday.allowed[dtype != torch.float32]
            assert len(ours) == len(plain)
            for a, b in zip(ours, plain, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape
            assert domain.near(tolerance)(plain, ours) <= 1.0, call.name
    assert served


@BUILT
def test_calibrating_times_a_family(fresh: Path, raced: Any, monkeypatch: pytest.MonkeyPatch):
    races, family = raced(0.5), importlib.import_module("w2s_fast.bench.domains.diffusion")
    (one,) = (d for d in family.DOMAINS if d.op == "gate_residual")
    monkeypatch.setattr(family, "DOMAINS", [replace(one, sizes={"B": (1, 1), "N": (1, 4), "C": (32, 64)})])
    monkeypatch.setattr(calibrate, "DRAWS", 1)
    said: list[str] = []
    table = calibration.calibrate(["diffusion"], said.append)
    assert said == ["diffusion"] and len(races) == len(table.ratios) == 2
    assert {name for name, _ in table.ratios} == {"gate_residual"}


def test_off_has_nothing_to_calibrate():
    with pytest.raises(ValueError, match="no two ways to choose from"):
        calibration.calibrate()
