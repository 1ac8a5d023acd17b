"""Accuracy and performance gap recovered, as tables, a figure and a file."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from .._common import report

WEAK, CEILING = "weak model", "strong ceiling"


class Row(NamedTuple):
    """Test accuracy of a model, how often it agrees with the weak one, and its training losses."""

    accuracy: float
    agreement: float
    losses: list[float]


Accuracies = dict[str, Row]  # by model, among them `WEAK` and `CEILING`


def recovered(accuracy: float, weak: float, ceiling: float) -> float:
    """PGR: 0 is the weak supervisor, 1 a strong model trained on the ground truth."""
    return (accuracy - weak) / (ceiling - weak) if ceiling != weak else float("nan")


def accuracies(runs: list[Accuracies]) -> dict[str, list[float]]:
    """By model, a value a seed."""
    return {name: [run[name].accuracy for run in runs] for name in runs[0]}


def gaps(runs: list[Accuracies]) -> dict[str, list[float]]:
    """PGR of every student, a value a seed."""
    return {
        name: [recovered(run[name].accuracy, run[WEAK].accuracy, run[CEILING].accuracy) for run in runs]
        for name in runs[0] if name not in (WEAK, CEILING)
    }  # fmt: skip


def draw(found: dict[str, list[Accuracies]], seeds: list[int]) -> Any:
    """Accuracy of every student between the weak model and the ceiling, a panel a task; None without matplotlib."""
    figure = report.figure(5.5 * len(found), 3.6)
    if figure is None:
        return None
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (task, runs) in zip(axes, found.items(), strict=True):
        values, pgr = accuracies(runs), gaps(runs)
        for name, colour in ((WEAK, "#8c9bab"), (CEILING, "#3a7d44")):
            mean = statistics.fmean(values[name])
            axis.axvline(mean, color=colour, linewidth=1.5)
            axis.annotate(f" {name} {mean:.3f}", (mean, 1.0), xycoords=("data", "axes fraction"), color=colour,
                          fontsize=8, ha="left" if name == WEAK else "right", va="bottom")  # fmt: skip
        for place, name in enumerate(pgr):
            mean = statistics.fmean(values[name])
            axis.barh(-place, mean, height=0.6, color="#5b8cc9" if "logconf" not in name else "#d9582b")
            axis.plot(values[name], [-place] * len(seeds), "k.", markersize=4)
            axis.annotate(f" PGR {statistics.fmean(pgr[name]):.2f}", (max(values[name]), -place), va="center",
                          fontsize=9, xytext=(3, 0), textcoords="offset points")  # fmt: skip
        low = min(min(v) for v in values.values())
        axis.set(xlim=(low - 0.03, max(max(v) for v in values.values()) + 0.02), xlabel=f"test accuracy, {task}")
        axis.set_yticks([-i for i in range(len(pgr))], list(pgr))
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def write(out: Path, name: str, seeds: list[int], found: dict[str, list[Accuracies]], facts: dict[str, Any]) -> None:
    """Print a table of accuracies and one of PGR a task; write ``name.json`` and ``name.png``."""
    from rich.console import Console

    console, made = Console(), {}
    for task, runs in found.items():
        values, pgr = accuracies(runs), gaps(runs)
        console.print(report.seed_table(f"Test accuracy, {task}", "model", seeds, values, digits=3))
        console.print(report.seed_table(f"Performance gap recovered, {task}", "student", seeds, pgr, digits=2))
        made[task] = {"accuracy": values, "pgr": pgr, "agreement": {m: [r[m].agreement for r in runs] for m in runs[0]},
                      "losses": {m: [r[m].losses for r in runs] for m in runs[0]}}  # fmt: skip
    report.finish(out, name, {"seeds": seeds, **facts, "tasks": made}, draw(found, seeds))
