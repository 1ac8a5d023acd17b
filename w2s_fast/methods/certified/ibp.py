"""Certified training by interval bounds (IBP, arXiv 1810.12715), by CROWN-IBP too (arXiv 1906.06316).

The loss is ``kappa CE(f(x), y) + (1 - kappa) CE(z, y)`` with z the worst-case margins over the box of radius eps: while
eps rises linearly to its largest value, kappa falls from 1 to 1/2. CROWN-IBP mixes its margins in,
``z = beta z_crown + (1 - beta) z_ibp``, beta from 1 to 0 over the same ramp.

Measured on scikit-learn's digits, Linear layers, three seeds: the share of test pictures without a certificate at
radius 0.1, against training without bounds. One learning rate for all, IBP's best of 0.002, 0.005 and 0.01 on a fifth
of the training pictures (two seeds of their own).
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ...nn import IntervalModule
from .._common.console import progress
from .._common.digits import digits
from .._common.report import parser
from . import _report
from ._common import CLIP, mlp
from ._training import Loss, Schedule, Stage, linear, train

KAPPA = 0.5  # after the ramp
EPS = 0.1
SCHEDULE = Schedule(epochs=60, first=1, length=30, batch=64, rate=1e-2)


def plain_loss(module: IntervalModule, x: Tensor, y: Tensor, stage: Stage) -> Tensor:
    """Cross-entropy, no bounds."""
    return F.cross_entropy(module(x), y)


def ibp_loss(module: IntervalModule, x: Tensor, y: Tensor, stage: Stage, crown: bool = False) -> Tensor:
    """The paper's loss; ``crown``: with CROWN-IBP's margins as long as the ramp lasts."""
    found = module.propagate(x, stage.eps, clip=CLIP, clean=True)
    z, kappa, beta = found.margins(y), 1 - (1 - KAPPA) * stage.share, 1 - stage.share
    if crown and beta > 0:
        z = beta * found.margins(y, "crown-ibp") + (1 - beta) * z
    return kappa * F.cross_entropy(found.logits, y) + (1 - kappa) * F.cross_entropy(z, y)


METHODS: dict[str, Loss] = {"plain": plain_loss, "IBP": ibp_loss, "CROWN-IBP": partial(ibp_loss, crown=True)}


def main(arguments: list[str] | None = None) -> int:
    """`w2s-fast train ibp`: print the verified errors, write ibp.png and ibp.json. Half a minute on one CPU core."""
    given = parser("ibp", __doc__, seeds=3).parse_args(arguments)
    schedule = SCHEDULE._replace(epochs=8, length=5) if given.quick else SCHEDULE
    (x, y), test = digits()
    found: dict[str, list[_report.Outcome]] = {name: [] for name in METHODS}
    with progress() as start:
        for seed in given.seeds:
            for name, loss in METHODS.items():
                model = mlp((128, 128), seed)
                tick = start(f"{name}, seed {seed}", schedule.epochs)
                seconds = train(model, x, y, loss, EPS, schedule, seed, linear, tick)
                found[name].append(_report.outcome(model, *test, EPS, seconds))
    _report.show("ibp", given.out, EPS, given.seeds, found, {"schedule": schedule._asdict()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
