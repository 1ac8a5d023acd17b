"""What the commands of certified training report: errors at the trained radius and certificates at every radius."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...nn import bound
from .._common.report import figure, finish, mean_spread
from ._common import CLIP, error, verified_error

RADII = 9
COLORS = ("#8c96a5", "#3b6fb6", "#7a9e4b", "#c8553d")


class Outcome(NamedTuple):
    """One trained model on the test pictures: error; verified error at the radius, by intervals and by the better of
    intervals and CROWN-IBP; verified error by intervals at the radii of `radii`; seconds of training."""

    error: float
    verified: float
    tighter: float
    curve: list[float]
    seconds: float


def radii(eps: float) -> list[float]:
    """From 0 to twice the radius."""
    return [2 * eps * i / (RADII - 1) for i in range(RADII)]


def outcome(model: nn.Module, x: Tensor, y: Tensor, eps: float, seconds: float) -> Outcome:
    """Measure a trained model; all certificates are sound in floating point."""
    tighter = bound(model.eval()).verified(x, y, eps, CLIP, "crown-ibp")
    curve = [verified_error(model, x, y, radius) for radius in radii(eps)]
    return Outcome(error(model, x, y), verified_error(model, x, y, eps), 1 - tighter.double().mean().item(), curve,
                   seconds)  # fmt: skip


def table(eps: float, seeds: list[int], found: dict[str, list[Outcome]]) -> Any:
    """A row a method: verified error of each seed and mean, error, verified error by the tighter bounds, seconds."""
    from rich.table import Table

    made = Table(title=f"Verified test error at radius {eps:g}, percent")
    made.add_column("training")
    for name in (*(f"seed {seed}" for seed in seeds), "mean", "by the tighter bound", "plain error", "seconds"):
        made.add_column(name, justify="right")
    for name, rows in found.items():
        verified = [100 * r.verified for r in rows]
        others = [mean_spread([100 * v for v in column], 1) for column in zip(*((r.tighter, r.error) for r in rows),
                                                                              strict=True)]  # fmt: skip
        seconds = sum(r.seconds for r in rows) / len(rows)
        made.add_row(name, *(f"{v:.1f}" for v in verified), mean_spread(verified, 1), *others, f"{seconds:.1f}")
    return made


def draw(eps: float, found: dict[str, list[Outcome]]) -> Any:
    """Verified error against the radius of the test, each seed a line; None without matplotlib."""
    drawn = figure(6.4, 4)
    if drawn is None:
        return None
    axis = drawn.subplots()
    for color, (name, rows) in zip(COLORS, found.items(), strict=False):
        for i, row in enumerate(rows):
            axis.plot(radii(eps), [100 * v for v in row.curve], color=color, linewidth=1.2, label=None if i else name)
    axis.axvline(eps, color="black", linewidth=0.6, linestyle=":")
    axis.annotate(" trained for", (eps, 2), fontsize=8)
    axis.set(xlabel="radius of the test", ylabel="verified test error, percent", ylim=(0, 102))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return drawn


def show(name: str, out: Path, eps: float, seeds: list[int], found: dict[str, list[Outcome]], facts: Any) -> None:
    """Print the table; write ``name.json`` and ``name.png``."""
    from rich.console import Console

    Console(width=max(120, Console().width)).print(table(eps, seeds, found))
    rows = {method: [row._asdict() for row in outcomes] for method, outcomes in found.items()}
    report = {"seeds": seeds, "eps": eps, "radii": radii(eps), "threads": torch.get_num_threads(), **facts}
    finish(out, name, {**report, "methods": rows}, draw(eps, found))
