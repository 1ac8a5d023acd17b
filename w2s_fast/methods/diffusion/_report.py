"""What the diffusion methods' commands share: distances to the true data, point clouds side by side."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._common.points import sliced_wasserstein
from .._common.report import figure, seed_table


def distances(found: dict[int, dict[str, Tensor]]) -> tuple[dict[str, list[float]], Any]:
    """Distances to the first cloud of each seed, by cloud, and the same as a table."""
    first = next(iter(found.values()))
    truth, *others = first
    measured = {name: [sliced_wasserstein(made[name], made[truth]) for made in found.values()] for name in others}
    title = f"Sliced Wasserstein distance to the {truth} (lower is better)"
    return measured, seed_table(title, "samples of", list(found), measured)


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
