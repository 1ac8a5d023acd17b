"""MEAL V2 (arXiv 2009.08453): a student learns from an ensemble of teachers alone, without a label.

The target is the mean of the teachers' softmax outputs, the loss its cross-entropy with the student's,
``-sum_c q_c log p_c``, q = (1 / M) sum_m softmax(z_m), plus a discriminator between the student's logits and the mean
of the teachers' that is optimised together with the student, in the same direction. No hard label, no temperature.

Here, digits moved by up to a pixel: two convolutional teachers trained on all 1437 training digits, and a smaller
student that hard labels have trained on 100 of them. It goes on with these 100, with the same steps and rate, from hard
labels, from the ensemble, and from the ensemble with the discriminator. Measured: percent of wrong test digits. The
ensemble helps where the student's data are few. With 300 digits it gained less (hard labels 7.5, ensemble 6.9, three
seeds), with all 1437 nothing (4.4 and 4.7 against 3.9 and 5.0, two seeds). The discriminator did not help here.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ...ops.linear_loss.kd import kd_loss
from .._common import report
from .._common.console import progress
from .._common.digits import Split, digits
from .._common.training import NOTHING, Start, Watch, unwatched, watches
from ._common import Batches, bars, error, fit, jitter, network

BATCH, RATE = 64, 3e-3
CONTINUED = ("hard labels", "ensemble", "ensemble, discriminator")


class Discriminator(nn.Sequential):
    """Logits ``[N, C]`` to two outputs, student or teacher; ReLU behind every layer, the last too, as published."""

    def __init__(self, classes: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = (classes, 8, 4, 2)
            super().__init__(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))

    def loss(self, student: Tensor, teachers: list[Tensor]) -> Tensor:
        """Binary cross-entropy against (1, 0) for the student's rows and (0, 1) for the teachers' mean logits."""
        mean = torch.stack(teachers).mean(0)
        found: Tensor = self(torch.cat((student, mean)))
        target = torch.eye(2, dtype=found.dtype).repeat_interleave(len(student), 0)
        return binary_cross_entropy_with_logits(found, target)


def ensemble_loss(student: Tensor, teachers: list[Tensor]) -> Tensor:
    """Cross-entropy of the student with the mean of the teachers' softmax outputs."""
    return kd_loss(student, [("logits", z) for z in teachers], kind="ce_soft")[0]


def train_hard(model: nn.Module, data: Split, steps: int, seed: int, watch: Watch = NOTHING) -> nn.Module:
    """On the labels, in place; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    take = Batches(len(data.y), BATCH, generator)

    def loss(step: int) -> Tensor:
        rows = take()
        return cross_entropy(model(jitter(data.x[rows], generator)), data.y[rows])

    fit(model, loss, steps, RATE, watch, generator=generator, take=take)
    return model


def train_meal(
    model: nn.Module, teachers: list[nn.Module], x: Tensor, steps: int, seed: int, *, discriminate: bool = True,
    watch: Watch = NOTHING,
) -> nn.Module:  # fmt: skip
    """On the teachers' outputs, in place, with the batches of `train_hard`; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    take = Batches(len(x), BATCH, generator)
    judge = Discriminator(10, seed)

    def loss(step: int) -> Tensor:
        seen = jitter(x[take()], generator)
        with torch.no_grad():
            told = [teacher(seen) for teacher in teachers]
        made = model(seen)
        value = ensemble_loss(made, told)
        return value + judge.loss(made, told) if discriminate else value

    fit(nn.ModuleList((model, judge)), loss, steps, RATE, watch, generator=generator, take=take)
    return model


def run(seed: int, *, steps: int = 1500, pictures: int = 100, start: Start = unwatched) -> dict[str, float]:
    """Percent of wrong test digits, by name."""
    train, test = digits()
    teachers = [
        train_hard(network(w, 100 * seed + w), train, steps, 100 * seed + w, start(f"teacher {w}, seed {seed}", steps))
        for w in (12, 16)
    ]
    chosen = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))[:pictures]
    few = Split(train.x[chosen], train.y[chosen])
    first = train_hard(network(4, seed), few, steps, seed, start(f"student, seed {seed}", steps))
    found = {f"teacher {w}": error(t, *test) for w, t in zip((12, 16), teachers, strict=True)}
    found["start"] = error(first, *test)
    for name in CONTINUED:
        student, watch = copy.deepcopy(first), start(f"{name}, seed {seed}", steps)
        if name == "hard labels":
            train_hard(student, few, steps, seed + 1000, watch)
        else:
            train_meal(student, teachers, few.x, steps, seed + 1000, discriminate="disc" in name, watch=watch)
        found[name] = error(student, *test)
    return found


def main(arguments: list[str]) -> int:
    """`w2s-fast train meal_v2`: print the errors, write meal_v2.png and meal_v2.json."""
    from rich.console import Console

    given = report.parser("meal_v2", __doc__, seeds=3).parse_args(arguments)
    with progress() as ticks:
        start = watches(ticks, given.out, __file__)
        found = [run(seed, **({"steps": 60} if given.quick else {}), start=start) for seed in given.seeds]
    rows = {name: [f[name] for f in found] for name in found[0]}
    Console().print(report.seed_table("Wrong test digits, percent", "trained with", given.seeds, rows, 2))
    report.finish(given.out, "meal_v2", {"seeds": given.seeds, "error": rows},
                  bars("MEAL V2 on digits", "wrong test digits, %", rows))  # fmt: skip
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
