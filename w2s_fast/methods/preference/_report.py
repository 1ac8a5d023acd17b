"""The commands of the preference methods; of those on arithmetic: accuracy of every model, sampled and greedy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .._common import report, training
from .._common.console import progress, quiet_transformers

#: accuracy by model and by "sampled" or "greedy"
Accuracies = dict[str, dict[str, float]]
Result = TypeVar("Result")


def seeds(
    source: str, description: str | None, arguments: list[str], run: Callable[[int, bool, training.Start], Result]
) -> tuple[argparse.Namespace, list[Result]]:
    """The options given, and what ``run(seed, quick, start)`` of the method's file ``source`` found with every seed."""
    given = report.parser(Path(source).stem, description, seeds=3).parse_args(arguments)
    with progress() as bars, quiet_transformers():
        start = training.watches(bars, given.out, source)
        return given, [run(seed, given.quick, start) for seed in given.seeds]


def command(
    source: str, description: str | None, arguments: list[str],
    run: Callable[[int, bool, training.Start], Accuracies], draw: Callable[[list[Accuracies]], Any],
) -> int:  # fmt: skip
    """Run the method of the file ``source`` with every seed; print tables, write numbers and figure."""
    from rich.console import Console

    given, found = seeds(source, description, arguments, run)
    rows = {kind: {name: [s[name][kind] for s in found] for name in found[0]} for kind in ("sampled", "greedy")}
    for kind, part in rows.items():
        Console().print(report.seed_table(f"Accuracy, {kind}", "trained by", given.seeds, part, 3))
    report.finish(given.out, Path(source).stem, {"seeds": given.seeds, "accuracy": rows}, draw(found))
    return 0
