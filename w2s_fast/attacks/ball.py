"""The set an attack stays in: a ball around x within the clip range, never left, not by a rounding either."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from .. import checks

#: Lowest and highest value of an input: numbers, or tensors that broadcast to it.
Clip = tuple[float | Tensor, float | Tensor] | None
OP = "attacks"


def radius(eps: float | Tensor, x: Tensor) -> Tensor:
    """``eps`` in the dtype of x, rounded down: no float of that dtype lies between it and eps."""
    wide = torch.as_tensor(eps, dtype=torch.float64, device=x.device)
    found = wide.to(x.dtype)
    return torch.where(found.double() > wide, torch.nextafter(found, torch.zeros_like(found)), found)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Values of samples ``[..]`` to multiply x ``[.., *]`` with."""
    return values.reshape(*values.shape, *[1] * (x.ndim - values.ndim))


def norm2(d: Tensor, lead: int) -> Tensor:
    """Euclidean norm of every sample, in float64."""
    found: Tensor = torch.linalg.vector_norm(d.flatten(lead), dim=-1, dtype=torch.float64)
    return found


def unit(g: Tensor, lead: int, order: int = 2) -> Tensor:
    """Every sample of g over its 1- or 2-norm; 0 stays 0."""
    size = torch.linalg.vector_norm(g.flatten(lead).float(), ord=order, dim=-1).clamp_min(1e-12)
    return (g.float() / per_sample(size, g)).to(g.dtype) if g.dtype.itemsize < 4 else g / per_sample(size, g)


class Box:
    """L-infinity: ``[max(x - eps, low), min(x + eps, high)]``; an end that a rounding moved out is moved in."""

    def __init__(self, x: Tensor, eps: float | Tensor, clip: Clip, lead: int) -> None:
        self.x, self.lead, self.eps = x, lead, radius(eps, x).expand(x.shape)
        self.low, self.high = x - self.eps, x + self.eps
        for end in (self.low, self.high):
            out = (end.double() - x.double()).abs() > self.eps.double()
            end.copy_(torch.where(out, torch.nextafter(end, x), end))
        if clip is not None:
            self.low, self.high = self.low.clamp(min=clip[0]), self.high.clamp(max=clip[1])

    def at(self, rows: Tensor) -> Box:
        """Of some samples."""
        found = copy.copy(self)
        found.x, found.eps, found.low, found.high = (t[rows] for t in (self.x, self.eps, self.low, self.high))
        return found

    def project(self, z: Tensor) -> Tensor:
        """The nearest point of the box."""
        return torch.minimum(torch.maximum(z, self.low), self.high)

    def direction(self, g: Tensor) -> Tensor:
        """Steepest: the sign, 0 for 0."""
        return g.sign()

    def random(self, generator: torch.Generator | None) -> Tensor:
        """Uniform in the ball, clipped."""
        noise = torch.rand(self.x.shape, generator=generator, device=_home(generator, self.x)).to(self.x)
        return self.project(self.x + self.eps * (2 * noise - 1))


class Sphere:
    """L2: projected onto a radius smaller than eps by what the roundings of the projection itself may add."""

    def __init__(self, x: Tensor, eps: float | Tensor, clip: Clip, lead: int) -> None:
        self.x, self.lead, self.clip, self.eps = x, lead, clip, radius(eps, x)

    def at(self, rows: Tensor) -> Sphere:
        """Of some samples."""
        found = copy.copy(self)
        found.x = self.x[rows]
        return found

    def project(self, z: Tensor) -> Tensor:
        """The nearest point of the ball, then clipped, which brings no coordinate further off x."""
        near = self._inside(z)
        if self.clip is None:
            return near
        low, high = self.clip
        return near.clamp(min=low).clamp(max=high)

    def _inside(self, z: Tensor) -> Tensor:
        moved = z - self.x
        size, rough = norm2(moved, self.lead), torch.finfo(z.dtype).eps
        lost = rough * (norm2(z, self.lead) + norm2(self.x, self.lead) + 4 * self.eps.double())
        factor = ((self.eps.double() - lost).clamp_min(0) / size.clamp_min(1e-30)).clamp(max=1)
        near = self.x + moved * per_sample(factor, z).to(z.dtype)
        return torch.where(per_sample(size > self.eps.double() - lost, z), near, z)

    def direction(self, g: Tensor) -> Tensor:
        """Steepest: of norm 1."""
        return unit(g, self.lead)

    def random(self, generator: torch.Generator | None) -> Tensor:
        """Uniform in the ball, clipped."""
        home = _home(generator, self.x)
        noise = torch.randn(self.x.shape, generator=generator, device=home).to(self.x)
        share = torch.rand(self.x.shape[: self.lead], generator=generator, device=home).to(self.x)
        share = share ** (1 / max(1, math.prod(self.x.shape[self.lead :])))
        return self.project(self.x + self.eps * per_sample(share, self.x) * unit(noise, self.lead))


def _home(generator: torch.Generator | None, x: Tensor) -> Any:
    return x.device if generator is None else generator.device


BALLS: dict[str, type[Box] | type[Sphere]] = {"linf": Box, "l2": Sphere}


def check_clip(x: Tensor, clip: Clip) -> None:
    """ValueError where x is not within the clip range, as far as that can be looked at without waiting for a GPU."""
    if clip is None or not checks.readable(x) or not x.numel():
        return
    low, high = (torch.as_tensor(end, device=x.device, dtype=x.dtype) for end in clip)
    if bool((x < low).any()) or bool((x > high).any()):
        checks.fail(OP, "x", f"within the range of clip, {clip}", f"values from {x.min():g} to {x.max():g}")
