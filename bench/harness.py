"""Runs cases: checks every provider against float64, then times those that are right in interleaved rounds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from . import timing
from .case import BACKENDS, Case, Unavailable, doubled
from .ceilings import Ceilings
from .memory import peak_bytes

OURS = "ours"
#: the row of a plain form that was timed against itself; its ratio is to the plain form, not to ours
CONTROL = "control"
#: of a first look: it is not decided where the quartiles of their time over ours reach into these
CLOSE = (0.9, 1 / 0.9)
#: rounds of a second look, turns of each in one of these at most and, of calls that take long, wanted
_CLOSER_ROUNDS, _MOST_TURNS, _LONG_TURNS = 5, 64, 8
_LOG = logging.getLogger("w2s_fast.bench")
_FRESH = 4  # sets of inputs that are drawn; the other sets of a rotation are copies of them at addresses of their own


@dataclass(frozen=True)
class Settings:
    """How a run is done.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads, fixed for the whole run.
        rounds: interleaved rounds a case.
        window: seconds one provider runs in one turn.
        turns: turns of each provider in a round.
        warm_up: seconds each provider runs before the rounds.
        budget: seconds of rounds a case, once there are three.
        rotation: bytes of inputs that the calls go through in turn, at most; 0 has them all on one set.
        closer: seconds of rounds of a second look, whose times are taken instead, where the first finds the fastest
            other about as fast as ours (`CLOSE`); 0: no second look.
        control: whether a case's plain form is timed against itself too.
        memory: whether peak memory is measured.
        providers: names or kinds to run ("ours" is always run; a backend's name adds that backend); empty: all
            baselines, and ours as `auto` serves it.
    """

    device: str = "cpu"
    threads: int = 2
    rounds: int = 15
    window: float = 0.02
    warm_up: float = 0.1
    budget: float = 1.0
    seed: int = 0
    rotation: int = timing.MAX_ROTATION_BYTES
    turns: int = 1
    closer: float = 0.0
    control: bool = False
    memory: bool = True
    providers: tuple[str, ...] = ()


@dataclass
class Row:
    """One provider on one case: a line of the table and of the JSON."""

    op: str
    case: str
    mode: str
    dtype: str
    shape: dict[str, int]
    provider: str
    kind: str
    status: str = "ok"  # ok | wrong | unavailable
    reason: str = ""
    backend: str = ""
    error: float | None = None
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    rounds: int = 0
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    target: float | None = None
    met: bool | None = None
    peak_bytes: int | None = None
    floor_ms: float | None = None
    share: float | None = None
    prediction: str = ""
    hot: bool = False
    run: int = 0  # index into the report's runs


@dataclass
class _Candidate:
    row: Row
    call: Callable[..., Any]
    context: Callable[[], Any] = nullcontext
    runner: timing.Runner | None = field(default=None)


def _backend(name: str) -> Callable[[], Any]:
    from .. import dispatch

    return lambda: dispatch.backend(name)


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    return (first if isinstance(error, Unavailable) else f"{type(error).__name__}: {first}")[:200]


def _row(case: Case, provider: str, kind: str) -> Row:
    return Row(case.op, case.name, case.mode, case.dtype, dict(case.shape), provider, kind, hot=case.hot)


def serving_backend(case: Case, inputs: tuple[Any, ...], device: str) -> tuple[str, list[tuple[str, str]]]:
    """The backend that `auto` takes for the case, and the reasons of those before it.

    A kernel that only who asks for it gets (opt-in) is not what `auto` takes, whether or not it could serve.
    """
    from .. import dispatch

    try:
        found = dispatch.explain(case.ours, *inputs)
    except ValueError:  # the case begins with something else than an op
        pass
    else:
        return found.backend, [(name, why) for name, why in found.rejected if "comes first on" not in why]
    rejected: list[tuple[str, str]] = []
    for name in BACKENDS[device]:
        try:
            with _backend(name)():
                case.ours(*inputs)
            return name, rejected
        except (RuntimeError, NotImplementedError) as error:
            rejected.append((name, _reason(error)))
    raise RuntimeError(f"bench case {case.id}: no backend serves it: {rejected}")


def _candidates(case: Case, inputs: tuple[Any, ...], settings: Settings) -> list[_Candidate]:
    asked = settings.providers
    serving, rejected = serving_backend(case, inputs, settings.device)
    first = _row(case, OURS, "ours")
    first.backend, first.prediction = serving, case.prediction
    found = [_Candidate(first, case.ours, _backend("auto"))]
    for name in BACKENDS[settings.device]:
        reasons = dict(rejected)
        if name in reasons and (name in asked or not asked):
            row = _row(case, f"{OURS} ({name})", "ours")
            row.backend, row.status, row.reason = name, "unavailable", reasons[name]
            found.append(_Candidate(row, case.ours))
        elif name != serving and name in asked:
            row = _row(case, f"{OURS} ({name})", "ours")
            row.backend = name
            found.append(_Candidate(row, case.ours, _backend(name)))
    for name, provider in case.providers.items():
        if asked and name not in asked and provider.kind not in asked:
            continue
        row = _row(case, name, provider.kind)
        row.target = case.targets.get(name)
        try:
            found.append(_Candidate(row, provider.make()))
        except Exception as error:
            row.status, row.reason = "unavailable", _reason(error)
            found.append(_Candidate(row, case.ours))
    return found


def answer(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """What is right, computed in float64; TypeError where some of it is not."""
    found = function(*doubled(inputs))
    for leaf in tree_leaves(found):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
            raise TypeError(f"the reference answers float64 inputs in {leaf.dtype}")
    return found


def _check(case: Case, candidate: _Candidate, inputs: tuple[Any, ...], expected: Any) -> None:
    row = candidate.row
    provider = case.providers.get(row.provider)
    if provider is not None and provider.exact is not None:
        expected = answer(provider.exact(), inputs)
    try:
        with candidate.context():
            actual = candidate.call(*inputs)
    except Exception as error:  # a baseline that fails is reported, whatever it raises
        row.status, row.reason = "unavailable", _reason(error)
        return
    try:
        row.error = case.error(actual, expected, provider.compare if provider else None)
    except Exception as error:
        row.status, row.reason = "wrong", f"output cannot be compared: {_reason(error)}"
        return
    if not row.error <= 1.0:
        row.status, row.reason = "wrong", f"error is {row.error:.3g} times the tolerance"


def _time(candidates: Sequence[_Candidate], inputs: Sequence[tuple[Any, ...]], settings: Settings) -> None:
    device = torch.device(settings.device)
    runners: dict[str, timing.Runner] = {}
    for candidate in candidates:
        runners[candidate.row.provider] = timing.Runner(_within(candidate), inputs, device)
        if settings.memory:
            candidate.row.peak_bytes = peak_bytes(_within(candidate), inputs[0], device)
        runners[candidate.row.provider].warm_up(settings.warm_up, settings.window)
    times = _looked_at(runners, OURS, settings)
    for candidate in candidates:
        row = candidate.row
        _spread(row, times[row.provider])
        if row.provider != OURS and OURS in times:
            row.ratio, row.ratio_low, row.ratio_high = timing.contest(times[row.provider], times[OURS])
            row.met = None if row.target is None else row.ratio >= row.target


def _spread(row: Row, turns: timing.Turns) -> None:
    found = timing.quartiles([timing.quartiles(one).median for one in turns])
    row.ms, row.ms_low, row.ms_high = (1e3 * value for value in found)
    row.rounds = len(turns)


def _looked_at(runners: dict[str, timing.Runner], base: str, settings: Settings) -> dict[str, timing.Turns]:
    """The turns of all; of a second, longer look where the first finds the fastest about as fast as ``base``.

    What the first said decides nothing then: whoever stops when the result pleases measures noise.
    """
    times = timing.alternate(runners, settings.rounds, settings.turns, settings.budget, settings.seed)
    others = [timing.contest(turns, times[base]) for name, turns in times.items() if name != base and base in times]
    fastest = min(others, default=None)
    if not settings.closer or fastest is None or fastest.low > CLOSE[1] or fastest.high < CLOSE[0]:
        return times
    fits = settings.closer / _CLOSER_ROUNDS / max(sum(runner.seconds for runner in runners.values()), 1e-9)
    turns = round(min(max(fits, min(_LONG_TURNS, _LONG_TURNS * fits), 2), _MOST_TURNS))
    return timing.alternate(runners, _CLOSER_ROUNDS, turns, math.inf, settings.seed + 1)


def _control(case: Case, inputs: Sequence[tuple[Any, ...]], settings: Settings) -> list[Row]:
    """The plain form against itself, as the others against ours: what noise alone makes of a verdict here."""
    provider = case.providers.get("eager")
    if provider is None:
        return []
    runners = {name: timing.Runner(provider.make(), inputs, torch.device(settings.device)) for name in ("one", "other")}
    for runner in runners.values():
        runner.warm_up(settings.warm_up, settings.window)
    times = _looked_at(runners, "one", settings)
    row = _row(case, CONTROL, CONTROL)
    _spread(row, times["other"])
    row.ratio, row.ratio_low, row.ratio_high = timing.contest(times["other"], times["one"])
    return [row]


def _within(candidate: _Candidate) -> Callable[..., Any]:
    """The call inside its backend's context; `auto` is the state already, so ours is timed without a wrapper."""
    if candidate.row.kind != OURS or candidate.row.provider == OURS:
        return candidate.call

    def call(*args: Any) -> Any:
        with candidate.context():
            return candidate.call(*args)

    return call


def run_case(case: Case, settings: Settings, ceilings: Ceilings | None = None) -> list[Row]:
    """Check, measure and time one case; ours comes first in the rows.

    A provider that is wrong or cannot run gets no time. If ours is wrong there are no ratios at all.
    """
    device = torch.device(settings.device)

    def make(seed: int) -> tuple[Any, ...]:
        return case.inputs(torch.Generator(device).manual_seed(settings.seed + seed), device)

    first = make(0)
    expected = answer(case.reference, first)
    candidates = _candidates(case, first, settings)
    for candidate in candidates:
        if candidate.row.status == "ok":
            _check(case, candidate, first, expected)
    right = [candidate for candidate in candidates if candidate.row.status == "ok"]
    del expected
    count = timing.sets_needed(timing.tensor_bytes(first), timing.last_level_cache(device), settings.rotation)
    inputs = [first, *(make(seed) for seed in range(1, min(count, _FRESH)))]
    copies = (inputs[index % _FRESH] for index in range(_FRESH, count))
    inputs += [tree_map_only(Tensor, torch.clone, values) for values in copies]
    _time(right, inputs, settings)
    control = _control(case, inputs, settings) if settings.control else []
    ours = candidates[0].row
    ours.backend = serving_backend(case, first, settings.device)[0]  # which way is faster is found on the way
    if ceilings is not None and ours.ms is not None:
        _floor(case, ours, ceilings)
    return [candidate.row for candidate in candidates] + control


def _floor(case: Case, ours: Row, ceilings: Ceilings) -> None:
    assert ours.ms is not None
    ours.floor_ms = 1e3 * ceilings.floor_seconds(case.bytes, case.flops, case.floor_rate)
    ours.share = ours.floor_ms / ours.ms
    ours.target = case.targets.get("floor")
    ours.met = None if ours.target is None else ours.ms <= ours.target * ours.floor_ms


def run(
    cases: Sequence[Case],
    settings: Settings,
    ceilings: Ceilings,
    progress: Callable[[Case], None] = lambda case: None,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """All cases; one that fails as a whole becomes one unavailable row with the reason, and the run goes on.

    ``progress`` hears of a case before it begins, ``done`` gets its rows."""
    torch.set_num_threads(settings.threads)
    rows: list[Row] = []
    for case in cases:
        progress(case)
        try:
            new = run_case(case, settings, ceilings)
        except Exception as error:
            _LOG.debug("bench case %s failed", case.id, exc_info=True)
            row = _row(case, OURS, "ours")
            row.status, row.reason, row.prediction = "unavailable", _reason(error), case.prediction
            new = [row]
        rows += new
        done(new)
    return rows
