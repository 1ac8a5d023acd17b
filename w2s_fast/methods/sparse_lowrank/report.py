"""What `w2s-fast train sltrain` prints, draws and writes."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_figure, write_json
from .._common.console import no_figure

if TYPE_CHECKING:
    from .sltrain import Row

NAMES = {"full": "full-rank", "lowrank": "low-rank only", "sltrain": "SLTrain"}
COLOURS = {"full": "#8c9bab", "lowrank": "#5b8cc9", "sltrain": "#d9582b"}
PARTS = {
    "weight_bytes": "weights", "index_bytes": "index", "gradient_bytes": "gradients", "optimizer_bytes": "optimizer",
    "plan_bytes": "CPU plan",
}  # fmt: skip


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of every method, in the order of the runs."""
    return {method: [r for r in rows if r.method == method] for method in dict.fromkeys(r.method for r in rows)}


def mean_perplexity(rows: list[Row]) -> float:
    """Over the seeds."""
    return statistics.mean(r.perplexity for r in rows)


def table(rows: list[Row]) -> Any:
    """Perplexity of every seed, parameters and bytes, as a rich table; a column a method."""
    from rich.table import Table

    methods = by_method(rows)
    made = Table(title="Perplexity on held-out text, and what training holds")
    made.add_column("")
    for method in methods:
        made.add_column(NAMES[method], justify="right")
    for seed in dict.fromkeys(r.seed for r in rows):
        made.add_row(f"perplexity, seed {seed}", *(
            " ".join(f"{r.perplexity:.2f}" for r in runs if r.seed == seed) for runs in methods.values()
        ))  # fmt: skip
    made.add_section()
    first = [runs[0] for runs in methods.values()]
    made.add_row("parameters", *(f"{r.parameters:,}" for r in first))
    for part, name in PARTS.items():
        made.add_row(f"{name}, MB", *(f"{getattr(r, part) / 1e6:.2f}" for r in first))
    made.add_row("together, MB", *(f"{held(r) / 1e6:.2f}" for r in first))
    return made


def held(row: Row) -> int:
    """Bytes of all `PARTS`."""
    return sum(getattr(row, part) for part in PARTS)


def verdict(rows: list[Row]) -> str:
    """What the numbers say, seed by seed; empty unless all three methods were run."""
    found = {m: {r.seed: r.perplexity for r in runs} for m, runs in by_method(rows).items()}
    if set(found) != set(NAMES):
        return ""
    seeds = found["sltrain"]
    worse = sum(found["lowrank"][s] > found["sltrain"][s] for s in seeds)
    shares = [found["sltrain"][s] / found["full"][s] - 1 for s in seeds]
    gap = [found["lowrank"][s] / found["full"][s] - 1 for s in seeds]
    return (
        f"Low-rank only is worse than SLTrain in {worse} of {len(seeds)} seeds. Above full-rank: SLTrain "
        f"{min(shares):+.1%} to {max(shares):+.1%}, low-rank only {min(gap):+.1%} to {max(gap):+.1%}."
    )


def smoothed(losses: list[float], window: int) -> list[float]:
    """Mean of the last ``window`` losses at every step."""
    return [statistics.fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]


def draw(rows: list[Row], path: Path) -> bool:
    """Training loss, perplexity and memory as PNG; False where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars, memory = figure.subplots(1, 3, width_ratios=(5, 3, 4))
    methods = by_method(rows)
    above: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    for place, (method, runs) in enumerate(methods.items()):
        for i, row in enumerate(runs):
            skip = len(row.losses) // 10
            line = smoothed(row.losses, max(1, len(row.losses) // 20))[skip:]
            curves.plot(range(skip, len(row.losses)), line, color=COLOURS[method], linewidth=1,
                        label=None if i else NAMES[method])  # fmt: skip
        value = mean_perplexity(runs)
        bars.bar(place, value, color=COLOURS[method])
        bars.plot([place] * len(runs), [r.perplexity for r in runs], "k.", markersize=4)
        bars.annotate(f"{value:.2f}", (place, max(r.perplexity for r in runs)), **above)
        below = 0.0
        for shade, part in zip((1.0, 0.2, 0.75, 0.5, 0.3), PARTS, strict=True):
            size = getattr(runs[0], part) / 1e6
            memory.bar(place, size, bottom=below, color=COLOURS[method], alpha=shade)
            if size > 0.08 * held(runs[0]) / 1e6:
                memory.text(place, below + size / 2, PARTS[part], ha="center", va="center", fontsize=8)
            below += size
        memory.annotate(f"{below:.1f}", (place, below), **above)
    perplexities = [r.perplexity for r in rows]
    curves.set(title="training loss (mean of a twentieth of the steps)", xlabel="step", ylabel="nats a token")
    curves.legend(frameon=False)
    bars.set(title="perplexity on held-out text", ylim=(0.9 * min(perplexities), 1.05 * max(perplexities)))
    memory.set(title="MB held while training", ylim=(0, 1.1 * max(map(held, rows)) / 1e6))
    for axis in (bars, memory):
        axis.set_xticks(range(len(methods)), [NAMES[m] for m in methods])
    for axis in (curves, bars, memory):
        axis.spines[["top", "right"]].set_visible(False)
    write_figure(path, figure, dpi=120)
    return True


def write(out: Path, rows: list[Row], facts: dict[str, Any], quiet: bool = False) -> None:
    """Print the table and the verdict; write ``sltrain.json`` and, with matplotlib, ``sltrain.png``."""
    from rich.console import Console

    console = Console(quiet=quiet)
    console.print(table(rows))
    if verdict(rows):
        console.print(verdict(rows), highlight=False)
    written = [out / "sltrain.json"]
    write_json(written[0], {**facts, "rows": [asdict(r) for r in rows]})
    if draw(rows, out / "sltrain.png"):
        written.insert(0, out / "sltrain.png")
    else:
        no_figure()
    console.print("wrote " + ", ".join(map(str, written)), highlight=False)
