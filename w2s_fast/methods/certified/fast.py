"""Fast certified training with a short warm-up (arXiv 2103.17268): initialisation, batch-norm and two regularisers.

Weights start as N(0, 2 pi / n^2), n the fan-in, so that the radius of a box neither grows nor shrinks from layer to
layer; batch-norm follows every layer but the last; while eps rises, ``lambda (L_tight + L_relu)`` of
`w2s_fast.fast_reg` is added to the cross-entropy of the worst-case margins, lambda = 0.5 (1 - eps / eps_max).

Measured on scikit-learn's digits, CNN-7 of width 8, 30 epochs, 15 of them the ramp, three seeds: the share of test
pictures without a certificate at radius 0.1 falls from training without bounds to IBP (no batch-norm, kappa to 1/2) to
all of the paper. Each training has its own best learning rate of 0.004, 0.008 and 0.016, by two or three other
seeds on a fifth of the training pictures. Most of the gain is the row "IBP, batch-norm": at its best rate it alone does
as well as all of the paper, here and with a ramp of 6 epochs in 16. At a small common rate (0.002, one seed)
initialisation and regularisers do help, which fits that beside batch-norm smaller weights are a larger step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import IntervalModule
from ...ops.interval_bounds.fast_reg import fast_reg
from .._common.console import progress
from .._common.digits import digits
from .._common.report import parser
from . import _report
from ._common import CLIP, convolutional
from ._training import Loss, Ramp, Schedule, Stage, linear, smoothed, train
from .ibp import EPS, ibp_loss, plain_loss

WIDTH = 8
SCHEDULE = Schedule(epochs=30, first=1, length=15, batch=64, rate=8e-3)
WEIGHT = 0.5  # lambda where the ramp begins
FLOOR = 1e-6  # of the radius, for the regularisers before the ramp


def initialise(model: nn.Module, seed: int) -> None:
    """N(0, 2 pi / n^2) for every weight but the last layer's (the halving after a residual sum has no place here)."""
    draw = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer in layers[:-1]:
        nn.init.normal_(layer.weight, 0.0, math.sqrt(2 * math.pi) / layer.weight[0].numel(), generator=draw)


def robust_loss(module: IntervalModule, x: Tensor, y: Tensor, stage: Stage) -> Tensor:
    """Cross-entropy of the worst-case margins, of the logits while eps is 0: kappa is 0 here."""
    found = module.propagate(x, stage.eps, clip=CLIP, clean=True)
    return F.cross_entropy(found.margins(y) if stage.eps else found.logits, y)


def fast_loss(module: IntervalModule, x: Tensor, y: Tensor, stage: Stage) -> Tensor:
    """The same, and the regularisers until the ramp ends."""
    found = module.propagate(x, max(stage.eps, FLOOR), clip=CLIP, clean=True)
    value = F.cross_entropy(found.margins(y) if stage.eps else found.logits, y)
    if stage.ramp:
        tight, relu = fast_reg(found.before_relu, found.input_box)
        value = value + WEIGHT * (1 - stage.share) * (tight + relu).to(value.dtype)
    return value


class Variant(NamedTuple):
    """What is trained: batch-norm, the paper's initialisation, loss, ramp and learning rate."""

    norm: bool
    own_start: bool
    loss: Loss
    ramp: Ramp
    rate: float = SCHEDULE.rate


VARIANTS = {
    "plain": Variant(True, False, plain_loss, linear),
    "IBP": Variant(False, False, ibp_loss, linear),
    "IBP, batch-norm": Variant(True, False, robust_loss, smoothed, 1.6e-2),
    "fast": Variant(True, True, fast_loss, smoothed),
}


def network(variant: Variant, seed: int, width: int = WIDTH) -> nn.Sequential:
    """CNN-7 of the variant."""
    model = convolutional(width, seed, norm=variant.norm)
    if variant.own_start:
        initialise(model, seed)
    return model


def main(arguments: list[str] | None = None) -> int:
    """`w2s-fast train fast`: print the verified errors, write fast.png and fast.json. A minute on one CPU core."""
    given = parser("fast", __doc__, seeds=3).parse_args(arguments)
    schedule = SCHEDULE._replace(epochs=4, length=2) if given.quick else SCHEDULE
    (x, y), (test_x, test_y) = digits()
    x, test_x = x.reshape(-1, 1, 8, 8), test_x.reshape(-1, 1, 8, 8)
    found: dict[str, list[_report.Outcome]] = {name: [] for name in VARIANTS}
    with progress() as start:
        for seed in given.seeds:
            for name, variant in VARIANTS.items():
                model = network(variant, seed, 4 if given.quick else WIDTH)
                tick = start(f"{name}, seed {seed}", schedule.epochs)
                own = schedule._replace(rate=variant.rate)
                seconds = train(model, x, y, variant.loss, EPS, own, seed, variant.ramp, tick)
                found[name].append(_report.outcome(model, test_x, test_y, EPS, seconds))
    rates = {name: variant.rate for name, variant in VARIANTS.items()}
    facts = {"schedule": schedule._asdict(), "rates": rates, "width": WIDTH}
    _report.show("fast", given.out, EPS, given.seeds, found, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
