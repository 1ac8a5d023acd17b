"""Charts of a report: how much slower the others are, and how close ours is to the machine's floor (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import checks
from ..files import write_figure
from . import readme
from .harness import Row
from .report import Report

COLORS = {"eager": "#8c96a5", "compile": "#3b6fb6", "formulation": "#c8553d", "peer": "#7a9e4b"}


def needs() -> type:
    """matplotlib's Figure. Raises ImportError saying what to install where there is none."""
    with checks.extra("plot"):
        from matplotlib.figure import Figure
    return Figure  # type: ignore[no-any-return]


def _figure(height: float) -> tuple[Any, Any]:
    Figure = needs()
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    write_figure(paths[0], figure, dpi=130, metadata={"Software": None})
    write_figure(paths[1], figure, metadata={"Date": None, "Creator": None})
    return paths


def ratio_chart(report: Report, folder: Path) -> list[Path]:
    """Bars from 1, log scale, to each baseline's time over ours: to the left where it is faster; whiskers at the
    quartiles, a tick at the target."""
    rows = [row for row in _shown(report) if row.ratio is not None]
    if not rows:
        return []
    figure, axes = _figure(1.2 + 0.24 * len(rows))
    for y, row in enumerate(rows):
        assert row.ratio is not None and row.ratio_low is not None and row.ratio_high is not None
        axes.barh(y, row.ratio - 1, left=1, color=COLORS[row.kind], height=0.7)
        axes.plot([row.ratio_low, row.ratio_high], [y, y], color="black", linewidth=1)
        axes.annotate(f" {row.ratio:.3g}×", (row.ratio_high, y), va="center", fontsize=7)
        if row.target is not None:
            axes.plot([row.target] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(rows)), [f"{row.op} {row.case}: {row.provider}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("their time / our time (black tick: what the project demands)")
    axes.set_title(report.device)
    present = [kind for kind in COLORS if any(row.kind == kind for row in rows)]
    axes.legend([axes.barh(0, 0, color=COLORS[kind]) for kind in present], present, fontsize=7, loc="upper right")
    return _save(figure, folder, f"{report.slug}-ratios")


def floor_chart(report: Report, folder: Path) -> list[Path]:
    """Bars of the share of the machine's floor that ours reaches, a case each."""
    rows = [row for row in _shown(report) if row.share is not None]
    if not rows:
        return []
    figure, axes = _figure(1.2 + 0.24 * len(rows))
    axes.barh(range(len(rows)), [100 * min(row.share or 0, 1) for row in rows], color="#3b6fb6", height=0.7)
    axes.set_yticks(range(len(rows)), [f"{row.op} {row.case}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("share of the measured floor, percent")
    axes.set_title(report.device)
    return _save(figure, folder, f"{report.slug}-floor")


def _shown(report: Report) -> list[Row]:
    return [row for case in readme.shown(report).values() for row in case if row.status == "ok"]


def draw(report: Report, folder: Path) -> list[Path]:
    """Both charts as PNG and SVG; the files written. Raises ImportError without matplotlib."""
    return ratio_chart(report, folder) + floor_chart(report, folder)
