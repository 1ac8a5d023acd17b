"""Boundary tilting (arXiv 1608.07690): adversarial examples of a linear classifier come from the tilt of its boundary.

With z the unit vector between the class means (the nearest centroid's normal) and c the classifier's, the deviation
angle is ``theta = angle(c, z)``. The adversarial strength, how much nearer a mean is to its mirror image through the
classifier than through the bisector of the means, is ``1 / cos(theta)`` for a boundary through their midpoint. Tilted
along a direction of low variance, a boundary keeps its error while its strength diverges.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ... import checks

OP = "methods.boundary_tilting"


class Tilt(NamedTuple):
    """Deviation angle in radians, and the strength (the mean over both classes)."""

    angle: float
    strength: float


def _between(means: tuple[Tensor, Tensor]) -> Tensor:
    first, second = (mean.double().flatten() for mean in means)
    if first.shape != second.shape or bool((first == second).all()):
        checks.fail(OP, "means", "two different vectors of the same length", [tuple(mean.shape) for mean in means])
    return second - first


def class_means(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of samples ``[N, *]`` of labels 0 and 1."""
    return x[y == 0].double().mean(0).flatten(), x[y == 1].double().mean(0).flatten()


def deviation_angle(normal: Tensor, means: tuple[Tensor, Tensor]) -> float:
    """Angle in [0, pi / 2] between a boundary's normal and the direction of the means, to full digits near both ends.

    Raises:
        ValueError: naming `means`.
    """
    z, c = _between(means), normal.double().flatten()
    z, c = z / z.norm(), c / c.norm()
    along = c @ z
    return math.atan2(float((c - along * z).norm()), abs(float(along)))


def measure(normal: Tensor, bias: float | Tensor, means: tuple[Tensor, Tensor]) -> Tilt:
    """Angle and strength of the boundary ``normal x + bias = 0``.

    Raises:
        ValueError: naming `means`.
    """
    z, w = _between(means), normal.double().flatten()
    through = sum(abs(float(mean.double().flatten() @ w) + float(bias)) for mean in means) / 2 / float(w.norm())
    return Tilt(deviation_angle(normal, means), float(z.norm()) / 2 / max(through, 1e-300))


def tilted(means: tuple[Tensor, Tensor], direction: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    """Unit normal and bias of the bisector, tilted by ``angle`` towards a direction, across the means'.

    Raises:
        ValueError: naming `means`, `direction`.
    """
    z = _between(means)
    z = z / z.norm()
    v = direction.double().flatten()
    v = v - (v @ z) * z
    if float(v.norm()) == 0:
        checks.fail(OP, "direction", "not along the means", "a multiple of their difference")
    normal = math.cos(angle) * z + math.sin(angle) * v / v.norm()
    return normal, -(means[0].double().flatten() + means[1].double().flatten()) @ normal / 2
