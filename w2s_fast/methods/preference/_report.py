"""The command of the methods on arithmetic: accuracy of every model, sampled and greedy, over the seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._common import report, training
from .._common.console import progress, quiet_transformers

#: accuracy by model and by "sampled" or "greedy"
Accuracies = dict[str, dict[str, float]]


def command(
    source: str, description: str | None, arguments: list[str],
    run: Callable[[int, bool, training.Start], Accuracies], draw: Callable[[list[Accuracies]], Any],
) -> int:  # fmt: skip
    """Run the method of the file ``source`` with every seed; print tables, write numbers and figure."""
    from rich.console import Console

    name = Path(source).stem
    given = report.parser(name, description, seeds=3).parse_args(arguments)
    with progress() as bars, quiet_transformers():
        start = training.watches(bars, given.out, source)
        found = [run(seed, given.quick, start) for seed in given.seeds]
    rows = {kind: {name: [s[name][kind] for s in found] for name in found[0]} for kind in ("sampled", "greedy")}
    for kind, part in rows.items():
        Console().print(report.seed_table(f"Accuracy, {kind}", "trained by", given.seeds, part, 3))
    report.finish(given.out, name, {"seeds": given.seeds, "accuracy": rows}, draw(found))
    return 0
