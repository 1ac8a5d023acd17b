"""W2SD (arXiv 2502.00473): reflection between a strong and a weak diffusion model, sampling past the strong one.

A denoising step of the strong model and an inversion step of the weak one move a latent along the difference of their
scores. The bet is that strong minus weak points where truth minus strong does. Here it does: the data are two moons
with equal shares, the weak model was trained where the second moon is rare (20%), the strong one was fine-tuned from
it where it is less rare (33%). Measured: the distance of samples to the true data, for each model alone, for the strong
one with as many network passes as reflection takes, and for both together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.diffusion.sampler import Network, w2sd_sample
from .._common.console import progress
from .._common.models import fit
from .._common.points import TimeMlp, moons
from .._common.report import finish, parser
from . import _report

STEPS = 50
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
WEAK_SHARE, STRONG_SHARE = 0.2, 1 / 3


class Counted:
    """A network that counts its passes; ``network(x, t, conditional)`` is one of them."""

    def __init__(self, network: Callable[[Tensor, int, bool], Tensor]) -> None:
        self.network, self.passes = network, 0

    def __call__(self, x: Tensor, t: int, branch: str) -> Any:
        branches = {"uncond": [False], "cond": [True], "both": [False, True]}[branch]
        self.passes += len(branches)
        made = [self.network(x, t, b) for b in branches]
        return made if branch == "both" else made[0]


def labels(steps: int) -> list[int]:
    """Evenly spaced time labels, 981, 961, ..., 1 for 50 steps."""
    return [1 + 1000 // steps * i for i in reversed(range(steps))]


def pass_counts() -> dict[str, tuple[int, int]]:
    """Network passes of the paper's settings with 50 steps, here and where both branches always run."""
    settings = {"weight gap, reflection at 1 / 1": (1.0, 1.0), "guidance gap, 5.5 / 0": (5.5, 0.0)}
    made = {}
    for name, (strong, weak) in settings.items():
        network = Counted(lambda x, t, conditional: x)
        w2sd_sample(network, network, torch.zeros(1, 1), labels(STEPS), ABAR, strong_guidance=strong,
                    weak_guidance=weak)  # fmt: skip
        made[name] = (network.passes, 2 * (STEPS + 2 * (STEPS - 1)))
    return made


def train_noise(
    model: TimeMlp, share: float, steps: int, rate: float, *, batch: int = 1024, seed: int = 0,
    tick: Callable[[float], None] | None = None,
) -> TimeMlp:  # fmt: skip
    """Train ``model`` in place to predict the noise in moons of which ``share`` are the second; returns it."""
    generator = torch.Generator().manual_seed(seed)
    abar = ABAR.float()

    def loss(step: int) -> Tensor:
        x, noise = moons(batch, generator, share), torch.randn(batch, 2, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        level = abar[t][:, None]
        found: Tensor = model(level.sqrt() * x + (1 - level).sqrt() * noise, t / 1000)
        return (found - noise).square().mean()

    fit(model, loss, steps, rate, tick=tick)
    return model


def noise_prediction(model: TimeMlp) -> Network:
    """The model as `w2sd_sample` asks for it; it has no guidance branches."""
    return lambda x, t, branch: model(x, torch.full((len(x),), t / 1000))


def sample(strong: TimeMlp, weak: TimeMlp, x: Tensor, *, steps: int = STEPS, **settings: Any) -> Tensor:
    """W2SD without guidance, so 1 on every side; ``reflect_steps=0`` is DDIM of the strong model."""
    return w2sd_sample(noise_prediction(strong), noise_prediction(weak), x, labels(steps), ABAR, guidance=1.0,
                       strong_guidance=1.0, weak_guidance=1.0, **settings)  # fmt: skip


def run(seed: int, *, steps: int = 1500, count: int = 8192, tick: Any = lambda *_: None) -> dict[str, Tensor]:
    """Train both models; true data (twice: their distance is the floor) and samples, by name, each ``[count, 2]``."""
    weak = train_noise(TimeMlp(seed=seed), WEAK_SHARE, steps, 0.02, seed=seed, tick=tick(f"weak, seed {seed}", steps))
    strong = train_noise(copy.deepcopy(weak), STRONG_SHARE, steps // 2, 0.01, seed=seed,
                         tick=tick(f"strong, seed {seed}", steps // 2))  # fmt: skip
    generator = torch.Generator().manual_seed(1000 + seed)
    true, again = moons(count, generator), moons(count, generator)
    x = torch.randn(count, 2, generator=generator)
    return {
        "true data": true, "true data again": again, "weak model": sample(weak, weak, x, reflect_steps=0),
        "strong model": sample(strong, strong, x, reflect_steps=0),
        "strong, 148 steps": sample(strong, strong, x, steps=148, reflect_steps=0),
        "W2SD": sample(strong, weak, x), "W2SD, released schedule": sample(strong, weak, x, schedule="released"),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """`w2s-fast train w2sd`: print the distances, write w2sd.png and w2sd.json. About 30 seconds on two CPU cores."""
    from rich.console import Console

    given = parser("w2sd", __doc__, seeds=3).parse_args(arguments)
    sizes = {"steps": 300, "count": 2048} if given.quick else {}
    with progress() as start:
        found = {seed: run(seed, **sizes, tick=start) for seed in given.seeds}
    measured, table = _report.distances(found)
    console, passes = Console(), pass_counts()
    console.print(table)
    for name, (ours, both) in passes.items():
        console.print(f"{name}: {ours} network passes, {both} where both branches always run", highlight=False)
    first = found[given.seeds[0]]
    shown = {f"{name}: {measured[name][0]:.3f}": first[name] for name in ("weak model", "strong model", "W2SD")}
    finish(given.out, "w2sd", {"seeds": given.seeds, "distance": measured, "passes": passes},
           _report.clouds({"true data": first["true data"], **shown}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
