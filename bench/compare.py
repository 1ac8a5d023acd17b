"""Two results of one device against each other: which ratios changed by more than their rounds scatter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .harness import CONTROL, OURS, Row
from .report import Report

#: a ratio that falls by more than this share is a loss
ALLOWED = 0.05


@dataclass(frozen=True)
class Change:
    """One provider on one case: the ratio before and after, or what else became different."""

    op: str
    case: str
    provider: str
    before: float
    after: float
    note: str = ""

    @property
    def loss(self) -> bool:
        """Whether ours became slower against this provider by more than `ALLOWED`, or wrong."""
        return bool(self.note) or self.after < self.before * (1 - ALLOWED)

    def __str__(self) -> str:
        where = f"{self.op}/{self.case} {self.provider}"
        return f"{where}: {self.note or f'{self.before:.3g} -> {self.after:.3g} ({self.after / self.before - 1:+.0%})'}"


def _rows(report: Report) -> dict[tuple[str, str, str], Row]:
    return {(row.op, row.case, row.provider): row for row in report.rows if row.kind != CONTROL}


def _beyond_noise(before: Row, after: Row) -> bool:
    """Whether the quartiles of the two runs' rounds do not overlap."""
    low, high = (before.ratio_low or 0, before.ratio_high or 0), (after.ratio_low or 0, after.ratio_high or 0)
    return low[1] < high[0] or high[1] < low[0]


def changes(before: Report, after: Report) -> Iterator[Change]:
    """What differs in the cases that both have, losses first. Ratios are compared, not times: each is of one run."""
    old, found = _rows(before), []
    for key, row in _rows(after).items():
        was = old.get(key)
        if was is None:
            continue
        if key[2] == OURS and was.status == "ok" and row.status != "ok":
            found.append(Change(*key, 1.0, 0.0, f"ours is {row.status} now: {row.reason}"))
        if was.ratio is not None and row.ratio is not None and _beyond_noise(was, row):
            found.append(Change(*key, was.ratio, row.ratio))
    yield from sorted(found, key=lambda change: (not change.loss, change.after / change.before))


def common(before: Report, after: Report) -> int:
    """How many ratios both have."""
    old = _rows(before)
    return sum(key in old and old[key].ratio is not None and row.ratio is not None for key, row in _rows(after).items())
