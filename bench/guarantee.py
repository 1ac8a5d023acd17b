"""Is ours ever slower? Random everyday calls, each against plain PyTorch and torch.compile of it, interleaved.

A call is held where the lower quartile of (their time / our time) is at least `LEAST` for the fastest of the others.
Results go to a JSON file after every call, and a run goes on where the file ends: the calls depend on the seed alone.
Those of other commits stay in the file under the run that measured them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import ceilings, harness, tables
from .domain import LEAST, Call, calls
from .harness import OURS, Row, Settings
from .report import Report, new_report

#: ceilings say nothing here: no floor is asked for
_NO_CEILINGS = ceilings.Ceilings(1.0, {"float32": 1.0, "bfloat16": 1.0}, "not measured")


def settings(given: Settings) -> Settings:
    """How a call is timed: shorter than a benchmark case, on inputs that were just written, as calls are every day."""
    return replace(given, window=0.01, warm_up=0.02, budget=1.0, rotation=16 << 20, memory=False)


def planned(count: int, seed: int, ops: tuple[str, ...], path: Path) -> list[Call]:
    """The calls that ``path`` has no result of. Raises ValueError for an op without a domain or a file of others'."""
    asked = list(calls(count, seed, ops))
    if not path.exists():
        return asked
    have = {(row.op, row.case) for row in Report.load(path).rows}
    return [call for call in asked if (call.domain.op, call.name) not in have]


def measure(
    todo: Sequence[Call], given: Settings, path: Path, load: float, step: Callable[[str], None] = lambda what: None,
    advance: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Time the calls and keep each in ``path``."""
    chosen = settings(given)
    torch.set_num_threads(chosen.threads)
    run = new_report([], chosen, _NO_CEILINGS, {}, load)
    run.runs[0].pop("ceilings")
    for call in todo:
        step(f"{call.domain.op}/{call.name}")
        run.rows = harness.run([call.case()], chosen, _NO_CEILINGS)
        for row in run.rows:
            row.floor_ms = row.share = None
        kept = Report.load(path) if path.exists() else Report(run.device, run.slug)
        if kept.runs and kept.runs[-1] == run.runs[0]:
            last = len(kept.runs) - 1
            kept.rows += [replace(row, run=last) for row in run.rows]
        else:
            kept.runs.append(run.runs[0])
            kept.rows += [replace(row, run=len(kept.runs) - 1) for row in run.rows]
        kept.save(path)
        advance()


def rival(rows: Sequence[Row]) -> Row | None:
    """The fastest of the others, if ours and one of them could be timed."""
    timed = [row for row in rows if row.provider != OURS and row.ratio is not None]
    return min(timed, key=lambda row: row.ratio or 0.0) if timed else None


def held(rows: Sequence[Row]) -> bool | None:
    """Whether nobody is faster in one call; None where ours or all others could not be timed."""
    fastest = rival(rows)
    return None if fastest is None else (fastest.ratio_low or 0.0) >= LEAST


def summary(report: Report, only: Iterable[str] = ()) -> list[str]:
    """The share of calls in which nobody is faster, the same an op, every loss, and what could not be judged."""
    wanted = set(only)
    groups = [rows for rows in tables.grouped(report.rows) if not wanted or rows[0].op in wanted]
    verdicts = [(rows, held(rows)) for rows in groups]
    judged = [rows for rows, verdict in verdicts if verdict is not None]
    kept = sum(bool(verdict) for _, verdict in verdicts)
    share = f"{kept / len(judged):.1%}" if judged else "none"
    found = [f"{share}: in {kept} of {len(judged)} calls the lower quartile of the fastest other is {LEAST:g} or more"]
    for op in dict.fromkeys(rows[0].op for rows in groups):
        mine = [verdict for rows, verdict in verdicts if rows[0].op == op and verdict is not None]
        found.append(f"  {op}: {sum(mine)} of {len(mine)}")
    lost = sorted((rows for rows, verdict in verdicts if verdict is False), key=lambda rows: rival(rows).ratio)  # type: ignore[union-attr]
    found += [_line(rows) for rows in lost]
    for rows, verdict in verdicts:
        reasons = [f"{row.provider} {row.status}: {row.reason}" for row in rows if row.status != "ok"]
        if verdict is None or reasons:
            found.append(f"not judged: {rows[0].op}/{rows[0].case}: " + "; ".join(reasons) if verdict is None
                         else f"left out: {rows[0].op}/{rows[0].case}: " + "; ".join(reasons))  # fmt: skip
    return found


def conditions(report: Report) -> str:
    """Against whom, and on what: a sentence."""
    others = sorted({row.provider for row in report.rows if row.provider != OURS and row.ratio is not None})
    runs = ", ".join(sorted({f"{run['commit']} ({tables.hardware(run)})" for run in report.runs}))
    return f"Against {' and '.join(others)}, at {runs}, {report.runs[-1]['threads']} threads."


def _line(rows: Sequence[Row]) -> str:
    ours, fastest = rows[0], rival(rows)
    assert fastest is not None and ours.ms is not None and fastest.ratio is not None
    return (
        f"loss {fastest.ratio:.2f} ({fastest.ratio_low:.2f}-{fastest.ratio_high:.2f}) {ours.op}/{ours.case}: "
        f"{fastest.provider}, ours {tables.milliseconds(ours.ms)} ({ours.backend})"
    )
