"""Is ours ever slower? Random everyday calls, each against plain PyTorch and torch.compile of it, interleaved.

A call is held where the lower quartile of (their time / our time) is at least `LEAST` for the fastest of the others.
A short look decides where somebody is clearly faster; where nobody is, a longer one does. What noise alone does is
measured beside: in every `CONTROLLED`th call plain PyTorch is timed against itself, and judged as it is against ours.
torch.compile takes seconds to compile a call, so that it is asked in the first calls only. Results go to a JSON file as
they come, and a run goes on where the file ends: the calls depend on the seed alone. Those of other commits stay in the
file under the run that measured them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import ceilings, harness, tables
from .domain import LEAST, Call, calls
from .harness import CONTROL, OURS, Row, Settings
from .report import Report, new_report

#: ceilings say nothing here: no floor is asked for
_NO_CEILINGS = ceilings.Ceilings(1.0, {"float32": 1.0, "bfloat16": 1.0}, "not measured")


#: seconds between two writes of the results
_KEPT_EVERY = 2.0
#: no multiple or divisor of the number of ops, so that every op gets its turn
CONTROLLED = 19


def settings(given: Settings) -> Settings:
    """How a call is timed: shorter than a benchmark case, on inputs that were just written, as calls are every day."""
    rounds = min(given.rounds, 11)
    return replace(
        given, rounds=rounds, turns=2, window=0.0015, warm_up=0.008, budget=0.2, closer=0.5, rotation=16 << 20,
        memory=False,
    )  # fmt: skip


def _without_compile(chosen: Settings) -> Settings:
    return replace(chosen, providers=chosen.providers or ("eager",))


def planned(count: int, seed: int, ops: tuple[str, ...], path: Path, compiled: int) -> list[Call]:
    """The calls that ``path`` lacks results of, be it only those of torch.compile, which the first ``compiled`` want.
    Raises ValueError for an op without a domain or a file of others'."""
    asked = list(calls(count, seed, ops))
    if not path.exists():
        return asked
    rows = Report.load(path).rows
    have = {(row.op, row.case) for row in rows}
    with_compile = {(row.op, row.case) for row in rows if row.kind == "compile"}
    return [call for call in asked if (call.domain.op, call.name)
            not in (with_compile if call.domain.compilable and call.number < compiled else have)]  # fmt: skip


def measure(
    todo: Sequence[Call], given: Settings, path: Path, load: float, compiled: int,
    step: Callable[[str], None] = lambda what: None, advance: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Time the calls and keep each in ``path``, in place of what it had of them."""
    chosen = settings(given)
    torch.set_num_threads(chosen.threads)
    run = new_report([], chosen, _NO_CEILINGS, {}, load)
    run.runs[0].pop("ceilings")
    kept = Report.load(path) if path.exists() else Report(run.device, run.slug)
    if not kept.runs or kept.runs[-1] != run.runs[0]:
        kept.runs.append(run.runs[0])
    saved = time.monotonic()
    try:
        for call in todo:
            step(f"{call.domain.op}/{call.name}")
            providers = chosen if call.number < compiled else _without_compile(chosen)
            providers = replace(providers, control=call.number % CONTROLLED == 0)
            rows = harness.run([call.case()], providers, _NO_CEILINGS)
            for row in rows:
                row.floor_ms = row.share = None
                row.run = len(kept.runs) - 1
            kept.rows = [row for row in kept.rows if (row.op, row.case) != (call.domain.op, call.name)] + rows
            if time.monotonic() - saved > _KEPT_EVERY:
                kept.save(path)
                saved = time.monotonic()
            advance()
    finally:
        kept.save(path)


def rival(rows: Sequence[Row]) -> Row | None:
    """The fastest of the others, if ours and one of them could be timed."""
    timed = [row for row in rows if row.kind not in (OURS, CONTROL) and row.ratio is not None]
    return min(timed, key=lambda row: row.ratio or 0.0) if timed else None


def held(rows: Sequence[Row]) -> bool | None:
    """Whether nobody is faster in one call; None where ours or all others could not be timed."""
    fastest = rival(rows)
    return None if fastest is None else (fastest.ratio_low or 0.0) >= LEAST


def share(groups: Sequence[Sequence[Row]], kinds: Sequence[str] = ()) -> str:
    """``"91.0%: in 91 of 100 calls"`` nobody of these kinds, or nobody at all, is faster."""
    wanted = {OURS, *kinds}
    verdicts = [held([row for row in rows if not kinds or row.kind in wanted]) for rows in groups]
    judged = [verdict for verdict in verdicts if verdict is not None]
    part = f"{sum(judged) / len(judged):.1%}" if judged else "none"
    return f"{part}: in {sum(judged)} of {len(judged)} calls"


def losses(groups: Iterable[Sequence[Row]]) -> list[Sequence[Row]]:
    """The calls in which somebody is faster, the worst first."""
    return sorted((rows for rows in groups if held(rows) is False), key=lambda rows: rival(rows).ratio or 0.0)  # type: ignore[union-attr]


def shares(groups: Sequence[Sequence[Row]]) -> list[str]:
    """The share against whoever was asked, then that of the calls in which torch.compile was asked too."""
    found = [f"{share(groups)} the lower quartile of the fastest other is {LEAST:g} or more"]
    asked = [rows for rows in groups if any(row.kind == "compile" and row.ratio is not None for row in rows)]
    if 0 < len(asked) < len(groups):
        found.append(f"{share(groups, ('eager', 'formulation', 'peer'))} plain PyTorch is not faster")
        found.append(f"{share(asked, ('compile',))} of those that torch.compile was asked in it is not faster")
    return found + control(groups)


def control(groups: Sequence[Sequence[Row]]) -> list[str]:
    """The share of calls in which plain PyTorch is not faster than itself: what nobody can be held to beat."""
    lows = [row.ratio_low or 0.0 for rows in groups for row in rows if row.kind == CONTROL and row.ratio is not None]
    if not lows:
        return []
    kept = sum(low >= LEAST for low in lows)
    return [f"{kept / len(lows):.1%}: in {kept} of {len(lows)} calls plain PyTorch is not faster than itself (control)"]


def summary(report: Report, only: Iterable[str] = ()) -> list[str]:
    """The shares of calls in which nobody is faster, the same an op, every loss, and what could not be judged."""
    wanted = set(only)
    groups = [rows for rows in tables.grouped(report.rows) if not wanted or rows[0].op in wanted]
    found = shares(groups)
    for op in dict.fromkeys(rows[0].op for rows in groups):
        mine = [verdict for rows in groups if rows[0].op == op and (verdict := held(rows)) is not None]
        found.append(f"  {op}: {sum(mine)} of {len(mine)}")
    found += [_line(rows) for rows in losses(groups)]
    for rows in groups:
        reasons = [f"{row.provider} {row.status}: {row.reason}" for row in rows if row.status != "ok"]
        if held(rows) is None or reasons:
            what = "not judged" if held(rows) is None else "left out"
            found.append(f"{what}: {rows[0].op}/{rows[0].case}: " + "; ".join(reasons))
    return found


def table(report: Report) -> str:
    """Every loss, as a table."""
    rows = []
    for group in losses(tables.grouped(report.rows)):
        ours, fastest = group[0], rival(group)
        assert fastest is not None and ours.ms is not None
        ratio = f"{fastest.ratio:.2f} ({fastest.ratio_low:.2f}–{fastest.ratio_high:.2f})"
        rows.append([ours.op, ours.case, fastest.provider, ratio, f"{tables.milliseconds(ours.ms)} ({ours.backend})"])
    return tables.markdown(["op", "call", "faster", "ratio", "ours"], rows)


def conditions(report: Report) -> str:
    """Against whom, and on what: a sentence."""
    timed = (row for row in report.rows if row.kind not in (OURS, CONTROL))
    others = sorted({row.provider for row in timed if row.ratio is not None})
    first: dict[str, dict[str, object]] = {}
    for run in report.runs:  # pieces of one run differ in their load alone
        first.setdefault(run["commit"], run)
    runs = ", ".join(f"{commit} ({tables.hardware(run)})" for commit, run in sorted(first.items()))
    return f"Against {' and '.join(others)}, at {runs}, {report.runs[-1]['threads']} threads."


def _line(rows: Sequence[Row]) -> str:
    ours, fastest = rows[0], rival(rows)
    assert fastest is not None and ours.ms is not None and fastest.ratio is not None
    return (
        f"loss {fastest.ratio:.2f} ({fastest.ratio_low:.2f}-{fastest.ratio_high:.2f}) {ours.op}/{ours.case}: "
        f"{fastest.provider}, ours {tables.milliseconds(ours.ms)} ({ours.backend})"
    )
