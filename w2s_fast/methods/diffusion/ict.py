"""Improved consistency training (iCT, arXiv 2310.14189): samples in one or two network passes, without a teacher.

The network learns that two noise levels of one sample have the same origin: pairs of neighbouring levels drawn from a
discretised log-normal, Pseudo-Huber distance, weight 1 / (sigma_{i+1} - sigma_i), the number of levels doubling as
training goes on, an average of the weights for sampling. Measured on two moons: the distance of one- and two-step
samples to the true data, against a Gaussian of the data's mean and covariance and against fresh true data.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ...ops.diffusion.ict_loss import ict_loss
from ...ops.diffusion.noise_pair import noise_pair
from ...ops.diffusion.schedule import (
    SIGMA_MAX,
    SIGMA_MIN,
    consistency_scalings,
    ict_schedule,
    karras_sigmas,
    lognormal_index_probs,
)
from .._common.console import progress
from .._common.models import fit
from .._common.points import TimeMlp, moons
from .._common.report import finish, parser
from . import _report

SIGMA_MID = 0.8
SCALE = 0.5  # the moons' standard deviation is about 1, sigma_data is 0.5


def network(model: TimeMlp, x: Tensor, sigma: Tensor) -> Tensor:
    """F(c_in x, c_noise); the time features want a number of order 1."""
    scalings = consistency_scalings(sigma)
    made: Tensor = model(scalings.input[:, None] * x, scalings.noise / 1000)
    return made


@torch.no_grad()
def consistency(model: TimeMlp, x: Tensor, sigma: float) -> Tensor:
    """f(x, sigma): the origin of x at level sigma."""
    scalings = consistency_scalings(sigma)
    made: Tensor = scalings.skip * x + scalings.out * network(model, x, torch.full((len(x),), sigma))
    return made


def sample(model: TimeMlp, noise: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
    """One- and two-step samples; ``again`` is the second step's noise."""
    one = consistency(model, SIGMA_MAX * noise, SIGMA_MAX)
    level = math.sqrt(SIGMA_MID**2 - SIGMA_MIN**2)
    return one, consistency(model, one + level * again, SIGMA_MID)


def train(steps: int, *, batch: int = 1024, end: int = 160, seed: int = 0, decay: float = 0.99,
          tick: Any = None) -> TimeMlp:  # fmt: skip
    """Train from scratch; ``end`` intervals in the last phase. Returns the average of the weights."""
    generator = torch.Generator().manual_seed(seed)
    model = TimeMlp(depth=3, octaves=4, seed=seed)
    average = copy.deepcopy(model)

    def loss(step: int) -> Tensor:
        if step:
            with torch.no_grad():
                for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                    kept.lerp_(new, 1 - decay)
        levels = ict_schedule(step, steps, end=end)
        sigmas = karras_sigmas(levels)
        index = torch.multinomial(lognormal_index_probs(levels), batch, replacement=True, generator=generator)
        low, high = sigmas[index], sigmas[index + 1]
        x, z = SCALE * moons(batch, generator), torch.randn(batch, 2, generator=generator)
        x_low, x_high = noise_pair(x, z, low, high)
        with torch.no_grad():
            teacher = network(model, x_low, low)
        return ict_loss(network(model, x_high, high), teacher, x_high, x_low, high, low)

    fit(model, loss, steps, 0.01, tick=tick)
    return average


def run(seed: int, *, steps: int = 3000, count: int = 8192, tick: Any = lambda *_: None) -> dict[str, Tensor]:
    """Train; true data (twice: their distance is the floor), a Gaussian fit, one- and two-step samples by name."""
    model = train(steps, seed=seed, tick=tick(f"consistency model, seed {seed}", steps))
    generator = torch.Generator().manual_seed(1000 + seed)
    true, again = moons(count, generator), moons(count, generator)
    noise, second, third = (torch.randn(count, 2, generator=generator) for _ in range(3))
    one, two = (made / SCALE for made in sample(model, noise, second))
    gaussian = true.mean(0) + third @ torch.linalg.cholesky(true.T.cov()).T
    return {"true data": true, "true data again": again, "Gaussian fit": gaussian, "one step": one, "two steps": two}


def main(arguments: list[str] | None = None) -> int:
    """`w2s-fast train ict`: print the distances, write ict.png and ict.json. About a minute on two CPU cores."""
    from rich.console import Console

    given = parser("ict", __doc__, seeds=3).parse_args(arguments)
    sizes = {"steps": 600, "count": 2048} if given.quick else {}
    with progress() as start:
        found = {seed: run(seed, **sizes, tick=start) for seed in given.seeds}
    measured, table = _report.distances(found)
    Console().print(table)
    first = found[given.seeds[0]]
    shown = {f"{name}: {measured[name][0]:.3f}": first[name] for name in ("Gaussian fit", "one step", "two steps")}
    finish(given.out, "ict", {"seeds": given.seeds, "distance": measured},
           _report.clouds({"true data": first["true data"], **shown}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
