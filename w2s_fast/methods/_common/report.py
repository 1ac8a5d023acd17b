"""What the methods' commands share: options, a figure without a display, files of results."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from ...files import out_folder, write_figure, write_json
from .console import no_figure


def parser(name: str, description: str | None, seeds: int) -> argparse.ArgumentParser:
    """Options of every method: --seeds, --out, --quick."""
    made = argparse.ArgumentParser(prog=f"w2s-fast train {name}", description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)), help="(default %(default)s)")
    made.add_argument("--out", type=out_folder, default=f"w2s_fast_{name}", help="folder for figure and numbers")
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


def finish(folder: Path, name: str, report: dict[str, Any], drawn: Any) -> None:
    """Write ``name.json`` and, if there is a figure, ``name.png``; say so."""
    from rich.console import Console

    written = [folder / f"{name}.json"]
    write_json(written[0], {"torch": torch.__version__, **report})
    if drawn is None:
        no_figure()
    else:
        written.append(folder / f"{name}.png")
        write_figure(written[1], drawn, dpi=120)
    Console().print("wrote " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)


def seed_table(title: str, label: str, seeds: list[int], rows: dict[str, list[float]], digits: int = 4) -> Any:
    """A rich table: a row a name with its value of each seed, mean and standard deviation."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column(label)
    for name in (*(f"seed {seed}" for seed in seeds), "mean"):
        table.add_column(name, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{v:.{digits}f}" for v in values), mean_spread(values, digits))
    return table


def mean_spread(values: list[float], digits: int = 4) -> str:
    """``"0.0521 ± 0.0101"``: mean and standard deviation over seeds."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"
