"""What the diffusion methods' commands share: options, a figure without a display, files of results."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._common.console import stderr_console
from .._common.points import sliced_wasserstein


def parser(name: str, description: str | None, seeds: int) -> argparse.ArgumentParser:
    """Options of every method: --seeds, --out, --quick."""
    made = argparse.ArgumentParser(prog=f"w2s-fast train {name}", description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)), help="(default %(default)s)")
    made.add_argument("--out", type=Path, default=Path(f"w2s_fast_{name}"), help="folder for figure and numbers")
    made.add_argument("--quick", action="store_true", help="small and short, to see that it runs")
    return made


def figure(width: float, height: float) -> Any:
    """A matplotlib figure that needs no display; None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    made: Any = Figure(figsize=(width, height), layout="constrained")
    made.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(made)
    return made


def distances(found: dict[int, dict[str, Tensor]]) -> tuple[dict[str, list[float]], Any]:
    """Distances to the first cloud of each seed, by cloud, and the same as a table."""
    from rich.table import Table

    first = next(iter(found.values()))
    truth, *others = first
    measured = {name: [sliced_wasserstein(made[name], made[truth]) for made in found.values()] for name in others}
    table = Table(title=f"Sliced Wasserstein distance to the {truth} (lower is better)")
    table.add_column("samples of")
    for name in (*(f"seed {seed}" for seed in found), "mean"):
        table.add_column(name, justify="right")
    for name, values in measured.items():
        table.add_row(name, *(f"{v:.4f}" for v in values), mean_spread(values))
    return measured, table


def clouds(points: dict[str, Tensor], limit: float = 2.4, shown: int = 4000) -> Any:
    """Point clouds side by side, by title; a figure, or None without matplotlib."""
    drawn = figure(3.2 * len(points), 2.7)
    if drawn is None:
        return None
    axes = drawn.subplots(1, len(points), sharex=True, sharey=True)
    for axis, (title, cloud) in zip(axes, points.items(), strict=True):
        axis.scatter(*cloud[:shown].T.tolist(), s=1.5, alpha=0.35, color="#2b5c8a", linewidths=0)
        axis.set(title=title, xlim=(-limit, limit), ylim=(-0.7 * limit, 0.7 * limit), aspect="equal")
        axis.set(xticks=[], yticks=[])
    return drawn


def finish(folder: Path, name: str, report: dict[str, Any], drawn: Any) -> None:
    """Write ``name.json`` and, if there is a figure, ``name.png``; say so."""
    from rich.console import Console

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.json"]
    written[0].write_text(json.dumps({"torch": torch.__version__, **report}, indent=1))
    if drawn is None:
        stderr_console().print("[yellow]matplotlib is not installed: no figure (pip install matplotlib).[/yellow]")
    else:
        written.append(folder / f"{name}.png")
        drawn.savefig(written[1], dpi=120)
    Console().print("wrote " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)


def mean_spread(values: list[float]) -> str:
    """``"0.0521 ± 0.0101"``: mean and standard deviation over seeds."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return f"{mean:.4f} ± {spread:.4f}" if len(values) > 1 else f"{mean:.4f}"
